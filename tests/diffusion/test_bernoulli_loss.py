"""Laws of the losses of Bernoulli diffusion. Expectations are written out in float64 probabilities."""

import itertools
import math

import pytest
import torch

from nnunetv2_diffusion.diffusion import (
    BernoulliDiffusion,
    cosine_beta_schedule,
    focal_logits,
    focal_to_probability,
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


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("eta", [1e-6, 1e-3, 0.1, 0.5, 0.8, 0.999])
def test_the_minimiser_of_the_focal_loss_is_mapped_to_the_true_probability(gamma, eta):
    logits = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    p, q = logits.sigmoid(), (-logits).sigmoid()
    risk = -eta * q**gamma * p.log() - (1 - eta) * p**gamma * q.log()
    found = focal_to_probability(p[risk.argmin()], gamma)
    assert abs(float(found) - eta) < 1e-3 * eta * (1 - eta) + 1e-9


def test_focal_probabilities_keep_their_order_and_ends():
    p = torch.linspace(0, 1, 101)
    eta = focal_to_probability(p, 2.0)
    assert eta[[0, 50, 100]].tolist() == pytest.approx([0, 0.5, 1])
    assert (eta.diff() >= 0).all()
    assert torch.isfinite(focal_to_probability(torch.tensor([0.0, 1e-30, 1 - 1e-7, 1.0]), 2.0)).all()


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_focal_logits_are_the_inverse(gamma):
    eta = torch.logit(torch.linspace(1e-4, 1 - 1e-4, 999)).sigmoid()
    back = focal_to_probability(focal_logits(eta, gamma).sigmoid(), gamma)
    torch.testing.assert_close(back, eta, rtol=2e-3, atol=1e-6)
    assert torch.isfinite(focal_logits(torch.tensor([0.0, 1.0]), gamma)).all()
    assert focal_logits(torch.tensor([float("nan")]), gamma).isnan().all()
