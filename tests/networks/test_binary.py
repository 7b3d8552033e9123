"""Laws and golden values of the binary layers."""

import pytest
import torch
from hidiff_reference import embedding_of, fill, fill_conv_block, parameters_of
from torch.nn import functional as F

from nnunetv2_diffusion.networks.binary import (
    BasicBlock,
    BinaryConv,
    BlockStyle,
    TimeOffsets,
    activate,
    binarize,
    binarize_weight,
    sign_and_scale,
)

PAPER = BlockStyle(16, binarized=True, norm="batch")
styles = pytest.mark.parametrize(
    "style",
    [BlockStyle(16, binarized, norm) for binarized in (True, False) for norm in ("instance", "batch")],
    ids=lambda style: f"{'binary' if style.binarized else 'real'}-{style.norm}",
)


@pytest.fixture(scope="module")
def layers(golden):
    return golden("hidiff_binary_ops")


def test_sign_and_its_derivative_are_golden(layers):
    x = layers["act_x"].requires_grad_()
    y = binarize(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    elsewhere = x != 0  # where the reference gives 0, and the paper -1
    assert elsewhere.sum() == len(x) - 1
    assert torch.equal(y[elsewhere], layers["act_y"][elsewhere])
    assert (y[~elsewhere] == -1).all()
    torch.testing.assert_close(grad, layers["quant_grad"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sign_is_exact_in_every_type(dtype):
    x = torch.randn(1000).to(dtype)
    y = binarize(x)
    assert y.dtype == dtype
    assert torch.equal(y == 1, x > 0)
    assert (y.abs() == 1).all()


def test_derivative_of_the_sign_scales_the_gradient_from_above():
    x = torch.linspace(-1.5, 1.5, 31).requires_grad_()
    upstream = torch.randn(31)
    (grad,) = torch.autograd.grad((binarize(x) * upstream).sum(), x)
    slope = torch.where(x < 0, 2 + 2 * x, 2 - 2 * x).clamp(min=0)
    torch.testing.assert_close(grad, slope.detach() * upstream)


def test_binary_convolution_and_its_gradients_are_golden(layers):
    conv = BinaryConv(3, 4, (3, 3), (2, 2))
    fill(conv, weight=layers["conv_w"])
    x = layers["conv_x"].requires_grad_()
    y = conv(x) + layers["conv_b"].view(1, -1, 1, 1)
    found = torch.autograd.grad(y, [conv.weight, x], layers["conv_gout"])
    torch.testing.assert_close(y, layers["conv_y"], rtol=1e-5, atol=1e-5)
    assert (layers["conv_w"].abs() > 1).any()  # where the gradient stops
    torch.testing.assert_close(found, (layers["conv_gw"], layers["conv_gx"]), rtol=1e-5, atol=1e-5)


def test_binary_linear_layer_and_its_gradients_are_golden(layers):
    conv = BinaryConv(6, 5, (1,), (1,), centred=True)
    fill(conv, weight=layers["lin_w"])
    x = layers["lin_x"].requires_grad_()
    y = conv(binarize(x.transpose(1, 2))).transpose(1, 2) + layers["lin_b"]
    grad_weight, grad_x = torch.autograd.grad(y, [conv.weight, x], layers["lin_gout"])
    torch.testing.assert_close(y, layers["lin_y"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_weight[..., 0], layers["lin_gw"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_x, layers["lin_gx"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("shape", [(7, 5, 3, 3), (64, 37, 3, 3, 3), (50, 513, 1)], ids=str)
def test_scale_times_sign_binarises_to_itself_bit_for_bit(shape, centred):
    weight = torch.randn(shape) * torch.rand(shape[0], *[1] * (len(shape) - 1)) + 0.1
    weight[0] = 0
    weight[1] = 0.1
    weight[2] = -0.3
    binary = binarize_weight(weight, centred)
    assert torch.equal(binarize_weight(binary, centred), binary)
    assert len(binary[4].unique()) == 2


def test_centred_signs_are_those_around_the_mean_and_the_scale_is_not_centred():
    weight = torch.randn(6, 40, 1) + 5
    positive, scale = sign_and_scale(weight, centred=True)
    assert 0.2 < positive.float().mean() < 0.8
    torch.testing.assert_close(scale, weight.mean((1, 2)))
    assert sign_and_scale(weight, centred=False)[0].all()


@pytest.mark.parametrize("centred", [False, True])
def test_binary_weights_are_the_same_with_and_without_gradients(centred):
    weight = torch.randn(5, 9, 3, requires_grad=True)
    with torch.no_grad():
        frozen = binarize_weight(weight, centred)
    learning = binarize_weight(weight, centred)
    assert learning.requires_grad
    assert not frozen.requires_grad
    assert torch.equal(learning, frozen)


def test_weights_start_with_signs_of_both_kinds_in_every_channel():
    positive, _ = sign_and_scale(BinaryConv(16, 32, (3, 3), (1, 1)).weight)
    share = positive.flatten(1).float().mean(1)
    assert share.min() > 0.25
    assert share.max() < 0.75


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("name", "channels_out", "stride"),
    [
        ("basic_same", 8, 1),
        ("basic_halve", 4, 1),
        ("down_x1", 8, 2),
        ("down_x2", 16, 2),
        ("up_same", 8, 1),
        ("up_halve", 4, 1),
        ("basic_same_real", 8, 1),
    ],
)
def test_block_is_golden(layers, name, channels_out, stride, training):
    style = BlockStyle(16, binarized=not name.endswith("real"), norm="batch")
    block = BasicBlock(8, channels_out, style, (3, 3), (stride, stride)).train(training)
    fill_conv_block(block, parameters_of(layers, name))
    x = layers[f"{name}__in0"]
    if name.startswith("up"):
        x = F.interpolate(x, scale_factor=2)
    y = block(x, embedding_of(layers, name, 1))
    torch.testing.assert_close(y, layers[f"{name}__{'train' if training else 'eval'}"], rtol=1e-5, atol=2e-5)


@styles
@pytest.mark.parametrize(("channels_out", "stride"), [(8, (1, 1)), (4, (1, 1)), (16, (2, 1))])
def test_3d_block_with_flat_kernels_is_the_2d_block_on_each_slice(style, channels_out, stride, wake):
    flat = wake(BasicBlock(8, channels_out, style, (3, 3), stride)).eval()
    solid = BasicBlock(8, channels_out, style, (1, 3, 3), (1, *stride)).eval()
    state = {name: value.unsqueeze(2) if name == "conv.weight" else value for name, value in flat.state_dict().items()}
    solid.load_state_dict(state)
    x, embedding = torch.randn(2, 8, 1, 6, 5), torch.randn(2, 16)
    torch.testing.assert_close(solid(x, embedding)[:, :, 0], flat(x[:, :, 0], embedding))
    if style.norm == "batch":
        x = torch.randn(2, 8, 3, 6, 5)
        expected = torch.stack([flat(x[:, :, i], embedding) for i in range(3)], dim=2)
        torch.testing.assert_close(solid(x, embedding), expected)


@styles
def test_block_depends_on_the_time_of_its_own_sample(style, wake):
    block = wake(BasicBlock(4, 8, style, (3, 3))).eval()
    x, embedding = torch.randn(1, 4, 6, 6).expand(3, -1, -1, -1), torch.randn(3, 16)
    embedding[2] = embedding[0]
    y = block(x, embedding)
    torch.testing.assert_close(y[0], y[2])
    assert (y[0] - y[1]).abs().max() > 1e-2


@styles
def test_offsets_that_the_norm_would_cancel_do_not_exist(style):
    block = BasicBlock(4, 8, style, (3, 3), zeta=False)
    offsets = block.offsets(torch.randn(1, 16))
    assert (offsets["minus_alpha"] is None) == (not style.binarized and style.norm == "instance")
    assert offsets["minus_gamma"].shape == (1, 8)
    assert offsets["zeta"] is None


def test_activation_is_equation_16():
    u, gamma, zeta = torch.randn(3, 4, 5), torch.randn(3, 4), torch.randn(3, 4)
    slope = torch.rand(4)
    y = activate(u, slope, {"minus_gamma": -gamma, "zeta": zeta})
    moved, zeta = u - gamma[..., None], zeta[..., None]
    torch.testing.assert_close(y, torch.where(moved > 0, moved + zeta, slope[:, None] * moved + zeta))


def test_offsets_are_zero_at_the_start_and_named_in_order():
    offsets = TimeOffsets(16, {"a": 3, "left_out": 0, "b": 2})
    assert not any(value.any() for value in offsets(torch.randn(4, 16)).values() if value is not None)
    with torch.no_grad():
        offsets.bias.copy_(torch.arange(5.0))
    values = offsets(torch.zeros(1, 16))
    assert values["a"].tolist() == [[0, 1, 2]]
    assert values["left_out"] is None
    assert values["b"].tolist() == [[3, 4]]


def test_offsets_are_computed_in_float32_under_autocast(wake):
    offsets, embedding = wake(TimeOffsets(16, {"a": 3})), torch.randn(2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        halved = offsets(embedding)["a"]
    assert halved.dtype == torch.float32
    assert torch.equal(halved, offsets(embedding)["a"])


@styles
def test_block_stays_in_half_precision_under_autocast(style, wake):
    block = wake(BasicBlock(4, 8, style, (3, 3), (2, 2)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(torch.randn(2, 4, 8, 8).bfloat16(), torch.randn(2, 16))
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


def test_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="norm is 'layer'; expected one of"):
        BlockStyle(16, norm="layer")
