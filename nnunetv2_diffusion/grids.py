"""Tensors on other grids: what training and prediction share. Nothing here knows a network."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}  # by number of spatial axes


def mirror(x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """x (B, C, *spatial) mirrored along spatial axes; applied twice, x itself."""
    return torch.flip(x, [axis + 2 for axis in axes]) if axes else x


def resize(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """x (B, C, *spatial) with other voxels: means of those that become one, or linear between those that are there."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    if all(new <= old for new, old in zip(size, x.shape[2:], strict=True)):
        return F.interpolate(x, tuple(size), mode="area")
    return F.interpolate(x, tuple(size), mode=LINEAR[len(size)], align_corners=False)
