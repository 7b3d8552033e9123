"""What a training step costs with more classes, for every mask encoding, as a ratio to stock nnU-Net's."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from laboratory.benchmarking import report
from laboratory.benchmarking.commands import DIFFERENT_INPUTS, Turns, costs
from laboratory.benchmarking.host import create_trainer, make_batches
from laboratory.benchmarking.options import REFERENCE
from laboratory.benchmarking.problem import Problem
from laboratory.benchmarking.report import Target
from laboratory.benchmarking.subjects import TrainingStep
from laboratory.benchmarking.timing import Subject, total_bytes
from nnunetv2_diffusion.diffusion import ENCODINGS

TIME_LIMIT, MEMORY_LIMIT = 1.45, 1.10


def encoded_problem(problem: Problem, encoding: str) -> Problem:
    """The same plans with a mask encoding in their settings."""
    plans = deepcopy(problem.plans)
    plans["configurations"][problem.configuration].setdefault("diffusion", {})["mask_encoding"] = encoding
    return replace(problem, plans=plans)


def allocated_peak(subject: Subject) -> int:
    """Most bytes that tensors of a subject take on the CPU during one run, those that it keeps included.

    PyTorch's profiler reports every allocation; the scratch memory of its libraries is not among them.
    """
    kept = total_bytes(subject.tensors())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        subject.run(0)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return kept + peak


def add_allocated_peaks(rows: list[dict[str, Any]], subjects: list[Subject]) -> None:
    """Fill in peak memory for a CPU, where it is counted in a run of its own; the first subject is the reference."""
    peaks = [allocated_peak(subject) for subject in subjects]
    for row, peak in zip(rows, peaks, strict=True):
        row.update(peak_memory_bytes=peak, peak_memory_ratio=peak / peaks[0])


def class_steps(problems: dict[int, Problem], trainer: str, turns: Turns) -> list[dict[str, Any]]:
    """Time training steps; call it within ``temporary_folders``.

    Args:
        problems: plans by number of classes.
        trainer: compared with the reference.
        turns: device and number of measurements.

    Returns:
        one result for each number of classes and encoding, the reference's first, as in the JSON.
    """
    results = []
    for classes, problem in problems.items():
        subjects = [TrainingStep(REFERENCE, *_trainer_and_batches(REFERENCE, problem, turns))]
        for encoding in ENCODINGS:
            given = _trainer_and_batches(trainer, encoded_problem(problem, encoding), turns)
            subjects.append(TrainingStep(f"{trainer}, {encoding}", *given))
        measured = turns.measure(subjects, f"{classes} classes")
        rows = [
            {"classes": classes, "trainer": s.name, **costs(measured[s.name], measured[REFERENCE])} for s in subjects
        ]
        if turns.device.type == "cpu":
            add_allocated_peaks(rows, subjects)
        results += rows
    return results


def _trainer_and_batches(name: str, problem: Problem, turns: Turns) -> tuple[Any, list[dict]]:
    trainer = create_trainer(name, problem, turns.device)
    return trainer, make_batches(trainer, DIFFERENT_INPUTS)


def class_targets(results: list[dict[str, Any]]) -> list[Target]:
    """Goals for the largest number of classes, with analog bits."""
    most = max(r["classes"] for r in results)
    targets = []
    for r in results:
        if r["classes"] == most and r["trainer"].endswith("analog-bits"):
            name = f"{most} classes, {r['trainer']}"
            targets.append(Target(f"{name}: seconds per step / {REFERENCE}'s", TIME_LIMIT, r["ratio"]["median"]))
            targets.append(Target(f"{name}: peak memory / {REFERENCE}'s", MEMORY_LIMIT, r["peak_memory_ratio"]))
    return targets


def class_table(results: list[dict[str, Any]]) -> str:
    """One row for each number of classes and encoding."""
    return report.table(report.CLASS_COLUMNS, results)
