"""Laws of the losses of Bernoulli diffusion. Expectations are written out in float64 probabilities."""

import itertools
import math

import pytest
import torch

from nnunetv2_diffusion.diffusion import (
    BernoulliDiffusion,
    NoiseCalibration,
    cosine_beta_schedule,
    noise_loss,
    variational_bound,
)


@pytest.fixture(scope="module")
def paper() -> BernoulliDiffusion:
    """T = 10, cosine."""
    return BernoulliDiffusion(cosine_beta_schedule(10))


def batch(*shape, dtype=torch.float64):
    """eps_logits, y_start, y_t, prior."""
    y_start, y_t = torch.randint(0, 2, (2, *shape)).to(dtype)
    return 3 * torch.randn(shape, dtype=dtype), y_start, y_t, torch.rand(shape, dtype=dtype) * 0.98 + 0.01


def close(actual, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


LOSSES = {
    "bound": variational_bound,
    "focal": lambda process, logits, y_start, y_t, prior, t, valid=None: noise_loss(logits, y_start, y_t, valid=valid),
    "cross-entropy": lambda process, logits, y_start, y_t, prior, t, valid=None: noise_loss(
        logits, y_start, y_t, 0.0, valid
    ),
}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


# ---- values


def test_the_bound_is_the_kl_of_the_two_posteriors(paper):
    t = torch.arange(1, 10)
    logits, y_start, y_t, prior = batch(9, 3, 50)
    q = paper.q_posterior_mean(y_start, y_t, prior, t)
    p = paper.p_mean(logits.sigmoid(), y_t, prior, t)
    kl = q * torch.log2(q / p) + (1 - q) * torch.log2((1 - q) / (1 - p))
    close(variational_bound(paper, logits, y_start, y_t, prior, t), kl.mean((1, 2)), rtol=1e-7)


def test_the_bound_at_index_0_is_the_code_length_of_the_mask(paper):
    logits, y_start, y_t, prior = batch(4, 3, 50)
    eps = logits.sigmoid()
    probability = torch.where(y_t == y_start, 1 - eps, eps)  # of the true value
    actual = variational_bound(paper, logits, y_start, y_t, prior, torch.zeros(4, dtype=torch.long))
    close(actual, -torch.log2(probability).mean((1, 2)))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_the_noise_loss_is_equation_12_and_cross_entropy_for_gamma_0(gamma):
    logits, y_start, y_t, _ = batch(4, 3, 50)
    eps, truth = logits.sigmoid(), (y_start != y_t).double()
    expected = truth * (1 - eps) ** gamma * torch.log2(eps) + (1 - truth) * eps**gamma * torch.log2(1 - eps)
    close(noise_loss(logits, y_start, y_t, gamma), -expected.mean((1, 2)))


def test_the_unit_is_the_bit_and_gamma_is_2_by_default():
    zeros = torch.zeros(1, 1, 8)
    assert noise_loss(zeros, zeros, zeros, gamma=0).item() == 1
    assert noise_loss(zeros, zeros, zeros).item() == 0.25


@losses
def test_losses_vanish_for_a_network_that_knows_the_noise_and_grow_with_its_error(paper, loss):
    t = torch.arange(10)
    _, y_start, y_t, prior = batch(10, 3, 50, dtype=torch.float32)
    right = 2 * (y_start != y_t).float() - 1
    values = [loss(paper, size * right, y_start, y_t, prior, t) for size in (30, 2, 0, -2, -30)]
    assert values[0].abs().max() < 1e-6
    assert all(bool((low < high).all()) for low, high in itertools.pairwise(values))


def test_the_bound_is_not_negative(paper):
    t = torch.arange(10)
    _, y_start, y_t, prior = batch(10, 3, 500, dtype=torch.float32)
    for size in (0.01, 1, 10):  # near the truth it is a difference of equal numbers
        logits = size * torch.randn_like(prior)
        assert variational_bound(paper, logits, y_start, y_t, prior, t).min() > -1e-6


# ---- gradients


@pytest.mark.parametrize("index", [0, 1, 5, 9])
def test_gradients_of_the_bound_are_those_of_its_value_by_logits_and_by_both_paths_of_the_prior(paper, index):
    logits, y_start, y_t, prior = batch(1, 2, 6)
    t = torch.tensor([index])

    def value(logits, prior):
        return variational_bound(paper, logits, y_start, y_t, prior, t)

    assert torch.autograd.gradcheck(value, (logits.requires_grad_(), prior.requires_grad_()))
    prior_gradient = torch.autograd.grad(value(logits, prior).sum(), prior)[0]
    assert bool((prior_gradient == 0).all()) == (index == 0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradients_of_the_noise_loss_are_those_of_its_value(gamma):
    logits, y_start, y_t, _ = batch(2, 2, 6)
    assert torch.autograd.gradcheck(lambda x: noise_loss(x, y_start, y_t, gamma), (logits.requires_grad_(),))


@losses
@pytest.mark.parametrize("size", [17.0, 88.0, 110.0, 1e4])
@pytest.mark.parametrize("betas", [cosine_beta_schedule(10), cosine_beta_schedule(1), cosine_beta_schedule(1000)[:20]])
def test_values_and_gradients_are_finite_where_float32_probabilities_are_0_or_1(loss, size, betas):
    process = BernoulliDiffusion(betas)
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4))).T
    t = torch.arange(len(betas))
    right, y_start, y_t, prior = (x.expand(len(t), 1, 16).clone() for x in corners)
    logits = (size * (2 * right - 1)).requires_grad_()
    prior.requires_grad_()
    value = loss(process, logits, y_start, y_t, prior, t)
    gradients = torch.autograd.grad(value.sum(), (logits, prior), allow_unused=True)
    for result in (value, *gradients):
        assert result is None or bool(result.isfinite().all())


def test_a_gamma_below_1_has_finite_gradients_at_saturated_logits():
    logits = torch.tensor([[[1e4, -1e4, 200.0, -200.0]]], requires_grad=True)
    for y_t in (torch.zeros(1, 1, 4), torch.ones(1, 1, 4)):
        (gradient,) = torch.autograd.grad(noise_loss(logits, torch.zeros(1, 1, 4), y_t, 0.5).sum(), logits)
        assert bool(gradient.isfinite().all())


@losses
def test_a_certain_error_still_has_a_gradient(paper, loss):
    y_start = torch.zeros(1, 1, 1)
    # t = 0: nothing but the estimate counts. float32 rounds the probability sigmoid(30) of an error to 1
    logits = torch.full((1, 1, 1), 30.0, requires_grad=True)
    value = loss(paper, logits, y_start, y_start, torch.full_like(y_start, 0.5), torch.tensor([0]))
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.item() == pytest.approx(30 / math.log(2), rel=1e-5)
    assert gradient.item() == pytest.approx(1 / math.log(2), rel=1e-5)


# ---- where losses are taken


@losses
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32], ids=str)
def test_valid_means_the_mean_over_those_voxels_of_all_channels(paper, loss, dtype):
    t = torch.tensor([0, 3, 9])
    inputs = batch(3, 2, 4, 6)
    valid = torch.rand(3, 1, 4, 6) < 0.4
    actual = loss(paper, *inputs, t, valid=valid.to(dtype))
    for i in range(3):
        chosen = [x[i : i + 1, :, valid[i, 0]] for x in inputs]
        close(actual[i : i + 1], loss(paper, *chosen, t[i : i + 1]))


@losses
def test_all_voxels_valid_is_the_default(paper, loss):
    t, inputs = torch.tensor([0, 3, 9]), batch(3, 2, 4, 6)
    close(loss(paper, *inputs, t, valid=torch.ones(3, 1, 4, 6)), loss(paper, *inputs, t))


@losses
def test_voxels_that_do_not_count_have_no_effect_and_no_gradient(paper, loss):
    t = torch.tensor([0, 5])
    logits, y_start, y_t, prior = batch(2, 2, 30)
    valid = torch.arange(30).expand(2, 1, 30) < 20
    logits.requires_grad_()
    value = loss(paper, logits, y_start, y_t, prior, t, valid=valid)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert bool((gradient[..., 20:] == 0).all())
    assert bool((gradient[..., :20] != 0).all())
    others = [torch.where(valid, x, 1 - x) for x in (y_start, y_t, prior)]
    assert torch.equal(loss(paper, torch.where(valid, logits, -9 * logits), *others, t, valid=valid), value)


@losses
def test_a_sample_without_valid_voxels_costs_nothing(paper, loss):
    t, inputs = torch.tensor([0, 5]), batch(2, 2, 30)
    inputs[0].requires_grad_()
    valid = torch.tensor([False, True]).reshape(2, 1, 1).expand(2, 1, 30)
    value = loss(paper, *inputs, t, valid=valid)
    (gradient,) = torch.autograd.grad(value.sum(), inputs[0])
    assert value[0] == 0
    assert value[1] > 0
    assert bool((gradient[0] == 0).all())


@losses
@pytest.mark.parametrize("shape", [(2, 2, 5), (2, 5), (1, 1, 5), (2, 1, 4)], ids=str)
def test_a_valid_of_another_shape_is_an_error_with_both_shapes(paper, loss, shape):
    with pytest.raises(ValueError, match=r"valid has shape .*, expected \(2, 1, 5\)"):
        loss(paper, *batch(2, 2, 5), torch.tensor([0, 5]), valid=torch.ones(shape))


@losses
@pytest.mark.parametrize("shape", [(3, 1, 7), (3, 2, 4, 5), (3, 3, 3, 4, 5)], ids=str)
def test_samples_have_their_own_t_and_voxels_and_channels_are_treated_alike(paper, loss, shape):
    t = torch.tensor([0, 9, 4])
    inputs = batch(*shape)
    together = loss(paper, *inputs, t)
    assert together.shape == (3,)
    for i in range(3):
        close(together[i : i + 1], loss(paper, *(x[i : i + 1] for x in inputs), t[i : i + 1]))
    close(loss(paper, *(x.flip(1).movedim(2, -1) for x in inputs), t), together)


# ---- precision


@losses
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_and_autocast_are_float32_throughout(paper, loss, dtype):
    t = torch.arange(10)
    inputs = [x.to(dtype) for x in batch(10, 2, 50)]
    inputs[3] = inputs[3].clamp(0, 1)
    expected = loss(paper, *(x.float() for x in inputs), t)
    with torch.autocast("cpu", dtype=dtype):
        actual = loss(paper, *inputs, t)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


@losses
def test_float32_agrees_with_float64(paper, loss):
    t = torch.arange(10)
    inputs = [x.float() for x in batch(10, 2, 300)]
    close(loss(paper, *inputs, t).double(), loss(paper, *(x.double() for x in inputs), t), rtol=1e-5, atol=1e-6)


@losses
def test_t_may_be_on_another_device(paper, loss):
    inputs = [x.to("meta") for x in batch(2, 1, 9)]
    assert loss(paper, *inputs, torch.tensor([0, 7])).device.type == "meta"


# ---- bad input


@pytest.mark.parametrize("gamma", [-0.1, float("nan")])
def test_a_negative_gamma_is_an_error_with_the_value_found(gamma):
    zeros = torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match=rf"gamma must be at least 0, got {gamma}"):
        noise_loss(zeros, zeros, zeros, gamma)


@losses
def test_tensors_of_different_shapes_are_an_error_that_names_them(paper, loss):
    logits, y_start, y_t, prior = batch(2, 3, 5)
    with pytest.raises(ValueError, match=r"y_t has shape \(2, 1, 5\), expected that of eps_logits, \(2, 3, 5\)"):
        loss(paper, logits, y_start, y_t[:, :1], prior, torch.tensor([1, 2]))


# ---- golden values


@pytest.fixture
def reference(golden):
    """Golden values with a probability and a prior that take gradients, and the losses of the logits of the former."""
    g = golden("hidiff_math_T10_C3")
    process = BernoulliDiffusion(cosine_beta_schedule(10))
    eps, prior = g["eps_hat"].clone().requires_grad_(), g["prior"].clone().requires_grad_()
    logits = torch.logit(eps)  # its derivative turns gradients by logits into the reference's, by probabilities
    bound = variational_bound(process, logits, g["y0"], g["y_t"], prior, g["t"])
    focal = noise_loss(logits, g["y0"], g["y_t"])
    bce = noise_loss(logits, g["y0"], g["y_t"], gamma=0)
    return g, eps, prior, bound, focal, bce


def test_losses_match_the_reference(reference):
    g, _, _, bound, focal, bce = reference
    close(bound, g["vb_per_sample_bits"], rtol=0, atol=1e-5)
    close(bound, g["train_vb_bits"], rtol=0, atol=1e-5)
    close(focal, g["train_focal_bits"], rtol=0, atol=1e-6)
    close(focal * math.log(2), g["focal_per_sample_nats"], rtol=0, atol=1e-6)
    close(bce * math.log(2), g["bce_elem_nats"].mean((1, 2, 3)), rtol=0, atol=1e-6)
    close(bound + focal, g["train_loss_bits"], rtol=0, atol=1e-5)
    close((bound + focal).mean(), g["loss_mean"], rtol=0, atol=1e-6)


def test_gradients_match_the_reference(reference):
    g, eps, prior, bound, focal, _ = reference
    gradients = torch.autograd.grad((bound + focal).mean(), (eps, prior))
    close(gradients[0], g["grad_loss_eps_hat"], rtol=1e-5, atol=1e-5)
    close(gradients[1], g["grad_loss_prior_direct"], rtol=1e-5, atol=1e-5)


# ---- calibration


ETAS = (0.001, 0.01, 0.1, 0.3, 0.5, 0.8, 0.99)
PRIORS = (1e-6, 1e-3, 0.05, 0.5, 0.95, 1 - 1e-6)


def cases(t, logits_of=lambda eta: torch.zeros_like(eta)):
    """eta, logits, y_t, prior of every combination, (1, 1, N) in float64, and t."""
    eta, prior, y_t = torch.tensor(list(itertools.product(ETAS, PRIORS, (0.0, 1.0))), dtype=torch.float64).T
    eta, prior, y_t = (x[None, None] for x in (eta, prior, y_t))
    return eta, logits_of(eta), y_t, prior, torch.tensor([t])


def trained_losses(process, logits, y_t, prior, t, gamma, weight):
    """Loss of every voxel if it has noise, and if it has none: the losses that training uses, voxel by voxel."""
    voxels = [x.flatten()[:, None, None] for x in (logits, y_t, prior)]
    times = t.expand(logits.numel())
    losses = []
    for noise in (1.0, 0.0):
        y_start = (voxels[1] - noise).abs()
        bound = variational_bound(process, voxels[0], y_start, voxels[1], voxels[2], times)
        losses.append((bound + weight * noise_loss(voxels[0], y_start, voxels[1], gamma)).reshape(logits.shape))
    return losses


def minimiser(process, eta, y_t, prior, t, gamma, weight):
    """Logits of the least expected loss, by bisection of its derivative, which autograd takes."""
    low, high = torch.full_like(eta, -29.0), torch.full_like(eta, 29.0)
    for _ in range(45):
        x = ((low + high) / 2).requires_grad_()
        noise, none = trained_losses(process, x, y_t, prior, t, gamma, weight)
        (slope,) = torch.autograd.grad((eta * noise + (1 - eta) * none).sum(), x)
        low, high = torch.where(slope < 0, x.detach(), low), torch.where(slope < 0, high, x.detach())
    return (low + high) / 2


@pytest.mark.parametrize(("gamma", "weight"), [(2.0, 1.0), (0.0, 1.0), (2.0, 0.0), (0.5, 0.2), (1.0, 10.0), (5.0, 1.0)])
@pytest.mark.parametrize("index", [0, 1, 3, 5, 8, 9])
def test_the_calibrated_minimiser_of_the_trained_loss_is_the_true_probability(paper, index, gamma, weight):
    eta, _, y_t, prior, t = cases(index)
    x = minimiser(paper, eta, y_t, prior, t, gamma, weight)
    found = NoiseCalibration(paper, gamma, weight).logits(x, y_t, prior, t)
    close(found, torch.logit(eta), rtol=0, atol=2e-3)


def test_ten_percent_of_noise_at_the_last_step_are_not_taken_for_two(paper):
    """A voxel of the paper's setting: what inverting the focal loss alone makes of its minimiser."""
    y_t, prior, t = torch.zeros(1, 1, 1), torch.full((1, 1, 1), 0.05), torch.tensor([0])
    x = minimiser(paper, torch.full((1, 1, 1), 0.1, dtype=torch.float64), y_t, prior, t, 2.0, 1.0)
    exact, focal = (NoiseCalibration(paper, bound=b).logits(x, y_t, prior, t).sigmoid().item() for b in (True, False))
    assert exact == pytest.approx(0.1, abs=1e-4)
    assert focal == pytest.approx(0.017, abs=1e-3)


@pytest.mark.parametrize("index", [1, 5, 9])
def test_the_bound_alone_asks_for_the_odds_before_y_t_is_seen(paper, index):
    eta, _, y_t, prior, t = cases(index)
    x = minimiser(paper, eta, y_t, prior, t, 2.0, 0.0)
    likelihood = paper.q_mean(
        torch.stack([y_t[0], 1 - y_t[0]]), prior.expand(2, -1, -1).clamp(1e-6, 1 - 1e-6), t.expand(2)
    )
    same, other = (y_t * likelihood + (1 - y_t) * (1 - likelihood)).split(1)
    close(x, torch.logit(eta) + (same / other).log(), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("gamma", "weight"), [(2.0, 1.0), (0.0, 1.0), (2.0, 0.0), (0.3, 10.0), (5.0, 0.1), (10.0, 1.0)]
)
def test_calibration_keeps_the_order_and_is_finite_in_float32(paper, gamma, weight):
    calibration, t = NoiseCalibration(paper, gamma, weight), torch.arange(10)
    other = torch.tensor([0.0, 1e-6, 1e-3, 0.05, 0.5, 0.95, 0.999, 1.0])
    shape = (10, len(other), 801)
    x, other = torch.linspace(-40, 40, 801).expand(shape), other[:, None].expand(shape)
    found = calibration.logits(x, torch.zeros(shape), other, t)
    exact = calibration.logits(x.double(), torch.zeros(shape).double(), other.double(), t)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    close(found[:, :-1].double(), exact[:, :-1], rtol=1e-4, atol=1e-3)
    assert found[:, :-2].diff(dim=-1).min() >= 0
    # a y_t that the prior all but excludes: the expected focal loss and KL have two minima for some eta
    assert (exact.cummax(-1).values - exact).max() < 0.4
    same = calibration.logits(x, torch.ones(shape), 1 - other, t)  # 0 and 1 change places
    close(same[:, 2:-2], found[:, 2:-2], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("gamma", "weight", "bound"), [(2.0, 1.0, True), (0.0, 1.0, True), (2.0, 0.0, True), (2.0, 1.0, False)]
)
@pytest.mark.parametrize("steps", [1, 10])
def test_the_priors_logits_are_calibrated_to_bayes(gamma, weight, bound, steps):
    process = BernoulliDiffusion(cosine_beta_schedule(steps))
    calibration = NoiseCalibration(process, gamma, weight, bound)
    y_t, prior = torch.meshgrid(torch.tensor([0.0, 1.0]), torch.linspace(0, 1, 2001), indexing="ij")
    y_t, prior = (m[None].expand(steps, -1, -1) for m in (y_t, prior))
    t = torch.arange(steps)
    x = calibration.prior_logits(y_t, prior, t)
    found = calibration.logits(x, y_t, prior, t).sigmoid()
    expected = process.noise_probability(y_t, prior.clamp(1e-3, 1 - 1e-3), t)
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=1e-5)


def test_the_focal_loss_alone_is_inverted_as_published(paper):
    """Charoenphakdee et al. 2021, equation 8: what weights of version 0.1 start from."""
    p = torch.tensor([0.0694, 0.3, 0.5, 0.9], dtype=torch.float64)[None, None]

    def phi(v):
        return (1 - v) ** 2 - 2 * (1 - v) * v * v.log()

    expected = (p / phi(p)) / (p / phi(p) + (1 - p) / phi(1 - p))
    found = NoiseCalibration(paper, 2.0, 5.0, bound=False).logits(torch.logit(p), p.round(), p, torch.tensor([3]))
    close(found.sigmoid(), expected)


def test_parts_are_calibrated_as_the_whole(paper, monkeypatch):
    calibration, t = NoiseCalibration(paper), torch.tensor([2, 7])
    logits, _, y_t, prior = (x.float() for x in batch(2, 3, 5, 7))
    whole = calibration.logits(logits, y_t, prior, t), calibration.prior_logits(y_t, prior, t)
    monkeypatch.setattr("nnunetv2_diffusion.diffusion.bernoulli_loss.CHUNK", 16)
    assert torch.equal(calibration.logits(logits, y_t, prior, t), whole[0])
    assert torch.equal(calibration.prior_logits(y_t, prior, t), whole[1])


def test_a_prior_that_is_no_number_stays_one(paper):
    nan = torch.full((1, 1, 3), torch.nan)
    calibration, t = NoiseCalibration(paper), torch.tensor([4])
    assert calibration.prior_logits(torch.zeros_like(nan), nan, t).isnan().all()
    assert calibration.logits(nan, torch.zeros_like(nan), torch.zeros_like(nan), t).isnan().all()


@pytest.mark.parametrize(("gamma", "weight"), [(-1.0, 1.0), (math.nan, 1.0), (2.0, -0.5)])
def test_an_impossible_calibration_is_named(paper, gamma, weight):
    with pytest.raises(ValueError, match=f"gamma is {gamma} and weight is {weight}, expected at least 0"):
        NoiseCalibration(paper, gamma, weight)
