"""Distances between the surfaces of two masks, which MONAI finds and measures."""

from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from math import nan
from types import ModuleType

import numpy as np
import torch
from scipy.spatial import cKDTree

from nnunetv2_diffusion.evaluation import EvaluationError
from nnunetv2_diffusion.evaluation.metrics import EmptyRule, union_box

LIBRARY = "monai"
REQUIREMENT = "monai>=1.5.2,<1.7"  # 1.5.1 unpacks a zip file's entries outside of its folder
PERCENTILES = {
    "directed": "the larger of the 95th percentiles of both directions (MONAI, recycling paper)",
    "pooled": "the 95th percentile of the distances of both directions together (medpy, code of HiDiff's authors)",
}
CONVENTIONS = {
    "surface": "HD, HD95, ASSD: centres of the mask's voxels that have a face neighbour outside the mask; outside the "
    "image is outside the mask",
    "HD": "the largest distance of both directions",
    "ASSD": "mean of the distances of both directions together",
    "percentile_interpolation": "linear",
    "NSD": "share of both surfaces within the tolerance; elements of the surface are marching-cubes facets (2D: "
    "contour segments) between voxel centres, weighted by area (length), as in DeepMind's surface-distance",
    "nearest": "Euclidean, exact, between these voxel centres or elements (scipy's k-d tree)",
    "ignored_region": "both masks are cut at voxels of the ignore label",
}
ROUNDING = 1e-6  # 3 steps of 0.1 mm, and those of spacings stored as float32, must be within 0.3 mm
BLOCK = 64  # voxels along an axis


def library_version() -> str:
    """Version of MONAI.

    Raises:
        EvaluationError: if it is not installed, with what to type.
    """
    missing = missing_library()
    if missing:
        raise EvaluationError(f"{missing}. Or add --no-surface to leave them out.")
    return version(LIBRARY)


def missing_library() -> str | None:
    """What to type if MONAI is not installed; None if it is."""
    try:
        version(LIBRARY)
    except PackageNotFoundError:
        return (
            f"surface distances need the package {LIBRARY}, which is not installed. Type: pip install '{REQUIREMENT}'"
        )
    return None


@cache
def _monai() -> ModuleType:
    """MONAI's metrics; imported only when needed, as that takes seconds.

    Raises:
        EvaluationError: if it cannot be imported.
    """
    found = library_version()
    try:
        from monai.metrics import utils
    except Exception as error:
        raise EvaluationError(
            f"{LIBRARY} {found} cannot be imported: {type(error).__name__}: {error}. Expected {REQUIREMENT}, and a "
            "release for the torch that is installed. Or add --no-surface to leave surface distances out."
        ) from error
    return utils


def metric_names(tolerances: Sequence[float], unit: str) -> list[str]:
    """Keys of ``surface_scores``."""
    return ["HD", "HD95", "ASSD", *(f"NSD_{tolerance:g}{unit}" for tolerance in tolerances)]


def surface_scores(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing: Sequence[float],
    tolerances: Sequence[float],
    unit: str,
    rule: EmptyRule,
    percentile: str = "directed",
) -> dict[str, float]:
    """Surface distances of two masks; see ``CONVENTIONS``.

    Args:
        reference: bool, 2D or 3D; not changed.
        prediction: bool, of the same shape; not changed.
        spacing: size of a voxel along each axis of the arrays, in ``unit``.
        tolerances: of the NSD, in ``unit``.
        unit: ends the keys of the NSD.
        rule: for empty masks.
        percentile: of HD95, a key of ``PERCENTILES``.

    Returns:
        HD, HD95 and ASSD in ``unit``, NSD in [0, 1] for each tolerance, such as NSD_1mm.

    Raises:
        EvaluationError: if MONAI is missing.
    """
    filled = bool(reference.any()), bool(prediction.any())
    if all(filled):
        box = union_box(reference, prediction)
        masks = [np.pad(mask[box], 1) for mask in (reference, prediction)]
        spacing = tuple(float(size) for size in spacing)  # MONAI wants one type
        values = _aggregate(*_nearest(*_surface_voxels(masks, spacing)), percentile)
        values += _surface_dice(*_surface_elements(masks, spacing), tolerances) if len(tolerances) else []
    else:
        hd95, nsd = (nan, rule.nsd_one) if any(filled) else (rule.hd95_both, rule.overlap_both)
        values = [nan, hd95, nan] + [nsd] * len(tolerances)
    return {name: float(value) for name, value in zip(metric_names(tolerances, unit), values, strict=True)}


def _surface_voxels(masks: Sequence[np.ndarray], spacing: tuple[float, ...]) -> list[np.ndarray]:
    """Centres of the surface voxels of two masks, (n, axes) each."""
    edges = _monai().get_mask_edges(*masks, crop=False)
    return [np.argwhere(np.asarray(edge)) * spacing for edge in edges]


def _surface_elements(
    masks: Sequence[np.ndarray], spacing: tuple[float, ...]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Places of the surface elements of two masks, (n, axes) each, and their areas, (n,) each.

    An element lies between neighbouring voxel centres (8, in 2D 4). Block by block: MONAI's convolution takes long,
    and dozens of bytes a voxel, where most blocks have no surface.
    """
    places: list[list[np.ndarray]] = [[], []]
    areas: list[list[np.ndarray]] = [[], []]
    for start in product(*(range(0, size - 1, BLOCK) for size in masks[0].shape)):
        block = [np.ascontiguousarray(mask[tuple(slice(s, s + BLOCK + 1) for s in start)]) for mask in masks]
        if all(part.all() or not part.any() for part in block):
            continue
        found = _monai().get_mask_edges(*map(torch.from_numpy, block), crop=False, spacing=spacing)
        edges, measures = [np.asarray(part) for part in found[:2]], [np.asarray(part) for part in found[2:]]
        for index, edge in enumerate(edges):
            edge = edge.astype(bool)
            places[index].append((np.argwhere(edge) + start) * spacing)
            areas[index].append(measures[index][edge].astype(np.float64))
    return [np.concatenate(parts) for parts in places], [np.concatenate(parts) for parts in areas]


def _nearest(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each point to the nearest one of the other set.

    By trees: MONAI before 1.6 transforms the whole image for it, with some 60 bytes a voxel.
    """
    return cKDTree(second).query(first)[0], cKDTree(first).query(second)[0]


def _aggregate(forth: np.ndarray, back: np.ndarray, percentile: str) -> list[float]:
    """HD, HD95 and ASSD of the distances of both directions."""
    both = np.concatenate([forth, back])
    parts = [both] if percentile == "pooled" else [forth, back]
    return [both.max(), max(np.percentile(part, 95) for part in parts), both.mean()]


def _surface_dice(
    places: Sequence[np.ndarray], areas: Sequence[np.ndarray], tolerances: Sequence[float]
) -> list[float]:
    """NSD for each tolerance, from surface elements with areas (Nikolov et al. 2021, arXiv:1809.04430)."""
    distances, weights = np.concatenate(_nearest(*places)), np.concatenate(areas)
    return [weights[distances <= t * (1 + ROUNDING)].sum() / weights.sum() for t in tolerances]
