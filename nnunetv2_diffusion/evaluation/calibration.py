"""Do probabilities mean what they say? Calibration error, Brier score and likelihood near the foreground.

Every class or region is scored on its own, as a binary problem: p is the probability that a voxel belongs to it.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.ndimage import distance_transform_edt

NLL_CLIP = 1e-6  # probabilities are clipped to [NLL_CLIP, 1 - NLL_CLIP] in the likelihood: 13.8 nats a voxel at most
ROUNDING = 1e-3  # of half precision: probabilities may leave [0, 1] by so much


def expected_calibration_error(
    probabilities: np.ndarray, truth: np.ndarray, where: np.ndarray | None = None, bins: int = 15
) -> np.ndarray:
    """Expected calibration error, sum_b n_b / n |mean truth in b - mean probability in b|, over bins of equal width.

    Bin b of B holds b / B <= p < (b + 1) / B, the last one p = 1 too. Empty bins count nothing. This is the binary
    definition, of the probability of the class; not that of the confidence of the most probable class.

    Args:
        probabilities: (C, *spatial), in [0, 1].
        truth: (C, *spatial), bool.
        where: (*spatial), bool; voxels that count, all by default. Leave ignored voxels out with it.
        bins: their number.

    Returns:
        (C,), in [0, 1]; NaN where no voxel counts.

    Raises:
        ValueError: if shapes differ, truth is not bool, probabilities are none, or bins < 1.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}, expected at least 1")
    return np.array([_binned_error(p, y, bins) for p, y in _counted(probabilities, truth, where)])


def brier_score(probabilities: np.ndarray, truth: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
    """Mean of (p - y)^2 per class, in [0, 1]; arguments, NaN and errors as in ``expected_calibration_error``."""
    return np.array([_mean(np.square(p - y)) for p, y in _counted(probabilities, truth, where)])


def negative_log_likelihood(
    probabilities: np.ndarray, truth: np.ndarray, where: np.ndarray | None = None
) -> np.ndarray:
    """Mean of -y log p - (1 - y) log(1 - p) per class in nats, p clipped to [NLL_CLIP, 1 - NLL_CLIP].

    Arguments, NaN and errors as in ``expected_calibration_error``.
    """
    return np.array(
        [
            _mean(-np.log(np.clip(np.where(y, p, 1 - p), NLL_CLIP, 1 - NLL_CLIP)))
            for p, y in _counted(probabilities, truth, where)
        ]
    )


def around_foreground(
    truth_union: np.ndarray, predicted_union: np.ndarray, spacing: Sequence[float], margin: float
) -> np.ndarray:
    """Voxels of the foreground, true or predicted, and those whose centre is at most a margin from one of them.

    The scores of a whole image say how much background it has. Those within this region do not change with the field
    of view.

    Args:
        truth_union: (*spatial), bool; any class of the reference.
        predicted_union: (*spatial), bool; any class of the prediction.
        spacing: of the voxels, per axis of the arrays; its unit is that of the margin.
        margin: at least 0, in mm, or in pixels if the spacing is.

    Returns:
        (*spatial), bool; nothing if there is no foreground.

    Raises:
        ValueError: if shapes differ, or spacing or margin are none.
    """
    union = np.asarray(truth_union, bool) | _same_shape(predicted_union, truth_union, "predicted_union")
    spacing = np.asarray(spacing, np.float64)
    if spacing.shape != (union.ndim,) or not (np.isfinite(spacing) & (spacing > 0)).all():
        raise ValueError(f"spacing is {spacing.tolist()}, expected {union.ndim} numbers above 0")
    if not 0 <= margin < np.inf:
        raise ValueError(f"margin is {margin}, expected a number of at least 0")
    region = np.zeros(union.shape, bool)
    if union.any():
        reach = np.ceil(margin / spacing).astype(int)
        box = tuple(_extent(union, axis, pad) for axis, pad in enumerate(reach))  # farther voxels are outside anyway
        region[box] = distance_transform_edt(~union[box], sampling=spacing) <= margin * (1 + 1e-9)
    return region


def _extent(mask: np.ndarray, axis: int, pad: int) -> slice:
    """Where a mask that is not empty lies along an axis, and so many voxels more on both sides."""
    (places,) = np.nonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
    return slice(max(0, places[0] - pad), places[-1] + 1 + pad)


def _counted(
    probabilities: np.ndarray, truth: np.ndarray, where: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Per class, probability (float64, clipped to [0, 1]) and truth (bool) of the voxels that count, both (n,)."""
    truth = _same_shape(truth, probabilities, "truth")
    if truth.dtype != bool:
        raise ValueError(f"truth has dtype {truth.dtype}, expected bool")
    if where is not None:
        where = _same_shape(where, truth[0], "where").astype(bool)
    for index, (p, y) in enumerate(zip(probabilities, truth, strict=True)):
        p, y = (p.ravel(), y.ravel()) if where is None else (p[where], y[where])
        p = p.astype(np.float64)
        if not ((p >= -ROUNDING) & (p <= 1 + ROUNDING)).all():
            raise ValueError(
                f"probabilities of class {index} are in [{p.min():g}, {p.max():g}], expected [0, 1] and no NaN"
            )
        yield np.clip(p, 0, 1), y


def _binned_error(p: np.ndarray, y: np.ndarray, bins: int) -> float:
    if p.size == 0:
        return np.nan
    index = np.minimum((p * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(index, weights=y.astype(np.float64), minlength=bins) - np.bincount(index, p, minlength=bins)
    return float(np.abs(gaps).sum() / p.size)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else np.nan


def _same_shape(array: np.ndarray, other: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(array)
    if array.shape != np.shape(other):
        raise ValueError(f"{name} has shape {array.shape}, expected {np.shape(other)}")
    return array
