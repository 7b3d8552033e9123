"""HiDiff's refiner, real-valued and binarised: what it costs by counting (table XI of the paper) and by the clock.

By the paper's convention 64 binary operations count as one. Counts are no times: torch computes binary layers with
ordinary floating-point numbers, no faster than real-valued ones.
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
from laboratory.benchmarking.report import REFINER_COLUMNS, text_table
from nnunetv2_diffusion.evaluation.tables import Table, to_markdown
from nnunetv2_diffusion.networks.binary import BinaryConv
from nnunetv2_diffusion.networks.cross_transformer import CrossAttention
from nnunetv2_diffusion.networks.merit import Merit
from nnunetv2_diffusion.networks.refiner import Refiner
from nnunetv2_diffusion.settings import HIDIFF

TRAINER = "nnUNetTrainerHiDiff"
KINDS = {"real": False, "binary": True}
SEGMENTOR = "segmentor"
BINARY_PER_REAL = 64


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


def cost_table(refiner: Cost, segmentor: Cost, steps: int = 10) -> str:
    """Markdown table of the cost of a prediction: the segmentor once, the refiner in every step."""
    parts = {
        SEGMENTOR: [(segmentor, 1)],
        "refiner, 1 step": [(refiner, 1)],
        f"prediction, {steps} steps": [(segmentor, 1), (refiner, steps)],
    }
    columns = ["part", "parameters (M)", "all GMAC", "of these binary", "equivalent GMAC", "fewer", "MiB in float32"]
    note = f"{BINARY_PER_REAL} binary operations count as 1. These are counts; torch does not run binary layers faster."
    rows = [_row(name, costs) for name, costs in parts.items()]
    return to_markdown(Table("", [*columns, "MiB with 1-bit weights"], rows, [note])).split("\n", 2)[2]


def _row(name: str, parts: list[tuple[Cost, int]]) -> list[str]:
    real, binary, equivalent = (
        sum(times * getattr(cost, key) for cost, times in parts) for key in ("macs", "binary_macs", "equivalent_macs")
    )
    parameters, whole, packed = (
        sum(getattr(cost, key) for cost, _ in parts) for key in ("parameters", "storage_bytes", "packed_bytes")
    )
    giga = [f"{value / 1e9:.2f}" for value in (real + binary, binary, equivalent)]
    sizes = [f"{size / 2**20:.1f}" for size in (whole, packed)]
    return [name, f"{parameters / 1e6:.2f}", *giga, f"{(real + binary) / equivalent:.1f}x", *sizes]


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
    tables = [f"{kind}:\n{cost_table(counted[f'refiner, {kind}'], counted[SEGMENTOR])}" for kind in KINDS]
    return results, "\n\n".join([text_table(REFINER_COLUMNS, results), *tables])


def paper_counts() -> str:
    """Counts of the paper's setting, MERIT and 9 classes at 256 x 256, as a table; nothing is timed."""
    with torch.device("meta"):
        merit = Merit(1, 9, (256, 256))
        strides = [[1, 1]] + [[2, 2]] * 5
        channels = dict(zip(range(2, 6), merit.feature_channels, strict=True))
        refiners = {
            kind: Refiner(1, 9, [[3, 3]] * 6, strides, channels, width=128, norm="batch", binarized=binarized)
            for kind, binarized in KINDS.items()
        }
    segmentor = count_cost(merit, torch.zeros(1, 1, 256, 256, device="meta"))
    tables = [f"{kind}:\n{cost_table(refiner_cost(r, (256, 256)), segmentor)}" for kind, r in refiners.items()]
    return "\n\n".join(["setting of the paper: MERIT, 9 classes, 1 channel, 256 x 256, width 128", *tables])


def _inputs(refiner: Refiner, images: list[torch.Tensor]) -> list[tuple]:
    """Random inputs of one step for every image."""
    result = []
    for image in images:
        _, mask, _, t, features = refiner_inputs(refiner, image.shape[2:], image.device)
        prior = torch.rand_like(mask)
        random = {stage: torch.randn_like(feature) for stage, feature in features.items()}
        result.append((image, (prior > 0.5).float(), prior, t, random))
    return result
