"""Laws of processes given by signal and spread, and of rectified flow."""

import pytest
import torch
from learning import learn

from nnunetv2_diffusion.diffusion import GaussianDiffusion, GaussianProcess, linear_beta_schedule
from nnunetv2_diffusion.methods.flow import FlowTrainer
from nnunetv2_diffusion.sampling import Estimator, GaussianChain, NoiseByContent, SamplingConfig, run_chain
from nnunetv2_diffusion.settings import DiffusionSettings


@pytest.fixture(scope="module")
def flow():
    return FlowTrainer.build_process(DiffusionSettings())


# ---- any process


def test_a_process_by_signal_and_spread_is_that_of_its_betas():
    given = GaussianDiffusion(linear_beta_schedule(1001))
    found = GaussianProcess(given.alphas_cumprod.sqrt(), (1 - given.alphas_cumprod).sqrt())
    x, x_t, noise = torch.randn(3, 4, 2, 5, dtype=torch.float64)
    for t in ([0, 1, 500, 1000], [999, 3, 0, 7]):
        t = torch.tensor(t)
        torch.testing.assert_close(found.q_sample(x, t, noise), given.q_sample(x, t, noise))
        torch.testing.assert_close(found.ddpm_step(x, x_t, t, noise), given.ddpm_step(x, x_t, t, noise))
        torch.testing.assert_close(found.ddim_step(x, x_t, t, noise, 0.5), given.ddim_step(x, x_t, t, noise, 0.5))
    short, expected = found.respace(5, "trailing"), given.respace(5, "trailing")
    assert torch.equal(short.timestep_map, expected.timestep_map)
    torch.testing.assert_close(short.posterior_variance, expected.posterior_variance)


@pytest.mark.parametrize("t", [0, 1, 500, 998, 999])
def test_the_posterior_is_exact_bayes(flow, t):
    # x_{t-1} and x_t are jointly normal given x_start; condition the former on the latter
    x_start, x_t = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([[-1.1]], dtype=torch.float64)
    a, s = flow.signal_prev[t], flow.spread_prev[t]
    kept = flow.signal[t] / a
    added = flow.spread[t] ** 2 - kept**2 * s**2
    joint = kept * s**2 / (kept**2 * s**2 + added)
    mean = a * 0.3 + joint * (-1.1 - kept * a * 0.3)
    variance = s**2 - joint * kept * s**2
    found_mean, found_variance = flow.q_posterior(x_start, x_t, torch.tensor([t]))
    torch.testing.assert_close(found_mean[0, 0], mean)
    torch.testing.assert_close(found_variance[0, 0], variance, atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize(
    ("signal", "spread", "match"),
    [
        ([1.0, 0.5], [0.1], "shape"),
        ([], [], "shape"),
        ([0.0, 0.5], [0.1, 0.2], "above 0"),
        ([0.5, 0.4], [0.5, 0.1], "negative variance"),
    ],
)
def test_what_is_no_process_is_refused(signal, spread, match):
    with pytest.raises(ValueError, match=match):
        GaussianProcess(torch.tensor(signal), torch.tensor(spread))


# ---- the straight line


def test_the_line_goes_from_the_mask_to_pure_noise(flow):
    x, noise = torch.randn(2, 1, 1, 50, dtype=torch.float64)
    assert torch.equal(flow.q_sample(x, torch.tensor([999]), noise), noise)
    s = 251 / 1000
    torch.testing.assert_close(flow.q_sample(x, torch.tensor([250]), noise), (1 - s) * x + s * noise)


def test_ddim_is_eulers_step_along_the_velocity(flow):
    short = flow.respace(4, "trailing")
    x_start, x_t = torch.randn(2, 1, 1, 50, dtype=torch.float64)
    velocity = (x_t - x_start) / 0.75
    found = short.ddim_step(x_start, x_t, torch.tensor([2]))
    torch.testing.assert_close(found, x_t - 0.25 * velocity)


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_the_true_velocity_leads_along_the_line_in_any_number_of_steps(flow, steps):
    short = flow.respace(steps, "trailing")
    x_start, noise = torch.randn(2, 1, 1, 50, dtype=torch.float64)
    state = noise
    for index in reversed(range(steps)):
        expected = (1 - (index + 1) / steps) * x_start + (index + 1) / steps * noise
        torch.testing.assert_close(state, expected)
        state = short.ddim_step(x_start, state, torch.tensor([index]))
    torch.testing.assert_close(state, x_start)


# ---- the trainer


def test_the_network_predicts_by_the_flow(make):
    network = make(FlowTrainer, flow={"steps": 3}).network.eval()
    network.decoder.deep_supervision = False
    assert network.sampling == SamplingConfig(3, "ddim", step_spacing="trailing")
    chain = network.make_chain(network.sampling)
    assert isinstance(chain, GaussianChain)
    image = torch.randn(2, 1, 8, 12, 8)
    noise = NoiseByContent([1, 2], 0, 0, (3, 8, 12, 8), image.device)
    with torch.inference_mode():
        steps = list(run_chain(chain, Estimator(chain, image), [[()]] * 3, noise))
    estimate = 2 * steps[0].answer - 1
    torch.testing.assert_close(steps[1].state, 0.667 * steps[0].state + 0.333 * estimate)


def test_a_training_learns_and_reads_no_setting_of_other_processes(make):
    trainer = make(FlowTrainer, num_epochs=1, num_iterations_per_epoch=60, time_sampling="importance")
    assert not trainer.time_sampler.learns
    losses = learn(trainer, 60)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert not {"timesteps", "sampler", "step_spacing"} & FlowTrainer.reads()
