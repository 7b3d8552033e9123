"""Laws of frames and of what is carried between them, with a network that knows every position."""

from collections import Counter

import pytest
import torch

from nnunetv2_diffusion.training.views import (
    Frame,
    View,
    Views,
    look,
    map_to,
    patch_frame,
    vary_intensity,
)

PATCHES = [(6, 8), (4, 6, 8)]
patches = pytest.mark.parametrize("patch", PATCHES, ids=["2d", "3d"])
KINDS = ("mirror", "shift", "coarse", "intensity")


def views(patch, **chosen):
    return Views(**{"mirror_axes": tuple(range(len(patch))), **chosen})


def positions(patch, margin):
    """An image whose channels are the voxel's coordinates relative to the patch, (1, axes, *loaded)."""
    grids = torch.meshgrid(*[torch.arange(-m, n + m) for n, m in zip(patch, margin, strict=True)], indexing="ij")
    return torch.stack(grids)[None].float()


def oracle(coordinates):
    """Probabilities of two classes, a smooth function of the absolute position."""
    p = torch.sigmoid(coordinates.sum(1, keepdim=True) / 5 - 1)
    return torch.cat([p, 1 - p], 1)


@patches
@pytest.mark.parametrize("kind", ["mirror", "shift"])
def test_what_a_mirrored_or_shifted_view_says_is_what_the_patch_says(patch, kind):
    source, here = views(patch, **{kind: 1.0}), patch_frame(patch)
    margin = source.margin(patch)
    image = positions(patch, margin)
    expected = oracle(look(image, here, margin))
    for _ in range(20):
        frame = source.draw(patch).frame
        found, known = map_to(oracle(look(image, frame, margin)), frame, here)
        assert torch.equal(found, expected * known)
        inside = [max(0, n - abs(s)) for n, s in zip(patch, frame.start, strict=True)]
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
    source, here = views(patch, coarse=1.0, zoom=2.0), patch_frame(patch)
    margin = source.margin(patch)
    assert margin == tuple(n // 2 for n in patch)
    image = positions(patch, margin)
    frame = source.draw(patch).frame
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
@pytest.mark.parametrize("kind", KINDS)
def test_no_view_needs_more_than_the_margin(patch, kind):
    source = views(patch, **{kind: 1.0})
    margin = source.margin(patch)
    for _ in range(50):
        frame = source.draw(patch).frame
        assert all(s >= -m for s, m in zip(frame.start, margin, strict=True))
        ends = [s + e for s, e in zip(frame.start, frame.extent, strict=True)]
        assert all(e <= n + m for e, n, m in zip(ends, patch, margin, strict=True))
    assert any(margin) == (kind in ("shift", "coarse"))


@patches
def test_shifts_reach_half_a_patch_on_either_side(patch):
    source = views(patch, shift=1.0, offset=0.5)
    starts = torch.tensor([source.draw(patch).frame.start for _ in range(300)])
    assert starts.amin(0).tolist() == [-(n // 2) for n in patch]
    assert starts.amax(0).tolist() == [n // 2 for n in patch]


def test_every_mirrored_view_but_the_plain_one_is_equally_likely():
    source = views((4, 6, 8), mirror=1.0)
    counts = Counter(source.draw((4, 6, 8)).frame.mirrored for _ in range(1400))
    assert len(counts) == 7
    assert () not in counts
    assert all(140 < n < 260 for n in counts.values())
    allowed = views((4, 6, 8), mirror=1.0, mirror_axes=(1,))
    assert allowed.draw((4, 6, 8)).frame.mirrored == (1,)


def test_views_are_drawn_as_often_as_their_frequencies_say():
    source = views((4, 6), mirror=3.0, intensity=1.0)
    share = sum(source.draw((4, 6)).varied for _ in range(1000)) / 1000
    assert share == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("source", [Views(), Views(mirror=1.0)], ids=["no frequency", "no axis to mirror"])
def test_without_a_view_it_is_the_patch_and_no_random_number_is_drawn(source):
    before = torch.get_rng_state()
    assert source.draw((4, 6)) == View(patch_frame((4, 6)))
    assert torch.equal(torch.get_rng_state(), before)
    assert source.margin((4, 6)) == (0, 0)


def test_a_view_beyond_the_image_is_zero_there():
    image = torch.ones(1, 1, 4, 4)
    seen = look(image, Frame((-2, 0), (4, 4), (4, 4)), (0, 0))
    assert seen[0, 0].sum(1).tolist() == [0, 0, 4, 4]


def test_another_intensity_keeps_place_and_order_but_for_noise(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    image = torch.randn(2, 3, 5, 6)
    copy = image.clone()
    found = vary_intensity(image, channels=2)
    assert torch.equal(image, copy)
    assert torch.equal(found[:, 2:], image[:, 2:]), "masks of a cascade are no intensities"
    for old, new in zip(image[:, :2].flatten(0, 1), found[:, :2].flatten(0, 1), strict=True):
        assert torch.equal(old.flatten().argsort(), new.flatten().argsort())
        assert 0.7 < float(new.std() / old.std()) < 1.3
        assert not torch.allclose(old, new)
    assert torch.isfinite(vary_intensity(torch.zeros(1, 1, 4, 4), 1)).all()
