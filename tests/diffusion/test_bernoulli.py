"""Laws of the Bernoulli process. Expectations are computed here from the betas alone, in float64."""

import itertools
import math

import pytest
import torch

from nnunetv2_diffusion.diffusion import BernoulliDiffusion, GaussianDiffusion, cosine_beta_schedule

SHORT_BETAS = (0.05, 0.2, 0.1, 0.5, 0.7, 0.9)
# T of the paper's schedule or "short", and K of the respaced chain (None: not respaced)
CHAINS = [(1, None), ("short", None), ("short", 1), ("short", 4), (10, None), (10, 1), (10, 3), (10, 5), (1000, 10)]
chains = pytest.mark.parametrize("chain", CHAINS, ids=lambda c: f"T{c[0]}-K{c[1]}")


def build(chain) -> BernoulliDiffusion:
    length, kept = chain
    betas = torch.tensor(SHORT_BETAS, dtype=torch.float64) if length == "short" else cosine_beta_schedule(length)
    process = BernoulliDiffusion(betas)
    return process if kept is None else process.respace(kept)


@pytest.fixture(scope="module")
def paper() -> BernoulliDiffusion:
    """T = 10, cosine."""
    return build((10, None))


def cases(process, size=40):
    """Every t with every (y_start, y_t) and random priors: y_start, y_t, prior (T, 4, size) in float64, and t."""
    t = torch.arange(process.num_timesteps)
    pairs = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2)), dtype=torch.float64)
    y_start, y_t = pairs.T[:, None, :, None].expand(2, len(t), 4, size)
    return y_start, y_t, torch.rand(len(t), 4, size, dtype=torch.float64) * 0.98 + 0.01, t


def step_kernel(beta, y, prior):
    """P(y_t = 1 | y_{t-1} = y)."""
    return (1 - beta) * y + beta * prior


def marginals(process, y_start, prior) -> list[torch.Tensor]:
    """P(y = 1) before the first step and after each one, by running single steps, for each entry of one t."""
    states = [y_start.clone()]
    for beta in process.betas.tolist():
        states.append(step_kernel(beta, states[-1], prior))  # the kernel is linear in y_{t-1}
    return states


def bayes(process, y_start, y_t, prior, index):
    """P(y_{t-1} = 1 | y_t, y_start) by enumerating y_{t-1}."""
    before = marginals(process, y_start, prior)[index]
    joint = []
    for value in (0.0, 1.0):
        one = step_kernel(process.betas[index].item(), torch.full_like(prior, value), prior)
        weight = before if value else 1 - before
        joint.append(weight * torch.where(y_t == 1, one, 1 - one))
    return joint[1] / (joint[0] + joint[1])


def close(actual, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def golden_math(golden) -> dict[str, torch.Tensor]:
    return golden("hidiff_math_T10_C3")


# ---- forward


@chains
def test_q_mean_is_that_of_a_chain_of_single_steps(chain):
    process = build(chain)
    y_start, _, prior, t = cases(process)
    actual = process.q_mean(y_start, prior, t)
    for index in t.tolist():
        close(actual[index], marginals(process, y_start[index], prior[index])[index + 1])


@chains
def test_the_xor_form_has_the_mean_of_the_direct_form(chain):
    process = build(chain)
    y_start, _, prior, t = cases(process)
    flipped = process.noise_probability(y_start, prior, t)
    close(y_start * (1 - flipped) + (1 - y_start) * flipped, process.q_mean(y_start, prior, t))


@chains
def test_q_sample_is_binary_and_has_the_mean_of_q(chain):
    process, draws = build(chain), 10_000
    y_start, _, prior, t = cases(process, 1)
    grid = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws  # stratified uniform numbers: no chance involved
    y_start, prior, uniform = (x.expand(len(t), 4, draws) for x in (y_start, prior, grid))
    y_t = process.q_sample(y_start, prior, t, uniform)
    assert bool(((y_t == 0) | (y_t == 1)).all())
    close(y_t.mean(2), process.q_mean(y_start, prior, t)[..., 0], rtol=0, atol=1 / draws)


def test_q_sample_flips_where_the_uniform_number_is_below_the_noise_probability(paper):
    y_start, _, prior, t = cases(paper)
    probability = paper.noise_probability(y_start, prior, t)
    below, above = probability * (1 - 1e-9), probability * (1 + 1e-9)
    assert torch.equal(paper.q_sample(y_start, prior, t, below), 1 - y_start)
    assert torch.equal(paper.q_sample(y_start, prior, t, above), y_start)
    assert torch.equal(paper.q_sample(y_start, prior, t, probability), y_start)  # uniform is in [0, 1)


def test_a_prior_that_is_the_mask_adds_no_noise(paper):
    y_start = torch.randint(0, 2, (10, 3, 50)).float()
    y_t = paper.q_sample(y_start, y_start, torch.arange(10), torch.zeros(10, 3, 50))
    assert torch.equal(y_t, y_start)


def test_the_last_step_forgets_the_mask(paper):
    y_start, _, prior, _ = cases(paper)
    last = torch.full((10,), 9)
    assert (paper.q_mean(y_start, prior, last) - prior).abs().max() < 3e-5


# ---- posterior


@chains
def test_q_posterior_mean_is_exact_bayes(chain):
    process = build(chain)
    y_start, y_t, prior, t = cases(process)
    actual = process.q_posterior_mean(y_start, y_t, prior, t)
    for index in t.tolist():
        close(actual[index], bayes(process, y_start[index], y_t[index], prior[index], index))


@chains
def test_q_posterior_mean_at_index_0_is_a_binary_y_start(chain):
    process = build(chain)
    y_start, y_t, prior, t = cases(process)
    assert torch.equal(process.q_posterior_mean(y_start, y_t, prior, torch.zeros_like(t)), y_start)


def test_step_likelihood_is_the_kernel_of_one_step(paper):
    _, y_t, prior, t = cases(paper)
    beta = paper.betas.reshape(-1, 1, 1)
    for value, actual in enumerate(paper.step_likelihood(y_t, prior, t)):
        one = step_kernel(beta, float(value), prior)
        close(actual, torch.where(y_t == 1, one, 1 - one))


def test_previous_marginal_is_q_one_step_earlier_and_takes_the_complement_as_given(paper):
    y_start, _, prior, t = cases(paper)
    zero, one = paper.previous_marginal(y_start, 1 - y_start, prior, t)
    close(one[1:], paper.q_mean(y_start[1:], prior[1:], t[:-1]))
    close(zero[1:], paper.q_mean(1 - y_start[1:], 1 - prior[1:], t[:-1]))
    assert torch.equal(one[0], y_start[0])
    assert torch.equal(zero[0], 1 - y_start[0])
    tiny = torch.full_like(y_start, 1e-20)  # 1 - (1 - 1e-20) would be 0
    assert torch.equal(paper.previous_marginal(1 - tiny, tiny, prior, t)[0][0], tiny[0])


# ---- reverse steps


def true_eps(y_start, y_t):
    return (y_start != y_t).double()


REVERSE_MEANS = {
    "ddpm": BernoulliDiffusion.p_mean,
    "ddim": BernoulliDiffusion.ddim_mean,
}
reverse_means = pytest.mark.parametrize("reverse_mean", REVERSE_MEANS.values(), ids=REVERSE_MEANS)


@chains
@reverse_means
def test_steps_with_the_true_noise_keep_the_marginals_of_q(chain, reverse_mean):
    process = build(chain)
    y_start, y_t, prior, t = cases(process)
    probability = process.q_mean(y_start, prior, t)
    total = torch.zeros_like(prior)
    for value in (0.0, 1.0):
        y_t = torch.full_like(prior, value)
        weight = probability if value else 1 - probability
        total += weight * reverse_mean(process, true_eps(y_start, y_t), y_t, prior, t)
    for index in t.tolist():
        close(total[index], marginals(process, y_start[index], prior[index])[index])


@chains
@reverse_means
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_means_are_the_soft_estimate_exactly_at_index_0(chain, reverse_mean, dtype):
    process = build(chain)
    y_t, prior, eps = torch.randint(0, 2, (2, 3, 50)).to(dtype), *torch.rand(2, 2, 3, 50, dtype=dtype)
    actual = reverse_mean(process, eps, y_t, prior, torch.tensor([0, 0]))
    assert torch.equal(actual, torch.where(y_t == 1, 1 - eps, eps))


@chains
def test_ddim_mean_with_no_noise_is_the_state_exactly(chain):
    process = build(chain)
    for dtype in (torch.float32, torch.float64):
        y_t, prior = torch.randint(0, 2, (process.num_timesteps, 3, 50)).to(dtype), 0.3
        t = torch.arange(process.num_timesteps)
        assert torch.equal(process.ddim_mean(torch.zeros_like(y_t), y_t, torch.full_like(y_t, prior), t), y_t)


@chains
def test_ddim_mean_is_the_member_of_the_family_without_prior(chain):
    process = build(chain)
    _, y_t, prior, t = cases(process)
    eps = torch.rand_like(prior)
    products = torch.cumprod(torch.cat([torch.ones(1, dtype=torch.float64), 1 - process.betas]), 0)
    before, after = products[:-1].reshape(-1, 1, 1), products[1:].reshape(-1, 1, 1)
    largest = (1 - before) / (1 - after)
    close((1 - before) - (1 - after) * largest, torch.zeros_like(before))  # coefficient of the prior
    y_start = torch.where(y_t == 1, 1 - eps, eps)
    close(process.ddim_mean(eps, y_t, prior, t), largest * y_t + (before - largest * after) * y_start)
    assert torch.equal(process.ddim_mean(eps, y_t, prior, t), process.ddim_mean(eps, y_t, 1 - prior, t))


def test_p_mean_is_the_posterior_of_the_soft_estimate_and_not_a_mixture(paper):
    t = torch.tensor([5])
    eps, y_t, prior = (torch.full((1, 1, 1), value, dtype=torch.float64) for value in (0.5, 1.0, 0.05))
    mixture = 0.5 * sum(paper.q_posterior_mean(torch.full_like(prior, value), y_t, prior, t) for value in (0.0, 1.0))
    assert paper.p_mean(eps, y_t, prior, t).item() == pytest.approx(0.945, abs=5e-4)
    assert mixture.item() == pytest.approx(0.761, abs=5e-4)
    assert paper.ddim_mean(eps, y_t, prior, t).item() == pytest.approx(0.884, abs=5e-4)
    assert torch.equal(paper.p_mean(eps, y_t, prior, t), paper.q_posterior_mean(1 - eps, y_t, prior, t))


# ---- saturation


def corners(process, dtype=torch.float32):
    """Every combination of y_start, y_t, prior, eps in {0, 1} at every t."""
    values = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=dtype).T
    t = torch.arange(process.num_timesteps)
    return [x.expand(len(t), 1, 16).clone().requires_grad_() for x in values], t


@chains
@pytest.mark.parametrize("name", ["q_posterior_mean", "p_mean", "ddim_mean"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_means_are_probabilities_at_zeros_and_ones(chain, name, dtype):
    process = build(chain)
    inputs, t = corners(process, dtype)
    mean = METHODS[name](process, *inputs, t)
    assert bool(((mean >= 0) & (mean <= 1)).all())  # false for NaN


@chains
@pytest.mark.parametrize(
    ("name", "position"),
    [("q_posterior_mean", 0), ("q_posterior_mean", 2), ("p_mean", 3), ("p_mean", 2), ("ddim_mean", 3)],
)
def test_gradients_are_finite_at_zeros_and_ones(chain, name, position):
    process = build(chain)
    inputs, t = corners(process)
    mean = METHODS[name](process, *inputs, t)
    (gradient,) = torch.autograd.grad(mean.sum(), inputs[position])
    assert bool(gradient.isfinite().all())


def test_saturated_priors_match_the_reference_where_it_is_finite(paper, golden):
    g = golden("hidiff_edge")
    means = {
        "posterior_true": paper.q_posterior_mean(g["y0"], g["yt"], g["prior"], g["t"]),
        "model_mean": paper.p_mean(g["eps_hat"], g["yt"], g["prior"], g["t"]),
    }
    for name, actual in means.items():
        known = g[name].isfinite()
        assert known.any()
        assert not known.all()
        close(actual[known], g[name][known], rtol=0, atol=1e-6)
        assert bool(actual[~known].isfinite().all())


def test_an_impossible_state_has_the_posterior_of_a_very_improbable_one(paper):
    # y_start = 0 and prior = 0 cannot give y_t = 1; with prior -> 0, a redraw now or earlier did it, in these odds
    now, earlier = paper.betas, (1 - paper.betas) * (1 - paper.alphas_cumprod_prev)
    zero, one = torch.zeros(10, 1, 1, dtype=torch.float64), torch.ones(10, 1, 1, dtype=torch.float64)
    actual = paper.q_posterior_mean(zero, one, zero, torch.arange(10)).flatten()
    close(actual, earlier / (earlier + now), rtol=0, atol=1e-5)
    close(paper.q_posterior_mean(one, zero, one, torch.arange(10)).flatten(), 1 - actual, rtol=0, atol=1e-5)


# ---- tensors


METHODS = {
    "q_mean": lambda p, y_start, y_t, prior, eps, t: p.q_mean(y_start, prior, t),
    "noise_probability": lambda p, y_start, y_t, prior, eps, t: p.noise_probability(y_start, prior, t),
    "q_sample": lambda p, y_start, y_t, prior, eps, t: p.q_sample(y_start, prior, t, eps),
    "q_posterior_mean": lambda p, y_start, y_t, prior, eps, t: p.q_posterior_mean(y_start, y_t, prior, t),
    "predict_y_start": lambda p, y_start, y_t, prior, eps, t: p.predict_y_start(y_t, eps),
    "p_mean": lambda p, y_start, y_t, prior, eps, t: p.p_mean(eps, y_t, prior, t),
    "ddim_mean": lambda p, y_start, y_t, prior, eps, t: p.ddim_mean(eps, y_t, prior, t),
}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def arguments(*shape):
    """y_start, y_t, prior, eps."""
    return [*torch.randint(0, 2, (2, *shape)).float(), *torch.rand(2, *shape)]


@methods
@pytest.mark.parametrize("spatial", [(7,), (4, 5), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_sample_has_its_own_t_and_every_channel_and_voxel_is_treated_alike(paper, method, channels, spatial):
    t = torch.tensor([0, 9, 4])
    inputs = arguments(3, channels, *spatial)
    together = method(paper, *inputs, t)
    assert together.shape == inputs[0].shape
    for i in range(3):
        assert torch.equal(together[i : i + 1], method(paper, *(x[i : i + 1] for x in inputs), t[i : i + 1]))
    moved = [x.flip(1).movedim(2, -1) for x in inputs]
    assert torch.equal(method(paper, *moved, t), together.flip(1).movedim(2, -1))


@methods
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_raised_to_float32_before_anything_is_computed(paper, method, dtype):
    t = torch.arange(10)
    inputs = [x.to(dtype) for x in arguments(10, 2, 30)]
    actual = method(paper, *inputs, t)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, method(paper, *(x.float() for x in inputs), t))


@methods
def test_float64_is_kept_and_masks_may_be_integers(paper, method):
    t = torch.arange(10)
    y_start, y_t, prior, eps = (x.double() for x in arguments(10, 2, 30))
    expected = method(paper, y_start, y_t, prior, eps, t)
    assert expected.dtype == torch.float64
    assert torch.equal(method(paper, y_start.to(torch.uint8), y_t.to(torch.int16), prior, eps, t), expected)


@methods
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(paper, method, dtype):
    t, inputs = torch.arange(10), arguments(10, 2, 30)
    expected = method(paper, *inputs, t)
    with torch.autocast("cpu", dtype=dtype):
        actual = method(paper, *inputs, t)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


@methods
def test_float32_agrees_with_float64(paper, method):
    t, inputs = torch.arange(10), arguments(10, 2, 200)
    close(method(paper, *inputs, t).double(), method(paper, *(x.double() for x in inputs), t), rtol=0, atol=1e-6)


@methods
def test_inputs_are_not_changed(paper, method):
    inputs = arguments(2, 1, 9)
    copies = [x.clone() for x in inputs]
    method(paper, *inputs, torch.tensor([0, 7]))
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


@methods
def test_t_may_be_on_another_device_than_the_masks(paper, method):
    inputs = [x.to("meta") for x in arguments(2, 1, 9)]
    result = method(paper, *inputs, torch.tensor([0, 7]))
    assert result.device.type == "meta"
    assert result.shape == (2, 1, 9)


@pytest.mark.parametrize("missing", ["prior", "y_t"])
def test_tensors_of_different_shapes_are_an_error_that_names_them(paper, missing):
    shapes = {"y_start": (2, 3, 5), "y_t": (2, 3, 5), "prior": (2, 3, 5), missing: (2, 1, 5)}
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=rf"{missing} has shape \(2, 1, 5\), expected that of y_start, \(2, 3, 5\)"):
        paper.q_posterior_mean(**tensors, t=torch.tensor([1, 2]))


# ---- chain


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [0.1, 1.0], [-0.1], [float("nan"), 0.1], [[0.1, 0.2]]])
def test_betas_that_are_no_probabilities_are_an_error(betas):
    with pytest.raises(ValueError, match=r"betas must be a non-empty 1D tensor in \(0, 1\), got"):
        BernoulliDiffusion(torch.tensor(betas))


def test_coefficients_are_float64_and_begin_without_noise(paper):
    for name in ("betas", "alphas_cumprod", "alphas_cumprod_prev", "ddim_keep"):
        assert getattr(paper, name).dtype == torch.float64
        assert getattr(paper, name).shape == (10,)
    assert paper.alphas_cumprod_prev[0] == 1
    assert paper.ddim_keep[0] == 0


@pytest.mark.parametrize("kept", range(1, 11))
def test_respacing_keeps_alphas_cumprod_and_the_top_step_bit_exactly(paper, kept):
    respaced = paper.respace(kept)
    indices = [9] if kept == 1 else [round(i * 9 / (kept - 1)) for i in range(kept)]
    assert type(respaced) is BernoulliDiffusion
    assert respaced.timestep_map.tolist() == indices
    assert torch.equal(respaced.alphas_cumprod, paper.alphas_cumprod[indices])
    assert respaced.alphas_cumprod_prev.tolist() == [1.0, *paper.alphas_cumprod[indices[:-1]].tolist()]
    close(torch.cumprod(1 - respaced.betas, 0), respaced.alphas_cumprod, rtol=1e-9)


def test_respacing_is_that_of_the_gaussian_process(paper):
    gaussian = GaussianDiffusion(cosine_beta_schedule(10)).respace(4)
    assert torch.equal(paper.respace(4).timestep_map, gaussian.timestep_map)
    assert torch.equal(paper.respace(4).betas, gaussian.betas)


@pytest.mark.parametrize("kept", [0, -1, 11])
def test_respacing_to_a_length_outside_its_range_is_an_error_with_the_range(paper, kept):
    with pytest.raises(ValueError, match=rf"must be in 1 \.\. 10, got {kept}"):
        paper.respace(kept)


# ---- golden values


@pytest.mark.parametrize(("length", "case", "kept"), [(10, "list5", 5), (10, "list3", 3), (1000, "list10", 10)])
def test_respacing_matches_the_reference(golden, length, case, kept):
    g = golden("hidiff_schedule")
    respaced = build((length, kept))
    assert respaced.timestep_map.tolist() == g[f"respace_T{length}_{case}_timesteps"].tolist()
    close(respaced.betas, g[f"respace_T{length}_{case}_betas"], rtol=1e-10)
    close(respaced.alphas_cumprod, g[f"respace_T{length}_{case}_alphas_cumprod"], rtol=1e-10)


REFERENCE = {
    "q_mean": lambda p, g: p.q_mean(g["y0"], g["prior"], g["t"]),
    "noise_prob": lambda p, g: p.noise_probability(g["y0"], g["prior"], g["t"]),
    "pred_y0": lambda p, g: p.predict_y_start(g["y_t"], g["eps_hat"]),
    "posterior_true_abar0eq1": lambda p, g: p.q_posterior_mean(g["y0"], g["y_t"], g["prior"], g["t"]),
    "model_mean": lambda p, g: p.p_mean(g["eps_hat"], g["y_t"], g["prior"], g["t"]),
    "ddim_mean": lambda p, g: p.ddim_mean(g["eps_hat"], g["y_t"], g["prior"], g["t"]),
    "ddim_sigma": lambda p, g: p.ddim_keep,
}


@pytest.mark.parametrize("name", REFERENCE)
def test_probabilities_match_the_reference(paper, golden, name):
    g = golden_math(golden)
    close(REFERENCE[name](paper, g).double(), g[name].double(), rtol=0, atol=1e-6)


def test_q_sample_matches_the_reference(paper, golden):
    # the reference draws y_t = 1 for u < q_mean; the same event in XOR form is a flip for u, or for 1 - u from a 1
    g = golden_math(golden)
    uniform = torch.where(g["y0"] == 1, 1 - g["u_forward"], g["u_forward"])
    assert torch.equal(paper.q_sample(g["y0"], g["prior"], g["t"], uniform), g["y_t"])


def test_sigma_of_the_paper_s_chain(paper):
    expected = (0, 0.27551, 0.47536, 0.60447, 0.69647, 0.76785, 0.82722, 0.87960, 0.92832, 0.97593)
    assert [math.floor(x * 1e5 + 0.5) / 1e5 for x in paper.ddim_keep.tolist()] == pytest.approx(expected, abs=1e-9)
