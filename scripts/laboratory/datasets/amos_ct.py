"""AMOS 2022, its CT images (Ji et al. 2022), as in Fu et al. 2023, section 4.1.2.

Owner: https://zenodo.org/record/7262581 and https://zenodo.org/record/7155725 (``amos22.zip``).

Expected: a folder (``amos22``) with ``dataset.json`` and ``imagesTr``, ``labelsTr``, ``imagesVa``, ``labelsVa`` of
files ``amos_0001.nii.gz``; ``dataset.json`` lists "training" and "validation" as
{"image": "./imagesTr/amos_0001.nii.gz", "label": "./labelsTr/amos_0001.nii.gz"}. Numbers up to 500 are CT, others MR.
Known from
- the loader of the paper's authors:
  https://github.com/mathpluscode/ImgX-DiffSeg/blob/ce57729e2dcd1d21960ec797bdff2ef5df7e5101/imgx/datasets/amos_ct/amos_ct_dataset_builder.py
- nnU-Net's own converter, whose reader of images is set here too:
  https://github.com/MIC-DKFZ/nnUNet/blob/master/nnunetv2/dataset_conversion/Dataset218_Amos2022_task1.py
- the data's read-me ("id numbers less than 500 belong to CT data"), for example in
  https://huggingface.co/datasets/onkarsus13/AllMedicalCombine/blob/main/amos/amos22/readme.md

Not verified: the order of "validation" in ``dataset.json``, on which the split depends.

Split: "training" to train on; of "validation", in the file's order, the first tenth to validate and the rest to test
on. The paper calls this random; its authors' loader does what is done here.
"""

import json
import re
from pathlib import Path

from laboratory.datasets.images import take_nifti, write_labels
from laboratory.datasets.raw import Case, Collection, DataSet
from laboratory.datasets.sources import LayoutError, Sources, listing

LAST_CT = 500
ORGANS = (
    "spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach", "aorta", "postcava",
    "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus",
)  # fmt: skip


def collect(sources: Sources, seed: int) -> Collection:
    """The CT cases that dataset.json lists."""
    needed = {"imagesTr", "labelsTr", "imagesVa", "labelsVa"}
    root = sources.find_folder(
        lambda folder, subfolders, files: needed <= subfolders and "dataset.json" in files,
        f"folder with dataset.json, {', '.join(sorted(needed))}",
    )
    try:
        listed = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
        train, official = (
            [(pair["image"], pair["label"]) for pair in listed[part]] for part in ("training", "validation")
        )
    except (ValueError, KeyError, TypeError) as error:
        raise LayoutError(
            f"{root / 'dataset.json'}: {error!r}, expected 'training' and 'validation' as lists of image and label"
        ) from error
    train, official = _cases(sources, root, train), _cases(sources, root, official)
    val = len(official) // 10
    return Collection(
        train, official[:val], official[val:],
        "the official training set; the first tenth of the official validation set, in dataset.json's order, to "
        "validate and the rest to test on, as in the code of Fu et al. 2023",
    )  # fmt: skip


def _cases(sources: Sources, root: Path, listed: list[tuple[str, str]]) -> list[Case]:
    cases, missing = [], []
    for image, label in listed:
        match = re.fullmatch(r"amos_(\d{4})\.nii\.gz", Path(image).name)
        if not match:
            raise LayoutError(f"{root / 'dataset.json'}: lists {image}, expected names as amos_0001.nii.gz")
        if int(match.group(1)) > LAST_CT:
            continue
        absent = [name for name in (image, label) if not (root / name).is_file()]
        missing += absent
        if not absent:
            cases.append(Case(f"amos_{match.group(1)}", (root / image,), root / label))
    if missing:
        sources.problem(f"{root}: dataset.json lists files that are not there: {listing(missing)}")
    return cases


def write_label(source: Path, image: Path, target: Path) -> None:
    """The label map as it is."""
    write_labels(source, image, target, {value: value for value in range(len(ORGANS) + 1)})


DATASET = DataSet(
    title="AmosCT",
    summary="15 abdominal organs in CT (AMOS 2022, Ji et al. 2022).",
    reference="https://zenodo.org/record/7262581",
    channels=("CT",),
    labels={"background": 0, **{organ: value for value, organ in enumerate(ORGANS, start=1)}},
    counts=(200, 10, 90),
    collect=collect,
    write_image=take_nifti,
    write_label=write_label,
    file_ending=".nii.gz",
    # neither the images to be sent to the challenge nor MR, numbers from 0501
    wanted=r"(^|/)(dataset\.json|(images|labels)(Tr|Va)/amos_0([0-4]\d\d|500)\.nii\.gz)$",
    reader="NibabelIOWithReorient",
)
