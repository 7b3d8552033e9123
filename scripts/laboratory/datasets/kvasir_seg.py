"""Kvasir-SEG polyps (Jha et al. 2020), as in Chen et al. 2024 (HiDiff), section III-A.

Owner: https://datasets.simula.no/kvasir-seg/ (``kvasir-seg.zip``).

Expected: a folder (``Kvasir-SEG``) with ``images`` and ``masks``, 1000 JPEG files each, an image and its mask of the
same name. Known from https://github.com/DebeshJha/Kvasir-SEG (README.md: two folders, same names, 1000 images) and from
https://github.com/RazvanDu/DUCK-Net/blob/main/ImageLoader/ImageLoader2D.py (JPEG, masks from 127 on are polyps).
Masks are lossy files with grey edges: any value from 128 on is polyp here.

Split: 800, 100 and 100. HiDiff follows DUCK-Net (Dumitru et al. 2023), which draws the same numbers from a list in the
order of the file system, so its parts cannot be had from its code: drawn here with a seed. DUCK-Net offers its parts at
https://github.com/RazvanDu/DUCK-Net#data-sets ; give their names with ``--splits``.
"""

from laboratory.datasets.layouts import matching, pairs
from laboratory.datasets.polyps import drawn, polyp_dataset
from laboratory.datasets.raw import Case, Collection
from laboratory.datasets.sources import Sources

COUNTS = (800, 100, 100)
JPEG = r"([\w-]+)\.jpe?g"


def collect(sources: Sources, seed: int) -> Collection:
    """All pairs, drawn into parts."""
    root = sources.find_folder(
        lambda folder, subfolders, files: {"images", "masks"} <= subfolders,
        "folder with images and masks",
        prefer="Kvasir-SEG",
    )
    images, masks = (matching(sources, root / name, JPEG) for name in ("images", "masks"))
    found = pairs(sources, images, masks, root)
    cases = [Case(key, (image,), mask) for key, (image, mask) in found.items()]
    return drawn(cases, COUNTS, seed)


DATASET = polyp_dataset(
    title="KvasirSEG",
    summary="Polyps in endoscopic images (Kvasir-SEG, Jha et al. 2020).",
    reference="https://datasets.simula.no/kvasir-seg/",
    counts=COUNTS,
    collect=collect,
    wanted=r"\.jpe?g$",
)
