"""Laws of the loop with a Bernoulli process."""

import math

import pytest
import torch
from oracles import bernoulli_reverse_process

from nnunetv2_diffusion.diffusion import SAMPLERS, BernoulliDiffusion, cosine_beta_schedule

samplers = pytest.mark.parametrize("sampler", SAMPLERS)
steps_kept = pytest.mark.parametrize("steps", range(1, 11))


@pytest.fixture(scope="module")
def paper() -> BernoulliDiffusion:
    """T = 10, cosine."""
    return BernoulliDiffusion(cosine_beta_schedule(10))


class Network:
    """Keeps what it was called with and answers with a function of (y_t, t)."""

    def __init__(self, eps):
        self.eps = eps
        self.calls = []

    def __call__(self, y_t, t):
        self.calls.append((y_t, t))
        return self.eps(y_t, t)


class Uniform:
    """Uniform draws of one shape, all kept."""

    def __init__(self, like):
        self.like = like
        self.draws = []

    def __call__(self):
        self.draws.append(torch.rand(self.like.shape))
        return self.draws[-1]


def oracle(y_start):
    return Network(lambda y_t, t: (y_t - y_start).abs())


def random_mask(*shape):
    return torch.randint(0, 2, shape).float()


def run(process, network, prior, sampler, uniform=None):
    return list(bernoulli_reverse_process(process, network, prior, uniform or Uniform(prior), sampler))


# ---- the end of the chain


@samplers
@steps_kept
@pytest.mark.parametrize("channels", [1, 3])
def test_an_oracle_network_returns_y_start_exactly_for_every_number_of_steps(paper, sampler, steps, channels):
    y_start = random_mask(2, channels, 4, 5, 6)
    network = oracle(y_start)
    results = run(paper.respace(steps), network, torch.rand_like(y_start), sampler)
    assert len(results) == len(network.calls) == steps
    assert all(torch.equal(result, y_start) for result in results)


@samplers
@pytest.mark.parametrize("steps", [2, 5, 10])
def test_with_an_oracle_every_state_has_the_mean_of_q(paper, sampler, steps):
    voxels, prior_value = 100_000, 0.4
    for value in (0.0, 1.0):
        y_start = torch.full((1, 1, voxels), value)
        network = oracle(y_start)
        run(paper.respace(steps), network, torch.full_like(y_start, prior_value), sampler)
        for y_t, t in network.calls:
            signal = paper.alphas_cumprod[t].item()
            mean = signal * value + (1 - signal) * prior_value
            error = abs(y_t.double().mean().item() - mean)
            assert error < 5 * math.sqrt(mean * (1 - mean) / voxels) + 3e-5


@samplers
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_saturated_prior_and_an_oracle_that_contradicts_it_end_at_y_start(paper, sampler, value):
    y_start = torch.full((1, 2, 50), 1 - value)
    results = run(paper, oracle(y_start), torch.full_like(y_start, value), sampler)
    assert torch.equal(results[-1], y_start)


@steps_kept
def test_without_noise_ddim_keeps_the_state(paper, steps):
    network = Network(lambda y_t, t: torch.zeros_like(y_t))
    results = run(paper.respace(steps), network, torch.rand(1, 2, 200), "ddim")
    assert all(torch.equal(y_t, network.calls[0][0]) for y_t, _ in network.calls)
    assert all(torch.equal(result, network.calls[0][0]) for result in results)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_the_optimal_network_of_a_coin_draws_that_coin_with_ddim(paper, steps):
    # y_start is 1 with probability 0.7 whatever the prior says: P(y_t != y_start | y_t) is known
    heads, prior, voxels = 0.7, 0.2, 100_000

    def eps(y_t, t):
        signal = paper.alphas_cumprod[t].reshape(-1, 1, 1)
        like_one = torch.where(y_t == 1, signal + (1 - signal) * prior, (1 - signal) * (1 - prior))
        like_zero = torch.where(y_t == 1, (1 - signal) * prior, signal + (1 - signal) * (1 - prior))
        one = heads * like_one / (heads * like_one + (1 - heads) * like_zero)
        return torch.where(y_t == 1, 1 - one, one)

    results = run(paper.respace(steps), Network(eps), torch.full((1, 1, voxels), prior), "ddim")
    assert results[-1].mean().item() == pytest.approx(heads, abs=5 * math.sqrt(0.21 / voxels))


# ---- what the network and the source of randomness are asked


@samplers
@pytest.mark.parametrize(
    ("steps", "expected"), [(1, [9]), (2, [9, 0]), (5, [9, 7, 4, 2, 0]), (10, list(range(9, -1, -1)))]
)
def test_the_network_is_told_the_training_index_not_the_respaced_one(paper, sampler, steps, expected):
    network = oracle(random_mask(3, 2, 4))
    run(paper.respace(steps), network, torch.rand(3, 2, 4), sampler)
    assert [t.tolist() for _, t in network.calls] == [[index] * 3 for index in expected]
    assert all(t.dtype == torch.long for _, t in network.calls)


@samplers
@steps_kept
def test_the_last_step_needs_no_draw(paper, sampler, steps):
    uniform = Uniform(torch.rand(1, 1, 4))
    run(paper.respace(steps), oracle(random_mask(1, 1, 4)), torch.rand(1, 1, 4), sampler, uniform)
    assert len(uniform.draws) == steps  # the first one for the start


@samplers
def test_states_are_draws_of_single_steps_of_the_respaced_chain(paper, sampler):
    process, prior = paper.respace(5), torch.rand(2, 3, 40)
    uniform = Uniform(prior)
    answers = [torch.rand(2, 3, 40) for _ in range(5)]
    network = Network(lambda y_t, t: answers[len(network.calls) - 1])
    results = run(process, network, prior, sampler, uniform)
    means = {"ddpm": process.p_mean, "ddim": process.ddim_mean}
    for i, (y_t, _) in enumerate(network.calls):
        assert torch.equal(results[i], torch.where(y_t == 1, 1 - answers[i], answers[i]))
        assert bool(((y_t == 0) | (y_t == 1)).all())
        if i < 4:
            mean = means[sampler](answers[i], y_t, prior, torch.full((2,), 4 - i))
            assert torch.equal(network.calls[i + 1][0], (uniform.draws[i + 1] < mean).float())


def test_every_estimate_is_yielded_before_the_next_is_asked_for(paper):
    network, prior = oracle(random_mask(1, 1, 4)), torch.rand(1, 1, 4)
    chain = bernoulli_reverse_process(paper.respace(3), network, prior, Uniform(prior))
    for expected in (1, 2, 3):
        next(chain)
        assert len(network.calls) == expected
    assert next(chain, "end") == "end"


def test_ddpm_is_the_default(paper):
    prior = torch.rand(1, 2, 100)
    results = []
    for options in ({}, {"sampler": "ddpm"}, {"sampler": "ddim"}):
        torch.manual_seed(3)
        network = Network(lambda y_t, t: 0.3 * y_t + 0.1)
        chain = bernoulli_reverse_process(paper, network, prior, Uniform(prior), **options)
        results.append(list(chain)[-1])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@samplers
def test_a_network_under_autocast_may_answer_in_half_precision(paper, sampler):
    prior = torch.rand(2, 2, 50)
    network = Network(lambda y_t, t: torch.full_like(y_t, 0.25).half())
    results = run(paper, network, prior, sampler)
    assert all(result.dtype == torch.float32 for result in results)
    assert all(y_t.dtype == torch.float32 for y_t, _ in network.calls)


def test_an_unknown_sampler_is_an_error_that_names_the_known_ones(paper):
    with pytest.raises(ValueError, match=r"sampler is 'euler', expected one of ddpm, ddim"):
        run(paper, oracle(random_mask(1, 1, 4)), torch.rand(1, 1, 4), "euler")


# ---- golden values


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_whole_chains_match_the_reference(paper, golden, sampler):
    g = golden("hidiff_traj_T10")
    prior, uniforms = g["prior"], iter(g["uniforms"])

    def eps(y, t):
        logits = 3.4 * (y - 0.5) - 9.2 * (prior - 0.5) * (y - 0.5) - 0.1 * t.reshape(-1, 1, 1, 1) - 0.4
        return logits.sigmoid()

    network = Network(eps)
    results = list(bernoulli_reverse_process(paper, network, prior, lambda: next(uniforms), sampler))
    expected = g[f"{sampler}_samples"]
    for i, result in enumerate(results):
        torch.testing.assert_close(result, g[f"{sampler}_pred_y0"][i], rtol=0, atol=1e-6)
        if i:
            assert torch.equal(network.calls[i][0], expected[i - 1])
    torch.testing.assert_close(results[-1], expected[-1], rtol=0, atol=1e-6)
    assert torch.equal(results[-1].argmax(1), g[f"{sampler}_final_argmax"])
    assert [int(t[0]) for _, t in network.calls] == g["timestep_map"].flip(0).tolist()
