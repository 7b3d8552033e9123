"""Command line of a day with a GPU; see scripts/gpu_day."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nnunetv2_diffusion.files import write_json

SCRIPTS = Path(__file__).resolve().parents[2]
BENCHMARKING = (sys.executable, "-m", "laboratory.benchmarking")
ABOUT = """\
Everything that needs a GPU, in the order of its worth, for a machine that is lent for half an hour: masks of the CPU
against the GPU's, cost of a training step and of a prediction as ratios to stock nnU-Net's, memory against the
planner's estimate, and with --raw trainings of nnU-Net and RecycleXT for the minutes that are left.

Each part writes OUT/PART.json; the same command leaves out the parts that are there. A part that fails is told at the
end (exit status 1) and does not stop the others.
"""
TRAINERS = (
    "nnUNetTrainer", "nnUNetTrainerNoDiff", "nnUNetTrainerDiffSeg", "nnUNetTrainerSelfCondXt",
    "nnUNetTrainerSelfCondXtPlus1", "nnUNetTrainerRecycleXtPlus1", "nnUNetTrainerRecycleXT",
    "nnUNetTrainerRecycleScore", "nnUNetTrainerHiDiff",
)  # fmt: skip
PAIR = ("nnUNetTrainer", "nnUNetTrainerRecycleXT")
LARGE = ("--patch", "128", "--batch", "2", "--stages", "6")  # nnU-Net's usual patch for 3D data
BENCHMARKS = {
    "train_step": (False, ("train-step", "--trainers", *TRAINERS)),
    "train_step_compiled": (True, ("train-step", "--trainers", *PAIR)),
    "train_step_large": (False, ("train-step", "--trainers", *PAIR, "nnUNetTrainerHiDiff", *LARGE)),
    "predict": (False, ("predict", "--steps", "1", "2", "5", *LARGE[:2], *LARGE[4:])),
}
"""Name of the part: whether networks are compiled, as nnU-Net trains on a GPU, and options of scripts/benchmark."""
TINY = ("--patch", "16", "--batch", "2", "--stages", "3", "--base-features", "4")


@dataclass
class Day:
    """What is measured where, with options as in ``arguments_of``; ``end``: when the machine goes, as ``monotonic``."""

    out: Path
    raw: Path | None
    device: str
    tiny: bool
    end: float
    epochs: int | None

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def command(self, arguments: Sequence[str], compiled: bool = False) -> None:
        """Run one of this checkout's scripts; CalledProcessError if it fails."""
        environment = {**os.environ, "nnUNet_compile": "t" if compiled else "f"}
        subprocess.run(arguments, check=True, env=environment, timeout=max(self.left(), 1))

    def benchmark(self, name: str) -> None:
        """One of ``BENCHMARKS``, its JSON in the folder of results."""
        compiled, options = BENCHMARKS[name]
        size = [*TINY, "--warmup", "1"] if self.tiny else []  # of an option that comes twice the last one counts
        rounds = ["--rounds", "2" if self.tiny else "15", "--device", self.device]
        command = [*BENCHMARKING, "cli", *options, *size, *rounds, "--json", str(self.out / f"{name}.json")]
        self.command(command, compiled and not self.tiny)


def masks(day: Day) -> None:
    """Masks of the CPU against those of the GPU, for every trainer."""
    import torch

    from laboratory.benchmarking.problem import synthetic_problem
    from laboratory.benchmarking.report import describe_hardware, describe_versions
    from laboratory.gpu_day.masks import compare_all
    from laboratory.gpu_day.page import page

    os.environ.update({"nnUNet_compile": "f"})
    device = torch.device(day.device)
    problem = (
        synthetic_problem(patch=(16,) * 3, batch=2, base_features=4, stages=2) if day.tiny else synthetic_problem()
    )
    results = compare_all(TRAINERS, problem, 12 if day.tiny else 200, device, () if day.tiny else PAIR[1:])
    file, described = day.out / "masks.json", {"hardware": describe_hardware(device), "versions": describe_versions()}
    write_json(file, {**described, "results": results})
    print(page(file))


def memory(day: Day) -> None:
    """The planner's estimate against what the allocator took at most."""
    command = [*BENCHMARKING, "memory", "--device", day.device, "--dims", "3"]
    command += ["--networks", "plain", "--classes", "3", "16"]
    command += ["--patch-3d", "16", "--stages", "3", "--base-features", "4"] if day.tiny else []
    day.command([*command, "--json", str(day.out / "memory.json")])


def trainings(day: Day) -> None:
    """Trainings that end, by ``scripts/study``: nnU-Net and RecycleXT, each by both recipes."""
    from laboratory.gpu_day.trainings import write_study

    file = write_study(day.out, day.device, day.epochs, day.left(), day.tiny)
    command = [str(SCRIPTS / "study"), "run", str(file), "--raw", str(day.raw), "--out", str(day.out / "work")]
    day.command([*command, "--results", str(day.out / "results"), "--jobs", "4"], compiled=not day.tiny)
    write_json(day.out / "trainings.json", {"study": file.name, "results": "results"})


PARTS: dict[str, Callable[[Day], None]] = {
    "masks": masks, **{name: partial(Day.benchmark, name=name) for name in BENCHMARKS},
    "memory": memory, "trainings": trainings,
}  # fmt: skip


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options of ``scripts/gpu_day``."""
    names = list(PARTS)
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_day", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="for results, to go on in")
    parser.add_argument(
        "--raw", type=Path, metavar="DIR", help="Dataset501_Hippocampus to train on; default: no training"
    )
    parser.add_argument("--minutes", type=float, default=30, help="that the machine is there (default: 30)")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=" ".join(names))
    parser.add_argument("--epochs", type=int, help="of each training; default: as many as the minutes allow")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="rehearsal with small networks")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that are not done; returns 1 if one failed."""
    arguments = arguments_of(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    day = Day(arguments.out.resolve(), arguments.raw, arguments.device, arguments.tiny, end, arguments.epochs)
    failed = []
    for name, part in PARTS.items():
        if name not in arguments.parts or (day.out / f"{name}.json").exists() or (part is trainings and not day.raw):
            continue
        start = time.monotonic()
        try:
            part(day)
        except Exception as error:  # the machine is lent: the other parts are worth having
            failed.append(f"{name}: {error}")
        print(f"gpu_day: {name} took {time.monotonic() - start:.0f} s, {day.left():.0f} s left", flush=True)
    for line in failed:
        print(f"gpu_day: failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
