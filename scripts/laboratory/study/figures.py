"""Figures of a study, as matplotlib figures by name."""

from collections.abc import Iterator
from inspect import signature
from io import BytesIO

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from laboratory.study.results import CellResults, StudyResults, matching, nanmean
from nnunetv2_diffusion.drawing import plt  # chooses a backend without a screen

CURVES = "nnU-Net's pseudo Dice on validation patches by epoch, mean over runs."
COLOURS = plt.get_cmap("tab20")


def all_figures(study: StudyResults) -> Iterator[tuple[str, str, Figure]]:
    """Name, caption and figure of all that there are results for, without those of the questions."""
    yield "dice", "Dice of the test cases, mean over runs and foreground classes.", dice_boxes(study)
    yield "curves", CURVES, training_curves(study.cells)


def to_png(figure: Figure) -> bytes:
    """The file's content, the same for the same figure and matplotlib; the figure is closed."""
    stream = BytesIO()
    figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return stream.getvalue()


def dice_boxes(study: StudyResults) -> Figure:
    """Dice over cases of every prediction."""
    found = [(cell, p["name"]) for cell in study.cells for p in cell.predictions]
    values = [cell.by_case(name, "Dice") for cell, name in found]
    labels = [f"{cell.name}, {name}" for cell, name in found]
    return _boxes(values, labels, "Dice")


def question_boxes(first: CellResults, others: list[CellResults]) -> Figure:
    """Dice over cases minus that of the first cell, prediction by prediction."""
    values, labels = [], []
    for cell in others:
        for prediction in cell.predictions:
            other = matching(first, prediction)
            if other is not None:
                values.append(cell.by_case(prediction["name"], "Dice") - first.by_case(other, "Dice"))
                labels.append(f"{cell.name}, {prediction['name']}")
    figure = _boxes(values, labels, f"Dice - {first.name}'s, case by case")
    figure.axes[0].axvline(0, color="black", linewidth=0.8)
    return figure


def training_curves(cells: list[CellResults]) -> Figure:
    """Pseudo Dice by epoch; an ensemble has no curve."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for index, cell in enumerate(c for c in cells if all(r["training"]["curve"] for r in c.records)):
        runs = [[np.nan if v is None else v for v in r["training"]["curve"]["mean_fg_dice"]] for r in cell.records]
        curve = nanmean([run[: min(map(len, runs))] for run in runs], 0)
        marker = "o" if len(curve) <= 20 else None
        axes.plot(range(1, len(curve) + 1), curve, marker=marker, markersize=3, color=COLOURS(index), label=cell.name)
    axes.set(xlabel="epoch", ylabel="pseudo Dice")
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure


def _boxes(values: list[np.ndarray], labels: list[str], x: str) -> Figure:
    """Horizontal boxes, the first on top."""
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.26 * len(values)))
    places = range(len(values), 0, -1)
    # matplotlib 3.10 renamed the option
    horizontal = (
        {"orientation": "horizontal"} if "orientation" in signature(axes.boxplot).parameters else {"vert": False}
    )
    known = [v[np.isfinite(v)] for v in values]
    axes.boxplot(known, positions=list(places), widths=0.6, showmeans=True, **horizontal)
    axes.set_yticks(list(places), labels, fontsize=7)
    axes.set_xlabel(x)
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    return figure
