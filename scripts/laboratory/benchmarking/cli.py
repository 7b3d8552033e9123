"""The command line of ``scripts/benchmark``."""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from laboratory.benchmarking import report
from laboratory.benchmarking.options import CLASS_TRAINER, REFERENCE, build_parser
from laboratory.benchmarking.problem import BenchmarkError, Problem, read_problem, synthetic_problem
from laboratory.benchmarking.timing import Stopwatch
from nnunetv2_diffusion.diffusion import SamplingConfig


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status.

    Args:
        argv: arguments after the program's name, None for the process's own.

    Raises:
        SystemExit: with status 2 and a message on stderr for options or files that cannot be used.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if getattr(args, "paper", False):
        from laboratory.benchmarking.refiner import paper_counts

        print(paper_counts())
        return 0
    try:
        if args.what == "page":
            return _page(args.folder, args.o)
        if args.json is not None:
            _check_new_file(args.json)
        content, text = _measured(args)
    except BenchmarkError as error:
        parser.error(str(error))
    print(text)
    if args.json is not None:
        with args.json.open("x") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
    return 0


def _page(folder: Path, file: Path) -> int:
    """Write the page of all JSONs in a folder."""
    from laboratory.benchmarking.page import build_page, read_runs, write_page

    write_page(file, build_page(read_runs(folder), os.path.relpath(folder, file.parent)))
    print(file)
    return 0


def _measured(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What goes into the JSON, and the report as text."""
    if args.what == "startup":
        _check_warmup(args.warmup)
        return run_startup(args)
    problem = _problem(args)
    device = _device(args)
    with _threads(args.threads, device):
        return run(args, problem, device)


def _check_new_file(path: Path) -> None:
    if path.exists():
        raise BenchmarkError(f"--json: {path} exists already and is not overwritten; name a new file or remove it")
    if not path.parent.is_dir():
        raise BenchmarkError(f"--json: there is no folder {path.parent}; make it first")


def _problem(args: argparse.Namespace) -> Problem:
    """Plans from files or made up; settles the defaults in args."""
    if args.what == "classes":
        if args.plans is not None or args.classes is not None:
            found = "--plans" if args.plans is not None else "--classes"
            raise BenchmarkError(f"{found} cannot be used with classes, which makes up plans for each of --counts")
        args.classes = args.counts[0]
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


def _class_problems(args: argparse.Namespace) -> dict[int, Problem]:
    """Made-up plans by number of classes."""
    shape = (args.dim, args.patch, args.batch, args.base_features)
    return {count: synthetic_problem(*shape, count, args.stages, args.resenc) for count in args.counts}


def _device(args: argparse.Namespace) -> torch.device:
    """The device; settles warm-up turns and threads in args."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device is cuda, but torch finds no CUDA device; expected cpu")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.warmup is None:
        args.warmup = 10 if args.device == "cuda" else 2
    _check_warmup(args.warmup)
    if args.clock == "cpu" and args.device == "cuda":
        raise BenchmarkError("--clock is cpu, but the work is done on cuda; expected wall")
    args.threads = args.threads or (1 if args.device == "cuda" else os.cpu_count() or 1)
    return torch.device(args.device)


def _check_warmup(warmup: int) -> None:
    if warmup < 0:
        raise BenchmarkError(f"--warmup is {warmup}, expected 0 or more")


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
    from laboratory.benchmarking import commands, host

    with host.temporary_folders() as root:
        if getattr(args, "case", None) is not None:
            results, targets, rows = _measure_commands(args, problem, root)
        else:
            results, targets, rows = _measure(
                args, problem, commands.Turns(device, Stopwatch(device, args.clock), args.rounds, args.warmup)
            )
    described = host.describe_problem(problem, None if args.what in ("train-step", "classes", "variants") else 1)
    return _reported(args, device, results, targets, rows, described)


def run_startup(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """As ``run`` for processes, which need no plans."""
    from laboratory.benchmarking.startup import STARTUP_COLUMNS, startup_times

    results = startup_times(args.rounds, args.warmup, args.clock)
    return _reported(args, torch.device("cpu"), results, [], report.table(STARTUP_COLUMNS, results), None)


def _reported(
    args: argparse.Namespace,
    device: torch.device,
    results: list[dict],
    targets: list[report.Target],
    rows: str,
    problem: dict[str, Any] | None,
) -> tuple[dict[str, Any], str]:
    """What goes into the JSON, and the report as text."""
    settings = _settings(args) if problem is None else {**_settings(args), "problem": problem}
    content = {
        "schema": report.SCHEMA,
        "command": _command(args),
        "settings": settings,
        "hardware": report.describe_hardware(device),
        "versions": report.describe_versions(),
        "results": results,
        "targets": [target.to_dict() for target in targets],
    }
    head = report.header(args.what, args.clock, problem, content["hardware"], content["versions"])
    lines = [head, content["command"], "", rows]
    if targets:
        lines += ["", "targets (median over the rounds):", *[target.line() for target in targets]]
    return content, "\n".join(lines)


def _measure(args: argparse.Namespace, problem: Problem, turns: Any) -> tuple[list[dict], list[report.Target], str]:
    """Results, targets and table of a subcommand."""
    from laboratory.benchmarking import commands
    from laboratory.benchmarking.classes import class_steps, class_table, class_targets
    from laboratory.benchmarking.refiner import refiner_steps
    from laboratory.benchmarking.variants import variant_steps, variant_table

    if args.what == "classes":
        results = class_steps(_class_problems(args), CLASS_TRAINER, turns)
        return results, class_targets(results), class_table(results)
    if args.what == "variants":
        results = variant_steps(problem, turns)
        return results, [], variant_table(results)
    if args.what == "refiner":
        results, rows = refiner_steps(problem, args.width, turns)
        return results, [], rows
    args.trainers = [REFERENCE, *[name for name in dict.fromkeys(args.trainers) if name != REFERENCE]]
    if args.what == "train-step":
        results = commands.train_steps(problem, args.trainers, turns)
        return results, report.train_targets(results), report.train_table(results)
    configs = [SamplingConfig(steps, args.sampler, samples=args.samples) for steps in args.steps]
    results = commands.predictions(problem, args.trainers, configs, turns)
    return results, report.predict_targets(results), report.predict_table(results)


def _measure_commands(
    args: argparse.Namespace, problem: Problem, root: Path
) -> tuple[list[dict], list[report.Target], str]:
    """As ``_measure``, of whole commands that predict a case."""
    from laboratory.benchmarking.whole import whole_predictions, whole_targets

    if args.plans is not None or args.clock != "wall" or len(args.case) not in (1, 3):
        raise BenchmarkError("--case expects three sizes, made-up plans (no --plans) and --clock wall")
    args.case, args.trainers, args.warmup = tuple(args.case) * (3 // len(args.case)), [REFERENCE], 0
    results = whole_predictions(problem, REFERENCE, args.case, args.device, args.rounds, root)
    return results, whole_targets(results), report.predict_table(results)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Options as they were used; of files only the names, so that a result tells nothing about folders."""
    settings = {name: value for name, value in vars(args).items() if name not in ("what", "json")}
    return {name: value.name if isinstance(value, Path) else value for name, value in settings.items()}


def _command(args: argparse.Namespace) -> str:
    """The command with every default spelled out, but for where the JSON goes."""
    words = ["scripts/benchmark", args.what]
    for name, value in _settings(args).items():
        implied = (name == "classes" and args.what == "classes") or (name == "configuration" and args.plans is None)
        if value is None or value is False or implied:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, tuple):
            words.append("x".join(map(str, value)))
        elif isinstance(value, list):
            words.extend(map(str, value))
        elif value is not True:
            words.append(str(value))
    return " ".join(words)
