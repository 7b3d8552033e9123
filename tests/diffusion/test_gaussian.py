"""Laws of the Gaussian process. Expectations are computed here from the betas alone, in float64."""

import math

import pytest
import torch

from nnunetv2_diffusion.diffusion import GaussianDiffusion, linear_beta_schedule

SHORT_BETAS = (0.05, 0.2, 0.1, 0.5, 0.7, 0.9)
# T of the paper's schedule or "short", and K of the respaced chain (None: not respaced)
CHAINS = [
    (1, None),
    ("short", None),
    ("short", 1),
    ("short", 4),
    (1001, None),
    (1001, 1),
    (1001, 2),
    (1001, 5),
    (1001, 7),
    (1001, 11),
]
chains = pytest.mark.parametrize("chain", CHAINS, ids=lambda c: f"T{c[0]}-K{c[1]}")


def training_betas(length) -> torch.Tensor:
    return torch.tensor(SHORT_BETAS, dtype=torch.float64) if length == "short" else linear_beta_schedule(length)


def build(chain) -> GaussianDiffusion:
    process = GaussianDiffusion(training_betas(chain[0]))
    return process if chain[1] is None else process.respace(chain[1])


def expected_betas(chain) -> list[float]:
    """Betas of a chain as products of the training chain's alphas over the indices that a step covers."""
    alphas = (1 - training_betas(chain[0])).tolist()
    if chain[1] is None:
        ends = range(1, len(alphas) + 1)
    elif chain[1] == 1:
        ends = [len(alphas)]
    else:
        ends = [round(k * (len(alphas) - 1) / (chain[1] - 1)) + 1 for k in range(chain[1])]
    starts = [0, *ends[:-1]]
    return [1 - math.prod(alphas[a:b]) for a, b in zip(starts, ends, strict=True)]


def expected_alphas_cumprod(chain) -> torch.Tensor:
    """(K + 1,) products of alphas before and after every step: entry 0 is 1."""
    products = [1.0]
    for beta in expected_betas(chain):
        products.append(products[-1] * (1 - beta))
    return torch.tensor(products, dtype=torch.float64)


def bayes_posterior(chain) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Coefficients of x_start and x_t in the mean of q(x_{t-1} | x_t, x_start), and its variance, for t >= 1.

    The prior N(sqrt(ab_prev) x_start, 1 - ab_prev) and the likelihood N(x_t; sqrt(1 - beta) x_{t-1}, beta) are Gaussian
    in x_{t-1}: their precisions add up, and so do their precision-weighted means.
    """
    beta = torch.tensor(expected_betas(chain)[1:], dtype=torch.float64)
    before = expected_alphas_cumprod(chain)[1:-1]
    prior, likelihood = 1 / (1 - before), (1 - beta) / beta
    variance = 1 / (prior + likelihood)
    return variance * prior * before.sqrt(), variance * (1 - beta).sqrt() / beta, variance


def response(step, process: GaussianDiffusion, dtype=torch.float64) -> list[torch.Tensor]:
    """Coefficients (T,) with which ``step(x_start, x_t, t, noise)`` takes in each of its three inputs, for every t."""
    t = torch.arange(process.num_timesteps)
    coefficients = []
    for position in range(3):
        unit = [torch.full((len(t), 1, 1), float(position == i), dtype=dtype) for i in range(3)]
        coefficients.append(step(unit[0], unit[1], t, unit[2]).flatten())
    return coefficients


def ddim(process: GaussianDiffusion, eta: float):
    return lambda x_start, x_t, t, noise: process.ddim_step(x_start, x_t, t, noise, eta)


def channels_first(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(-1, 1)


def close(actual, expected, rtol=1e-9, atol=1e-14):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


# ---- construction


@pytest.mark.parametrize(
    "betas",
    [[], [0.0, 0.1], [0.1, 1.0], [-0.1], [float("nan"), 0.1], [[0.1, 0.2]]],
    ids=["empty", "zero", "one", "negative", "nan", "2D"],
)
def test_betas_that_are_no_variances_are_an_error(betas):
    with pytest.raises(ValueError, match=r"betas must be a non-empty 1D tensor in \(0, 1\), got"):
        GaussianDiffusion(torch.tensor(betas))


def test_a_timestep_map_of_another_length_is_an_error_with_both_shapes():
    with pytest.raises(ValueError, match=r"timestep_map has shape \(3,\), expected \(10,\)"):
        GaussianDiffusion(linear_beta_schedule(10), torch.arange(3))


def test_coefficients_are_float64_even_from_float32_betas():
    process = GaussianDiffusion(linear_beta_schedule(10).float())
    for name in ("betas", "alphas_cumprod", "alphas_cumprod_prev", "posterior_variance"):
        assert getattr(process, name).dtype == torch.float64
        assert getattr(process, name).shape == (10,)


def test_an_unrespaced_chain_maps_every_index_to_itself(trained):
    assert trained.num_timesteps == 1001
    assert trained.timestep_map.dtype == torch.long
    assert trained.timestep_map.tolist() == list(range(1001))


# ---- closed forms


@chains
def test_alphas_cumprod_is_the_product_of_alphas(chain):
    process = build(chain)
    expected = expected_alphas_cumprod(chain)
    close(process.alphas_cumprod, expected[1:], rtol=1e-12)
    close(process.alphas_cumprod_prev, expected[:-1], rtol=1e-12)
    close(process.betas, torch.tensor(expected_betas(chain), dtype=torch.float64))


@pytest.mark.parametrize("prefix", ["linear64__", "linear__"])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("alphas_cumprod", "alphas_cumprod"),
        ("alphas_cumprod_prev", "alphas_cumprod_prev"),
        ("posterior_mean_coeff_start", "posterior_mean_coef_start"),
        ("posterior_mean_coeff_t", "posterior_mean_coef_t"),
        ("posterior_variance", "posterior_variance"),
    ],
)
def test_coefficients_match_the_reference(trained, golden, prefix, theirs, ours):
    reference = golden("imgx_schedules_T1001")[prefix + theirs]
    actual = getattr(trained, ours)
    if prefix == "linear64__":
        close(actual, reference, rtol=1e-12, atol=1e-12)
    else:  # the reference cancels in float32 at the first indices
        close(actual.float()[:10], reference[:10], rtol=3e-3, atol=1e-3)
        close(actual.float()[10:], reference[10:], rtol=1e-4, atol=1e-8)


@chains
def test_q_sample_has_the_closed_form_mean_and_std(chain):
    process = build(chain)
    t = torch.arange(process.num_timesteps)
    one, zero = torch.ones(len(t), 1, 1, dtype=torch.float64), torch.zeros(len(t), 1, 1, dtype=torch.float64)
    expected = expected_alphas_cumprod(chain)[1:]
    close(process.q_sample(one, t, zero).flatten(), expected.sqrt(), rtol=1e-12)
    close(process.q_sample(zero, t, one).flatten(), (1 - expected).sqrt(), rtol=1e-10)


@chains
def test_q_sample_has_the_moments_of_a_chain_of_single_steps(chain):
    process = build(chain)
    mean, variance = 1.0, 0.0
    one, zero = torch.ones(1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.float64)
    for index, beta in enumerate(process.betas.tolist()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        t = torch.tensor([index])
        assert process.q_sample(one, t, zero).item() == pytest.approx(mean, rel=1e-10)
        assert process.q_sample(zero, t, one).item() ** 2 == pytest.approx(variance, rel=1e-10)


def test_q_sample_does_not_clip(trained):
    x_t = trained.q_sample(torch.ones(1, 1, 2), torch.tensor([500]), torch.tensor([[[5.0, -5.0]]]))
    assert x_t.max() > 4
    assert x_t.min() < -4


# ---- posterior


@chains
def test_q_posterior_is_exact_bayes(chain):
    process = build(chain)
    t = torch.arange(process.num_timesteps)
    start, current, _ = response(lambda x0, xt, t, noise: process.q_posterior(x0, xt, t)[0], process)
    x = torch.zeros(len(t), 1, 1, dtype=torch.float64)
    variance = process.q_posterior(x, x, t)[1]
    assert variance.shape == (len(t), 1, 1)
    expected_start, expected_current, expected_variance = bayes_posterior(chain)
    close(start[1:], expected_start)
    close(current[1:], expected_current)
    close(variance.flatten()[1:], expected_variance)


@pytest.mark.parametrize(
    ("chain", "indices"),
    [
        (("short", None), range(1, 6)),
        (("short", 4), range(1, 4)),
        ((1001, None), (1, 2, 10, 259, 500, 999, 1000)),
        ((1001, 2), (1,)),
        ((1001, 5), range(1, 5)),
    ],
)
def test_q_posterior_is_the_normalised_product_of_two_densities_on_a_grid(chain, indices):
    process = build(chain)
    betas, products = expected_betas(chain), expected_alphas_cumprod(chain).tolist()
    for index in indices:
        beta, before, after, x_start = betas[index], products[index], products[index + 1], -1.0
        x_t = math.sqrt(after) * x_start + 0.7 * math.sqrt(1 - after)
        centre, spread = math.sqrt(before) * x_start, math.sqrt(1 - before)
        x = torch.linspace(centre - 9 * spread, centre + 9 * spread, 200_001, dtype=torch.float64)
        log_density = -((x - centre) ** 2) / (2 * (1 - before)) - (x_t - math.sqrt(1 - beta) * x) ** 2 / (2 * beta)
        density = (log_density - log_density.max()).exp()
        density = density / density.sum()
        mean = (density * x).sum().item()
        variance = (density * (x - mean) ** 2).sum().item()
        scalars = [torch.full((1, 1, 1), value, dtype=torch.float64) for value in (x_start, x_t)]
        actual_mean, actual_variance = process.q_posterior(*scalars, torch.tensor([index]))
        assert actual_mean.item() == pytest.approx(mean, rel=1e-6)
        assert actual_variance.item() == pytest.approx(variance, rel=1e-6)


@chains
def test_q_posterior_at_index_0_is_a_point_mass_on_x_start(chain):
    process = build(chain)
    x_start, x_t = torch.randn(2, 1, 3, 50, dtype=torch.float64)
    mean, variance = process.q_posterior(x_start, 1e3 * x_t, torch.tensor([0]))
    assert torch.equal(mean, x_start)
    assert variance.item() == 0


# ---- steps


@chains
def test_ddpm_step_has_the_posterior_mean_and_its_small_variance(chain):
    process = build(chain)
    start, current, noise = response(process.ddpm_step, process)
    expected_start, expected_current, expected_variance = bayes_posterior(chain)
    close(start[1:], expected_start)
    close(current[1:], expected_current)
    close(noise[1:], expected_variance.sqrt())


@pytest.mark.parametrize("chain", [("short", None), (1001, 5)], ids=str)
def test_ddpm_draws_have_the_moments_of_the_posterior(chain):
    process = build(chain)
    t = torch.arange(1, process.num_timesteps)
    draws = 100_000
    x_start = torch.full((len(t), 1, draws), 1.0, dtype=torch.float64)
    x_t = torch.full_like(x_start, -0.4)
    x_prev = process.ddpm_step(x_start, x_t, t, torch.randn_like(x_start))
    from_start, from_current, variance = bayes_posterior(chain)
    error = (x_prev.mean((1, 2)) - (from_start - 0.4 * from_current)).abs()
    assert bool((error < 5 * (variance / draws).sqrt()).all())
    ratio = x_prev.var((1, 2)) / variance
    assert bool(((ratio - 1).abs() < 5 * math.sqrt(2 / draws)).all())


@chains
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_step_is_equation_12_with_the_noise_predicted_from_x_start(chain, eta):
    process = build(chain)
    products = expected_alphas_cumprod(chain)
    before, after = products[1:-1], products[2:]
    sigma = eta * bayes_posterior(chain)[2].sqrt()
    direction = (1 - before - sigma**2).sqrt()
    start, current, noise = (c[1:] for c in response(ddim(process, eta), process))
    close(start, before.sqrt() - direction * after.sqrt() / (1 - after).sqrt(), atol=1e-12)
    close(current, direction / (1 - after).sqrt(), atol=1e-12)
    close(noise, sigma)


@chains
def test_ddim_with_eta_1_is_ddpm_at_every_index(chain):
    process = build(chain)
    for ours, theirs in zip(response(ddim(process, 1.0), process), response(process.ddpm_step, process), strict=True):
        close(ours, theirs, rtol=1e-9, atol=1e-11)


@chains
def test_ddim_with_eta_0_moves_along_the_same_noise(chain):
    process = build(chain)
    t = torch.arange(1, process.num_timesteps)
    x_start, noise = torch.randn(2, len(t), 2, 9, dtype=torch.float64)
    x_prev = process.ddim_step(x_start, process.q_sample(x_start, t, noise), t)
    close(x_prev, process.q_sample(x_start, t - 1, noise), rtol=1e-8, atol=1e-10)


def test_ddim_with_eta_0_ignores_noise(trained):
    process = trained.respace(5)
    x_start, x_t, noise = torch.randn(3, 5, 2, 7)
    t = torch.arange(5)
    without = process.ddim_step(x_start, x_t, t)
    assert torch.equal(process.ddim_step(x_start, x_t, t, 1e6 * noise), without)
    assert torch.equal(process.ddim_step(x_start, x_t, t, noise, eta=0.0), without)


def one_step(process: GaussianDiffusion, name: str):
    """step(x_start, x_t, t, noise) of a sampler: ddpm, or ddim with its eta behind it."""
    if name == "ddpm":
        return process.ddpm_step
    return ddim(process, float(name.removeprefix("ddim")))


@chains
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["ddpm", "ddim0.0", "ddim0.5", "ddim1.0"])
def test_all_steps_return_x_start_exactly_at_index_0(chain, dtype, name):
    process = build(chain)
    x_start = 2 * torch.rand(2, 3, 50).to(dtype) - 1
    x_t, noise = (100 * torch.randn(2, 2, 3, 50)).to(dtype)
    step = one_step(process, name)
    assert torch.equal(step(x_start, x_t, torch.tensor([0, 0]), noise), x_start)


@chains
@pytest.mark.parametrize("name", ["ddpm", "ddim0.0", "ddim0.4", "ddim1.0"])
def test_steps_with_the_true_x_start_keep_the_marginals_of_q(chain, name):
    process = build(chain)
    products = expected_alphas_cumprod(chain)
    start, current, noise = response(one_step(process, name), process)
    mean, variance = products[-1].sqrt(), 1 - products[-1]  # of x_{T-1}, for x_start = 1
    for index in reversed(range(process.num_timesteps)):
        mean = start[index] + current[index] * mean
        variance = current[index] ** 2 * variance + noise[index] ** 2
        close(mean, products[index].sqrt(), rtol=1e-9)
        close(variance, 1 - products[index], rtol=1e-7, atol=1e-14)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_outside_0_1_is_an_error_with_the_value_found(trained, eta):
    x = torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match=rf"eta must be in \[0, 1\], got {eta}"):
        trained.ddim_step(x, x, torch.tensor([3]), x, eta)


def test_ddim_with_eta_but_without_noise_is_an_error(trained):
    x = torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match=r"eta = 0\.5 needs noise"):
        trained.ddim_step(x, x, torch.tensor([3]), eta=0.5)


# ---- tensors


STEPS = {
    "q_sample": lambda p, x_start, x_t, t, noise: p.q_sample(x_start, t, noise),
    "q_posterior": lambda p, x_start, x_t, t, noise: p.q_posterior(x_start, x_t, t)[0],
    "ddpm_step": lambda p, x_start, x_t, t, noise: p.ddpm_step(x_start, x_t, t, noise),
    "ddim_step": lambda p, x_start, x_t, t, noise: p.ddim_step(x_start, x_t, t, noise, 0.5),
}
steps = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


@steps
@pytest.mark.parametrize("spatial", [(5,), (4, 6), (3, 4, 5)], ids=["1D", "2D", "3D"])
def test_a_batch_with_mixed_t_is_its_samples_one_by_one(trained, step, spatial):
    t = torch.tensor([0, 1000, 1, 500, 1])
    x_start, x_t, noise = torch.randn(3, len(t), 2, *spatial)
    together = step(trained, x_start, x_t, t, noise)
    assert together.shape == x_start.shape
    for i in range(len(t)):
        one = slice(i, i + 1)
        assert torch.equal(together[one], step(trained, x_start[one], x_t[one], t[one], noise[one]))
    assert not torch.equal(together[:1], step(trained, x_start[:1], x_t[:1], t[1:2], noise[:1]))


@steps
def test_every_voxel_and_channel_is_treated_alike(trained, step):
    t = torch.tensor([700, 2])
    x_start, x_t, noise = torch.randn(3, 2, 3, 4, 5, 6)
    moved = [x.flip(1).transpose(2, 4) for x in (x_start, x_t)]
    actual = step(trained, *moved, t, noise.flip(1).transpose(2, 4))
    assert torch.equal(actual, step(trained, x_start, x_t, t, noise).flip(1).transpose(2, 4))


@steps
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2), (torch.float32, 1e-6)], ids=str
)
def test_the_dtype_of_x_is_kept_and_coefficients_lose_no_more_digits_than_it(trained, step, dtype, tolerance):
    t = torch.tensor([0, 1, 2, 10, 500, 1000])
    exact = [x.to(dtype).double() for x in torch.randn(3, len(t), 2, 50)]
    actual = step(trained, *(x.to(dtype) for x in exact[:2]), t, exact[2].to(dtype))
    assert actual.dtype == dtype
    expected = step(trained, *exact[:2], t, exact[2])
    assert (actual.double() - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("eta", [None, 0.0, 1.0], ids=lambda e: "ddpm" if e is None else f"ddim{e}")
def test_float32_coefficients_are_the_rounded_float64_ones(trained, eta):
    # 1 - alphas_cumprod in float32 would be wrong in the fourth digit at the first indices
    step = trained.ddpm_step if eta is None else ddim(trained, eta)
    for single, double in zip(response(step, trained, torch.float32), response(step, trained), strict=True):
        close(single.double(), double, rtol=2e-7, atol=1e-30)


@steps
def test_inputs_are_not_changed(trained, step):
    inputs = [torch.randn(2, 1, 5) for _ in range(3)]
    copies = [x.clone() for x in inputs]
    step(trained, *inputs[:2], torch.tensor([3, 900]), inputs[2])
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


# ---- respacing


def test_every_respacing_keeps_alphas_cumprod_first_and_last_index_bit_exactly(trained):
    for steps_kept in range(2, 1002):
        respaced = trained.respace(steps_kept)
        kept = respaced.timestep_map
        assert respaced.num_timesteps == len(kept) == steps_kept
        assert kept[0] == 0
        assert kept[-1] == 1000
        gaps = kept.diff()
        assert gaps.min() >= 1
        assert gaps.max() - gaps.min() <= 1  # as even as integers can be
        assert torch.equal(respaced.alphas_cumprod, trained.alphas_cumprod[kept])
        assert torch.equal(respaced.alphas_cumprod_prev[1:], trained.alphas_cumprod[kept[:-1]])
        assert respaced.alphas_cumprod_prev[0] == 1


@pytest.mark.parametrize(
    ("steps_kept", "expected"),
    [(1, [1000]), (2, [0, 1000]), (3, [0, 500, 1000]), (5, [0, 250, 500, 750, 1000]), (11, list(range(0, 1001, 100)))],
)
def test_kept_indices_are_those_of_the_paper(trained, steps_kept, expected):
    assert trained.respace(steps_kept).timestep_map.tolist() == expected


def test_trailing_steps_are_of_equal_length_and_end_one_of_them_before_zero(trained):
    for steps_kept in range(1, 1002):
        respaced = trained.respace(steps_kept, "trailing")
        kept = respaced.timestep_map
        assert kept[-1] == 1000
        lengths = torch.cat([kept.new_tensor([-1]), kept]).diff()
        assert len(lengths) == steps_kept
        assert lengths.min() >= 1
        assert lengths.max() - lengths.min() <= 1  # of all, the first included
        assert torch.equal(respaced.alphas_cumprod, trained.alphas_cumprod[kept])
        assert respaced.alphas_cumprod_prev[0] == 1


@pytest.mark.parametrize(
    ("steps_kept", "expected"),
    [(1, [1000]), (2, [499, 1000]), (5, [199, 399, 600, 800, 1000]), (1001, list(range(1001)))],
)
def test_trailing_indices(trained, steps_kept, expected):
    assert trained.respace(steps_kept, "trailing").timestep_map.tolist() == expected


def test_an_unknown_spacing_is_refused(trained):
    with pytest.raises(ValueError, match="spacing is 'leading', expected one of linspace, trailing"):
        trained.respace(5, "leading")


def test_one_step_keeps_the_last_index_bit_exactly(trained):
    respaced = trained.respace(1)
    assert respaced.num_timesteps == 1
    assert torch.equal(respaced.alphas_cumprod, trained.alphas_cumprod[-1:])
    assert respaced.alphas_cumprod_prev.tolist() == [1.0]


def test_respacing_to_the_same_length_changes_nothing(trained):
    respaced = trained.respace(1001)
    assert torch.equal(respaced.timestep_map, trained.timestep_map)
    assert torch.equal(respaced.alphas_cumprod, trained.alphas_cumprod)
    close(respaced.posterior_variance, trained.posterior_variance, rtol=1e-7)


@pytest.mark.parametrize("lengths", [(101, 11), (101, 11, 3), (9, 4), (5, 1), (7, 7)], ids=str)
def test_composed_respacing_maps_to_the_indices_of_training(trained, lengths):
    respaced, expected = trained, list(range(1001))
    for length in lengths:
        respaced = respaced.respace(length)
        last = len(expected) - 1
        kept = [last] if length == 1 else [round(k * last / (length - 1)) for k in range(length)]
        expected = [expected[k] for k in kept]
    assert respaced.timestep_map.tolist() == expected
    assert torch.equal(respaced.alphas_cumprod, trained.alphas_cumprod[expected])


def test_respacing_starts_from_the_map_given_at_construction():
    process = GaussianDiffusion(linear_beta_schedule(3), torch.tensor([4, 40, 400]))
    assert process.respace(2).timestep_map.tolist() == [4, 400]


def test_respacing_leaves_the_original_alone(trained):
    before = [trained.betas.clone(), trained.alphas_cumprod.clone(), trained.posterior_variance.clone()]
    trained.respace(5)
    trained.respace(1)
    assert trained.num_timesteps == 1001
    for copy, now in zip(before, (trained.betas, trained.alphas_cumprod, trained.posterior_variance), strict=True):
        assert torch.equal(copy, now)


@pytest.mark.parametrize("steps_kept", [0, -1, 1002])
def test_respacing_to_a_length_outside_its_range_is_an_error_with_the_range(trained, steps_kept):
    with pytest.raises(ValueError, match=rf"must be in 1 \.\. 1001, got {steps_kept}"):
        trained.respace(steps_kept)


# ---- golden values


def test_q_sample_matches_the_reference(trained, golden):
    g = {k: channels_first(v) if v.ndim > 1 else v for k, v in golden("imgx_qsample_posterior").items()}
    actual = trained.q_sample(g["x_start"], g["t_index"].long(), g["noise"])
    close(actual, g["x_t"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("x_start", "mean"), [("x_start", "q_posterior_mean"), ("x_start_pred", "p_mean")])
def test_q_posterior_matches_the_reference(trained, golden, x_start, mean):
    g = {k: channels_first(v) if v.ndim > 1 else v for k, v in golden("imgx_qsample_posterior").items()}
    t = g["t_index"].long()
    actual_mean, actual_variance = trained.q_posterior(g[x_start], g["x_t"], t)
    reference_variance = g["q_posterior_log_variance"].exp()
    # the float32 reference cancels at the first indices; its log-variance at 0 stands for another index
    for low, high, rtol, atol in ((0, 10, 3e-3, 1e-3), (10, 100, 1e-4, 5e-5), (100, 1001, 1e-5, 1e-5)):
        at = (t >= low) & (t < high)
        close(actual_mean[at], g[mean][at], rtol=rtol, atol=atol)
        at = at & (t > 0)
        close(actual_variance[at], reference_variance[at], rtol=rtol, atol=0)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("steps_kept", [2, 5, 11, 1001])
def test_sampler_steps_match_the_reference(trained, golden, steps_kept, sampler):
    prefix = f"K{steps_kept}__"
    g = {k.removeprefix(prefix): v for k, v in golden("imgx_sampler_steps").items() if k.startswith(prefix)}
    t = g["t_index"].long()
    x_t, logits, noise = (channels_first(g[k]) for k in ("x_t", "model_out", "noise"))
    x_start = 2 * logits.softmax(1) - 1
    close(x_start, channels_first(g[f"{sampler}_x_start"]), rtol=1e-5, atol=1e-5)
    x_prev = getattr(trained.respace(steps_kept), f"{sampler}_step")(x_start, x_t, t, noise)
    expected = channels_first(g[f"{sampler}_x_prev"])
    early = (t < 10) & (steps_kept == 1001)  # only there the float32 reference cancels
    close(x_prev[early], expected[early], rtol=3e-3, atol=1e-3)
    close(x_prev[~early], expected[~early], rtol=1e-5, atol=1e-5)
