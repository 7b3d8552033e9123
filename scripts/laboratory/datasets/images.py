"""Files of images and labels as nnU-Net reads them.

Libraries are imported where they are used: the converters' help answers before anything is installed.
"""

import gzip
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from laboratory.datasets.sources import LayoutError, Sources

if TYPE_CHECKING:
    from PIL import Image

HALF = 128  # masks of 8 bits: white is foreground; lossy files and drawn masks have values in between
RGB = ("rgb_to_0_1",) * 3  # nnU-Net divides these by 255, as the papers do
GREY = ("rgb_to_0_1",)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    from nibabel.filebasedimages import ImageFileError

    try:
        yield
    except (OSError, EOFError, zlib.error, ImageFileError) as error:
        raise LayoutError(f"{file} cannot be read: {error}") from error


def _read_picture(file: Path, mode: str) -> "Image.Image":
    """A picture of 8 bits, as Pillow's mode "L" (grey) or "RGB"."""
    from PIL import Image

    with _reading(file), Image.open(file) as image:
        if image.mode[0] in "IF":
            raise LayoutError(f"{file}: its pixels are of Pillow's mode {image.mode}, expected 8 bits")
        return image.convert(mode)


def write_rgb(sources: Sources, source: Path, target: Path) -> None:
    """A picture as PNG with three channels."""
    _read_picture(source, "RGB").save(target)


def write_grey(sources: Sources, source: Path, target: Path) -> None:
    """A picture as PNG with one channel."""
    _read_picture(source, "L").save(target)


def write_mask(source: Path, image: Path, target: Path) -> None:
    """A black and white picture as PNG of zeros and ones.

    Raises:
        LayoutError: if its size is not the image's, or if its brightest pixel is dark but not black: it may hold
            numbers of classes then.
    """
    import numpy as np
    from PIL import Image

    mask = _read_picture(source, "L")
    with _reading(image), Image.open(image) as opened:
        size = opened.size
    if mask.size != size:
        raise LayoutError(f"{source}: its size is {mask.size}, expected {size} as that of {image.name}")
    values = np.asarray(mask)
    if 0 < values.max() < HALF:
        raise LayoutError(f"{source}: its brightest pixel is {values.max()}, expected a mask of 0 and 255")
    Image.fromarray((values >= HALF).astype(np.uint8)).save(target)


def take_nifti(sources: Sources, source: Path, target: Path) -> None:
    """A .nii.gz file as it is, or a .nii file compressed."""
    if source.name.endswith(".nii.gz"):
        sources.take(source, target)
        return
    with source.open("rb") as stream, gzip.open(target, "wb", compresslevel=6) as compressed:
        shutil.copyfileobj(stream, compressed, 2**20)


def write_labels(source: Path, image: Path, target: Path, values: Mapping[int, int]) -> None:
    """A label map with other values, as .nii.gz of 8 bits in the same geometry.

    Args:
        source: NIfTI file.
        image: NIfTI file of the same shape.
        target: new file.
        values: expected value -> new value.

    Raises:
        LayoutError: for another shape than the image's, or other values than expected.
    """
    import nibabel as nib
    import numpy as np

    with _reading(source):
        labels = nib.load(source)
        array = np.asanyarray(labels.dataobj)
    with _reading(image):
        shape = nib.load(image).shape
    if array.shape != shape:
        raise LayoutError(f"{source}: its shape is {array.shape}, expected {shape} as that of {image.name}")
    present = np.unique(array)
    unexpected = [value.item() for value in present if value.item() not in values]
    if unexpected:
        raise LayoutError(f"{source}: found the labels {unexpected[:8]}, expected {sorted(values)}")
    changed = np.zeros(shape, np.uint8)
    for value in present:
        changed[array == value] = values[value.item()]
    header = labels.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    nib.save(nib.Nifti1Image(changed, labels.affine, header), target)
