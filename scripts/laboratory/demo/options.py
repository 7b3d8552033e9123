"""Options of the demo; without numpy, torch and nnU-Net, so that the help answers before anything is installed."""

import argparse
from pathlib import Path

from nnunetv2_diffusion.planning.presets import load_preset

PRESET = "cpu-demo"
RECIPES = ("nnunet", "paper")
EXAMPLES = """examples:
  scripts/demo                                                        phantoms, about 6 minutes on 2 CPU cores
  scripts/demo --raw DatasetXXX_Name --epochs 20 -c 2d                 your data
  scripts/demo --compare nnUNetTrainer                                 beside nnU-Net's own trainer
"""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind every option, and the examples as they are."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the demo."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description="Data, plan, train, predict, score, picture: all through nnU-Net's own commands.",
        formatter_class=_Formatter,
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("--raw", type=Path, metavar="DIR", help="a raw data set DatasetXXX_Name; default: synthetic phantoms")
    add("--out", type=Path, metavar="DIR", help="new folder for everything; default: the first free demo_output*")
    add("--trainer", default="nnUNetTrainerRecycleXT", help="trainer to show")
    add("--compare", metavar="TRAINER", help="a second trainer, same plans and iterations")
    add(
        "--steps", type=int, nargs="+", default=[], metavar="K", help="predict also with these numbers of reverse steps"
    )
    add("--configuration", "-c", default="3d_fullres", choices=("2d", "3d_fullres"), help="nnU-Net configuration")
    add("--epochs", type=int, default=5, help="length of the training")
    add("--iterations", type=int, default=50, help="optimiser steps of an epoch")
    add(
        "--recipe",
        default="paper",
        choices=RECIPES,
        help="of the diffusion trainers; the paper's is fast in short runs",
    )
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings, for example hidiff.refiner_norm=batch")
    add("--base-features", type=int, help="channels of the first stage; nnU-Net plans 32, the preset cpu-demo 8")
    add("--batch-size", type=int, help="patches in a step; default: that of the preset cpu-demo, 2 volumes or 8 slices")
    add("--patch-size", type=int, nargs="+", metavar="N", help="voxels along each axis; default: as nnU-Net plans")
    add("--test-cases", type=int, help="unseen cases to score; default 6 phantoms, or 10 %% of --raw, 20 at most")
    add("--seed", type=int, default=0, help="of the phantoms and of the choice of unseen cases")
    add("-device", "--device", default="cpu", choices=("cpu", "cuda", "mps"), help="as in nnU-Net")
    options = parser.parse_args(arguments)
    for name, value in load_preset(PRESET).overrides(2 if options.configuration == "2d" else 3).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options
