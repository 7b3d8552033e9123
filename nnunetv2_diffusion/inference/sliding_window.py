"""Tiles of a case, and how they are blended."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

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
