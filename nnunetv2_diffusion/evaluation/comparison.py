"""Methods on the same cases: mean and standard deviation, paired tests against one of them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from nnunetv2_diffusion.evaluation import EvaluationError, listed
from nnunetv2_diffusion.evaluation.statistics import PairedComparison, compare_pairs
from nnunetv2_diffusion.evaluation.summaries import (
    FILE,
    FOREGROUND,
    Summary,
    check_same_cases,
    class_key,
    read_summary,
)

DEFAULT_METRICS = ("Dice", "HD95")
# beginnings of the names of metrics, in lower case
HIGHER_IS_BETTER = ("dice", "iou", "jaccard", "nsd", "recall", "sensitivity", "precision", "specificity", "accuracy")
HIGHER_IS_BETTER += ("f1", "hungarianiou", "lesion_dice")
LOWER_IS_BETTER = ("hd", "hausdorff", "assd", "asd", "masd", "ece", "brier", "nll", "ged", "fp", "fn")
LOWER_IS_BETTER += ("volume_error_abs",)

MOST_RESAMPLES = 1_000_000


@dataclass(frozen=True)
class Options:
    """What is compared and how.

    Attributes:
        metrics: their names; None for those of Dice and HD95 that there are.
        classes: 'mean' (over the foreground of a case), labels and regions, by value or name; None for mean and each.
        reference: name of the method that the others are tested against; None for the first.
        alpha: level of the tests, in (0, 1); the intervals have 1 - alpha.
        resamples: of the bootstrap, at least 100.
        seed: of the bootstrap.
        higher: metrics to be taken for better high.
        lower: metrics to be taken for better low.
    """

    metrics: Sequence[str] | None = None
    classes: Sequence[str] | None = None
    reference: str | None = None
    alpha: float = 0.01
    resamples: int = 10000
    seed: int = 0
    higher: Sequence[str] = ()
    lower: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha is {self.alpha}, expected a number between 0 and 1")
        if not 100 <= self.resamples <= MOST_RESAMPLES:
            raise ValueError(
                f"bootstrap is {self.resamples}, expected at least 100 resamples, at most {MOST_RESAMPLES}"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, expected at least 0 and less than 2 ** 63")
        both = sorted(set(self.higher) & set(self.lower))
        if both:
            raise ValueError(f"{', '.join(both)} cannot be better both high and low")


@dataclass(frozen=True)
class Score:
    """One class, metric and method.

    Attributes:
        label: the class, or 'mean': per case, the mean over the foreground classes that have a value.
        metric: its name.
        name: of the method.
        cases: number of those that have a value.
        left_out: number of those whose value is NaN or infinite.
        undefined: of 'mean', number of the values of a case and class that it leaves out; of a class, ``left_out``.
        mean: over ``cases``; NaN if there are none.
        sd: over ``cases``, with n - 1; NaN below two.
        better: 1 if higher is better, -1 if lower is, 0 if it is not known or neither is.
        test: against the reference method; None for the reference itself.
    """

    label: str
    metric: str
    name: str
    cases: int
    left_out: int
    undefined: int
    mean: float
    sd: float
    better: int
    test: PairedComparison | None


@dataclass(frozen=True)
class Comparison:
    """Methods on the same cases.

    Attributes:
        scores: by class, then metric, then method.
        options: without any None.
        names: of classes.
        lacking: metric that is compared where all have it -> names of the methods that lack it, if not all do.
    """

    scores: Sequence[Score]
    options: Options
    names: Mapping[str, str] = field(default_factory=dict)
    lacking: Mapping[str, Sequence[str]] = field(default_factory=dict)


def compare(sources: Sequence[Path], names: Sequence[str] | None = None, options: Options | None = None) -> Comparison:
    """Compare methods on the same cases.

    Args:
        sources: folders of predictions with a summary, or summary files; two at least.
        names: of the methods; those of the folders by default.
        options: what and how.

    Raises:
        EvaluationError: if a file cannot be used, or the cases are not the same.
        ValueError: if names or options cannot be used.
    """
    options = options or Options()
    names = method_names(sources, names)
    reference = names[0] if options.reference is None else options.reference
    if reference not in names:
        raise ValueError(f"reference is {reference}, expected one of {', '.join(names)}")
    summaries = [read_summary(Path(source), name) for source, name in zip(sources, names, strict=True)]
    check_same_cases(summaries)
    class_names = _common_names(summaries)
    foreground = list(dict.fromkeys(key for summary in summaries for key in summary.classes()))
    if options.classes is None:
        classes = foreground if len(foreground) == 1 else [FOREGROUND, *foreground]
    else:
        keys = {name: key for key, name in class_names.items()}
        classes = list(dict.fromkeys(keys.get(name, class_key(name)) for name in options.classes))
    metrics, lacking = (list(dict.fromkeys(options.metrics)), {}) if options.metrics else _default_metrics(summaries)
    options = replace(options, metrics=metrics, classes=classes, reference=reference)
    scores = [s for key in classes for metric in metrics for s in _scores(summaries, foreground, key, metric, options)]
    return Comparison(scores, options, class_names, lacking)


def _common_names(summaries: Sequence[Summary]) -> dict[str, str]:
    """Class -> name where all summaries that tell one agree, and no two classes share it."""
    told: dict[str, set[str]] = {}
    for summary in summaries:
        for key, name in summary.names.items():
            told.setdefault(key, set()).add(name)
    names = {key: found.pop() for key, found in told.items() if len(found) == 1}
    used = Counter(names.values())
    return {key: name for key, name in names.items() if used[name] == 1 and name != FOREGROUND}


def method_names(sources: Sequence[Path], names: Sequence[str] | None = None) -> list[str]:
    """Names of the methods, all different; by default, those of the folders (or of files not called summary.json).

    Raises:
        ValueError: if there are fewer than two sources, or names are too many, too few, empty or equal.
    """
    if len(sources) < 2:
        raise ValueError(f"{len(sources)} folder of predictions is given, expected two or more")
    hint = ""
    if names is None:
        hint = "; give others with --names"
        paths = [Path(source).resolve() for source in sources]
        names = [
            path.parent.name if path.name == FILE else path.name.removesuffix(".json") if path.is_file() else path.name
            for path in paths
        ]
    if len(names) != len(sources):
        raise ValueError(f"{len(names)} names are given for {len(sources)} folders: {', '.join(names)}")
    if not all(name.strip() for name in names):
        raise ValueError(f"a name is empty{hint}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{', '.join(twice)}: more than one method has this name{hint}")
    return list(names)


def direction(metric: str, higher: Sequence[str] = (), lower: Sequence[str] = ()) -> int:
    """1 if higher values of a metric are better, -1 if lower ones are, 0 if it is not known or neither is.

    Args:
        metric: its name; known by its beginning, in any case, such as NSD_2mm.
        higher: names that are to be taken for better high, whatever their beginning.
        lower: names that are to be taken for better low.
    """
    name = metric.lower()
    if metric in higher or (metric not in lower and name.startswith(HIGHER_IS_BETTER)):
        return 1
    return -1 if metric in lower or name.startswith(LOWER_IS_BETTER) else 0


def _default_metrics(summaries: Sequence[Summary]) -> tuple[list[str], dict[str, list[str]]]:
    """Metrics that all have, and those that only some have -> names of the methods that lack them."""
    found = {summary.name: set(summary.metrics()) for summary in summaries}
    common = set.intersection(*found.values())
    metrics = [name for name in DEFAULT_METRICS if name in common]
    if not metrics:
        raise EvaluationError(
            f"not all summaries have {' or '.join(DEFAULT_METRICS)}; choose metrics with --metrics: all have "
            f"{listed(common)}"
        )
    lacking = {m: [name for name, has in found.items() if m not in has] for m in DEFAULT_METRICS}
    return metrics, {m: names for m, names in lacking.items() if 0 < len(names) < len(found)}


def _scores(
    summaries: Sequence[Summary], foreground: Sequence[str], label: str, metric: str, options: Options
) -> Iterator[Score]:
    """Scores of all methods for one class and metric."""
    values = {
        summary.name: summary.foreground(foreground, metric) if label == FOREGROUND else summary.values(label, metric)
        for summary in summaries
    }
    undefined = {
        summary.name: sum(
            int((~np.isfinite(summary.values(key, metric))).sum())
            for key in (foreground if label == FOREGROUND else [label])
        )
        for summary in summaries
    }
    better = direction(metric, options.higher, options.lower)
    for name, column in values.items():
        known = column[np.isfinite(column)]
        test = None
        if name != options.reference:
            reference = values[options.reference]
            test = compare_pairs(column, reference, better, 1 - options.alpha, options.resamples, options.seed)
        yield Score(
            label=label,
            metric=metric,
            name=name,
            cases=len(known),
            left_out=len(column) - len(known),
            undefined=undefined[name],
            mean=float(known.mean()) if len(known) else np.nan,
            sd=float(known.std(ddof=1)) if len(known) > 1 else np.nan,
            better=better,
            test=test,
        )
