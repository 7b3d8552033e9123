"""CVC-ClinicDB polyps (Bernal et al. 2015), as in Chen et al. 2024 (HiDiff), section III-A.

Owner: https://polyp.grand-challenge.org/CVCClinicDB/ (``CVC-ClinicDB.rar``, which Python cannot open: unpack it and
give the folder).

Expected: a folder with ``Original`` and ``Ground Truth``, files ``1.tif`` to ``612.tif`` in each. Known from
https://github.com/openmedlab/Awesome-Medical-Dataset/blob/main/resources/CVC-ClinicDB.md ; the names of the folders
also from the owner's licence, https://github.com/dataset-ninja/cvc-612/blob/main/LICENSE.md . Copies that other sites
offer may hold the same files once more as PNG; these are read too, and a folder ``TIF`` is taken if there are both
(such copies were not verified).

Split: 488, 62 and 62, which is DUCK-Net's rounding of 80 %, 10 % and 10 %
(https://github.com/RazvanDu/DUCK-Net/blob/main/ModelNotebook.ipynb), whom HiDiff follows. The parts depend on the order
of the file system there: drawn here with a seed, images one by one as there, although neighbours are frames of the same
video. DUCK-Net offers its parts at https://github.com/RazvanDu/DUCK-Net#data-sets ; give their names with ``--splits``.
"""

from laboratory.datasets.layouts import matching, pairs
from laboratory.datasets.polyps import drawn, polyp_dataset
from laboratory.datasets.raw import Case, Collection
from laboratory.datasets.sources import Sources

COUNTS = (488, 62, 62)
NUMBERED = r"(\d+)\.(?:tiff?|png)"


def collect(sources: Sources, seed: int) -> Collection:
    """All pairs by number, drawn into parts."""
    both = {"Original", "Ground Truth"}
    root = sources.find_folder(
        lambda folder, subfolders, files: both <= subfolders, "folder with Original and Ground Truth", prefer="TIF"
    )
    images, masks = (matching(sources, root / name, NUMBERED) for name in ("Original", "Ground Truth"))
    found = pairs(sources, images, masks, root)
    cases = [Case(f"cvc_{int(key):03d}", (found[key][0],), found[key][1]) for key in sorted(found, key=int)]
    return drawn(cases, COUNTS, seed)


DATASET = polyp_dataset(
    title="CVCClinicDB",
    summary="Polyps in endoscopic images (CVC-ClinicDB, Bernal et al. 2015).",
    reference="https://polyp.grand-challenge.org/CVCClinicDB/",
    counts=COUNTS,
    collect=collect,
    wanted=r"\.(tiff?|png)$",
)
