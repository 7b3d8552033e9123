"""Views of a place: the patch itself, or a larger field of view at a coarser scale; masks carried between them.

Positions are voxels of the image that is loaded, relative to the first voxel of the patch that the loss is computed
on. A ``Frame`` says which of them a view covers; ``map_to`` carries values from frame to frame. Nothing here knows a
network.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from nnunetv2_diffusion.grids import resize


@dataclass(frozen=True)
class Frame:
    """The grid of a view.

    Attributes:
        start: first voxel that is covered, one number an axis; may be negative.
        extent: voxels that are covered.
        size: voxels of the view; smaller than extent for a coarser scale.
    """

    start: tuple[int, ...]
    extent: tuple[int, ...]
    size: tuple[int, ...]


def patch_frame(size: Sequence[int]) -> Frame:
    """The frame of the patch that the loss is computed on."""
    size = tuple(size)
    return Frame((0,) * len(size), size, size)


def _overlap(starts: Sequence[int], sizes: Sequence[int], start: Sequence[int], size: Sequence[int]) -> list[slice]:
    """Where the box (start, size) lies in the box (starts, sizes), as slices of the latter; empty ones if nowhere."""
    slices = []
    for a, n, b, m in zip(starts, sizes, start, size, strict=True):
        first = min(max(b - a, 0), n)
        slices.append(slice(first, max(first, min(b + m - a, n))))
    return slices


def look(image: torch.Tensor, frame: Frame, origin: Sequence[int]) -> torch.Tensor:
    """What a frame covers of an image.

    Args:
        image: (B, C, *loaded).
        frame: of the view.
        origin: voxel of the image that frames count from.

    Returns:
        (B, C, *frame.size); 0 where the image ends.
    """
    source = Frame(tuple(-n for n in origin), tuple(image.shape[2:]), tuple(image.shape[2:]))
    return resize(_paste(image, source, frame)[0], frame.size)


def look_at_labels(target: torch.Tensor, frame: Frame, origin: Sequence[int]) -> torch.Tensor:
    """What a frame covers of a target, each voxel with the label of the nearest one.

    Args:
        target: (B, C, *loaded), labels or regions.
        frame: of the view; the target must cover it.
        origin: voxel of the target that frames count from.

    Returns:
        (B, C, *frame.size), values and dtype of the target.

    Raises:
        ValueError: if the target does not cover the frame: there is no label to invent.
    """
    box = [slice(o + a, o + a + n) for o, a, n in zip(origin, frame.start, frame.extent, strict=True)]
    if any(s.start < 0 or s.stop > n for s, n in zip(box, target.shape[2:], strict=True)):
        raise ValueError(f"{frame} reaches beyond a target of {tuple(target.shape[2:])} voxels from {tuple(origin)} on")
    covered = target[(..., *box)]
    if frame.size != frame.extent:
        covered = F.interpolate(covered.float(), frame.size, mode="nearest-exact").to(target.dtype)
    return covered


def _paste(x: torch.Tensor, source: Frame, target: Frame) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, C, *source.extent) on the target's extent, 0 elsewhere, and (1, 1, *target.extent), 1 where x reaches."""
    if (source.start, source.extent) == (target.start, target.extent):
        return x, x.new_ones(1, 1, *target.extent)
    there = (..., *_overlap(source.start, source.extent, target.start, target.extent))
    here = (..., *_overlap(target.start, target.extent, source.start, source.extent))
    pasted, covered = x.new_zeros(*x.shape[:2], *target.extent), x.new_zeros(1, 1, *target.extent)
    pasted[here], covered[here] = x[there], 1
    return pasted, covered


def map_to(x: torch.Tensor, source: Frame, target: Frame) -> tuple[torch.Tensor, torch.Tensor]:
    """Carry values from one frame to another: means, or linear between voxels.

    Args:
        x: (B, C, *source.size).
        source: frame of x.
        target: frame of the result.

    Returns:
        values (B, C, *target.size), and where they are known: bool (1, 1, *target.size). Values are 0 elsewhere, but
        for coarse voxels that are known in part.
    """
    values, covered = (resize(v, target.size) for v in _paste(resize(x, source.extent), source, target))
    return values, covered == 1


@dataclass(frozen=True)
class Views:
    """The views that are drawn from.

    Attributes:
        coarse: chance of a coarse view; else it is the patch itself.
        zoom: field of view of the coarse one along each axis, in patches.
    """

    coarse: float = 0.0
    zoom: float = 1.4

    def _borders(self, size: Sequence[int]) -> tuple[int, ...]:
        return tuple(math.floor((self.zoom - 1) * n / 2 + 1e-6) for n in size)  # 1.4 - 1 is a little less than 0.4

    def margin(self, size: Sequence[int]) -> tuple[int, ...]:
        """Voxels around a patch that any view may see, on either side of each axis."""
        return self._borders(size) if self.coarse else (0,) * len(size)

    def coarse_frame(self, size: Sequence[int]) -> Frame:
        """Of the coarse view of a patch of this size, which is the size of the view as well."""
        borders = self._borders(size)
        return Frame(tuple(-b for b in borders), tuple(n + 2 * b for n, b in zip(size, borders, strict=True)), size)

    def draw(self, size: Sequence[int]) -> Frame:
        """A random view of a patch of this size; no random number is drawn if there is no choice."""
        size = tuple(size)
        if self.coarse and (self.coarse >= 1 or float(torch.rand(())) < self.coarse):
            return self.coarse_frame(size)
        return patch_frame(size)
