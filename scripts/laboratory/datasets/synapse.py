"""Synapse multi-organ CT (BTCV, Landman et al. 2015), as in Chen et al. 2024 (HiDiff), section III-A.

Owner: https://www.synapse.org/#!Synapse:syn3193805/wiki/217789 (``Abdomen/RawData.zip``).

Expected: a folder (``RawData/Training``) with ``img/img0001.nii.gz`` and ``label/label0001.nii.gz``, numbers 1 to 10
and 21 to 40. Labels: 1 spleen, 2 right kidney, 3 left kidney, 4 gallbladder, 5 oesophagus, 6 liver, 7 stomach, 8 aorta,
9 inferior vena cava, 10 portal and splenic vein, 11 pancreas, 12 and 13 adrenal glands. Known from
- https://github.com/open-mmlab/mmsegmentation/blob/main/docs/en/user_guides/2_dataset_prepare.md (folders and split)
  and https://github.com/open-mmlab/mmsegmentation/blob/main/tools/dataset_converters/synapse.py (the eight organs)
- https://github.com/Project-MONAI/model-zoo/blob/dev/models/swin_unetr_btcv_segmentation/docs/README.md (folders and
  labels)

Eight organs are kept, numbered as TransUNet does; the others become background.

Split: TransUNet's 18 and 12, which HiDiff follows:
https://github.com/Beckschen/TransUNet/tree/main/lists/lists_Synapse
"""

from pathlib import Path

from laboratory.datasets.images import take_nifti, write_labels
from laboratory.datasets.layouts import matching, pairs
from laboratory.datasets.raw import Case, Collection, DataSet
from laboratory.datasets.sources import Sources, listing

ORGANS = {
    "aorta": 8, "gallbladder": 4, "left kidney": 3, "right kidney": 2, "liver": 6, "pancreas": 11, "spleen": 1,
    "stomach": 7,
}  # fmt: skip
LAST_LABEL = 13
SCANS = {f"{number:04d}" for number in (*range(1, 11), *range(21, 41))}
TEST = {f"{number:04d}" for number in (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)}


def collect(sources: Sources, seed: int) -> Collection:
    """The 30 labelled scans in TransUNet's parts."""
    root = sources.find_folder(
        lambda folder, subfolders, files: {"img", "label"} <= subfolders, "folder with img and label", prefer="Training"
    )
    found = pairs(
        sources,
        matching(sources, root / "img", r"img(\d{4})\.nii\.gz"),
        matching(sources, root / "label", r"label(\d{4})\.nii\.gz"),
        root,
    )
    for message, keys in {
        "no scans and labels of": sorted(SCANS - set(found)),
        "scans that the split does not have": sorted(set(found) - SCANS),
    }.items():
        if keys:
            sources.problem(f"{root}: {message}: {listing(keys)}")
    train, test = (
        [Case(f"synapse_{key}", (found[key][0],), found[key][1]) for key in keys if key in found]
        for keys in (sorted(SCANS - TEST), sorted(TEST))
    )
    return Collection(train, [], test, "of TransUNet, as in Chen et al. 2024")


def write_label(source: Path, image: Path, target: Path) -> None:
    """The eight organs in the order of ``ORGANS``."""
    kept = {old: new for new, old in enumerate(ORGANS.values(), start=1)}
    write_labels(source, image, target, {old: kept.get(old, 0) for old in range(LAST_LABEL + 1)})


DATASET = DataSet(
    title="SynapseCT",
    summary="8 abdominal organs in CT (Synapse multi-organ, BTCV; Landman et al. 2015).",
    reference="https://www.synapse.org/#!Synapse:syn3193805/wiki/217789",
    channels=("CT",),
    labels={"background": 0, **{organ: value for value, organ in enumerate(ORGANS, start=1)}},
    counts=(18, 0, 12),
    collect=collect,
    write_image=take_nifti,
    write_label=write_label,
    file_ending=".nii.gz",
    wanted=r"(^|/)(img/img|label/label)\d{4}\.nii\.gz$",
)
