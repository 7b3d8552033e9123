"""Noise of a whole case as a function of the place: what one tile sees of it, another tile sees too."""

from collections.abc import Sequence
from functools import lru_cache

import torch

from nnunetv2_diffusion.diffusion.noise import splitmix64

BITS = 16  # of one draw; four draws come from one 64-bit word
PER_WORD = 64 // BITS


def _signed(value: int) -> int:
    """The 64-bit two's complement that PyTorch computes with."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA, _MULTIPLY_1, _MULTIPLY_2 = (_signed(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(words: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function on int64; multiplications wrap around."""
    words = (words ^ ((words >> 30) & 0x3FFFFFFFF)) * _MULTIPLY_1
    words = (words ^ ((words >> 27) & 0x1FFFFFFFFF)) * _MULTIPLY_2
    return words ^ ((words >> 31) & 0x1FFFFFFFF)


@lru_cache(maxsize=4)
def _normal_table(device: torch.device) -> torch.Tensor:
    """Standard normal quantiles of 2^16 equal shares, scaled to unit variance; |z| <= 4.3.

    A table instead of Box and Muller's formula: logarithm and cosine differ in the last bit between devices, and on a
    CPU even with the place of an element in memory.
    """
    shares = (torch.arange(2**BITS, dtype=torch.float64) + 0.5) / 2**BITS
    table = torch.special.ndtri(shares)
    return (table / table.square().mean().sqrt()).float().to(device)


class PositionNoise:
    """Noise that is a function of (seed, draw, channel, voxel position) alone.

    Not of tile, order of calls, batch, process or device: overlapping tiles see the same numbers, bit for bit.

    Args:
        seed: the user's seed.
        draw: integers that tell fields apart, for example (sample, step).
        device: where noise is made.
    """

    def __init__(self, seed: int, draw: Sequence[int], device: torch.device):
        key = splitmix64(seed)
        for part in draw:
            key = splitmix64(key ^ part)
        self.key = _signed(key)
        self.device = device

    def _bits(self, channels: int, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        """Integers in [0, 2^16), (channels, *size)."""
        groups = -(-channels // PER_WORD)
        words = torch.tensor(self.key, device=self.device)
        for first, length in zip((0, *start), (groups, *size), strict=True):
            places = torch.arange(first, first + length, device=self.device) * _GAMMA
            words = _mix(words[..., None] + places)
        result = torch.empty((groups, PER_WORD, *size), dtype=torch.int64, device=self.device)
        for part in range(PER_WORD):
            result[:, part] = (words >> (BITS * part)) & (2**BITS - 1)
        return result.flatten(0, 1)[:channels]

    def normal(self, channels: int, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        """Standard normal noise of a box, float32, (channels, *size).

        Args:
            channels: C.
            start: voxel of the case at which the box begins, along each axis; may be negative.
            size: voxels of the box along each axis.
        """
        return _normal_table(self.device)[self._bits(channels, start, size)]

    def uniform(self, channels: int, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        """Uniform noise of a box in (0, 1), multiples of 2^-17, float32; arguments as for ``normal``."""
        return (self._bits(channels, start, size).float() + 0.5) / 2**BITS
