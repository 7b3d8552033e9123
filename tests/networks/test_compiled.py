"""Prediction with the host's torch.compile around the network: passes are compiled, once, and the loop is not."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from nnunetv2_diffusion.diffusion import BernoulliDiffusion, cosine_beta_schedule
from nnunetv2_diffusion.networks import HiDiffNetwork, RecycleScoreUNet
from nnunetv2_diffusion.networks.discriminative import UNetSegmentor
from nnunetv2_diffusion.sampling import SamplingConfig


@pytest.fixture
def networks(make_unet, make_segmentor, geometries):
    """Name -> a network in eval mode, and the function that compiles its passes."""

    def recycling(**kwargs):
        network = make_segmentor(steps=3, samples=2, **kwargs).eval()
        return network, "compile_denoiser"

    def latent():
        network = RecycleScoreUNet(make_unet(deep_supervision=False), SamplingConfig(3, samples=2), 3, 4).eval()
        return network, "compile_denoiser"

    def hidiff():
        shape = geometries["2d"]
        kernels, strides = [list(k) for k in shape.kernel_sizes], [list(s) for s in shape.strides]
        process, config = BernoulliDiffusion(cosine_beta_schedule(10)), SamplingConfig(3, "ddim", samples=2)
        segmentor = UNetSegmentor(make_unet(deep_supervision=False))
        network = HiDiffNetwork(segmentor, 1, 3, kernels, strides, process, config, width=4).eval()
        return network, "compile_parts"

    return {"RecycleXT": recycling, "score": latent, "HiDiff": hidiff}


@pytest.mark.parametrize("name", ["RecycleXT", "score", "HiDiff"])
def test_a_second_case_compiles_nothing_new(networks, name, monkeypatch):
    network, own = networks[name]()
    images = torch.randn(3, 2, 1, 16, 20)
    with torch.inference_mode():
        expected = [network(image) for image in images]
    monkeypatch.setattr(network, own, partial(getattr(network, own), backend="eager"))
    names = list(network.state_dict())
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(network, backend="eager")  # as nnU-Net's predictor does, nnUNet_compile=1
    with torch.inference_mode():
        found = [compiled(images[0])]
        graphs = counters["stats"]["unique_graphs"]
        found += [compiled(image) for image in images[1:]]
    assert 1 <= graphs == counters["stats"]["unique_graphs"]
    assert graphs <= 6
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert list(network.state_dict()) == names
    torch._dynamo.reset()
