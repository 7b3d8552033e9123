"""BraTS 2021 (Baid et al. 2021), as in Fu et al. 2023, section 4.1.4, and in Chen et al. 2024 (HiDiff), section III-A.

Owner: https://www.synapse.org/#!Synapse:syn27046444 ; the papers' source is also
https://www.kaggle.com/datasets/dschettler8845/brats-2021-task1 , a zip of ``BraTS2021_Training_Data.tar`` and two tars
of one case each, which are not needed. Give the zip, the first tar, or a folder.

Expected: folders ``BraTS2021_00000`` of ``BraTS2021_00000_t1.nii.gz``, ``_t1ce``, ``_t2``, ``_flair`` and ``_seg``,
1251 of them. Labels: 1 necrotic core, 2 oedema, 4 enhancing tumour. Known from
- the loader of Fu et al. and its read-me:
  https://github.com/mathpluscode/ImgX-DiffSeg/blob/ce57729e2dcd1d21960ec797bdff2ef5df7e5101/imgx/datasets/README.md
- nnU-Net's own converter:
  https://github.com/MIC-DKFZ/nnUNet/blob/master/nnunetv2/dataset_conversion/Dataset137_BraTS21.py
- https://github.com/openmedlab/Awesome-Medical-Dataset/blob/main/resources/BraTS2021.md (also names of the folders of
  the owner's archive; cases without labels in a folder named ``...Validation...`` are left out)

Three ways to convert it; all write 1 necrotic core, 2 oedema, 3 enhancing tumour or, for the whole tumour, 1:
- ``brats2021-whole-tumour``: as in Fu et al. Split: sorted names, the first 938 to train, the next 31 to validate, the
  last 282 to test on, as in their loader (the paper calls this random).
- ``brats2021-classes``: necrotic core, oedema and enhancing tumour as classes, as in HiDiff. Split: 1126 to train, 125
  to test on. HiDiff does not publish its list: drawn with a seed.
- ``brats2021-regions``: the challenge's whole tumour, tumour core and enhancing tumour as nnU-Net's regions; split as
  for the classes, with the same seed the same cases.

HiDiff works on axial slices without the lowest 80 and the highest 26. Here volumes are kept whole: nnU-Net's 2d
configuration takes their slices.
"""

from pathlib import Path
from re import IGNORECASE, fullmatch, search

from laboratory.datasets import splits
from laboratory.datasets.images import take_nifti, write_labels
from laboratory.datasets.raw import Case, Collection, DataSet
from laboratory.datasets.sources import Sources, listing

MODALITIES = ("t1", "t1ce", "t2", "flair")
FU_COUNTS, HIDIFF_COUNTS = (938, 31, 282), (1126, 0, 125)
CLASSES = {0: 0, 1: 1, 2: 2, 4: 3}
WHOLE_TUMOUR = {0: 0, 1: 1, 2: 1, 4: 1}


def find_cases(sources: Sources) -> list[Case]:
    """All labelled cases, by name."""
    cases = []
    for folder, _, files in sources.walk():
        needed = [f"{folder.name}_{kind}.nii.gz" for kind in (*MODALITIES, "seg")]
        official_validation = search("validation", folder.parent.name, IGNORECASE) and needed[-1] not in files
        if not fullmatch(r"BraTS2021_\d{5}", folder.name) or official_validation:
            continue
        missing, unexpected = [name for name in needed if name not in files], sorted(files - set(needed))
        if unexpected:
            sources.problem(f"{folder}: unexpected {listing(unexpected)}")
        if missing:
            sources.problem(f"{folder}: no {listing(missing)}")
            continue
        *images, label = (folder / name for name in needed)
        cases.append(Case(folder.name, tuple(images), label))
    if not cases:
        sources.nothing("folders as BraTS2021_00000 with five files each")
    return sorted(cases, key=lambda case: case.name)


def collect_fu(sources: Sources, seed: int) -> Collection:
    """Split by sorted names."""
    parts = splits.cut(find_cases(sources), FU_COUNTS)
    return Collection(**parts, split="sorted names cut into parts, as in the code of Fu et al. 2023")


def collect_hidiff(sources: Sources, seed: int) -> Collection:
    """Split at random."""
    parts = splits.draw(find_cases(sources), HIDIFF_COUNTS, seed)
    sentence = f"drawn with seed {seed}; numbers of Chen et al. 2024, whose list is not published"
    return Collection(**parts, split=sentence, drawn=True)


def write_classes(source: Path, image: Path, target: Path) -> None:
    """Necrotic core 1, oedema 2, enhancing tumour 3."""
    write_labels(source, image, target, CLASSES)


def write_whole_tumour(source: Path, image: Path, target: Path) -> None:
    """All three 1."""
    write_labels(source, image, target, WHOLE_TUMOUR)


COMMON = {
    "reference": "https://www.synapse.org/#!Synapse:syn27046444",
    "channels": ("T1", "T1ce", "T2", "FLAIR"),
    "write_image": take_nifti,
    "file_ending": ".nii.gz",
    "wanted": r"BraTS2021_\d{5}_\w+\.nii\.gz$",
    "inner": r"BraTS2021_Training_Data\.tar$",
}
DATASET_WHOLE_TUMOUR = DataSet(
    title="BraTS2021WholeTumour",
    summary="Whole tumour in MR of the brain (BraTS 2021, Baid et al. 2021).",
    labels={"background": 0, "whole tumour": 1},
    counts=FU_COUNTS,
    collect=collect_fu,
    write_label=write_whole_tumour,
    **COMMON,
)
DATASET_CLASSES = DataSet(
    title="BraTS2021Classes",
    summary="Necrotic core, oedema and enhancing tumour in MR of the brain (BraTS 2021, Baid et al. 2021).",
    labels={"background": 0, "necrotic core": 1, "oedema": 2, "enhancing tumour": 3},
    counts=HIDIFF_COUNTS,
    collect=collect_hidiff,
    write_label=write_classes,
    **COMMON,
)
DATASET_REGIONS = DataSet(
    title="BraTS2021Regions",
    summary="Whole tumour, tumour core and enhancing tumour in MR of the brain (BraTS 2021, Baid et al. 2021).",
    labels={"background": 0, "whole tumour": (1, 2, 3), "tumour core": (1, 3), "enhancing tumour": 3},
    counts=HIDIFF_COUNTS,
    collect=collect_hidiff,
    write_label=write_classes,
    regions_class_order=(2, 1, 3),  # a voxel of the whole tumour only is oedema, of the core only necrotic
    **COMMON,
)
