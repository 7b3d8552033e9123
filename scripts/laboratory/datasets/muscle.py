"""Post-processing of muscle masks as Marzola et al. 2021, as Fu et al. 2023 describe it in section 4.1.1.

Holes are filled; erosion by a disk of radius 3, dilation by one of 5, opening by one of 10 pixels; of the two largest
components one is kept; holes are filled. The disks are those of MATLAB's ``strel("disk", r)``, in which the method was
written; the code of Fu et al. has the same ones (docs/datasets.md). Marzola's own code was not at hand.
"""

import math
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from laboratory.datasets.raw import staging
from laboratory.datasets.sources import LayoutError, listing

RATIO = 0.75  # of the areas of the second-largest and the largest component
EIGHT = np.ones((3, 3), bool)
COMPANIONS = ("dataset.json", "plans.json")  # nnUNetv2_evaluate_folder reads them beside the predictions


def matlab_disk(radius: int) -> np.ndarray:
    """MATLAB's ``strel("disk", radius)``, an octagon of 2 * radius - 1 pixels across; bool; radius is at least 3.

    Lines in four directions are combined (Adams 1993), then a horizontal and a vertical one widen it to radius - 1.
    """
    if radius < 3:
        raise ValueError(f"radius is {radius}, expected at least 3: MATLAB has another rule for small disks")
    angle = math.pi / 8
    length = 2 * radius / (1 / math.tan(angle) + 1 / math.sin(angle))
    half, corner = radius - 1, 2 * math.floor(length / math.sqrt(2))
    offsets = np.abs(np.arange(-half, half + 1))
    return offsets[:, None] + offsets[None] <= 2 * half - corner


def keep_component(mask: np.ndarray, rule: str = "superficial") -> np.ndarray:
    """One of the two largest 8-connected components of a mask: bool, (rows, columns), row 0 at the skin.

    Rule "superficial": the largest if the second has less than 75 % of its area, else the one that begins higher, as
    the paper says. "leftmost": the largest if the second has no more than 75 %, else the one that begins further left,
    as the published code does.
    """
    components, count = ndimage.label(mask, EIGHT)
    if count < 2:
        return mask
    areas = np.bincount(components.ravel())[1:]
    largest, second = (np.argsort(-areas, kind="stable")[:2] + 1).tolist()
    ratio = areas[second - 1] / areas[largest - 1]
    if ratio < RATIO or (rule == "leftmost" and ratio == RATIO):
        return components == largest
    axis = {"superficial": 0, "leftmost": 1}[rule]
    starts = [np.nonzero(components == component)[axis].min() for component in (largest, second)]
    if rule == "superficial":
        return components == (largest if starts[0] <= starts[1] else second)
    return components == (largest if starts[0] < starts[1] else second)


def postprocess(mask: np.ndarray, rule: str = "superficial") -> np.ndarray:
    """The muscle in a mask (bool, rows from the skin), smoothed and in one piece; rule as in ``keep_component``."""
    mask = ndimage.binary_fill_holes(mask)
    # the border of the image erodes nothing, as in MATLAB and in the published code
    mask = ndimage.binary_erosion(mask, matlab_disk(3), border_value=1)
    mask = ndimage.binary_dilation(mask, matlab_disk(5))
    mask = ndimage.binary_erosion(mask, matlab_disk(10), border_value=1)
    mask = ndimage.binary_dilation(mask, matlab_disk(10))
    return ndimage.binary_fill_holes(keep_component(mask, rule))


def postprocess_folder(source: Path, target: Path, rule: str = "superficial") -> int:
    """Post-process all predictions of a folder; returns their number.

    Args:
        source: PNG files of zeros and ones, as nnU-Net predicts the converted data.
        target: new folder; dataset.json and plans.json are copied into it.
        rule: as in ``keep_component``.

    Raises:
        LayoutError, FileExistsError: naming a file that is no such mask, a folder without any, or what exists.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists; it is not overwritten")
    files = sorted(source.glob("*.png")) if source.is_dir() else []
    if not files:
        raise LayoutError(f"{source}: found no PNG files, expected a folder of predictions")
    if not target.absolute().parent.is_dir():
        raise LayoutError(f"{target.absolute().parent}: no such folder")
    with staging(target.absolute()) as work:
        made = work / target.name
        made.mkdir()
        for file in tqdm(files, desc="post-process", unit="mask"):
            Image.fromarray(postprocess(_read_mask(file), rule).astype(np.uint8)).save(made / file.name)
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, made / name)
        made.rename(target)
    return len(files)


def _read_mask(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            values = np.asarray(image)
    except OSError as error:
        raise LayoutError(f"{file} cannot be read: {error}") from error
    unexpected = sorted(set(np.unique(values).tolist()) - {0, 1})
    if values.ndim != 2 or unexpected:
        raise LayoutError(
            f"{file}: shape {values.shape}, labels {listing(unexpected)}; expected one channel of 0 and 1"
        )
    return values.astype(bool)
