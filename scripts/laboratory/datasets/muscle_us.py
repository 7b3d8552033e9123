"""Transverse musculoskeletal ultrasound (Marzola et al. 2021), as in Fu et al. 2023, section 4.1.1.

Owner: https://data.mendeley.com/datasets/3jykz7wz8d/1 (the paper's footnote has a typing error in this address).

Expected: a folder ``MuscleCNN`` (in ``Polito-Radboud-DeepLearningUS/Segmentation_models/data``) with the images
``train``, ``val``, ``test`` and their masks ``trainannot``, ``valannot``, ``testannot``, PNG files of the same names.
Known from the loader of the paper's authors:
https://github.com/mathpluscode/ImgX-DiffSeg/blob/ce57729e2dcd1d21960ec797bdff2ef5df7e5101/imgx/datasets/muscle_us/muscle_us_dataset_builder.py
That loader takes pixels of 255 as muscle. It uses images that have a mask only: the data set has 3917 images, the paper
3910 (2531, 666, 713), so images without a mask are left out here too and named.

Not verified: that masks hold 0 and 255 only (any value from 128 on is muscle here).

Split: the owner's folders.
"""

from pathlib import Path

from laboratory.datasets.images import GREY, write_grey, write_mask
from laboratory.datasets.layouts import matching, pairs
from laboratory.datasets.raw import Case, Collection, DataSet
from laboratory.datasets.sources import LayoutError, Sources

FOLDERS = {"train": "train", "val": "val", "test": "test"}
PNG = r"(.+)\.png"


def collect(sources: Sources, seed: int) -> Collection:
    """The cases in the owner's folders."""
    needed = {name for folder in FOLDERS.values() for name in (folder, f"{folder}annot")}
    root = sources.find_folder(
        lambda folder, subfolders, files: needed <= subfolders,
        f"folder with {', '.join(sorted(needed))}",
        prefer="MuscleCNN",
    )
    parts = {part: _part(sources, root / name, root / f"{name}annot") for part, name in FOLDERS.items()}
    return Collection(**parts, split="the owner's folders train, val and test, as in the paper")


def _part(sources: Sources, images: Path, masks: Path) -> list[Case]:
    found = pairs(sources, matching(sources, images, PNG), matching(sources, masks, PNG), images, strict=False)
    if not found:
        raise LayoutError(f"{images} and {masks}: found no PNG files of the same names")
    return [Case(name, (image,), mask) for name, (image, mask) in found.items()]


DATASET = DataSet(
    title="MuscleUS",
    summary="Muscles in transverse ultrasound images (Marzola et al. 2021).",
    reference="https://data.mendeley.com/datasets/3jykz7wz8d/1",
    channels=GREY,
    labels={"background": 0, "muscle": 1},
    counts=(2531, 666, 713),
    collect=collect,
    write_image=write_grey,
    write_label=write_mask,
    file_ending=".png",
    wanted=r"\.png$",
)
