"""Does a score find the cases that failed? Area under the risk-coverage curve, over cases.

The score is called confidence, as in the literature on selective prediction: any number by which cases are ranked, the
surest first, such as the agreement of samples. It need not be calibrated.
"""

from collections.abc import Sequence

import numpy as np


def selective_risk(confidence: Sequence[float], risk: Sequence[float]) -> np.ndarray:
    """Mean risk of the k most confident cases, k = 1 ... n: the risk-coverage curve at coverage k / n.

    Cases of equal confidence have no order. The curve is the mean over all orders that they may have, so that the
    order of the arguments changes nothing.

    Args:
        confidence: (n,), higher is surer; only its order matters.
        risk: (n,), such as 1 - Dice.

    Returns:
        (n,).

    Raises:
        ValueError: if the lengths differ, there are no cases, or a value is not finite.
    """
    confidence, risk = _cases(confidence, risk)
    _, group = np.unique(-confidence, return_inverse=True)
    order = np.lexsort((risk, group))  # by risk too: then the sums below are the same, bit for bit, in any order
    group, risk = group[order], risk[order]
    mean = np.bincount(group, weights=risk) / np.bincount(group)
    return np.cumsum(mean[group]) / np.arange(1, len(risk) + 1)


def aurc(confidence: Sequence[float], risk: Sequence[float]) -> float:
    """Area under the risk-coverage curve: the mean of ``selective_risk`` (Geifman et al. 2019, arXiv:1805.08206).

    The mean risk if confidence says nothing, lower if it is right. Arguments and errors as in ``selective_risk``.
    """
    return float(selective_risk(confidence, risk).mean())


def excess_aurc(confidence: Sequence[float], risk: Sequence[float]) -> float:
    """AURC less that of the best confidence for these risks, which ranks them perfectly; at least 0.

    Arguments and errors as in ``selective_risk``.
    """
    return max(0.0, aurc(confidence, risk) - aurc(-np.asarray(risk, np.float64), risk))


def failure_scores(confidence: Sequence[float], dice: Sequence[float]) -> dict[str, float]:
    """Failure detection over cases, with 1 - Dice as risk.

    Args:
        confidence: per case, such as the mean pairwise Dice of its samples.
        dice: per case, in the same order.

    Returns:
        AURC, ExcessAURC (both NaN if no case counts), cases (that count) and left_out (a value is NaN or infinite).

    Raises:
        ValueError: if the lengths differ.
    """
    confidence, risk = _same_length(confidence, 1 - np.asarray(dice, np.float64))
    known = np.isfinite(confidence) & np.isfinite(risk)
    scores = {"AURC": np.nan, "ExcessAURC": np.nan, "cases": int(known.sum()), "left_out": int((~known).sum())}
    if known.any():
        scores["AURC"] = aurc(confidence[known], risk[known])
        scores["ExcessAURC"] = excess_aurc(confidence[known], risk[known])
    return scores


def _same_length(confidence: Sequence[float], risk: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    confidence, risk = np.asarray(confidence, np.float64), np.asarray(risk, np.float64)
    if confidence.ndim != 1 or confidence.shape != risk.shape:
        raise ValueError(f"confidence has shape {confidence.shape} and risk {risk.shape}, expected (cases,) twice")
    return confidence, risk


def _cases(confidence: Sequence[float], risk: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    confidence, risk = _same_length(confidence, risk)
    if not len(risk):
        raise ValueError("no cases, expected at least one")
    if not (np.isfinite(confidence).all() and np.isfinite(risk).all()):
        raise ValueError("confidence or risk has a NaN or infinite value, expected finite ones")
    return confidence, risk
