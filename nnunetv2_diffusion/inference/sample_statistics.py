"""Volumes and agreement of the samples of a case, in memory that does not depend on their number."""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from nnunetv2_diffusion.agreement import CAUTION, DEFINITION, mean_over_found, nearly_alike, pairwise_dice
from nnunetv2_diffusion.files import json_ready
from nnunetv2_diffusion.plans_content import foreground_labels  # noqa: F401, the name that scripts import

DEFINITIONS = {
    "volumes": "of the masks as they are written, on the grid of the image: mask: of the mask of the mean; mean and "
    "spread: over the masks of the samples; sd with divisor samples - 1, null for one sample; percentiles interpolate "
    "linearly",
    "pairwise_dice": DEFINITION,
    "agreement": "mean of pairwise_dice over the labels that were found; null if none was",
    "caution": CAUTION,
    "deprecated": "confidence and mean_pairwise_dice (now agreement), volumes: sd, percentile_5, percentile_95 (now "
    "in spread); the next version leaves them out",
}
SCALES_DEFINITION = {"map_scales": "value of a map = grey value / 65535 * scale"}
ONE_SAMPLE = "one sample: spread, pairwise Dice and agreement are not defined"


@dataclass(frozen=True)
class SampleCounts:
    """Voxel counts of the samples of a case.

    Attributes:
        names: of the labels.
        intersections: int64, (labels, N, N): voxels that two samples both give the label; volumes on the diagonals.
    """

    names: tuple[str, ...]
    intersections: np.ndarray

    @property
    def samples(self) -> int:
        """Number of samples N."""
        return self.intersections.shape[-1]

    @property
    def voxels(self) -> np.ndarray:
        """Voxels of each label in each sample, int64, (labels, N)."""
        return np.diagonal(self.intersections, axis1=1, axis2=2)

    def pairwise_dice(self) -> np.ndarray:
        """Agreement of the samples on each label, (labels,); see ``agreement.pairwise_dice``."""
        return pairwise_dice(self.intersections)


class SampleMasks:
    """Keeps the masks of samples in a temporary file, and counts over all pairs of them in the end.

    The file lies in ``folder`` and has a name, where the system needs one, only while it is open: it goes away with
    the context, an exception or the process. It takes one byte a voxel and sample (two, where label values need it).
    Memory is one mask while it is added, and about 12 bytes times ``chunk`` to count.

    Raises:
        ValueError: no labels, or a value that is no label.
        OSError: the file cannot be made or written (disk full), naming the folder.
    """

    def __init__(self, folder: Path | str, labels: Mapping[str, int | Sequence[int]], chunk: int = 2**19):
        """Open the file.

        Args:
            folder: exists and can be written to.
            labels: names of the foreground labels -> value, or values of a region; see ``foreground_labels``.
            chunk: voxels that are looked at in one go, of all samples together.
        """
        self._values = {name: np.atleast_1d(value).tolist() for name, value in labels.items()}
        self._chunk, self._folder = chunk, Path(folder)
        self._dtype = self._storage()
        self._shape: tuple[int, ...] | None = None
        self.count = 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder, prefix=".samples.", buffering=0)  # noqa: SIM115, see close
        except OSError as error:
            raise self._named(error) from error

    def _storage(self) -> np.dtype:
        """Smallest type that holds a label value."""
        if not self._values:
            raise ValueError("there are no foreground labels, expected at least one")
        values = [v for several in self._values.values() for v in several]
        if not values or min(values) < 0 or max(values) > np.iinfo(np.uint16).max:
            raise ValueError(f"labels have the values {sorted(values)}, expected 0 to {np.iinfo(np.uint16).max}")
        return np.min_scalar_type(max(values))

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, f"masks of samples cannot be written: {error.strerror}", str(self._folder))

    def __enter__(self) -> "SampleMasks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the file."""
        self._file.close()

    def add(self, mask: np.ndarray | torch.Tensor) -> None:
        """Take in a sample.

        Args:
            mask: label map (*spatial) of whole numbers.

        Raises:
            ValueError: another shape than that of the first sample, another type, or values out of range.
            OSError: the file cannot be written, naming the folder.
        """
        mask = mask.detach().cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
        if mask.dtype.kind not in "biu":
            raise ValueError(f"a mask has the type {mask.dtype}, expected whole numbers")
        if self._shape not in (None, mask.shape):
            raise ValueError(f"the mask of a sample has shape {mask.shape}, that of the first {self._shape}")
        voxels = mask.reshape(-1)
        try:
            self._file.seek(self.count * len(voxels) * self._dtype.itemsize)
            for start in range(0, len(voxels), self._chunk):
                self._write(self._stored(voxels[start : start + self._chunk]))
        except OSError as error:
            raise self._named(error) from error
        self._shape = mask.shape
        self.count += 1

    def _stored(self, voxels: np.ndarray) -> np.ndarray:
        limit = np.iinfo(self._dtype).max
        if voxels.min() < 0 or voxels.max() > limit:
            raise ValueError(f"a mask has values from {voxels.min()} to {voxels.max()}, expected 0 to {limit}")
        return voxels.astype(self._dtype)

    def _write(self, voxels: np.ndarray) -> None:
        data = memoryview(voxels).cast("B")
        while data:  # an unbuffered file may take a part
            data = data[self._file.write(data) :]

    def _chunks(self) -> Iterator[np.ndarray]:
        """Labels of all samples for a run of voxels, (N, voxels), in turn."""
        voxels = math.prod(self._shape)
        step = max(1, self._chunk // self.count)
        for start in range(0, voxels, step):
            labels = np.empty((self.count, min(step, voxels - start)), self._dtype)
            for sample, row in enumerate(labels):
                self._file.seek((sample * voxels + start) * self._dtype.itemsize)
                self._read(row)
            yield labels

    def _read(self, row: np.ndarray) -> None:
        data = memoryview(row).cast("B")
        while data:
            length = self._file.readinto(data)
            if not length:
                raise OSError(f"{self._folder}: the file with the masks of samples is shorter than what was written")
            data = data[length:]

    def counts(self) -> SampleCounts:
        """Voxels and intersections of all pairs of samples. More samples may be added after it.

        Raises:
            ValueError: there is no sample.
        """
        if self.count == 0:
            raise ValueError("there is no sample yet, expected at least one")
        result = np.zeros((len(self._values), self.count, self.count), np.int64)
        for labels in self._chunks():
            for index, values in enumerate(self._values.values()):
                masks = _holds(labels, values)
                masks = masks[:, masks.any(0)].astype(np.float32)  # few voxels are foreground in any sample
                # float32 counts exactly up to 2^24
                for part in np.array_split(masks, max(1, math.ceil(masks.shape[1] / 2**24)), axis=1):
                    result[index] += (part @ part.T).astype(np.int64)
        return SampleCounts(tuple(self._values), result)


def _holds(labels: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Where labels are among some values; bool."""
    result = np.zeros(labels.shape, bool)
    for value in values:
        result |= labels == value
    return result


def volume_unit(shape: Sequence[int], spacing: Sequence[float]) -> tuple[float, str]:
    """Size and unit of a voxel: (ml, "ml") for volumes, (1, "px") for 2D images.

    Args:
        shape: (x, y, z) in the axes of nnU-Net's reader.
        spacing: in mm, in the same axes. For 2D images nnU-Net's readers set the first one to 999 times the largest.
    """
    if len(shape) == 2 or (shape[0] == 1 and spacing[0] >= 998 * max(spacing[1:])):
        return 1.0, "px"
    return math.prod(float(s) for s in spacing) / 1000, "ml"


def rounded(value: float) -> float | int:
    """To six significant digits, but no coarser than a thousandth; whole numbers stay as they are."""
    if isinstance(value, int | np.integer) or not math.isfinite(value) or value == 0:
        return value
    return round(float(value), max(3, 5 - math.floor(math.log10(abs(value)))))


def _volumes(volumes: np.ndarray) -> dict[str, Any]:
    """Of the samples (N,) on a label; ``mask`` is known when the mask is made, see ``add_mask_volumes``."""
    low, high = np.percentile(volumes, [5, 95])
    sd = np.std(volumes, ddof=1) if len(volumes) > 1 else math.nan
    spread = {"sd": rounded(sd), "percentile_5": rounded(low), "percentile_95": rounded(high)}
    return {"mask": None, "mean": rounded(volumes.mean()), "spread": spread, **spread}


def mask_volumes(
    mask: np.ndarray, labels: Mapping[str, int | Sequence[int]], spacing: Sequence[float]
) -> dict[str, float]:
    """Volume of every label of a mask, in the unit of ``volume_unit``.

    Args:
        mask: labels, (x, y, z), axes of nnU-Net's reader.
        labels: name -> value, or values of a region.
        spacing: in mm, in the same axes.
    """
    size, unit = volume_unit(mask.shape, spacing)
    voxels = {n: int(np.count_nonzero(_holds(mask, np.atleast_1d(values)))) for n, values in labels.items()}
    return {name: count if unit == "px" else rounded(count * size) for name, count in voxels.items()}


def add_mask_volumes(summary: dict[str, Any], volumes: Mapping[str, float]) -> None:
    """Put the ``mask_volumes`` of a mask as it is written into a ``case_summary``."""
    for name, volume in volumes.items():
        summary["volumes"][name]["mask"] = volume


def case_summary(
    case: str,
    counts: SampleCounts,
    shape: Sequence[int],
    spacing: Sequence[float],
    settings: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """What is written about the samples of a case, ready for ``json.dump``.

    Args:
        case: its name.
        counts: of its samples, on the grid of the image.
        shape: (x, y, z) of the masks that were counted.
        spacing: in mm, in the same axes.
        settings: how the samples were drawn.
        notes: what is known of the case beside its samples, one sentence each.

    Returns:
        The keys below; volumes: label -> mask (None until ``add_mask_volumes``), mean, spread. What is not defined is
        None. Measures have six significant digits.
    """
    size, unit = volume_unit(shape, spacing)
    dice = counts.pairwise_dice()
    agreement = rounded(mean_over_found(dice))
    return json_ready(
        {
            "case": case,
            "samples": counts.samples,
            "agreement": agreement,
            "pairwise_dice": {name: rounded(d) for name, d in zip(counts.names, dice, strict=True)},
            "volume_unit": unit,
            "volumes": {name: _volumes(n * size) for name, n in zip(counts.names, counts.voxels, strict=True)},
            "mean_pairwise_dice": agreement,
            "confidence": agreement,
            "definitions": DEFINITIONS,
            "notes": [*notes, *_sample_notes(counts, agreement)],
            "settings": settings or {},
        }
    )


def _sample_notes(counts: SampleCounts, agreement: float) -> list[str]:
    """What a reader of the numbers should know of the samples."""
    notes = [ONE_SAMPLE] if counts.samples == 1 else []
    missing = [name for name, voxels in zip(counts.names, counts.voxels, strict=True) if not voxels.any()]
    notes += [f"{name}: not found in any sample" for name in missing]
    if nearly_alike(agreement):
        notes.append(f"the samples of this model are nearly alike (agreement {agreement:g}): their spread says little")
    return notes
