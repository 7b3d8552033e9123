"""HiDiff's refiner, real-valued and binarised: what it costs by counting (table XI of the paper) and by the clock.

Counts are no times: torch computes binary layers with ordinary floating-point numbers, no faster than real-valued ones.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from laboratory.benchmarking.host import build_network, make_images
from laboratory.benchmarking.measure import DIFFERENT_INPUTS, Turns, costs, forward
from laboratory.benchmarking.problem import Problem, with_settings
from laboratory.benchmarking.report import COUNT_COLUMNS, REFINER_COLUMNS, text_table
from nnunetv2_diffusion.networks.binary import BinaryConv
from nnunetv2_diffusion.networks.cross_transformer import CrossAttention
from nnunetv2_diffusion.networks.refiner import Refiner
from nnunetv2_diffusion.settings import HIDIFF

TRAINER = "nnUNetTrainerHiDiff"
KINDS = {"real": False, "binary": True}
SEGMENTOR = "segmentor"
PART_COUNTS = [REFINER_COLUMNS[0], *COUNT_COLUMNS[:-1]]  # memory is measured, not counted


@dataclass(frozen=True)
class Cost:
    """Counts of one forward pass: multiply-accumulates of real numbers and of signs, and parameters.

    ``scales`` are real-valued factors that go with the signs of binary parameters; they are no parameters.
    """

    parameters: int
    binary_parameters: int
    scales: int
    macs: int
    binary_macs: int

    @property
    def storage_bytes(self) -> int:
        """All parameters in float32."""
        return 4 * self.parameters

    @property
    def packed_bytes(self) -> int:
        """Binary parameters in one bit each with their scales, all others in float32."""
        return 4 * (self.parameters - self.binary_parameters + self.scales) + -(-self.binary_parameters // 8)

    def to_dict(self) -> dict[str, int]:
        """As in the JSON."""
        kept = ("parameters", "binary_parameters", "macs", "binary_macs", "storage_bytes", "packed_bytes")
        return {key: getattr(self, key) for key in kept}


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
    shapes = {stage: (channels, *grids[stage]) for stage, channels in refiner.condition_channels.items()}
    features = {stage: torch.zeros(1, *shape, device=device) for stage, shape in shapes.items()}
    image, mask = (torch.zeros(1, n, *patch, device=device) for n in (refiner.image_channels, refiner.num_heads))
    return image, mask, mask, torch.zeros(1, dtype=torch.long, device=device), features


def refiner_cost(refiner: Refiner, patch: Sequence[int]) -> Cost:
    """Cost of one refinement step of one patch; ValueError unless the strides divide it. Nothing is computed."""
    return count_cost(refiner, *refiner_inputs(refiner, patch))


def refiner_steps(problem: Problem, width: int, turns: Turns) -> tuple[list[dict[str, Any]], str]:
    """Count and time the segmentor, which is nnU-Net's own network, and one refinement step, real and binary; batch 1.

    Returns:
        one result for each part, as in the JSON, and the tables as text.
    """
    images = make_images(problem, turns.device, DIFFERENT_INPUTS)
    patch = tuple(images[0].shape[2:])
    subjects, counted = [], {}
    for kind, binarized in KINDS.items():
        settings = {HIDIFF: {"binarized": binarized, "refiner_width": width}}
        network = build_network(TRAINER, with_settings(problem, settings), turns.device)
        if not subjects:
            subjects.append(forward(SEGMENTOR, network.segmentor, [(image,) for image in images]))
            counted[SEGMENTOR] = count_cost(network.segmentor, images[0].to("meta"))
        subjects.append(forward(f"refiner, {kind}", network.refiner, _inputs(network.refiner, images)))
        counted[f"refiner, {kind}"] = refiner_cost(network.refiner, patch)
    measured = turns.measure(subjects, "refiner")
    results = [
        {"part": s.name, **costs(measured[s.name], measured[SEGMENTOR]), **counted[s.name].to_dict()} for s in subjects
    ]
    tables = [text_table(columns, results) for columns in (REFINER_COLUMNS, PART_COUNTS)]
    return results, "\n\n".join([*tables, "Counts are no times: torch does not run binary layers faster."])


def _inputs(refiner: Refiner, images: list[torch.Tensor]) -> list[tuple]:
    """Random inputs of one step for every image."""
    result = []
    for image in images:
        _, mask, _, t, features = refiner_inputs(refiner, image.shape[2:], image.device)
        prior = torch.rand_like(mask)
        random = {stage: torch.randn_like(feature) for stage, feature in features.items()}
        result.append((image, (prior > 0.5).float(), prior, t, random))
    return result
