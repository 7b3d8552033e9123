"""Laws of corrupted ground truth."""

import pytest
import torch
from torch import nn

from nnunetv2_diffusion.diffusion import AnalogBits, MaskEncoding
from nnunetv2_diffusion.training.corruption import Corruption, grow, make_corruption

KINDS = ["dilate", "drop", "swap"]
kinds = pytest.mark.parametrize("kind", KINDS)
encodings = pytest.mark.parametrize("encoding", [MaskEncoding(4), AnalogBits(4)], ids=["one-hot", "bits"])
DIMS = [(16, 18), (10, 12, 14)]
sizes = pytest.mark.parametrize("size", DIMS, ids=["2d", "3d"])


def labels(size):
    """Two boxes of class 1 and 2 that touch, one of class 3 apart; background around."""
    y = torch.zeros(1, 1, *size, dtype=torch.long)
    y[..., 3:6, 3:8], y[..., 6:8, 3:8], y[..., 3:7, -3:-1] = 1, 2, 3
    return y.repeat(6, *[1] * (y.ndim - 1))


def encoded(y, encoding):
    return 2 * encoding.encode_labels(y) - 1


def decoded(x, encoding):
    return encoding.decode((x + 1) / 2).argmax(1, keepdim=True)


@kinds
@encodings
@sizes
def test_every_voxel_has_the_code_of_one_class_and_something_changed(kind, encoding, size):
    y = labels(size)
    x = encoded(y, encoding)
    copy = x.clone()
    found = Corruption(kind, encoding)(x)
    assert torch.equal(x, copy)
    assert torch.equal(found, encoded(decoded(found, encoding), encoding))
    assert not torch.equal(found, x)


@kinds
def test_a_corruption_keeps_one_hot_sums(kind):
    encoding = MaskEncoding(4)
    found = Corruption(kind, encoding)(encoded(labels((16, 18)), encoding))
    assert torch.equal((found + 1).sum(1) / 2, torch.ones(6, 16, 18))


@sizes
def test_growing_stays_within_three_voxels_of_one_class(size):
    encoding, y = MaskEncoding(4), labels(size)
    found = decoded(Corruption("dilate", encoding)(encoded(y, encoding)), encoding)
    for old, new in zip(y[:, 0], found[:, 0], strict=True):
        classes = [k for k in (1, 2, 3) if not torch.equal(old == k, new == k)]
        near = [grow(old == k, 3) for k in classes]
        changed = old != new
        assert any((changed & ~mask).sum() == 0 for mask in near), "only around the class that grows or shrinks"


def test_growing_then_shrinking_a_box_gives_it_back():
    mask = torch.zeros(12, 12, dtype=torch.bool)
    mask[4:7, 5:8] = True
    assert grow(mask, 2).sum() == 49
    assert torch.equal(grow(grow(mask, 2), -2), mask)
    assert not grow(mask, -2).any()


def test_dropping_only_turns_voxels_of_one_class_into_background():
    encoding, y = MaskEncoding(4), labels((16, 18))
    found = decoded(Corruption("drop", encoding)(encoded(y, encoding)), encoding)
    for old, new in zip(y[:, 0], found[:, 0], strict=True):
        changed = old != new
        assert changed.any()
        assert (new[changed] == 0).all()
        assert len(old[changed].unique()) == 1


def test_only_neighbours_are_swapped():
    encoding, y = MaskEncoding(4), labels((16, 18))
    swapped = torch.where(y == 1, 2, torch.where(y == 2, 1, y))
    seen = set()
    for _ in range(5):
        found = decoded(Corruption("swap", encoding)(encoded(y, encoding)), encoding)
        for sample in found:
            seen.add("same" if torch.equal(sample, y[0]) else "swapped" if torch.equal(sample, swapped[0]) else "other")
    assert seen == {"same", "swapped"}, "class 3 touches nothing and stays"


@kinds
def test_unknown_voxels_stay_unknown_and_give_nothing(kind):
    encoding, y = MaskEncoding(4), labels((16, 18))
    known = torch.ones(6, 1, 16, 18)
    known[..., :5, :] = 0
    found = Corruption(kind, encoding)(encoded(y, encoding) * known)
    assert (found[..., :5, :] == 0).all()
    assert (found[..., 5:, :].abs() == 1).all()


@kinds
def test_an_image_without_foreground_stays(kind):
    x = encoded(torch.zeros(2, 1, 8, 8, dtype=torch.long), MaskEncoding(4))
    assert torch.equal(Corruption(kind, MaskEncoding(4))(x), x)


@kinds
def test_regions_change_one_at_a_time_and_may_overlap(kind):
    whole = torch.zeros(4, 1, 16, 18)
    whole[..., 3:12, 3:12] = 1
    inner = nn.functional.pad(whole[..., 5:9, 5:9], (5, 9, 5, 7))
    x = 2 * torch.cat([whole, inner], 1) - 1
    found = Corruption(kind, MaskEncoding(2), regions=True)(x)
    assert (found.abs() == 1).all()
    for old, new in zip(x, found, strict=True):
        if kind == "swap":
            assert torch.equal(new, old.flip(0))
        else:
            assert sum(not torch.equal(a, b) for a, b in zip(old, new, strict=True)) == 1


def test_none_is_no_corruption_and_an_unknown_one_is_named():
    assert make_corruption("none", MaskEncoding(3), False) is None
    made = make_corruption("drop", MaskEncoding(3), True)
    assert (made.kind, made.regions) == ("drop", True)
    with pytest.raises(ValueError, match="corruption is 'blur', expected one of none, dilate, drop, swap"):
        make_corruption("blur", MaskEncoding(3), False)
