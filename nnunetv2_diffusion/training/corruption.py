"""Ground truth made wrong on purpose: what a chain's own mistakes may look like."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from nnunetv2_diffusion.diffusion import MaskEncoding
from nnunetv2_diffusion.networks import to_mask, to_x_start

CORRUPTIONS = ("none", "dilate", "drop", "swap")
LARGEST_RADIUS = 3  # voxels


def grow(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """A mask (*spatial), bool, with all voxels that are at most radius away along every axis; eroded if negative."""
    inside = mask if radius >= 0 else ~mask
    pool = F.max_pool2d if mask.ndim == 2 else F.max_pool3d
    grown = pool(inside[None, None].float(), 2 * abs(radius) + 1, stride=1, padding=abs(radius))[0, 0] > 0
    return grown if radius >= 0 else ~grown


def _random_box(mask: torch.Tensor) -> torch.Tensor:
    """A box around a random voxel of a mask, half as wide along each axis as the mask reaches; bool (*spatial)."""
    places = mask.nonzero()
    centre = places[int(torch.randint(len(places), ()))]
    reach = places.amax(0) - places.amin(0) + 1
    box = torch.zeros_like(mask)
    first = (centre - reach // 4).clamp(min=0).tolist()
    box[tuple(slice(a, a + max(1, n // 2)) for a, n in zip(first, reach.tolist(), strict=True))] = True
    return box


def _random_component(mask: torch.Tensor) -> torch.Tensor:
    """One of the connected components of a mask that is not empty; bool (*spatial)."""
    labels, count = ndimage.label(mask.cpu().numpy())
    chosen = labels == 1 + int(torch.randint(count, ()))
    return torch.from_numpy(np.ascontiguousarray(chosen)).to(mask.device)


@dataclass(frozen=True)
class Corruption:
    """Changes a random class or region of every sample.

    Attributes:
        kind: "dilate": grown or shrunk by 1 to 3 voxels. "drop": a component of it, or a box, becomes background.
            "swap": it changes places with a random class that it touches.
        encoding: of the masks.
        regions: heads are independent regions, whose masks may overlap; else every voxel has one class.
    """

    kind: str
    encoding: MaskEncoding
    regions: bool = False

    def __call__(self, x_start: torch.Tensor) -> torch.Tensor:
        """Corrupted masks.

        Args:
            x_start: ground truth, encoded, (B, C_mask, *spatial), -1 or 1; 0 in all channels where it is unknown.

        Returns:
            the same kind of tensor, new; unknown voxels stay unknown, and none gets a code that is no class.
        """
        known = (x_start != 0).all(1, keepdim=True)
        planes = (self.encoding.decode(to_mask(x_start)) > 0.5) & known
        changed = torch.stack([self._change(sample) for sample in planes])
        return to_x_start(self.encoding.encode(changed.float())) * known

    def _change(self, planes: torch.Tensor) -> torch.Tensor:
        """One sample, bool (K, *spatial)."""
        first = 0 if self.regions else 1
        present = [k for k in range(first, len(planes)) if planes[k].any()]
        if not present:
            return planes
        k = present[int(torch.randint(len(present), ()))]
        if self.kind == "swap":
            return self._swap(planes, k, present)
        if self.kind == "drop":
            part = _random_component if torch.rand(()) < 0.5 else _random_box
            return self._replace(planes, k, planes[k] & ~part(planes[k]))
        radius = int(torch.randint(1, LARGEST_RADIUS + 1, ())) * (1 if torch.rand(()) < 0.5 else -1)
        return self._replace(planes, k, grow(planes[k], radius))

    def _replace(self, planes: torch.Tensor, k: int, mask: torch.Tensor) -> torch.Tensor:
        """Another mask for class k: what it takes, others lose; what it leaves becomes background."""
        changed = planes.clone() if self.regions else planes & ~mask
        if not self.regions:
            changed[0] |= planes[k] & ~mask
        changed[k] = mask
        return changed

    def _swap(self, planes: torch.Tensor, k: int, present: list[int]) -> torch.Tensor:
        """Class k and a class that touches it change places; as it is if there is none."""
        near = grow(planes[k], 1)
        others = [j for j in present if j != k and (planes[j] & near).any()]
        if not others:
            return planes
        j = others[int(torch.randint(len(others), ()))]
        order = list(range(len(planes)))
        order[k], order[j] = j, k
        return planes[order]


def make_corruption(kind: str, encoding: MaskEncoding, regions: bool) -> Corruption | None:
    """The corruption of a setting; None for "none".

    Raises:
        ValueError: for another kind.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"corruption is {kind!r}, expected one of {', '.join(CORRUPTIONS)}")
    return None if kind == "none" else Corruption(kind, encoding, regions)
