"""What a network costs: parameters, multiply-accumulates and storage, real and binary (Chen et al. 2024, table XI).

By the paper's convention 64 binary operations count as one. These are counts, not times: torch computes binary layers
with ordinary floating-point numbers, no faster than real-valued ones.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_diffusion.networks.binary import BinaryConv
from nnunetv2_diffusion.networks.cross_transformer import CrossAttention
from nnunetv2_diffusion.networks.refiner import Refiner

BINARY_PER_REAL = 64


@dataclass(frozen=True)
class Cost:
    """Counts of one forward pass.

    Attributes:
        parameters: all, binary ones among them.
        binary_parameters: weights of which only the sign is used.
        scales: real-valued factors that go with the signs; they are no parameters.
        macs: multiply-accumulates of real numbers.
        binary_macs: multiply-accumulates of signs.
    """

    parameters: int
    binary_parameters: int
    scales: int
    macs: int
    binary_macs: int

    @property
    def equivalent_macs(self) -> float:
        """Multiply-accumulates, 64 binary ones counted as one."""
        return self.macs + self.binary_macs / BINARY_PER_REAL

    @property
    def storage_bytes(self) -> int:
        """All parameters in float32."""
        return 4 * self.parameters

    @property
    def packed_bytes(self) -> int:
        """Binary parameters in one bit each with their scales, all others in float32."""
        return 4 * (self.parameters - self.binary_parameters + self.scales) + -(-self.binary_parameters // 8)


@contextmanager
def _binary_counter(module: nn.Module) -> Iterator[list[int]]:
    """While open, every binary layer that runs adds its multiply-accumulates to the list."""
    counts: list[int] = []

    def convolution(layer: BinaryConv, _inputs: Any, output: torch.Tensor) -> None:
        counts.append(output.numel() * layer.weight[0].numel())

    def attention(_layer: CrossAttention, inputs: Any, output: torch.Tensor) -> None:
        queries, keys, *_ = inputs
        counts.append(2 * queries.numel() * keys.shape[2])  # scores, and their sums of values

    handles = []
    for layer in module.modules():
        if isinstance(layer, BinaryConv):
            handles.append(layer.register_forward_hook(convolution))
        elif isinstance(layer, CrossAttention) and layer.binarized:
            handles.append(layer.register_forward_hook(attention))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def count_cost(module: nn.Module, *inputs: Any) -> Cost:
    """Count one forward pass, ``module(*inputs)``, in evaluation mode and without gradients.

    Convolutions and matrix products are counted, whatever runs them; elementwise operations are not. If the first
    input is on the meta device, so is the whole pass: nothing is computed, and the module stays where it is.
    """
    # a copy: swapping parameters in place goes wrong where a module is registered twice, as nnU-Net's norms are
    copy = deepcopy(module).to("meta") if inputs[0].is_meta else deepcopy(module)
    copy.eval()
    with torch.no_grad(), _binary_counter(copy) as binary, FlopCounterMode(display=False) as flops:
        copy(*inputs)
    weights = [part.weight for part in module.modules() if isinstance(part, BinaryConv)]
    return Cost(
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        binary_parameters=sum(weight.numel() for weight in weights),
        scales=sum(len(weight) for weight in weights),
        macs=flops.get_total_flops() // 2 - sum(binary),
        binary_macs=sum(binary),
    )


def refiner_inputs(refiner: Refiner, patch: Sequence[int], device: str | torch.device = "meta") -> tuple[Any, ...]:
    """Zeros of the shapes that ``refiner(*inputs)`` expects, for one patch."""
    grids = refiner.grids(patch)
    mask = torch.zeros(1, refiner.num_heads, *patch, device=device)
    features = {
        stage: torch.zeros(1, channels, *grids[stage], device=device)
        for stage, channels in refiner.condition_channels.items()
    }
    image = torch.zeros(1, refiner.image_channels, *patch, device=device)
    return image, mask, mask, torch.zeros(1, dtype=torch.long, device=device), features


def refiner_cost(refiner: Refiner, patch: Sequence[int]) -> Cost:
    """Cost of one refinement step of one patch; nothing is computed.

    Raises:
        ValueError: the refiner's strides do not divide the patch.
    """
    return count_cost(refiner, *refiner_inputs(refiner, patch))


def cost_table(refiner: Cost, segmentor: Cost | None = None, steps: int = 10) -> str:
    """Markdown table of the cost of a prediction, with the segmentor apart if it is given.

    Args:
        refiner: of one refinement step.
        segmentor: of the network that gives the prior, which runs once.
        steps: refinement steps of a prediction.
    """
    lines = [
        "| part | parameters (M) | all GMAC | of these binary | equivalent GMAC | fewer | MiB in float32 "
        "| MiB with 1-bit weights |",
        "|---|---|---|---|---|---|---|---|",
    ]
    if segmentor is not None:
        lines.append(_row("segmentor", [(segmentor, 1)]))
    lines.append(_row("refiner, 1 step", [(refiner, 1)]))
    parts = [(refiner, steps)] if segmentor is None else [(segmentor, 1), (refiner, steps)]
    lines.append(_row(f"prediction, {steps} steps", parts))
    note = f"{BINARY_PER_REAL} binary operations count as 1. These are counts; torch does not run binary layers faster."
    return "\n".join([*lines, "", note])


def _row(name: str, parts: list[tuple[Cost, int]]) -> str:
    real = sum(times * cost.macs for cost, times in parts)
    binary = sum(times * cost.binary_macs for cost, times in parts)
    equivalent = sum(times * cost.equivalent_macs for cost, times in parts)
    sizes = [sum(cost.storage_bytes for cost, _ in parts), sum(cost.packed_bytes for cost, _ in parts)]
    cells = [
        f"{sum(cost.parameters for cost, _ in parts) / 1e6:.2f}",
        f"{(real + binary) / 1e9:.2f}",
        f"{binary / 1e9:.2f}",
        f"{equivalent / 1e9:.2f}",
        f"{(real + binary) / equivalent:.1f}x",
        *(f"{size / 2**20:.1f}" for size in sizes),
    ]
    return f"| {name} | {' | '.join(cells)} |"
