"""Where the noise of a chain comes from: the content of a tile, or its position in the case."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from nnunetv2_diffusion.diffusion import ContentNoise, PositionNoise


class Noise(Protocol):
    """Noise of one sample of a batch of tiles; a chain asks for it before step 0 and after each step that needs it."""

    def normal(self, step: int) -> torch.Tensor:
        """Standard normal noise before a step, (B, C_mask, *spatial)."""

    def uniform(self, step: int) -> torch.Tensor:
        """Uniform noise in [0, 1) before a step, (B, C_mask, *spatial)."""

    def code(self, step: int) -> torch.Tensor:
        """Standard normal numbers, the same in every voxel, (B, C_mask, *spatial)."""


class NoiseByContent:
    """Noise that follows from a tile's own voxels: nnU-Net's predictor tells the network nothing else.

    The steps are to be asked for in their order.

    Args:
        hashes: of the tiles' contents, see ``content_hash``.
        seed: the user's.
        sample: index of the sample.
        shape: of one state, (C_mask, *spatial).
        device: where noise is made.
    """

    def __init__(self, hashes: Sequence[int], seed: int, sample: int, shape: Sequence[int], device: torch.device):
        self.streams, self.shape = ContentNoise(hashes, seed, sample, device), tuple(shape)

    def normal(self, step: int) -> torch.Tensor:
        """See ``Noise``."""
        return self.streams(self.shape)

    def uniform(self, step: int) -> torch.Tensor:
        """See ``Noise``."""
        return self.streams.uniform(self.shape)

    def code(self, step: int) -> torch.Tensor:
        """See ``Noise``."""
        numbers = self.streams(self.shape[:1])
        return numbers.reshape(*numbers.shape, *[1] * (len(self.shape) - 1)).expand(-1, *self.shape)


@dataclass(frozen=True)
class BoxNoise:
    """Noise of one sample in one box of a case; see ``PositionNoise``.

    Attributes:
        seed: the user's.
        sample: index of the sample.
        channels: of a state.
        start: first voxel of the box along three axes.
        size: voxels along three axes.
        planar: leave out the first axis, of size 1: a tile of a 2D network.
        device: where noise is made.
    """

    seed: int
    sample: int
    channels: int
    start: tuple[int, int, int]
    size: tuple[int, int, int]
    planar: bool
    device: torch.device

    def _field(self, step: int) -> PositionNoise:
        return PositionNoise(self.seed, (self.sample, step), self.device)

    def _batch(self, field: torch.Tensor) -> torch.Tensor:
        return (field[:, 0] if self.planar else field)[None]

    def normal(self, step: int) -> torch.Tensor:
        """See ``Noise``; a batch of one."""
        return self._batch(self._field(step).normal(self.channels, self.start, self.size))

    def uniform(self, step: int) -> torch.Tensor:
        """See ``Noise``; in (0, 1)."""
        return self._batch(self._field(step).uniform(self.channels, self.start, self.size))

    def code(self, step: int) -> torch.Tensor:
        """See ``Noise``; the same in every box of the case."""
        numbers = self._field(step).normal(self.channels, (), ())
        return self._batch(numbers.reshape(-1, 1, 1, 1).expand(-1, *self.size))


@dataclass(frozen=True)
class NoiseByPosition:
    """Noise of several boxes of a case that are computed at once, each as it would be alone.

    Attributes:
        boxes: where the tiles lie.
    """

    boxes: Sequence[BoxNoise]

    def normal(self, step: int) -> torch.Tensor:
        """See ``Noise``."""
        return torch.cat([box.normal(step) for box in self.boxes])

    def uniform(self, step: int) -> torch.Tensor:
        """See ``Noise``."""
        return torch.cat([box.uniform(step) for box in self.boxes])

    def code(self, step: int) -> torch.Tensor:
        """See ``Noise``."""
        return torch.cat([box.code(step) for box in self.boxes])
