"""Views of a place: another crop, scale, mirroring or intensity of an image, and masks carried from one to another.

Positions are voxels of the image that is loaded, relative to the first voxel of the patch that the loss is computed
on. A ``Frame`` says which of them a view covers; ``map_to`` carries values from frame to frame. Nothing here knows a
network.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

from nnunetv2_diffusion.grids import mirror, resize

GAMMA, BRIGHTNESS, NOISE_VARIANCE = (0.7, 1.5), (0.75, 1.25), (0.0, 0.1)  # ranges of nnU-Net's augmentation


@dataclass(frozen=True)
class Frame:
    """The grid of a view.

    Attributes:
        start: first voxel that is covered, one number an axis; may be negative.
        extent: voxels that are covered.
        size: voxels of the view; smaller than extent for a coarser scale.
        mirrored: spatial axes that are mirrored.
    """

    start: tuple[int, ...]
    extent: tuple[int, ...]
    size: tuple[int, ...]
    mirrored: tuple[int, ...] = ()


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
    return mirror(resize(_paste(image, source, frame)[0], frame.size), frame.mirrored)


def look_at_labels(target: torch.Tensor, frame: Frame, origin: Sequence[int]) -> torch.Tensor:
    """What a frame covers of a target, each voxel with the label of the nearest one.

    Args:
        target: (B, C, *loaded), labels or regions.
        frame: of the view; the target must cover it.
        origin: voxel of the target that frames count from.

    Returns:
        (B, C, *frame.size), values and dtype of the target.
    """
    box = [slice(o + a, o + a + n) for o, a, n in zip(origin, frame.start, frame.extent, strict=True)]
    covered = target[(..., *box)]
    if frame.size != frame.extent:
        covered = F.interpolate(covered.float(), frame.size, mode="nearest-exact").to(target.dtype)
    return mirror(covered, frame.mirrored)


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
    """Carry values from one frame to another.

    Mirrored and shifted values are moved and nothing else; between scales they are means, or linear between voxels.

    Args:
        x: (B, C, *source.size).
        source: frame of x.
        target: frame of the result.

    Returns:
        values (B, C, *target.size), and where they are known: bool (1, 1, *target.size). Values are 0 elsewhere, but
        for coarse voxels that are known in part.
    """
    full = resize(mirror(x, source.mirrored), source.extent)
    values, covered = (mirror(resize(v, target.size), target.mirrored) for v in _paste(full, source, target))
    return values, covered == 1


def vary_intensity(image: torch.Tensor, channels: int) -> torch.Tensor:
    """Another gamma, brightness and noise for every sample and channel, in the ranges of nnU-Net's augmentation.

    Args:
        image: (B, C, *spatial).
        channels: how many of C are intensities; others, the masks of a cascade, stay.

    Returns:
        a new tensor; gamma keeps mean and standard deviation of each channel.
    """
    x = image[:, :channels].float()
    space = tuple(range(2, x.ndim))

    def draw(limits: tuple[float, float]) -> torch.Tensor:
        shape = (len(x), channels, *[1] * len(space))
        return (limits[0] + (limits[1] - limits[0]) * torch.rand(shape)).to(x.device)

    low, high = x.amin(space, keepdim=True), x.amax(space, keepdim=True)
    bent = ((x - low) / (high - low).clamp(min=1e-7)) ** draw(GAMMA)
    mean, spread = x.mean(space, keepdim=True), x.std(space, keepdim=True)
    bent = (bent - bent.mean(space, keepdim=True)) / bent.std(space, keepdim=True).clamp(min=1e-7) * spread + mean
    varied = bent * draw(BRIGHTNESS) + draw(NOISE_VARIANCE).sqrt() * torch.randn_like(x)
    return torch.cat([varied.to(image.dtype), image[:, channels:]], 1)


class View(NamedTuple):
    """What the first pass sees: a frame, with the image's own intensities or with others."""

    frame: Frame
    varied: bool = False


def _random_axes(axes: Sequence[int]) -> tuple[int, ...]:
    """At least one of the axes, all choices equally likely."""
    number = int(torch.randint(1, 2 ** len(axes), ()))
    return tuple(axis for i, axis in enumerate(axes) if number >> i & 1)


@dataclass(frozen=True)
class Views:
    """The views that are drawn from.

    Attributes:
        mirror: relative frequency of a mirrored patch; 0: never.
        shift: of a patch beside it.
        coarse: of a larger field of view at a coarser scale.
        intensity: of another contrast, brightness and noise.
        offset: largest shift along each axis, in parts of the patch.
        zoom: field of view of the coarse patch along each axis, in patches.
        mirror_axes: spatial axes that may be mirrored; without any, mirror is never drawn.
    """

    mirror: float = 0.0
    shift: float = 0.0
    coarse: float = 0.0
    intensity: float = 0.0
    offset: float = 0.5
    zoom: float = 1.5
    mirror_axes: tuple[int, ...] = ()

    def _shifts(self, size: Sequence[int]) -> list[int]:
        return [math.floor(self.offset * n) for n in size]

    def _borders(self, size: Sequence[int]) -> list[int]:
        return [math.floor((self.zoom - 1) * n / 2) for n in size]

    def margin(self, size: Sequence[int]) -> tuple[int, ...]:
        """Voxels around a patch that any view may see, on either side of each axis."""
        needed = [[0] * len(size)]
        needed += [self._shifts(size)] if self.shift else []
        needed += [self._borders(size)] if self.coarse else []
        return tuple(map(max, zip(*needed, strict=True)))

    def draw(self, size: Sequence[int]) -> View:
        """A random view of a patch; without any frequency the patch itself, and no random number is drawn.

        Args:
            size: of the patch, the size of the view as well.
        """
        size = tuple(size)
        kinds: dict[str, Callable[[Frame], View]] = {
            "mirror": self._mirrored, "shift": self._shifted, "coarse": self._coarsened, "intensity": self._varied
        }  # fmt: skip
        weights = {kind: getattr(self, kind) for kind in kinds if kind != "mirror" or self.mirror_axes}
        if not any(weights.values()):
            return View(patch_frame(size))
        kind = list(weights)[int(torch.multinomial(torch.tensor([float(w) for w in weights.values()]), 1))]
        return kinds[kind](patch_frame(size))

    def _mirrored(self, frame: Frame) -> View:
        return View(Frame(frame.start, frame.extent, frame.size, _random_axes(self.mirror_axes)))

    def _shifted(self, frame: Frame) -> View:
        start = tuple(int(torch.randint(-limit, limit + 1, ())) for limit in self._shifts(frame.size))
        return View(Frame(start, frame.extent, frame.size))

    def _coarsened(self, frame: Frame) -> View:
        borders = self._borders(frame.size)
        extent = tuple(n + 2 * b for n, b in zip(frame.size, borders, strict=True))
        return View(Frame(tuple(-b for b in borders), extent, frame.size))

    def _varied(self, frame: Frame) -> View:
        return View(frame, varied=True)
