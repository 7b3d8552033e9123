"""Command line of the demo; see scripts/demo."""

import argparse
import glob
import json
import platform
import signal
from pathlib import Path

import numpy as np
import torch

from nnunetv2_diffusion.agreement import CAUTION
from nnunetv2_diffusion.checkpoints import CheckpointError, find_trainer
from nnunetv2_diffusion.compat import package_versions
from nnunetv2_diffusion.demo.data import RawDataError, check_masks, hold_out, read_raw
from nnunetv2_diffusion.demo.options import parse_arguments
from nnunetv2_diffusion.demo.phantoms import write_phantoms
from nnunetv2_diffusion.demo.picture import draw_case, reverse_steps
from nnunetv2_diffusion.demo.pipeline import (
    Job,
    dice_scores,
    draw_samples,
    plan,
    predict_and_score,
    ranges_that_hold,
    train,
)
from nnunetv2_diffusion.inference.devices import check_device
from nnunetv2_diffusion.inference.options import OptionError
from nnunetv2_diffusion.planning.schema import SettingsError
from nnunetv2_diffusion.planning.settings import parse_settings, read_assignments

SYNTHETIC = "Dataset501_Demo"
BOUND = 0.6  # mean Dice on phantoms; labelling everything as organ scores below 0.2
EQUAL_LENGTH = {"nnUNetTrainer": "nnUNetTrainerBaseline"}  # the host's trainer, its length read from the plans
MARGIN = 0.015  # Dice that a trainer may be below the one it is compared with
SAMPLES = 4  # masks that are drawn of a case, to see what their spread says
REFINED_MARGIN = 0.002  # Dice that a refined mask may be below the segmentor's own


def free_folder(name: str) -> Path:
    """``name`` or ``name_2``, ``name_3``, ...: whatever does not exist yet."""
    candidate, number = Path(name), 1
    while candidate.exists():
        number += 1
        candidate = Path(f"{name}_{number}")
    return candidate


def make_data(options: argparse.Namespace, out: Path) -> str:
    """Write or link the raw data set into out; returns its name."""
    if options.raw is None:
        folder = out / "nnUNet_raw" / SYNTHETIC
        write_phantoms(folder, 24, options.test_cases or 6, options.seed)
        print(f"made 24 training and {options.test_cases or 6} unseen phantoms in {folder}")
        return SYNTHETIC
    source = options.raw.resolve()
    labelled = len(read_raw(source)[1])
    test_cases = options.test_cases or max(1, min(20, labelled // 10))
    hold_out(source, out / "nnUNet_raw" / source.name, test_cases, options.seed)
    print(f"held out {test_cases} of {labelled} labelled cases of {source.name}")
    return source.name


def print_scores(scores: dict[str, dict[str, np.ndarray]]) -> dict[str, float]:
    """Print Dice by class, mean and standard deviation over cases; returns the mean over classes and cases."""
    means = {}
    for name, by_label in scores.items():
        print(f"\n{name}: Dice on {len(next(iter(by_label.values())))} unseen cases")
        for label, values in by_label.items():
            print(f"  class {label}: {np.nanmean(values):.4f} ± {np.nanstd(values):.4f}")
            if not np.nansum(values):
                print(f"  class {label} is never found: is the training too short?")
        means[name] = float(np.nanmean([np.nanmean(v) for v in by_label.values()]))
        print(f"  mean: {means[name]:.4f}")
    return means


def judge(means: dict[str, float], by_steps: dict[str, float], options: argparse.Namespace) -> bool:
    """Print the bounds and whether they are met; True if all are."""
    good = True
    if "K = 0" in by_steps:
        gain = means[options.trainer] - by_steps["K = 0"]
        good = gain >= -REFINED_MARGIN
        print(
            f"\nrefined - prior (K = 0): {100 * gain:+.2f} Dice points; bound -{100 * REFINED_MARGIN}: "
            f"{'met' if good else 'NOT MET'}"
        )
    trainers = list(means)
    if options.raw is None:
        high = all(mean >= BOUND for mean in means.values())
        print(f"\nbound: mean Dice of at least {BOUND} on phantoms: {'met' if high else 'NOT MET'}")
        good &= high
    if len(trainers) == 2:
        difference = means[trainers[0]] - means[trainers[1]]
        close = difference >= -MARGIN
        print(
            f"{trainers[0]} - {trainers[1]}: {100 * difference:+.2f} Dice points; bound -{100 * MARGIN}: "
            f"{'met' if close else 'NOT MET'}"
        )
        good &= close
    return good


def spread_of_samples(job: Job, trainer: str) -> dict[str, int] | None:
    """Draw samples, and print how many ranges of their volumes hold the true one; None for a model without samples."""
    folder = draw_samples(job, trainer, SAMPLES)
    if folder is None:
        return None
    held, ranges = ranges_that_hold(folder, job.raw / "labelsTs")
    print(
        f"\nranges from 5 to 95 % of the volumes of {SAMPLES} samples, one for each case and class: "
        f"{held} of {ranges} hold the true volume. {CAUTION}"
    )
    return {"samples": SAMPLES, "ranges": ranges, "held": held}


def seconds_per_case(job: Job) -> dict[str, float]:
    """Of every prediction, start of the command included; printed as well."""
    ending = json.loads((job.raw / "dataset.json").read_text())["file_ending"]
    prefix, cases = "predict_", len(list((job.raw / "labelsTs").glob(f"*{ending}")))
    result = {k.removeprefix(prefix): s / cases for k, s in job.seconds.items() if k.startswith(prefix)}
    print("\nseconds per case, start included:", ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.items()))
    return result


def draw(job: Job, trainers: list[str]) -> Path:
    """The picture of the first unseen case."""
    ending = json.loads((job.raw / "dataset.json").read_text())["file_ending"]
    truth = sorted((job.raw / "labelsTs").glob(f"*{ending}"))[0]
    case = truth.name.removesuffix(ending)
    images = sorted((job.raw / "imagesTs").glob(f"{glob.escape(case)}_????{ending}"))
    steps = reverse_steps(job.model_folder(trainers[0]), images, steps=5, device=job.device)
    masks = {t: job.out / f"predictions_{t}" / truth.name for t in trainers}
    picture = job.out / "demo.png"
    draw_case(picture, images, truth, ending, masks, steps)
    return picture


def write_result(
    job: Job,
    options: argparse.Namespace,
    scores: dict[str, dict[str, np.ndarray]],
    means: dict[str, float],
    means_by_steps: dict[str, float],
    spread: dict[str, int] | None,
) -> None:
    """Write all numbers, with the options, hardware and versions that they belong to, to ``<out>/result.json``."""
    result = {
        "options": {
            k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in ("raw", "out")
        },
        "dataset": job.dataset,
        "mean_dice": means,
        "mean_dice_by_steps": means_by_steps,
        "dice_by_class": {t: {k: v.tolist() for k, v in s.items()} for t, s in scores.items()},
        "spread_of_samples": spread,
        "seconds": job.seconds,
        "seconds_per_case": seconds_per_case(job),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, {options.device}",
        "versions": package_versions(),
    }
    (job.out / "result.json").write_text(json.dumps(result, indent=2))


def check(options: argparse.Namespace, trainers: list[str]) -> dict:
    """Look at all options before anything is written; returns the settings of --set.

    Raises:
        SettingsError, CheckpointError, OptionError, RawDataError: naming the option.
    """
    settings = read_assignments(options.set)
    lengths = {"num_epochs": options.epochs, "num_iterations_per_epoch": options.iterations}
    parse_settings({**settings, **lengths}, "--set, --epochs or --iterations")
    for trainer in trainers:
        find_trainer(trainer)
    check_device(options.device)
    if options.test_cases is not None and options.test_cases < 1:
        raise OptionError(f"--test-cases is {options.test_cases}, expected at least 1")
    if options.raw is not None:
        check_masks(options.raw.resolve())
    return settings


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; 0 if the bounds are met, 130 if it was interrupted."""
    try:
        return run(arguments)
    except KeyboardInterrupt:
        print("interrupted")
        return 130


def run(arguments: list[str] | None) -> int:
    """All of it; the exit status."""
    options = parse_arguments(arguments)
    out = (options.out or free_folder("demo_output")).resolve()
    if out.exists():
        raise SystemExit(f"{out} exists; the demo writes into a new folder only")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # commands are ended then, too
    trainers = [EQUAL_LENGTH.get(t, t) for t in (options.trainer, options.compare) if t]
    try:
        settings = check(options, trainers)
        name = make_data(options, out)
    except (RawDataError, SettingsError, CheckpointError, OptionError) as error:
        raise SystemExit(str(error)) from error
    job = Job(
        out, name, options.configuration, options.epochs, options.iterations, options.base_features,
        options.batch_size, options.device, options.recipe, settings, options.patch_size,
    )  # fmt: skip
    plan(job)
    for trainer in trainers:
        train(job, trainer)
    scores = {trainer: dice_scores(predict_and_score(job, trainer)) for trainer in trainers}
    if "HiDiff" in options.trainer:
        options.steps = sorted({0, *options.steps})  # the segmentor's own mask beside the refined one
    by_steps = {f"K = {k}": dice_scores(predict_and_score(job, trainers[0], k)) for k in options.steps}
    means = print_scores(scores)
    means_by_steps = print_scores(by_steps)
    good = judge(means, means_by_steps, options)
    write_result(job, options, scores, means, means_by_steps, spread_of_samples(job, trainers[0]))
    print(f"\npicture: {draw(job, trainers)}\nnumbers: {out / 'result.json'}")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
