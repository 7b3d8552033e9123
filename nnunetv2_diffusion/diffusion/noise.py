"""Noise for prediction that depends on what is predicted, never on the order of calls."""

from collections.abc import Sequence
from functools import lru_cache

import torch

_MASK64 = (1 << 64) - 1


def splitmix64(value: int) -> int:
    """One round of Steele et al.'s SplitMix64: spreads nearby integers over all 64 bits."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


@lru_cache(maxsize=2)  # tiles of a case have one size; each entry holds 8 bytes per voxel on its device
def _positions(length: int, device: torch.device) -> torch.Tensor:
    """0 .. length-1 in the high halves of 64-bit words."""
    return torch.arange(length, device=device) << 32


def content_hash(image: torch.Tensor) -> list[int]:
    """One 64-bit integer for each image of a batch, from the bits of its voxels and their positions.

    Args:
        image: (B, C, *spatial), any floating dtype.

    Returns:
        B integers. Integer sums are exact, so the result does not depend on threads or on the other images.

    Raises:
        ValueError: if an image has NaN or infinite voxels.
    """
    flat = image.detach().float().reshape(len(image), -1) + 0.0  # -0.0 becomes 0.0
    words = flat.contiguous().view(torch.int32).long()
    # position in the high half, bits in the low half. A sum that is linear in the bits would have images with the same
    # sum of positions collide: a mirrored phantom, for instance. So each word is mixed before the sum.
    words = (words & 0xFFFFFFFF) | _positions(words.shape[1], words.device)
    words = words * 0x5851F42D4C957F2D
    words = (words ^ ((words >> 32) & 0xFFFFFFFF)) * 0x2545F4914F6CDD1D
    sums = (words ^ ((words >> 32) & 0xFFFFFFFF)).sum(1)
    bad = (~torch.isfinite(flat)).sum(1)
    values = torch.stack([sums, bad]).tolist()  # one transfer from the device
    for index, count in enumerate(values[1]):
        if count:
            raise ValueError(
                f"image {index} of the batch has {count} NaN or infinite values among {flat.shape[1]}; "
                "expected finite intensities. Check the input file of this case and its normalisation."
            )
    return [value & _MASK64 for value in values[0]]


class ContentNoise:
    """Standard normal or uniform noise, one independent stream for each image of a batch.

    The stream of an image is a function of (seed, its content, sample index) alone: the same tile gets the same
    noise whatever came before it, whatever else is in the batch, and in every process of one machine.

    Args:
        hashes: result of ``content_hash`` for the batch.
        seed: the user's seed.
        sample: index of the sample drawn, 0 .. samples-1.
        device: where noise is made.
    """

    def __init__(self, hashes: Sequence[int], seed: int, sample: int, device: torch.device):
        self.generators = []
        for value in hashes:
            key = splitmix64(value ^ splitmix64(seed ^ splitmix64(sample)))
            self.generators.append(torch.Generator(device).manual_seed(key >> 1))

    def __call__(self, shape: Sequence[int]) -> torch.Tensor:
        """Next standard normal noise of each stream, float32, (B, *shape)."""
        return torch.stack([torch.randn(tuple(shape), generator=g, device=g.device) for g in self.generators])

    def uniform(self, shape: Sequence[int]) -> torch.Tensor:
        """Next uniform noise of each stream, float32 in [0, 1), (B, *shape)."""
        # the default dtype may be another, and rounding to a shorter one can reach 1
        draws = [torch.rand(tuple(shape), generator=g, device=g.device, dtype=torch.float32) for g in self.generators]
        return torch.stack(draws)
