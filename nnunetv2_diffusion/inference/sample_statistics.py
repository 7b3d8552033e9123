"""Volumes and pairwise Dice of the samples of a case, in memory that does not depend on their number."""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

DEFINITIONS = {
    "volumes": "of the foreground masks of the samples; sd with divisor samples - 1, null for one sample; percentiles "
    "interpolate linearly",
    "pairwise_dice": "2 |A and B| / (|A| + |B|), mean over all pairs of samples; 1 where both masks are empty; null "
    "for one sample",
    "mean_pairwise_dice": "mean of pairwise_dice over the labels",
    "confidence": "mean_pairwise_dice: 1 if all samples agree",
}
SCALES_DEFINITION = {"map_scales": "value of a map = grey value / 65535 * scale"}
ONE_SAMPLE = "one sample: sd, pairwise Dice and confidence are not defined"


def foreground_labels(dataset_json: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> values of every label or region of a dataset.json but for background and ignore, in the order of heads.

    As in nnU-Net's label manager, heads follow the values of labels, and the order of the file for regions.
    """
    values = {
        name: tuple(int(v) for v in (value if isinstance(value, list | tuple) else [value]))
        for name, value in dataset_json["labels"].items()
        if name != "ignore"
    }
    foreground = [(name, value) for name, value in values.items() if set(value) != {0}]
    if all(len(value) == 1 for value in values.values()):
        foreground.sort(key=lambda item: item[1])
    return dict(foreground)


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
        """Mean Dice over the N (N - 1) / 2 pairs of samples for each label, (labels,), in [0, 1].

        Two empty masks have Dice 1. NaN if there are fewer than two samples.
        """
        if self.samples < 2:
            return np.full(len(self.names), np.nan)
        first, second = np.triu_indices(self.samples, 1)
        sizes = self.voxels[:, first] + self.voxels[:, second]
        shared = 2 * self.intersections[:, first, second]
        return np.where(sizes > 0, shared / np.maximum(sizes, 1), 1.0).mean(1)


class SampleMasks:
    """Keeps the masks of samples in a temporary file, and counts over all pairs of them in the end.

    The file lies in ``folder`` and has a name, where the system needs one, only while it is open: it goes away with
    the context, an exception or the process. It takes one byte a voxel and sample (two, where label values or the
    number of regions need it). Memory is one mask while it is added, and about 12 bytes times ``chunk`` to count.

    Raises:
        ValueError: no labels, a value that is no label, or more than 64 regions.
        OSError: the file cannot be made or written (disk full), naming the folder.
    """

    def __init__(
        self,
        folder: Path | str,
        labels: Mapping[str, int | Sequence[int]],
        region_masks: bool = False,
        chunk: int = 2**19,
    ):
        """Open the file.

        Args:
            folder: exists and can be written to.
            labels: names of the foreground labels -> value, or values of a region; see ``foreground_labels``.
            region_masks: ``add`` is given one mask for each of ``labels``, in their order, instead of a label map;
                the values of labels do not matter then.
            chunk: voxels that are looked at in one go, of all samples together.
        """
        self._values = {name: np.atleast_1d(value).tolist() for name, value in labels.items()}
        self._regions, self._chunk, self._folder = region_masks, chunk, Path(folder)
        self._dtype = self._storage()
        self._shape: tuple[int, ...] | None = None
        self.count = 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder, prefix=".samples.", buffering=0)  # noqa: SIM115, see close
        except OSError as error:
            raise self._named(error) from error

    def _storage(self) -> np.dtype:
        """Smallest type that holds a label value, or a bit for each region."""
        if not self._values:
            raise ValueError("there are no foreground labels, expected at least one")
        if self._regions:
            if len(self._values) > 64:
                raise ValueError(f"there are {len(self._values)} regions, expected at most 64")
            return np.min_scalar_type(2 ** len(self._values) - 1)
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

    def add(self, masks: np.ndarray | torch.Tensor) -> None:
        """Take in a sample.

        Args:
            masks: label map (*spatial) of whole numbers; or with ``region_masks`` (labels, *spatial), bool or 0 and 1.

        Raises:
            ValueError: another shape than that of the first sample, another type, or values out of range.
            OSError: the file cannot be written, naming the folder.
        """
        masks = masks.detach().cpu().numpy() if isinstance(masks, torch.Tensor) else np.asarray(masks)
        if masks.dtype.kind not in "biu":
            raise ValueError(f"masks have the type {masks.dtype}, expected whole numbers or bool")
        if self._regions and len(masks) != len(self._values):
            raise ValueError(f"there are {len(masks)} masks, expected one for each of {len(self._values)} regions")
        spatial = masks.shape[1:] if self._regions else masks.shape
        if self._shape not in (None, spatial):
            raise ValueError(f"the masks of a sample have shape {spatial}, those of the first {self._shape}")
        rows = masks.reshape(len(self._values) if self._regions else 1, -1)
        try:
            self._file.seek(self.count * rows.shape[1] * self._dtype.itemsize)
            for start in range(0, rows.shape[1], self._chunk):
                self._write(self._encoded(rows[:, start : start + self._chunk]))
        except OSError as error:
            raise self._named(error) from error
        self._shape = spatial
        self.count += 1

    def _encoded(self, rows: np.ndarray) -> np.ndarray:
        """One number a voxel: the label, or a bit for each region."""
        if not self._regions:
            limit = np.iinfo(self._dtype).max
            if rows.min() < 0 or rows.max() > limit:
                raise ValueError(f"a mask has values from {rows.min()} to {rows.max()}, expected 0 to {limit}")
            return rows[0].astype(self._dtype)
        codes = np.zeros(rows.shape[1], self._dtype)
        for bit, row in enumerate(rows):
            codes |= (row != 0).astype(self._dtype) * self._dtype.type(2**bit)
        return codes

    def _write(self, codes: np.ndarray) -> None:
        data = memoryview(codes).cast("B")
        while data:  # an unbuffered file may take a part
            data = data[self._file.write(data) :]

    def _chunks(self) -> Iterator[np.ndarray]:
        """Codes of all samples for a run of voxels, (N, voxels), in turn."""
        voxels = math.prod(self._shape)
        step = max(1, self._chunk // self.count)
        for start in range(0, voxels, step):
            codes = np.empty((self.count, min(step, voxels - start)), self._dtype)
            for sample, row in enumerate(codes):
                self._file.seek((sample * voxels + start) * self._dtype.itemsize)
                self._read(row)
            yield codes

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
        for codes in self._chunks():
            for label in range(len(result)):
                masks = self._decoded(codes, label)
                masks = masks[:, masks.any(0)].astype(np.float32)  # few voxels are foreground in any sample
                # float32 counts exactly up to 2^24
                for part in np.array_split(masks, max(1, math.ceil(masks.shape[1] / 2**24)), axis=1):
                    result[label] += (part @ part.T).astype(np.int64)
        return SampleCounts(tuple(self._values), result)

    def _decoded(self, codes: np.ndarray, label: int) -> np.ndarray:
        """Which of the codes have a label, given by its position; bool."""
        if self._regions:
            return (codes & self._dtype.type(2**label)) != 0
        result = np.zeros(codes.shape, bool)
        for value in list(self._values.values())[label]:
            result |= codes == value
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


def json_ready(value: Any) -> Any:
    """The value with plain Python's types only: numbers and arrays of numpy and torch, paths and tuples converted.

    NaN and infinities, which JSON does not know, become None.
    """
    if isinstance(value, Mapping):
        return {str(key): json_ready(content) for key, content in value.items()}
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return json_ready(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [json_ready(content) for content in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def _spread(volumes: np.ndarray) -> dict[str, float]:
    """Of the volumes (N,) of a label."""
    low, high = np.percentile(volumes, [5, 95])
    sd = np.std(volumes, ddof=1) if len(volumes) > 1 else math.nan
    return {"mean": volumes.mean(), "sd": sd, "percentile_5": low, "percentile_95": high}


def case_summary(
    case: str,
    counts: SampleCounts,
    shape: Sequence[int],
    spacing: Sequence[float],
    settings: Mapping[str, Any] | None = None,
    map_scales: Mapping[str, float | None] | None = None,
) -> dict[str, Any]:
    """What is written about the samples of a case, ready for ``json.dump``.

    Args:
        case: its name.
        counts: of its samples.
        shape: (x, y, z) of the masks that were counted.
        spacing: in mm, in the same axes.
        settings: how the samples were drawn.
        map_scales: kind of map -> what ``write_map`` returned, for maps in 16-bit images.

    Returns:
        The keys below; volumes: label -> mean, sd, percentile_5, percentile_95. What is not defined is None.
    """
    size, unit = volume_unit(shape, spacing)
    dice = counts.pairwise_dice()
    scales = {kind: scale for kind, scale in (map_scales or {}).items() if scale is not None}
    volumes = {name: _spread(n * size) for name, n in zip(counts.names, counts.voxels, strict=True)}
    summary = {
        "case": case,
        "samples": counts.samples,
        "volume_unit": unit,
        "volumes": volumes,
        "pairwise_dice": dict(zip(counts.names, dice, strict=True)),
        "mean_pairwise_dice": dice.mean(),
        "confidence": dice.mean(),
        "definitions": DEFINITIONS,
        "notes": [ONE_SAMPLE] if counts.samples == 1 else [],
        "settings": settings or {},
    }
    if scales:
        summary |= {"map_scales": scales, "definitions": DEFINITIONS | SCALES_DEFINITION}
    return json_ready(summary)
