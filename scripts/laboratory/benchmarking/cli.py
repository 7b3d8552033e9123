"""The command line of ``scripts/benchmark``."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from laboratory.benchmarking import report
from laboratory.benchmarking.options import REFERENCE, build_parser
from laboratory.benchmarking.problem import BenchmarkError, Problem, read_problem, synthetic_problem
from nnunetv2_diffusion.files import check_target, write_json, write_whole
from nnunetv2_diffusion.pages import check_page
from nnunetv2_diffusion.sampling import SamplingConfig


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, or ends with status 2 and a message for what cannot be used."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if args.what == "page":
            return _page(args.folder, args.o)
        if args.json is not None:
            check_target(args.json)
        content, text = run(args, _problem(args), _device(args))
    except (BenchmarkError, OSError) as error:
        parser.error(str(error))
    print(text)
    if args.json is not None:
        write_json(args.json, content)
    return 0


def _page(folder: Path, file: Path) -> int:
    """Write the page of all JSONs in a folder."""
    from laboratory.benchmarking.page import MARK, build_page, read_runs

    check_page(file, MARK, "scripts/benchmark page")
    write_whole(file, build_page(read_runs(folder), os.path.relpath(folder, file.parent)))
    print(file)
    return 0


def _problem(args: argparse.Namespace) -> Problem:
    """Plans from files or made up; settles the defaults in args."""
    own = {"dim": 3, "patch": None, "base_features": 32, "classes": 3, "stages": 4}
    if args.plans is not None:
        given = [name for name in own if getattr(args, name) is not None] + ["resenc"] * args.resenc
        if given:
            raise BenchmarkError(f"--{given[0].replace('_', '-')} cannot be used with --plans, which say it already")
        if args.dataset_json is None:
            raise BenchmarkError("--plans needs --dataset-json, the data set's dataset.json")
        return read_problem(args.plans, args.configuration, args.dataset_json, args.batch)
    if args.dataset_json is not None:
        raise BenchmarkError("--dataset-json is used with --plans only")
    for name, default in own.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.patch is not None and len(args.patch) == 1:
        args.patch = args.patch * args.dim
    return synthetic_problem(
        args.dim, args.patch, args.batch, args.base_features, args.classes, args.stages, args.resenc
    )


def _device(args: argparse.Namespace) -> torch.device:
    """The device; settles warm-up turns and threads in args."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device is cuda, but torch finds no CUDA device; expected cpu")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.warmup is None:
        args.warmup = 10 if args.device == "cuda" else 2
    if args.warmup < 0:
        raise BenchmarkError(f"--warmup is {args.warmup}, expected 0 or more")
    if args.clock == "cpu" and args.device == "cuda":
        raise BenchmarkError("--clock is cpu, but the work is done on cuda; expected wall")
    args.threads = args.threads or (1 if args.device == "cuda" else os.cpu_count() or 1)
    return torch.device(args.device)


@contextmanager
def _threads(threads: int, device: torch.device) -> Iterator[None]:
    """Threads and cuDNN's search for fast algorithms as in nnU-Net's commands; put back at the end."""
    before = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = device.type == "cuda"
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.benchmark = before[1]


def run(args: argparse.Namespace, problem: Problem, device: torch.device) -> tuple[dict[str, Any], str]:
    """Measure; returns what goes into the JSON, and the report as text."""
    # nnU-Net takes seconds to import: help and errors in options do not wait for it
    from laboratory.benchmarking import host

    with _threads(args.threads, device), host.temporary_folders():
        results, targets, rows = _measure(args, problem, device)
        described = host.describe_problem(problem, None if args.what == "train-step" else 1)
        settings = {k: v for k, v in vars(args).items() if k not in ("what", "json")}
        # of files only the names, so that a result tells nothing about folders
        settings = {k: v.name if isinstance(v, Path) else v for k, v in settings.items()}
        implied = ("configuration",) if args.plans is None else ()
        command = report.spelled(
            f"scripts/benchmark {args.what}", {k: v for k, v in settings.items() if k not in implied}
        )
        content = report.content(command, {**settings, "problem": described}, device, results, targets)
    lines = [report.header(args.what, args.clock, described, content["hardware"], content["versions"])]
    lines += [command, "", rows]
    if targets:
        lines += [
            "",
            "targets (median over the rounds):",
            *("  {} <= {}: {}, {}".format(*report.target_row(found)) for found in targets),
        ]
    return content, "\n".join(lines)


def _measure(args: argparse.Namespace, problem: Problem, device: torch.device) -> tuple[list[dict], list[dict], str]:
    """Results, targets and table of a subcommand."""
    from laboratory.benchmarking import measure, refiner

    turns = measure.Turns(device, measure.Stopwatch(device, args.clock), args.rounds, args.warmup)
    if args.what == "refiner":
        results, rows = refiner.refiner_steps(problem, args.width, turns)
        return results, [], rows
    args.trainers = [REFERENCE, *[name for name in dict.fromkeys(args.trainers) if name != REFERENCE]]
    if args.what == "train-step":
        results = measure.train_steps(problem, args.trainers, turns)
        return results, report.train_targets(results), report.text_table(report.TRAIN_COLUMNS, results)
    configs = [SamplingConfig(steps, args.sampler, samples=args.samples) for steps in args.steps]
    results = measure.predictions(problem, args.trainers, configs, turns)
    return results, report.predict_targets(results), report.text_table(report.PREDICT_COLUMNS, results)
