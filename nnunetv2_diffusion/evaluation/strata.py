"""Scores by the size of the object: of a case, of one slice of it, or of one lesion.

HiDiff (tables VII and VIII) reports organs of less than 500 pixels in a slice, and tumours of less than 100.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import ndimage

from nnunetv2_diffusion.agreement import mean_over_found
from nnunetv2_diffusion.evaluation import EvaluationError
from nnunetv2_diffusion.evaluation.metrics import union_box

THRESHOLDS = (100, 500)
CONVENTIONS = {
    "size": "voxels (pixels) of the reference object; '<500' holds all that are smaller, those of '<100' too",
    "case": "object: the class in the whole case; 'empty': cases whose reference lacks the class",
    "slice": "object: the class in one slice along the first array axis, where the reference has it; volumes only",
    "lesion": "object: one connected component of the reference; its Dice is with the union of all predicted "
    "components that touch it, 0 if none does; 'false': predicted components that touch none, by their own size",
}


@dataclass(frozen=True)
class ObjectScore:
    """An object of the reference.

    Attributes:
        size: voxels.
        dice: in [0, 1].
        detected: whether the prediction covers enough of it.
    """

    size: int
    dice: float
    detected: bool


@dataclass(frozen=True)
class Lesions:
    """Connected components of one case and class.

    Attributes:
        found: those of the reference.
        predicted: number of those of the prediction.
        false: sizes, in voxels, of the predicted ones that touch none of the reference.
    """

    found: Sequence[ObjectScore] = field(default_factory=list)
    predicted: int = 0
    false: Sequence[int] = field(default_factory=list)

    def scores(self) -> dict[str, float]:
        """lesions_ref, lesions_detected, lesions_pred, lesions_false: numbers; lesion_Dice: mean, NaN if none."""
        return {
            "lesions_ref": len(self.found),
            "lesions_detected": sum(lesion.detected for lesion in self.found),
            "lesions_pred": self.predicted,
            "lesions_false": len(self.false),
            "lesion_Dice": mean_over_found([lesion.dice for lesion in self.found]),
        }


def check_thresholds(thresholds: Sequence[int]) -> None:
    """Raise EvaluationError unless sizes rise, from 1 at least."""
    if not thresholds or thresholds[0] < 1 or any(a >= b for a, b in pairwise(thresholds)):
        raise EvaluationError(f"strata: thresholds are {list(thresholds)}, expected rising sizes of at least 1 voxel")


def strata_of(size: int, thresholds: Sequence[int]) -> list[str]:
    """Names of all strata that an object of a size belongs to: '<t' for each threshold above it, or '>=last'."""
    if size == 0:
        return ["empty"]
    return [f"<{t}" for t in thresholds if size < t] or [f">={thresholds[-1]}"]


def strata_names(thresholds: Sequence[int]) -> list[str]:
    """All strata of objects that exist, by size."""
    return [*(f"<{t}" for t in thresholds), f">={thresholds[-1]}"]


def slice_scores(reference: np.ndarray, prediction: np.ndarray) -> list[ObjectScore]:
    """Dice of each slice along the first axis that the reference has voxels in; detected if any is hit."""
    axes = tuple(range(1, reference.ndim))
    n_ref, n_pred = (np.count_nonzero(mask, axis=axes) for mask in (reference, prediction))
    hits = np.count_nonzero(reference & prediction, axis=axes)
    return [
        ObjectScore(int(ref), float(2 * hit / (ref + pred)), bool(hit))
        for ref, pred, hit in zip(n_ref, n_pred, hits, strict=True)
        if ref
    ]


def lesion_scores(reference: np.ndarray, prediction: np.ndarray, overlap: float = 0.0) -> Lesions:
    """Compare connected components; voxels that share a face, an edge or a corner are connected.

    Args:
        reference: bool.
        prediction: bool, of the same shape.
        overlap: share of a lesion's voxels that must be predicted to detect it; any voxel for 0.

    Returns:
        Lesions in the order of their first voxels.
    """
    box = union_box(reference, prediction)
    structure = np.ones((3,) * reference.ndim, bool)
    lesions, n_lesions = ndimage.label(reference[box], structure)
    blobs, n_blobs = ndimage.label(prediction[box], structure)
    lesion_sizes = np.bincount(lesions[lesions > 0], minlength=n_lesions + 1)
    blob_sizes = np.bincount(blobs[blobs > 0], minlength=n_blobs + 1)
    both = (lesions > 0) & (blobs > 0)
    pairs, hits = np.unique(lesions[both].astype(np.int64) * (n_blobs + 1) + blobs[both], return_counts=True)
    lesion, blob = np.divmod(pairs, n_blobs + 1)
    hit = np.bincount(lesion, weights=hits, minlength=n_lesions + 1)
    touching = np.bincount(lesion, weights=blob_sizes[blob], minlength=n_lesions + 1)
    found = []
    for index in range(1, n_lesions + 1):
        size = int(lesion_sizes[index])
        detected = bool(hit[index] > 0 and hit[index] >= overlap * size)
        found.append(ObjectScore(size, float(2 * hit[index] / (size + touching[index])), detected))
    false = np.delete(blob_sizes, np.append(0, blob))
    return Lesions(found, n_blobs, [int(size) for size in false])


def case_strata(rows: Iterable[Mapping[str, float]], thresholds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Means over the cases of each stratum.

    Args:
        rows: scores of one class, a mapping for each case, with n_ref.
        thresholds: of n_ref, voxels.

    Returns:
        Stratum -> n, mean (metric -> mean of what is defined) and nan_ratio (metric -> share of what is not).
    """
    groups: dict[str, list[Mapping[str, float]]] = {name: [] for name in [*strata_names(thresholds), "empty"]}
    for row in rows:
        for name in strata_of(int(row["n_ref"]), thresholds):
            groups[name].append(row)
    result = {}
    for name, members in groups.items():
        columns = {metric: [row[metric] for row in members] for metric in (members[0] if members else ())}
        result[name] = {
            "n": len(members),
            "mean": {metric: mean_over_found(column) for metric, column in columns.items()},
            "nan_ratio": {metric: float(np.isnan(column).mean()) for metric, column in columns.items()},
        }
    return result


def object_strata(objects: Sequence[ObjectScore], thresholds: Sequence[int]) -> dict[str, dict[str, float]]:
    """Number, detected, detection_rate and mean Dice of the objects of each stratum and of all."""
    groups: dict[str, list[ObjectScore]] = {name: [] for name in strata_names(thresholds)}
    groups["all"] = list(objects)
    for item in objects:
        for name in strata_of(item.size, thresholds):
            groups[name].append(item)
    return {
        name: {
            "n": len(members),
            "detected": sum(item.detected for item in members),
            "detection_rate": mean_over_found([float(item.detected) for item in members]),
            "Dice": mean_over_found([item.dice for item in members]),
        }
        for name, members in groups.items()
    }


def count_sizes(sizes: Iterable[int], thresholds: Sequence[int]) -> dict[str, int]:
    """How many sizes are in each stratum, and in all."""
    counts = dict.fromkeys([*strata_names(thresholds), "all"], 0)
    for size in sizes:
        for name in [*strata_of(size, thresholds), "all"]:
            counts[name] += 1
    return counts
