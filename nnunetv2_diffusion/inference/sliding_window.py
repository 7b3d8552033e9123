"""Chains over the tiles of a case: one chain a tile, or one chain of the whole volume."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from nnunetv2_diffusion.inference.chains import Chain, Noise, Window
from nnunetv2_diffusion.inference.views import Schedule, View, mirror

COMBINATIONS = ("views", "last", "mean")
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


class OverlapMeter:
    """How often tiles disagree on a label where they overlap; counts start again with every blend.

    Args:
        sigmoid: heads are regions.
    """

    def __init__(self, sigmoid: bool):
        self.sigmoid = sigmoid
        self.compared = self.differing = 0

    def start(self, spatial: Sequence[int]) -> None:
        """Forget what was counted."""
        self.labels = torch.full(tuple(spatial), -1, dtype=torch.int16)
        self.compared = self.differing = 0

    def add(self, tile: Tile, values: torch.Tensor) -> None:
        """Compare a tile (K, *tile) with those before it, where either sees foreground."""
        labels = hard_labels(values[None], self.sigmoid)[0].cpu()
        before = self.labels[tile.index[1:]]
        counts = (before >= 0) & ((before > 0) | (labels > 0))
        self.compared += int(counts.sum())
        self.differing += int((counts & (before != labels)).sum())
        self.labels[tile.index[1:]] = labels

    @property
    def disagreement(self) -> float | None:
        """Share of the compared voxels that differ; None if nothing overlaps."""
        return self.differing / self.compared if self.compared else None


class Blend:
    """Weighted mean of what tiles say, in float32.

    Args:
        channels: K.
        spatial: shape of the padded case.
        weight: of each voxel of a tile.
        device: of the sums.
        meter: is shown every tile.
    """

    def __init__(
        self,
        channels: int,
        spatial: Sequence[int],
        weight: torch.Tensor,
        device: torch.device,
        meter: OverlapMeter | None = None,
    ):
        self.meter = meter
        if meter is not None:
            meter.start(spatial)
        self.total = torch.zeros((channels, *spatial), device=device)
        self.norm = torch.zeros(tuple(spatial), device=device)
        self.weight = weight.to(device).float()

    def add(self, tile: Tile, values: torch.Tensor) -> None:
        """Add what a tile says, (1, K, *tile)."""
        self.total[tile.index] += values[0].to(self.total.device).float() * self.weight
        self.norm[tile.index[1:]] += self.weight
        if self.meter is not None:
            self.meter.add(tile, values[0])

    def add_all(self, tiles: Sequence[Tile], values: torch.Tensor) -> None:
        """Add what several tiles say, (B, K, *tile), in their order."""
        for tile, own in zip(tiles, values.split(1), strict=True):
            self.add(tile, own)

    def mean(self) -> torch.Tensor:
        """(1, K, *spatial). The blend is used up."""
        return self.total.div_(self.norm)[None]


class Estimator(Protocol):
    """What a chain asks of the network, for one tile or for a volume."""

    def prior(self, views: Sequence[View]) -> torch.Tensor | None:
        """Mean prior over views, None if the chain has none."""

    def __call__(
        self,
        view: View,
        state: torch.Tensor | None,
        prior: torch.Tensor | None,
        previous: torch.Tensor | None,
        step: int,
    ) -> torch.Tensor:
        """The estimate of a view, turned back."""


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
        """See ``Estimator``."""
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
        """See ``Estimator``."""
        given = (_seen(x, view) for x in (state, prior, previous))
        p = mirror(self.chain.estimate(self._window(view), *given, step), view)
        self.tick(len(self.image))
        return p


class VolumeEstimator:
    """Network passes on all tiles, blended: a state of the whole volume is the same for all of them.

    Args:
        chain: of the network.
        data: padded case, (C, *spatial).
        tiles: see ``make_tiles``.
        blend: makes an empty ``Blend``.
        device: of the network.
        tick: called after every pass with the number of tiles.
        number: of tiles that go through the network together.
    """

    def __init__(
        self,
        chain: Chain,
        data: torch.Tensor,
        tiles: Sequence[Tile],
        blend: Callable[[], Blend],
        device: torch.device,
        tick: Callable[[int], None],
        number: int = 1,
    ):
        self.chain, self.data, self.tiles = chain, data, tiles
        self.blend, self.device, self.tick, self.number = blend, device, tick, number

    def _tiles(self, x: torch.Tensor | None, tiles: Sequence[Tile]) -> torch.Tensor | None:
        return None if x is None else torch.stack([x[0][tile.index] for tile in tiles]).to(self.device)

    def prior(self, views: Sequence[View]) -> torch.Tensor | None:
        """See ``Estimator``."""
        if not self.chain.has_prior:
            return None
        blend = self.blend()
        for tiles in at_once(self.tiles, self.number):
            estimator = TileEstimator(self.chain, self._tiles(self.data[None], tiles), lambda passes: None)
            blend.add_all(tiles, estimator.prior(views))
        return blend.mean()

    def __call__(
        self,
        view: View,
        state: torch.Tensor | None,
        prior: torch.Tensor | None,
        previous: torch.Tensor | None,
        step: int,
    ) -> torch.Tensor:
        """See ``Estimator``."""
        blend = self.blend()
        for tiles in at_once(self.tiles, self.number):
            estimator = TileEstimator(self.chain, self._tiles(self.data[None], tiles), self.tick)
            blend.add_all(tiles, estimator(view, *(self._tiles(x, tiles) for x in (state, prior, previous)), step))
        return blend.mean()


def hard_labels(p: torch.Tensor, sigmoid: bool) -> torch.Tensor:
    """Label map (1, *spatial), int16, of probabilities (1, K, *spatial); for regions a number for each combination."""
    if not sigmoid:
        return p.argmax(1).to(torch.int16)
    bits = 2 ** (torch.arange(p.shape[1], device=p.device) % 15)
    return ((p > 0.5) * bits.reshape(1, -1, *[1] * (p.ndim - 2))).sum(1).to(torch.int16)


def same_labels(a: torch.Tensor, b: torch.Tensor, sigmoid: bool) -> bool:
    """Whether two masks (1, K, *spatial) of probabilities have the same label map."""
    if sigmoid:
        return torch.equal(a > 0.5, b > 0.5)
    return torch.equal(a.argmax(1), b.argmax(1))


def run_chain(
    chain: Chain,
    estimator: Estimator,
    schedule: Schedule,
    noise: Noise,
    exit_if: Callable | None = None,
    combine: str = "views",
) -> Iterator[torch.Tensor]:
    """Run one chain and yield the answer after every step, (B, K, *spatial).

    Args:
        chain: of the network.
        estimator: of a tile or of the volume.
        schedule: views of every step.
        noise: of the tile or the volume.
        exit_if: called with the last two estimates; the chain ends if it returns True.
        combine: "views": the estimate of a step, from which the chain goes on, is the mean of each view's latest
            estimate, so every view counts once; it is the answer. "last": it is the mean of the step's own views
            alone. "mean": so it is, but the answer is the mean over all passes so far; of independent draws
            "views" is that as well.
    """
    if chain.independent and combine == "views":
        combine = "mean"
    views = list(dict.fromkeys(view for step in schedule for view in step))
    prior = estimator.prior(views)
    state = chain.start(prior, noise)
    latest: dict[View, torch.Tensor] = {}
    total, passes, previous = 0.0, 0, None
    for step, seen in enumerate(schedule):
        if combine != "views":
            latest.clear()
        for view in seen:
            latest[view] = estimator(view, state, prior, previous, step)
        answer = estimate = sum(latest.values()) / len(latest)
        if combine == "mean":
            total, passes = total + estimate * len(seen), passes + len(seen)
            answer = total / passes
        yield chain.answer(answer)
        if step + 1 == len(schedule) or (exit_if and previous is not None and exit_if(previous, estimate)):
            return
        state = chain.advance(state, estimate, prior, step, noise)
        previous = estimate
