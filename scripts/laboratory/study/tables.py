"""Tables of a study."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from laboratory.study.results import CellResults, StudyResults, matching, nanmean
from nnunetv2_diffusion.evaluation.comparison import direction
from nnunetv2_diffusion.evaluation.statistics import PairedComparison, compare_pairs
from nnunetv2_diffusion.evaluation.tables import Cell, Table, mean_sd, number, p_value
from nnunetv2_diffusion.settings import flatten

LEVEL = 0.95  # of intervals
NONE = "-"
HOLM = "Holm's correction of the t-test for the number of tests in this table."


def all_tables(study: StudyResults) -> Iterator[Table]:
    """Every table that there are results for."""
    yield settings_table(study)
    yield score_table(study)
    if study.reference is not None and len(study.cells) > 1:
        for metric in ("Dice", "HD95"):
            yield test_table(study.reference, study.cells, metric)
    for table in (sample_table(study), mode_table(study)):
        if table.rows:
            yield table
    yield cost_table(study)


def settings_table(study: StudyResults) -> Table:
    """Trainer, length, network, and settings that a cell has beside the study's."""
    common = flatten(study.content.get("settings", {}))
    rows = []
    for cell in study.cells:
        record, request = cell.records[0], cell.request
        own = {k: v for k, v in flatten(request["settings"]).items() if common.get(k, NONE) != v}
        own |= {key: request[key]["cell"] for key in ("segmentor", "warm_start", "ensemble") if request.get(key)}
        epochs, iterations = (record["settings"][k] for k in ("num_epochs", "num_iterations_per_epoch"))
        network = record["network"]
        sizes = "x".join(map(str, network["patch_size"]))
        features = network["features_per_stage"]
        rows.append([
            cell.name, request["trainer"], str(len(cell.records)), f"{epochs or 1000} x {iterations or 250}",
            f"{network['class']}, {features[0]}..{features[-1]} features, patch {sizes}, batch {network['batch_size']}",
            ", ".join(f"{k}={v}" for k, v in own.items()) or NONE,
        ])  # fmt: skip
    notes = ["Epochs x iterations of each training; those of a segmentor or a warm start's source come on top."]
    shared = ", ".join(f"{k}={v}" for k, v in common.items())
    columns = ["cell", "trainer", "runs", "length", "network", "settings of its own"]
    return Table("Cells", columns, rows, [*notes, f"Settings of all cells: {shared or 'defaults'}."], left=6)


def score_table(study: StudyResults) -> Table:
    """Scores of every prediction; per case the mean over runs, then mean and standard deviation over cases."""
    found = [(cell, p["name"]) for cell in study.cells for p in cell.predictions]
    best = max((round(nanmean(cell.by_case(name, "Dice")), 4) for cell, name in found), default=0)
    rows = []
    for cell, name in found:
        dice = cell.by_case(name, "Dice")
        of_runs = nanmean(cell.values(name, "Dice"), 1)
        of_labels = [f"{nanmean(cell.by_case(name, 'Dice', label)):.4f}" for label in study.labels]
        volume = np.abs(np.stack([cell.values(name, "volume_error_rel", label) for label in study.labels]))
        spread = f"{of_runs.std(ddof=1):.4f} ({len(of_runs)})" if len(of_runs) > 1 else NONE
        mean = Cell(mean_sd(dice, 4), bool(round(nanmean(dice), 4) == best))
        hausdorff = mean_sd(cell.by_case(name, "HD95"), 2)
        rows.append([cell.name, name, mean, *of_labels, hausdorff, number(100 * nanmean(volume), 1), spread])
    columns = ["cell", "prediction", "Dice", *study.labels.values(), "HD95", "volume error, %", "sd over runs"]
    notes = [
        "Mean ± standard deviation (n - 1) over the test cases; of a case the mean over runs and foreground classes. "
        "Bold: the best mean.",
        "HD95 in mm (pixels for 2D images); (n of N): cases with a value, a mask is empty in the others. Volume error: "
        "mean of |predicted - true| / true.",
        "sd over runs: of the runs' mean Dice (number of runs). nnU-Net seeds nothing, so equal trainings differ: a "
        "difference that is smaller than this says nothing, whatever a test over cases says.",
    ]
    return Table("Scores of the test cases", columns, rows, notes, left=2)


def test_table(reference: CellResults, cells: Sequence[CellResults], metric: str) -> Table:
    """Paired tests of every prediction against the reference's, over cases."""
    compared = [
        found for cell in cells if cell.name != reference.name for found in comparisons(reference, cell, metric)
    ]
    corrected = holm([test.p_t for *_, test in compared])
    digits = 4 if metric == "Dice" else 2
    rows = []
    for (name, prediction, other, test), p in zip(compared, corrected, strict=True):
        low, high = (number(value, digits) for value in test.interval)
        pairs = f"{test.pairs} (-{test.left_out})" if test.left_out else str(test.pairs)
        won = NONE if np.isnan(test.won) else f"{100 * test.won:.0f} %"
        difference = number(test.difference, digits, sign=True)
        tests = [p_value(test.p_t), p_value(test.p_wilcoxon), p_value(p)]
        rows.append([name, prediction, other, pairs, difference, f"[{low}, {high}]", *tests, won])
    columns = ["cell", "prediction", f"{reference.name}'s", "pairs", "difference", f"{100 * LEVEL:g} % interval"]
    columns += ["p (t-test)", "p (Wilcoxon)", "p (Holm)", "won"]
    notes = [
        f"Difference: mean over cases of the cell's {metric} minus {reference.name}'s, each the mean over runs. "
        f"Interval: expanded percentile bootstrap. Tests: paired, two-sided. {HOLM}",
        "The cases are the sample: these tests say nothing about what another training of the same cell would give.",
    ]
    return Table(f"{metric} against {reference.name}", columns, rows, notes, left=3)


def comparisons(
    reference: CellResults, cell: CellResults, metric: str
) -> Iterator[tuple[str, str, str, PairedComparison]]:
    """Cell, prediction, the reference's prediction, and their paired comparison."""
    for prediction in cell.predictions:
        other = matching(reference, prediction)
        if other is not None:
            values = cell.by_case(prediction["name"], metric), reference.by_case(other, metric)
            yield cell.name, prediction["name"], other, compare_pairs(*values, direction(metric), LEVEL)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction; NaN stays and does not count."""
    corrected = list(p_values)
    known = sorted((p, index) for index, p in enumerate(p_values) if not np.isnan(p))
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[index] = largest
    return corrected


def sample_rows(cell: CellResults) -> pd.DataFrame:
    """Case by case, how samples agree and how good they are; ``spread`` is the sd of their Dice. May be empty."""
    samples, steps = cell.analysis("samples"), cell.analysis("steps")
    if samples.empty:
        return samples
    final = steps[steps["step"] == steps.groupby("run")["step"].transform("max")]
    spread = final.groupby(["run", "case"])["Dice"].std().rename("spread").reset_index()
    return samples.merge(spread, how="left", on=["run", "case"])


def sample_table(study: StudyResults) -> Table:
    """How samples differ, and what their mean gains."""
    digits = {"Dice": 4, "sample_dice": 4, "pairwise_dice": 4, "spread": 5, "error_correlation": 3}
    rows = []
    for cell in study.cells:
        found = sample_rows(cell)
        if not found.empty:
            means = found.reindex(columns=list(digits)).mean()
            rows.append([cell.name, *(number(means[key], n) for key, n in digits.items())])
    columns = ["cell", "Dice of the mean", "Dice of a sample", "pairwise Dice of samples", "sd over samples"]
    columns.append("variance and errors")
    notes = [
        "Samples of the same image with other noise: pairwise Dice 1 means that they are all alike (the chain has "
        "collapsed to one mask). sd over samples: of their Dice in a case, mean over cases. Variance and "
        "errors: their correlation over voxels near the foreground."
    ]
    return Table("Samples", columns, rows, notes)


def mode_table(study: StudyResults) -> Table:
    """Mirroring and tiles in the chain, on the same models."""
    rows = []
    for cell in study.cells:
        modes, steps = cell.analysis("modes"), cell.analysis("steps")
        first = steps[steps["step"] == 1].groupby("case")["Dice"].mean() if len(steps) else pd.Series(dtype=float)
        for mode in dict.fromkeys(modes["mode"]) if len(modes) else ():
            own = modes[modes["mode"] == mode]
            by_case, means = own.groupby("case")["Dice"].mean(), own.reindex(columns=["HD95", "ECE", "passes_per_tile"])
            both = pd.concat([by_case, first], axis=1, join="inner").to_numpy(np.float64).reshape(-1, 2)
            test = compare_pairs(both[:, 0], both[:, 1], 1, LEVEL) if len(both) else None
            gain = f"{number(100 * test.difference, 2, sign=True)} (p {p_value(test.p_t)})" if test else NONE
            further = [number(value, n) for value, n in zip(means.mean(), (2, 4, 2), strict=True)]
            rows.append([cell.name, mode, mean_sd(own["Dice"].to_numpy(), 4), *further, gain])
    notes = [
        "One chain of as many steps as in the tables above; mean ± standard deviation over cases and runs. Minus one "
        "pass: Dice points over the first step of the same model, without mirroring; p: paired t-test over cases, "
        "without correction; it says nothing about other trainings."
    ]
    columns = ["cell", "mode", "Dice", "HD95", "ECE", "passes a tile", "minus one pass"]
    return Table("Mirroring and tiles in the chain", columns, rows, notes, left=2)


def cost_table(study: StudyResults) -> Table:
    """Seconds of trainings and predictions."""
    names = list(dict.fromkeys(p["name"] for cell in study.cells for p in cell.predictions))
    cases = study.records[0]["split"]["test"]
    rows = []
    for cell in study.cells:
        trainings = [record["training"] for record in cell.records]
        epochs = [second for training in trainings for second in training["epoch_seconds"]]
        total = nanmean([sum(training["epoch_seconds"]) for training in trainings])
        memory = [t["peak_memory_bytes"] for t in trainings if t["peak_memory_bytes"] is not None]
        row = [cell.name, f"{total:.0f}", f"{np.median(epochs):.2f}" if epochs else NONE]
        own = [p["name"] for p in cell.predictions]
        for name in names:
            seconds = [cell.prediction(run, name)["seconds"] for run in range(len(cell.records))] if name in own else []
            row.append(f"{nanmean(seconds) / cases:.2f}" if seconds else NONE)
        rows.append([*row, f"{max(memory) / 2**30:.2f}" if memory else "not measured"])
    columns = ["cell", "training, s", "an epoch, s", *(f"{name}, s a case" for name in names), "peak memory, GiB"]
    jobs = sorted({record["jobs"] for record in study.records})
    notes = [
        "Training: sum over epochs, mean over runs, without start-up and nnU-Net's closing validation; an epoch: "
        "median. Seconds a case: of the whole command, its start included.",
        f"Trainings at once on the device: {', '.join(map(str, jobs))}; more than one slow each other down. Peak "
        "memory: on a GPU the most that tensors took in training, on a CPU the largest resident set of one process.",
    ]
    return Table("Cost", columns, rows, notes)
