"""Sets of masks: samples of a model and annotations of raters, compared as distributions.

Masks are bool arrays of one shape. Two empty masks are equal: their distance is 0, their IoU is 1. As samples they are
no agreement: see ``mean_pairwise_dice``.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from nnunetv2_diffusion.agreement import pairwise_dice


def squared_energy_distance(
    raters: Sequence[np.ndarray], samples: Sequence[np.ndarray], where: np.ndarray | None = None
) -> float:
    """Squared generalised energy distance, 2 E d(Y, S) - E d(Y, Y') - E d(S, S') with d = 1 - IoU.

    Means are over all pairs, those of a mask with itself included (as in Kohl et al. 2018, arXiv:1806.05034), so that
    a set is at distance 0 from itself. Fewer samples therefore score worse; report their number.

    Args:
        raters: bool masks, (*spatial); one at least.
        samples: as many as there are.
        where: (*spatial), bool; voxels that count, all by default.

    Returns:
        In [0, 2].

    Raises:
        ValueError: if a set is empty, shapes differ or masks are not bool.
    """
    raters, samples = _voxels(raters, samples, where)
    between, among_raters, among_samples = (
        1 - _overlaps(first, second).mean()
        for first, second in ((raters, samples), (raters, raters), (samples, samples))
    )
    return float(2 * between - among_raters - among_samples)


def hungarian_iou(
    raters: Sequence[np.ndarray], samples: Sequence[np.ndarray], where: np.ndarray | None = None
) -> float:
    """Mean IoU of the best one-to-one matching of raters with samples (Kohl et al. 2019, arXiv:1905.13077).

    Sets of different sizes are replicated to the least common multiple first: each mask keeps its share of the
    matching. Arguments and errors as in ``squared_energy_distance``.

    Returns:
        In [0, 1], 1 for equal sets.
    """
    raters, samples = _voxels(raters, samples, where)
    overlaps = _overlaps(raters, samples)
    size = math.lcm(*overlaps.shape)
    overlaps = overlaps.repeat(size // len(raters), axis=0).repeat(size // len(samples), axis=1)
    return float(overlaps[linear_sum_assignment(overlaps, maximize=True)].mean())


def mean_pairwise_dice(samples: Sequence[np.ndarray], where: np.ndarray | None = None) -> float:
    """Mean Dice over the pairs of different samples of which at least one is not empty: their agreement.

    Zenk et al. 2025 rank cases by it to find failures. It is no calibrated confidence: see ``agreement.CAUTION``.

    Returns:
        In [0, 1]; NaN of fewer than two samples, or if all are empty.

    Raises:
        ValueError: if there are no samples, shapes differ or masks are not bool.
    """
    samples, _ = _voxels(samples, samples, where)
    return float(pairwise_dice(_shared(samples, samples)))


def _voxels(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray], where: np.ndarray | None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Both sets, (n,) each, at the voxels that count and that any mask has: others change no overlap."""
    if not len(first) or not len(second):
        raise ValueError(f"sets of {len(first)} and {len(second)} masks, expected at least one mask in each")
    shape = np.shape(first[0])
    found = {(np.shape(mask), str(np.asarray(mask).dtype)) for mask in (*first, *second)}
    if found != {(shape, "bool")}:
        raise ValueError(f"masks have shapes and dtypes {sorted(found)}, expected all of shape {shape} and bool")
    union = np.logical_or.reduce((*first, *second))
    if where is not None:
        if np.shape(where) != shape:
            raise ValueError(f"where has shape {np.shape(where)}, expected {shape}")
        union &= np.asarray(where, bool)
    return [mask[union] for mask in first], [mask[union] for mask in second]


def _overlaps(first: list[np.ndarray], second: list[np.ndarray]) -> np.ndarray:
    """IoU of every mask of one list with every mask of the other, (len(first), len(second))."""
    sizes = [[np.count_nonzero(mask) for mask in masks] for masks in (first, second)]
    common = _shared(first, second)
    union = np.add.outer(*sizes) - common
    return np.divide(common, union, out=np.ones_like(common), where=union > 0)


def _shared(first: list[np.ndarray], second: list[np.ndarray]) -> np.ndarray:
    """Voxels that masks of two lists share, (len(first), len(second))."""
    return np.array([[np.count_nonzero(a & b) for b in second] for a in first], np.float64)
