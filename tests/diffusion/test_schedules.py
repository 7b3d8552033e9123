"""Laws of variance schedules."""

import math

import pytest
import torch

from nnunetv2_diffusion.diffusion import cosine_beta_schedule, linear_beta_schedule


@pytest.mark.parametrize(("steps", "start", "end"), [(1001, 1e-4, 0.02), (2, 0.1, 0.9), (7, 0.05, 0.05)])
def test_linear_betas_are_evenly_spaced_with_both_ends(steps, start, end):
    expected = [start + (end - start) * i / (steps - 1) for i in range(steps)]
    betas = linear_beta_schedule(steps, start, end)
    assert betas.shape == (steps,)
    torch.testing.assert_close(betas, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)
    assert betas[0] == start
    assert betas[-1] == end


def test_linear_betas_are_float64_whatever_the_default_dtype():
    torch.set_default_dtype(torch.float16)
    try:
        betas = linear_beta_schedule(10)
    finally:
        torch.set_default_dtype(torch.float32)
    assert betas.dtype == torch.float64
    assert betas[0] == 1e-4


def test_default_betas_match_the_reference(golden):
    reference = golden("imgx_schedules_T1001")
    betas = linear_beta_schedule(1001)
    torch.testing.assert_close(betas, reference["linear64__betas"], rtol=1e-12, atol=0)
    torch.testing.assert_close(betas.float(), reference["linear__betas"], rtol=1e-6, atol=0)


def test_a_schedule_of_one_step_is_its_first_beta():
    assert linear_beta_schedule(1, 0.3, 0.4).tolist() == [0.3]


@pytest.mark.parametrize("schedule", [linear_beta_schedule, cosine_beta_schedule])
@pytest.mark.parametrize("steps", [0, -3])
def test_a_schedule_without_steps_is_an_error_with_the_number_found(schedule, steps):
    with pytest.raises(ValueError, match=rf"num_timesteps must be at least 1, got {steps}"):
        schedule(steps)


@pytest.mark.parametrize(
    ("start", "end"), [(0.0, 0.1), (-0.1, 0.1), (0.2, 0.1), (0.1, 1.0), (float("nan"), 0.1), (0.1, float("nan"))]
)
def test_betas_that_are_no_rising_variances_are_an_error_with_the_values_found(start, end):
    with pytest.raises(ValueError, match=rf"0 < beta_start <= beta_end < 1, got {start} and {end}"):
        linear_beta_schedule(10, start, end)


@pytest.mark.parametrize("steps", [10, 1000])
def test_cosine_betas_match_the_reference(golden, steps):
    reference = golden("hidiff_schedule")
    betas = cosine_beta_schedule(steps)
    torch.testing.assert_close(betas, reference[f"cosine2_T{steps}_betas"], rtol=1e-10, atol=1e-14)
    products = torch.cumprod(1 - betas, 0)
    torch.testing.assert_close(products, reference[f"cosine2_T{steps}_alphas_cumprod"], rtol=1e-10, atol=0)
    # the closed form differs at the clipped last step only
    torch.testing.assert_close(products[:-1], reference[f"paper_alphabar_T{steps}"][1:-1], rtol=1e-10, atol=0)


@pytest.mark.parametrize(("steps", "s"), [(10, 0.008), (7, 0.0), (25, 0.3)])
def test_cosine_betas_leave_a_squared_cosine_of_the_signal(steps, s):
    products = torch.cumprod(1 - cosine_beta_schedule(steps, s), 0)
    start = math.cos(s / (1 + s) * math.pi / 2) ** 2
    for n in range(1, steps):
        expected = math.cos((n / steps + s) / (1 + s) * math.pi / 2) ** 2 / start
        assert products[n - 1].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("max_beta", [0.999, 0.5])
def test_cosine_betas_rise_up_to_their_bound(max_beta):
    betas = cosine_beta_schedule(10, max_beta=max_beta)
    assert betas.dtype == torch.float64
    assert betas.shape == (10,)
    assert betas.min() > 0
    assert bool((betas.diff() >= 0).all())
    assert betas[-1] == max_beta
    unclipped = cosine_beta_schedule(10)
    assert torch.equal(betas, unclipped.clamp(max=max_beta))


def test_a_cosine_schedule_of_one_step_is_its_bound():
    assert cosine_beta_schedule(1).tolist() == [0.999]


@pytest.mark.parametrize("s", [-0.1, math.inf, math.nan])
def test_a_bad_offset_is_an_error_with_the_value_found(s):
    with pytest.raises(ValueError, match=rf"s must be at least 0 and finite, got {s}"):
        cosine_beta_schedule(10, s=s)


@pytest.mark.parametrize("max_beta", [0.0, 1.0, -1.0, math.nan])
def test_a_bound_of_betas_that_is_no_variance_is_an_error_with_the_value_found(max_beta):
    with pytest.raises(ValueError, match=rf"max_beta must be in \(0, 1\), got {max_beta}"):
        cosine_beta_schedule(10, max_beta=max_beta)
