"""Tables of what ``analyse`` compares on the same model: mirroring, tiles, and masks that are given."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy import stats

from laboratory.study.results import MEAN, CellResults, StudyResults, nanmean
from laboratory.study.tables_common import LEVEL, NONE, as_float, mean_sd, number, p_value, rows_of
from nnunetv2_diffusion.evaluation.failure import failure_scores
from nnunetv2_diffusion.evaluation.statistics import compare_pairs
from nnunetv2_diffusion.evaluation.tables import Table

Rows = list[dict[str, Any]]
METRICS = {"HD95": 2, "ECE": 4}  # digits
SIMILAR = 1.3  # passes a tile that count as equal: those of removed trials are a few more or less than nnU-Net's


def of_mean(tables: Iterable[dict[str, list]]) -> list[Rows]:
    """Rows of the mean over classes or regions, for each run."""
    return [[row for row in rows_of(columns) if row["label"] == MEAN] for columns in tables]


def by_case(runs: list[Rows], metric: str = "Dice") -> dict[str, float]:
    """Case -> mean over runs and, if there are any, samples."""
    rows = [row for run in runs for row in run]
    cases = sorted({row["case"] for row in rows})
    return {case: nanmean([as_float(row.get(metric)) for row in rows if row["case"] == case]) for case in cases}


def mode_runs(cell: CellResults) -> dict[str, list[Rows]]:
    """Mode -> rows of its cases, for each run that has it."""
    runs = of_mean(cell.analysis("modes"))
    modes = dict.fromkeys(row["mode"] for run in runs for row in run)
    picked = {mode: [[row for row in run if row["mode"] == mode] for run in runs] for mode in modes}
    return {mode: [run for run in found if run] for mode, found in picked.items()}


def first_step(cell: CellResults) -> dict[str, float]:
    """Case -> Dice of one pass without mirroring: the first step of a chain, mean over its samples and runs."""
    runs = of_mean(cell.analysis("steps"))
    return by_case([[row for row in run if row["step"] == 1] for run in runs])


def run_means(runs: list[Rows]) -> np.ndarray:
    """Mean Dice of each training."""
    return np.array([nanmean(list(by_case([run]).values())) for run in runs])


def welch(runs: list[Rows], others: list[Rows]) -> float:
    """p-value of Welch's t-test between trainings; NaN for one training, or for trainings that are all alike."""
    a, b = run_means(runs), run_means(others)
    if min(len(a), len(b)) < 2 or not a.std() + b.std() > 0:
        return float("nan")
    return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


def passes(runs: list[Rows]) -> float:
    """Of the network, a tile."""
    return nanmean([as_float(row["passes_per_tile"]) for run in runs for row in run])


def mode_aurc(runs: list[Rows]) -> float:
    """Area under the risk-coverage curve, mean over runs; NaN if the soft Dice was not measured."""
    found = []
    for run in runs:
        # version 0.1 called it confidence
        soft_dice = [as_float(row.get("soft_dice", row.get("confidence"))) for row in run]
        found.append(failure_scores(soft_dice, [as_float(row["Dice"]) for row in run])["AURC"])
    return nanmean(found)


def equal_passes(reference: CellResults, needed: float) -> list[Rows] | None:
    """The reference's best mode of about so many passes; None if it has none."""
    alike = [runs for runs in mode_runs(reference).values() if 1 / SIMILAR <= passes(runs) / needed <= SIMILAR]
    return max(alike, key=lambda runs: nanmean(list(by_case(runs).values())), default=None)


def difference(values: dict[str, float], others: dict[str, float]) -> str:
    """Mean difference over the cases that both have, in Dice points, and the p-value of the paired t-test."""
    cases = sorted(set(values) & set(others))
    if not cases:
        return NONE
    test = compare_pairs(np.array([values[c] for c in cases]), np.array([others[c] for c in cases]), 1, LEVEL)
    return f"{number(100 * test.difference, 2, sign=True)} (p {p_value(test.p_t)})"


def passes_apart(modes: dict[str, list[Rows]], mode: str) -> list[Rows] | None:
    """The same model's passes of about the same number that are told nothing of each other; None if not measured."""
    own = passes(modes[mode])
    names = [name for name in (f"{mode}-apart", "one-step") if name in modes and name != mode]
    alike = [modes[name] for name in names if 1 / SIMILAR <= passes(modes[name]) / own <= SIMILAR]
    return alike[0] if alike and not mode.endswith("-apart") else None


def by_run(runs: list[Rows]) -> str:
    """Mean Dice of each training, if there are several."""
    return " / ".join(number(mean, 3) for mean in run_means(runs)) if len(runs) > 1 else NONE


def mode_table(study: StudyResults) -> Table:
    """Mirroring and tiles in the chain."""
    reference, rows = study.reference, []
    for cell in study.cells:
        start, modes = first_step(cell), mode_runs(cell)
        for mode, runs in modes.items():
            dice, needed = by_case(runs), passes(runs)
            other = equal_passes(reference, needed) if reference is not None and cell is not reference else None
            apart = passes_apart(modes, mode)
            values = np.array([as_float(row["Dice"]) for run in runs for row in run])
            further = [number(nanmean(list(by_case(runs, metric).values())), n) for metric, n in METRICS.items()]
            rows.append([
                cell.name, mode, mean_sd(values, 4), by_run(runs), *further, number(mode_aurc(runs), 4),
                number(needed, 2), difference(dice, start), NONE if apart is None else difference(dice, by_case(apart)),
                NONE if other is None else difference(dice, by_case(other)),
                NONE if other is None else p_value(welch(runs, other)),
            ])  # fmt: skip
    name = reference.name if reference is not None else "the reference"
    compared = ["minus one pass", "minus passes apart", f"minus {name}", "p of trainings"]
    columns = ["cell", "mode", "Dice", "trainings", *METRICS, "AURC", "passes a tile", *compared]
    notes = [
        "One chain of as many steps as in the tables above; mean ± standard deviation over cases and runs. AURC: risk "
        "1 - Dice, cases ranked by the soft Dice of the probabilities with their mask. Trainings: mean Dice of each.",
        "Minus one pass: Dice points over the first step of the same model, without mirroring. "
        "Minus passes apart: over as many passes of the same model that are told nothing of each other (one from noise "
        "for every mirrored view, or the mode of that name), so what is left is what the chain brings. "
        f"Minus {name}: over its best mode of about as many passes (within a factor of {SIMILAR:g}). p: paired t-test "
        "over cases, without correction; it says nothing about other trainings. P of trainings: Welch's t-test between "
        f"the means of trainings, with those of {name} in that mode.",
    ]
    return Table("Mirroring and tiles in the chain", columns, rows, notes, left=2)


def mask_use_table(study: StudyResults) -> Table:
    """Dice of one pass that is given a true or a wrong mask."""
    cells = {cell.name: [row for run in of_mean(cell.analysis("mask_use")) for row in run] for cell in study.cells}
    given = list(dict.fromkeys(row["given"] for found in cells.values() for row in found))
    rows = []
    for name, found in cells.items():
        for level in sorted({row["level"] for row in found}):
            own = [row for row in found if row["level"] == level]
            dice = [nanmean([as_float(r["Dice"]) for r in own if r["given"] == kind]) for kind in given]
            rows.append([name, f"{level:g} T", *(number(value, 4) for value in dice)])
    notes = ["Equal columns: the mask is ignored. High for the true mask alone: it is copied."]
    return Table("Use of a mask that is given", ["cell", "noise, t", *given], rows, notes, left=2)
