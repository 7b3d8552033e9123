"""Laws of MERIT and its decoder."""

import math
import zipfile
from collections.abc import Iterator
from copy import deepcopy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from nnunetv2_diffusion.networks import merit as module
from nnunetv2_diffusion.networks.cascaded_decoder import (
    AttentionGate,
    CascadedDecoder,
    ChannelAttention,
    SpatialAttention,
)
from nnunetv2_diffusion.networks.merit import VARIANTS, Merit, MeritWeightsError, scale_sizes

CHANNELS = [64, 128, 256, 512]
K = 3


def millions(part: nn.Module) -> float:
    return sum(p.numel() for p in part.parameters()) / 1e6


def bilinear(x: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


@pytest.fixture(scope="module")
def shared() -> Merit:
    """3 image channels, scales of different and not square sizes; tests leave its weights alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Merit(3, K, (128, 32), "nano").eval()


@pytest.fixture
def seen(shared) -> Iterator[dict[str, list]]:
    """(input, output) of every call of the parts of MERIT, by name, filled when it is called."""
    calls: dict[str, list] = {name: [] for name, _ in shared.named_children()}
    handles = [
        part.register_forward_hook(lambda _, args, result, name=name: calls[name].append((args[0], result)))
        for name, part in shared.named_children()
    ]
    yield calls
    for handle in handles:
        handle.remove()


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "first", "second"),
    [
        ((256, 256), (256, 256), (224, 224)),
        ((512, 320), (512, 320), (448, 288)),
        ((250, 129), (256, 160), (224, 128)),
        ((128, 96), (128, 96), (96, 96)),
        ((50, 70), (64, 96), (64, 96)),
        ((1, 32), (32, 32), (32, 32)),
    ],
)
def test_scales_are_multiples_of_32_near_the_size_and_seven_eighths_of_it(size, first, second):
    assert scale_sizes(size) == (first, second)


@pytest.mark.parametrize("n", range(1, 1100, 53))
def test_second_scale_is_the_nearest_multiple_of_32_and_never_larger(n):
    (first, _), (second, _) = scale_sizes((n, n))
    assert first - 32 < n <= first
    assert second % 32 == first % 32 == 0
    assert 32 <= second <= first
    assert abs(second - 7 / 8 * first) <= 16


def test_parameters_of_the_published_setting_are_the_published_ones():
    with torch.device("meta"):
        network = Merit(1, 9, (256, 256))
    assert network.sizes == ((256, 256), (224, 224))
    assert network.feature_channels == [96, 192, 384, 768]
    assert millions(network.scale1) == pytest.approx(65.24, rel=0.005)
    assert millions(network.scale2) == pytest.approx(64.13, rel=0.005)
    assert millions(network.decoder) == pytest.approx(18.48, rel=0.005)
    assert millions(network.heads) == pytest.approx(0.013, rel=0.005)
    assert millions(network) == pytest.approx(147.86, rel=0.005)


def test_both_scales_of_the_tiny_variant_have_the_same_channels():
    with torch.device("meta"):
        network = Merit(3, K, (256, 192), "tiny")
    assert network.scale1.channels == network.scale2.channels == network.feature_channels == CHANNELS
    assert network.feature_strides == [(4, 4), (8, 8), (16, 16), (32, 32)]


# --- whole network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [(128, 32), (64, 64), (50, 70), (131, 37)], ids=str)
def test_outputs_have_the_size_of_the_input_and_features_that_of_their_stride(shared, space):
    with torch.no_grad():
        logits, heads, features = shared(torch.randn(2, 3, *space))
    assert logits.shape == (2, K, *space)
    assert [h.shape for h in heads] == [(2, K, *space)] * 4
    expected = [(2, c, *(math.ceil(n / s) for n in space)) for c, s in zip(CHANNELS, (4, 8, 16, 32), strict=True)]
    assert [f.shape for f in features] == expected


@pytest.mark.parametrize("channels", [1, 4])
def test_any_number_of_channels_is_used(channels):
    network = Merit(channels, 1, (32, 32), "nano").train()
    image = torch.randn(2, channels, 32, 32, requires_grad=True)
    logits = network(image).logits
    assert logits.shape == (2, 1, 32, 32)
    logits.square().sum().backward()
    assert (image.grad.abs().amax((0, 2, 3)) > 0).all()
    without = [name for name, p in network.named_parameters() if p.grad is None]
    assert without == []
    for part in (network.to_rgb, network.scale1, network.scale2, network.decoder, network.heads, network.feedback):
        assert max(p.grad.abs().max() for p in part.parameters()) > 0
        assert all(p.grad.isfinite().all() for p in part.parameters())


def test_three_channels_are_taken_as_they_are(shared, seen):
    image = torch.randn(1, 3, 128, 32)
    with torch.no_grad():
        shared(image)
    assert millions(shared.to_rgb) == 0
    assert torch.equal(seen["scale1"][0][0], image)


def test_logits_are_the_sum_of_the_heads(shared):
    with torch.no_grad():
        logits, heads, _ = shared(torch.randn(1, 3, 64, 48))
    torch.testing.assert_close(logits, heads[0] + heads[1] + heads[2] + heads[3])
    assert min(h.std() for h in heads) > 1e-3


def test_second_scale_sees_the_image_weighted_by_the_first_result(shared, seen):
    image = torch.randn(1, 3, 128, 32)
    with torch.no_grad():
        shared(image)
        finest = seen["decoder"][0][1][-1]
        weight = bilinear(torch.sigmoid(shared.feedback(finest)), (128, 32))
    assert weight.std() > 1e-4
    assert shared.sizes[1] == (96, 32)
    torch.testing.assert_close(seen["scale2"][0][0], bilinear(image * weight, (96, 32)))


def test_feedback_carries_a_gradient_to_the_first_scale(shared, seen):
    shared(torch.randn(1, 3, 64, 64))
    seen["scale2"][0][0].square().sum().backward()
    try:
        assert max(p.grad.abs().max() for p in shared.scale1.parameters() if p.grad is not None) > 0
        assert all(p.grad is None for p in shared.scale2.parameters())
    finally:
        shared.zero_grad()


def test_one_decoder_reads_the_first_scale_and_then_both_added_up(shared, seen):
    with torch.no_grad():
        _, _, features = shared(torch.randn(1, 3, 128, 32))
    first, second = (features_in for features_in, _ in seen["decoder"])
    for level in range(4):
        f1, f2 = seen["scale1"][0][1][level], seen["scale2"][0][1][level]
        assert torch.equal(first[level], f1)
        assert torch.equal(features[level], f1)
        torch.testing.assert_close(second[level], f2 + bilinear(f1, f2.shape[2:]))


def test_heads_add_up_both_scales_deep_to_fine(shared, seen):
    space = (70, 50)
    with torch.no_grad():
        heads = shared(torch.randn(1, 3, *space)).heads
        for level, (head, conv) in enumerate(zip(heads, shared.heads, strict=True)):
            maps = [result[level] for _, result in seen["decoder"]]
            assert maps[0].shape[1:] == (CHANNELS[3 - level], 2 ** (level + 2), 2**level)
            torch.testing.assert_close(head, sum(bilinear(conv(m), space) for m in maps))


def test_only_the_coarsest_feature_is_layer_normalised(shared, seen):
    with torch.no_grad():
        shared(torch.randn(2, 3, 128, 32))
    for scale in ("scale1", "scale2"):
        means = [f.mean(1).abs().max() for f in seen[scale][0][1]]
        deviations = [f.std(1, correction=0) for f in seen[scale][0][1]]
        assert means[3] < 1e-4
        torch.testing.assert_close(deviations[3], torch.ones_like(deviations[3]), rtol=1e-2, atol=0)
        assert all((d - 1).abs().max() > 0.05 for d in deviations[:3])


def test_evaluation_is_deterministic_and_leaves_the_state_alone(shared):
    image = torch.randn(2, 3, 64, 64)
    before = {k: v.clone() for k, v in shared.state_dict().items()}
    with torch.no_grad():
        first, second = shared(image), shared(image)
        alone = shared(image[1:])
    assert torch.equal(first.logits, second.logits)
    torch.testing.assert_close(alone.logits, first.logits[1:], rtol=1e-3, atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in shared.state_dict().items())


def test_state_dict_brings_the_network_back(shared, tmp_path):
    torch.save(shared.state_dict(), tmp_path / "weights.pth")
    other, image = deepcopy(shared), torch.randn(1, 3, 64, 64)
    for value in other.state_dict().values():
        value.zero_()
    with torch.no_grad():
        expected = shared(image).logits
        assert not torch.equal(other(image).logits, expected)
        other.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
        assert torch.equal(other(image).logits, expected)


def test_autocast_gives_nearly_the_same(shared):
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = shared(image).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            halved = shared(image).logits
    assert (halved.float() - expected).abs().max() < 0.1 * expected.abs().max()


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 2, (64, 64), "large"), "no variant 'large', expected one of small, tiny, nano"),
        ((1, 2, (64, 64, 64), "nano"), r"2D: size is \(64, 64, 64\)"),
        ((1, 2, (64, 0), "nano"), r"size is \(64, 0\), expected two positive integers"),
        ((1, 2, (64, 64.5), "nano"), r"size is \(64, 64.5\)"),
        ((0, 2, (64, 64), "nano"), "image_channels is 0, expected a positive integer"),
        ((1, 0, (64, 64), "nano"), "num_heads is 0, expected a positive integer"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Merit(*arguments)


@pytest.mark.parametrize("shape", [(1, 2, 64, 64), (1, 3, 8, 64, 64), (3, 64, 64)], ids=str)
def test_an_image_of_another_shape_is_named(shared, shape):
    with pytest.raises(ValueError, match=r"image has shape \(.*\), expected \(B, 3, H, W\)"):
        shared(torch.zeros(shape))


# --- pretrained weights ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, torch.Tensor]]:
    """State dicts of timm's models, laid out for another size than the tests use."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return {
            key: timm.create_model(name, img_size=(64, 64)).state_dict()
            for key, name in zip(("scale1", "scale2"), VARIANTS["nano"], strict=True)
        }


def differing_weights(network: Merit, states: dict) -> list[str]:
    """Names of what the backbones do not have from these state dicts."""
    return [
        name
        for key in ("scale1", "scale2")
        for name, value in getattr(network, key).model.state_dict().items()
        if value.shape != states[key][name].shape or not torch.equal(value, states[key][name])
    ]


def test_a_local_file_fills_both_scales_whatever_its_classifier(states, tmp_path):
    saved = {key: {k: v for k, v in s.items() if not k.startswith("head.")} for key, s in states.items()}
    saved["scale1"]["head.fc.weight"] = torch.zeros(7, 512)
    torch.save(saved, tmp_path / "merit.pth")
    network = Merit(3, K, (64, 128), "nano", weights=str(tmp_path / "merit.pth"))
    differing = differing_weights(network, states)
    tables = [name for name in states["scale2"] if name.endswith("relative_position_bias_table")]
    assert differing == tables != []
    for name in tables:
        # another window, so interpolated; the middle stays what it was, the bias of a pixel towards itself
        new, old = network.scale2.model.state_dict()[name], states["scale2"][name]
        assert len(new) > len(old)
        torch.testing.assert_close(new[len(new) // 2], old[len(old) // 2], rtol=1e-3, atol=1e-4)


def test_weights_that_do_not_fit_are_named(states, tmp_path):
    changed = {**states["scale1"], "extra": torch.zeros(1), "norm.bias": torch.zeros(5)}
    del changed["norm.weight"]
    torch.save({"scale1": changed, "scale2": {}}, tmp_path / "merit.pth")
    expected = (
        r"merit.pth: scale1 \(maxvit_rmlp_nano_rw_256\): weights do not fit; 1 missing: norm.weight; "
        r"1 unexpected: extra; 1 of another shape: norm.bias: \(5,\), expected \(512,\)$"
    )
    with torch.device("meta"), pytest.raises(MeritWeightsError, match=expected):
        Merit(3, K, (64, 64), "nano", weights=tmp_path / "merit.pth")


def test_weights_of_scales_that_are_swapped_do_not_fit(states, tmp_path):
    torch.save({"scale1": states["scale2"], "scale2": states["scale1"]}, tmp_path / "merit.pth")
    message = r"\d+ missing: stages\..*, \.\.\.; \d+ unexpected: stages\..*, \.\.\.$"
    with torch.device("meta"), pytest.raises(MeritWeightsError, match=message):
        Merit(3, K, (64, 64), "nano", weights=tmp_path / "merit.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"scale1": {}}, "holds scale1, expected a dict with the keys scale1 and scale2"),
        ({f"stem.{i}": torch.zeros(1) for i in range(9)}, r"holds stem.0, .*stem.4, \.\.\., expected a dict"),
        ([1, 2], "holds list, expected a dict"),
        ({"scale1": {}, "scale2": [1]}, "scale2 is no state dict, expected that of timm's maxvit_nano_rw_256"),
        ({"scale1": {"a": 1}, "scale2": {}}, "scale1 is no state dict"),
    ],
)
def test_a_local_file_of_another_form_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "merit.pth")
    with pytest.raises(MeritWeightsError, match=f"merit.pth: {message}"):
        Merit(3, K, (64, 64), "nano", weights=tmp_path / "merit.pth")


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(MeritWeightsError, match=r"none\.pth: no such file"):
        Merit(3, K, (64, 64), "nano", weights=tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(MeritWeightsError, match=r"text\.pth: damaged"):
        Merit(3, K, (64, 64), "nano", weights=tmp_path / "text.pth")


class Payload:
    """Runs code when it is unpickled without care."""

    def __reduce__(self):
        return (zipfile.ZipFile, ("made_by_payload.zip", "w"))


def test_a_file_with_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"scale1": Payload(), "scale2": {}}, "evil.pth")
    with pytest.raises(MeritWeightsError, match=r"evil\.pth: it holds zipfile\.ZipFile, which is no tensor"):
        Merit(3, K, (64, 64), "nano", weights="evil.pth")
    assert not (tmp_path / "made_by_payload.zip").exists()


def test_timm_weights_are_asked_for_at_the_size_of_each_scale(monkeypatch):
    create, asked = timm.create_model, []

    def pretend(name, pretrained, img_size):
        asked.append((name, pretrained, img_size))
        return create(name, img_size=img_size)

    monkeypatch.setattr(module.timm, "create_model", pretend)
    with torch.device("meta"):
        Merit(3, K, (128, 32), "nano", weights="timm")
    assert asked == [(VARIANTS["nano"][0], True, (128, 32)), (VARIANTS["nano"][1], True, (96, 32))]


@pytest.mark.parametrize("error", [OSError("offline"), RuntimeError("offline")], ids=["OSError", "RuntimeError"])
def test_a_failed_download_says_how_to_use_a_local_file(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(module.timm, "create_model", fail)
    message = r"maxvit_rmlp_nano_rw_256 could not be had \(.*: offline\).*local file.*torch.save"
    with pytest.raises(MeritWeightsError, match=message) as caught:
        Merit(3, K, (64, 64), "nano", weights="timm")
    assert caught.value.__cause__ is error


# --- decoder ---------------------------------------------------------------------------------------------------------


def test_channel_attention_weights_channels_by_their_mean_and_maximum():
    attention = ChannelAttention(32, reduction=16)
    assert attention.mlp[0].weight.shape == (2, 32, 1, 1)
    x = torch.randn(2, 32, 5, 7)
    first, second = attention.mlp[0].weight[:, :, 0, 0], attention.mlp[2].weight[:, :, 0, 0]
    expected = torch.empty_like(x)
    for b in range(2):
        pooled = x[b].flatten(1)
        score = sum(second @ (first @ p).clamp(min=0) for p in (pooled.mean(1), pooled.max(1).values))
        expected[b] = x[b] / (1 + torch.exp(-score))[:, None, None]
    torch.testing.assert_close(attention(x), expected)


def test_spatial_attention_weights_pixels_by_mean_and_maximum_of_channels():
    attention = SpatialAttention()
    kernel = attention.conv.weight[0]
    x = torch.randn(1, 6, 9, 8)
    padded = F.pad(torch.stack([x[0].mean(0), x[0].max(0).values]), (3, 3, 3, 3))
    score = torch.stack([(padded[:, i : i + 7, j : j + 7] * kernel).sum() for i in range(9) for j in range(8)])
    torch.testing.assert_close(attention(x), x * score.reshape(9, 8).sigmoid(), rtol=1e-4, atol=1e-5)


def test_attention_gate_weights_the_skip_by_one_number_a_pixel(wake):
    gate = wake(AttentionGate(8, 4)).eval()
    g, x = torch.randn(2, 8, 5, 6), torch.randn(2, 8, 5, 6)
    ratio = gate(g, x) / x
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3, atol=1e-4)
    assert 0 < ratio.min() < ratio.max() < 1
    assert (gate(g + 1, x) - gate(g, x)).abs().max() > 1e-3
    g_part, x_part = (F.conv2d(v, p[0].weight, p[0].bias) for v, p in ((g, gate.gate), (x, gate.skip)))
    hidden = (gate.gate[1](g_part) + gate.skip[1](x_part)).clamp(min=0)
    expected = x * gate.weight[2](F.conv2d(hidden, gate.weight[1].weight, gate.weight[1].bias)).sigmoid()
    torch.testing.assert_close(gate(g, x), expected)


@pytest.mark.parametrize("grids", [[(16, 8), (8, 4), (4, 2)], [(15, 7), (8, 4), (3, 2)]], ids=["even", "odd"])
def test_decoder_gates_and_adds_skips_from_deep_to_fine(grids):
    decoder = CascadedDecoder([16, 24, 32]).eval()
    features = [torch.randn(2, c, *grid) for c, grid in zip([16, 24, 32], grids, strict=True)]
    x = decoder.enter(features[2])
    expected = []
    for level in range(3):
        if level:
            skip = features[2 - level]
            rows, columns = (
                torch.arange(fine) * coarse // fine for fine, coarse in zip(skip.shape[2:], x.shape[2:], strict=True)
            )
            up = decoder.up[level - 1](x[:, :, rows][..., columns])
            x = up + decoder.gates[level - 1](up, skip)
        x = decoder.convs[level](decoder.spatial_attention(decoder.channel_attention[level](x)))
        expected.append(x)
    found = decoder(features)
    assert [m.shape for m in found] == [f.shape for f in features[::-1]]
    torch.testing.assert_close(found, expected)


def test_gates_work_in_the_channels_of_the_next_finer_level():
    decoder = CascadedDecoder([96, 192, 384, 768])
    assert [gate.gate[0].out_channels for gate in decoder.gates] == [192, 96, 48]
    assert sum(isinstance(m, SpatialAttention) for m in decoder.modules()) == 1


def test_decoder_learns_from_every_level():
    decoder = CascadedDecoder([16, 24, 32])
    features = [torch.randn(2, c, n, n, requires_grad=True) for c, n in ((16, 16), (24, 8), (32, 4))]
    sum(m.square().sum() for m in decoder(features)).backward()
    assert all(f.grad.abs().max() > 0 for f in features)
    assert all(p.grad is not None for p in decoder.parameters())
