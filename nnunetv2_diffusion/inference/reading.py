"""Images as nnU-Net's own readers give them, and what is wrong with them in a sentence."""

import gzip
import warnings
import zlib
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk  # noqa: N813, its usual name
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunetv2_diffusion.inference.inputs import NIFTI, CaseError

try:
    from numpy.exceptions import ComplexWarning
except ImportError:  # numpy before 1.25
    from numpy import ComplexWarning

GZIP_MAGIC = b"\x1f\x8b"
GIPL_HEADER = 256  # bytes
BLOCK = 2**20  # bytes
LONGEST_NOTE = 300
LEAST_APART = 1e-6  # mm; less is rounding of the header
SKEW = 1e-3  # share of a voxel's volume; less is rounding of the header


def channel_names(dataset_json: Mapping[str, Any]) -> list[str]:
    """Of the images that a model was trained with, in their order."""
    names = dataset_json.get("channel_names", dataset_json.get("modality", {}))
    return [str(name) for name in (names.values() if isinstance(names, Mapping) else names)]


def read_case(
    reader: BaseReaderWriter, files: Sequence[Path], channels: Sequence[str]
) -> tuple[np.ndarray, dict[str, Any], list[str]]:
    """Read the images of a case by the model's reader.

    What nnU-Net refuses is refused, what it warns of is a note.

    Args:
        reader: ``plans_manager.image_reader_writer_class()``.
        files: one for each channel, or with several channels in a file.
        channels: names of the model's channels.

    Returns:
        (C, z, y, x), float32 and finite; the reader's properties; and notes of a sentence each.

    Raises:
        CaseError: naming the file, what was found and what was expected.
    """
    notes = [note for file in files for note in check_file(file)]
    try:
        array, properties, said = _by_host(reader, files)
    except MemoryError as error:
        raise CaseError(f"{files[0]}: not enough memory to read it") from error
    except Exception as error:  # readers raise whatever their libraries do
        raise CaseError(_why_unreadable(reader, files, error)) from error
    if "Not all input images" in said:
        notes += _displacements(reader, files) or [said[:LONGEST_NOTE]]
    elif said:
        notes.append(said[:LONGEST_NOTE])
    notes += check_image(array, properties, channels, files)
    return array, properties, notes + _skewed(properties, files[0])


def _by_host(reader: BaseReaderWriter, files: Sequence[Path]) -> tuple[np.ndarray, dict[str, Any], str]:
    """Array, properties, and what the reader printed: nnU-Net's warn so."""
    printed = StringIO()
    with redirect_stdout(printed), np.errstate(over="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("error", ComplexWarning)  # readers would take the real part
        array, properties = reader.read_images([str(f) for f in files])
    return array, properties, " ".join(printed.getvalue().split())


def _why_unreadable(reader: BaseReaderWriter, files: Sequence[Path], error: Exception) -> str:
    """The file that cannot be read, or that differs from the first one: nnU-Net's own error is empty then."""
    if len(files) == 1:
        return f"{files[0]}: cannot be read as an image ({one_line(error)})"
    found = []
    for file in files:
        try:
            found.append(_by_host(reader, [file])[:2])
        except Exception as alone:
            return _why_unreadable(reader, [file], alone)
    shape, spacing = found[0][0].shape, found[0][1]["spacing"]
    for file, (array, properties) in zip(files, found, strict=True):
        if array.shape != shape:
            return f"{file}: shape {array.shape}, expected {shape} as in {files[0].name}"
        if not np.allclose(properties["spacing"], spacing):
            mine, first = (tuple(float(s) for s in v) for v in (properties["spacing"], spacing))
            return f"{file}: spacing {mine}, expected {first} as in {files[0].name}"
    return f"{files[0].parent}: {', '.join(f.name for f in files)} cannot be read together ({one_line(error)})"


def one_line(error: Exception) -> str:
    """What a library says, without the place in its source and the "Reason" of ITK, which is about another file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Reason:")] or [type(error).__name__]
    return lines[-1].removeprefix("ITK ERROR: ").removeprefix("- ")[:LONGEST_NOTE]


def _displacements(reader: BaseReaderWriter, files: Sequence[Path]) -> list[str]:
    """How far the channels of a case lie apart, in mm at the corner where it is most."""
    notes, first = [], None
    for file in files:
        corners = _corners(*_by_host(reader, [file])[:2])
        if first is None:
            first = corners
        apart = 0.0 if corners is None or first is None else np.linalg.norm(corners - first, axis=1).max()
        if apart < LEAST_APART:
            continue
        notes.append(f"{file}: lies up to {apart:.3g} mm from {files[0].name}; nnU-Net takes both to be in one place")
    return notes


def _skewed(properties: Mapping[str, Any], file: Path) -> list[str]:
    """A note if voxels are no boxes: volumes are counted by spacing."""
    affine = properties.get("nibabel_stuff", {}).get("original_affine")
    if affine is None:
        return []
    ratio = abs(np.linalg.det(affine[:3, :3])) / prod(float(s) for s in properties["spacing"])
    if abs(ratio - 1) < SKEW:
        return []
    return [f"{file}: axes are not at right angles; true volumes are {ratio:.4g} times those that are written"]


def _corners(array: np.ndarray, properties: Mapping[str, Any]) -> np.ndarray | None:
    """Corners of an image in mm, (2 ** axes, axes); None for a reader that does not tell where they are."""
    if "sitk_stuff" in properties:
        geometry = properties["sitk_stuff"]
        origin, spacing = np.array(geometry["origin"]), np.array(geometry["spacing"])
        matrix = np.array(geometry["direction"]).reshape(len(origin), len(origin)) * spacing
    elif "nibabel_stuff" in properties:
        affines = properties["nibabel_stuff"]
        affine = affines.get("reoriented_affine", affines["original_affine"])
        matrix, origin = affine[:3, :3], affine[:3, 3]
    else:
        return None
    shape = array.shape[-len(origin) :][::-1]
    ends = np.array(list(product(*[(0, n - 1) for n in shape])))
    return ends @ matrix.T + origin


def check_image(
    array: np.ndarray, properties: Mapping[str, Any], channels: Sequence[str], files: Sequence[Path] = ()
) -> list[str]:
    """Look at an image that was read; returns notes.

    Args:
        array: (C, z, y, x).
        properties: with ``spacing``, mm along z, y, x.
        channels: names of the model's channels.
        files: that it was read from.

    Raises:
        CaseError: other channels than the model's, no voxels, a spacing that is none, or values that are not finite.
    """
    source = ", ".join(str(f) if i == 0 else f.name for i, f in enumerate(files)) or "the image"
    spacing = np.asarray(properties["spacing"], float)
    if array.ndim != 4 or len(spacing) != 3:
        raise CaseError(
            f"{source}: read with shape {array.shape} and {len(spacing)} spacings, expected (channels, z, y, x) and "
            "three; colours in one file are for PNG, BMP and TIFF, others have a file for each channel"
        )
    if len(array) != len(channels):
        raise CaseError(
            f"{source}: {len(array)} channels, expected {len(channels)} as the model was trained with: "
            f"{', '.join(channels)}"
        )
    if not array.size:
        raise CaseError(f"{source}: shape {array.shape}, expected at least one voxel")
    if not (np.isfinite(spacing) & (spacing > 0)).all():
        raise CaseError(f"{source}: spacing {tuple(map(float, spacing))} mm, expected positive numbers")
    one_each = len(files) == len(array)
    return [
        note
        for number, (values, name) in enumerate(zip(array, channels, strict=True))
        for note in _check_channel(values, f"{files[number] if one_each else source}: channel {number} ({name})")
    ]


def _check_channel(values: np.ndarray, what: str) -> list[str]:
    low, high = float(values.min()), float(values.max())  # NaN if one voxel is
    if not (np.isfinite(low) and np.isfinite(high)):
        count = int(np.count_nonzero(~np.isfinite(values)))
        raise CaseError(f"{what} has {count} of {values.size} voxels that are not finite (NaN, or too large)")
    return [f"{what} has the value {low:g} in every voxel"] if low == high else []


def check_file(file: Path) -> list[str]:
    """Look at a file before it is read; returns notes.

    ITK reads a NIfTI or GIPL file that is cut off without an error, with zeros in place of what is missing, and takes
    1 mm where the header of a NIfTI has no spacing. Libraries of the other formats raise.

    Raises:
        CaseError: no such file, an empty one, or fewer bytes than its header promises.
    """
    if not file.is_file():
        raise CaseError(f"{file}: no such file, expected an image")
    if not file.stat().st_size:
        raise CaseError(f"{file}: 0 bytes, expected an image")
    name, notes = file.name.lower(), []
    try:
        if name.endswith(NIFTI):
            header = _nifti_header(file)
            expected = _promised(header) if header is not None else 0
            notes = _odd_spacing(file, header) if header is not None else []
        elif name.endswith(".gipl"):
            expected = _promised_gipl(file)
        else:
            return []
        found = _size(file, expected)
    except (OSError, EOFError, zlib.error) as error:
        raise CaseError(f"{file}: damaged or cut off ({one_line(error)})") from error
    if found < expected:
        raise CaseError(f"{file}: cut off, {found} bytes of the {expected} that its header promises")
    return notes


def _open(file: Path) -> Any:
    """As ITK opens it: the content says whether it is compressed, not the name."""
    with file.open("rb") as stream:
        magic = stream.read(2)
    return gzip.open(file) if magic == GZIP_MAGIC else file.open("rb")


def _size(file: Path, enough: int) -> int:
    """Bytes, uncompressed, up to those that are enough; what follows them is not looked at, as by nnU-Net's readers."""
    size = 0
    with _open(file) as stream:
        while block := stream.read(min(BLOCK, enough - size)):
            size += len(block)
        if size == enough:
            _check_sum(stream)
    return size


def _check_sum(stream: Any) -> None:
    """Raise for a compressed file whose content is another than was written."""
    try:
        stream.read(1)
    except EOFError:
        return  # the sum itself is cut off
    except gzip.BadGzipFile as error:
        if "CRC" in str(error):
            raise


def _nifti_header(file: Path) -> nibabel.Nifti1Header | None:
    """As it is in the file, without nibabel's corrections; None for what is no NIfTI."""
    with _open(file) as stream:
        block = stream.read(nibabel.Nifti2Header.sizeof_hdr)
    for kind in (nibabel.Nifti1Header, nibabel.Nifti2Header):
        if len(block) >= kind.sizeof_hdr:
            header = kind(block[: kind.sizeof_hdr], check=False)
            if int(header["sizeof_hdr"]) == kind.sizeof_hdr:
                return header
    return None


def _promised(header: nibabel.Nifti1Header) -> int:
    """Bytes of a file with this header."""
    sizes = [max(1, int(n)) for n in header["dim"][1 : 1 + max(0, int(header["dim"][0]))]]
    offset = float(header["vox_offset"])
    try:
        value_bytes = header.get_data_dtype().itemsize
    except (KeyError, nibabel.spatialimages.HeaderDataError):  # no type of values
        return 0  # reading it will say why
    return prod(sizes) * value_bytes + (int(max(0.0, offset)) if np.isfinite(offset) else 0)


def _odd_spacing(file: Path, header: nibabel.Nifti1Header) -> list[str]:
    spacing = tuple(float(s) for s in header["pixdim"][1 : 1 + min(3, max(0, int(header["dim"][0])))])
    if all(np.isfinite(s) and s > 0 for s in spacing):
        return []
    return [f"{file}: the header gives a spacing of {spacing} mm; sizes and volumes may be wrong"]


def _promised_gipl(file: Path) -> int:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return 0  # reading it will say why
    value_bytes = sitk.Image([1] * 2, reader.GetPixelID()).GetSizeOfPixelComponent()
    return GIPL_HEADER + prod(reader.GetSize()) * reader.GetNumberOfComponents() * value_bytes
