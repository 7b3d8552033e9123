"""Figures of the studies, as matplotlib figures by file name."""

from collections.abc import Callable
from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from nnunetv2_diffusion.analysis.studies import Findings, Row
from nnunetv2_diffusion.analysis.tables import case_means, gains, grouped, mean_of, of_mean, step_metrics, with_unit
from nnunetv2_diffusion.drawing import COLOURS, heat, overlay
from nnunetv2_diffusion.evaluation.comparison import direction

SHOWN = 3  # cases in the picture: the worst, the middle and the best one
NAMED = 12  # cases whose names fit on an axis


def panels(metrics: list[str], width: float = 4.5) -> tuple[Figure, list[Axes]]:
    """A figure with one panel for each metric, side by side."""
    figure, grid = plt.subplots(1, len(metrics), figsize=(width * len(metrics), 3.5), squeeze=False)
    return figure, list(grid[0])


def measured(rows: list[Row]) -> list[str]:
    """Dice, and HD95 if it was measured."""
    return [m for m in ("Dice", "HD95") if m == "Dice" or np.isfinite(mean_of(r.get(m) for r in rows))]


def step_curves(findings: Findings) -> Figure:
    """Dice and HD95 by step, a line for each case and their mean (figures 4 and 9 of the recycling paper)."""
    rows, metrics = of_mean(findings.steps), step_metrics(findings)
    figure, grid = panels(metrics)
    for axes, metric in zip(grid, metrics, strict=True):
        by_case = grouped(rows, "case").values()
        curves = np.array([
            [mean_of(r.get(metric) for r in of_step) for of_step in grouped(of_case, "step").values()]
            for of_case in by_case
        ])  # fmt: skip
        steps = range(1, curves.shape[1] + 1)
        for curve in curves:
            axes.plot(steps, curve, color="0.75", linewidth=0.8)
        axes.plot(steps, [mean_of(column) for column in curves.T], color="C0", marker="o", label="mean of cases")
        axes.set(xlabel="reverse step", ylabel=with_unit(metric, findings.unit))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    return figure


def gain_bars(findings: Findings) -> Figure:
    """Last minus first step of each case, sorted, in Dice and HD95 (figures 3 and 8)."""
    metrics = step_metrics(findings)
    figure, grid = panels(metrics)
    for axes, metric in zip(grid, metrics, strict=True):
        found = sorted((v, case) for case, v in gains(findings, metric).items() if np.isfinite(v))
        better = direction(metric)
        places = range(1, len(found) + 1)
        axes.bar(places, [v for v, _ in found], color=["C0" if better * v > 0 else "C3" for v, _ in found])
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(ylabel=f"{with_unit(metric, findings.unit)}: last step - first step")
        if len(found) <= NAMED:
            axes.set_xticks(places, [case for _, case in found], rotation=45, ha="right", fontsize=7)
        else:
            axes.set_xlabel("cases, sorted")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def agreement_scatter(findings: Findings) -> Figure:
    """Agreement of samples against Dice of their mean."""
    figure, (axes,) = panels(["Dice"])
    agreement = np.array([r["pairwise_dice"] for r in findings.samples], np.float64)
    axes.scatter(agreement, [r["Dice"] for r in findings.samples])
    known = agreement[np.isfinite(agreement)]
    lowest = min(known.min(), 0.9) if len(known) else 0.9  # what is nearly alike shall look so
    axes.set(xlabel="agreement: mean pairwise Dice of samples", ylabel="Dice with the reference")
    axes.set_xlim(lowest - 0.02, 1.005)
    return figure


def count_curve(findings: Findings) -> Figure:
    """Dice and HD95 against K (table 2)."""
    metrics = measured(findings.counts)
    figure, grid = panels(metrics)
    groups = grouped(of_mean(findings.counts), "K")
    for axes, metric in zip(grid, metrics, strict=True):
        axes.plot([k for (k,) in groups], [mean_of(case_means(rows, metric)) for rows in groups.values()], marker="o")
        axes.set(xlabel="K, steps of a chain", ylabel=f"{with_unit(metric, findings.unit)}, mean of cases")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def mode_scatter(findings: Findings) -> Figure:
    """Dice and HD95 against passes of each kind of mirroring and blending."""
    metrics = measured(findings.modes)
    figure, grid = panels(metrics, width=5)
    for axes, metric in zip(grid, metrics, strict=True):
        for (mode,), rows in grouped(of_mean(findings.modes), "mode").items():
            passes = mean_of(r["passes_per_tile"] for r in rows)
            axes.scatter(passes, mean_of(r.get(metric) for r in rows), label=mode)
        axes.set(xlabel="network passes a tile", ylabel=f"{with_unit(metric, findings.unit)}, mean of cases")
    grid[0].legend(fontsize=7)
    return figure


def shown_cases(findings: Findings) -> list[Row]:
    """The worst, the middle and the best case by Dice; those without a Dice only if there are no others."""
    defined = [r for r in findings.samples if np.isfinite(r["Dice"])]
    order = sorted(defined or findings.samples, key=lambda r: (np.nan_to_num(r["Dice"]), r["case"]))
    return [order[i] for i in sorted({round(i * (len(order) - 1) / max(1, SHOWN - 1)) for i in range(SHOWN)})]


def case_pictures(findings: Findings) -> Figure:
    """Image, reference, prediction, entropy and variance of the worst, the middle and the best case."""
    chosen, kinds = shown_cases(findings), ("entropy", "variance")
    highest = {  # one scale for all rows, so that they can be compared
        kind: max(1e-3, *(float(findings.pictures[row["case"]][kind].max()) for row in chosen)) for kind in kinds
    }
    figure, grid = plt.subplots(len(chosen), 5, figsize=(13, 2.8 * len(chosen)), squeeze=False)
    for axes, row in zip(grid, chosen, strict=True):
        shown = findings.pictures[row["case"]]
        place = f"{row['case']}, slice {int(shown['slice']) + 1} of {int(shown['slices'])}"
        overlay(axes[0], shown["image"], np.zeros_like(shown["reference"]), place)
        overlay(axes[1], shown["image"], shown["reference"], "reference")
        dice = f"Dice {row['Dice']:.3f}" if np.isfinite(row["Dice"]) else "no Dice: no foreground"
        overlay(axes[2], shown["image"], shown["mask"], f"prediction, {dice}")
        for panel, kind in zip(axes[3:], kinds, strict=True):
            heat(panel, shown[kind], highest[kind], kind)
    patches = [Patch(color=COLOURS((value - 1) % 10), label=name) for value, name in findings.names.items()]
    if patches:
        figure.legend(handles=patches, loc="lower center", ncols=min(6, len(patches)), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.35 / figure.get_figheight() * (1 + (len(patches) - 1) // 6), 1, 1))
    return figure


def all_figures(findings: Findings) -> dict[str, tuple[str, Figure]]:
    """File name without ending -> (caption, figure), for every study that was made."""
    makers: dict[str, tuple[str, Callable[[Findings], Figure]]] = {}
    if findings.samples:
        makers["cases"] = (
            "Worst, middle and best case by Dice: the slice with most foreground. Maps share their scales.",
            case_pictures,
        )
    if findings.steps:
        makers["steps"] = ("By reverse step; grey: single cases, mean over samples.", step_curves)
        makers["gain"] = (
            "What the steps after the first bring; blue: a gain. Cases without a value are left out.",
            gain_bars,
        )
    if findings.samples:
        makers["agreement"] = (
            "Agreement of samples and Dice of their mean: agreement is no confidence.",
            agreement_scatter,
        )
    if findings.counts:
        makers["counts"] = ("How many steps?", count_curve)
    if findings.modes:
        makers["modes"] = ("Mirroring and blending: quality against cost.", mode_scatter)
    figures = {}
    for name, (caption, make) in makers.items():
        figure = make(findings)
        if name != "cases":
            figure.tight_layout()
        figures[name] = (caption, figure)
    return figures


def to_png(figure: Figure) -> bytes:
    """PNG of a figure, which is closed."""
    stream = BytesIO()
    figure.savefig(stream, dpi=130, format="png")
    plt.close(figure)
    return stream.getvalue()
