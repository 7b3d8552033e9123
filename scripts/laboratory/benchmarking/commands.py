"""The two measurements: builds the subjects, lets them take turns and sums up."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from laboratory.benchmarking.host import build_network, create_trainer, make_batches, make_images
from laboratory.benchmarking.options import REFERENCE
from laboratory.benchmarking.problem import BenchmarkError, Problem
from laboratory.benchmarking.subjects import PassTimer, Prediction, TrainingStep
from laboratory.benchmarking.timing import (
    Measurement,
    Stopwatch,
    Subject,
    alternate,
    peak_bytes,
    ratio,
    summary,
)
from nnunetv2_diffusion.diffusion import SamplingConfig
from nnunetv2_diffusion.networks import DiffusionSegmentor, HybridSegmentor

DIFFERENT_INPUTS = 4


@dataclass(frozen=True)
class Turns:
    """How subjects take turns.

    Attributes:
        device: "cpu" or "cuda".
        stopwatch: for that device.
        rounds: measured turns of each.
        warmup: turns before that are not counted.
    """

    device: torch.device
    stopwatch: Stopwatch
    rounds: int
    warmup: int

    def measure(self, subjects: list[Subject], description: str) -> dict[str, list[Measurement]]:
        """See ``timing.alternate``."""
        return alternate(subjects, self.rounds, self.warmup, self.stopwatch, description)


def train_steps(problem: Problem, trainers: list[str], turns: Turns) -> list[dict[str, Any]]:
    """Time training steps; call it within ``temporary_folders``.

    Args:
        problem: plans for all trainers.
        trainers: names, the reference among them.
        turns: device and number of measurements.

    Returns:
        one result for each trainer, as in the JSON.
    """
    subjects = []
    for name in trainers:
        trainer = create_trainer(name, problem, turns.device)
        subjects.append(TrainingStep(name, trainer, make_batches(trainer, DIFFERENT_INPUTS)))
    with _enough_compiled_graphs(turns.device):
        measured = turns.measure(subjects, "train-step")
    parameters = {s.name: sum(p.numel() for p in s.trainer.network.parameters()) for s in subjects}
    return [
        {
            "trainer": name,
            **costs(measured[name], measured[REFERENCE]),
            "parameters": parameters[name],
            "parameter_overhead": parameters[name] / parameters[REFERENCE] - 1,
        }
        for name in trainers
    ]


@contextmanager
def _enough_compiled_graphs(device: torch.device) -> Iterator[None]:
    """Lift torch's limit of compiled graphs for one function: it is meant for one network, here are several."""
    if device.type != "cuda":
        yield
        return
    import torch._dynamo  # takes seconds, and nnU-Net compiles on CUDA only

    with torch._dynamo.config.patch(recompile_limit=64):
        yield


def costs(measured: list[Measurement], reference: list[Measurement]) -> dict[str, Any]:
    """What is reported for training and prediction alike."""
    seconds = [m.seconds for m in measured]
    peak, reference_peak = peak_bytes(measured), peak_bytes(reference)
    return {
        "seconds": {**summary(seconds), "rounds": seconds},
        "ratio": ratio(seconds, reference),
        "peak_memory_bytes": peak,
        "peak_memory_ratio": peak / reference_peak if peak else None,
    }


def predictions(
    problem: Problem, trainers: list[str], configs: list[SamplingConfig], turns: Turns
) -> list[dict[str, Any]]:
    """Time ``network(image)``.

    Args:
        problem: plans for all networks.
        trainers: names, the reference among them.
        configs: how networks with a loop predict; others are measured once.
        turns: device and number of measurements.

    Returns:
        one result for each network and sampling, as in the JSON.

    Raises:
        BenchmarkError: if a network's schedule has fewer steps than a config asks for.
    """
    images = make_images(problem, turns.device, DIFFERENT_INPUTS)
    subjects: dict[str, Prediction] = {}
    names = {}
    for trainer in trainers:
        network = build_network(trainer, problem, turns.device)
        for subject in _ways_to_predict(trainer, network, images, configs, turns.stopwatch):
            subjects[subject.name], names[subject.name] = subject, trainer
    measured = turns.measure(list(subjects.values()), "predict")
    return [
        {
            "trainer": names[name],
            "steps": subject.sampling.steps if subject.sampling else None,
            **costs(measured[name], measured[REFERENCE]),
            **_passes(measured[name], measured[REFERENCE]),
        }
        for name, subject in subjects.items()
    ]


def _ways_to_predict(
    trainer: str,
    network: torch.nn.Module,
    images: list[torch.Tensor],
    configs: list[SamplingConfig],
    stopwatch: Stopwatch,
) -> list[Prediction]:
    """One subject for each sampling, or a single one for a network without a loop."""
    if not isinstance(network, (DiffusionSegmentor, HybridSegmentor)) or network.process is None:
        return [Prediction(trainer, network, images)]
    longest = network.process.num_timesteps
    for config in configs:
        if config.steps > longest:
            raise BenchmarkError(f"--steps is {config.steps}, expected 1 .. {longest}, the schedule of {trainer}")
    # of HiDiff's, the segmentor is no pass of the loop; ``scripts/benchmark refiner`` times the parts
    passes = PassTimer(network, stopwatch) if isinstance(network, DiffusionSegmentor) else None
    return [Prediction(f"{trainer}, K = {c.steps}", network, images, c, passes) for c in configs]


def _passes(measured: list[Measurement], reference: list[Measurement]) -> dict[str, Any]:
    """Cost of one pass and share of time outside of the passes; nulls for a network without a loop."""
    if measured[0].pass_seconds is None:
        return {"passes": 1, "pass_ratio": None, "outside_share": None}
    return {
        "passes": len(measured[0].pass_seconds),
        "pass_ratio": ratio([statistics.fmean(m.pass_seconds) for m in measured], reference),
        "outside_share": summary([1 - sum(m.pass_seconds) / m.seconds for m in measured]),
    }
