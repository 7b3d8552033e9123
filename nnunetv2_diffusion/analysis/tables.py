"""Tables of the papers from rows of numbers; means are over cases, of the mean over labels. NaN is no number."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from nnunetv2_diffusion.agreement import CAUTION, mean_over_found
from nnunetv2_diffusion.analysis.cases import MEAN
from nnunetv2_diffusion.analysis.studies import Findings, Row
from nnunetv2_diffusion.evaluation.comparison import direction
from nnunetv2_diffusion.evaluation.failure import failure_scores
from nnunetv2_diffusion.evaluation.tables import MISSING, Table, known, mean_sd, number

DIGITS = {"HD95": 2}  # of other metrics three
SPREAD_NOTE = (
    "Mean ± standard deviation (n - 1) over cases; (n of N) have a value. A case without foreground has no Dice."
)


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple, list[Row]]:
    """Rows by the values of keys, in the order of their first appearance."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def of_mean(rows: Iterable[Row]) -> list[Row]:
    """Rows of the mean over labels."""
    return [row for row in rows if row["label"] == MEAN]


def mean_of(values: Iterable[float | None]) -> float:
    """Mean of the values that are numbers; NaN if none is."""
    return mean_over_found(list(values))


def with_unit(metric: str, unit: str) -> str:
    """Name of a metric with its unit, if it has one."""
    return f"{metric} ({unit})" if metric == "HD95" else metric


def step_metrics(findings: Findings) -> list[str]:
    """Dice, and HD95 if it was measured."""
    return [m for m in ("Dice", "HD95") if m == "Dice" or len(known(r.get(m) for r in findings.steps))]


def _labels(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["label"] for row in rows))


def step_table(findings: Findings, metric: str = "Dice") -> Table:
    """A metric at each step, the mean over samples first, and how far samples are apart (recycling's table 3)."""
    labels, digits = _labels(findings.steps), DIGITS.get(metric, 3)
    rows = []
    for (step,), of_step in grouped(findings.steps, "step").items():
        by_label = [case_means([r for r in of_step if r["label"] == label], metric) for label in labels]
        by_case = [known(r.get(metric) for r in rows) for rows in grouped(of_mean(of_step), "case").values()]
        ranges = [np.ptp(values) if len(values) else np.nan for values in by_case]
        rows.append([str(step), *(mean_sd(means, digits) for means in by_label), mean_sd(ranges, digits + 1)])
    return Table(
        f"{with_unit(metric, findings.unit)} by reverse step", ["step", *labels, "range over samples"], rows,
        [f"{SPREAD_NOTE} Of a case, the mean over samples; step 1 is the noisiest."],
    )  # fmt: skip


def case_means(rows: Iterable[Row], metric: str = "Dice") -> list[float]:
    """Mean of a metric over samples of each case; NaN for a case without a value."""
    return [mean_of(r.get(metric) for r in of_case) for of_case in grouped(rows, "case").values()]


def gains(findings: Findings, metric: str = "Dice") -> dict[str, float]:
    """Case -> a metric at the last step minus that at the first, mean over samples and labels; NaN where undefined."""
    rows = of_mean(findings.steps)
    first, last = min(r["step"] for r in rows), max(r["step"] for r in rows)

    def at(step: int, of_case: list[Row]) -> float:
        return mean_of(r.get(metric) for r in of_case if r["step"] == step)

    return {case: at(last, found) - at(first, found) for (case,), found in grouped(rows, "case").items()}


def gain_table(findings: Findings) -> Table:
    """Last minus first step (as figures 3 and 8 of the recycling paper), a row for each metric."""
    rows = []
    for metric in step_metrics(findings):
        better, digits = direction(metric), DIGITS.get(metric, 3) + 1
        found = gains(findings, metric)
        ordered = sorted((better * v, case) for case, v in found.items() if np.isfinite(v))
        ends = [f"{number(better * v, digits, sign=True)} ({case})" for v, case in (*ordered[:1], *ordered[-1:])]
        gaining = f"{sum(v > 0 for v, _ in ordered)} of {len(ordered)}"
        rows.append(
            [with_unit(metric, findings.unit), mean_sd(list(found.values()), digits), *(ends or [MISSING] * 2), gaining]
        )
    columns = ["last step minus first", "mean", "worst case", "best case", "cases that gain"]
    notes = ["More Dice and less HD95 are a gain. Cases without a value count in neither column."]
    return Table("What the steps after the first bring", columns, rows, notes)


def cost_table(rows: Sequence[Row], key: str, title: str, unit: str = "mm") -> Table:
    """Quality and cost of settings that are compared (recycling's table 2 for numbers of steps)."""
    labels = _labels(rows)
    metrics = [metric for metric in ("HD95", "ECE") if any(metric in r for r in rows)]
    columns = [key, *(f"Dice, {label}" for label in labels), *(with_unit(m, unit) for m in metrics)]
    columns += ["AURC", "passes a tile", "seconds a case"]
    lines = []
    for (value,), of_setting in grouped(rows, key).items():
        cells = [mean_sd([r["Dice"] for r in of_setting if r["label"] == label]) for label in labels]
        of_cases = of_mean(of_setting)
        cells += [mean_sd([r.get(metric) for r in of_cases], DIGITS.get(metric, 3)) for metric in metrics]
        failure = failure_scores([r["soft_dice"] for r in of_cases], [r["Dice"] for r in of_cases])
        cells += [number(failure["AURC"], 3)]
        cells += [number(mean_of(r["passes_per_tile"] for r in of_cases), 2)]
        cells += [number(mean_of(r["seconds"] for r in of_cases), 1)]
        lines.append([str(value), *cells])
    notes = [
        SPREAD_NOTE,
        "AURC: risk 1 - Dice, cases ranked by the soft Dice of the probabilities with their mask; lower is better.",
    ]
    return Table(title, columns, lines, notes)


def sample_table(findings: Findings) -> Table:
    """How samples differ, and whether that tells of errors."""
    rows = findings.samples
    dice, agreement = [r["Dice"] for r in rows], [r["pairwise_dice"] for r in rows]
    failure = failure_scores(agreement, dice)
    cells = [
        mean_sd(dice), mean_sd([r["sample_dice"] for r in rows]), mean_sd(agreement, 4), number(failure["AURC"], 3),
        number(failure["ExcessAURC"], 3), mean_sd([r["error_correlation"] for r in rows]),
    ]  # fmt: skip
    columns = ["Dice of the mean", "Dice of a sample", "agreement", "AURC", "excess AURC", "variance and errors"]
    notes = [
        f"{SPREAD_NOTE} Agreement: mean pairwise Dice of the samples, over the labels that were found. {CAUTION}",
        "AURC: risk 1 - Dice, cases ranked by agreement; lower is better. Variance and errors: correlation over voxels "
        "near the foreground.",
    ]
    if failure["left_out"]:
        notes.append(
            f"AURC leaves out {failure['left_out']} of {len(rows)} cases, in which nothing was found or is there."
        )
    return Table("Samples", columns, [cells], notes)


def all_tables(findings: Findings) -> list[Table]:
    """Every table for which there are rows."""
    tables = []
    if findings.steps:
        tables += [step_table(findings, metric) for metric in step_metrics(findings)]
        tables.append(gain_table(findings))
    if findings.samples:
        tables.append(sample_table(findings))
    if findings.counts:
        tables.append(cost_table(findings.counts, "K", "Number of steps", findings.unit))
    if findings.modes:
        tables.append(cost_table(findings.modes, "mode", "Mirroring", findings.unit))
    return tables


def summary(findings: Findings, tta: str = "") -> list[str]:
    """What was found, in sentences; tta: mirroring of the studies, told if there was none."""
    dice = [r["Dice"] for r in findings.samples]
    sentences = [f"{len(dice)} cases, Dice {mean_sd(dice)}{' (mirroring: none)' if tta == 'none' else ''}."]
    if findings.steps and len(grouped(findings.steps, "step")) > 1:
        for metric in step_metrics(findings):
            found, better, digits = known(gains(findings, metric).values()), direction(metric), DIGITS.get(metric, 3)
            gaining = int((better * found > 0).sum())
            sentences.append(
                f"The steps after the first change {metric} by {number(mean_of(found), digits + 1)}"
                f"{f' {findings.unit}' if metric == 'HD95' else ''} in the mean; {gaining} of {len(found)} cases gain."
            )
    agreement = mean_of(r["pairwise_dice"] for r in findings.samples)
    if np.isfinite(agreement):
        sentences.append(f"Agreement of samples {agreement:.4f}. {CAUTION}")
    return sentences


def rows_to_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV, all digits; what is undefined is nan."""
    return pd.DataFrame(rows, dtype=object).to_csv(index=False, na_rep="nan", lineterminator="\n")
