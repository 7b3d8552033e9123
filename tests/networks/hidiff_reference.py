"""Load the golden layers of the published HiDiff into ours, name by name.

Our convolutions have no bias where a norm follows: the reference's bias goes into the running mean of that norm, which
is the same in evaluation and is cancelled in training.
"""

import torch
from torch import nn

from nnunetv2_diffusion.networks.binary import BasicBlock, TimeOffsets

Arrays = dict[str, torch.Tensor]


def parameters_of(golden: Arrays, name: str) -> Arrays:
    """The parameters of one golden layer under the reference's names."""
    start = f"{name}__sd__"
    return {key.removeprefix(start): value for key, value in golden.items() if key.startswith(start)}


def below(arrays: Arrays, prefix: str) -> Arrays:
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def embedding_of(golden: Arrays, name: str, position: int) -> torch.Tensor:
    """The reference activates the embedding in front of every linear layer, we do it once."""
    return torch.nn.functional.silu(golden[f"{name}__in{position}"])


@torch.no_grad()
def fill(module: nn.Module, **values: torch.Tensor) -> None:
    """Copy values into parameters and buffers of the same names; all parameters must be given."""
    assert {name for name, _ in module.named_parameters(recurse=False)} <= set(values)
    for name, value in values.items():
        target = getattr(module, name)
        assert target.numel() == value.numel(), (name, target.shape, value.shape)
        target.copy_(value.reshape(target.shape))


def fill_norm(norm: nn.Module, arrays: Arrays, prefix: str, bias: torch.Tensor | float = 0.0) -> None:
    """bias: that of the layer in front."""
    values = {key: arrays[f"{prefix}.{key}"] for key in ("weight", "bias", "running_mean", "running_var")}
    fill(norm, **values | {"running_mean": values["running_mean"] - bias})


def fill_offsets(offsets: TimeOffsets, arrays: Arrays, prefixes: dict[str, str]) -> None:
    """prefixes: name of an offset -> name of the reference's linear layer; it may name more than ours has."""
    assert set(offsets.channels) <= set(prefixes)
    kept = [prefixes[name] for name in offsets.channels]
    fill(offsets, **{key: torch.cat([arrays[f"{name}.{key}"] for name in kept]) for key in ("weight", "bias")})


def fill_conv_block(block: BasicBlock, arrays: Arrays) -> None:
    """A basic, down or up block of the reference; a down block may be several convolutions and norms side by side."""
    convs = sorted({key.rsplit(".", 1)[0] for key in arrays if key.startswith("binary_3x3")})
    norms = sorted({key.rsplit(".", 1)[0] for key in arrays if key.startswith("bn")})
    joined = {
        f"{ours}.{key}": torch.cat([arrays[f"{name}.{key}"] for name in names])
        for ours, names, keys in (
            ("conv", convs, ("weight", "bias")),
            ("norm", norms, ("weight", "bias", "running_mean", "running_var")),
        )
        for key in keys
    }
    fill(block.conv, weight=joined["conv.weight"])
    fill_norm(block.norm, joined, "norm", bias=joined["conv.bias"])
    fill(block, slope=arrays["prelu.weight"])
    names = {"minus_alpha": "move1.bias.1", "minus_gamma": "move2.bias.1", "zeta": "move3.bias.1"}
    fill_offsets(block.offsets, arrays, names)


def fill_token_block(block: BasicBlock, arrays: Arrays, dense: str, norm: str, move: str, rprelu: str) -> None:
    """A linear layer over tokens of the reference with its norm, threshold and activation."""
    fill(block.conv, weight=arrays[f"{dense}.weight"])
    fill_norm(block.norm, arrays, norm, bias=arrays[f"{dense}.bias"])
    fill(block, slope=arrays[f"{rprelu}.prelu.weight"])
    names = {"minus_alpha": f"{move}.1", "minus_gamma": f"{rprelu}.move1.1", "zeta": f"{rprelu}.move2.1"}
    fill_offsets(block.offsets, arrays, names)


def fill_condition(block: nn.Module, arrays: Arrays) -> None:
    """The residual block on a feature of the segmentor; its channels stay the same, so that there is no skip layer."""
    for ours, theirs in (("norm_in", "in_layers.0"), ("norm_out", "out_layers.0")):
        fill(getattr(block, ours), **below(arrays, f"{theirs}."))
    for ours, theirs in (("conv_in", "in_layers.2"), ("conv_out", "out_layers.2")):
        conv = getattr(block, ours)
        names = ["weight"] if conv.bias is None else ["weight", "bias"]
        fill(conv, **{name: arrays[f"{theirs}.{name}"] for name in names})
    fill(block.offsets, **below(arrays, "emb_layers.1."))


def fill_cross_block(block: nn.Module, arrays: Arrays, number: int) -> None:
    """A cross transformer block of the reference, the first or the second one, without the norms in front of it."""
    attention = below(arrays, f"cross_attention{number}.")
    for ours, x in (("query", "q"), ("key", "k"), ("value", "v")):
        part = getattr(block.attention, ours)
        fill_token_block(part, attention, f"{ours}1", f"norm{x}1", f"move{x}1", f"rprelu{x}1")
    fill_norm(block.attention.norm, attention, "norm_context")
    fill(block.attention, slope=attention["rprelu_context.prelu.weight"])
    names = {"query": "moveq2.1", "key": "movek2.1", "value": "movev2.1"}
    names |= {"minus_gamma": "rprelu_context.move1.1", "zeta": "rprelu_context.move2.1"}
    fill_offsets(block.attention.offsets, attention, names)

    project = below(arrays, f"layerscale{number}.")
    fill_token_block(block.project, project, "dense", "norm", "move", "rprelu")
    fill_scale(block.scale, project, "layerscale")

    forward = below(arrays, f"fnn{number}.")
    fill_norm(block.feed_forward.norm, forward, "layernorm_after")
    for part, name in ((block.feed_forward.expand, "intermediate"), (block.feed_forward.contract, "output")):
        fill_token_block(part, below(forward, f"{name}."), "dense", "norm", "move", "rprelu")
    fill_scale(block.feed_forward.scale, forward, "output.layerscale")
    for scale, name in zip(block.feed_forward.pool_scales, ("h3", "h5", "w3", "w5"), strict=True):
        fill_scale(scale, forward, f"layerscale_{name}")


def fill_scale(scale: nn.Module, arrays: Arrays, name: str) -> None:
    fill_offsets(scale.offsets, arrays, {"scale": f"{name}.alpha.1", "offset": f"{name}.move.1"})


def fill_cross_transformer(transformer: nn.Module, arrays: Arrays) -> None:
    """All but its condition block."""
    fill_norm(transformer.norm_prior, arrays, "norm_condition1")
    fill_norm(transformer.norm_generative, arrays, "norm_embedding1")
    fill_norm(transformer.norm_moved_prior, arrays, "norm_condition2")
    fill_norm(transformer.norm_generative_again, arrays, "norm_embedding2")
    fill_cross_block(transformer.to_prior, arrays, 1)
    fill_cross_block(transformer.to_generative, arrays, 2)
