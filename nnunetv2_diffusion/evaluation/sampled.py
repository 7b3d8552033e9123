"""Scores of probabilities, samples and raters, as ``evaluate`` adds them to those of masks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nnunetv2_diffusion.agreement import CAUTION, DEFINITION, mean_over_found
from nnunetv2_diffusion.evaluation.failure import failure_scores
from nnunetv2_diffusion.evaluation.files import Case
from nnunetv2_diffusion.evaluation.probabilistic import MARGIN, probabilistic_scores
from nnunetv2_diffusion.evaluation.results import CaseResult

CONVENTIONS = {
    "ECE, Brier, NLL": f"one class or region against the rest, within {MARGIN:g} (mm, pixels) of the foreground of "
    "reference or prediction; ECE of 15 bins of equal width, NLL clipped at 1e-6",
    "GED2, HungarianIoU": "of samples and all raters, distance 1 - IoU; two empty masks are equal",
    "PairwiseDice": DEFINITION,
    "failure_detection": "risk: 1 - Dice, mean over classes; cases are ranked by agreement: PairwiseDice, mean over "
    f"the classes that were found; left_out: cases without either. {CAUTION}",
}


def class_scores(case: Case) -> Mapping[str, Mapping[str, float]]:
    """Key of a class or region -> metric -> value; empty without probabilities, samples and raters."""
    probabilities, samples, raters = case.probabilities(), case.samples(), case.raters()
    if probabilities is None and not samples:
        return {}
    labels = case.labels
    scores = probabilistic_scores(
        [labels.masks(values) for values in (case.reference.values, *raters)],
        None if probabilities is None else probabilities[[target.head for target in labels.targets]],
        [labels.masks(values) for values in samples] or None,
        case.spacing,
        case.valid,
        labels.masks(case.prediction.values).any(0),
    )
    return {target.key: scores[index] for index, target in enumerate(labels.targets)}


def folder_scores(results: Sequence[CaseResult]) -> Mapping[str, Any]:
    """AURC over cases if there are samples."""
    if not any("PairwiseDice" in scores for result in results for scores in result.metrics.values()):
        return {}
    agreement, dice = (_case_means(results, metric) for metric in ("PairwiseDice", "Dice"))
    return {"failure_detection": failure_scores(agreement, dice)}


def _case_means(results: Sequence[CaseResult], metric: str) -> list[float]:
    """Mean over the classes that have a value, for each case."""
    return [mean_over_found([scores.get(metric, np.nan) for scores in result.metrics.values()]) for result in results]
