"""Laws of the transformer at the bottleneck."""

import math
from itertools import product

import pytest
import torch

from nnunetv2_diffusion.networks.transformer import (
    BottleneckTransformer,
    TransformerLayer,
    grid_positional_encoding,
)

GRIDS = [(4, 6), (5, 7), (1, 3), (2, 3, 4), (5, 3, 1)]
grids = pytest.mark.parametrize("grid", GRIDS, ids=lambda g: "x".join(map(str, g)))
CPU = torch.device("cpu")


@grids
@pytest.mark.parametrize("layers", [1, 2])
def test_it_starts_as_the_identity(grid, layers):
    x = torch.randn(2, 24, *grid)
    assert torch.equal(BottleneckTransformer(24, layers, heads=4, width=0.5)(x), x)


@grids
def test_it_keeps_the_type_of_its_input_under_autocast(grid, wake):
    transformer = wake(BottleneckTransformer(24, heads=4))
    x = torch.randn(2, 24, *grid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        halved = transformer(x.bfloat16())
    assert halved.dtype == torch.bfloat16
    assert (halved.float() - transformer(x)).abs().max() < 0.1 * (transformer(x) - x).abs().max()


def test_layer_is_pre_norm_attention_and_mlp(wake):
    width, heads, n = 12, 3, 7
    layer = wake(TransformerLayer(width, heads)).double()
    x = torch.randn(2, n, width, dtype=torch.float64)
    head = width // heads

    normed = layer.norm_attention(x)
    projected = normed @ layer.qkv.weight.T + layer.qkv.bias
    attended = torch.zeros_like(x)
    for i in range(heads):
        q, k, v = (projected[..., j * width + i * head : j * width + (i + 1) * head] for j in range(3))
        weights = (q @ k.transpose(1, 2) / math.sqrt(head)).softmax(-1)
        attended[..., i * head : (i + 1) * head] = weights @ v
    expected = x + layer.attention_out(attended)
    expected = expected + layer.mlp(layer.norm_mlp(expected))
    torch.testing.assert_close(layer(x), expected)


@grids
def test_every_voxel_is_a_token_with_its_position(grid, wake):
    """Tokens are gathered and put back voxel by voxel here: a transposed layout would mix channels and positions."""
    transformer = wake(BottleneckTransformer(24, layers=2, heads=2, width=0.5)).double()
    x = torch.randn(2, 24, *grid, dtype=torch.float64)
    code = grid_positional_encoding(grid, transformer.width, CPU).reshape(*grid, -1)
    voxels = list(product(*map(range, grid)))
    tokens = torch.stack([transformer.enter(x[(..., *voxel)]) + code[voxel] for voxel in voxels], dim=1)
    for layer in transformer.layers:
        tokens = layer(tokens)
    expected = x.clone()
    for index, voxel in enumerate(voxels):
        expected[(..., *voxel)] += transformer.leave(transformer.norm(tokens[:, index]))
    torch.testing.assert_close(transformer(x), expected)


@grids
def test_every_voxel_sees_every_other_one(grid, wake):
    transformer = wake(BottleneckTransformer(16, heads=2))
    x = torch.randn(1, 16, *grid)
    moved = x.clone()
    moved[(0, slice(None), *[-1] * len(grid))] += 3 * torch.randn(16)
    change = (transformer(moved) - transformer(x))[(0, slice(None), *[0] * len(grid))]
    assert change.abs().max() > 1e-4


def test_samples_do_not_see_each_other(wake):
    transformer = wake(BottleneckTransformer(16, heads=2))
    x = torch.randn(3, 16, 4, 5)
    moved = x.clone()
    moved[1] += torch.randn(16, 4, 5)
    change = (transformer(moved) - transformer(x)).flatten(1).abs().amax(1)
    assert change[1] > 1e-2
    assert change[[0, 2]].max() < 1e-5


@grids
def test_it_knows_where_a_voxel_is(grid, wake):
    """Attention alone cannot tell voxels of a constant map apart; the positional code can."""
    change = wake(BottleneckTransformer(24, heads=2))(torch.ones(1, 24, *grid)).flatten(2)
    distance = torch.cdist(change[0].T, change[0].T) + torch.eye(change.shape[2])
    assert distance.min() > 1e-5


@grids
@pytest.mark.parametrize("channels", [12, 17, 32])
def test_positional_code_differs_between_all_voxels(grid, channels):
    code = grid_positional_encoding(grid, channels, CPU)
    assert code.shape == (math.prod(grid), channels)
    assert code.dtype == torch.float32
    assert code.abs().max() <= 1
    distance = torch.cdist(code, code) + torch.eye(len(code))
    assert distance.min() > 0.1


@grids
def test_positional_code_has_an_equal_share_of_channels_for_each_axis(grid):
    channels = 26
    share = 2 * (channels // (2 * len(grid)))
    code = grid_positional_encoding(grid, channels, CPU).reshape(*grid, channels)
    for axis in range(len(grid)):
        part = code[..., axis * share : (axis + 1) * share].movedim(axis, 0).flatten(1, -2)
        assert torch.equal(part, part[:, :1].expand_as(part))
        if grid[axis] > 1:
            assert not torch.isclose(part[0], part[1]).all()
    assert not code[..., share * len(grid) :].any()


def test_positional_code_of_a_voxel_does_not_depend_on_the_size_of_the_patch():
    small = grid_positional_encoding((3, 4), 16, CPU).reshape(3, 4, 16)
    large = grid_positional_encoding((5, 9), 16, CPU).reshape(5, 9, 16)
    assert torch.equal(large[:3, :4], small)


def test_positional_code_of_too_few_channels_is_zero():
    assert not grid_positional_encoding((2, 3, 4), 5, CPU).any()


@pytest.mark.parametrize(
    ("channels", "heads", "share", "expected"),
    [(320, 8, 0.25, 80), (256, 8, 1.0, 256), (24, 8, 0.25, 8), (8, 8, 0.25, 8), (100, 8, 0.5, 48), (96, 4, 0.01, 4)],
)
def test_width_is_the_share_of_the_channels_in_whole_heads(channels, heads, share, expected):
    transformer = BottleneckTransformer(channels, heads=heads, width=share)
    assert transformer.enter.weight.shape == (expected, channels)
    assert transformer.layers[0].qkv.weight.shape == (3 * expected, expected)


def test_one_set_of_weights_serves_every_grid(wake):
    transformer = wake(BottleneckTransformer(16, heads=2))
    for grid in GRIDS:
        x = torch.randn(1, 16, *grid)
        assert transformer(x).shape == x.shape


def test_all_parameters_learn_once_the_last_projection_has_moved(wake):
    transformer = BottleneckTransformer(16, layers=2, heads=2)
    x, upstream = torch.randn(2, 16, 4, 5), torch.randn(2, 16, 4, 5)
    (transformer(x) * upstream).sum().backward()
    assert transformer.leave.weight.grad.abs().max() > 1e-3
    wake(transformer.leave)
    transformer.zero_grad()
    (transformer(x) * upstream).sum().backward()
    for name, parameter in transformer.named_parameters():
        assert parameter.grad.norm() > 1e-4, name
