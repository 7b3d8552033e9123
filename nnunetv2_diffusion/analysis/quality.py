"""What a prediction is worth besides its Dice: how far it is off, how calibrated, and what Dice it lets expect."""

import importlib.util
from collections.abc import Mapping

import numpy as np

from nnunetv2_diffusion.agreement import mean_over_found
from nnunetv2_diffusion.analysis.cases import MEAN, LabelledCase
from nnunetv2_diffusion.evaluation.labels import LabelSet
from nnunetv2_diffusion.evaluation.metrics import EMPTY_RULES
from nnunetv2_diffusion.evaluation.probabilistic import MARGIN, probabilistic_scores, scored_region
from nnunetv2_diffusion.evaluation.surface import LIBRARY, surface_scores
from nnunetv2_diffusion.inference.sample_statistics import volume_unit

Scores = dict[str, dict[str, float]]  # name of a class or region, or of their mean -> metric -> value


def can_measure_distances() -> bool:
    """Whether the library for distances of surfaces, which is optional, is installed."""
    return importlib.util.find_spec(LIBRARY) is not None


def length_unit(case: LabelledCase) -> str:
    """ "px" for 2D images, "mm" for volumes."""
    return "px" if volume_unit(case.reference.shape, case.properties["spacing"])[1] == "px" else "mm"


def _spacing(case: LabelledCase) -> tuple[float, ...]:
    """In the unit of lengths, along the axes that are left when a single slice is taken for an image."""
    spacing = tuple(float(s) for s in case.properties["spacing"])
    spacing = spacing[1:] if case.reference.shape[0] == 1 else spacing
    return spacing if length_unit(case) == "mm" else (1.0,) * len(spacing)


def _flat(x: np.ndarray, case: LabelledCase) -> np.ndarray:
    """(..., z, y, x), without z if the case is one slice: in a volume all of its voxels were surface."""
    return x[..., 0, :, :] if case.reference.shape[0] == 1 else x


def distance_scores(labels: LabelSet, case: LabelledCase, mask: np.ndarray) -> Scores:
    """HD95 in ``length_unit``; NaN where one of the masks is empty, or both are.

    Args:
        labels: of the model.
        case: with its reference; ignored voxels belong to neither mask.
        mask: labels, (z, y, x).
    """
    valid = labels.valid(case.reference)
    masks = [labels.masks(_flat(values, case)) for values in (case.reference, mask)]
    if valid is not None:
        masks = [m & _flat(valid, case) for m in masks]
    rule = EMPTY_RULES["nnunet"]
    spacing, unit = _spacing(case), length_unit(case)
    found = {
        target.name: {"HD95": surface_scores(*(m[i] for m in masks), spacing, (), unit, rule)["HD95"]}
        for i, target in enumerate(labels.targets)
    }
    return with_mean(found)


def probability_scores(labels: LabelSet, case: LabelledCase, mask: np.ndarray, probabilities: np.ndarray) -> Scores:
    """ECE near the foreground, and the soft Dice of the probabilities with their mask.

    The soft Dice of probabilities p with the mask m that they gave is 2 sum(p m) / (sum p + sum m): about the Dice that
    calibrated probabilities would let expect, 1 if all of them are 0 or 1, and 0 if nothing was found. It is no
    confidence before a model is calibrated. It needs no samples, so models with a chain and without one can be
    compared by it.

    Args:
        labels: of the model.
        case: with its reference.
        mask: labels, (z, y, x).
        probabilities: of the classes or regions in their order, (targets, z, y, x), in [0, 1].
    """
    reference, predicted = (labels.masks(_flat(values, case)) for values in (case.reference, mask))
    valid = labels.valid(case.reference)
    valid = None if valid is None else _flat(valid, case)
    p = _flat(probabilities, case)
    scores = probabilistic_scores([reference], p, None, _spacing(case), valid, predicted.any(0))
    found = {}
    for index, target in enumerate(labels.targets):
        total = p[index].sum() + predicted[index].sum()
        soft_dice = float(2 * p[index][predicted[index]].sum() / total) if total else 0.0
        found[target.name] = {"ECE": scores[index]["ECE"], "soft_dice": soft_dice}
    return with_mean(found)


def error_correlation(labels: LabelSet, case: LabelledCase, mask: np.ndarray, variance: np.ndarray) -> float:
    """Does the variance of samples point at errors: its correlation with them, over voxels near the foreground.

    Args:
        labels: of the model.
        case: with its reference.
        mask: labels of the samples' mean, (z, y, x).
        variance: of the samples, (z, y, x).

    Returns:
        Pearson's, in [-1, 1]; NaN if either is the same everywhere, as the variance of a single sample is.
    """
    reference, predicted = (labels.masks(_flat(values, case)) for values in (case.reference, mask))
    valid = labels.valid(case.reference)
    valid = np.ones(reference.shape[1:], bool) if valid is None else _flat(valid, case)
    where = scored_region(reference, predicted, _spacing(case), MARGIN, valid)
    errors, spread = (reference != predicted).any(0)[where].astype(float), _flat(variance, case)[where].astype(float)
    if not len(errors) or errors.std() == 0 or spread.std() == 0:
        return float("nan")
    return float(np.corrcoef(errors, spread)[0, 1])


def with_mean(scores: Mapping[str, Mapping[str, float]]) -> Scores:
    """With the mean over classes or regions, those without a value left out."""
    metrics = dict.fromkeys(metric for values in scores.values() for metric in values)
    means = {metric: mean_over_found([values[metric] for values in scores.values()]) for metric in metrics}
    return {**{name: dict(values) for name, values in scores.items()}, MEAN: means}
