"""Overlap and volume of two masks, and what they are where a mask is empty."""

from dataclasses import dataclass
from math import nan

import numpy as np


@dataclass(frozen=True)
class EmptyRule:
    """Scores where the masks of a case and class are empty. NaN: undefined, left out of means and counted.

    Recall, precision and relative volume error follow from their formulas: NaN where they are 0/0.

    Attributes:
        overlap_both: Dice, IoU and NSD if both masks are empty. Dice and IoU are 0 if one is.
        nsd_one: NSD if one mask is empty.
        hd95_both: HD95 if both masks are empty. HD, HD95 and ASSD are NaN otherwise where a mask is empty.
        reason: why one would choose it.
    """

    overlap_both: float
    nsd_one: float
    hd95_both: float
    reason: str

    def text(self) -> str:
        """The rule in one sentence, for a file of results."""
        return (
            f"both masks empty: Dice, IoU and NSD {self.overlap_both:g}, HD95 {self.hd95_both:g}, HD and ASSD nan; one "
            f"mask empty: Dice and IoU 0, NSD {self.nsd_one:g}, HD, HD95 and ASSD nan; recall, precision and relative "
            "volume error nan where they are 0/0; nan is left out of means and counted"
        )


EMPTY_RULES = {
    "nnunet": EmptyRule(nan, 0.0, nan, "as nnUNetv2_evaluate_folder; its distances: as MONAI, undefined"),
    "recycling": EmptyRule(nan, nan, nan, "recycling paper: no score of a surface where a mask is empty, NSD included"),
    "hidiff": EmptyRule(1.0, 0.0, nan, "HiDiff paper: HD95 undefined where a mask is empty; Dice as its authors code"),
    "hidiff-code": EmptyRule(1.0, 0.0, 1.0, "code of HiDiff's authors: HD95 1 for two empty masks, which favours them"),
}


@dataclass(frozen=True)
class Counts:
    """Voxels that count, by reference and prediction."""

    tp: int
    fp: int
    fn: int
    tn: int

    @property
    def n_ref(self) -> int:
        """Voxels of the reference."""
        return self.tp + self.fn

    @property
    def n_pred(self) -> int:
        """Voxels of the prediction."""
        return self.tp + self.fp


def count(reference: np.ndarray, prediction: np.ndarray, valid: np.ndarray | None = None) -> Counts:
    """Count voxels of two bool masks of the same shape, only where ``valid`` (all by default)."""
    if valid is not None:
        reference, prediction = reference & valid, prediction & valid
    tp = int(np.count_nonzero(reference & prediction))
    fp = int(np.count_nonzero(prediction)) - tp
    fn = int(np.count_nonzero(reference)) - tp
    voxels = reference.size if valid is None else int(np.count_nonzero(valid))
    return Counts(tp, fp, fn, voxels - tp - fp - fn)


def overlap_scores(counts: Counts, rule: EmptyRule) -> dict[str, float]:
    """nnU-Net's keys (Dice, IoU, FP, TP, FN, TN, n_pred, n_ref), and Recall, Precision and Accuracy, all in [0, 1]."""
    c = counts
    union = c.tp + c.fp + c.fn
    return {
        "Dice": 2 * c.tp / (union + c.tp) if union else rule.overlap_both,
        "IoU": c.tp / union if union else rule.overlap_both,
        "FP": c.fp,
        "TP": c.tp,
        "FN": c.fn,
        "TN": c.tn,
        "n_pred": c.n_pred,
        "n_ref": c.n_ref,
        "Recall": _ratio(c.tp, c.n_ref),
        "Precision": _ratio(c.tp, c.n_pred),
        "Accuracy": _ratio(c.tp + c.tn, union + c.tn),
    }


def volume_scores(counts: Counts, voxel: float) -> dict[str, float]:
    """Volumes and their error.

    Args:
        counts: of the masks.
        voxel: volume of one voxel, ml; 1 to count voxels or pixels.

    Returns:
        volume_ref, volume_pred, volume_error (prediction - reference), its absolute value volume_error_abs, all in
        the unit of ``voxel``; volume_error_rel, a fraction of the reference, NaN if that is empty.
    """
    error = (counts.n_pred - counts.n_ref) * voxel
    return {
        "volume_ref": counts.n_ref * voxel,
        "volume_pred": counts.n_pred * voxel,
        "volume_error": error,
        "volume_error_abs": abs(error),
        "volume_error_rel": _ratio(counts.n_pred - counts.n_ref, counts.n_ref),
    }


def union_box(*masks: np.ndarray) -> tuple[slice, ...]:
    """The smallest box that holds all True voxels of masks of one shape; empty slices if there are none."""
    box = []
    for axis in range(masks[0].ndim):
        others = tuple(a for a in range(masks[0].ndim) if a != axis)
        used = np.flatnonzero(np.logical_or.reduce([mask.any(axis=others) for mask in masks]))
        box.append(slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 0))
    return tuple(box)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else nan
