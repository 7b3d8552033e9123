"""Laws of variance schedules."""

import pytest
import torch

from nnunetv2_diffusion.diffusion import linear_beta_schedule


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


@pytest.mark.parametrize("steps", [0, -3])
def test_a_schedule_without_steps_is_an_error_with_the_number_found(steps):
    with pytest.raises(ValueError, match=rf"num_timesteps must be at least 1, got {steps}"):
        linear_beta_schedule(steps)


@pytest.mark.parametrize(
    ("start", "end"), [(0.0, 0.1), (-0.1, 0.1), (0.2, 0.1), (0.1, 1.0), (float("nan"), 0.1), (0.1, float("nan"))]
)
def test_betas_that_are_no_rising_variances_are_an_error_with_the_values_found(start, end):
    with pytest.raises(ValueError, match=rf"0 < beta_start <= beta_end < 1, got {start} and {end}"):
        linear_beta_schedule(10, start, end)
