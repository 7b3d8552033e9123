"""Which mirrored views a chain sees, and when."""

import pytest
import torch

from nnunetv2_diffusion.sampling.views import count_passes, interleave, mirror, mirror_views, schedules

EIGHT = mirror_views((0, 1, 2))


def test_the_views_are_those_of_nnunets_mirroring():
    assert mirror_views(None) == [()]
    assert mirror_views((1,)) == [(), (1,)]
    assert len(EIGHT) == len(set(EIGHT)) == 8
    assert EIGHT[0] == ()


@pytest.mark.parametrize("view", EIGHT)
def test_mirroring_twice_gives_the_tile_back(view):
    x = torch.randn(1, 2, 3, 4, 5)
    assert torch.equal(mirror(mirror(x, view), view), x)
    assert torch.equal(mirror(x, view), torch.flip(x, [a + 2 for a in view]))


@pytest.mark.parametrize("steps", [1, 2, 5, 7, 8, 9, 20])
def test_interleaving_sees_every_view_in_as_few_passes_as_possible(steps):
    schedule = interleave(EIGHT, steps)
    assert len(schedule) == steps
    assert all(schedule)
    assert {view for views in schedule for view in views} == set(EIGHT)
    assert count_passes([schedule]) == max(8, steps)


@pytest.mark.parametrize(("tta", "passes"), [("none", 5), ("full", 40), ("interleaved", 8)])
def test_passes_of_a_tile(tta, passes):
    assert count_passes(schedules(tta, EIGHT, 5)) == passes


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="tta is 'some', expected one of full, interleaved, none"):
        schedules("some", EIGHT, 2)
