"""Laws and golden values of the cross transformer."""

from itertools import product

import pytest
import torch
from hidiff_reference import below, embedding_of, fill_condition, fill_cross_transformer, parameters_of

from nnunetv2_diffusion.networks.binary import BlockStyle
from nnunetv2_diffusion.networks.cross_transformer import CrossTransformer, FeedForward, binarize_attention
from nnunetv2_diffusion.networks.refiner import ConditionBlock

GRIDS = [(4, 6), (5, 2), (1, 3), (2, 3, 4), (5, 3, 1)]
grids = pytest.mark.parametrize("grid", GRIDS, ids=lambda g: "x".join(map(str, g)))
styles = pytest.mark.parametrize(
    "style",
    [BlockStyle(16, binarized, norm) for binarized in (True, False) for norm in ("instance", "batch")],
    ids=lambda style: f"{'binary' if style.binarized else 'real'}-{style.norm}",
)


@pytest.fixture(scope="module")
def layers(golden):
    return golden("hidiff_binary_ops")


def test_binary_attention_is_golden(layers):
    assert torch.equal(binarize_attention(layers["att_scores"]), layers["att_bin"])


def test_row_without_positive_scores_attends_to_nothing():
    scores = torch.tensor([[-1.0, -3.0], [0.0, -1.0], [1.0, 0.36], [1.0, 0.34]])
    assert binarize_attention(scores).tolist() == [[0, 0], [0, 0], [1, 1], [1, 0]]


def test_binary_attention_has_the_gradient_of_the_softmax():
    scores, upstream = torch.randn(2, 5, 5, requires_grad=True), torch.randn(2, 5, 5)
    attention = binarize_attention(scores)
    assert set(attention.unique().tolist()) == {0, 1}
    found = torch.autograd.grad(attention, scores, upstream)
    torch.testing.assert_close(found, torch.autograd.grad(scores.softmax(-1), scores, upstream))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("binarized", [False, True], ids=["real", "binary"])
def test_cross_transformer_is_golden_in_the_right_layout(layers, binarized, training):
    name = "xformer_bin" if binarized else "xformer_real"
    arrays, embedding = parameters_of(layers, name), embedding_of(layers, name, 2)
    condition = ConditionBlock(32, 32, (3, 3), 16)
    fill_condition(condition, below(arrays, "condition_conv."))
    transformer = CrossTransformer(32, 2, BlockStyle(16, binarized, "batch")).train(training)
    fill_cross_transformer(transformer, arrays)

    reference = layers[f"{name}__{'train' if training else 'eval'}"]
    b, c, *grid = reference.shape
    expected = reference.reshape(b, -1, c).transpose(1, 2).reshape(b, c, *grid)  # it took tokens for channels
    found = transformer(layers[f"{name}__in1"], condition(layers[f"{name}__in0"], embedding), embedding)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@styles
@grids
def test_it_starts_as_the_identity(style, grid):
    transformer = CrossTransformer(16, len(grid), style)
    generative, prior = torch.randn(2, 2, 16, *grid)
    assert torch.equal(transformer(generative, prior, torch.randn(2, 16)), generative)


def swap_axes(transformer: CrossTransformer) -> None:
    """Give the pooling along the first axis the weights of that along the second one, and the other way round."""
    for block in (transformer.to_prior, transformer.to_generative):
        first3, first5, second3, second5, *others = block.feed_forward.pool_scales
        block.feed_forward.pool_scales = torch.nn.ModuleList([second3, second5, first3, first5, *others])


@styles
@pytest.mark.parametrize("grid", [(5, 2), (2, 4, 3)], ids=str)
def test_voxels_are_tokens_in_place_on_any_grid(style, grid, wake):
    """Swapping two axes of space swaps them in the output, which no scrambled layout could do."""
    transformer = wake(CrossTransformer(16, len(grid), style)).double().eval()
    generative, prior = torch.randn(2, 2, 16, *grid, dtype=torch.float64)
    embedding = torch.randn(2, 16, dtype=torch.float64)
    there = transformer(generative, prior, embedding)
    swap_axes(transformer)
    back = transformer(generative.transpose(2, 3), prior.transpose(2, 3), embedding).transpose(2, 3)
    torch.testing.assert_close(back, there)
    assert (there - generative).abs().max() > 0.1


@styles
def test_grid_of_depth_1_is_the_2d_grid(style, wake):
    flat = wake(CrossTransformer(16, 2, style)).eval()
    solid = CrossTransformer(16, 3, style).eval()
    incompatible = solid.load_state_dict(
        {
            key.replace(f"pool_scales.{i}.", f"pool_scales.{i + 2}."): value
            for key, value in flat.state_dict().items()
            for i in [int(key.split("pool_scales.")[1][0]) if "pool_scales." in key else 0]
        },
        strict=False,
    )  # pooling along the depth stays at zero
    assert all("pool_scales.0." in key or "pool_scales.1." in key for key in incompatible.missing_keys)
    assert not incompatible.unexpected_keys
    generative, prior = torch.randn(2, 2, 16, 3, 5)
    embedding = torch.randn(2, 16)
    found = solid(generative[:, :, None], prior[:, :, None], embedding)[:, :, 0]
    torch.testing.assert_close(found, flat(generative, prior, embedding))


@pytest.mark.parametrize("grid", [(4, 6), (2, 1, 7)], ids=str)
def test_feed_forward_pools_each_axis_over_3_and_5_voxels_with_zeros_outside(grid):
    block = FeedForward(1, len(grid), BlockStyle(4, norm="batch"), constants=True).eval()
    image = torch.randn(grid)
    normed = image / (1 + 1e-5) ** 0.5
    for (axis, size), scale in zip(product(range(len(grid)), (3, 5)), block.pool_scales, strict=True):
        torch.nn.init.ones_(scale.offsets.bias[:1])
        found = block(image.view(1, 1, -1), torch.zeros(1, 4), grid).view(grid) - image
        torch.nn.init.zeros_(scale.offsets.bias[:1])
        expected = torch.zeros(grid)
        for voxel in product(*map(range, grid)):
            for step in range(-(size // 2), size // 2 + 1):
                neighbour = list(voxel)
                neighbour[axis] += step
                if 0 <= neighbour[axis] < grid[axis]:
                    expected[voxel] += normed[tuple(neighbour)] / size
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@styles
def test_both_features_and_the_time_reach_the_output(style, wake):
    transformer = wake(CrossTransformer(16, 2, style)).eval()
    generative, prior = torch.randn(2, 2, 16, 3, 4)
    embedding = torch.randn(2, 16)
    y = transformer(generative, prior, embedding)
    for moved in (
        transformer(torch.randn_like(generative), prior, embedding) - y,
        transformer(generative, torch.randn_like(prior), embedding) - y,
        transformer(generative, prior, torch.randn_like(embedding)) - y,
    ):
        assert moved.abs().max() > 1e-2


@styles
def test_samples_do_not_see_each_other(style, wake):
    transformer = wake(CrossTransformer(16, 3, style)).eval()
    generative, prior = torch.randn(2, 3, 16, 2, 3, 2)
    embedding = torch.randn(3, 16)
    together = transformer(generative, prior, embedding)
    for i in range(3):
        alone = transformer(generative[i : i + 1], prior[i : i + 1], embedding[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)


@styles
def test_all_parameters_learn(style, wake):
    transformer = wake(CrossTransformer(16, 2, style))
    generative, prior = torch.randn(2, 4, 16, 5, 4)
    y = transformer(generative, prior, torch.randn(4, 16))
    (y * torch.randn_like(y)).sum().backward()
    for name, parameter in transformer.named_parameters():
        assert parameter.grad.norm() > 1e-3, name


def test_channels_that_the_heads_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="18 channels; expected a multiple of its 4 heads"):
        CrossTransformer(18, 2, BlockStyle(16))
