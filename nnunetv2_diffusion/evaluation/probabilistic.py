"""All probabilistic scores of one case: calibration near the foreground, samples against raters."""

from collections.abc import Sequence

import numpy as np

from nnunetv2_diffusion.evaluation.calibration import (
    around_foreground,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
)
from nnunetv2_diffusion.evaluation.diversity import hungarian_iou, mean_pairwise_dice, squared_energy_distance

MARGIN = 5.0  # mm for volumes, pixels for 2D images without a spacing


def probabilistic_scores(
    references: Sequence[np.ndarray],
    probabilities: np.ndarray | None,
    samples: Sequence[np.ndarray] | None,
    spacing: Sequence[float],
    valid: np.ndarray | None = None,
    predicted: np.ndarray | None = None,
    margin: float = MARGIN,
    bins: int = 15,
) -> dict[int, dict[str, float]]:
    """Scores of one case per class or region; leave the background out: it would make every voxel foreground.

    ECE, Brier and NLL are of the first reference, in the region that ``scored_region`` gives. GED2 (squared),
    HungarianIoU and PairwiseDice are of the samples in the whole image, the first two against all references.

    Args:
        references: bool, (C, *spatial) each; the main one first, then those of other raters.
        probabilities: (C, *spatial), in [0, 1].
        samples: bool, (C, *spatial) each.
        spacing: per axis of the arrays.
        valid: (*spatial), bool; False where the label is to be ignored.
        predicted: (*spatial), bool; foreground of the mask; where any probability is 0.5 or more by default.
        margin: around the foreground, in the unit of the spacing.
        bins: of ECE.

    Returns:
        Class index -> metric -> value; NaN: ECE, Brier and NLL without any foreground, PairwiseDice of one
        sample or of empty ones.

    Raises:
        ValueError: if shapes differ, a list is empty, or masks are not bool.
    """
    valid = _check_shapes(references, probabilities, samples, valid)
    scores: list[dict[str, float]] = [{} for _ in references[0]]
    if probabilities is not None:
        where = scored_region(references[0], probabilities, spacing, margin, valid, predicted)
        scores = calibration_scores(probabilities, references[0], where, bins)
    if samples is not None:
        for index, of_class in enumerate(scores):
            of_class |= sample_scores([r[index] for r in references], [s[index] for s in samples], valid)
    return dict(enumerate(scores))


def scored_region(
    truth: np.ndarray,
    probabilities: np.ndarray,
    spacing: Sequence[float],
    margin: float,
    valid: np.ndarray,
    predicted: np.ndarray | None = None,
) -> np.ndarray:
    """Voxels whose calibration is scored, (*spatial): valid ones within the margin around valid foreground.

    A prediction where the label is to be ignored does not make the voxels near it count. Arguments as in
    ``probabilistic_scores``, truth being the main reference.

    Raises:
        ValueError: if the shape of ``predicted`` is another.
    """
    predicted = (probabilities >= 0.5).any(axis=0) if predicted is None else np.asarray(predicted, bool)
    if predicted.shape != valid.shape:
        raise ValueError(f"predicted has shape {predicted.shape}, expected {valid.shape}")
    return around_foreground(truth.any(axis=0) & valid, predicted & valid, spacing, margin) & valid


def calibration_scores(
    probabilities: np.ndarray, truth: np.ndarray, where: np.ndarray | None = None, bins: int = 15
) -> list[dict[str, float]]:
    """ECE, Brier and NLL per class; arguments and errors as in ``expected_calibration_error``."""
    values = {
        "ECE": expected_calibration_error(probabilities, truth, where, bins),
        "Brier": brier_score(probabilities, truth, where),
        "NLL": negative_log_likelihood(probabilities, truth, where),
    }
    return [{name: float(value[index]) for name, value in values.items()} for index in range(len(truth))]


def sample_scores(
    raters: Sequence[np.ndarray], samples: Sequence[np.ndarray], where: np.ndarray | None = None
) -> dict[str, float]:
    """GED2, HungarianIoU and PairwiseDice of one class; arguments and errors as in ``squared_energy_distance``."""
    return {
        "GED2": squared_energy_distance(raters, samples, where),
        "HungarianIoU": hungarian_iou(raters, samples, where),
        "PairwiseDice": mean_pairwise_dice(samples, where),
    }


def _check_shapes(
    references: Sequence[np.ndarray],
    probabilities: np.ndarray | None,
    samples: Sequence[np.ndarray] | None,
    valid: np.ndarray | None,
) -> np.ndarray:
    """Raise unless all shapes agree; return ``valid``, all True by default."""
    if not len(references):
        raise ValueError("no references, expected at least one")
    shape = np.shape(references[0])
    groups = {
        "references": references,
        "probabilities": () if probabilities is None else (probabilities,),
        "samples": () if samples is None else samples,
    }
    for name, arrays in groups.items():
        for index, array in enumerate(arrays):
            if np.shape(array) != shape:
                raise ValueError(f"{name}[{index}] has shape {np.shape(array)}, expected {shape} of references[0]")
    valid = np.ones(shape[1:], bool) if valid is None else np.asarray(valid, bool)
    if valid.shape != shape[1:]:
        raise ValueError(f"valid has shape {valid.shape}, expected {shape[1:]}")
    return valid
