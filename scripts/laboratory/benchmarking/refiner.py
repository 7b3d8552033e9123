"""HiDiff's refiner, real-valued and binarised: what it costs by counting (table XI of the paper) and by the clock."""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from laboratory.benchmarking.commands import DIFFERENT_INPUTS, Turns, costs
from laboratory.benchmarking.cost import Cost, cost_table, count_cost, refiner_cost, refiner_inputs
from laboratory.benchmarking.host import build_network, make_images
from laboratory.benchmarking.problem import Problem
from laboratory.benchmarking.report import REFINER_COLUMNS, table
from nnunetv2_diffusion.networks.merit import Merit
from nnunetv2_diffusion.networks.refiner import Refiner
from nnunetv2_diffusion.planning.settings import HIDIFF, SECTION

TRAINER = "nnUNetTrainerHiDiff"
KINDS = {"real": False, "binary": True}
SEGMENTOR = "segmentor"


class Pass:
    """One forward pass in inference mode.

    Args:
        name: shown and used as key.
        module: in eval mode.
        inputs: arguments of a call, used in turn.
    """

    def __init__(self, name: str, module: nn.Module, inputs: list[tuple]):
        self.name = name
        self.module = module
        self.inputs = inputs

    @torch.inference_mode()
    def run(self, index: int) -> None:
        """Call the module on inputs index, counted modulo their number."""
        inputs = self.inputs[index % len(self.inputs)]
        with torch.autocast("cuda", enabled=inputs[0].is_cuda):
            self.module(*inputs)

    def pass_seconds(self) -> None:
        """Not measured: the run is the pass."""

    def tensors(self) -> Iterable[torch.Tensor]:
        """Weights."""
        yield from self.module.parameters()
        yield from self.module.buffers()


def with_hidiff(problem: Problem, **settings: Any) -> Problem:
    """The problem with settings of HiDiff in its plans."""
    plans = deepcopy(problem.plans)
    section = plans["configurations"][problem.configuration].setdefault(SECTION, {})
    section[HIDIFF] = {**section.get(HIDIFF, {}), **settings}
    return Problem(plans, problem.configuration, problem.dataset_json)


def refiner_steps(problem: Problem, width: int, turns: Turns) -> tuple[list[dict[str, Any]], str]:
    """Count and time the segmentor once and one refinement step, real and binary; batch of one.

    Args:
        problem: plans; nnU-Net's own network is the segmentor.
        width: channels of the refiner's first stage.
        turns: device and number of measurements.

    Returns:
        one result for each part, as in the JSON, and the tables as text.
    """
    images = make_images(problem, turns.device, DIFFERENT_INPUTS)
    patch = tuple(images[0].shape[2:])
    subjects, counted = [], {}
    for kind, binarized in KINDS.items():
        network = build_network(TRAINER, with_hidiff(problem, binarized=binarized, refiner_width=width), turns.device)
        if not subjects:
            subjects.append(Pass(SEGMENTOR, network.segmentor, [(image,) for image in images]))
            counted[SEGMENTOR] = count_cost(network.segmentor, images[0].to("meta"))
        subjects.append(Pass(f"refiner, {kind}", network.refiner, _inputs(network.refiner, images)))
        counted[f"refiner, {kind}"] = refiner_cost(network.refiner, patch)
    measured = turns.measure(subjects, "refiner")
    results = [
        {"part": s.name, **costs(measured[s.name], measured[SEGMENTOR]), **_counts(counted[s.name])} for s in subjects
    ]
    return results, _report(results, counted)


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


def _counts(cost: Cost) -> dict[str, Any]:
    return {
        "parameters": cost.parameters,
        "binary_parameters": cost.binary_parameters,
        "macs": cost.macs,
        "binary_macs": cost.binary_macs,
        "storage_bytes": cost.storage_bytes,
        "packed_bytes": cost.packed_bytes,
    }


def _report(results: list[dict[str, Any]], counted: dict[str, Cost]) -> str:
    by_kind = [f"{kind}:\n{cost_table(counted[f'refiner, {kind}'], counted[SEGMENTOR])}" for kind in KINDS]
    return "\n\n".join([table(REFINER_COLUMNS, results), *by_kind])
