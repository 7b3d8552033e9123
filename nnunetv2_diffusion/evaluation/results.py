"""Scores of all cases in nnU-Net's summary.json and in a CSV, written whole or not at all."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan, nan
from typing import Any

import numpy as np

from nnunetv2_diffusion import files
from nnunetv2_diffusion.evaluation import strata
from nnunetv2_diffusion.evaluation.labels import LabelSet

NNUNET_KEYS = ("Dice", "IoU", "FP", "TP", "FN", "TN", "n_pred", "n_ref")
MEANS = {
    "mean": "over the cases where the score is defined",
    "foreground_mean": f"over the classes' means; {', '.join(NNUNET_KEYS)} as nnU-Net does it: nan if a class has no "
    "defined score; other scores: over the classes that have one",
    "nan_count, nan_ratio": "cases where the score is undefined, and their share; foreground_nan_ratio: their share of "
    "all pairs of case and class",
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
        case_metrics: metric -> value, of the case as a whole.
        lesions: key of a class or region -> its connected components.
        slices: key of a class or region -> its slices; empty for 2D.
    """

    name: str
    reference_file: str
    prediction_file: str
    unit: str
    volume_unit: str
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    case_metrics: dict[str, float] = field(default_factory=dict)
    lesions: dict[str, strata.Lesions] = field(default_factory=dict)
    slices: dict[str, list[strata.ObjectScore]] = field(default_factory=dict)


def summarise(results: Sequence[CaseResult], labels: LabelSet, thresholds: Sequence[int]) -> dict[str, Any]:
    """nnU-Net's metric_per_case, mean and foreground_mean, and what it does not have.

    Args:
        results: of all cases, at least one.
        labels: classes or regions.
        thresholds: sizes of the strata, voxels.
    """
    keys = [target.key for target in labels.targets]
    table = {key: _columns([result.metrics[key] for result in results]) for key in keys}
    summary: dict[str, Any] = {
        "metric_per_case": [_case_entry(result) for result in results],
        "mean": {key: _over(columns, np.nanmean) for key, columns in table.items()},
        "nan_count": {key: _over(columns, lambda v: int(np.isnan(v).sum())) for key, columns in table.items()},
        "nan_ratio": {key: _over(columns, lambda v: np.isnan(v).mean()) for key, columns in table.items()},
    }
    means, ratios = (_columns(list(summary[name].values())) for name in ("mean", "nan_ratio"))
    summary["foreground_mean"] = {
        metric: float(values.mean()) if metric in NNUNET_KEYS else _over({metric: values}, np.nanmean)[metric]
        for metric, values in means.items()
    }
    summary["foreground_nan_ratio"] = _over(ratios, np.nanmean)
    case_columns = _columns([result.case_metrics for result in results])
    if case_columns:
        summary["case_mean"] = _over(case_columns, np.nanmean)
    summary["strata"] = _strata(results, keys, thresholds)
    return summary


def to_csv(results: Sequence[CaseResult], labels: LabelSet) -> str:
    """One row per case and class; undefined scores are empty. Scores of a case as a whole: a row of label 'case'."""
    rows = []
    for result in results:
        common = {
            "case": result.name,
            "reference_file": result.reference_file,
            "prediction_file": result.prediction_file,
        }
        rows += [{**common, "class": t.name, "label": t.key, **result.metrics[t.key]} for t in labels.targets]
        if result.case_metrics:
            rows.append({**common, "class": "", "label": "case", **result.case_metrics})
    files = ["reference_file", "prediction_file"]
    first = ["case", "class", "label"]
    metrics = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in first + files]
    text = io.StringIO()
    writer = csv.DictWriter(text, first + metrics + files, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if isinstance(v, float) and isnan(v) else v for k, v in row.items()})
    return text.getvalue()


def to_json(summary: Mapping[str, Any]) -> str:
    """As nnU-Net writes it, with sorted keys; but null where nnU-Net writes NaN, which is no JSON."""
    return files.to_json(summary, indent=4, sort_keys=True)


def _case_entry(result: CaseResult) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "case": result.name,
        "reference_file": result.reference_file,
        "prediction_file": result.prediction_file,
        "metrics": result.metrics,
    }
    return {**entry, "case_metrics": result.case_metrics} if result.case_metrics else entry


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
    """Metric -> its values in all rows, NaN where a row lacks it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name, nan) for row in rows], float) for name in names}


def _over(columns: Mapping[str, np.ndarray], reduce: Any) -> dict[str, Any]:
    """Reduce each column; NaN, without a warning, where numpy's nan-functions find no value."""
    result = {}
    for name, values in columns.items():
        value = nan if reduce is np.nanmean and np.isnan(values).all() else reduce(values)
        result[name] = value if isinstance(value, int) else float(value)
    return result


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
