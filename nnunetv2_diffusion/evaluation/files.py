"""Pairs of references and predictions in folders, read and checked."""

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

from nnunetv2_diffusion.evaluation import EvaluationError, listed
from nnunetv2_diffusion.evaluation.labels import LabelSet

UNITS = ("auto", "mm", "px")


@dataclass(frozen=True)
class CaseFiles:
    """Files of one case.

    Attributes:
        name: file name without its ending.
        reference: mask to compare with.
        prediction: mask.
        probabilities: npz of nnU-Net's --save_probabilities; None if not asked for.
        samples: masks that were drawn for this case.
        raters: masks of further raters.
    """

    name: str
    reference: Path
    prediction: Path
    probabilities: Path | None = None
    samples: tuple[Path, ...] = ()
    raters: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Segmentation:
    """A mask as nnU-Net's reader gives it.

    Attributes:
        file: where it comes from.
        values: labels, integer; (z, y, x), or (y, x) for 2D images and volumes of one slice.
        spacing: mm along the axes of the file's array, (z, y, x); z is 1 for 2D images.
        flat: it is a 2D image, not a volume.
        geometry: what the file says about its place: spacing, and origin and direction if the format has them.
    """

    file: Path
    values: np.ndarray
    spacing: tuple[float, ...]
    flat: bool
    geometry: Mapping[str, np.ndarray]

    def unit(self, wanted: str) -> str:
        """Unit of lengths, 'mm' or 'px': that wanted, or for 'auto' mm for volumes and px for 2D images.

        Raises:
            EvaluationError: for mm where the file has no spacing.
        """
        if wanted == "mm" and not self.geometry:
            raise EvaluationError(f"{self.file}: has no spacing, expected one to measure in mm; use --unit px")
        return ("px" if self.flat else "mm") if wanted == "auto" else wanted

    def voxel_size(self, unit: str) -> tuple[float, ...]:
        """Spacing along the axes of ``values``, in a unit."""
        spacing = self.spacing[-self.values.ndim :]
        return spacing if unit == "mm" else (1.0,) * len(spacing)

    def voxel_volume(self, unit: str) -> float:
        """Volume of a voxel: ml for volumes in mm, mm2 / 100 for 2D images in mm, 1 in px."""
        return prod(self.spacing) / (100 if self.flat else 1000) if unit == "mm" else 1.0


@dataclass(frozen=True)
class Case:
    """One case with what every scorer needs.

    Attributes:
        files: where it comes from; ``probabilities``, ``samples`` and ``raters`` read more of it.
        reference: mask to compare with.
        prediction: mask, of the same geometry.
        labels: classes or regions.
        valid: where the reference is not to be ignored, bool, as ``reference.values``; None if all counts.
        unit: of lengths, mm or px.
        reader: nnU-Net's reader of these files.
        ignore_geometry: do not compare origin and direction.
    """

    files: CaseFiles
    reference: Segmentation
    prediction: Segmentation
    labels: LabelSet
    valid: np.ndarray | None
    unit: str
    reader: BaseReaderWriter
    ignore_geometry: bool = False

    @property
    def spacing(self) -> tuple[float, ...]:
        """Size of a voxel along the axes of the masks, in ``unit``."""
        return self.reference.voxel_size(self.unit)

    def probabilities(self) -> np.ndarray | None:
        """(heads, *spatial) as nnU-Net exports them, in [0, 1]; ``Target.head`` is the channel of a class or region.

        Raises:
            EvaluationError: if the file cannot be read, or has another shape than the reference.
        """
        file = self.files.probabilities
        if file is None:
            return None
        try:
            with np.load(file) as arrays:
                values = arrays["probabilities"]
        except Exception as error:
            raise EvaluationError(
                f"{file}: cannot be read: {_reason(error)}, expected nnU-Net's probabilities"
            ) from error
        expected = (self.labels.heads, *self.reference.values.shape)
        if values.shape == (expected[0], 1, *expected[1:]):
            values = values[:, 0]
        if values.shape != expected:
            raise EvaluationError(f"{file}: probabilities have shape {values.shape}, expected {expected}")
        return values

    def samples(self) -> list[np.ndarray]:
        """Values of the masks that were drawn, as ``prediction.values``; empty if there are none."""
        return [self._further(file, ignore=False) for file in self.files.samples]

    def raters(self) -> list[np.ndarray]:
        """Values of further raters' masks, as ``reference.values``; they may have the ignore label."""
        return [self._further(file, ignore=True) for file in self.files.raters]

    def _further(self, file: Path, ignore: bool) -> np.ndarray:
        mask = read_segmentation(self.reader, file, self.labels, ignore)
        check_geometry(self.reference, mask, self.ignore_geometry)
        return mask.values


def find_reader(dataset_json: Mapping[str, Any], example: Path) -> BaseReaderWriter:
    """The reader that nnU-Net takes for a data set; it tries an example file.

    Raises:
        EvaluationError: if no reader can read it.
    """
    try:  # nnU-Net prints a traceback for every reader that it tries
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return determine_reader_writer_from_dataset_json(dict(dataset_json), str(example), verbose=False)()
    except Exception as error:
        raise EvaluationError(f"{example}: no reader of nnU-Net can read it, expected a mask in its format") from error


def find_pairs(reference: Path, prediction: Path, ending: str, chill: bool) -> list[CaseFiles]:
    """Cases of two folders, by name.

    Args:
        reference: folder of masks.
        prediction: folder of masks with the same names.
        ending: of the files.
        chill: leave out what is in one folder only.

    Raises:
        EvaluationError: for folders that are missing, empty or, unless chill, unequal.
    """
    folders = reference, prediction
    names = [_names(folder, ending) for folder in folders]
    for folder, other, missing in zip(folders[::-1], folders, (names[0] - names[1], names[1] - names[0]), strict=True):
        if missing and not chill:
            raise EvaluationError(
                f"{folder}: {len(missing)} file(s) missing that are in {other}: {listed(missing)}. Expected a "
                "prediction for each reference and a reference for each prediction; --chill leaves the others out."
            )
    both = sorted(names[0] & names[1])
    if not both:
        raise EvaluationError(f"{reference} and {prediction} have no file name in common, expected the same names")
    return [CaseFiles(name[: -len(ending)], reference / name, prediction / name) for name in both]


def find_further(folders: Sequence[Path], name: str, ending: str, chill: bool) -> tuple[Path, ...]:
    """The file of a case in each of some folders, of samples or raters.

    Raises:
        EvaluationError: if it is missing, unless chill.
    """
    files = [folder / f"{name}{ending}" for folder in folders]
    for file in files:
        if not chill and not file.is_file():
            raise EvaluationError(f"{file}: missing, expected a mask of each case; --chill goes on without")
    return tuple(file for file in files if file.is_file())


def read_segmentation(reader: BaseReaderWriter, file: Path, labels: LabelSet, ignore: bool) -> Segmentation:
    """Read and check one mask.

    Args:
        reader: nnU-Net's.
        file: to be read.
        labels: values that it may have.
        ignore: whether it may have the ignore label.

    Raises:
        EvaluationError: if it cannot be read, has channels or values that are no label.
    """
    try:
        with redirect_stdout(io.StringIO()):
            array, properties = reader.read_seg(str(file))
    except Exception as error:
        raise EvaluationError(f"{file}: cannot be read: {_reason(error)}") from error
    if array.ndim != 4 or array.shape[0] != 1:
        channels = array.shape[0] if array.ndim == 4 else array.shape
        raise EvaluationError(
            f"{file}: has {channels} channels, expected one, of labels. PNG masks with a palette are read as colours: "
            "save them as grey values (docs/start/install.md)"
        )
    labels.check_values(array, str(file), ignore)
    values = array[0].astype(np.min_scalar_type(max(*labels.known, labels.ignore or 0)))
    itk = properties.get("sitk_stuff")
    flat = isinstance(reader, NaturalImage2DIO) or (itk is not None and len(itk["spacing"]) == 2)
    spacing = [1.0 if flat and not axis else float(s) for axis, s in enumerate(properties["spacing"])]
    geometry = {} if isinstance(reader, NaturalImage2DIO) else _geometry(properties)
    return Segmentation(file, values[0] if values.shape[0] == 1 else values, tuple(spacing), flat, geometry)


def check_geometry(reference: Segmentation, other: Segmentation, ignore: bool = False) -> None:
    """Raise unless two masks are of the same shape and at the same place.

    Spacings may differ by 0.1 %, origins by 1 % of the largest spacing, directions by 0.001 in each cosine: files of
    different writers do.

    Args:
        reference: of the right geometry.
        other: to be checked.
        ignore: compare shape and spacing only.

    Raises:
        EvaluationError: with what was found and expected.
    """
    if reference.values.shape != other.values.shape or reference.flat != other.flat:
        raise EvaluationError(
            f"{other.file}: shape is {_shape(other)}, expected {_shape(reference)} as in {reference.file}"
        )
    tolerances = {"spacing": (1e-3, 0.0), "origin": (0.0, 0.01 * max(reference.spacing)), "direction": (0.0, 1e-3)}
    for name, expected in reference.geometry.items():
        relative, absolute = tolerances[name]
        found = other.geometry.get(name)
        if ignore and name != "spacing":
            continue
        if found is None or found.shape != expected.shape or not np.allclose(found, expected, relative, absolute):
            hint = "" if name == "spacing" else "; --ignore_geometry compares the arrays as they are"
            raise EvaluationError(
                f"{other.file}: {name} is {_numbers(found)}, expected {_numbers(expected)} as in {reference.file}{hint}"
            )


def load_case(files: CaseFiles, labels: LabelSet, reader: BaseReaderWriter, unit: str, ignore_geometry: bool) -> Case:
    """Read reference and prediction of a case.

    Raises:
        EvaluationError: if one cannot be read or has values that are no label, or their geometries differ.
    """
    reference = read_segmentation(reader, files.reference, labels, ignore=True)
    prediction = read_segmentation(reader, files.prediction, labels, ignore=False)
    check_geometry(reference, prediction, ignore_geometry)
    valid = labels.valid(reference.values)
    return Case(files, reference, prediction, labels, valid, reference.unit(unit), reader, ignore_geometry)


def _names(folder: Path, ending: str) -> set[str]:
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: no such folder")
    names = {file.name for file in folder.iterdir() if file.name.endswith(ending) and file.is_file()}
    if not names:
        raise EvaluationError(f"{folder}: has no file that ends with {ending}, expected masks")
    return names


def _geometry(properties: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What nnU-Net's readers know of a file's place, by name."""
    if "sitk_stuff" in properties:
        return {key: np.array(properties["sitk_stuff"][key], float) for key in ("spacing", "origin", "direction")}
    spacing = np.array(properties["spacing"], float)
    if "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        affine = np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]), float)
        columns = affine[:3, :3]
        direction = columns / np.linalg.norm(columns, axis=0)
        return {"spacing": spacing, "origin": affine[:3, 3], "direction": direction}
    return {"spacing": spacing}


def _shape(mask: Segmentation) -> str:
    return f"{mask.values.shape} ({'2D image' if mask.flat else 'volume'})"


def _numbers(values: np.ndarray | None) -> str:
    return "missing" if values is None else "(" + ", ".join(f"{value:.6g}" for value in values.ravel()) + ")"


def _reason(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
