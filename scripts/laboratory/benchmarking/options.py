"""Options of ``scripts/benchmark`` and ``scripts/memory_table``; without torch and nnU-Net: help answers at once."""

import argparse
from pathlib import Path
from typing import Any

from nnunetv2_diffusion.planning.settings import SAMPLERS

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
TRAINERS = (
    "nnUNetTrainerDiffSeg",
    "nnUNetTrainerSelfCondXt",
    "nnUNetTrainerSelfCondXtPlus1",
    "nnUNetTrainerRecycleXtPlus1",
    "nnUNetTrainerRecycleXT",
    "nnUNetTrainerNoDiff",
    "nnUNetTrainerHiDiff",
)


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
    train = commands.add_parser(
        "train-step",
        help="time and memory of a training step",
        description="Time nnU-Net's train_step of several trainers on the same batches. Trainers take turns; the "
        f"ratio is to {REFERENCE}'s step in the same round. On the CPU, peak memory is not measured.",
    )
    predict = commands.add_parser(
        "predict",
        help="time of network(image)",
        description="Time network(image) as nnU-Net's predictor calls it, as a ratio to the stock network. The share "
        "of time outside of the denoising passes is found by timing each pass from within the loop.",
    )
    refiner = commands.add_parser(
        "refiner",
        help="HiDiff's refiner, real and binary, beside its segmentor",
        description="Parameters, multiply-accumulates and storage by counting, and the time of one pass by the clock, "
        "of the segmentor and of one refinement step, real-valued and binarised.",
    )
    refiner.add_argument("--width", type=_positive, default=32, help="channels of the first stage (default: 32)")
    refiner.add_argument("--paper", action="store_true", help="only count, for the setting of the paper")
    for command, trainers, rounds in (
        (refiner, (), 10),
        (train, TRAINERS, 10),
        (predict, ("nnUNetTrainerRecycleXT",), 20),
    ):
        _add_problem_options(command)
        _add_run_options(command, trainers, rounds)
    predict.add_argument("--steps", nargs="+", type=_positive, default=[1, 2, 5], metavar="K", help="default: 1 2 5")
    predict.add_argument("--sampler", choices=SAMPLERS, default="ddpm", help="reverse step (default: ddpm)")
    predict.add_argument("--samples", type=_positive, default=1, help="masks that are averaged (default: 1)")
    predict.add_argument(
        "--case",
        type=_sizes,
        help="instead, time and memory of the commands nnUNetv2_predict and nnunetv2_diffusion predict, with the same "
        f"model of {REFERENCE} on a made-up case of so many voxels, e.g. 192x192x192",
    )
    _page_parser(commands)
    return parser


def _page_parser(commands: argparse._SubParsersAction) -> None:
    page = commands.add_parser(
        "page",
        help="a page of all measurements",
        description="Write a page in Markdown from the JSONs of this command and of scripts/memory_table, and from "
        "nothing else. A page of this command is replaced, no other file.",
    )
    page.add_argument("folder", type=Path, metavar="DIR", help="folder of the JSONs")
    page.add_argument("-o", type=Path, default=Path("docs/performance.md"), metavar="FILE.md", help="%(default)s")


def _add_problem_options(parser: argparse.ArgumentParser) -> None:
    shape = parser.add_argument_group("network", "made up in nnU-Net's style; default: its plans for Hippocampus")
    shape.add_argument("--dim", type=int, choices=(2, 3), help="default: 3")
    shape.add_argument("--patch", type=_sizes, help="voxels, e.g. 40x56x40, or 16 for a cube")
    shape.add_argument("--base-features", type=_positive, help="channels of the first stage (default: 32)")
    shape.add_argument("--classes", type=_positive, help="with background (default: 3)")
    shape.add_argument("--stages", type=_positive, help="resolutions (default: 4)")
    shape.add_argument("--resenc", action="store_true", help="ResidualEncoderUNet")
    shape.add_argument("--batch", type=_positive, help="default: the plans' batch size; predict uses 1")
    real = parser.add_argument_group("or plans that exist")
    real.add_argument("--plans", type=Path, metavar="FILE", help="nnUNetPlans.json")
    real.add_argument("-c", "--configuration", default="3d_fullres", help="default: 3d_fullres")
    real.add_argument("--dataset-json", type=Path, metavar="FILE", help="needed with --plans")


def _add_run_options(parser: argparse.ArgumentParser, trainers: tuple[str, ...], rounds: int) -> None:
    run = parser.add_argument_group("run")
    if trainers:
        run.add_argument("--trainers", nargs="+", default=list(trainers), help=f"compared with {REFERENCE}")
    run.add_argument("--rounds", type=_positive, default=rounds, help=f"turns of each (default: {rounds})")
    run.add_argument(
        "--warmup", type=int, metavar="N", help="turns before that are not counted (default: 2, on CUDA 10)"
    )
    run.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    run.add_argument("--threads", type=_positive, help="default: as nnU-Net, all on the CPU and one on CUDA")
    run.add_argument(
        "--clock", choices=CLOCKS, default="wall",
        help="cpu: processor time of this process, for a CPU that is busy with other work; with --threads 1",
    )  # fmt: skip
    run.add_argument("--json", type=Path, metavar="FILE", help="new file for settings and results")


def build_memory_parser() -> argparse.ArgumentParser:
    """The parser of ``scripts/memory_table``."""
    parser = argparse.ArgumentParser(
        prog="scripts/memory_table",
        description="Estimate and measure the memory of a training step over a grid of plans and classes.",
    )
    parser.add_argument("--dims", nargs="+", type=int, choices=(2, 3), default=[2, 3], help="default: 2 3")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="default: all")
    parser.add_argument("--classes", nargs="+", type=int, default=[2, 3, 16, 104], metavar="K", help="2 3 16 104")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), help="default: all")
    parser.add_argument("--patch-2d", type=int, metavar="N", help="edge (default: 64, on CUDA 512)")
    parser.add_argument("--patch-3d", type=int, metavar="N", help="edge (default: 32, on CUDA 96)")
    parser.add_argument("--base-features", type=int, metavar="N", help="default: 8, on CUDA 32")
    parser.add_argument("--stages", type=int, metavar="N", help="default: 3, on CUDA 5")
    parser.add_argument("--refiner-width", type=int, metavar="N", help="HiDiff's (default: as --base-features)")
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="new file for settings and results")
    return parser
