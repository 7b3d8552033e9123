"""``scripts/memory_table``: the planners' estimate of memory beside what a training step really takes.

On a CPU two numbers are measured: bytes saved for the backward pass, by hooks on autograd's saved tensors, which the
estimate has to meet exactly, and the most bytes that all tensors take at a time, by PyTorch's profiler. On a GPU it is
``torch.cuda.max_memory_allocated`` of a step, compiled or not as ``nnUNet_compile`` says; the estimate knows nothing of
compiling. The JSON holds the same rows in bytes.
"""

import argparse
import gc
import itertools
import json
import os
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from laboratory.benchmarking import report
from laboratory.benchmarking.options import NETWORKS, SUBJECTS, build_memory_parser
from laboratory.benchmarking.problem import BenchmarkError, Problem, synthetic_problem

COMPILE = "nnUNet_compile"
SIZES = {"cpu": {2: 64, 3: 32, "base": 8, "stages": 3}, "cuda": {2: 512, 3: 96, "base": 32, "stages": 5}}
"""Edge of the patch by dimension, channels of the first stage, and stages."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status.

    Args:
        argv: arguments after the program's name, None for the process's own.

    Raises:
        SystemExit: with status 2 and a message on stderr for options that cannot be used.
    """
    parser = build_memory_parser()
    args = parser.parse_args(argv)
    try:
        _settle(args)
        results = list(measure_grid(args))
    except BenchmarkError as error:
        parser.error(str(error))
    device = torch.device(args.device)
    hardware, versions = report.describe_hardware(device), report.describe_versions()
    compiled = args.device == "cuda" and os.environ.get(COMPILE, "true").lower() in ("true", "1", "t")
    print(f"on {hardware['name']}, batch {args.batch}, torch.compile {'on' if compiled else 'off'}; torch", end=" ")
    print(f"{versions['torch']}\n\n{memory_rows(results)}")
    if args.json is not None:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        content = {"schema": 1, "settings": {**settings, "compiled": compiled}, "hardware": hardware}
        with args.json.open("x", encoding="utf-8") as file:
            json.dump({**content, "versions": versions, "results": results}, file, indent=1)
    return 0


def _settle(args: argparse.Namespace) -> None:
    """Check options and fill in their defaults."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device is cuda, but torch finds no CUDA device; expected cpu")
    if args.json is not None and (args.json.exists() or not args.json.parent.is_dir()):
        raise BenchmarkError(f"--json is {args.json}, expected a new file in a folder that exists")
    if args.batch < 1:
        raise BenchmarkError(f"--batch is {args.batch}, expected at least 1")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = SIZES[args.device]
    args.patch_2d, args.patch_3d = args.patch_2d or sizes[2], args.patch_3d or sizes[3]
    args.base_features, args.stages = args.base_features or sizes["base"], args.stages or sizes["stages"]
    args.refiner_width = args.refiner_width or args.base_features


def measure_grid(args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """One result for each plan, number of classes and subject, as in the JSON."""
    from laboratory.benchmarking import host

    with host.temporary_folders():
        grid = list(itertools.product(args.dims, args.networks, args.classes, args.subjects))
        for dim, network, classes, name in tqdm(grid, desc="memory", unit="plan"):
            edge = args.patch_2d if dim == 2 else args.patch_3d
            patch = (edge,) * dim
            problem = synthetic_problem(
                dim, patch, args.batch, args.base_features, classes, args.stages, NETWORKS[network]
            )
            trainer, family, settings = SUBJECTS[name]
            settings = {**settings, "hidiff": {"refiner_width": args.refiner_width}}
            row = {"plans": f"{dim}d {network}", "patch": list(patch), "classes": classes, "subject": name}
            yield {**row, **measure_memory(with_settings(problem, settings), trainer, family, args.device)}


def with_settings(problem: Problem, settings: dict[str, Any]) -> Problem:
    """The same plans with diffusion settings in them."""
    plans = deepcopy(problem.plans)
    plans["configurations"][problem.configuration]["diffusion"] = settings
    return replace(problem, plans=plans)


class _Step:
    """A training step and what is there before and after it, gradients left out that nnU-Net frees at its start."""

    def __init__(self, trainer: Any, batch: dict):
        self.trainer, self.batch = trainer, batch
        self.network = trainer.network
        self.optimizers = [o for o in (trainer.optimizer, getattr(trainer, "segmentor_optimizer", None)) if o]

    def run(self, index: int = 0) -> None:
        """One step."""
        self.trainer.train_step(self.batch)

    def free_gradients(self) -> None:
        """As the step does itself at its start; HiDiff's segmentor keeps its own until its phase comes."""
        self.optimizers[0].zero_grad(set_to_none=True)

    def tensors(self) -> Iterable[torch.Tensor]:
        """Image, weights, optimisers' state, gradients that are kept."""
        yield self.batch["data"]
        for parameter in self.network.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def measure_memory(problem: Problem, trainer_name: str, family: str, device: str) -> dict[str, Any]:
    """Estimate and measure one training step; call it within ``temporary_folders``.

    Returns:
        bytes: ``estimate`` and ``measured``, their ``ratio``, ``saved_estimate`` and ``saved_measured`` (None on CUDA),
        and the parts of the estimate.
    """
    from laboratory.benchmarking import host
    from nnunetv2_diffusion.planning.memory import estimate_memory

    configuration = problem.plans["configurations"][problem.configuration]
    estimate = estimate_memory(family, configuration, problem.dataset_json, 1, device)
    batch = configuration["batch_size"]
    before = _settled_bytes(device)
    trainer = host.create_trainer(trainer_name, problem, torch.device(device))
    step = _Step(trainer, host.make_batches(trainer, 1)[0])
    step.run()  # makes the optimisers' state
    measured, saved = _peaks(step, device, before)
    allocated = estimate.allocated(batch)
    return {
        "estimate": allocated,
        "measured": measured,
        "ratio": allocated / measured,
        "saved_estimate": estimate.saved_for_backward(batch),
        "saved_measured": saved,
        "parts": {**vars(estimate), "batch": batch},
    }


def _settled_bytes(device: str) -> int:
    """What is on the GPU after everything has gone that can go."""
    gc.collect()
    if device == "cpu":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def _peaks(step: _Step, device: str, before: int) -> tuple[int, int | None]:
    """Most bytes allocated in a step, and most saved for the backward pass."""
    from laboratory.benchmarking.classes import allocated_peak
    from nnunetv2_diffusion.planning.memory import SavedBytes

    if device == "cuda":
        for _ in range(3):  # cuDNN looks for its algorithms, compiled code is made
            step.run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, None
    with SavedBytes(step.network.parameters()) as saved:
        step.run()
    step.free_gradients()
    return allocated_peak(step), saved.peak


def _mebibytes(value: int | None) -> str:
    return report.NOT_MEASURED if value is None else f"{value / 2**20:.2f}"


def _saved_ratio(row: dict) -> str:
    return "-" if row["saved_measured"] is None else f"{row['saved_estimate'] / row['saved_measured']:.4f}"


MEMORY_COLUMNS: report.Columns = [
    ("plans", lambda r: r["plans"]),
    ("classes", lambda r: str(r["classes"])),
    ("subject", lambda r: r["subject"]),
    ("saved, estimate MiB", lambda r: _mebibytes(r["saved_estimate"])),
    ("measured", lambda r: _mebibytes(r["saved_measured"])),
    ("ratio", _saved_ratio),
    ("allocated, estimate MiB", lambda r: _mebibytes(r["estimate"])),
    ("measured", lambda r: _mebibytes(r["measured"])),
    ("ratio", lambda r: f"{r['ratio']:.3f}"),
]


def memory_rows(results: list[dict[str, Any]]) -> str:
    """The table."""
    return report.table(MEMORY_COLUMNS, results)
