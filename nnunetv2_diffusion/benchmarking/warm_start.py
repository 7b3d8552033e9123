"""What a warm start brings: pseudo Dice over the first epochs, from scratch and warm, same iterations.

Everything runs through commands: nnU-Net's own network is trained, ``nnunetv2_diffusion warm-start`` turns its result
into a file for ``-pretrained_weights``, and a diffusion trainer is trained without it and with it. The curves are
nnU-Net's own: mean foreground Dice on validation patches at the end of every epoch, from the checkpoints' log. The
source has seen as many iterations before; what the warm start costs is its training, if it is not there already.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from nnunetv2_diffusion.benchmarking.report import describe_hardware, describe_versions, table
from nnunetv2_diffusion.checkpoints import load_checkpoint_file
from nnunetv2_diffusion.demo.__main__ import free_folder, make_data
from nnunetv2_diffusion.demo.data import RawDataError
from nnunetv2_diffusion.demo.pipeline import PLANS, Job, plan, train
from nnunetv2_diffusion.planning.schema import SettingsError
from nnunetv2_diffusion.planning.settings import merge_settings, parse_settings, read_assignments

SCHEMA = 1
SOURCE = "nnUNetTrainerBaseline"  # nnU-Net's trainer, its length read from the plans
STARTS = ("scratch", "warm")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of scripts/warm_start_curve; network and data as in scripts/demo."""
    parser = argparse.ArgumentParser(
        prog="scripts/warm_start_curve",
        description="Dice over the first epochs of a diffusion trainer, from scratch and warm-started.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--raw", type=Path, metavar="DIR", help="a raw data set DatasetXXX_Name; default: synthetic phantoms")
    add("--out", type=Path, metavar="DIR", help="new folder; default: the first free warm_start_output*")
    add("--trainer", default="nnUNetTrainerRecycleXT", help="diffusion trainer to start")
    add("--repeats", type=int, default=1, help="trainings of each start")
    add("--configuration", "-c", default="3d_fullres", choices=("2d", "3d_fullres"), help="nnU-Net configuration")
    add("--epochs", type=int, default=5, help="of every training, the source's included")
    add("--iterations", type=int, default=50, help="optimiser steps of an epoch")
    add("--val-iterations", type=int, default=20, help="validation batches of an epoch, which the curve is made of")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings, for example recipe=nnunet")
    add("--base-features", type=int, default=8, help="channels of the first stage; nnU-Net plans 32")
    add("--batch-size", type=int, default=2, help="patches in a step")
    add("--patch-size", type=int, nargs="+", metavar="N", help="voxels along each axis; default: as nnU-Net plans")
    add("--test-cases", type=int, help="cases that are left out, as in scripts/demo")
    add("--seed", type=int, default=0, help="of the phantoms and of the choice of cases")
    add("-device", "--device", default="cpu", choices=("cpu", "cuda", "mps"), help="as in nnU-Net")
    return parser.parse_args(arguments)


def read_curve(checkpoint: Path) -> list[float]:
    """nnU-Net's pseudo Dice of every epoch, mean over classes, in [0, 1].

    Raises:
        CheckpointError: if the file cannot be read.
        KeyError: if it has no log.
    """
    return [float(value) for value in load_checkpoint_file(checkpoint)["logging"]["mean_fg_dice"]]


def _number(job: Job) -> str:
    return job.dataset[len("Dataset") :][:3]


def make_warm_start(job: Job, trainer: str) -> Path:
    """Train the source and turn its result into a file for ``-pretrained_weights``."""
    train(job, SOURCE)
    file = job.out / f"warm_start_{trainer}.pth"
    checkpoint = job.model_folder(SOURCE) / "fold_0" / "checkpoint_final.pth"
    job.run(
        "warm_start", "nnunetv2_diffusion", "warm-start", "--from", str(checkpoint), "-d", _number(job),
        "-c", job.configuration, "-p", PLANS, "-tr", trainer, "-o", str(file),
    )  # fmt: skip
    return file


def train_start(job: Job, trainer: str, name: str, weights: Path | None) -> list[float]:
    """Train fold 0 into a results folder of its own; returns the curve.

    Args:
        job: planned and preprocessed.
        trainer: diffusion trainer.
        name: of this training, "warm_0" for example.
        weights: for ``-pretrained_weights``; None for a training from scratch.
    """
    results = job.out / "runs" / name
    options = [] if weights is None else ["-pretrained_weights", str(weights)]
    job.run(
        f"train_{name}", "nnUNetv2_train", _number(job), job.configuration, "0", "-tr", trainer, "-p", PLANS,
        "-device", job.device, *options, nnUNet_results=str(results), nnUNet_diffusion_steps="1",
    )  # fmt: skip
    model = results / job.dataset / job.model_folder(trainer).name
    return read_curve(model / "fold_0" / "checkpoint_final.pth")


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """Mean over trainings, epoch by epoch."""
    return [sum(values) / len(values) for values in zip(*curves, strict=True)]


def curve_table(curves: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Pseudo Dice of every epoch: mean over trainings, and warm minus scratch in points."""
    means = {start: mean_curve(curves[start]) for start in STARTS}
    rows = [
        {"epoch": epoch + 1, **{start: means[start][epoch] for start in STARTS}}
        for epoch in range(len(means["scratch"]))
    ]
    columns = [
        ("epoch", lambda r: str(r["epoch"])),
        *[(start, lambda r, start=start: f"{r[start]:.4f}") for start in STARTS],
        ("warm - scratch, points", lambda r: f"{100 * (r['warm'] - r['scratch']):+.2f}"),
    ]
    return table(columns, rows)


def draw_curves(file: Path, curves: Mapping[str, Sequence[Sequence[float]]], title: str) -> None:
    """Write a PNG: every training thin, means thick."""
    from nnunetv2_diffusion.drawing import COLOURS, plt  # chooses a backend without a screen

    figure, axes = plt.subplots(figsize=(6, 4))
    for index, (name, trainings) in enumerate(curves.items()):
        epochs = range(1, len(trainings[0]) + 1)
        for training in trainings if len(trainings) > 1 else []:
            axes.plot(epochs, training, color=COLOURS(index), alpha=0.3, linewidth=0.8)
        style = "--" if name == SOURCE else "-"
        axes.plot(epochs, mean_curve(trainings), style, color=COLOURS(index), marker="o", markersize=3, label=name)
    axes.set(xlabel="epoch", ylabel="pseudo Dice, mean over classes", ylim=(0, 1), title=title)
    axes.legend()
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def make_job(options: argparse.Namespace, out: Path) -> Job:
    """Data, and what is trained on them.

    Raises:
        RawDataError: for data that cannot be used.
        SettingsError: for settings that cannot be used; nothing is written then.
    """
    settings = read_assignments(options.set)
    settings = merge_settings({"num_val_iterations_per_epoch": options.val_iterations}, settings)
    parse_settings(settings, "--set")
    return Job(
        out, make_data(options, out), options.configuration, options.epochs, options.iterations,
        options.base_features, options.batch_size, options.device, settings=settings, patch_size=options.patch_size,
    )  # fmt: skip


def write_result(job: Job, options: argparse.Namespace, curves: Mapping[str, list[list[float]]]) -> Path:
    """Write ``warm_start_curve.json`` and its picture; returns the JSON file."""
    file = job.out / "warm_start_curve.json"
    settings = {k: v for k, v in vars(options).items() if k not in ("raw", "out")}
    result = {
        "schema": SCHEMA,
        "dataset": job.dataset,
        "settings": settings,
        "pseudo_dice": curves,
        "seconds": job.seconds,
        "hardware": describe_hardware(torch.device(job.device)),
        "versions": describe_versions(),
    }
    file.write_text(json.dumps(result, indent=2))
    draw_curves(file.with_suffix(".png"), curves, f"{options.trainer}, {job.dataset}")
    return file


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, compare, write; returns the exit status."""
    options = parse_arguments(arguments)
    out = (options.out or free_folder("warm_start_output")).resolve()
    if out.exists():
        raise SystemExit(f"{out} exists; it is not written into, choose a new folder")
    if options.repeats < 1:
        raise SystemExit(f"--repeats is {options.repeats}, expected at least 1")
    try:
        job = make_job(options, out)
    except (RawDataError, SettingsError) as error:
        raise SystemExit(str(error)) from error
    plan(job)
    weights = {"scratch": None, "warm": make_warm_start(job, options.trainer)}
    curves: dict[str, list[list[float]]] = {start: [] for start in STARTS}
    for repeat in range(options.repeats):
        for start in STARTS:
            curves[start].append(train_start(job, options.trainer, f"{start}_{repeat}", weights[start]))
    curves[SOURCE] = [read_curve(job.model_folder(SOURCE) / "fold_0" / "checkpoint_final.pth")]
    file = write_result(job, options, curves)
    print(f"\n{options.trainer} on {job.dataset}, pseudo Dice, {options.repeats} training(s) each")
    print(curve_table(curves))
    print(f"\nnumbers: {file}\npicture: {file.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
