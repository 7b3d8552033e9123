"""HiDiff behind the host's call: which mask comes out, from which noise, and what reaches which network."""

import pytest
import torch

from nnunetv2_diffusion.diffusion import BernoulliDiffusion, NoiseCalibration, cosine_beta_schedule
from nnunetv2_diffusion.diffusion.noise import content_hash
from nnunetv2_diffusion.networks.discriminative import UNetSegmentor, cumulative_strides
from nnunetv2_diffusion.networks.hidiff import HiDiffNetwork, match_features, refiner_topology
from nnunetv2_diffusion.sampling import Estimator, NoiseByContent, SamplingConfig, run_chain


@pytest.fixture
def make_hidiff(make_unet, geometries):
    def make(geometry="2d", classes=3, steps=3, sampler="ddim", samples=1, seed=0, unet=None, **kwargs):
        shape = geometries[geometry]
        segmentor = UNetSegmentor(
            make_unet(geometry=geometry, classes=classes, **{"deep_supervision": False, **(unet or {})})
        )
        return HiDiffNetwork(
            segmentor,
            1,
            classes,
            [list(k) for k in shape.kernel_sizes],
            [list(s) for s in shape.strides],
            BernoulliDiffusion(cosine_beta_schedule(10)),
            SamplingConfig(steps, sampler, samples=samples, seed=seed) if steps else None,
            width=8,
            **kwargs,
        ).eval()

    return make


def calibration(gamma):
    return NoiseCalibration(BernoulliDiffusion(cosine_beta_schedule(10)), gamma)


def image_for(geometries, geometry="2d", batch=2):
    return torch.randn(batch, 1, *geometries[geometry].patch)


@pytest.mark.parametrize("geometry", ["2d", "2d_anisotropic", "3d", "3d_anisotropic"])
@pytest.mark.parametrize("binarized", [True, False])
def test_prediction_has_the_shape_of_nnunets_and_is_bounded(make_hidiff, geometries, geometry, binarized):
    hidiff = make_hidiff(geometry, binarized=binarized)
    image = image_for(geometries, geometry)
    with torch.inference_mode():
        logits = hidiff(image)
    assert logits.shape == (2, 3, *geometries[geometry].patch)
    assert logits.dtype == torch.float32
    assert logits.min() >= -9.22
    assert logits.max() <= 0


def test_zero_steps_give_the_segmentors_own_logits(make_hidiff, geometries):
    hidiff = make_hidiff(steps=0)
    image = image_for(geometries)
    with torch.inference_mode():
        assert torch.equal(hidiff(image), hidiff.segmentor(image).logits)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("regions", [False, True])
def test_one_step_of_an_untrained_refiner_gives_the_prior(make_hidiff, geometries, gamma, regions):
    hidiff = make_hidiff(steps=1, calibration=calibration(gamma))
    hidiff.sigmoid = regions
    image = image_for(geometries)
    with torch.inference_mode():
        prior, refined = (hidiff.probabilities(x) for x in (hidiff.segmentor(image).logits, hidiff(image)))
    torch.testing.assert_close(refined, prior, atol=2e-3, rtol=0)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_samples_of_an_untrained_refiner_have_the_prior_as_mean(make_hidiff, geometries, gamma, sampler):
    hidiff = make_hidiff(steps=4, samples=300, sampler=sampler, calibration=calibration(gamma))
    image = image_for(geometries, batch=1)
    with torch.inference_mode():
        output = hidiff.segmentor(image)
        hidiff.segmentor.forward = lambda image: output
        hidiff.refiner.forward = lambda image, y_t, prior, t, features: torch.zeros_like(prior)
        mean = hidiff(image).exp()
        prior = hidiff.prior(output.logits)
    # the paper's calibration (eq. 10) puts a soft estimate into a posterior for hard ones: DDPM is not exact
    assert (mean - prior).abs().mean() < (0.03 if sampler == "ddim" else 0.06)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("t", [0, 5, 9])
def test_a_correction_of_the_mask_means_the_same_whatever_was_drawn(make_hidiff, geometries, gamma, t):
    """The estimate of the mask moves with the refiner's output, for y_t = 0 and 1; at T it is the same for both."""
    hidiff = make_hidiff(calibration=calibration(gamma))
    image = image_for(geometries)
    correction = torch.randn(2, 3, *geometries["2d"].patch)
    time = torch.full((2,), t)

    def estimates(size):
        hidiff.refiner.forward = lambda *given: size * correction
        drawn = [torch.full_like(prior, value) for value in (0.0, 1.0)]
        return [(y - hidiff.noise_probability(image, y, prior, time, output.features)).abs() for y in drawn]

    with torch.inference_mode():
        output = hidiff.segmentor(image)
        prior = hidiff.prior(output.logits)
        for before, after in zip(estimates(0.0), estimates(1.0), strict=True):
            assert torch.equal(after > before, correction > 0)
        if t == 9:  # y_T is drawn from the prior: it says nothing of the mask
            # but for what is left of the mask in it, and is in the KL
            torch.testing.assert_close(*estimates(1.0), atol=2e-2, rtol=0)


def test_without_residual_the_refiner_says_that_few_voxels_are_wrong(make_hidiff, geometries):
    hidiff = make_hidiff(steps=10, prior_residual=False)
    hidiff.segmentor.decoder.seg_layers[-1].weight.data *= 200  # probabilities near 0 and 1
    image = image_for(geometries)
    with torch.inference_mode():
        prior, refined = hidiff.segmentor(image).logits, hidiff(image)
    sure = prior.softmax(1).amax(1) > 0.999
    assert sure.float().mean() > 0.5
    assert (prior.argmax(1) == refined.argmax(1))[sure].float().mean() > 0.97


def oracle(hidiff, truth):
    """A refiner that knows the mask."""

    def forward(image, y_t, prior, t, features):
        return (y_t != truth.expand_as(y_t)).float() * 80 - 40

    hidiff.prior_residual = False
    hidiff.refiner.forward = forward


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_an_oracle_refiner_gives_the_mask_whatever_the_prior(make_hidiff, geometries, sampler, regions, steps):
    hidiff = make_hidiff(steps=steps, sampler=sampler)
    hidiff.sigmoid = regions
    labels = torch.randint(3, (1, *geometries["2d"].patch))
    truth = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    oracle(hidiff, truth)
    with torch.inference_mode():
        logits = hidiff(image_for(geometries))
    assert torch.equal((hidiff.probabilities(logits) > 0.5).float(), truth.expand(2, -1, -1, -1))


def test_samples_are_averaged_as_probabilities(make_hidiff, geometries):
    image = image_for(geometries)
    hidiff = make_hidiff(steps=2)
    found = []
    with torch.inference_mode():
        chain = hidiff.make_chain(hidiff.sampling)
        for sample in range(4):
            noise = NoiseByContent(content_hash(image), 0, sample, (chain.channels, *image.shape[2:]), image.device)
            *_, last = run_chain(chain, Estimator(chain, image), [[()]] * 2, noise)
            found.append(last.answer)
        hidiff.sampling = SamplingConfig(2, "ddim", samples=4)
        mean = hidiff(image).exp()
    torch.testing.assert_close(mean, torch.stack(found).mean(0).clamp(min=1e-4))
    assert not torch.equal(found[0], found[1])


def test_prediction_depends_on_content_and_seed_and_not_on_the_batch(make_hidiff, geometries):
    hidiff = make_hidiff(steps=2, seed=1)
    image = image_for(geometries, batch=3)
    with torch.inference_mode():
        together = hidiff(image)
        alone = torch.cat([hidiff(image[i : i + 1]) for i in (2, 1, 0)]).flip(0)
        hidiff.sampling = SamplingConfig(2, "ddim", seed=2)
        other = hidiff(image)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert not torch.equal(together, other)


def test_a_chain_yields_every_step_with_binary_states(make_hidiff, geometries):
    hidiff = make_hidiff()
    image, told = image_for(geometries), []
    noise_probability = hidiff.noise_probability
    hidiff.noise_probability = lambda *given: told.append(int(given[3][0])) or noise_probability(*given)
    chain = hidiff.make_chain(SamplingConfig(5, "ddim"))
    noise = NoiseByContent([1, 2], 0, 0, (chain.channels, *image.shape[2:]), image.device)
    with torch.inference_mode():
        steps = list(run_chain(chain, Estimator(chain, image), [[()]] * 5, noise))
    assert told == [9, 7, 4, 2, 0]
    for step in steps:
        assert set(step.state.unique().tolist()) <= {0.0, 1.0}
        assert step.answer.min() >= 0
        assert step.answer.max() <= 1


def test_deep_supervision_gives_a_list_with_and_without_refinement(make_hidiff, geometries):
    hidiff = make_hidiff(unet={"deep_supervision": True})
    image = image_for(geometries)
    with torch.inference_mode():
        refined = hidiff(image)
        hidiff.sampling = None
        prior = hidiff(image)
        hidiff.set_deep_supervision(False)
        assert isinstance(hidiff(image), torch.Tensor)
    assert [x.shape for x in refined] == [x.shape for x in prior]
    assert len(prior) == 2


def test_stock_names_are_kept_within_the_segmentor(make_hidiff, make_unet):
    stock = make_unet().state_dict()
    ours = make_hidiff(unet={"deep_supervision": True}).segmentor.state_dict()
    assert stock.keys() == ours.keys()


def test_regions_survive_the_state_dict_and_another_network_is_named(make_hidiff):
    regions, classes = make_hidiff(), make_hidiff()
    regions.sigmoid = True
    classes.load_state_dict(regions.state_dict())
    assert classes.sigmoid
    with pytest.raises(RuntimeError, match="segments 4 classes, expected 3"):
        classes.load_state_dict(make_hidiff(classes=4).state_dict())


def test_a_nan_image_is_refused(make_hidiff, geometries):
    image = image_for(geometries)
    image[1, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="image 1 of the batch has 1 NaN"):
        make_hidiff()(image)


def test_too_many_steps_are_refused_when_the_network_is_built(make_hidiff):
    with pytest.raises(ValueError, match=r"1 \.\. 10, got 11"):
        make_hidiff(steps=11)


def test_features_enter_at_their_own_stride():
    strides = [[1, 1], [2, 2], [2, 2], [2, 1], [2, 2]]
    assert cumulative_strides(strides) == [(1, 1), (2, 2), (4, 4), (8, 4), (16, 8)]
    assert match_features(cumulative_strides(strides), strides) == {2: 2, 3: 3, 4: 4}
    assert match_features([(4, 4), (8, 8), (16, 16), (32, 32)], [[1, 1]] + [[2, 2]] * 5) == {2: 0, 3: 1, 4: 2, 5: 3}
    assert match_features([(1,), (2,)], [[1], [2]]) == {1: 1}


def test_topology_is_that_of_the_plans_down_to_six_stages():
    kernels, strides = refiner_topology(
        {"kernel_sizes": [[1, 3, 3]] + [[3, 3, 3]] * 7, "strides": [1] + [[1, 2, 2]] * 7}
    )
    assert kernels == [[1, 3, 3]] + [[3, 3, 3]] * 5
    assert strides == [[1, 1, 1]] + [[1, 2, 2]] * 5


def test_features_of_another_grid_are_resampled(make_hidiff, geometries):
    hidiff = make_hidiff()
    image = image_for(geometries)
    features = [torch.randn(2, c, 6, 7) for c in hidiff.segmentor.feature_channels]
    prior = torch.full((2, 3, *geometries["2d"].patch), 0.3)
    eps = hidiff.estimate_noise(image, (prior > 0.5).float(), prior, torch.zeros(2, dtype=torch.long), features)
    assert eps.shape == prior.shape


@pytest.mark.parametrize("cross_transformer", [True, False])
def test_the_refiner_has_a_cross_transformer_only_if_wanted(make_hidiff, geometries, cross_transformer):
    hidiff = make_hidiff(cross_transformer=cross_transformer)
    names = " ".join(hidiff.refiner.state_dict())
    assert ("transformer" in names) == cross_transformer
    with torch.inference_mode():
        assert torch.isfinite(hidiff(image_for(geometries))).all()


def test_gradient_of_the_noise_reaches_prior_and_features(make_hidiff, geometries):
    hidiff = make_hidiff()
    for name, parameter in hidiff.refiner.named_parameters():
        if "weight" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)  # zero-initialised branches let nothing through
    image = image_for(geometries)
    output = hidiff.segmentor(image)
    prior = hidiff.prior(output.logits)
    eps = hidiff.estimate_noise(image, (prior > 0.5).float(), prior, torch.tensor([1, 8]), output.features)
    used = [output.features[i] for i in hidiff.matches.values()]
    gradients = torch.autograd.grad(eps.square().sum(), [output.logits, *used])
    assert all(g.abs().sum() > 0 for g in gradients)


def test_compiled_parts_keep_their_names_and_their_results(make_hidiff, geometries):
    hidiff = make_hidiff(steps=2)
    image = image_for(geometries)
    names = list(hidiff.state_dict())
    with torch.no_grad():
        expected = hidiff(image)
        hidiff.compile_parts(backend="eager")
        torch.testing.assert_close(hidiff(image), expected)
    assert list(hidiff.state_dict()) == names
