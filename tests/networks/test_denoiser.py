"""Laws of the denoising U-Net: a stock network at the start, and one that hears mask and time after some steps."""

import copy

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn
from torch._dynamo.utils import counters

from nnunetv2_diffusion.networks import DenoisingUNet, UnsupportedArchitectureError
from nnunetv2_diffusion.networks.time_conditioning import ModulatedInstanceNorm

K = 3
T = 1001
ARCHITECTURES = ("plain", "residual")
GEOMETRIES = ("2d", "2d_anisotropic", "3d", "3d_anisotropic")
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
all_geometries = pytest.mark.parametrize("geometry", GEOMETRIES)


def as_list(output) -> list[torch.Tensor]:
    return output if isinstance(output, list) else [output]


@pytest.fixture
def pair(make_unet, geometries):
    """(architecture, geometry, ...) -> stock network, denoiser with copied weights, image of a batch of two."""

    def make(architecture="plain", geometry="2d", deep_supervision=True, **kwargs):
        stock = make_unet(architecture, geometry, in_channels=2, deep_supervision=deep_supervision)
        denoiser = DenoisingUNet(copy.deepcopy(stock), K, **kwargs)
        return stock, denoiser, torch.randn(2, 2, *geometries[geometry].patch)

    return make


# --- at the start: the stock network ---------------------------------------------------------------------------------


@architectures
@all_geometries
@pytest.mark.parametrize("deep_supervision", [True, False])
def test_it_starts_with_the_logits_of_the_stock_network(pair, architecture, geometry, deep_supervision):
    stock, denoiser, image = pair(architecture, geometry, deep_supervision)
    expected = as_list(stock(image))
    assert len(expected) == (2 if deep_supervision else 1)
    for t in ([0, T - 1], [500, 3]):
        mask = torch.rand(2, K, *image.shape[2:])
        for found, stock_logits in zip(as_list(denoiser.denoise(image, mask, torch.tensor(t))), expected, strict=True):
            assert torch.equal(found, stock_logits)


@architectures
@all_geometries
def test_with_self_conditioning_it_starts_with_the_logits_of_the_stock_network(pair, architecture, geometry):
    stock, denoiser, image = pair(architecture, geometry, self_conditioning=True)
    mask, estimate = torch.rand(2, 2, K, *image.shape[2:])
    t = torch.tensor([7, 800])
    for given in (estimate, None):
        for found, expected in zip(denoiser.denoise(image, mask, t, given), stock(image), strict=True):
            assert torch.equal(found, expected)


@architectures
@pytest.mark.parametrize(
    "parts",
    [{"time_conditioning": False}, {"transformer_layers": 0}, {"time_conditioning": False, "transformer_layers": 0}],
    ids=["no time", "no transformer", "neither"],
)
def test_without_some_parts_it_starts_with_the_logits_of_the_stock_network(pair, architecture, parts):
    stock, denoiser, image = pair(architecture, **parts)
    t = torch.tensor([1, 2]) if denoiser.time is not None else None
    found = denoiser.denoise(image, torch.rand(2, K, *image.shape[2:]), t)
    for a, b in zip(found, stock(image), strict=True):
        assert torch.equal(a, b)


@architectures
def test_without_mask_and_time_it_is_a_plain_network(make_unet, architecture):
    stock = make_unet(architecture)
    denoiser = DenoisingUNet(copy.deepcopy(stock), 0, time_conditioning=False)
    image = torch.randn(2, 1, 16, 20)
    for a, b in zip(denoiser.denoise(image), stock(image), strict=True):
        assert torch.equal(a, b)


@architectures
def test_it_starts_with_the_gradients_of_the_stock_network(pair, architecture):
    stock, denoiser, image = pair(architecture)
    upstream = torch.randn(2, K, *image.shape[2:])
    (stock(image)[0] * upstream).sum().backward()
    logits = denoiser.denoise(image, torch.rand_like(upstream), torch.tensor([1, 900]))
    (logits[0] * upstream).sum().backward()
    own = dict(denoiser.named_parameters())
    first = next(name for name in own if own[name].shape != dict(stock.named_parameters())[name].shape)
    for name, parameter in stock.named_parameters():
        if parameter.grad is None:  # a coarse head
            assert own[name].grad is None
        else:
            gradient = own[name].grad[:, :2] if name == first else own[name].grad
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-4)


# --- names of weights ------------------------------------------------------------------------------------------------


@architectures
@all_geometries
@pytest.mark.parametrize("self_conditioning", [False, True])
def test_names_of_encoder_and_decoder_are_kept_and_additions_have_new_ones(
    pair, architecture, geometry, self_conditioning
):
    stock, denoiser, _ = pair(architecture, geometry, self_conditioning=self_conditioning)
    stock_names, names = set(stock.state_dict()), set(denoiser.state_dict())
    assert stock_names <= names
    assert {name.split(".")[0] for name in names - stock_names} == {"time", "transformer"}


@architectures
@all_geometries
def test_stock_weights_map_one_to_one_but_for_new_channels_of_the_first_convolution(pair, architecture, geometry):
    _, denoiser, image = pair(architecture, geometry)
    stock, _, _ = pair(architecture, geometry)  # with other weights
    state, own = stock.state_dict(), denoiser.state_dict()
    first = [name for name in state if state[name].shape != own[name].shape]
    assert len({own[name].data_ptr() for name in first}) == 1  # one tensor, which nnU-Net registers under two names
    for name in first:
        zeros = torch.zeros_like(own[name][:, -K:])
        assert torch.equal(own[name][:, -K:], zeros)
        state[name] = torch.cat([state[name], zeros], dim=1)
    problems = denoiser.load_state_dict(state, strict=False)
    assert not problems.unexpected_keys
    assert {name.split(".")[0] for name in problems.missing_keys} == {"time", "transformer"}
    logits = denoiser.denoise(image, torch.rand(2, K, *image.shape[2:]), torch.tensor([4, 5]))
    for found, expected in zip(logits, stock(image), strict=True):
        assert torch.equal(found, expected)


@architectures
def test_encoder_and_decoder_are_those_of_the_network_that_was_given(make_unet, architecture):
    unet = make_unet(architecture)
    denoiser = DenoisingUNet(unet, K)
    assert denoiser.encoder is unet.encoder
    assert denoiser.decoder is unet.decoder


@architectures
def test_every_instance_norm_is_modulated(make_unet, architecture):
    unet = make_unet(architecture)
    before = sum(isinstance(m, nn.InstanceNorm2d) for m in unet.modules())
    denoiser = DenoisingUNet(unet, K)
    assert not any(isinstance(m, nn.InstanceNorm2d) for m in denoiser.modules())
    assert sum(isinstance(m, ModulatedInstanceNorm) for m in denoiser.modules()) == before
    features = sum(m.num_features for m in denoiser.modules() if isinstance(m, ModulatedInstanceNorm))
    assert denoiser.time.project.out_features == 2 * features


# --- after some steps: mask and time reach the output ----------------------------------------------------------------


def train(denoiser, image_channels, patch, steps=30):
    """Learn to segment the mask at early times and the image at late ones: the answer needs both mask and time."""
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=3e-3)
    for _ in range(steps):
        image = torch.randn(4, image_channels, *patch)
        mask = torch.rand(4, K, *patch)
        t = torch.randint(0, T, (4,))
        early = (t < T // 2).view(-1, *[1] * len(patch))
        target = torch.where(early, mask.argmax(1), (image[:, 0] > 0).long())
        logits = denoiser.denoise(image, mask, t, full_resolution_only=True)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, target).backward()
        optimizer.step()
    return denoiser


@pytest.fixture(scope="module", params=[(a, g) for a in ARCHITECTURES for g in ("2d", "3d_anisotropic")], ids="-".join)
def trained(request, make_unet, geometries):
    """A network after some optimiser steps, with an image and a mask of a batch of two."""
    architecture, geometry = request.param
    patch = geometries[geometry].patch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = train(DenoisingUNet(make_unet(architecture, geometry), K), 1, patch)
        return denoiser, torch.randn(2, 1, *patch), torch.rand(2, K, *patch)


def inner(logits: torch.Tensor) -> torch.Tensor:
    """Voxels away from the borders, where zero padding could tell what a norm has cancelled."""
    return logits[(..., *[slice(n // 4, n - n // 4) for n in logits.shape[2:]])]


def relative_change(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((inner(a) - inner(b)).detach().norm() / inner(a).detach().norm())


@torch.no_grad()
def test_logits_change_with_time_after_some_steps(trained):
    denoiser, image, mask = trained
    early, late = (denoiser.denoise(image, mask, torch.full((2,), t), full_resolution_only=True) for t in (10, T - 10))
    assert relative_change(early, late) > 0.01


@torch.no_grad()
def test_logits_change_with_time_for_each_sample_apart(trained):
    denoiser, image, mask = trained
    both = denoiser.denoise(image, mask, torch.tensor([10, 990]), full_resolution_only=True)
    same = denoiser.denoise(image, mask, torch.tensor([10, 10]), full_resolution_only=True)
    torch.testing.assert_close(both[:1], same[:1], rtol=1e-4, atol=1e-4)
    assert relative_change(both[1:], same[1:]) > 0.01


@torch.no_grad()
def test_logits_change_with_the_mask_after_some_steps(trained):
    denoiser, image, mask = trained
    a, b = (
        denoiser.denoise(image, m, torch.tensor([10, 10]), full_resolution_only=True)
        for m in (mask, torch.rand_like(mask))
    )
    assert relative_change(a, b) > 0.01


def test_every_time_parameter_has_a_gradient_far_above_rounding(trained):
    """Biases of convolutions in front of an instance norm show what rounding leaves of a gradient that is zero."""
    denoiser, image, mask = trained
    denoiser.zero_grad()
    logits = denoiser.denoise(image, mask, torch.tensor([10, 700]), full_resolution_only=True)
    nn.functional.cross_entropy(logits, mask.argmax(1)).backward()
    cancelled = [
        module.conv.bias.grad.abs().max()
        for module in denoiser.modules()
        if isinstance(getattr(module, "norm", None), ModulatedInstanceNorm) and module.conv.bias is not None
    ]
    rounding = max(cancelled)
    assert rounding < 1e-6
    for name, parameter in denoiser.time.named_parameters():
        assert parameter.grad.norm() > 1000 * rounding, name
    # each norm's scale and each norm's shift
    rows = denoiser.time.project.weight.grad.split([n // 2 for n in denoiser.time.sizes for _ in range(2)])
    assert min(part.norm() for part in rows) > 100 * rounding


@torch.no_grad()
def test_control_an_offset_before_the_norms_would_not_reach_the_logits(trained):
    """How the published network adds time: a number for each channel in front of the norm."""
    denoiser, image, mask = trained
    t = torch.tensor([10, 700])

    def add_offset(norm, args):
        return args[0] + torch.randn(norm.num_features).view(1, -1, *[1] * (args[0].ndim - 2))

    plain = denoiser.denoise(image, mask, t, full_resolution_only=True)
    norms = [module for module in denoiser.modules() if isinstance(module, ModulatedInstanceNorm)]
    hooks = [norm.register_forward_pre_hook(add_offset) for norm in norms]
    shifted = denoiser.denoise(image, mask, t, full_resolution_only=True)
    for hook in hooks:
        hook.remove()
    assert not torch.equal(plain, shifted)
    assert relative_change(plain, shifted) < 1e-4


# --- one pass --------------------------------------------------------------------------------------------------------


@architectures
def test_no_estimate_stands_for_zeros(pair, wake, architecture):
    _, denoiser, image = pair(architecture, self_conditioning=True)
    wake(denoiser)
    mask, t = torch.rand(2, K, *image.shape[2:]), torch.tensor([1, 900])
    zeros = denoiser.denoise(image, mask, t, torch.zeros_like(mask))
    for a, b in zip(denoiser.denoise(image, mask, t, None), zeros, strict=True):
        assert torch.equal(a, b)
    ones = denoiser.denoise(image, mask, t, torch.ones_like(mask))
    assert relative_change(zeros[0], ones[0]) > 1e-3


@architectures
def test_full_resolution_only_gives_the_first_head_and_restores_deep_supervision(pair, wake, architecture):
    _, denoiser, image = pair(architecture)
    wake(denoiser)
    mask, t = torch.rand(2, K, *image.shape[2:]), torch.tensor([1, 900])
    heads = denoiser.denoise(image, mask, t)
    assert len(heads) == 2
    only = denoiser.denoise(image, mask, t, full_resolution_only=True)
    assert torch.equal(only, heads[0])
    assert denoiser.decoder.deep_supervision is True
    assert len(denoiser.denoise(image, mask, t)) == 2


def test_full_resolution_only_leaves_deep_supervision_off_if_it_was_off(pair):
    _, denoiser, image = pair(deep_supervision=False)
    denoiser.denoise(image, torch.rand(2, K, 16, 20), torch.tensor([1, 2]), full_resolution_only=True)
    assert denoiser.decoder.deep_supervision is False


def test_a_pass_leaves_no_modulation_behind(pair, wake):
    _, denoiser, image = pair()
    wake(denoiser)
    denoiser.denoise(image, torch.rand(2, K, 16, 20), torch.tensor([1, 900]))
    assert all(m.modulation is None for m in denoiser.modules() if isinstance(m, ModulatedInstanceNorm))


def test_inputs_are_stacked_as_image_mask_estimate(pair):
    _, denoiser, image = pair(self_conditioning=True)
    seen = []
    denoiser.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mask, estimate = torch.rand(2, 2, K, 16, 20)
    denoiser.denoise(image, mask, torch.tensor([1, 2]), estimate)
    assert torch.equal(seen[0], torch.cat([image, mask, estimate], dim=1))


def test_a_pass_leaves_its_inputs_alone(pair):
    _, denoiser, image = pair(self_conditioning=True)
    mask, estimate = torch.rand(2, 2, K, 16, 20)
    inputs = [image, mask, torch.tensor([1, 2]), estimate]
    copies = [x.clone() for x in inputs]
    denoiser.denoise(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


# --- size ------------------------------------------------------------------------------------------------------------

# features of every stage as nnU-Net's planners set them
PLANNED = [
    (PlainConvUNet, 3, (32, 64, 128, 256)),
    (PlainConvUNet, 3, (32, 64, 128, 256, 320, 320)),
    (PlainConvUNet, 2, (32, 64, 128, 256)),
    (PlainConvUNet, 2, (32, 64, 128, 256, 512, 512, 512)),
    (ResidualEncoderUNet, 3, (32, 64, 128, 256, 320, 320)),
    (ResidualEncoderUNet, 2, (32, 64, 128, 256, 512, 512, 512)),
    (ResidualEncoderUNet, 2, (32, 64, 128, 256)),
]


def planned_unet(cls, dim, features, classes) -> nn.Module:
    stages = len(features)
    blocks = (
        {"n_conv_per_stage": [2] * stages, "n_conv_per_stage_decoder": [2] * (stages - 1)}
        if cls is PlainConvUNet
        else {"n_blocks_per_stage": [1, 3, 4, 6, 6, 6, 6][:stages], "n_conv_per_stage_decoder": [1] * (stages - 1)}
    )
    return cls(
        1,
        n_stages=stages,
        features_per_stage=features,
        conv_op=nn.Conv2d if dim == 2 else nn.Conv3d,
        kernel_sizes=3,
        strides=[1] + [2] * (stages - 1),
        num_classes=classes,
        conv_bias=True,
        norm_op=nn.InstanceNorm2d if dim == 2 else nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
        **blocks,
    )


@pytest.mark.parametrize("self_conditioning", [False, True])
@pytest.mark.parametrize("classes", [2, 16])
@pytest.mark.parametrize(("cls", "dim", "features"), PLANNED)
def test_additions_are_at_most_a_tenth_of_the_parameters(cls, dim, features, classes, self_conditioning):
    with torch.device("meta"):
        unet = planned_unet(cls, dim, features, classes)
        stock = sum(p.numel() for p in unet.parameters())
        denoiser = DenoisingUNet(unet, classes, self_conditioning=self_conditioning)
    added = sum(p.numel() for p in denoiser.parameters()) / stock - 1
    print(f"{cls.__name__} {dim}D {features}, {classes} classes: {stock} parameters, +{added:.2%}")
    assert 0 < added <= 0.1


# --- what cannot be extended -----------------------------------------------------------------------------------------


def test_another_architecture_is_named():
    network = nn.Sequential(nn.Conv2d(1, 8, 3))
    with pytest.raises(UnsupportedArchitectureError, match=r"Sequential.*PlainConvUNet and ResidualEncoderUNet"):
        DenoisingUNet(network, K)


@pytest.mark.parametrize(
    ("norm", "kwargs", "named"),
    [
        (nn.BatchNorm2d, {}, "BatchNorm2d"),
        (lambda features: nn.GroupNorm(4, features), {}, "GroupNorm"),
        (nn.InstanceNorm2d, {"affine": False}, "affine"),
        (None, None, "no norm that is known"),
        (lambda features: nn.Identity(), {}, "no norm that is known"),
    ],
    ids=["batch", "group", "instance without parameters", "none", "unknown"],
)
def test_another_norm_is_named(make_unet, norm, kwargs, named):
    unet = make_unet(norm_op=norm, norm_op_kwargs=kwargs)
    with pytest.raises(UnsupportedArchitectureError, match=named):
        DenoisingUNet(unet, K)


# --- compilation -----------------------------------------------------------------------------------------------------


@pytest.fixture
def dynamo():
    """torch.compile without memory of other tests, and what it counts."""
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()
    counters.clear()


def test_compiled_it_has_one_graph_for_each_of_the_two_passes(make_segmentor, dynamo):
    network = make_segmentor(unet={"features": (8, 16), "deep_supervision": True})
    names = list(network.state_dict())
    network.train()
    image, t = torch.randn(2, 1, 16, 20), torch.tensor([3, 900])
    expected = network(image, torch.ones(2, K, 16, 20), t)
    network.compile_denoiser(backend="aot_eager")
    assert list(network.state_dict()) == names
    for step in range(4):
        t = torch.randint(0, T, (2,))
        with torch.no_grad():
            network(image, torch.randn(2, K, 16, 20), t, full_resolution_only=True)
        output = network(image, torch.randn(2, K, 16, 20), t)
        sum(o.square().mean() for o in output).backward()
        assert dynamo["stats"]["unique_graphs"] == 2, f"at step {step}"
    assert not dynamo["graph_break"]
    assert list(network.state_dict()) == names
    for a, b in zip(network(image, torch.ones(2, K, 16, 20), torch.tensor([3, 900])), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["encoder", "transformer", "decoder"])
def test_a_pass_that_fails_leaves_the_network_as_it_was(make_unet, where):
    """As one that is repeated when there is no room for it on a GPU."""
    network = DenoisingUNet(make_unet(), K, transformer_heads=2).eval()
    image, mask, t = torch.randn(1, 1, 16, 20), torch.rand(1, K, 16, 20), torch.tensor([7])
    before = network.denoise(image, mask, t)

    def fail(module, given):
        raise MemoryError("no room")

    hook = getattr(network, where).register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        network.denoise(image, mask, t, full_resolution_only=True)
    hook.remove()
    assert network.decoder.deep_supervision
    assert all(m.modulation is None for m in network.modules() if isinstance(m, ModulatedInstanceNorm))
    for a, b in zip(network.denoise(image, mask, t), before, strict=True):
        assert torch.equal(a, b)
