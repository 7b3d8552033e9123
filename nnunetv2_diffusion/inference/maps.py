"""Float maps (probability, entropy, ...) in the geometry of the input and in files of the input's kind."""

import gzip
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk  # noqa: N813, its usual name
import tifffile
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from skimage import io

from nnunetv2_diffusion.files import write_json, written_whole
from nnunetv2_diffusion.inference.running import map_limits

GREY_LEVELS = 65535
ROUNDING = 1e-5  # relative excess over the scale that is rounding, not a wrong scale

SITK_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl")
NIBABEL_ENDINGS = (".nii.gz", ".nii")
TIF_ENDINGS = (".tif", ".tiff")
NOT_IN_NAMES = r"[^\w.+-]+"  # of folders
HEADER_BYTES = {".nii.gz": 352, ".nii": 352, ".gipl": 256}


class MapWriterError(ValueError):
    """Float maps cannot be written with this reader/writer class or this file ending."""


def map_names(labels: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Name of a label -> what its maps are called in files and in ``Prediction.maps``; all different.

    Characters that folders should not have become ``_``. Where that makes two names equal, in upper or lower case, the
    values of the labels are appended; the position too, if they are still equal.

    Args:
        labels: name -> values, see ``foreground_labels``.
    """
    names = {name: re.sub(NOT_IN_NAMES, "_", name) for name in labels}
    suffixes = {name: "-".join(map(str, values)) for name, values in labels.items()}
    names = _apart(names, suffixes)
    while len({name.casefold() for name in names.values()}) < len(names):
        names = _apart(names, {name: str(position) for position, name in enumerate(labels, start=1)})
    return names


def _apart(names: dict[str, str], suffixes: dict[str, str]) -> dict[str, str]:
    """Suffixes appended to the names that are used more than once."""
    used = Counter(name.casefold() for name in names.values())
    return {key: f"{name}_{suffixes[key]}" if used[name.casefold()] > 1 else name for key, name in names.items()}


def map_limit(kind: str, heads: int, regions: bool) -> float:
    """Largest possible value of a map of ``uncertainty_maps``; see ``running.map_limits``."""
    return map_limits(heads, regions)["probability" if kind.startswith("probability") else kind]


def within_limit(values: np.ndarray, limit: float, kind: str) -> tuple[np.ndarray, str | None]:
    """A map clipped to [0, limit], and a note if that changed more than rounding does.

    A map that is out of its scale tells of a fault, but the mask that it belongs to is made: the case goes on, and the
    note says so.

    Raises:
        ValueError: a value is not finite.
    """
    if not np.isfinite(values).all():
        raise ValueError(f"{kind}: the map has values that are not finite")
    low, high = float(values.min()), float(values.max())
    note = None
    if low < -ROUNDING * limit or high > (1 + ROUNDING) * limit:
        note = f"{kind}: values from {low:g} to {high:g} were clipped to the scale, 0 to {limit:g}"
    return np.clip(values, 0, limit), note


def to_original_geometry(
    maps: np.ndarray | torch.Tensor,
    properties: dict[str, Any],
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    fill: float | Sequence[float] = 0.0,
) -> np.ndarray:
    """Undo resampling, cropping and transposition of nnU-Net's preprocessing, as its export does for logits.

    The function and the spacings of the resampling are those of the plans. Its result is clipped to the range of each
    map, so that a constant stays exactly constant and interpolation of any order cannot overshoot.

    Args:
        maps: (M, x, y, z), the network's output geometry without padding; of 2D images x is 1. On any device.
        properties: what nnU-Net's preprocessor returned for the case.
        plans_manager: of the model.
        configuration_manager: of the model; 2D configurations are resampled within slices only.
        fill: value outside of the box that the image was cropped to, one for all maps or one for each.

    Returns:
        float32, (M, *original): the axes and the shape of nnU-Net's reader.

    Raises:
        ValueError: maps are not 4D, or there is not one fill value, nor M.
    """
    if isinstance(maps, torch.Tensor):
        maps = maps.detach().float().cpu().numpy()
    if maps.ndim != 4:
        raise ValueError(f"maps have shape {maps.shape}, expected (maps, x, y, z)")
    outside = np.asarray(fill, np.float32)
    if outside.shape not in ((), (len(maps),)):
        raise ValueError(f"fill has shape {outside.shape}, expected one value or one for each of {len(maps)} maps")
    result = np.empty((len(maps), *properties["shape_before_cropping"]), np.float32)
    result[...] = outside.reshape(-1, 1, 1, 1)
    for index, values in enumerate(maps):  # one by one: resampling works on a float64 copy
        values = _resampled(values, properties, plans_manager, configuration_manager)
        result[index] = insert_crop_into_image(result[index], values, properties["bbox_used_for_cropping"])
    return result.transpose(0, *(axis + 1 for axis in plans_manager.transpose_backward))


def _resampled(
    values: np.ndarray, properties: dict[str, Any], plans: PlansManager, configuration: ConfigurationManager
) -> np.ndarray:
    """One map (x, y, z) at the spacing of the image, within the range of its values."""
    shape = properties["shape_after_cropping_and_before_resampling"]
    spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
    current = list(configuration.spacing)
    if len(current) < len(shape):
        current = [spacing[0], *current]
    values = values.astype(np.float32, copy=False)
    result = configuration.resampling_fn_probabilities(values[None], shape, current, spacing)[0]
    if isinstance(result, torch.Tensor):
        result = result.cpu().numpy()
    # fmin and fmax pass over NaN, which np.clip then leaves where it is
    return np.clip(result, np.fmin.reduce(values, axis=None), np.fmax.reduce(values, axis=None))


def check_map_writer(reader_writer_class: type, file_ending: str) -> str:
    """Ending of the files that maps of a model are written to; to be called before anything is written.

    It is the model's own ending, but for ``.bmp``: that format has no 16-bit grey values, the maps become ``.png``.

    Args:
        reader_writer_class: ``plans_manager.image_reader_writer_class``. Of a subclass of nnU-Net's classes, reading
            and writing must be inherited.
        file_ending: of dataset.json.

    Raises:
        MapWriterError: unknown class, or an ending that it cannot write maps to, naming both.
    """
    endings = _writer(reader_writer_class)[0]
    if file_ending.lower() == ".bmp" and ".png" in endings:
        return ".png"
    if file_ending.lower() not in endings:
        raise MapWriterError(
            f"file ending {file_ending}: float maps with {reader_writer_class.__name__} "
            f"can be written to {', '.join(endings)}"
        )
    return file_ending


def write_map(
    array: np.ndarray,
    path: Path | str,
    properties: dict[str, Any],
    reader_writer_class: type,
    scale: float | None = None,
) -> float | None:
    """Write one float map to a file with the input's geometry, whole or not at all. An existing file is replaced.

    PNG holds 16-bit grey values, round(map / scale * 65535), the others float32. A 3D TIFF gets a JSON with spacing.

    Args:
        array: (x, y, z), axes and shape of nnU-Net's reader; of 2D images x is 1.
        path: with the ending of ``check_map_writer``. A missing folder is made.
        properties: what nnU-Net's reader returned for the image.
        reader_writer_class: ``plans_manager.image_reader_writer_class``.
        scale: for PNG, the value that becomes 65535; the map's maximum (1 where that is 0) if it is not given.

    Returns:
        The scale of a PNG, None for files that hold the values themselves.

    Raises:
        MapWriterError, ValueError: unknown class or ending; wrong shape, or values that the file cannot hold.
        OSError: the file cannot be written; names the path, and nothing is left of it.
    """
    path = Path(path)
    ending, write = _writer_of_file(reader_writer_class, path)
    if array.ndim != 3:
        raise ValueError(f"{path}: the map has shape {array.shape}, expected (x, y, z)")
    array = np.asarray(array, np.float32)
    if grey := ending.lower() == ".png":
        array, scale = _as_grey(array, scale, path)
    with written_whole(path, ending) as part:
        try:
            write(array, part, properties)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if write is _write_tiff3d:
            _write_spacing(path, properties)
    return scale if grey else None


def _write_spacing(path: Path, properties: dict[str, Any]) -> None:
    """The file in which nnU-Net's reader looks for the spacing of a 3D TIFF."""
    write_json(path.with_suffix(".json"), {"spacing": [float(s) for s in properties["spacing"]]})


def _as_grey(array: np.ndarray, scale: float | None, path: Path) -> tuple[np.ndarray, float]:
    """16-bit values of a map, and the scale."""
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: the map has values that are not finite, which a PNG cannot hold")
    low, high = float(array.min()), float(array.max())
    if scale is None:
        scale = high if high > 0 else 1.0
    if scale <= 0 or low < -ROUNDING * scale or high > (1 + ROUNDING) * scale:
        raise ValueError(f"{path}: the map has values from {low:g} to {high:g}, expected 0 to the scale {scale:g}")
    grey = np.rint(np.clip(array.astype(np.float64) / scale, 0, 1) * GREY_LEVELS)
    return grey.astype(np.uint16), scale


def _one_slice(array: np.ndarray) -> np.ndarray:
    """The slice of a 2D image."""
    if len(array) != 1:
        raise ValueError(f"the map has shape {array.shape}, expected (1, height, width) as the image is 2D")
    return array[0]


def _itk_image(array: np.ndarray, properties: dict[str, Any]) -> sitk.Image:
    geometry = properties["sitk_stuff"]
    dims = len(geometry["spacing"])
    if dims not in (2, 3):
        raise ValueError(f"the image was {dims}D in its file; nnU-Net exports 2D and 3D images only")
    image = sitk.GetImageFromArray(_one_slice(array) if dims == 2 else array)
    image.SetSpacing(geometry["spacing"])
    image.SetOrigin(geometry["origin"])
    image.SetDirection(geometry["direction"])
    return image


def check_whole(path: Path, data_bytes: int) -> None:
    """Raise if a NIfTI or GIPL file is shorter than its data: on a full disk, ITK writes a part and reports success.

    ITK reads such a file without an error too, as zeros or as what is in memory. The other formats raise by themselves.

    Args:
        path: the file; other endings than .nii, .nii.gz and .gipl are not looked at.
        data_bytes: number of voxels times bytes of one.

    Raises:
        OSError: naming the path, with what was found and expected.
    """
    header = next((size for ending, size in HEADER_BYTES.items() if path.name.lower().endswith(ending)), None)
    if header is None:
        return
    found = 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            while block := file.read(2**20):
                found += len(block)
    except (EOFError, zlib.error) as error:
        raise OSError(f"{path} is not whole: {error}; is the disk full?") from error
    if found < header + data_bytes:
        raise OSError(f"{path} is not whole: {found} bytes, expected {header + data_bytes}; is the disk full?")


def _save_itk(image: sitk.Image, path: Path) -> None:
    try:
        sitk.WriteImage(image, str(path), True)
    except RuntimeError as error:
        raise OSError(f"SimpleITK: {str(error).strip()}") from error
    check_whole(path, image.GetNumberOfPixels() * image.GetSizeOfPixelComponent())


def _write_itk(array: np.ndarray, path: Path, properties: dict[str, Any]) -> None:
    _save_itk(_itk_image(array, properties), path)


def _write_itk_reoriented(array: np.ndarray, path: Path, properties: dict[str, Any]) -> None:
    image = _itk_image(array, properties)
    _save_itk(sitk.DICOMOrient(image, properties["sitk_stuff"]["original_orientation"]), path)


def _write_nibabel(array: np.ndarray, path: Path, properties: dict[str, Any]) -> None:
    # nnU-Net's readers reverse nibabel's axes
    nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), properties["nibabel_stuff"]["original_affine"]), path)


def _write_nibabel_reoriented(array: np.ndarray, path: Path, properties: dict[str, Any]) -> None:
    affines = properties["nibabel_stuff"]
    image = nibabel.Nifti1Image(array.transpose(2, 1, 0), affines["reoriented_affine"])
    back = ornt_transform(axcodes2ornt("RAS"), io_orientation(affines["original_affine"]))
    nibabel.save(image.as_reoriented(back), path)


def _write_tif(array: np.ndarray, path: Path) -> None:
    # without photometric, an axis of length 3 may be taken for colours
    tifffile.imwrite(path, array, photometric="minisblack", compression="zlib")


def _write_natural(array: np.ndarray, path: Path, properties: dict[str, Any]) -> None:
    if path.suffix.lower() == ".png":
        io.imsave(path, _one_slice(array), check_contrast=False)
    else:
        _write_tif(_one_slice(array), path)


def _write_tiff3d(array: np.ndarray, path: Path, properties: dict[str, Any]) -> None:
    _write_tif(array, path)


Writer = Callable[[np.ndarray, Path, dict[str, Any]], None]

WRITERS: dict[type, tuple[tuple[str, ...], Writer]] = {
    SimpleITKIO: (SITK_ENDINGS, _write_itk),
    SimpleITKIOWithReorient: (SITK_ENDINGS, _write_itk_reoriented),
    NibabelIO: (NIBABEL_ENDINGS, _write_nibabel),
    NibabelIOWithReorient: (NIBABEL_ENDINGS, _write_nibabel_reoriented),
    NaturalImage2DIO: ((".png", *TIF_ENDINGS), _write_natural),
    Tiff3DIO: (TIF_ENDINGS, _write_tiff3d),
}


def _writer(reader_writer_class: type) -> tuple[tuple[str, ...], Writer]:
    """Endings and writer for a class that reads and writes as one of nnU-Net's does."""
    for known, entry in WRITERS.items():
        same = (getattr(reader_writer_class, m, None) is getattr(known, m) for m in ("read_images", "write_seg"))
        if all(same):
            return entry
    raise MapWriterError(
        f"reader/writer class {reader_writer_class.__name__} is not known to write float maps; "
        f"expected {', '.join(known.__name__ for known in WRITERS)}"
    )


def _writer_of_file(reader_writer_class: type, path: Path) -> tuple[str, Writer]:
    """The ending of a file, as it is spelt there, and what writes it."""
    endings, write = _writer(reader_writer_class)
    for ending in endings:
        if path.name.lower().endswith(ending):
            return path.name[-len(ending) :], write
    raise MapWriterError(f"{path}: float maps with {reader_writer_class.__name__} end in {', '.join(endings)}")
