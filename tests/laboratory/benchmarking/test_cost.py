"""Counts of parameters, multiply-accumulates and storage, against hand counts and the published sizes."""

import pytest
import torch
from torch import nn

from laboratory.benchmarking.refiner import Cost, count_cost, refiner_cost, refiner_inputs
from nnunetv2_diffusion.networks.binary import BinaryConv, BlockStyle
from nnunetv2_diffusion.networks.cross_transformer import CrossAttention
from nnunetv2_diffusion.networks.refiner import Refiner

MIB = 2**20


@pytest.fixture(scope="module")
def paper():
    """The published setting: 9 classes, 1 image channel, 256 x 256, five strides of 2; True if binarised -> cost."""

    def count(binarized: bool) -> Cost:
        with torch.device("meta"):
            refiner = Refiner(
                1,
                9,
                [[3, 3]] * 6,
                [[1, 1]] + [[2, 2]] * 5,
                {2: 96, 3: 192, 4: 384, 5: 768},
                width=128,
                norm="batch",
                binarized=binarized,
            )
        return refiner_cost(refiner, (256, 256))

    return {binarized: count(binarized) for binarized in (True, False)}


def test_published_sizes_are_met(paper):
    """Ours has no bias in front of a norm, and no dead norm: 0.02 M parameters fewer, the same products."""
    cost = paper[True]
    assert cost.parameters / 1e6 == pytest.approx(89.21, abs=0.05)
    assert cost.binary_parameters / 1e6 == pytest.approx(38.73, abs=0.01)
    assert 2 * (cost.macs + cost.binary_macs) / 1e9 == pytest.approx(173.3, abs=0.1)
    assert 2 * cost.binary_macs / 1e9 == pytest.approx(156.9, abs=0.1)
    # by the paper's convention 64 binary operations count as one
    assert (cost.macs + cost.binary_macs) / (cost.macs + cost.binary_macs / 64) == pytest.approx(9.2, abs=0.05)
    assert cost.storage_bytes / MIB == pytest.approx(340, abs=1)
    assert cost.packed_bytes / MIB == pytest.approx(197, abs=1)


def test_real_valued_twin_does_the_same_products(paper):
    binary, real = paper[True], paper[False]
    assert real.binary_macs == 0
    assert real.binary_parameters == 0
    assert real.macs == pytest.approx(binary.macs + binary.binary_macs, rel=1e-4)  # but for some offsets of time
    assert real.packed_bytes == real.storage_bytes


def test_ordinary_layers_are_counted_as_by_hand():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Flatten(), nn.Linear(256, 5)
    )
    cost = count_cost(network, torch.zeros(2, 3, 8, 8))
    assert cost.macs == 2 * (16 * 8 * 27 + 16 * 8 * 4 * 4 + 256 * 5)
    assert cost.parameters == (8 * 27 + 8) + (8 * 4 * 4 + 4) + (256 * 5 + 5)
    assert (cost.binary_macs, cost.binary_parameters, cost.scales) == (0, 0, 0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_binary_convolutions_are_counted_apart(device):
    network = nn.Sequential(BinaryConv(8, 16, (3, 3, 3), (1, 2, 2)), nn.Conv3d(16, 4, 1))
    cost = count_cost(network, torch.zeros(1, 8, 5, 6, 4, device=device))
    assert cost.binary_macs == 5 * 3 * 2 * 16 * 8 * 27
    assert cost.macs == 5 * 3 * 2 * 16 * 4
    assert cost.binary_parameters == 16 * 8 * 27
    assert cost.scales == 16
    assert cost.storage_bytes == 4 * (16 * 8 * 27 + 68)
    assert cost.packed_bytes == 16 * 8 * 27 / 8 + 4 * (16 + 68)


@pytest.mark.parametrize("binarized", [True, False])
def test_attention_is_counted(binarized):
    channels, tokens, embedding = 16, 10, 8
    attention = CrossAttention(channels, 4, BlockStyle(embedding, binarized, "batch"))
    stream = torch.zeros(1, channels, tokens)
    cost = count_cost(attention, stream, stream, torch.zeros(1, embedding))
    products = 3 * tokens * channels**2 + 2 * tokens**2 * channels
    offsets = embedding * channels * (3 * 3 + (5 if binarized else 4))
    assert cost.binary_macs == (products if binarized else 0)
    assert cost.macs == offsets + (0 if binarized else products)


def test_counting_on_the_meta_device_leaves_the_module_as_it_is():
    refiner = Refiner(1, 2, [[3, 3]] * 2, [[1, 1], [2, 2]], {0: 8, 1: 8}, width=8, norm="batch")
    refiner.bottleneck.eval()
    before = {name: value.clone() for name, value in refiner.state_dict().items()}
    modes = [part.training for part in refiner.modules()]
    cost = refiner_cost(refiner, (8, 8))
    assert cost == count_cost(refiner, *refiner_inputs(refiner, (8, 8), "cpu"))
    assert [part.training for part in refiner.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in refiner.state_dict().items())
    assert not any(part._forward_hooks for part in refiner.modules())
