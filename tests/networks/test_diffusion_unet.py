"""Laws of the module behind nnU-Net's call ``network(image) -> logits``."""

import copy
from types import SimpleNamespace

import pytest
import torch

from nnunetv2_diffusion.diffusion import AnalogBits, ContentNoise, GaussianDiffusion, linear_beta_schedule
from nnunetv2_diffusion.diffusion.noise import content_hash
from nnunetv2_diffusion.networks import DiffusionUNet, to_mask, to_x_start
from nnunetv2_diffusion.sampling import Estimator, NoiseByContent, SamplingConfig, run_chain

K = 3
PATCH = (16, 20)
SAMPLERS = [
    {"steps": 1},
    {"steps": 5},
    {"steps": 5, "sampler": "ddim"},
    {"steps": 5, "sampler": "ddim", "eta": 0.5},
    {"steps": 2, "samples": 3},
    {"steps": 5, "samples": 2, "sampler": "ddim"},
    {"steps": 4, "step_spacing": "trailing"},
]
samplers = pytest.mark.parametrize("sampling", SAMPLERS, ids=lambda s: "-".join(map(str, s.values())))
heads = pytest.mark.parametrize("regions", [False, True], ids=["classes", "regions"])


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 1, *PATCH)


@pytest.fixture
def make_awake(make_segmentor, wake):
    """A segmentor in eval mode whose prediction depends on mask, time and estimate."""

    def make(regions: bool = False, **kwargs):
        network = wake(make_segmentor(**kwargs), size=0.4).eval()
        network.sigmoid = regions
        return network

    return make


@pytest.fixture
def make_oracle(make_segmentor):
    """A segmentor whose network answers with given logits, whatever it is asked, and notes the questions."""

    def make(logits: torch.Tensor | list[torch.Tensor], **kwargs):
        class Oracle(DiffusionUNet):
            def denoise(self, image, mask=None, t=None, estimate=None, full_resolution_only=False):
                self.asked.append((mask, t, estimate, full_resolution_only))
                return logits[0] if full_resolution_only and isinstance(logits, list) else logits

        Oracle.asked = []
        return make_segmentor(cls=Oracle, **kwargs).eval()

    return make


def probabilities(logits: torch.Tensor, regions: bool) -> torch.Tensor:
    return logits.sigmoid() if regions else logits.softmax(1)


# --- what is returned ------------------------------------------------------------------------------------------------


@heads
@samplers
@torch.inference_mode()
def test_prediction_is_bounded_log_probabilities(make_awake, image, sampling, regions):
    logits = make_awake(regions, **sampling)(image)
    assert logits.shape == (2, K, *PATCH)
    assert logits.dtype == torch.float32
    assert logits.abs().max() <= 14
    p = probabilities(logits, regions)
    assert ((p >= 0) & (p <= 1)).all()
    assert p.std() > 1e-2
    if not regions:
        torch.testing.assert_close(logits.exp().sum(1), torch.ones(2, *PATCH), rtol=0, atol=1e-4)


@heads
@samplers
def test_prediction_of_a_network_that_is_sure_is_exact_and_bounded(make_oracle, image, sampling, regions):
    truth = torch.randint(0, 2, (2, K, *PATCH)).bool()
    if not regions:
        truth = torch.nn.functional.one_hot(torch.randint(0, K, (2, *PATCH)), K).movedim(-1, 1).bool()
    network = make_oracle(torch.where(truth, 1e4, -1e4), **sampling)
    network.sigmoid = regions
    logits = network(image)
    assert logits.abs().max() <= 14
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(probabilities(logits, regions), truth.float(), rtol=0, atol=1e-5)
    assert torch.equal(
        logits > logits.mean() if regions else logits.argmax(1), truth if regions else truth.int().argmax(1)
    )


@heads
def test_bounded_logits_stay_finite_when_added_up_in_half_precision(make_oracle, image, regions):
    """nnU-Net multiplies by a Gaussian of at most 10 and adds up overlapping tiles in float16."""
    network = make_oracle(1e4 * torch.randn(2, K, *PATCH), steps=2)
    network.sigmoid = regions
    half = network(image).half() * 10
    assert torch.isfinite(sum(half for _ in range(64))).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_prediction_is_a_fresh_tensor(make_awake, image, mode):
    network = make_awake()
    with mode():
        first = network(image).detach()
        copied = first.clone()
        first.mul_(0).sub_(5)
        assert torch.equal(network(image), copied)


def test_prediction_with_deep_supervision_is_a_list_from_fine_to_coarse(make_awake, image):
    network = make_awake(unet={"deep_supervision": True}, samples=2)
    outputs = network(image)
    assert isinstance(outputs, list)
    assert [tuple(o.shape) for o in outputs] == [(2, K, 16, 20), (2, K, 8, 10)]
    for output in outputs:
        assert output.abs().max() <= 14
        torch.testing.assert_close(output.exp().sum(1), torch.ones_like(output[:, 0]), rtol=0, atol=1e-4)
    network.decoder.deep_supervision = False
    assert torch.equal(network(image), outputs[0])


@samplers
def test_prediction_of_a_plain_network_is_one_pass(make_unet, image, sampling):
    unet = make_unet()
    stock = copy.deepcopy(unet)
    network = DiffusionUNet(unet, None, SamplingConfig(**sampling), K, time_conditioning=False)
    for a, b in zip(network(image), stock(image), strict=True):
        assert torch.equal(a, b)


# --- what it depends on ----------------------------------------------------------------------------------------------


@samplers
@torch.inference_mode()
def test_prediction_is_the_same_bit_for_bit_whatever_came_before(make_awake, image, sampling):
    network = make_awake(**sampling)
    first = network(image).clone()
    assert torch.equal(network(image), first)
    network(torch.randn_like(image))
    torch.manual_seed(12345)
    network.train()
    network.eval()
    assert torch.equal(network(image), first)


@torch.inference_mode()
def test_prediction_leaves_the_global_random_state_alone(make_awake, image):
    network = make_awake()
    before = torch.get_rng_state()
    network(image)
    assert torch.equal(torch.get_rng_state(), before)


@samplers
@torch.inference_mode()
def test_prediction_does_not_depend_on_the_other_images_of_a_batch(make_awake, image, sampling):
    network = make_awake(**sampling)
    together = network(image)
    for index in range(2):
        torch.testing.assert_close(network(image[index : index + 1])[0], together[index], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(network(image.flip(0)).flip(0), together, rtol=1e-3, atol=1e-3)


@samplers
@torch.inference_mode()
def test_seed_changes_the_prediction(make_awake, image, sampling):
    network = make_awake(**sampling)
    first = network(image)
    network.sampling = SamplingConfig(**sampling, seed=1)
    assert (network(image) - first).abs().max() > 1e-2
    network.sampling = SamplingConfig(**sampling, seed=0)
    assert torch.equal(network(image), first)


@pytest.mark.parametrize("name", ["steps", "sampler", "samples"])
@torch.inference_mode()
def test_sampling_changes_the_prediction(make_awake, image, name):
    network = make_awake(steps=3)
    first = network(image)
    network.sampling = SamplingConfig(**{"steps": 3, name: {"steps": 4, "sampler": "ddim", "samples": 2}[name]})
    assert (network(image) - first).abs().max() > 1e-3


# --- the reverse process ---------------------------------------------------------------------------------------------


def draw_by_hand(network, image, config: SamplingConfig, sample: int, regions: bool) -> torch.Tensor:
    """One chain from the published algorithms, with coefficients from alphas_cumprod, in float64."""
    alphas_cumprod = torch.cumprod(1 - linear_beta_schedule(1001), 0)
    kept = torch.linspace(0, 1000, config.steps).round().long() if config.steps > 1 else torch.tensor([1000])
    if config.step_spacing == "trailing":
        kept = torch.tensor([round(1001 * k / config.steps) - 1 for k in range(1, config.steps + 1)])
    noise = ContentNoise(content_hash(image), config.seed, sample, image.device)
    x = noise((K, *PATCH)).double()
    p = None
    for i in reversed(range(config.steps)):
        t = torch.full((len(image),), int(kept[i]))
        estimate = p.float() if network.self_conditioning and p is not None else None
        mask = (x.clamp(-1, 1) + 1) / 2
        p = probabilities(network.denoise(image, mask.float(), t, estimate), regions).double()
        if i == 0:
            return p
        now, before = alphas_cumprod[kept[i]], alphas_cumprod[kept[i - 1]]
        variance = (1 - before) / (1 - now) * (1 - now / before)
        sigma = variance.sqrt() * (1 if config.sampler == "ddpm" else config.eta)
        eps = (x - now.sqrt() * (2 * p - 1)) / (1 - now).sqrt()
        x = before.sqrt() * (2 * p - 1) + (1 - before - sigma**2).sqrt() * eps
        if sigma > 0:
            x = x + sigma * noise((K, *PATCH))


@heads
@samplers
@pytest.mark.parametrize("self_conditioning", [False, True], ids=["mask", "self-conditioned"])
@torch.inference_mode()
def test_prediction_is_the_mean_probability_of_independent_chains(
    make_awake, image, sampling, regions, self_conditioning
):
    network = make_awake(regions, self_conditioning=self_conditioning, **sampling)
    config = network.sampling
    chains = [draw_by_hand(network, image, config, n, regions) for n in range(config.samples)]
    if config.samples > 1:
        assert (chains[0] - chains[1]).abs().max() > 5e-3
    found = probabilities(network(image), regions).double()
    torch.testing.assert_close(found, torch.stack(chains).mean(0), rtol=0, atol=1e-4)


@samplers
def test_the_network_is_told_the_training_index_of_each_step(make_oracle, image, sampling):
    network = make_oracle(torch.zeros(2, K, *PATCH), **sampling)
    network(image)
    expected = (
        network.process.respace(network.sampling.steps, network.sampling.step_spacing).timestep_map.flip(0).tolist()
    )
    assert expected[0] == 1000
    assert [t.tolist() for _, t, _, _ in network.asked] == [[t, t] for t in expected] * network.sampling.samples


@samplers
def test_the_network_sees_masks_in_the_unit_interval_that_start_as_noise(make_oracle, image, sampling):
    network = make_oracle(20 * torch.randn(2, K, *PATCH), **sampling)
    network(image)
    for mask, _, _, _ in network.asked:
        assert mask.min() >= 0
        assert mask.max() <= 1
    for mask, _, _, _ in network.asked[:: network.sampling.steps]:
        saturated = ((mask == 0) | (mask == 1)).float().mean()
        assert saturated == pytest.approx(0.317, abs=0.05)  # share of a standard normal outside [-1, 1]


def test_a_prediction_computes_no_coarse_heads(make_oracle, image):
    network = make_oracle([torch.randn(2, K, *PATCH)] * 2, steps=3, unet={"deep_supervision": True})
    network(image)
    assert [only for _, _, _, only in network.asked] == [True, True, True]


@heads
@torch.inference_mode()
def test_a_self_conditioned_network_is_given_the_probabilities_of_the_step_before(make_awake, image, regions):
    network = make_awake(regions, self_conditioning=True, steps=3, samples=2)
    inputs, outputs = [], []
    network.encoder.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    network.decoder.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
    network(image)
    assert len(inputs) == 6
    for call, seen in enumerate(inputs):
        estimate = seen[:, -K:]
        if call % 3 == 0:  # a new sample starts without an estimate
            assert not estimate.any()
        else:
            assert torch.equal(estimate, probabilities(outputs[call - 1], regions))


@heads
@samplers
@torch.inference_mode()
def test_a_chain_yields_every_step_from_noise_to_the_prediction(make_awake, image, sampling, regions):
    network = make_awake(regions, unet={"deep_supervision": True}, **sampling)
    config, chain = network.sampling, network.make_chain(network.sampling)
    noise = NoiseByContent(content_hash(image), config.seed, 0, (K, *PATCH), image.device)
    steps = list(run_chain(chain, Estimator(chain, image), [[()]] * config.steps, noise))
    start = ContentNoise(content_hash(image), config.seed, 0, image.device)((K, *PATCH))
    assert torch.equal(steps[0].state, start)
    times = network.process.respace(config.steps, config.step_spacing).timestep_map.flip(0).tolist()
    for step, t in zip(steps, times, strict=True):
        expected = network(image, step.state, torch.full((2,), t), full_resolution_only=True)
        torch.testing.assert_close(step.answer, probabilities(expected, regions))
    if config.samples == 1:
        p = probabilities(network(image)[0], regions)
        torch.testing.assert_close(steps[-1].answer, p, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_coarse_maps_of_a_prediction_are_the_fine_one_on_their_grids(make_awake, image):
    network = make_awake(unet={"deep_supervision": True})
    shapes = [tuple(logits.shape) for logits in network(image, torch.randn(2, K, *PATCH), torch.zeros(2).long())]
    found = network(image)
    assert [tuple(logits.shape) for logits in found] == shapes
    for coarse in found[1:]:
        assert torch.equal(coarse, torch.nn.functional.interpolate(found[0], coarse.shape[2:]))


# --- one pass --------------------------------------------------------------------------------------------------------


def test_a_call_with_a_state_is_one_pass_over_its_clipped_mask(make_awake, image):
    network = make_awake(self_conditioning=True)
    x_t, t, estimate = 2 * torch.randn(2, K, *PATCH), torch.tensor([5, 900]), torch.rand(2, K, *PATCH)
    expected = network.denoise(image, (x_t.clamp(-1, 1) + 1) / 2, t, estimate)
    assert torch.equal(network(image, x_t, t, estimate), expected)
    assert network(image, x_t, t, estimate).requires_grad


def test_mask_and_x_start_are_inverse_in_the_unit_interval():
    p = torch.rand(100)
    torch.testing.assert_close(to_mask(to_x_start(p)), p)
    assert to_mask(torch.tensor([-3.0, -1, 0, 1, 7])).tolist() == [0, 0, 0.5, 1, 1]
    assert to_x_start(torch.tensor([0.0, 0.5, 1])).tolist() == [-1, 0, 1]


@heads
def test_probabilities_are_float32_for_half_precision_logits(make_segmentor, regions):
    network = make_segmentor()
    network.sigmoid = regions
    logits = (5 * torch.randn(2, K, *PATCH)).bfloat16()
    assert torch.equal(network.probabilities(logits), probabilities(logits.float(), regions))


def test_a_network_without_time_is_not_told_it(make_segmentor, image):
    network = make_segmentor(time_conditioning=False)
    x_t = torch.randn(2, K, *PATCH)
    assert torch.equal(network(image, x_t, torch.tensor([5, 900])), network(image, x_t, torch.tensor([7, 3])))


# --- errors ----------------------------------------------------------------------------------------------------------


def test_more_steps_than_the_process_has_raise_at_construction(make_segmentor):
    make_segmentor(timesteps=6, steps=6)
    with pytest.raises(ValueError, match=r"1 \.\. 6, got 7"):
        make_segmentor(timesteps=6, steps=7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("index", [0, 1])
def test_an_image_that_is_not_finite_raises(make_segmentor, image, bad, index):
    image[index, 0, 3, 4] = bad
    with pytest.raises(ValueError, match=f"image {index} of the batch has 1 NaN or infinite"):
        make_segmentor().eval()(image)


# --- weights ---------------------------------------------------------------------------------------------------------


@heads
def test_kind_of_heads_is_stored_with_the_weights(make_segmentor, make_awake, image, regions, tmp_path):
    network = make_awake(regions)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    other = make_segmentor().eval()
    other.sigmoid = not regions
    other.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    assert other.sigmoid is regions
    assert torch.equal(other(image), network(image))


def test_everything_in_the_state_dict_is_a_tensor(make_segmentor):
    assert all(isinstance(value, torch.Tensor) for value in make_segmentor().state_dict().values())


def test_weights_of_another_number_of_classes_are_named(make_segmentor):
    state = make_segmentor(classes=4).state_dict()
    with pytest.raises(RuntimeError, match="segments 4 classes, expected 3"):
        make_segmentor(classes=3).load_state_dict(state)


@pytest.mark.parametrize(
    ("part", "setting"), [("time", {"time_conditioning": False}), ("transformer", {"transformer_layers": 0})]
)
def test_weights_with_or_without_a_part_are_named(make_segmentor, part, setting):
    with_part, without = make_segmentor(), make_segmentor(**setting)
    with pytest.raises(RuntimeError, match=f"no {part} part, expected one"):
        with_part.load_state_dict(without.state_dict())
    with pytest.raises(RuntimeError, match=f"a {part} part, expected none"):
        without.load_state_dict(with_part.state_dict())


def test_weights_of_a_network_without_estimate_are_named_by_shape(make_segmentor):
    state = make_segmentor().state_dict()
    with pytest.raises(RuntimeError, match=r"encoder\.stages.*\(8, 4, 3, 3\), expected \(8, 7, 3, 3\)"):
        make_segmentor(self_conditioning=True).load_state_dict(state)


def test_weights_of_a_stock_network_are_not_taken_for_ours(make_segmentor, make_unet):
    network = make_segmentor()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(RuntimeError, match=r"another network.*no time part, expected one"):
        network.load_state_dict(make_unet().state_dict())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    "strict",
    [
        {"kwargs": {"strict": False}},
        {"args": (False,)},
    ],
    ids=["keyword", "positional"],
)
def test_not_strict_loads_what_fits(make_segmentor, strict):
    source = make_segmentor()
    state = {name: value for name, value in source.state_dict().items() if name.startswith("decoder.seg_layers")}
    network = make_segmentor()
    network.load_state_dict(state, *strict.get("args", ()), **strict.get("kwargs", {}))
    for name, value in state.items():
        assert torch.equal(network.state_dict()[name], value)


def test_a_copy_is_independent(make_awake, image):
    network = make_awake()
    expected = network(image)
    copied = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(copied(image), expected)


def test_process_may_be_one_that_was_respaced_for_training(make_unet, image, wake):
    process = GaussianDiffusion(linear_beta_schedule(1001)).respace(5)
    network = wake(DiffusionUNet(make_unet(deep_supervision=False), process, SamplingConfig(5), K)).eval()
    times = []
    network.time.register_forward_pre_hook(lambda module, args: times.append(args[0].tolist()))
    network(image)
    assert times == [[t, t] for t in (1000, 750, 500, 250, 0)]


# --- analog bits -----------------------------------------------------------------------------------------------------


def test_a_network_of_many_classes_has_few_channels_of_bits_for_mask_and_estimate(make_segmentor, image):
    network = make_segmentor(classes=20, encoding=AnalogBits(20), self_conditioning=True, steps=2).eval()
    assert next(m for m in network.encoder.modules() if isinstance(m, torch.nn.Conv2d)).in_channels == 1 + 2 * 5
    assert network(image).shape == (2, 20, *PATCH)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("conditioned", [False, True])
def test_with_two_classes_bits_and_one_hot_predict_the_same(make_segmentor, wake, image, sampler, conditioned):
    """If the one-hot network reads the second class alone, and its noise there is that of the bits."""
    given = {"classes": 2, "steps": 4, "sampler": sampler, "self_conditioning": conditioned}
    bits = wake(make_segmentor(encoding=AnalogBits(2), **given), size=0.4).eval()
    one_hot = make_segmentor(**given).eval()
    state = bits.state_dict()
    for key in [k for k, v in state.items() if v.shape != one_hot.state_dict()[k].shape]:
        weight = torch.zeros_like(one_hot.state_dict()[key])
        weight[:, [0, *range(2, weight.shape[1], 2)]] = state[key]
        state[key] = weight
    one_hot.load_state_dict(state)
    drawn = torch.randn(4, 2, 1, *PATCH)

    def chain(network):
        fields = iter(drawn)
        noise = SimpleNamespace(normal=lambda step: next(fields).expand(2, network.encoding.channels, *PATCH))
        chain = network.make_chain(network.sampling)
        *_, last = run_chain(chain, Estimator(chain, image), [[()]] * chain.steps, noise)
        return last.answer

    with torch.inference_mode():
        first, second = chain(bits), chain(one_hot)
    assert first.std() > 0.05
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)
