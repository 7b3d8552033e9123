"""Laws of the recipes and of their learning rate."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from nnunetv2_diffusion.settings import DiffusionSettings, SettingsError
from nnunetv2_diffusion.training.recipes import RECIPES, WarmupCosine, paper_optimizer


def make(iterations: int = 250, epochs: int = 50, **kwargs) -> WarmupCosine:
    return WarmupCosine(paper_optimizer([nn.Parameter(torch.zeros(1))]), iterations, epochs, **kwargs)


def rate_of(schedule: WarmupCosine) -> float:
    (group,) = schedule.optimizer.param_groups
    return group["lr"]


def test_rate_starts_peaks_and_ends_as_in_the_paper():
    schedule = make()
    assert schedule.rate(0) == pytest.approx(1e-5)
    assert schedule.rate(100) == pytest.approx(8e-4)
    assert schedule.rate(250 * 50) == pytest.approx(5e-5)


@pytest.mark.parametrize("step", [1, 37, 50, 99])
def test_warm_up_is_linear(step):
    assert make().rate(step) == pytest.approx(1e-5 + (8e-4 - 1e-5) * step / 100)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_decay_is_half_a_cosine(share):
    schedule = make(iterations=110, epochs=100)
    step = 100 + round(share * (11000 - 100))
    expected = 5e-5 + (8e-4 - 5e-5) * 0.5 * (1 + math.cos(math.pi * share))
    assert schedule.rate(step) == pytest.approx(expected, rel=1e-3)


def test_rate_rises_to_one_peak_then_falls_without_jumps():
    rates = [make(iterations=50, epochs=20).rate(step) for step in range(1000)]
    peak = rates.index(max(rates))
    assert peak == 100
    assert all(a < b for a, b in pairwise(rates[: peak + 1]))
    assert all(a > b for a, b in pairwise(rates[peak:]))
    assert max(abs(a - b) for a, b in pairwise(rates)) <= (8e-4 - 1e-5) / 100 * 1.001


@pytest.mark.parametrize("step", [12_500, 12_501, 10**6])
def test_rate_stays_at_the_end_beyond_the_last_step(step):
    assert make().rate(step) == pytest.approx(5e-5)


@pytest.mark.parametrize(("iterations", "epochs"), [(1, 1), (10, 1), (50, 2), (1, 100)])
def test_a_training_shorter_than_the_warm_up_rises_to_the_peak(iterations, epochs):
    schedule = make(iterations=iterations, epochs=epochs)
    rates = [schedule.rate(step) for step in range(iterations * epochs + 1)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[-1] == pytest.approx(8e-4)
    assert all(1e-5 <= rate <= 8e-4 * (1 + 1e-12) for rate in rates)
    assert all(a < b for a, b in pairwise(rates))


def test_rate_follows_from_epoch_and_iteration_alone():
    """A training that is continued, or that repeats an epoch, finds the same rates."""
    whole = make(iterations=30, epochs=10)
    rates = {}
    for epoch in range(10):
        for iteration in range(30):
            whole.step(epoch, iteration)
            rates[epoch, iteration] = rate_of(whole)
    assert len(set(rates.values())) > 290
    continued = make(iterations=30, epochs=10)
    for epoch, iteration in [(7, 0), (7, 1), (9, 29), (2, 5), (0, 0)]:
        continued.step(epoch, iteration)
        assert rate_of(continued) == rates[epoch, iteration] == whole.rate(30 * epoch + iteration)


def test_a_step_with_the_epoch_alone_is_its_first_iteration():
    schedule = make(iterations=30, epochs=10)
    schedule.step(4)
    assert rate_of(schedule) == schedule.rate(120)


def test_rate_is_set_for_all_groups_of_parameters():
    a, b = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 2.0}])
    schedule = WarmupCosine(optimizer, 10, 100)
    schedule.step(5)
    assert [group["lr"] for group in optimizer.param_groups] == [schedule.rate(50)] * 2


def test_optimizer_of_the_paper_is_adamw_with_its_numbers():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = paper_optimizer([parameter])
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert optimizer.defaults["weight_decay"] == 1e-8
    assert optimizer.param_groups[0]["params"] == [parameter]


def test_recipes_are_the_ones_that_settings_know():
    for name in RECIPES:
        assert DiffusionSettings(recipe=name).recipe == name
    with pytest.raises(SettingsError, match=f"one of {', '.join(RECIPES)}"):
        DiffusionSettings(recipe="other")


def test_recipe_of_the_paper_has_its_numbers():
    paper = RECIPES["paper"]
    assert (paper.gradient_clip, paper.weight_ce) == (1, 20)
    assert not paper.deep_supervision
    assert not paper.host_optimizer


def test_recipe_of_nnunet_has_the_hosts_numbers():
    host = RECIPES["nnunet"]
    assert (host.gradient_clip, host.weight_ce) == (12, 1)
    assert host.deep_supervision
    assert host.host_optimizer
