"""Laws of the network whose masks are draws from a code."""

import copy

import pytest
import torch

from nnunetv2_diffusion.networks import DenoisingUNet, RecycleScoreUNet
from nnunetv2_diffusion.sampling import SamplingConfig

CHANNELS = 4


PATCHES = {"2d": (16, 20), "3d_anisotropic": (5, 12, 20)}


def image(geometry, number=2):
    return torch.randn(number, 1, *PATCHES[geometry])


@pytest.fixture
def make(make_unet, wake):
    def build(geometry="2d", awake=True, samples=1, seed=0, deep_supervision=False, **kwargs):
        unet = make_unet(geometry=geometry, deep_supervision=deep_supervision, **kwargs)
        network = RecycleScoreUNet(
            unet, SamplingConfig(8, samples=samples, seed=seed), 3, CHANNELS, transformer_heads=2
        ).eval()
        return wake(network) if awake else network

    return build


@pytest.mark.parametrize("geometry", ["2d", "3d_anisotropic"])
@pytest.mark.parametrize("architecture", ["plain", "residual"])
def test_it_starts_as_the_stock_network_whatever_the_code(make_unet, geometry, architecture):
    unet = make_unet(architecture, geometry)
    stock = copy.deepcopy(unet)
    network = RecycleScoreUNet(unet, SamplingConfig(1), 3, CHANNELS, transformer_heads=2)
    x = image(geometry)
    for own, expected in zip(network(x, 3 * torch.randn(2, CHANNELS)), stock(x), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


def test_the_code_reaches_the_output_far_from_the_border(make):
    network, x = make("3d", deep_supervision=False), torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        a, b = (network(x, torch.randn(1, CHANNELS))[..., 14:18, 14:18, 14:18] for _ in range(2))
    assert float((a - b).abs().mean()) > 0.01 * float(a.abs().mean())


def test_a_code_has_a_gradient(make):
    network, code = make(), torch.randn(2, CHANNELS, requires_grad=True)
    network(image("2d"), code).square().sum().backward()
    assert float(code.grad.abs().max()) > 1e-3
    assert all(p.grad is not None for p in network.latent.parameters())


def test_a_prediction_depends_on_seed_and_image_and_not_on_the_batch(make):
    network, x = make(samples=2), image("2d", 3)
    with torch.no_grad():
        together = network(x)
        alone = torch.cat([network(one[None]) for one in x.flip(0)]).flip(0)
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
        assert torch.equal(network(x), together)
        network.sampling = SamplingConfig(8, samples=2, seed=1)
        assert not torch.allclose(network(x), together, atol=1e-3)


def test_a_mirrored_view_of_the_host_has_a_code_of_its_own(make):
    network, x, codes = make(), image("2d", 1), []
    run = network._run

    def keep(*args, latent, **kwargs):
        codes.append(latent)
        return run(*args, latent=latent, **kwargs)

    network._run = keep
    with torch.no_grad():
        for view in (x, x.flip(2), x):
            network(view)
    assert torch.equal(codes[0], codes[2])
    assert not torch.allclose(codes[0], codes[1], atol=0.1)


def test_predictions_are_fresh_bounded_logits_of_the_mean_probability(make):
    network, x = make(samples=3), image("2d")
    with torch.no_grad():
        logits = network(x)
        assert logits.dtype == torch.float32
        assert float(logits.abs().max()) < 14
        torch.testing.assert_close(logits.exp().sum(1), torch.ones_like(logits[:, 0]), rtol=1e-4, atol=1e-4)
        logits.zero_()
        assert float(network(x).abs().max()) > 0


def test_deep_supervision_gives_a_list_in_training_and_prediction(make):
    network, x = make(deep_supervision=True), image("2d")
    assert [len(network(x)), len(network(x, torch.zeros(2, CHANNELS)))] == [2, 2]
    network.decoder.deep_supervision = False
    assert network(x).shape == (2, 3, *PATCHES["2d"])


def test_an_image_that_is_not_finite_is_refused(make):
    with pytest.raises(ValueError, match="NaN or infinite"):
        make()(image("2d").index_fill(0, torch.tensor([0]), float("nan")))


def test_time_and_code_together_are_refused(make_unet):
    with pytest.raises(ValueError, match="latent_channels is 4 with time_conditioning"):
        DenoisingUNet(make_unet(), 3, time_conditioning=True, latent_channels=4)
