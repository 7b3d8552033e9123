"""DRIVE retinal vessels (Staal et al. 2004), as in Chen et al. 2024 (HiDiff), section III-A.

Owner: https://drive.grand-challenge.org/ (``training.zip`` and ``test.zip``; give both, or a folder with both
unpacked).

Expected: ``training/images/21_training.tif`` to 40 with ``training/1st_manual/21_manual1.gif``, and
``test/images/01_test.tif`` to 20; ``mask`` (the field of view) and ``2nd_manual`` are not needed. Known from
- https://github.com/openmedlab/Awesome-Medical-Dataset/blob/main/resources/DRIVE.md
- https://github.com/open-mmlab/mmsegmentation/blob/main/tools/dataset_converters/drive.py (names of the archives; grey
  pixels in some manual files, from 128 on vessel, as here)
The owner publishes no ``test/1st_manual`` any more
(https://github.com/open-mmlab/mmsegmentation/blob/main/docs/en/user_guides/2_dataset_prepare.md); archives of before
2019 have ``test/1st_manual/01_manual1.gif``. Without it imagesTs is written, labelsTs is not.

Split: the owner's. HiDiff takes the first observer's annotations, follows FR-UNet (Liu et al. 2022) and names no cases
to validate on.
"""

from laboratory.datasets.images import RGB, write_mask, write_rgb
from laboratory.datasets.layouts import matching, pairs
from laboratory.datasets.raw import Case, Collection, DataSet
from laboratory.datasets.sources import Sources

MANUAL = r"(\d\d)_manual1\.gif"


def collect(sources: Sources, seed: int) -> Collection:
    """The owner's training and test set."""
    return Collection(
        _part(sources, "training", labelled=True), [], _part(sources, "test", labelled=False),
        "the owner's, as in Chen et al. 2024",
    )  # fmt: skip


def _part(sources: Sources, name: str, labelled: bool) -> list[Case]:
    folder = sources.find_folder(
        lambda folder, subfolders, files: folder.name == name and "images" in subfolders,
        f"folder {name} with images, as {name}.zip has it",
    )
    images = matching(sources, folder / "images", rf"(\d\d)_{name}\.tif")
    manual = folder / "1st_manual"
    if not manual.is_dir() and not labelled:
        sources.notes.append(f"{folder}: no 1st_manual, the test images stay without labels")
        return [Case(f"drive_{key}", (image,), None) for key, image in images.items()]
    found = pairs(sources, images, matching(sources, manual, MANUAL), folder) if manual.is_dir() else {}
    if not found:
        sources.nothing(f"{name}/images and {name}/1st_manual with files of the same numbers")
    return [Case(f"drive_{key}", (image,), mask) for key, (image, mask) in found.items()]


DATASET = DataSet(
    title="DRIVE",
    summary="Vessels in images of the retina (DRIVE, Staal et al. 2004).",
    reference="https://drive.grand-challenge.org/",
    channels=RGB,
    labels={"background": 0, "vessel": 1},
    counts=(20, 0, 20),
    collect=collect,
    write_image=write_rgb,
    write_label=write_mask,
    file_ending=".png",
    wanted=r"\.(tif|gif)$",
)
