"""Tables of the papers from rows of numbers; means are over cases, of the mean over labels."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from nnunetv2_diffusion.analysis.cases import MEAN
from nnunetv2_diffusion.analysis.studies import Findings, Row
from nnunetv2_diffusion.evaluation.failure import failure_scores
from nnunetv2_diffusion.evaluation.tables import Table


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple, list[Row]]:
    """Rows by the values of keys, in the order of their first appearance."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def of_mean(rows: Iterable[Row]) -> list[Row]:
    """Rows of the mean over labels."""
    return [row for row in rows if row["label"] == MEAN]


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean and standard deviation over cases, NaN left out."""
    known = np.asarray([v for v in values if v is not None and not np.isnan(v)])
    return f"{known.mean():.{digits}f} +- {known.std():.{digits}f}" if len(known) else "none"


def _labels(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["label"] for row in rows))


def step_table(findings: Findings) -> Table:
    """Dice of each step, the mean over samples first, and how far samples are apart (tables 2 and 3 of recycling)."""
    labels = _labels(findings.steps)
    rows = []
    for (step,), of_step in grouped(findings.steps, "step").items():
        by_label = [case_means([r for r in of_step if r["label"] == label]) for label in labels]
        ranges = [
            max(r["Dice"] for r in of_case) - min(r["Dice"] for r in of_case)
            for of_case in grouped(of_mean(of_step), "case").values()
        ]
        rows.append([str(step), *map(spread, by_label), spread(ranges)])
    return Table(
        "Dice by reverse step", ["step", *labels, "range over samples"], rows,
        ["Mean and standard deviation over cases of the mean over samples; step 1 is the noisiest."],
    )  # fmt: skip


def case_means(rows: Iterable[Row]) -> list[float]:
    """Mean Dice over samples of each case."""
    return [float(np.mean([r["Dice"] for r in of_case])) for of_case in grouped(rows, "case").values()]


def gains(findings: Findings) -> dict[str, float]:
    """Case -> Dice of the last step minus that of the first, mean over samples and labels."""
    rows = of_mean(findings.steps)
    first, last = min(r["step"] for r in rows), max(r["step"] for r in rows)

    def at(step: int, of_case: list[Row]) -> float:
        return float(np.mean([r["Dice"] for r in of_case if r["step"] == step]))

    return {case: at(last, found) - at(first, found) for (case,), found in grouped(rows, "case").items()}


def gain_table(findings: Findings) -> Table:
    """Last minus first step."""
    values = list(gains(findings).values())
    better = sum(v > 0 for v in values)
    rows = [[spread(values), f"{min(values):.4f}", f"{max(values):.4f}", f"{better} of {len(values)}"]]
    return Table("Last step minus first, Dice", ["mean", "worst case", "best case", "cases that gain"], rows)


def cost_table(rows: Sequence[Row], key: str, title: str) -> Table:
    """Dice and cost of settings that are compared."""
    labels = _labels(rows)
    metrics = [metric for metric in ("HD95", "ECE") if any(metric in r for r in rows)]
    columns = [key, *labels, *metrics, "AURC", "passes a tile", "seconds a case"]
    overlaps = any(r.get("disagreement") is not None for r in rows)
    lines = []
    for (value,), of_setting in grouped(rows, key).items():
        cells = [spread([r["Dice"] for r in of_setting if r["label"] == label]) for label in labels]
        of_cases = of_mean(of_setting)
        cells += [spread([r[metric] for r in of_cases]) for metric in metrics]
        failure = failure_scores([r["confidence"] for r in of_cases], [r["Dice"] for r in of_cases])
        cells += [f"{failure['AURC']:.4f}"]
        cells += [f"{np.mean([r['passes_per_tile'] for r in of_cases]):.2f}"]
        cells += [f"{np.mean([r['seconds'] for r in of_cases]):.1f}"]
        if overlaps:
            cells.append(spread([r["disagreement"] for r in of_cases]))
        lines.append([str(value), *cells])
    notes = ["AURC: risk 1 - Dice, confidence soft Dice of the probabilities with their mask; lower is better."]
    if overlaps:
        columns.append("disagreement")
        notes.append("Disagreement: share of foreground voxels in overlaps of tiles that have another label there.")
    return Table(title, columns, lines, notes)


def sample_table(findings: Findings) -> Table:
    """How samples differ, and whether that tells of errors."""
    rows = findings.samples
    dice, agreement = [r["Dice"] for r in rows], [r["pairwise_dice"] for r in rows]
    failure = failure_scores(agreement, dice)
    cells = [
        spread(dice), spread([r["sample_dice"] for r in rows]), spread(agreement), f"{failure['AURC']:.4f}",
        f"{failure['ExcessAURC']:.4f}", spread([r["error_correlation"] for r in rows]),
    ]  # fmt: skip
    columns = ["Dice of the mean", "Dice of a sample", "pairwise Dice", "AURC", "excess AURC", "variance and errors"]
    notes = [
        "AURC: risk 1 - Dice, confidence pairwise Dice; lower is better. Variance and errors: correlation over voxels "
        "near the foreground."
    ]
    return Table("Samples", columns, [cells], notes)


def mask_use_table(findings: Findings) -> Table:
    """Dice with the reference when a true or a wrong mask is given."""
    groups = grouped(of_mean(findings.mask_use), "given", "level")
    levels = list(dict.fromkeys(level for _, level in groups))
    rows = [
        [given, *(spread([r["Dice"] for r in groups[given, level]]) for level in levels)]
        for given in dict.fromkeys(given for given, _ in groups)
    ]
    return Table(
        "Use of the mask, Dice", ["given mask", *(f"t = {level:g} T" for level in levels)], rows,
        ["One pass that is given this mask, noised. Equal rows: it is ignored. High for the true mask alone: copied."],
    )  # fmt: skip


def all_tables(findings: Findings) -> list[Table]:
    """Every table for which there are rows."""
    tables = [step_table(findings), gain_table(findings), sample_table(findings)]
    if findings.counts:
        tables.append(cost_table(findings.counts, "K", "Number of steps"))
    if findings.modes:
        tables.append(cost_table(findings.modes, "mode", "Mirroring and blending"))
    if findings.mask_use:
        tables.append(mask_use_table(findings))
    return tables


def rows_to_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV, all digits."""
    stream = io.StringIO()
    columns: dict[str, Any] = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(stream, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
