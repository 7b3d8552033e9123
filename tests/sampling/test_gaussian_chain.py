"""Laws of the loop with a Gaussian process, and of its configuration."""

import dataclasses
import math

import pytest
import torch
from oracles import reverse_process

from nnunetv2_diffusion.diffusion import (
    SAMPLERS,
    SPACINGS,
    GaussianDiffusion,
    linear_beta_schedule,
    make_encoding,
)
from nnunetv2_diffusion.sampling import SamplingConfig

samplers = pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0)])


class Oracle:
    """Knows x_start and keeps what it was called with."""

    def __init__(self, x_start):
        self.x_start = x_start
        self.calls = []

    def __call__(self, x_t, t):
        self.calls.append((x_t, t))
        return self.x_start


class Noise:
    """Standard normal draws, all kept."""

    def __init__(self, like):
        self.like = like
        self.draws = []

    def __call__(self):
        self.draws.append(torch.randn_like(self.like))
        return self.draws[-1]


def random_mask(*shape):
    return torch.randint(0, 2, shape).float() * 2 - 1


def dyadic(*shape):
    """Random values in [-1, 1] that survive being made probabilities and back."""
    return torch.randint(-512, 513, shape) / 512


def step(process, sampler, eta, x_start, x_t, t, noise):
    if sampler == "ddpm":
        return process.ddpm_step(x_start, x_t, t, noise)
    return process.ddim_step(x_start, x_t, t, noise, eta)


# ---- the end of the chain


@samplers
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 11, 1001])
def test_an_oracle_network_returns_x_start_exactly_for_every_number_of_steps(trained, sampler, eta, spacing, steps):
    process = trained.respace(steps, spacing)
    oracle = Oracle(dyadic(2, 3, 4, 5))
    noise = Noise(oracle.x_start)
    results = list(reverse_process(process, oracle, torch.randn(2, 3, 4, 5), noise, sampler, eta))
    assert len(results) == len(oracle.calls) == steps
    assert torch.equal(results[-1], oracle.x_start)
    # what is yielded last is also what the reverse step at index 0 would return
    x_t, t = oracle.calls[-1]
    at_zero = step(process, sampler, eta, results[-1], x_t, torch.zeros_like(t), noise())
    assert torch.equal(at_zero, oracle.x_start)


@samplers
@pytest.mark.parametrize("steps", [2, 3, 5, 7, 11, 1001])
def test_with_an_oracle_the_state_before_the_last_step_is_x_start_up_to_the_first_beta(trained, sampler, eta, steps):
    x_start = random_mask(2, 3, 100)
    oracle = Oracle(x_start)
    list(reverse_process(trained.respace(steps), oracle, torch.randn_like(x_start), Noise(x_start), sampler, eta))
    distance = (oracle.calls[-1][0] - x_start).abs().max()
    assert 0 < distance < 6 * math.sqrt(1e-4)


@samplers
def test_with_an_oracle_every_state_has_the_moments_of_q(trained, sampler, eta):
    process, voxels = trained.respace(7), 200_000
    x_start = torch.full((1, 1, voxels), -1.0)
    start = process.q_sample(x_start, torch.tensor([6]), torch.randn_like(x_start))
    oracle = Oracle(x_start)
    list(reverse_process(process, oracle, start, Noise(x_start), sampler, eta))
    for x_t, t in oracle.calls:
        signal = trained.alphas_cumprod[t].item()
        mean, variance = x_t.double().mean().item(), x_t.double().var().item()
        assert abs(mean + math.sqrt(signal)) < 5 * math.sqrt((1 - signal) / voxels)
        assert abs(variance / (1 - signal) - 1) < 5 * math.sqrt(2 / voxels)


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5)])
def test_the_optimal_denoiser_of_a_coin_draws_fair_samples_of_that_coin(trained, sampler, eta):
    # x_start is +1 with probability 0.7, else -1; E[x_start | x_t] is known, so the chain has to draw this distribution
    heads, voxels = 0.7, 20_000

    def denoise(x_t, t):
        signal = trained.alphas_cumprod[t].reshape(-1, 1, 1)
        return torch.tanh(x_t * signal.sqrt() / (1 - signal) + 0.5 * math.log(heads / (1 - heads)))

    x_t = torch.randn(1, 1, voxels, dtype=torch.float64)
    *_, result = reverse_process(trained.respace(251), denoise, x_t, lambda: torch.randn_like(x_t), sampler, eta)
    assert (result.abs() > 0.99).double().mean() > 0.99  # decided
    assert (result > 0).double().mean().item() == pytest.approx(heads, abs=0.015)


@pytest.mark.parametrize("name", ["one-hot", "analog-bits"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("classes", [2, 3, 104])
def test_a_chain_with_an_oracle_ends_at_its_labels(name, sampler, classes):
    encoding, labels = make_encoding(name, classes), torch.randint(classes, (2, 1, 6, 7))
    code = encoding.encode_labels(labels)
    process = GaussianDiffusion(linear_beta_schedule(50)).respace(5)
    seen = []

    def oracle(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(x_t)
        return 2 * code - 1

    noise = torch.randn_like(code)
    *_, last = reverse_process(process, oracle, noise, lambda: torch.randn_like(code), sampler)
    assert torch.equal(encoding.decode((last + 1) / 2).argmax(1, keepdim=True), labels)
    assert (seen[-1] - (2 * code - 1)).abs().mean() < 0.5  # the last state is near its mask already


# ---- what the network and the noise source are asked


@samplers
@pytest.mark.parametrize(
    ("steps", "expected"), [(1, [1000]), (2, [1000, 0]), (5, [1000, 750, 500, 250, 0]), (7, None), (1001, None)]
)
def test_the_network_is_told_the_training_index_not_the_respaced_one(trained, sampler, eta, steps, expected):
    process = trained.respace(steps)
    oracle = Oracle(torch.zeros(3, 2, 4))
    list(reverse_process(process, oracle, torch.randn(3, 2, 4), Noise(oracle.x_start), sampler, eta))
    if expected is None:
        expected = process.timestep_map.flip(0).tolist()
    assert [t.tolist() for _, t in oracle.calls] == [[index] * 3 for index in expected]
    assert all(t.dtype == torch.long for _, t in oracle.calls)


@samplers
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_noise_is_drawn_in_every_step_but_the_last_if_it_has_an_effect(trained, sampler, eta, steps):
    oracle = Oracle(torch.zeros(1, 1, 4))
    noise = Noise(oracle.x_start)
    list(reverse_process(trained.respace(steps), oracle, torch.randn(1, 1, 4), noise, sampler, eta))
    assert len(noise.draws) == (0 if sampler == "ddim" and eta == 0 else steps - 1)


@samplers
def test_states_are_those_of_single_steps_of_the_respaced_chain(trained, sampler, eta):
    process = trained.respace(5)
    estimates = [dyadic(2, 3, 6) for _ in range(5)]
    states = []

    def predict(x_t, t):
        states.append(x_t)
        return estimates[len(states) - 1]

    x_t = torch.randn(2, 3, 6)
    noise = Noise(x_t)
    results = list(reverse_process(process, predict, x_t, noise, sampler, eta))
    assert all(torch.equal(result, estimate) for result, estimate in zip(results, estimates, strict=True))
    assert torch.equal(states[0], x_t)
    for i in range(4):
        drawn = noise.draws[i] if noise.draws else None
        t = torch.full((2,), 4 - i)
        assert torch.equal(states[i + 1], step(process, sampler, eta, estimates[i], states[i], t, drawn))


def test_ddim_without_eta_is_deterministic_and_ddpm_is_not(trained):
    process, x_t = trained.respace(5), torch.randn(1, 2, 50)

    def run(sampler):
        # an estimate that depends on the state, so that noise would show in the result
        return list(reverse_process(process, lambda x, t: torch.tanh(3 * x), x_t, Noise(x_t), sampler))[-1]

    assert torch.equal(run("ddim"), run("ddim"))
    assert not torch.equal(run("ddpm"), run("ddpm"))


def test_every_estimate_is_yielded_before_the_next_is_asked_for(trained):
    oracle = Oracle(torch.zeros(1, 1, 4))
    chain = reverse_process(trained.respace(3), oracle, torch.randn(1, 1, 4), Noise(oracle.x_start))
    for expected in (1, 2, 3):
        next(chain)
        assert len(oracle.calls) == expected
    assert next(chain, "end") == "end"


def test_an_unknown_sampler_is_an_error_that_names_the_known_ones(trained):
    oracle = Oracle(torch.zeros(1, 1, 4))
    with pytest.raises(ValueError, match=r"sampler is 'euler', expected one of ddpm, ddim"):
        list(reverse_process(trained.respace(2), oracle, torch.randn(1, 1, 4), Noise(oracle.x_start), "euler"))


# ---- configuration


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("eta", [0, 0.5, 1])
def test_a_valid_configuration_is_kept_as_given_and_cannot_be_changed(sampler, eta):
    config = SamplingConfig(5, sampler, eta, samples=3, seed=-7, step_spacing="trailing")
    assert dataclasses.astuple(config) == (5, sampler, eta, 3, -7, "trailing")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 4


def test_defaults_are_one_ddpm_sample():
    assert dataclasses.astuple(SamplingConfig(1)) == (1, "ddpm", 0.0, 1, 0, "linspace")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("sampler", "euler", "one of ddpm, ddim"),
        ("step_spacing", "leading", "one of linspace, trailing"),
        ("sampler", "DDPM", "one of ddpm, ddim"),
        ("steps", 0, "an integer of at least 1"),
        ("steps", -5, "an integer of at least 1"),
        ("steps", 2.5, "an integer of at least 1"),
        ("samples", 0, "an integer of at least 1"),
        ("samples", 1.5, "an integer of at least 1"),
        ("eta", -0.01, r"a number in \[0, 1\]"),
        ("eta", 1.01, r"a number in \[0, 1\]"),
        ("eta", float("nan"), r"a number in \[0, 1\]"),
    ],
)
def test_a_bad_field_is_an_error_that_names_it_what_was_found_and_what_was_expected(field, value, expected):
    with pytest.raises(ValueError, match=rf"^{field} is {value!r}, expected {expected}$"):
        SamplingConfig(**{"steps": 5, field: value})
