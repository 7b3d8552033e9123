"""Scores of all cases, as nnU-Net's summary.json has them and as a CSV."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from nnunetv2_diffusion import files
from nnunetv2_diffusion.evaluation import strata
from nnunetv2_diffusion.evaluation.labels import LabelSet

NNUNET_KEYS = ("Dice", "IoU", "FP", "TP", "FN", "TN", "n_pred", "n_ref")
MEANS = {
    "mean": "over the cases where the score is defined",
    "foreground_mean": f"over the classes' means; {', '.join(NNUNET_KEYS)} as nnU-Net does it: undefined if a "
    "class has no defined score; other scores: over the classes that have one",
    "nan_count, nan_ratio": "cases where the score is undefined, and their share; foreground_nan_ratio: their share of "
    "all pairs of case and class",
    "null": "undefined; nnU-Net writes NaN, which is no JSON",
}


@dataclass
class CaseResult:
    """Scores of one case.

    Attributes:
        name: of the case.
        reference_file: as written to the summary.
        prediction_file: as written to the summary.
        unit: of lengths, mm or px.
        volume_unit: of volumes.
        metrics: key of a class or region -> metric -> value.
        lesions: key of a class or region -> its connected components.
        slices: key of a class or region -> its slices; empty for 2D.
    """

    name: str
    reference_file: str
    prediction_file: str
    unit: str
    volume_unit: str
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    lesions: dict[str, strata.Lesions] = field(default_factory=dict)
    slices: dict[str, list[strata.ObjectScore]] = field(default_factory=dict)

    def files(self) -> dict[str, str]:
        """Those that were compared, by nnU-Net's names."""
        return {"reference_file": self.reference_file, "prediction_file": self.prediction_file}


def summarise(results: Sequence[CaseResult], labels: LabelSet, thresholds: Sequence[int]) -> dict[str, Any]:
    """nnU-Net's metric_per_case, mean and foreground_mean, and what it does not have.

    Args:
        results: of all cases, at least one.
        labels: classes or regions.
        thresholds: sizes of the strata, voxels.
    """
    keys = [target.key for target in labels.targets]
    table = {key: pd.DataFrame([result.metrics[key] for result in results], dtype=float) for key in keys}
    means = pd.DataFrame({key: scores.mean() for key, scores in table.items()})  # metrics x classes
    missing = pd.DataFrame({key: scores.isna().mean() for key, scores in table.items()})
    host = means.loc[means.index.isin(NNUNET_KEYS)].mean(axis=1, skipna=False)
    return {
        "metric_per_case": [{"case": r.name, **r.files(), "metrics": r.metrics} for r in results],
        "mean": {key: scores.mean().to_dict() for key, scores in table.items()},
        "nan_count": {key: scores.isna().sum().to_dict() for key, scores in table.items()},
        "nan_ratio": {key: scores.isna().mean().to_dict() for key, scores in table.items()},
        "foreground_mean": {**means.mean(axis=1).to_dict(), **host.to_dict()},
        "foreground_nan_ratio": missing.mean(axis=1).to_dict(),
        "strata": _strata(results, keys, thresholds),
    }


def to_csv(results: Sequence[CaseResult], labels: LabelSet) -> str:
    """One row per case and class; undefined scores are empty."""
    rows = [
        {"case": result.name, "class": target.name, "label": target.key, **result.metrics[target.key], **result.files()}
        for result in results
        for target in labels.targets
    ]
    return pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")


def to_json(summary: Mapping[str, Any]) -> str:
    """As nnU-Net writes it, with sorted keys; but null where nnU-Net writes NaN, which is no JSON."""
    return files.to_json(summary, indent=4, sort_keys=True)


def _strata(results: Sequence[CaseResult], keys: Sequence[str], thresholds: Sequence[int]) -> dict[str, Any]:
    """Scores by size of the class in a case or slice, and of its lesions."""
    found: dict[str, Any] = {"case": {}, "slice": {}, "lesion": {}}
    for key in keys:
        found["case"][key] = strata.case_strata([result.metrics[key] for result in results], thresholds)
        slices = [item for result in results for item in result.slices.get(key, [])]
        if slices:
            found["slice"][key] = strata.object_strata(slices, thresholds)
        lesions = [result.lesions[key] for result in results]
        objects = [item for lesion in lesions for item in lesion.found]
        false = [size for lesion in lesions for size in lesion.false]
        found["lesion"][key] = {
            **strata.object_strata(objects, thresholds),
            "false": strata.count_sizes(false, thresholds),
        }
    return found
