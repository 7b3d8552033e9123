"""Figures of the studies, as matplotlib figures by file name."""

from collections.abc import Callable
from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from nnunetv2_diffusion.analysis.studies import Findings
from nnunetv2_diffusion.analysis.tables import case_means, gains, grouped, of_mean
from nnunetv2_diffusion.drawing import heat, overlay

SHOWN = 3  # cases in the picture: the worst, the middle and the best one


def step_curves(findings: Findings) -> Figure:
    """Dice by step, a line for each case and their mean (figures 3 and 8 of the recycling paper)."""
    figure, axes = plt.subplots(figsize=(5, 3.5))
    rows = of_mean(findings.steps)
    curves = []
    for of_case in grouped(rows, "case").values():
        curves.append([np.mean([r["Dice"] for r in of_step]) for of_step in grouped(of_case, "step").values()])
        axes.plot(range(1, len(curves[-1]) + 1), curves[-1], color="0.75", linewidth=0.8)
    axes.plot(range(1, len(curves[0]) + 1), np.nanmean(curves, axis=0), color="C0", marker="o", label="mean of cases")
    axes.set(xlabel="reverse step", ylabel="Dice", xticks=range(1, len(curves[0]) + 1))
    axes.legend()
    return figure


def gain_bars(findings: Findings) -> Figure:
    """Last minus first step of each case, sorted (figures 4 and 9)."""
    figure, axes = plt.subplots(figsize=(5, 3.5))
    values = sorted(gains(findings).values())
    axes.bar(range(len(values)), values, color=["C0" if v > 0 else "C3" for v in values])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="cases, sorted", ylabel="Dice, last step - first step")
    return figure


def agreement_scatter(findings: Findings) -> Figure:
    """Agreement of samples against Dice of their mean."""
    figure, axes = plt.subplots(figsize=(4.5, 3.5))
    axes.scatter([r["pairwise_dice"] for r in findings.samples], [r["Dice"] for r in findings.samples])
    axes.set(xlabel="mean pairwise Dice of samples", ylabel="Dice with the reference")
    return figure


def count_curve(findings: Findings) -> Figure:
    """Dice against K."""
    figure, axes = plt.subplots(figsize=(4.5, 3.5))
    groups = grouped(of_mean(findings.counts), "K")
    means = [np.nanmean(case_means(rows)) for rows in groups.values()]
    axes.plot([k for (k,) in groups], means, marker="o")
    axes.set(xlabel="K, steps of a chain", ylabel="Dice, mean of cases")
    return figure


def mode_scatter(findings: Findings) -> Figure:
    """Dice against passes of each kind of mirroring and blending."""
    figure, axes = plt.subplots(figsize=(5.5, 3.5))
    for (mode,), rows in grouped(of_mean(findings.modes), "mode").items():
        passes = np.mean([r["passes_per_tile"] for r in rows])
        axes.scatter(passes, np.nanmean([r["Dice"] for r in rows]), label=mode)
    axes.set(xlabel="network passes a tile", ylabel="Dice, mean of cases")
    axes.legend(fontsize=7)
    return figure


def case_pictures(findings: Findings) -> Figure:
    """Image, reference, prediction, entropy and variance of the worst, the middle and the best case."""
    order = sorted(findings.samples, key=lambda r: (np.nan_to_num(r["Dice"]), r["case"]))
    chosen = [order[i] for i in sorted({round(i * (len(order) - 1) / max(1, SHOWN - 1)) for i in range(SHOWN)})]
    figure, grid = plt.subplots(len(chosen), 5, figsize=(11, 2.4 * len(chosen)), squeeze=False)
    for axes, row in zip(grid, chosen, strict=True):
        shown = findings.pictures[row["case"]]
        overlay(axes[0], shown["image"], np.zeros_like(shown["reference"]), row["case"])
        overlay(axes[1], shown["image"], shown["reference"], "reference")
        overlay(axes[2], shown["image"], shown["mask"], f"prediction, Dice {row['Dice']:.3f}")
        for panel, kind in zip(axes[3:], ("entropy", "variance"), strict=True):
            heat(panel, shown[kind], max(float(shown[kind].max()), 1e-3), kind)
    figure.tight_layout()
    return figure


def all_figures(findings: Findings) -> dict[str, tuple[str, Figure]]:
    """File name without ending -> (caption, figure), for every study that was made."""
    makers: dict[str, tuple[str, Callable[[Findings], Figure]]] = {
        "cases": ("Worst, middle and best case: the slice with most foreground.", case_pictures),
        "steps": ("Dice by reverse step; grey: single cases, mean over samples.", step_curves),
        "gain": ("What the steps after the first bring.", gain_bars),
        "agreement": ("Do samples disagree where the mask is wrong?", agreement_scatter),
    }
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
