"""CHASE_DB1 retinal vessels (Owen et al. 2011), as in Chen et al. 2024 (HiDiff), section III-A.

Owner: https://blogs.kingston.ac.uk/retinal/chasedb1/ (``CHASEDB1.zip``).

Expected: one folder of ``Image_01L.jpg``, ``Image_01L_1stHO.png``, ``Image_01L_2ndHO.png``, left and right eyes of 14
children. Known from https://github.com/openmedlab/Awesome-Medical-Dataset/blob/main/resources/CHASE.md and
https://github.com/open-mmlab/mmsegmentation/blob/main/tools/dataset_converters/chase_db1.py (84 files in the archive;
grey pixels in some annotations, from 128 on vessel, as here). The first observer's annotations are used.

Split: children 1 to 10 to train, 11 to 14 to test on, as in the code of FR-UNet (Liu et al. 2022), which HiDiff
follows: https://github.com/lseventeen/FR-UNet/blob/master/data_process.py . No cases to validate on are named.
"""

from laboratory.datasets.images import RGB, write_mask, write_rgb
from laboratory.datasets.layouts import matching, pairs
from laboratory.datasets.raw import Case, Collection, DataSet
from laboratory.datasets.sources import Sources

EYE = r"(\d\d[LR])"
IMAGE, FIRST, SECOND = rf"Image_{EYE}\.jpg", rf"Image_{EYE}_1stHO\.png", rf"Image_{EYE}_2ndHO\.png"
LAST_TRAINING_CHILD = 10


def collect(sources: Sources, seed: int) -> Collection:
    """All eyes, split by child."""
    folder = sources.find_folder(
        lambda folder, subfolders, files: any(name.endswith("_1stHO.png") for name in files),
        "folder with files as Image_01L_1stHO.png",
    )
    images = matching(sources, folder, IMAGE, unused=rf"{FIRST}|{SECOND}|.+\.zip")
    found = pairs(sources, images, matching(sources, folder, FIRST, unused=".*"), folder)
    cases = {key: Case(f"chase_{key}", (image,), mask) for key, (image, mask) in found.items()}
    return Collection(
        [case for key, case in cases.items() if int(key[:2]) <= LAST_TRAINING_CHILD],
        [],
        [case for key, case in cases.items() if int(key[:2]) > LAST_TRAINING_CHILD],
        "children 1 to 10 and 11 to 14, as in the code of FR-UNet, which Chen et al. 2024 follow",
    )


DATASET = DataSet(
    title="CHASEDB1",
    summary="Vessels in images of the retina (CHASE_DB1, Owen et al. 2011).",
    reference="https://blogs.kingston.ac.uk/retinal/chasedb1/",
    channels=RGB,
    labels={"background": 0, "vessel": 1},
    counts=(20, 0, 8),
    collect=collect,
    write_image=write_rgb,
    write_label=write_mask,
    file_ending=".png",
    wanted=r"\.(jpg|png)$",
)
