"""Verb ``compare``: methods on the same cases, in the table that papers print."""

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import scipy

from nnunetv2_diffusion import __version__
from nnunetv2_diffusion.evaluation.comparison import DEFAULT_METRICS, Comparison, Options, Score, compare
from nnunetv2_diffusion.evaluation.summaries import FILE, FOREGROUND
from nnunetv2_diffusion.evaluation.tables import ENDINGS, MISSING, RENDERERS, Cell, Table, number, p_value
from nnunetv2_diffusion.files import write_all

EXAMPLES = """
nnunetv2_diffusion compare masks_recycling masks_nnunet --names RecycleXT nnU-Net
nnunetv2_diffusion compare masks_recycling masks_nnunet --metrics Dice HD95 NSD_1 --format latex csv -o table.tex
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add = parser.add_argument
    add("predictions", nargs="+", type=Path, metavar="PREDICTIONS", help=f"Two or more folders with {FILE}, or files.")
    add("--names", nargs="+", metavar="NAME", help="Names of the methods. Default: those of the folders.")
    add("--metrics", nargs="+", metavar="METRIC", help=f"Default: {' '.join(DEFAULT_METRICS)}, where present.")
    add("--classes", nargs="+", metavar="CLASS", help="mean (over the foreground), 1, 1,2 (a region). Default: all.")
    add("--reference", metavar="NAME", help="Method that the others are tested against. Default: the first.")
    add("--alpha", type=float, default=0.01, help="Level of the tests; the intervals have 1 - alpha.")
    add("--bootstrap", type=int, default=10000, metavar="N", help="Resamples for the intervals.")
    add("--seed", type=int, default=0, help="Seed of the resamples.")
    add("--decimals", type=int, default=3, choices=range(10), metavar="N", help="Digits behind the point; csv has all.")
    add("--higher_is_better", nargs="+", default=(), metavar="METRIC", help="Of metrics unknown here: more is better.")
    add("--lower_is_better", nargs="+", default=(), metavar="METRIC", help="Of metrics unknown here: less is better.")
    known = f"Of {', '.join(RENDERERS)}. Default: by -o, or text."
    add("--format", nargs="+", choices=list(RENDERERS), metavar="FORMAT", help=known)
    add("-o", "--output", type=Path, metavar="FILE", help="New file; for several formats, its ending is replaced.")


def run(arguments: argparse.Namespace) -> int:
    """Compare, and print or write the tables; 1 with a message if it cannot be done."""
    try:
        files = output_files(arguments.format, arguments.output)
        options = Options(
            metrics=arguments.metrics,
            classes=arguments.classes,
            reference=arguments.reference,
            alpha=arguments.alpha,
            resamples=arguments.bootstrap,
            seed=arguments.seed,
            higher=arguments.higher_is_better,
            lower=arguments.lower_is_better,
        )
        comparison = compare(arguments.predictions, arguments.names, options)
        texts = {name: render(comparison, name, arguments.decimals) for name in files}
        if arguments.output is None:
            print("\n".join(texts.values()), end="")
        else:
            write_all({file: texts[name] for name, file in files.items()})
            print("\n".join([*map(str, files.values()), *lacking_notes(comparison)]))
    except (OSError, ValueError) as error:
        print(f"nnunetv2_diffusion compare: {error}", file=sys.stderr)
        return 1
    return 0


def output_files(formats: Sequence[str] | None, output: Path | None) -> dict[str, Path | None]:
    """Formats, and the file of each; None for the standard output.

    Without formats, the ending of the output says which. One format is written to just this file; of several, each
    replaces the ending.
    """
    if formats is None:
        endings = {ending: name for name, ending in ENDINGS.items()}
        formats = [endings.get(output.suffix.lower(), "text") if output else "text"]
    formats = list(dict.fromkeys(formats))
    if output is None or len(formats) == 1:
        return dict.fromkeys(formats, output)
    stem = output.with_suffix("") if output.suffix.lower() in ENDINGS.values() else output
    return {name: stem.with_name(stem.name + ENDINGS[name]) for name in formats}


def render(comparison: Comparison, name: str, decimals: int = 3) -> str:
    """All tables in one format: scores and tests to be read, or one flat table of all numbers for csv."""
    if name == "csv":
        return RENDERERS[name](flat_table(comparison))
    return "\n".join(RENDERERS[name](table(comparison, decimals)) for table in (score_table, difference_table))


def score_table(comparison: Comparison, decimals: int = 3) -> Table:
    """Mean and standard deviation, a row per class and method and a column per metric; the best are marked."""
    options, metrics = comparison.options, list(comparison.options.metrics)
    cells = {}
    for _, group in groupby(comparison.scores, key=lambda score: (score.label, score.metric)):
        for score, cell in _score_cells(list(group), options.alpha, decimals):
            cells[score.label, score.name, score.metric] = cell
    rows = [
        [comparison.names.get(label, label), name, *(cells[label, name, metric] for metric in metrics)]
        for label, name in dict.fromkeys((score.label, score.name) for score in comparison.scores)
    ]
    total = comparison.scores[0].cases + comparison.scores[0].left_out
    return Table(f"Scores of {total} cases", ["class", "method", *metrics], rows, _score_notes(comparison), left=2)


def difference_table(comparison: Comparison, decimals: int = 3) -> Table:
    """Paired comparisons with the reference, a row per class, metric and other method."""
    options = comparison.options
    rows = []
    for score in comparison.scores:
        if score.test is not None:
            test = score.test
            low, high = (number(value, decimals) for value in test.interval)
            left_out = f"{test.pairs} (-{test.left_out})" if test.left_out else str(test.pairs)
            difference = [number(test.difference, decimals), f"[{low}, {high}]"]
            tests = [p_value(test.p_t), p_value(test.p_wilcoxon)]
            won = MISSING if np.isnan(test.won) else f"{100 * test.won:.1f} %"
            label = comparison.names.get(score.label, score.label)
            rows.append([label, score.metric, score.name, left_out, *difference, *tests, won])
    columns = ["class", "metric", "method", "pairs", "difference", f"{100 * (1 - options.alpha):g} % interval"]
    columns += ["p (t-test)", "p (Wilcoxon)", "won"]
    notes = [
        f"Difference: mean of method minus {options.reference} over cases. Pairs with a NaN or infinite value are left "
        "out; (-n) is their number.",
        f"Interval: expanded percentile bootstrap, {options.resamples} resamples, seed {options.seed}. Tests: paired, "
        "two-sided, not corrected for their number; Wilcoxon's drops pairs without a difference.",
        f"Won: share of cases in which the method is better than {options.reference}, ties counted half.",
        f"nnunetv2_diffusion {__version__}, scipy {scipy.__version__}.",
    ]
    return Table(f"Tests against {options.reference}", columns, rows, notes, left=3)


def flat_table(comparison: Comparison) -> Table:
    """All numbers with all digits, a row per class, metric and method; what is undefined is empty."""
    columns = ["class", "metric", "method", "cases", "left_out", "mean", "sd", "better", "reference", "alpha", "pairs"]
    columns += ["pairs_left_out", "difference", "interval_low", "interval_high", "t", "p_t", "p_wilcoxon", "won"]
    rows = []
    for score in comparison.scores:
        values = [score.cases, score.left_out, score.mean, score.sd]
        better = {1: "higher", -1: "lower", 0: ""}[score.better]
        row = [score.label, score.metric, score.name, *map(_all_digits, values), better]
        if score.test is None:
            rows.append(row + [""] * (len(columns) - len(row)))
            continue
        test = score.test
        numbers = [test.pairs, test.left_out, test.difference, *test.interval, test.t, test.p_t, test.p_wilcoxon]
        reference = [comparison.options.reference, _all_digits(comparison.options.alpha)]
        rows.append([*row, *reference, *map(_all_digits, [*numbers, test.won])])
    return Table("All numbers", columns, rows, left=3)


def _score_notes(comparison: Comparison) -> list[str]:
    options, better = comparison.options, {score.metric: score.better for score in comparison.scores}
    notes = [
        "Mean ± standard deviation (n - 1) over cases. The best mean is marked, and those that are printed like it; "
        "none if all are.",
        f"†: differs from {options.reference} at {options.alpha:g} by a paired t-test; not corrected for the number of "
        "tests.",
    ]
    for value, text in ((1, "Higher is better"), (-1, "Lower is better"), (0, "Not known what is better, none marked")):
        metrics = [metric for metric, found in better.items() if found == value]
        if metrics:
            notes.append(f"{text}: {', '.join(metrics)}.")
    if FOREGROUND in options.classes:
        text = f"Class {FOREGROUND}: per case, the mean over the foreground classes that have a value."
        if any(score.undefined for score in comparison.scores if score.label == FOREGROUND):
            text += (
                " [-n]: so many values of a case and class it leaves out, because the class was not found or is not "
                "there; a method that misses a class may look better for it."
            )
        notes.append(text)
    notes += lacking_notes(comparison)
    if any(score.left_out for score in comparison.scores):
        notes.append(
            "NaN and infinite values are left out: (n of N) cases have a value. They may not be the same ones."
        )
    return notes


def lacking_notes(comparison: Comparison) -> list[str]:
    """What is left out because not all methods have it, and what to type."""
    return [
        f"{metric} is left out: {', '.join(names)} {'has' if len(names) == 1 else 'have'} none. nnunetv2_diffusion "
        "evaluate GROUND_TRUTH FOLDER --overwrite adds it."
        for metric, names in comparison.lacking.items()
    ]


def _score_cells(scores: list[Score], alpha: float, decimals: int) -> list[tuple[Score, Cell]]:
    """Cells of all methods for one class and metric."""
    printed = [number(score.mean, decimals) for score in scores]
    known = [score.mean for score in scores if score.better and not np.isnan(score.mean)]
    best = number(max(known, key=lambda mean: mean * scores[0].better), decimals) if known else None
    if len(set(printed)) == 1:  # nobody is better
        best = None
    cells = []
    for score, mean in zip(scores, printed, strict=True):
        text = MISSING if score.cases == 0 else f"{mean} ± {number(score.sd, decimals)}"
        if score.left_out and score.cases:
            text += f" ({score.cases} of {score.cases + score.left_out})"
        if score.label == FOREGROUND and score.undefined and score.cases:
            text += f" [-{score.undefined}]"
        if score.test is not None and score.test.p_t < alpha:
            text += " †"
        cells.append((score, Cell(text, best=mean == best)))
    return cells


def _all_digits(value: float) -> str:
    return "" if np.isnan(value) else repr(value)
