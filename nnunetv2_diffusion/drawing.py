"""Images under outlines of labels, and maps, with matplotlib."""

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

COLOURS = plt.get_cmap("tab10")


def overlay(axes: Axes, image: np.ndarray, labels: np.ndarray, title: str) -> None:
    """Grey image (rows, columns) under coloured outlines and fills of labels (rows, columns)."""
    low, high = np.percentile(image, [1, 99])
    axes.imshow(image, cmap="gray", vmin=low, vmax=high)
    for label in range(1, int(labels.max()) + 1):
        mask = labels == label
        colour = COLOURS((label - 1) % 10)
        axes.imshow(np.ma.masked_where(~mask, mask), cmap=matplotlib.colors.ListedColormap([colour]), alpha=0.35)
        if mask.any() and not mask.all():
            axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1)
    axes.set_title(title, fontsize=8)
    axes.axis("off")


def heat(axes: Axes, values: np.ndarray, highest: float, title: str) -> None:
    """A map (rows, columns) in colours from 0 to ``highest``, with its scale."""
    shown = axes.imshow(values, cmap="magma", vmin=0, vmax=highest)
    plt.colorbar(shown, ax=axes, fraction=0.046, pad=0.02).ax.tick_params(labelsize=6)
    axes.set_title(title, fontsize=8)
    axes.axis("off")
