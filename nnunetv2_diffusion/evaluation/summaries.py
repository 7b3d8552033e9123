"""Summary files in nnU-Net's schema: values per case, class and metric."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from nnunetv2_diffusion.evaluation import EvaluationError, listed
from nnunetv2_diffusion.evaluation.run_ids import check_summary
from nnunetv2_diffusion.files import read_json, read_json_if_any

FILE = "summary.json"
FOREGROUND = "mean"  # the class that is the mean over all but the background
BACKGROUND = "0"


@dataclass(frozen=True)
class Summary:
    """Values of one method.

    Attributes:
        name: of the method.
        path: of the file.
        cases: case -> class -> metric -> value; cases in alphabetical order, classes as ``class_key`` has them.
        names: class -> name of its label or region, of those that the summary or dataset.json beside it tells.
    """

    name: str
    path: Path
    cases: Mapping[str, Mapping[str, Mapping[str, float]]]
    names: Mapping[str, str] = field(default_factory=dict)

    def classes(self) -> list[str]:
        """Classes of any case but the background, labels before regions, in order of their numbers."""
        found = {key for case in self.cases.values() for key in case} - {BACKGROUND}
        return sorted(found, key=lambda key: (key.startswith("("), [int(n) for n in re.findall(r"\d+", key)], key))

    def metrics(self) -> list[str]:
        """Metrics of any case and class."""
        return sorted({name for case in self.cases.values() for metrics in case.values() for name in metrics})

    def values(self, key: str, metric: str) -> np.ndarray:
        """Values of a class over cases, (cases,), NaN where undefined.

        Raises:
            EvaluationError: if a case lacks class or metric, with what it has.
        """
        return np.array([self._value(case, key, metric) for case in self.cases], np.float64)

    def foreground(self, keys: Iterable[str], metric: str) -> np.ndarray:
        """Mean over those of the given classes that have a value, (cases,): NaN where none has.

        Raises:
            EvaluationError: as ``values``, or if there are no classes.
        """
        keys = list(keys)
        if not keys:
            raise EvaluationError(f"{self.path} has no foreground class, expected one at least besides {BACKGROUND}")
        values = np.stack([self.values(key, metric) for key in keys])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # mean of nothing
            return np.nanmean(values, axis=0)

    def _value(self, case: str, key: str, metric: str) -> float:
        classes = self.cases[case]
        if key not in classes:
            raise EvaluationError(f"{self.path}: case {case} has no class {key}; it has {listed(classes)}")
        if metric not in classes[key]:
            raise EvaluationError(
                f"{self.path}: case {case}, class {key} has no metric {metric}; it has {listed(classes[key])}"
            )
        return classes[key][metric]


def class_key(text: str) -> str:
    """One spelling for a class: 3 and (3,) are '3', region 1,2 is '(1, 2)'; other text stays as it is."""
    if not re.fullmatch(r"\s*\(?\s*\d+\s*(,\s*\d+\s*)*,?\s*\)?\s*", text):
        return text
    numbers = [str(int(number)) for number in re.findall(r"\d+", text)]
    return numbers[0] if len(numbers) == 1 else f"({', '.join(numbers)})"


def case_name(prediction_file: str) -> str:
    """Name of a case: that of its prediction without folder and ending."""
    name = PureWindowsPath(prediction_file).name  # splits at both kinds of slashes
    return re.sub(r"(?<=.)\.[^.]+(\.gz)?$", "", name)


def read_summary(source: Path, name: str) -> Summary:
    """Read a summary file, or that of a folder of predictions.

    Raises:
        EvaluationError: naming the file and what is wrong with it, also if the folder holds another run by now.
    """
    path = source / FILE if source.is_dir() else source
    if not path.is_file():
        if source.is_dir():
            raise EvaluationError(f"{source} has no {FILE}; make it: nnunetv2_diffusion evaluate GROUND_TRUTH {source}")
        raise EvaluationError(f"{source} does not exist; expected a folder of predictions, or its {FILE}")
    content = read_json(path, EvaluationError, "the summary of nnU-Net's evaluation or of ours")
    entries = content.get("metric_per_case")
    if not isinstance(entries, list) or not entries:
        raise EvaluationError(
            f"{path} has no cases; expected a list 'metric_per_case', as nnU-Net's evaluation writes it"
        )
    check_summary(path, content)
    cases: dict[str, dict] = {}
    for index, entry in enumerate(entries):
        case, classes = _read_entry(entry, f"{path}: metric_per_case[{index}]")
        if case in cases:
            raise EvaluationError(f"{path} has case {case} twice")
        cases[case] = classes
    return Summary(name, path, dict(sorted(cases.items())), _class_names(content, path.parent))


def _class_names(content: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Class -> name, of our own summary or of dataset.json in its folder; nothing where neither tells."""
    try:
        pairs = list(content["conventions"]["names"].items())
    except (KeyError, TypeError, AttributeError):
        labels = (read_json_if_any(folder / "dataset.json") or {}).get("labels")
        try:
            pairs = [(str(v if isinstance(v, int) else tuple(v)), name) for name, v in labels.items()]
        except (TypeError, AttributeError):
            return {}
    return {class_key(key): str(name) for key, name in pairs}


def check_same_cases(summaries: Sequence[Summary]) -> None:
    """Raise unless all have the same cases.

    Raises:
        EvaluationError: naming what is missing where.
    """
    everything = set().union(*(summary.cases for summary in summaries))
    lines = [
        f"{summary.name} ({summary.path}) lacks {len(cases)} of {len(everything)}: {listed(cases)}"
        for summary, cases in ((s, everything - set(s.cases)) for s in summaries)
        if cases
    ]
    if lines:
        raise EvaluationError("the cases are not the same. " + "; ".join(lines))


def _read_entry(entry: Any, where: str) -> tuple[str, dict[str, dict[str, float]]]:
    """Case, and its numbers per class; null is NaN, what is no number is left out."""
    if not isinstance(entry, dict) or not isinstance(entry.get("prediction_file"), str):
        raise EvaluationError(f"{where} has no text 'prediction_file'")
    metrics = entry.get("metrics")
    if not isinstance(metrics, dict) or not all(isinstance(values, dict) for values in metrics.values()):
        raise EvaluationError(f"{where} has no 'metrics' of the form {{class: {{metric: value}}}}")
    classes: dict[str, dict[str, float]] = {}
    for key, values in metrics.items():
        classes[class_key(key)] = {
            name: np.nan if value is None else float(value)
            for name, value in values.items()
            if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        }
    return case_name(entry["prediction_file"]), classes
