"""Laws and golden values of the refiner."""

import math

import pytest
import torch
from hidiff_reference import below, embedding_of, fill_condition, fill_conv_block, parameters_of
from torch import nn
from torch.nn import functional as F

from laboratory.benchmarking.refiner import refiner_inputs
from nnunetv2_diffusion.networks.binary import BinaryConv, BlockStyle
from nnunetv2_diffusion.networks.refiner import ConcatLayer, ConditionBlock, Refiner, TimeEmbedding
from nnunetv2_diffusion.networks.time_conditioning import sinusoidal_embedding

CONDITIONS = {0: 8, 1: 12, 2: 6}
kinds = pytest.mark.parametrize(
    ("binarized", "norm"),
    [(True, "instance"), (True, "batch"), (False, "instance"), (False, "batch")],
    ids=["binary-instance", "binary-batch", "real-instance", "real-batch"],
)
every_geometry = pytest.mark.parametrize("geometry", ["2d", "2d_anisotropic", "3d", "3d_anisotropic"])


@pytest.fixture(scope="module")
def layers(golden):
    return golden("hidiff_binary_ops")


@pytest.fixture(scope="module")
def make_refiner(geometries):
    def make(geometry: str = "2d", heads: int = 2, conditions: dict | None = None, **settings) -> Refiner:
        shape = geometries[geometry]
        conditions = CONDITIONS if conditions is None else conditions
        return Refiner(1, heads, shape.kernel_sizes, shape.strides, conditions, **{"width": 8, **settings})

    return make


def random_inputs(refiner: Refiner, patch: tuple[int, ...], times: tuple[int, ...] = (0, 4, 9)) -> list:
    """A batch with one sample for each time."""
    image, mask, _, _, features = refiner_inputs(refiner, patch, "cpu")
    b = len(times)
    mask = mask.expand(b, *mask.shape[1:])
    prior = torch.rand_like(mask)
    features = {stage: torch.randn(b, *feature.shape[1:]) for stage, feature in features.items()}
    return [torch.randn(b, *image.shape[1:]), torch.bernoulli(prior), prior, torch.tensor(times), features]


def test_sinusoidal_features_are_golden(layers):
    torch.testing.assert_close(sinusoidal_embedding(torch.arange(10), 128), layers["temb"])


def test_time_embedding_is_float32_under_autocast_and_activated():
    embedding, t = TimeEmbedding(8), torch.tensor([0, 5, 9])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        halved = embedding(t)
    assert halved.dtype == torch.float32
    assert torch.equal(halved, embedding(t))
    torch.testing.assert_close(halved, F.silu(embedding.mlp[:3](sinusoidal_embedding(t, 8))))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_concat_layer_is_golden(layers, training):
    arrays, embedding = parameters_of(layers, "concat"), embedding_of(layers, "concat", 2)
    layer = ConcatLayer(32, 32, (3, 3), BlockStyle(16, norm="batch")).train(training)
    fill_conv_block(layer.block, arrays)
    fill_condition(layer.condition, below(arrays, "condition_conv."))
    y = layer(layers["concat__in1"], layers["concat__in0"], embedding)
    torch.testing.assert_close(y, layers[f"concat__{'train' if training else 'eval'}"], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("features", "channels"), [(12, 8), (8, 8)])
def test_condition_block_starts_as_its_skip_at_every_time(features, channels):
    block = ConditionBlock(features, channels, (3, 3), 16)
    feature = torch.randn(2, features, 4, 5)
    expected = feature if features == channels else F.conv2d(feature, block.skip.weight)
    assert torch.equal(block(feature, torch.randn(2, 16)), expected)


@kinds
@every_geometry
def test_untrained_refiner_says_that_few_voxels_are_wrong(make_refiner, geometries, geometry, binarized, norm):
    refiner = make_refiner(geometry, heads=3, binarized=binarized, norm=norm)
    inputs = random_inputs(refiner, geometries[geometry].patch)
    logits = refiner(*inputs)
    assert logits.shape == inputs[1].shape
    torch.testing.assert_close(logits.sigmoid(), torch.full_like(logits, 0.01))


@kinds
@every_geometry
def test_all_parameters_learn(make_refiner, geometries, geometry, binarized, norm, wake):
    refiner = wake(make_refiner(geometry, binarized=binarized, norm=norm))
    logits = refiner(*random_inputs(refiner, geometries[geometry].patch))
    (logits * torch.randn_like(logits)).sum().backward()
    for name, parameter in refiner.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.norm() > 1e-3, name


@kinds
@pytest.mark.parametrize("dims", [2, 3])
def test_it_learns_and_learns_the_time(binarized, norm, dims):
    """Voxels are wrong at the later time alone: nothing but the time tells."""
    kernels, strides, patch = [[3] * dims] * 2, [[1] * dims, [2] * dims], (12, 10, 8)[:dims]
    refiner = Refiner(1, 2, kernels, strides, {1: 8}, width=8, norm=norm, binarized=binarized)
    *images, t, features = random_inputs(refiner, patch, (1, 8))
    *images, feature = [x[:1].expand(2, *x.shape[1:]) for x in (*images, features[1])]
    target = torch.zeros_like(images[1])
    target[1] = 1
    optimiser = torch.optim.AdamW(refiner.parameters(), lr=1e-2)
    losses = []
    for _ in range(16):
        logits = refiner(*images, t, {1: feature})
        losses.append(F.binary_cross_entropy_with_logits(logits, target))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    inside = logits[(..., *[slice(2, -2)] * dims)]  # not at the borders, whose zeros betray an offset to any norm
    assert losses[-1] < 0.5 * losses[0]
    assert (inside[1] - inside[0]).abs().mean() > 0.01 * inside.abs().mean()


@kinds
def test_every_input_reaches_the_logits_of_a_frozen_refiner(make_refiner, binarized, norm, wake):
    refiner = wake(make_refiner(binarized=binarized, norm=norm)).requires_grad_(False).eval()
    image, y_t, prior, t, features = random_inputs(refiner, (16, 20))
    inputs = [image, y_t, prior, *features.values()]
    for x in inputs:
        x.requires_grad_()
    logits = refiner(image, y_t, prior, t, features)
    for grad in torch.autograd.grad((logits * torch.randn_like(logits)).sum(), inputs):
        assert (grad.flatten(1).norm(dim=1) > 1e-3).all()


@kinds
def test_samples_do_not_see_each_other(make_refiner, binarized, norm, wake):
    refiner = wake(make_refiner(binarized=binarized, norm=norm)).eval().double()
    image, y_t, prior, t, features = random_inputs(refiner, (16, 20))
    image, y_t, prior = image.double(), y_t.double(), prior.double()
    features = {stage: x.double() for stage, x in features.items()}
    together = refiner(image, y_t, prior, t, features)
    alone = refiner(image[1:2], y_t[1:2], prior[1:2], t[1:2], {stage: x[1:2] for stage, x in features.items()})
    torch.testing.assert_close(alone[0], together[1])
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_stages_have_the_channels_of_the_paper():
    plan = [[3, 3]] * 7, [[1, 1]] + [[2, 2]] * 6
    refiner = Refiner(1, 9, *plan, {}, width=8)
    assert [stage.block.norm.num_features for stage in refiner.encoder] == [8, 8, 16, 16, 32, 32]
    assert refiner.bottleneck.enter.norm.num_features == 32
    assert [stage.block.norm.num_features for stage in refiner.decoder] == [32, 32, 16, 16, 8, 8]
    assert refiner.stem.weight.shape[1] == 1 + 2 * 9


@every_geometry
def test_kernels_are_those_of_the_plans(make_refiner, geometries, geometry):
    refiner = make_refiner(geometry)
    kernels = [tuple(kernel) for kernel in geometries[geometry].kernel_sizes]
    for i, stage in enumerate(refiner.encoder):
        assert tuple(stage.block.conv.weight.shape[2:]) == kernels[i]
        assert tuple(stage.down.conv.weight.shape[2:]) == kernels[i + 1]
        assert stage.down.stride == tuple(geometries[geometry].strides[i + 1])
    for i, stage in enumerate(reversed(refiner.decoder)):
        assert tuple(stage.up.conv.weight.shape[2:]) == kernels[i]
        assert tuple(stage.block.conv.weight.shape[2:]) == kernels[i]


def test_first_last_and_condition_layers_alone_are_real_valued(make_refiner):
    refiner = make_refiner(binarized=True)
    real = {name.rsplit(".", 1)[0] for name, module in refiner.named_modules() if isinstance(module, nn.Conv2d)}
    conditions = {"encoder.0.concat.condition", "encoder.1.concat.condition", "bottleneck.condition"}
    assert {name for name in real if name not in ("stem", "head")} == conditions
    assert isinstance(refiner.stem, nn.Conv2d)
    assert isinstance(refiner.head[-1], nn.Conv2d)
    assert not any(isinstance(module, BinaryConv) for module in make_refiner(binarized=False).modules())


def test_binary_and_real_refiner_have_weights_of_the_same_shapes(make_refiner):
    def weights(refiner: Refiner) -> dict:
        return {
            key: tuple(value.shape)
            for key, value in refiner.state_dict().items()
            if value.ndim > 1 and "offsets" not in key
        }

    assert weights(make_refiner(binarized=True)) == weights(make_refiner(binarized=False))


def test_without_cross_transformer_the_deepest_feature_is_not_needed(make_refiner):
    refiner = make_refiner(cross_transformer=False)
    assert refiner.condition_channels == {0: 8, 1: 12}
    assert refiner.bottleneck.cross_transformer is None
    assert make_refiner(conditions={0: 8, 1: 12}).bottleneck.cross_transformer is None
    inputs = random_inputs(refiner, (16, 20))
    assert set(inputs[-1]) == {0, 1}
    assert refiner(*inputs).isfinite().all()


def test_features_of_other_stages_are_ignored(make_refiner, wake):
    refiner = wake(make_refiner(conditions={1: 12}))
    image, y_t, prior, t, features = random_inputs(refiner, (16, 20))
    more = features | {0: torch.randn(3, 5, 16, 20), 2: torch.randn(3, 5, 4, 5)}
    assert torch.equal(refiner(image, y_t, prior, t, more), refiner(image, y_t, prior, t, features))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@kinds
def test_it_runs_forwards_and_backwards_under_autocast(binarized, norm, dtype, wake):
    settings = {"width": 8, "norm": norm, "binarized": binarized}
    refiner = wake(Refiner(1, 2, [[3] * 3] * 2, [[1] * 3, [2] * 3], {0: 8, 1: 12}, **settings))
    inputs = random_inputs(refiner, (4, 6, 8))
    with torch.autocast("cpu", dtype=dtype):
        logits = refiner(*inputs)
    assert logits.dtype == dtype
    logits.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in refiner.parameters())
    if not binarized:  # signs of numbers near 0 flip by rounding
        full = refiner(*inputs)
        assert (logits - full).abs().mean() < 0.1 * (full - full.mean()).abs().mean()


@pytest.mark.slow
@kinds
def test_it_compiles_to_one_graph(make_refiner, binarized, norm, wake):
    refiner = wake(make_refiner(binarized=binarized, norm=norm)).eval()
    inputs = random_inputs(refiner, (16, 20), (3,))
    with torch.no_grad():
        compiled = torch.compile(refiner, backend="eager", fullgraph=True)(*inputs)
        torch.testing.assert_close(compiled, refiner(*inputs))


PLAN = {
    "kernel_sizes": [[3, 3], [3, 3], [3, 3]],
    "strides": [[1, 1], [2, 2], [2, 2]],
    "condition_channels": {1: 8},
    "width": 8,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strides": [[1, 1], [2, 2]]}, r"kernel_sizes has 3 and strides 2 entries"),
        ({"strides": [[1, 1]], "kernel_sizes": [[3, 3]]}, r"at least 2 stages"),
        ({"strides": [[1, 1], [2, 2], [2, 2, 2]]}, r"lengths \[2, 3\]; expected all 2 or all 3"),
        ({"kernel_sizes": [[3, 3], [3, 2], [3, 3]]}, r"expected odd sizes"),
        ({"strides": [[1, 2], [2, 2], [2, 2]]}, r"strides\[0\] is \[1, 2\]; expected all 1"),
        ({"condition_channels": {1: 8, 3: 8}}, r"names stages \[3\]; expected stages 0 to 2"),
        ({"width": 6}, r"width is 6; expected a multiple of 4"),
        ({"norm": "group"}, r"norm is 'group'"),
    ],
)
def test_contradicting_arguments_are_refused(change, message):
    Refiner(1, 2, **PLAN)
    with pytest.raises(ValueError, match=message):
        Refiner(1, 2, **{**PLAN, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": (2, 2, 8, 8)}, r"image has shape \(2, 2, 8, 8\); expected \(2, 1, 8, 8\)"),
        ({"image": (2, 1, 8, 10)}, r"the patch is \(8, 10\); expected multiples .* \(4, 4\)"),
        ({"image": (2, 1, 8, 8, 8)}, r"the patch is \(8, 8, 8\)"),
        ({"y_t": (2, 3, 8, 8)}, r"y_t has shape \(2, 3, 8, 8\); expected \(2, 2, 8, 8\)"),
        ({"prior": (1, 2, 8, 8)}, r"prior has shape \(1, 2, 8, 8\); expected \(2, 2, 8, 8\)"),
        ({"feature": (2, 8, 8, 8)}, r"features\[1\] has shape \(2, 8, 8, 8\); expected \(2, 8, 4, 4\)"),
    ],
)
def test_inputs_of_other_shapes_are_refused(change, message):
    refiner = Refiner(1, 2, **PLAN)
    shapes = {"image": (2, 1, 8, 8), "y_t": (2, 2, 8, 8), "prior": (2, 2, 8, 8), "feature": (2, 8, 4, 4)}
    image, y_t, prior, feature = (torch.zeros(shape) for shape in (shapes | change).values())
    with pytest.raises(ValueError, match=message):
        refiner(image, y_t, prior, torch.zeros(2, dtype=torch.long), {1: feature})


def test_missing_feature_is_named():
    refiner = Refiner(1, 2, **PLAN)
    mask = torch.zeros(1, 2, 8, 8)
    with pytest.raises(ValueError, match=r"features has stages \[2\]; expected also stage 1"):
        refiner(mask[:, :1], mask, mask, torch.tensor([0]), {2: mask})


@pytest.mark.parametrize("training", [False, True])
def test_bottleneck_of_a_single_voxel_is_refused_by_instance_norm_alone(training):
    mask, t, feature = torch.zeros(2, 2, 4, 4), torch.tensor([0, 1]), {1: torch.randn(2, 8, 2, 2)}
    with pytest.raises(ValueError, match=r"patch of \(4, 4\) has a bottleneck grid of a single voxel"):
        Refiner(1, 2, **PLAN).train(training)(mask[:, :1], mask, mask, t, feature)
    logits = Refiner(1, 2, **PLAN, norm="batch").train(training)(mask[:, :1], mask, mask, t, feature)
    assert logits.sigmoid().mean().item() == pytest.approx(0.01)


def test_total_stride_may_differ_between_axes(make_refiner, geometries):
    refiner = make_refiner("3d_anisotropic")
    assert refiner.grids((5, 12, 20)) == [(5, 12, 20), (5, 6, 10), (5, 3, 5)]
    assert math.prod(refiner.grids(geometries["3d_anisotropic"].patch)[-1]) == 75
