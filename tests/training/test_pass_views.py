"""Laws of frames and of what is carried between them, with a network that knows every position."""

import pytest
import torch

from nnunetv2_diffusion.training.views import (
    Frame,
    Views,
    look,
    look_at_labels,
    map_to,
    patch_frame,
)

PATCHES = [(6, 8), (4, 6, 8)]
patches = pytest.mark.parametrize("patch", PATCHES, ids=["2d", "3d"])


def positions(patch, margin):
    """An image whose channels are the voxel's coordinates relative to the patch, (1, axes, *loaded)."""
    grids = torch.meshgrid(*[torch.arange(-m, n + m) for n, m in zip(patch, margin, strict=True)], indexing="ij")
    return torch.stack(grids)[None].float()


def oracle(coordinates):
    """Probabilities of two classes, a smooth function of the absolute position."""
    p = torch.sigmoid(coordinates.sum(1, keepdim=True) / 5 - 1)
    return torch.cat([p, 1 - p], 1)


@patches
def test_what_a_shifted_view_says_is_what_the_patch_says(patch):
    here, margin = patch_frame(patch), tuple(n // 2 for n in patch)
    image = positions(patch, margin)
    expected = oracle(look(image, here, margin))
    for _ in range(20):
        start = tuple(int(torch.randint(-m, m + 1, ())) for m in margin)
        frame = Frame(start, patch, patch)
        found, known = map_to(oracle(look(image, frame, margin)), frame, here)
        assert torch.equal(found, expected * known)
        inside = [max(0, n - abs(s)) for n, s in zip(patch, start, strict=True)]
        assert known.sum() == torch.tensor(inside).prod()


@patches
def test_what_is_known_is_where_the_views_overlap(patch):
    here, start = patch_frame(patch), (2, -3, 1)[: len(patch)]
    coordinates = positions(patch, (0,) * len(patch))[0]
    _, known = map_to(torch.zeros(1, 1, *patch), Frame(start, patch, patch), here)
    for axis, (s, n) in enumerate(zip(start, patch, strict=True)):
        within = (coordinates[axis] >= s) & (coordinates[axis] < s + n)
        assert not known[0, 0][~within].any()
    assert known.any()
    _, nowhere = map_to(torch.ones(1, 1, *patch), Frame((patch[0], *start[1:]), patch, patch), here)
    assert not nowhere.any()


@patches
def test_a_coarse_view_sees_more_and_says_nearly_the_same(patch):
    source, here = Views(1.0, zoom=2.0), patch_frame(patch)
    margin = source.margin(patch)
    assert margin == tuple(n // 2 for n in patch)
    image = positions(patch, margin)
    frame = source.draw(patch)
    seen = look(image, frame, margin)
    assert seen.shape[2:] == patch
    assert seen[:, 0].min() == -margin[0] + 0.5, "the mean of the two outermost voxels"
    found, known = map_to(oracle(seen), frame, here)
    assert known.all()
    torch.testing.assert_close(found, oracle(look(image, here, margin)), atol=0.02, rtol=0)
    torch.testing.assert_close(found.sum(1), torch.ones_like(found[:, 0]))


def test_values_carried_into_a_coarse_frame_are_means_and_known_where_all_of_them_are():
    x, coarse = torch.arange(4.0).reshape(1, 1, 1, 4), Frame((0, -2), (1, 8), (1, 4))
    found, known = map_to(x, patch_frame((1, 4)), coarse)
    assert found.flatten().tolist() == [0, 0.5, 2.5, 0]
    assert known.flatten().tolist() == [False, True, True, False]


@patches
@pytest.mark.parametrize("coarse", [0.0, 0.5, 1.0])
def test_no_view_needs_more_than_the_margin(patch, coarse):
    source = Views(coarse)
    margin = source.margin(patch)
    for _ in range(50):
        frame = source.draw(patch)
        assert all(s >= -m for s, m in zip(frame.start, margin, strict=True))
        ends = [s + e for s, e in zip(frame.start, frame.extent, strict=True)]
        assert all(e <= n + m for e, n, m in zip(ends, patch, margin, strict=True))
    assert any(margin) == (coarse > 0)


def test_coarse_views_are_drawn_as_often_as_asked_for():
    source = Views(0.75)
    share = sum(source.draw((4, 6)) != patch_frame((4, 6)) for _ in range(1000)) / 1000
    assert share == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize("source", [Views(0.0), Views(1.0)], ids=["never coarse", "always"])
def test_without_a_choice_no_random_number_is_drawn(source):
    before = torch.get_rng_state()
    frame = source.draw((10, 10))
    assert torch.equal(torch.get_rng_state(), before)
    assert frame == (Frame((-2, -2), (14, 14), (10, 10)) if source.coarse else patch_frame((10, 10)))


def test_a_view_beyond_the_labels_is_refused():
    target, frame = torch.zeros(1, 1, 4, 4), Frame((-1, 0), (4, 4), (4, 4))
    with pytest.raises(ValueError, match=r"reaches beyond a target of \(4, 4\) voxels from \(0, 0\) on"):
        look_at_labels(target, frame, (0, 0))
    assert look_at_labels(torch.zeros(1, 1, 5, 4), frame, (1, 0)).shape == (1, 1, 4, 4)


def test_a_view_beyond_the_image_is_zero_there():
    image = torch.ones(1, 1, 4, 4)
    seen = look(image, Frame((-2, 0), (4, 4), (4, 4)), (0, 0))
    assert seen[0, 0].sum(1).tolist() == [0, 0, 4, 4]
