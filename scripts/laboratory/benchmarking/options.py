"""Options of ``scripts/benchmark`` and ``scripts/memory_table``; without torch and nnU-Net: help answers at once."""

import argparse
from pathlib import Path
from typing import Any

from nnunetv2_diffusion.settings import SAMPLERS

REFERENCE = "nnUNetTrainer"
CLOCKS = ("wall", "cpu")
NETWORKS = {"plain": False, "resenc": True}
SUBJECTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "stock": ("nnUNetTrainer", "stock", {}),
    "recycling": ("nnUNetTrainerRecycleXT", "recycling", {}),
    "analog-bits": ("nnUNetTrainerRecycleXT", "recycling", {"mask_encoding": "analog-bits"}),
    "hidiff": ("nnUNetTrainerHiDiff", "hidiff", {}),
}
"""What is estimated and measured: name of the trainer, family of the estimate, settings."""
TRAINERS = [
    f"nnUNetTrainer{name}"
    for name in ("DiffSeg", "SelfCondXt", "SelfCondXtPlus1", "RecycleXtPlus1", "RecycleXT", "NoDiff", "HiDiff")
]
COMMANDS = {
    "refiner": (
        "HiDiff's refiner, real and binary, beside its segmentor",
        "Parameters, multiply-accumulates and storage by counting, and the time of one pass by the clock, of the "
        "segmentor and of one refinement step, real-valued and binarised.",
    ),
    "train-step": (
        "time and memory of a training step",
        "Time nnU-Net's train_step of several trainers on the same batches. Trainers take turns; the ratio is to "
        f"{REFERENCE}'s step in the same round. On the CPU, peak memory is not measured.",
    ),
    "predict": (
        "time of network(image)",
        "Time network(image) as nnU-Net's predictor calls it, as a ratio to the stock network. The share of time "
        "outside of the denoising passes is found by timing each pass from within the loop.",
    ),
    "page": (
        "a page of all measurements",
        "Write a page in Markdown from the JSONs of this command and of scripts/memory_table, and from nothing else. A "
        "page of this command is replaced, no other file.",
    ),
}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}, expected an integer of at least 1")
    return value


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected e.g. 40x56x40, or 16 for a cube") from None


def build_parser() -> argparse.ArgumentParser:
    """The parser with its subcommands."""
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark", description="Cost of the diffusion trainers as a ratio to stock nnU-Net's."
    )
    commands = parser.add_subparsers(dest="what", required=True)
    made = {name: commands.add_parser(name, help=short, description=long) for name, (short, long) in COMMANDS.items()}
    add = made["refiner"].add_argument
    add("--width", type=_positive, default=32, help="channels of the first stage (default: 32)")
    _add_problem_and_run_options(made["refiner"], [], 10)
    _add_problem_and_run_options(made["train-step"], TRAINERS, 10)
    _add_problem_and_run_options(made["predict"], ["nnUNetTrainerRecycleXT"], 20)
    add = made["predict"].add_argument
    add("--steps", nargs="+", type=_positive, default=[1, 2, 5], metavar="K", help="default: 1 2 5")
    add("--sampler", choices=SAMPLERS, default="ddpm", help="reverse step (default: ddpm)")
    add("--samples", type=_positive, default=1, help="masks that are averaged (default: 1)")
    add = made["page"].add_argument
    add("folder", type=Path, metavar="DIR", help="folder of the JSONs")
    add("-o", type=Path, default=Path("docs/performance.md"), metavar="FILE.md", help="%(default)s")
    return parser


def _add_problem_and_run_options(parser: argparse.ArgumentParser, trainers: list[str], rounds: int) -> None:
    add = parser.add_argument_group(
        "network", "made up in nnU-Net's style; default: its plans for Hippocampus"
    ).add_argument
    add("--dim", type=int, choices=(2, 3), help="default: 3")
    add("--patch", type=_sizes, help="voxels, e.g. 40x56x40, or 16 for a cube")
    add("--base-features", type=_positive, help="channels of the first stage (default: 32)")
    add("--classes", type=_positive, help="with background (default: 3)")
    add("--stages", type=_positive, help="resolutions (default: 4)")
    add("--resenc", action="store_true", help="ResidualEncoderUNet")
    add("--batch", type=_positive, help="default: the plans' batch size; predict uses 1")
    add = parser.add_argument_group("or plans that exist").add_argument
    add("--plans", type=Path, metavar="FILE", help="nnUNetPlans.json")
    add("-c", "--configuration", default="3d_fullres", help="default: 3d_fullres")
    add("--dataset-json", type=Path, metavar="FILE", help="needed with --plans")
    add = parser.add_argument_group("run").add_argument
    if trainers:
        add("--trainers", nargs="+", default=trainers, help=f"compared with {REFERENCE}")
    add("--rounds", type=_positive, default=rounds, help=f"turns of each (default: {rounds})")
    add("--warmup", type=int, metavar="N", help="turns before that are not counted (default: 2, on CUDA 10)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--threads", type=_positive, help="default: as nnU-Net, all on the CPU and one on CUDA")
    clock = "cpu: processor time of this process, for a CPU that is busy with other work; with --threads 1"
    add("--clock", choices=CLOCKS, default="wall", help=clock)
    add("--json", type=Path, metavar="FILE", help="new file for settings and results")


def build_memory_parser() -> argparse.ArgumentParser:
    """The parser of ``scripts/memory_table``."""
    parser = argparse.ArgumentParser(
        prog="scripts/memory_table",
        description="Estimate and measure the memory of a training step over a grid of plans and classes.",
    )
    add = parser.add_argument
    add("--dims", nargs="+", type=int, choices=(2, 3), default=[2, 3], help="default: 2 3")
    add("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="default: all")
    add("--classes", nargs="+", type=int, default=[2, 3, 16, 104], metavar="K", help="2 3 16 104")
    add("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), help="default: all")
    add("--patch-2d", type=int, metavar="N", help="edge (default: 64, on CUDA 512)")
    add("--patch-3d", type=int, metavar="N", help="edge (default: 32, on CUDA 96)")
    add("--base-features", type=int, metavar="N", help="default: 8, on CUDA 32")
    add("--stages", type=int, metavar="N", help="default: 3, on CUDA 5")
    add("--refiner-width", type=int, metavar="N", help="HiDiff's (default: as --base-features)")
    add("--batch", type=int, default=2, metavar="N", help="default: 2")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--json", type=Path, metavar="FILE", help="new file for settings and results")
    return parser
