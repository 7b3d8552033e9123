"""Mirrored views of a tile, and which of them each step of a chain sees."""

import itertools
from collections.abc import Sequence

import torch

TTA = ("full", "interleaved", "none")
View = tuple[int, ...]  # spatial axes that are mirrored; () is the tile as it is
Schedule = list[list[View]]  # the views of every step of a chain


def mirror_views(axes: Sequence[int] | None) -> list[View]:
    """All views that mirroring along these spatial axes gives, the plain one first."""
    axes = tuple(axes or ())
    return [c for n in range(len(axes) + 1) for c in itertools.combinations(axes, n)]


def mirror(x: torch.Tensor, view: View) -> torch.Tensor:
    """x (B, C, *spatial) as seen in a view; applied twice, x itself."""
    return torch.flip(x, [axis + 2 for axis in view]) if view else x


def interleave(views: list[View], steps: int) -> Schedule:
    """Spread the views over the steps of one chain: max(len(views), steps) passes.

    With fewer steps than views, the first steps take one view each and the last one the rest: what counts is the
    estimate from the least noisy state. With more, views take turns.
    """
    if steps >= len(views):
        return [[views[step % len(views)]] for step in range(steps)]
    return [[view] for view in views[: steps - 1]] + [views[steps - 1 :]]


def schedules(tta: str, views: list[View], steps: int) -> list[Schedule]:
    """The chains of one tile; their results are averaged.

    Args:
        tta: "full": a chain for each view. "interleaved": one chain, its steps see different views. "none".
        views: see ``mirror_views``.
        steps: K.

    Raises:
        ValueError: for another tta.
    """
    if tta == "none":
        return [[[()]] * steps]
    if tta == "full":
        return [[[view]] * steps for view in views]
    if tta == "interleaved":
        return [interleave(views, steps)]
    raise ValueError(f"tta is {tta!r}, expected one of {', '.join(TTA)}")


def count_passes(chains: list[Schedule]) -> int:
    """Network passes of one tile."""
    return sum(len(views) for chain in chains for views in chain)
