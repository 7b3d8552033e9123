"""Laws of the training strategies, alone and in the trainer's loss, and the published numbers."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nnunetv2_diffusion.diffusion import GaussianDiffusion, MaskEncoding, linear_beta_schedule
from nnunetv2_diffusion.training import (
    DiffusionTrainer,
    RecycleXT,
    RecycleXtPlus1,
    SelfConditionXt,
    SelfConditionXtPlus1,
    Standard,
)
from nnunetv2_diffusion.training.losses import SampleDiceCELoss

T = 1001
# strategies whose reference agrees with the equations; SelfConditionXtPlus1's does not, but for its first pass
REFERENCE = {
    "diff": Standard(),
    "rec_xT": RecycleXT(),
    "rec_xt1": RecycleXtPlus1(),
    "sc_xt_p0": SelfConditionXt(0.0),
    "sc_xt_p1": SelfConditionXt(1.0),
}
ALL = {
    "standard": Standard(),
    "recycle_xT": RecycleXT(),
    "recycle_xt1": RecycleXtPlus1(),
    "self_condition_xt": SelfConditionXt(1.0),
    "self_condition_xt1": SelfConditionXtPlus1(1.0),
}
references = pytest.mark.parametrize("tag", REFERENCE)
strategies = pytest.mark.parametrize("strategy", ALL.values(), ids=ALL)
with_first_pass = pytest.mark.parametrize("strategy", list(ALL.values())[1:], ids=list(ALL)[1:])
self_conditioned = pytest.mark.parametrize("kind", [SelfConditionXt, SelfConditionXtPlus1])


@pytest.fixture(scope="module")
def process() -> GaussianDiffusion:
    return GaussianDiffusion(linear_beta_schedule(T))


def network_mask(x: torch.Tensor) -> torch.Tensor:
    """What a network sees of a diffusion state."""
    return (x.clamp(-1, 1) + 1) / 2


def constant(p: float):
    """A first pass that answers with one probability, and notes what it was asked."""

    def predict(x, t, samples=None):
        predict.asked.append((x, t, samples))
        return torch.full_like(x, p)

    predict.asked = []
    return predict


def masks(batch: int = 4, size: int = 8, heads: int = 3) -> torch.Tensor:
    """One-hot masks in [-1, 1], (B, K, size, size)."""
    labels = torch.randint(0, heads, (batch, size, size))
    return 2 * nn.functional.one_hot(labels, heads).movedim(-1, 1).float() - 1


# --- published numbers -----------------------------------------------------------------------------------------------


class ToyNetwork(nn.Module):
    """The network of the golden values: linear in mask, time, image, estimate and a shifted mask."""

    def __init__(self, theta: torch.Tensor):
        super().__init__()
        self.theta = nn.Parameter(theta.clone())
        self.encoding = MaskEncoding(3)
        self.passes = []

    def forward(self, image, x_t, t, estimate=None, full_resolution_only=False):
        mask = network_mask(x_t)
        self.passes.append(SimpleNamespace(mask=mask, t=t, estimate=estimate, trained=torch.is_grad_enabled()))
        c = torch.arange(mask.shape[1]).view(1, -1, 1, 1)
        time = ((t + 1) / T).view(-1, 1, 1, 1)
        p = torch.zeros_like(mask) if estimate is None else estimate
        a, b, d, e, f = self.theta
        return a * mask + b * (c + 1) * image + d * time * c + e * p + f * mask.roll(1, dims=2) * c

    def probabilities(self, logits):
        return logits.softmax(1)


class FixedTimes:
    """A time sampler that draws given steps with given weights, and notes the range it was asked for."""

    learns = False

    def __init__(self, t: torch.Tensor, weights: torch.Tensor | None = None):
        self.t = t
        self.weights = torch.ones(len(t)) if weights is None else weights
        self.ranges = []

    def sample(self, batch_size, t_range):
        self.ranges.append(t_range)
        return self.t[:batch_size], self.weights[:batch_size]


@pytest.fixture
def make_trainer(process):
    """A trainer without its start: what is needed to compute one training loss."""

    def make(strategy, network, time_sampler, chain=process, loss=None, heads=3):
        trainer = object.__new__(DiffusionTrainer)
        trainer.strategy = strategy
        trainer.network = network
        trainer.time_sampler = time_sampler
        trainer.process = chain
        trainer.loss = loss or SampleDiceCELoss(regions=False)
        trainer.settings = SimpleNamespace(gaussian=SimpleNamespace(time_sampling="uniform"))
        trainer.label_manager = SimpleNamespace(num_segmentation_heads=heads, has_regions=False, ignore_label=None)
        trainer.device = torch.device("cpu")
        trainer.is_ddp = False
        return trainer

    return make


@pytest.fixture
def reference(golden, make_trainer, monkeypatch):
    """Run the trainer's loss on the golden inputs: tag -> (golden values of the tag, network, sampler, loss)."""
    values = golden("imgx_strategies")
    first = {key: value.movedim(-1, 1) for key, value in values.items() if value.ndim == 4}

    def run(tag, strategy):
        noises = iter([first["noise_first_call"], first["noise_second_call"]])

        def stored_noise(x):
            noise = next(noises)
            assert noise.shape == x.shape
            return noise

        monkeypatch.setattr(torch, "randn_like", stored_noise)
        network = ToyNetwork(values["theta"])
        sampler = FixedTimes(values["t_index"].long(), values["probs_t"] * T)  # the reference's weights
        loss = SampleDiceCELoss(regions=False, weight_ce=20, smooth=0)
        trainer = make_trainer(strategy, network, sampler, loss=loss)
        value = trainer._training_loss(first["image"], values["label"][:, None])
        own = {key.removeprefix(f"{tag}__"): value for key, value in values.items() if key.startswith(f"{tag}__")}
        return own, network, sampler, value, 2 - len(list(noises))

    return run


@references
def test_inputs_of_the_network_are_the_published_ones(reference, tag):
    strategy = REFERENCE[tag]
    expected, network, sampler, _, noise_calls = reference(tag, strategy)
    numbers = [1, 2] if "net_mask_pass2" in expected else [1]
    if tag == "sc_xt_p0":
        numbers = [2]  # the reference runs a first pass and drops its result
    assert len(network.passes) == len(numbers)
    for found, number in zip(network.passes, numbers, strict=True):
        mask = expected[f"net_mask_pass{number}"].movedim(-1, 1)
        torch.testing.assert_close(found.mask, mask[:, :3], rtol=1e-5, atol=1e-5)
        estimate = torch.zeros_like(found.mask) if found.estimate is None else found.estimate
        if strategy.self_conditioning:
            torch.testing.assert_close(estimate, mask[:, 3:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close((found.t + 1) / T, expected[f"net_t_pass{number}"].double().float())
        assert found.trained is (number == numbers[-1])
    assert noise_calls == int(expected["noise_calls"])
    assert sampler.ranges == [tuple(expected["t_range"].tolist())]


@references
def test_loss_and_its_gradient_are_the_published_ones(reference, tag):
    """The gradient is the published one only if none flows through the first pass."""
    expected, network, _, loss, _ = reference(tag, REFERENCE[tag])
    torch.testing.assert_close(loss.detach(), expected["loss"], rtol=1e-4, atol=1e-4)
    loss.backward()
    torch.testing.assert_close(network.theta.grad, expected["grad_theta"], rtol=1e-4, atol=1e-4)


def test_first_pass_of_self_conditioning_on_the_step_before_is_the_published_one(reference):
    expected, network, sampler, _, _ = reference("sc_xt1_p1", SelfConditionXtPlus1(1.0))
    mask = expected["net_mask_pass1"].movedim(-1, 1)
    torch.testing.assert_close(network.passes[0].mask, mask[:, :3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((network.passes[0].t + 1) / T, expected["net_t_pass1"])
    estimate = expected["net_mask_pass2"].movedim(-1, 1)[:, 3:]
    torch.testing.assert_close(network.passes[1].estimate, estimate, rtol=1e-5, atol=1e-5)
    assert sampler.ranges == [tuple(expected["t_range"].tolist())]


# --- self-conditioning on x_{t+1}, eq. 8 -----------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_self_conditioning_on_the_step_before_draws_x_t_from_the_true_posterior(process, monkeypatch, probability):
    x_start = masks().double()
    t = torch.tensor([0, 250, 700, 999])
    noises = [torch.randn_like(x_start), torch.randn_like(x_start)]
    given = iter(noises)
    monkeypatch.setattr(torch, "randn_like", lambda x: next(given))
    last = SelfConditionXtPlus1(probability)(constant(0.3), process, x_start, t)

    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    for i, step in enumerate(t.tolist()):
        now, after, beta = alphas_cumprod[step], alphas_cumprod[step + 1], betas[step + 1]
        x_next = after.sqrt() * x_start[i] + (1 - after).sqrt() * noises[0][i]  # 8a
        mean = now.sqrt() * beta / (1 - after) * x_start[i] + (1 - beta).sqrt() * (1 - now) / (1 - after) * x_next
        variance = beta * (1 - now) / (1 - after)
        torch.testing.assert_close(last.x_t[i], mean + variance.sqrt() * noises[1][i], rtol=1e-9, atol=1e-9)  # 8d


def test_self_conditioning_on_the_step_before_asks_at_the_step_before(process):
    predict = constant(0.3)
    x_start, t = masks(), torch.tensor([0, 250, 700, 999])
    last = SelfConditionXtPlus1(1.0)(predict, process, x_start, t)
    x_next, asked, _ = predict.asked[0]
    assert asked.tolist() == [1, 251, 701, 1000]
    assert not torch.equal(x_next, last.x_t)
    assert torch.equal(last.estimate, torch.full_like(x_start, 0.3))


# --- laws ------------------------------------------------------------------------------------------------------------


@strategies
@pytest.mark.parametrize("t", [0, 300, 999])
def test_last_input_is_noised_as_q_says(process, strategy, t):
    """With a perfect first pass, x_t has mean sqrt(ab) x_start and variance 1 - ab in every strategy."""
    x_start = masks(batch=2, size=160)

    def perfect(x, t, samples=None):
        return network_mask(x_start if samples is None else x_start[samples])

    last = strategy(perfect, process, x_start, torch.full((2,), t))
    noise = last.x_t - process.alphas_cumprod[t].sqrt().float() * x_start
    spread = (1 - process.alphas_cumprod[t]).sqrt().float()
    assert abs(noise.mean()) < 0.02 * spread
    assert noise.std() == pytest.approx(float(spread), rel=0.02)
    assert abs((noise * x_start).mean()) < 0.02 * spread


def test_standard_denoising_has_no_first_pass(process):
    predict = constant(0.5)
    assert Standard()(predict, process, masks(), torch.arange(4)).estimate is None
    assert not predict.asked


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (RecycleXT(), [1000, 1000, 1000, 1000]),
        (RecycleXtPlus1(), [1, 11, 501, 1000]),
        (SelfConditionXt(1.0), [0, 10, 500, 999]),
        (SelfConditionXtPlus1(1.0), [1, 11, 501, 1000]),
    ],
)
def test_first_pass_is_asked_once_at_its_step(process, strategy, expected):
    predict = constant(0.5)
    strategy(predict, process, masks(), torch.tensor([0, 10, 500, 999]))
    assert [t.tolist() for _, t, _ in predict.asked] == [expected]


@pytest.mark.parametrize("strategy", [RecycleXT(), RecycleXtPlus1()])
def test_recycled_is_the_probability_and_not_the_ground_truth(process, strategy, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    t = torch.tensor([0, 250, 700, 999])
    last = strategy(constant(0.7), process, masks(), t)
    expected = process.alphas_cumprod[t].sqrt().float() * (2 * 0.7 - 1)
    torch.testing.assert_close(last.x_t, expected.view(-1, 1, 1, 1).expand_as(last.x_t))
    assert last.estimate is None


@pytest.mark.parametrize("strategy", [RecycleXT(), RecycleXtPlus1()])
def test_noise_of_the_second_pass_is_fresh(process, strategy):
    predict = constant(0.5)  # x0^ is 0: what is left of x_t is noise
    x_start, t = masks(batch=2, size=128), torch.tensor([500, 500])
    second = strategy(predict, process, x_start, t).x_t
    x, asked, _ = predict.asked[0]
    first = x - process.alphas_cumprod[asked].sqrt().float().view(-1, 1, 1, 1) * x_start
    for a, b in zip(first.flatten(1), second.flatten(1), strict=True):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.03


def test_both_passes_of_self_conditioning_see_the_same_mask(process):
    predict = constant(0.5)
    last = SelfConditionXt(1.0)(predict, process, masks(), torch.tensor([0, 10, 500, 999]))
    assert torch.equal(predict.asked[0][0], last.x_t)


@strategies
def test_noise_differs_between_calls_samples_and_heads(process, strategy):
    t = torch.full((2,), 900)
    x_start = masks(batch=1).expand(2, -1, -1, -1)
    a, b = (strategy(constant(0.5), process, x_start, t).x_t for _ in range(2))
    assert not torch.equal(a, b)
    assert not torch.equal(a[0], a[1])
    assert not torch.equal(a[0, 0] - a[0, 0].mean(), a[0, 1] - a[0, 1].mean())


@strategies
def test_ground_truth_and_times_are_left_alone(process, strategy):
    x_start, t = masks(), torch.tensor([0, 10, 500, 999])
    copies = x_start.clone(), t.clone()
    strategy(constant(0.5), process, x_start, t)
    assert torch.equal(x_start, copies[0])
    assert torch.equal(t, copies[1])


# --- the gate of self-conditioning -----------------------------------------------------------------------------------


@self_conditioned
def test_probability_0_makes_no_first_pass_and_gives_zeros(process, kind):
    predict = constant(0.5)
    last = kind(0.0)(predict, process, masks(), torch.tensor([0, 10, 500, 999]))
    assert not predict.asked
    assert torch.equal(last.estimate, torch.zeros_like(last.x_t))


@self_conditioned
def test_probability_1_makes_one_first_pass_for_all(process, kind):
    predict = constant(0.5)
    last = kind(1.0)(predict, process, masks(), torch.tensor([0, 10, 500, 999]))
    assert [samples.tolist() for _, _, samples in predict.asked] == [[0, 1, 2, 3]]
    assert torch.equal(last.estimate, torch.full_like(last.x_t, 0.5))


@self_conditioned
def test_probability_is_the_share_of_samples_that_keep_their_estimate(process, kind):
    batch = 2000
    kept = []

    def predict(x, t, samples):
        kept.append(samples)
        assert len(x) == len(t) == len(samples)
        assert torch.equal(t, times[samples] + (kind is SelfConditionXtPlus1))
        return (samples + 1.0).view(-1, 1, 1, 1).expand_as(x)

    times = torch.randint(0, T - 1, (batch,))
    x_start = masks(batch, size=2)
    last = kind(0.3)(predict, process, x_start, times)
    assert len(kept) == 1
    assert len(kept[0]) / batch == pytest.approx(0.3, abs=0.04)
    expected = torch.zeros(batch)
    expected[kept[0]] = kept[0] + 1.0
    assert torch.equal(last.estimate, expected.view(-1, 1, 1, 1).expand_as(x_start))


def test_first_pass_sees_the_masks_of_the_kept_samples(process):
    asked = []

    def predict(x, t, samples):
        asked.append((x, samples))
        return torch.zeros_like(x)

    last = SelfConditionXt(0.5)(predict, process, masks(batch=20), torch.arange(20))
    (x, samples), *rest = asked
    assert not rest
    assert 0 < len(samples) < 20
    assert torch.equal(x, last.x_t[samples])


# --- in the trainer --------------------------------------------------------------------------------------------------


@strategies
@pytest.mark.parametrize("steps", [2, 5])
def test_the_network_is_told_training_indices(make_trainer, process, strategy, steps):
    """Steps are drawn in the respaced chain that is trained; the network hears the indices they stand for."""
    chain = process.respace(steps)
    network = ToyNetwork(torch.ones(5))
    t = torch.tensor([0, steps - 2, steps - 2])
    sampler = FixedTimes(t)
    trainer = make_trainer(strategy, network, sampler, chain)
    trainer._training_loss(torch.randn(3, 1, 8, 8), torch.randint(0, 3, (3, 1, 8, 8)))
    assert sampler.ranges == [(0, steps - strategy.uses_next_step)]
    told = [[chain.timestep_map[i].item() for i in t]]
    if isinstance(strategy, RecycleXT):
        told.insert(0, [1000] * 3)
    elif isinstance(strategy, RecycleXtPlus1 | SelfConditionXtPlus1):
        told.insert(0, [chain.timestep_map[i + 1].item() for i in t])
    elif isinstance(strategy, SelfConditionXt):
        told.insert(0, told[0])
    assert [p.t.tolist() for p in network.passes] == told


@pytest.fixture
def gradient_of(make_trainer, make_segmentor, wake):
    """Gradient of the trainer's loss: (strategy, first_pass) -> one vector, always from the same random state.

    first_pass(network, image, predict) replaces the trainer's own predict.
    """

    def compute(strategy, first_pass=lambda network, image, predict: predict) -> torch.Tensor:
        torch.manual_seed(7)
        network = wake(make_segmentor(self_conditioning=strategy.self_conditioning))
        trainer = make_trainer(strategy, network, FixedTimes(torch.tensor([900, 600])))
        own = trainer._first_pass
        trainer._first_pass = lambda image: first_pass(network, image, own(image))
        image, target = torch.randn(2, 1, 16, 20), torch.randint(0, 3, (2, 1, 16, 20))
        trainer._training_loss(image, target).backward()
        return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    return compute


@with_first_pass
def test_no_gradient_reaches_parameters_through_the_first_pass(gradient_of, strategy):
    answers = []

    def remember(network, image, predict):
        def answer(*args):
            answers.append(predict(*args).detach().clone())
            return predict(*args)

        return answer

    found = gradient_of(strategy, remember)
    assert torch.equal(found, gradient_of(strategy))
    assert torch.equal(found, gradient_of(strategy, lambda network, image, predict: lambda *args: answers[0]))
    other = gradient_of(strategy, lambda network, image, predict: lambda *args: 1 - answers[0])
    assert (found - other).norm() > 1e-3 * found.norm()


@with_first_pass
def test_control_a_first_pass_that_is_not_stopped_changes_the_gradient(gradient_of, strategy):
    def open_pass(network, image, predict):
        return lambda x, t, samples=None: network.probabilities(network(image, x, t))

    found = gradient_of(strategy)
    assert (found - gradient_of(strategy, open_pass)).norm() > 1e-3 * found.norm()


@pytest.mark.parametrize("regions", [False, True], ids=["classes", "regions"])
def test_first_pass_answers_with_probabilities_of_the_full_resolution(make_trainer, make_segmentor, wake, regions):
    network = wake(make_segmentor(unet={"deep_supervision": True}))
    network.sigmoid = regions
    trainer = make_trainer(RecycleXT(), network, None)
    image, x = torch.randn(3, 1, 16, 20), torch.randn(3, 3, 16, 20)
    t = torch.tensor([3, 500, 999])
    p = trainer._first_pass(image)(x, t)
    logits = network(image, x, t)[0]
    assert not p.requires_grad
    assert torch.equal(p, (logits.sigmoid() if regions else logits.softmax(1)).detach())
    kept = torch.tensor([2, 0])
    some = trainer._first_pass(image)(x[kept], t[kept], kept)
    torch.testing.assert_close(some, p[kept], rtol=1e-4, atol=1e-5)


def bfloat16(cache_enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache_enabled)


@with_first_pass
def test_every_parameter_learns_under_autocast_after_a_first_pass(make_trainer, make_segmentor, wake, strategy):
    """With autocast's cache on in the first pass, torch 2.6 leaves most weights without gradient (2.15 does not).

    Casts that were made without gradient would be reused by the trained pass.
    """
    network = wake(make_segmentor(self_conditioning=strategy.self_conditioning))
    trainer = make_trainer(strategy, network, FixedTimes(torch.tensor([900, 600])))
    trainer._autocast = bfloat16
    cached = []
    network.encoder.register_forward_pre_hook(lambda module, args: cached.append(torch.is_autocast_cache_enabled()))
    with trainer._autocast():
        loss = trainer._training_loss(torch.randn(2, 1, 16, 20), torch.randint(0, 3, (2, 1, 16, 20)))
    loss.backward()
    assert cached == [False, True]
    coarse = {id(p) for head in network.decoder.seg_layers[:-1] for p in head.parameters()}
    for name, parameter in network.named_parameters():
        if id(parameter) not in coarse:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_probability_is_the_only_thing_that_is_set_in_a_strategy():
    for kind in (SelfConditionXt, SelfConditionXtPlus1):
        assert kind() == kind(0.5)
        assert replace(kind(), probability=0.2) == kind(0.2)
        assert kind.self_conditioning
    assert [s.uses_next_step for s in ALL.values()] == [False, True, True, False, True]
    assert [s.self_conditioning for s in ALL.values()] == [False, False, False, True, True]
