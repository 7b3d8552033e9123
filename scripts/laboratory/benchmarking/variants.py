"""What single decisions cost in a training step: RecycleXT with one thing changed, beside itself and stock nnU-Net.

What was expected is written down with the variant, before it is measured; what was decided stands beside it.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from laboratory.benchmarking import report
from laboratory.benchmarking.classes import add_allocated_peaks
from laboratory.benchmarking.commands import DIFFERENT_INPUTS, Turns, costs
from laboratory.benchmarking.host import create_trainer, make_batches
from laboratory.benchmarking.options import REFERENCE
from laboratory.benchmarking.problem import Problem
from laboratory.benchmarking.subjects import TrainingStep
from laboratory.benchmarking.timing import ratio
from nnunetv2_diffusion.networks.time_conditioning import ModulatedInstanceNorm

TRAINER = "nnUNetTrainerRecycleXT"
DEFAULT = "as it is"


@dataclass(frozen=True)
class Variant:
    """One change.

    Attributes:
        name: short.
        expected: seconds of a step as a multiple of the unchanged trainer's, said before measuring, and why.
        decision: what the library does, and why.
        settings: diffusion settings that differ.
        change: changes an initialised trainer.
    """

    name: str
    expected: str
    decision: str
    settings: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Any], None] | None = None


def variant_steps(problem: Problem, turns: Turns) -> list[dict[str, Any]]:
    """Time training steps of all variants; call it within ``temporary_folders``.

    Args:
        problem: plans for all.
        turns: device and number of measurements.

    Returns:
        one result for stock nnU-Net, the unchanged trainer and each variant, in this order, as in the JSON.
    """
    subjects = [_subject(REFERENCE, REFERENCE, problem, turns), _subject(DEFAULT, TRAINER, _planned(problem), turns)]
    for variant in VARIANTS:
        subject = _subject(variant.name, TRAINER, _planned(problem, **variant.settings), turns)
        if variant.change is not None:
            variant.change(subject.trainer)
        subjects.append(subject)
    measured = turns.measure(subjects, "variants")
    rows = [{"variant": s.name, **costs(measured[s.name], measured[REFERENCE])} for s in subjects]
    if turns.device.type == "cpu":
        add_allocated_peaks(rows, subjects)
    expected = {variant.name: variant.expected for variant in VARIANTS}
    for row in rows:
        row["expected"] = expected.get(row["variant"])  # as it was when this was measured
        row["ratio_to_default"] = ratio(row["seconds"]["rounds"], measured[DEFAULT])
    return rows


def _planned(problem: Problem, **settings: Any) -> Problem:
    """The same plans with settings; nnU-Net's recipe, which has the coarse heads that one variant is about."""
    plans = deepcopy(problem.plans)
    section = plans["configurations"][problem.configuration].setdefault("diffusion", {})
    section.update({"recipe": "nnunet", **settings})
    return replace(problem, plans=plans)


def _subject(name: str, trainer_name: str, problem: Problem, turns: Turns) -> TrainingStep:
    trainer = create_trainer(trainer_name, problem, turns.device)
    return TrainingStep(name, trainer, make_batches(trainer, DIFFERENT_INPUTS))


def all_heads_in_first_pass(trainer: Any) -> None:
    """The first pass computes the coarse heads too, and throws them away."""
    network = trainer.inner_network
    inner = network._run

    def run(*args: Any) -> Any:
        *others, full_resolution_only = args
        heads = inner(*others, False)
        return heads[0] if full_resolution_only else heads

    network._run = run


def inference_mode_in_first_pass(trainer: Any) -> None:
    """The first pass under inference mode; its result is copied, or autograd would refuse it later."""
    inner = trainer._first_pass

    def first_pass(image: torch.Tensor) -> Callable[..., torch.Tensor]:
        predict = inner(image)

        def guarded(*args: Any) -> torch.Tensor:
            with torch.inference_mode():
                result = predict(*args)
            return result.clone()

        return guarded

    trainer._first_pass = first_pass


def keep_graph_of_first_pass(trainer: Any) -> None:
    """The first pass keeps its activations, and the gradient is cut only after it."""
    network, autocast = trainer.inner_network, trainer._autocast

    def first_pass(image: torch.Tensor) -> Callable[..., torch.Tensor]:
        def predict(x: torch.Tensor, t: torch.Tensor, samples: torch.Tensor | None = None) -> torch.Tensor:
            seen = image if samples is None else image[samples]
            with autocast():
                logits = network(seen, x, trainer.process.timestep_map[t], full_resolution_only=True)
                trainer._kept_graph = network.encoding.encode(network.probabilities(logits))
            return trainer._kept_graph.detach()

        return predict

    trainer._first_pass = first_pass


def channels_last(trainer: Any) -> None:
    """Weights, and with them activations, with the channels innermost."""
    is_3d = any(isinstance(m, nn.Conv3d) for m in trainer.network.modules())
    trainer.network.to(memory_format=torch.channels_last_3d if is_3d else torch.channels_last)


def channels_last_with_own_norm(trainer: Any) -> None:
    """As ``channels_last``, with an instance norm of plain tensor operations, which keep that order."""
    channels_last(trainer)
    for module in trainer.network.modules():
        if isinstance(module, ModulatedInstanceNorm):
            module.forward = _LayoutPreservingNorm(module)


@dataclass(frozen=True)
class _LayoutPreservingNorm:
    """``ModulatedInstanceNorm.forward`` without PyTorch's instance norm, which makes its input contiguous."""

    norm: ModulatedInstanceNorm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        space = tuple(range(2, x.ndim))
        variance, mean = torch.var_mean(x, space, correction=0, keepdim=True)
        shape = (-1, x.shape[1], *[1] * len(space))
        weight, bias = (p.view(shape) for p in (self.norm.weight, self.norm.bias))
        if self.norm.modulation is not None:
            scale, shift = (m.view(shape) for m in self.norm.modulation.chunk(2, dim=1))
            weight, bias = weight * (1 + scale), bias * (1 + scale) + shift
        factor = weight * torch.rsqrt(variance + self.norm.eps)
        return x * factor + (bias - mean * factor)


VARIANTS = (
    Variant(
        "the same once more",
        "1.00: how far it is off tells the noise of this measurement",
        "-",
    ),
    Variant(
        "coarse heads in the first pass too",
        "1.01: 1x1x1 convolutions at half resolution and below",
        "dropped: nobody uses them; the difference is below the noise of this measurement",
        change=all_heads_in_first_pass,
    ),
    Variant(
        "graph of the first pass kept",
        "1.02 in time, nearly twice the memory: the activations of two passes",
        "dropped: no_grad around the first pass saves the memory",
        change=keep_graph_of_first_pass,
    ),
    Variant(
        "first pass under inference mode",
        "0.99: no version counters, but a copy of the result",
        "dropped: no gain that shows, and a second kind of tensor",
        change=inference_mode_in_first_pass,
    ),
    Variant(
        "time-blind",
        "0.99: scale and shift are folded into the norm's own parameters",
        "kept as a setting: time conditioning costs nothing that shows",
        settings={"time_conditioning": False},
    ),
    Variant(
        "no transformer",
        "0.97: a few hundred tokens at the bottleneck",
        "kept as a setting; what it does for the masks is a question of the study",
        settings={"transformer_layers": 0},
    ),
    Variant(
        "transformer as wide as the bottleneck",
        "1.03: four times the width of attention",
        "kept as a setting, the paper's",
        settings={"transformer_width": 1.0},
    ),
    Variant(
        "channels last",
        "1.3 and more: every instance norm changes the order of the data and back",
        "dropped: no gain on a CPU; on a GPU not measured",
        change=channels_last,
    ),
    Variant(
        "channels last, own instance norm",
        "0.95 where convolutions are faster in this order; more memory, since the norm is several operations",
        "dropped: no gain on a CPU, in spite of 5 % less memory; on a GPU not measured",
        change=channels_last_with_own_norm,
    ),
)


def variant_rows(results: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table: prediction, change, measurement, decision."""
    decisions = {variant.name: variant.decision for variant in VARIANTS}
    rows = []
    for result in results:
        name = result["variant"]
        own = "-" if name == REFERENCE else report.spread(result["ratio_to_default"])
        rows.append([
            f"{TRAINER} {DEFAULT}" if name == DEFAULT else name, result["expected"] or "-", own,
            report.spread(result["ratio"]), report.memory_cell(result), decisions.get(name, "-"),
        ])  # fmt: skip
    columns = ["step", "expected, to the unchanged trainer", "measured, to the unchanged trainer"]
    return [*columns, f"to {REFERENCE}", "peak memory", "decision"], rows


def variant_table(results: list[dict[str, Any]]) -> str:
    """As text."""
    columns, rows = variant_rows(results)
    cells = [(name, lambda row, index=index: row[index]) for index, name in enumerate(columns)]
    return report.table(cells, rows)
