"""Surface distances: closed forms, and a second implementation that shares no code with the library."""

from importlib.metadata import PackageNotFoundError
from itertools import product
from math import nan

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from nnunetv2_diffusion.evaluation import EvaluationError, surface
from nnunetv2_diffusion.evaluation.metrics import EMPTY_RULES
from nnunetv2_diffusion.evaluation.surface import metric_names, surface_scores

metrics = pytest.importorskip("monai.metrics", reason="surface distances need MONAI")

RULE = EMPTY_RULES["nnunet"]
SPACINGS = [(1.0, 1.0, 1.0), (5.0, 0.7, 1.3), (2.0, 0.5)]


def scores(reference, prediction, spacing, tolerances=(1.0, 2.0), percentile="directed", rule=RULE):
    return surface_scores(reference, prediction, spacing, tolerances, "mm", rule, percentile)


def box(shape, start, stop):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = True
    return mask


def blobs(seed, ndim):
    """Two masks of a few random boxes each; some touch the border."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((2, *(14, 17, 15)[:ndim]), bool)
    for mask in masks:
        for _ in range(3):
            start = rng.integers(0, 11, ndim)
            mask |= box(mask.shape, start, start + rng.integers(1, 7, ndim))
    return masks


# ---- second implementation


def surface_points(mask, spacing):
    padded = np.pad(mask, 1)
    inside = np.ones_like(mask)
    for axis, step in product(range(mask.ndim), (-1, 1)):
        inside &= np.roll(padded, step, axis)[(slice(1, -1),) * mask.ndim]
    return np.argwhere(mask & ~inside) * spacing


def contour(mask, spacing):
    """Points between four pixels that are not all alike, and the length of the contour there."""
    padded = np.pad(mask, 1).astype(int)
    a, b, c, d = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    number, half_diagonal = a + b + c + d, np.hypot(*spacing) / 2
    length = np.where(number % 2 == 1, half_diagonal, 0.0)
    length[(number == 2) & (a == b)] = spacing[1]  # upper and lower pair differ: the contour runs along axis 1
    length[(number == 2) & (a == c)] = spacing[0]
    length[(number == 2) & (a == d)] = 2 * half_diagonal
    return np.argwhere(length > 0) * spacing, length[length > 0]


def nearest(points, others):
    return cdist(points, others).min(axis=1)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", range(4))
def test_distances_equal_those_between_all_surface_voxels(seed, spacing):
    masks = blobs(seed, len(spacing))
    first, second = (surface_points(mask, spacing) for mask in masks)
    forth, back = nearest(first, second), nearest(second, first)
    found = scores(*masks, spacing)
    assert found["HD"] == pytest.approx(max(forth.max(), back.max()))
    assert found["HD95"] == pytest.approx(max(np.percentile(forth, 95), np.percentile(back, 95)))
    assert found["ASSD"] == pytest.approx((forth.sum() + back.sum()) / (len(forth) + len(back)))
    pooled = scores(*masks, spacing, percentile="pooled")
    assert pooled["HD95"] == pytest.approx(np.percentile([*forth, *back], 95))
    assert pooled | {"HD95": 0} == found | {"HD95": 0}


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (2.0, 0.5)])
@pytest.mark.parametrize("seed", range(4))
def test_surface_dice_equals_that_of_contours(seed, spacing):
    masks = blobs(seed, 2)
    (first, first_length), (second, second_length) = (contour(mask, spacing) for mask in masks)
    found = scores(*masks, spacing, tolerances=(0.0, 0.6, 1.7))
    for tolerance in (0.0, 0.6, 1.7):
        close = first_length[nearest(first, second) <= tolerance].sum()
        close += second_length[nearest(second, first) <= tolerance].sum()
        expected = close / (first_length.sum() + second_length.sum())
        assert found[f"NSD_{tolerance:g}mm"] == pytest.approx(expected)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", range(2))
def test_scores_are_those_of_the_librarys_own_metrics(seed, spacing):
    masks = blobs(seed, len(spacing))
    reference, prediction = (torch.from_numpy(mask.astype(np.float32))[None, None] for mask in masks)
    images = {"y_pred": prediction, "y": reference, "include_background": True, "spacing": list(spacing)}
    found = scores(*masks, spacing, tolerances=(1.2,))
    assert list(found.values()) == pytest.approx(
        [
            metrics.compute_hausdorff_distance(**images).item(),
            metrics.compute_hausdorff_distance(**images, percentile=95).item(),
            metrics.compute_average_surface_distance(**images, symmetric=True).item(),
            metrics.compute_surface_dice(**images, class_thresholds=[1.2], use_subvoxels=True).item(),
        ],
        rel=1e-5,
    )


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("block", [2, 7])
def test_blocks_change_nothing(block, spacing, monkeypatch):
    masks = blobs(3, len(spacing))
    whole = scores(*masks, spacing)
    monkeypatch.setattr(surface, "BLOCK", block)
    assert scores(*masks, spacing) == pytest.approx(whole, rel=1e-12)


# ---- closed forms


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("voxels", [1, 3])
def test_shifted_box_has_the_shift_as_largest_distance(spacing, voxels):
    ndim = len(spacing)
    for axis in range(ndim):
        start = np.full(ndim, 2)
        moved = start + voxels * np.eye(ndim, dtype=int)[axis]
        shape = (16,) * ndim
        found = scores(box(shape, start, start + 9), box(shape, moved, moved + 9), spacing)
        assert found["HD"] == pytest.approx(voxels * spacing[axis])
        assert 0 < found["ASSD"] < found["HD95"] <= found["HD"] * (1 + 1e-6)


def test_parallel_planes_have_their_distance_by_every_measure():
    masks = [box((9, 6, 7), (z, 0, 0), (z + 1, 6, 7)) for z in (2, 6)]
    for percentile in surface.PERCENTILES:
        found = scores(*masks, (2.5, 0.8, 1.1), tolerances=(4.9, 10.1), percentile=percentile)
        assert found == pytest.approx({"HD": 10, "HD95": 10, "ASSD": 10, "NSD_4.9mm": 0, "NSD_10.1mm": 1})


@pytest.mark.parametrize(("spacing", "error"), [((3, 1, 1), 0.65), ((1.5, 1, 1), 0.35), ((0.6, 0.6, 0.6), 0.2)])
def test_spheres_have_the_distances_of_geometry_up_to_the_voxels(spacing, error):
    """Shifted by 6 mm, the distance is 6 |cos| of the direction: 3 in the mean, 5.7 at the 95th percentile."""
    axes = [np.arange(0, length, size) for length, size in zip((54, 54, 60), spacing, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    spheres = [(z - 27) ** 2 + (y - 27) ** 2 + (x - centre) ** 2 <= 20**2 for centre in (27, 33)]
    found = scores(*spheres, spacing, tolerances=(0.0, 8.0))
    assert found["HD"] == pytest.approx(6, abs=1e-6)
    assert found["HD95"] == pytest.approx(5.7, abs=error)
    assert found["ASSD"] == pytest.approx(3, abs=error)
    assert found["NSD_0mm"] < 0.3
    assert found["NSD_8mm"] == 1


def test_surface_dice_counts_area_and_not_voxels():
    """A box of 8 x 40 x 40 voxels against its lower half: only the tops, and the upper sides, are wrong."""
    full, low = (box((10, 42, 42), (1, 1, 1), (top, 41, 41)) for top in (9, 5))
    large, side, rim = 40 * 40, 4 * 40 * 4 * 4.0, 4 * 40 * 2.0  # mm2: top or bottom, half of the sides, 2 mm on them
    expected = (2 * large + 2 * side + 2 * rim) / (4 * large + 3 * side)
    assert scores(full, low, (4.0, 1.0, 1.0))["NSD_2mm"] == pytest.approx(expected, abs=0.02)
    by_voxels = (2 * large + 2 * side / 4 + 2 * rim / 4) / (4 * large + 3 * side / 4)
    assert abs(by_voxels - expected) > 0.05


def test_shell_of_known_thickness_decides_the_surface_dice():
    spacing = (3.0, 1.0, 2.0)
    inner, outer = box((12, 20, 16), (4, 6, 5), (8, 14, 11)), box((12, 20, 16), (3, 3, 4), (9, 17, 12))
    found = scores(inner, outer, spacing, tolerances=(1.9, 4.7))
    assert found["NSD_1.9mm"] == 0  # the gap is 3, 3 and 2 mm
    assert found["NSD_4.7mm"] == 1  # and sqrt(3**2 + 3**2 + 2**2) = 4.69 at the corners
    assert found["HD"] == pytest.approx(np.sqrt(22))


# ---- laws


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("percentile", surface.PERCENTILES)
def test_reference_and_prediction_can_be_swapped(spacing, percentile):
    first, second = blobs(5, len(spacing))
    swapped = scores(second, first, spacing, percentile=percentile)
    assert scores(first, second, spacing, percentile=percentile) == pytest.approx(swapped)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_equal_masks_are_at_no_distance(spacing):
    mask = blobs(6, len(spacing))[0]
    assert scores(mask, mask.copy(), spacing, (0.0,)) == {"HD": 0, "HD95": 0, "ASSD": 0, "NSD_0mm": 1}


@pytest.mark.parametrize("spacing", SPACINGS)
def test_place_in_the_image_makes_no_difference(spacing):
    masks = blobs(7, len(spacing))
    padded = [np.pad(mask, 4) for mask in masks]
    assert scores(*padded, spacing) == scores(*masks, spacing)


def test_single_voxels_have_a_surface():
    masks = [box((5, 5, 5), start, np.add(start, 1)) for start in [(0, 0, 0), (0, 3, 4)]]
    assert scores(*masks, (1.0, 1.0, 1.0))["HD95"] == pytest.approx(5)


def test_distances_scale_with_the_spacing():
    masks, spacing = blobs(8, 3), np.array([5.0, 0.7, 1.3])
    found, doubled = scores(*masks, spacing, (1.5,)), scores(*masks, 2 * spacing, (3.0,))
    assert [*doubled.values()] == pytest.approx(
        [2 * found["HD"], 2 * found["HD95"], 2 * found["ASSD"], found["NSD_1.5mm"]]
    )


@pytest.mark.parametrize("size", [0.1, 0.3, 0.7])
def test_tolerance_of_whole_voxels_is_not_lost_to_rounding(size):
    masks = [box((12, 6), (1, 0), (3 + 3 * extra, 6)) for extra in (0, 1)]
    assert scores(*masks, (size, size), tolerances=(3 * size,))[f"NSD_{3 * size:g}mm"] == 1


def test_masks_are_not_changed():
    masks = blobs(9, 3)
    masks.flags.writeable = False  # whoever writes to it raises
    before = masks.copy()
    scores(*masks, (1.0, 1.0, 1.0))
    np.testing.assert_array_equal(masks, before)


# ---- empty masks, options, library


@pytest.mark.parametrize(
    ("rule", "one", "both"),
    [
        ("nnunet", [nan, nan, nan, 0], [nan, nan, nan, nan]),
        ("recycling", [nan, nan, nan, nan], [nan, nan, nan, nan]),
        ("hidiff", [nan, nan, nan, 0], [nan, nan, nan, 1]),
        ("hidiff-code", [nan, nan, nan, 0], [nan, 1, nan, 1]),
    ],
)
def test_empty_masks_follow_the_rule(rule, one, both):
    empty, mask = np.zeros((4, 4), bool), np.eye(4, dtype=bool)
    for pair, expected in [((mask, empty), one), ((empty, mask), one), ((empty, empty), both)]:
        found = scores(*pair, (1.0, 1.0), (1.0,), rule=EMPTY_RULES[rule])
        np.testing.assert_equal([*found.values()], expected)


def test_keys_name_tolerance_and_unit():
    assert metric_names((1, 2.5), "px") == ["HD", "HD95", "ASSD", "NSD_1px", "NSD_2.5px"]
    mask = np.eye(3, dtype=bool)
    assert list(surface_scores(mask, mask, (1, 1), (1, 2.5), "px", RULE)) == metric_names((1, 2.5), "px")
    assert list(scores(mask, mask, (1, 1), ())) == ["HD", "HD95", "ASSD"]


def test_missing_library_is_an_error_that_says_what_to_type(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(surface, "version", missing)
    with pytest.raises(EvaluationError, match=r"pip install 'monai>=.*--no-surface"):
        surface.library_version()
