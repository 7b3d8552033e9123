"""Chains over the tiles of a case, and how tiles are blended."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from nnunetv2_diffusion.inference.chains import Chain, Noise, Window
from nnunetv2_diffusion.inference.views import Schedule, View, mirror

MOST_AT_ONCE = 32  # tiles; a case has hundreds of slices, and more at once are no faster


@dataclass(frozen=True)
class Tile:
    """One position of the sliding window.

    Attributes:
        index: into (C, *spatial) of the padded case, as nnU-Net makes it; a 2D network's has an integer for the slice.
        start: first voxel along the three axes, relative to the case without padding.
        size: voxels along the three axes.
    """

    index: tuple
    start: tuple[int, int, int]
    size: tuple[int, int, int]

    @property
    def planar(self) -> bool:
        """A slice for a 2D network."""
        return isinstance(self.index[1], int)


def make_tiles(slicers: Sequence[tuple], padding: Sequence[int]) -> list[Tile]:
    """nnU-Net's window positions.

    Args:
        slicers: of ``nnUNetPredictor._internal_get_sliding_window_slicers``.
        padding: voxels that were put in front of the case, along the three axes.
    """
    tiles = []
    for slicer in slicers:
        spans = [(s, s + 1) if isinstance(s, int) else (s.start, s.stop) for s in slicer[1:]]
        start = tuple(a - p for (a, _), p in zip(spans, padding, strict=True))
        tiles.append(Tile(tuple(slicer), start, tuple(b - a for a, b in spans)))
    return tiles


def tiles_at_once(batch_size: int) -> int:
    """How many tiles go through the network together: no more than a training step holds, which needs more memory.

    On a CPU, PyTorch has fast convolutions of small maps for batches alone: two tiles of a network with 8 features
    take half the time of one. It also has other convolutions for other batches, which round differently: by about 1e-6,
    and where HiDiff draws a state of 0 and 1, a few voxels fall on the other side. So the number is among the settings
    that a result names. The last group of a case may be smaller: filled up, the only slice of a 2D image would take 21
    times as long.
    """
    return min(batch_size, MOST_AT_ONCE)


def at_once(tiles: Sequence[Tile], number: int) -> list[Sequence[Tile]]:
    """Tiles in groups of ``number``, the last one may be smaller; sums over them do not depend on the order given."""
    tiles = sorted(tiles, key=lambda tile: tile.start)
    return [tiles[i : i + number] for i in range(0, len(tiles), number)]


class Blend:
    """Weighted mean of what tiles say, in float32.

    Args:
        channels: K.
        spatial: shape of the padded case.
        weight: of each voxel of a tile.
        device: of the sums.
    """

    def __init__(
        self,
        channels: int,
        spatial: Sequence[int],
        weight: torch.Tensor,
        device: torch.device,
    ):
        self.total = torch.zeros((channels, *spatial), device=device)
        self.norm = torch.zeros(tuple(spatial), device=device)
        self.weight = weight.to(device).float()

    def add(self, tile: Tile, values: torch.Tensor) -> None:
        """Add what a tile says, (1, K, *tile)."""
        self.total[tile.index] += values[0].to(self.total.device).float() * self.weight
        self.norm[tile.index[1:]] += self.weight

    def add_all(self, tiles: Sequence[Tile], values: torch.Tensor) -> None:
        """Add what several tiles say, (B, K, *tile), in their order."""
        for tile, own in zip(tiles, values.split(1), strict=True):
            self.add(tile, own)

    def mean(self) -> torch.Tensor:
        """(1, K, *spatial). The blend is used up."""
        return self.total.div_(self.norm)[None]


def _seen(x: torch.Tensor | None, view: View) -> torch.Tensor | None:
    return None if x is None else mirror(x, view)


class TileEstimator:
    """Network passes on one tile, or on several at once.

    Args:
        chain: of the network.
        image: the tiles, (B, C, *tile).
        tick: called after every pass with the number of tiles.
    """

    def __init__(self, chain: Chain, image: torch.Tensor, tick: Callable[[int], None]):
        self.chain, self.image, self.tick = chain, image, tick
        self.windows: dict[View, Window] = {}

    def _window(self, view: View) -> Window:
        if view not in self.windows:
            self.windows[view] = self.chain.look(mirror(self.image, view))
        return self.windows[view]

    def prior(self, views: Sequence[View]) -> torch.Tensor | None:
        """Mean prior over views, None if the chain has none."""
        if not self.chain.has_prior:
            return None
        return sum(mirror(self._window(view).prior, view) for view in views) / len(views)

    def __call__(
        self,
        view: View,
        state: torch.Tensor | None,
        prior: torch.Tensor | None,
        previous: torch.Tensor | None,
        step: int,
    ) -> torch.Tensor:
        """The estimate of a view, turned back."""
        given = (_seen(x, view) for x in (state, prior, previous))
        p = mirror(self.chain.estimate(self._window(view), *given, step), view)
        self.tick(len(self.image))
        return p


def run_chain(chain: Chain, estimator: TileEstimator, schedule: Schedule, noise: Noise) -> Iterator[torch.Tensor]:
    """Run one chain and yield the answer after every step, (B, K, *spatial).

    The estimate of a step, from which the chain goes on, is the mean of each view's latest estimate, so every view
    counts once; it is the answer. Where steps are draws that know nothing of each other (``Chain.independent``), the
    answer is the mean of all passes so far.

    Args:
        chain: of the network.
        estimator: of the tiles.
        schedule: views of every step.
        noise: of the tiles.
    """
    prior = estimator.prior(list(dict.fromkeys(view for step in schedule for view in step)))
    state = chain.start(prior, noise)
    latest: dict[View, torch.Tensor] = {}
    total, passes, previous = 0.0, 0, None
    for step, seen in enumerate(schedule):
        if chain.independent:
            latest.clear()
        for view in seen:
            latest[view] = estimator(view, state, prior, previous, step)
        answer = estimate = sum(latest.values()) / len(latest)
        if chain.independent:
            total, passes = total + estimate * len(seen), passes + len(seen)
            answer = total / passes
        yield chain.answer(answer)
        if step + 1 == len(schedule):
            return
        state = chain.advance(state, estimate, prior, step, noise)
        previous = estimate
