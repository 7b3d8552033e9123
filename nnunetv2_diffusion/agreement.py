"""How far the samples of a case agree, and what that does not say: one meaning wherever it is told."""

import numpy as np
from numpy.typing import ArrayLike

CAUTION = (
    "Agreement and spread tell how the samples of this model differ. Until a model is calibrated they are no "
    "confidence, and the spread is no interval with a guarantee."
)
NEARLY_ALIKE = 0.99  # agreement from which on the spread of samples says little
DEFINITION = (
    "2 |A and B| / (|A| + |B|), mean over the pairs of samples of which at least one holds the label; undefined for a "
    "label that no sample holds (two empty masks are no agreement) and for one sample"
)


def pairwise_dice(intersections: ArrayLike) -> np.ndarray:
    """Mean Dice over the pairs of different samples of which at least one is not empty.

    Args:
        intersections: (..., N, N): voxels that two of N samples share; their own volumes on the diagonals.

    Returns:
        float64, (...), in [0, 1]; NaN if no sample holds a voxel, or there are fewer than two samples.
    """
    shared = np.asarray(intersections, np.float64)
    first, second = np.triu_indices(shared.shape[-1], 1)
    volumes = np.diagonal(shared, axis1=-2, axis2=-1)
    sizes = volumes[..., first] + volumes[..., second]
    counted = (sizes > 0).sum(-1)
    total = np.divide(2 * shared[..., first, second], sizes, out=np.zeros_like(sizes), where=sizes > 0).sum(-1)
    return np.divide(total, counted, out=np.full_like(total, np.nan), where=counted > 0)


def mean_over_found(of_labels: ArrayLike) -> float:
    """Mean over the labels (labels,) that have a value, as those that were found have; NaN if none has."""
    known = np.asarray(of_labels, np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if known.size else float("nan")


def nearly_alike(agreement: float) -> bool:
    """Whether samples agree so far that their spread says little; False for NaN."""
    return bool(agreement >= NEARLY_ALIKE)
