"""The figure of a study."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from laboratory.study.results import CellResults, nanmean
from nnunetv2_diffusion.drawing import plt  # chooses a backend without a screen

COLOURS = plt.get_cmap("tab20")


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
