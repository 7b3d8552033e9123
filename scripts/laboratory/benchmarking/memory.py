"""``scripts/memory_table``: the planners' estimate of memory beside what a training step really takes.

On a CPU two numbers are measured: bytes saved for the backward pass, by hooks on autograd's saved tensors, which the
estimate has to meet exactly, and the most bytes that all tensors take at a time, by PyTorch's profiler. On a GPU it is
``torch.cuda.max_memory_allocated`` of a step, compiled or not as ``nnUNet_compile`` says; the estimate knows nothing of
compiling. The JSON holds the same rows in bytes.
"""

import argparse
import gc
import itertools
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from tqdm import tqdm

from laboratory.benchmarking import host, report
from laboratory.benchmarking.measure import total_bytes, trainer_tensors
from laboratory.benchmarking.options import NETWORKS, SUBJECTS, build_memory_parser
from laboratory.benchmarking.problem import BenchmarkError, Problem, synthetic_problem, with_settings
from nnunetv2_diffusion.files import check_target, write_json
from nnunetv2_diffusion.planning.memory import SavedBytes, estimate_memory

COMPILE = "nnUNet_compile"
SIZES = {"cpu": {2: 64, 3: 32, "base": 8, "stages": 3}, "cuda": {2: 512, 3: 96, "base": 32, "stages": 5}}
"""Edge of the patch by dimension, channels of the first stage, and stages."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, or ends with status 2 and a message for what cannot be used."""
    parser = build_memory_parser()
    args = parser.parse_args(argv)
    try:
        _settle(args)
        results = list(measure_grid(args))
    except (BenchmarkError, OSError) as error:
        parser.error(str(error))
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    command = report.spelled("scripts/memory_table", settings)
    # compiling is decided by nnU-Net's variable, not by an option
    compiled = args.device == "cuda" and os.environ.get(COMPILE, "true").lower() in ("true", "1", "t")
    content = report.content(command, {**settings, "compiled": compiled}, torch.device(args.device), results)
    place, versions = content["hardware"]["name"], content["versions"]
    print(f"on {place}, batch {args.batch}, torch.compile {'on' if compiled else 'off'}; torch {versions['torch']}\n")
    print(f"{report.text_table(report.MEMORY_COLUMNS, results)}")
    if args.json is not None:
        write_json(args.json, content)
    return 0


def _settle(args: argparse.Namespace) -> None:
    """Check options and fill in their defaults."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device is cuda, but torch finds no CUDA device; expected cpu")
    if args.json is not None:
        check_target(args.json)
    if args.batch < 1:
        raise BenchmarkError(f"--batch is {args.batch}, expected at least 1")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = SIZES[args.device]
    args.patch_2d, args.patch_3d = args.patch_2d or sizes[2], args.patch_3d or sizes[3]
    args.base_features, args.stages = args.base_features or sizes["base"], args.stages or sizes["stages"]
    args.refiner_width = args.refiner_width or args.base_features


def measure_grid(args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """One result for each plan, number of classes and subject, as in the JSON."""
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


def measure_memory(problem: Problem, trainer_name: str, family: str, device: str) -> dict[str, Any]:
    """Bytes of one training step, within ``temporary_folders``; what is saved for the backward pass: None on CUDA."""
    configuration = problem.plans["configurations"][problem.configuration]
    estimate = estimate_memory(family, configuration, problem.dataset_json, 1, device)
    batch = configuration["batch_size"]
    before = _settled_bytes(device)
    trainer = host.create_trainer(trainer_name, problem, torch.device(device))
    given = host.make_batches(trainer, 1)[0]
    trainer.train_step(given)  # makes the optimisers' state
    measured, saved = _peaks(trainer, given, before)
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


def _peaks(trainer: Any, batch: dict, before: int) -> tuple[int, int | None]:
    """Most bytes allocated in a step, and most saved for the backward pass."""
    if trainer.device.type == "cuda":
        for _ in range(3):  # cuDNN looks for its algorithms, compiled code is made
            trainer.train_step(batch)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        trainer.train_step(batch)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, None
    with SavedBytes(trainer.network.parameters()) as saved:
        trainer.train_step(batch)
    # as the step does itself at its start; HiDiff's segmentor keeps its own until its phase comes
    trainer.optimizer.zero_grad(set_to_none=True)
    kept = total_bytes([batch["data"], *trainer_tensors(trainer)])
    return kept + allocated_peak(lambda: trainer.train_step(batch)), saved.peak


def allocated_peak(run: Callable[[], Any]) -> int:
    """Most bytes that tensors take on the CPU during one run beside those that are there before.

    PyTorch's profiler reports every allocation; the scratch memory of its libraries is not among them.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
