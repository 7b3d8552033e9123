"""The demo: data, plan, train, predict, score, picture."""

import argparse
import glob
import json
import platform
import signal
from pathlib import Path

import numpy as np
import torch

from laboratory.demo.options import parse_arguments
from laboratory.demo.phantoms import write_phantoms
from laboratory.demo.picture import draw_case, reverse_steps
from laboratory.demo.pipeline import Job, draw_samples, plan, predict_and_score, ranges_that_hold, train
from laboratory.raw_data import RawDataError, check_masks, hold_out, read_raw
from nnunetv2_diffusion.agreement import CAUTION
from nnunetv2_diffusion.checkpoints import CheckpointError, find_trainer
from nnunetv2_diffusion.compat import package_versions
from nnunetv2_diffusion.inference.devices import check_device
from nnunetv2_diffusion.inference.options import OptionError
from nnunetv2_diffusion.settings import SettingsError, parse_settings, read_assignments

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
    coloured = check_masks(source)
    test_cases = options.test_cases or max(1, min(20, labelled // 10))
    hold_out(source, out / "nnUNet_raw" / source.name, test_cases, options.seed)
    print(f"held out {test_cases} of {labelled} labelled cases of {source.name}")
    if coloured:
        print(f"{coloured} masks are PNGs with a palette, which nnU-Net reads as colours; greyscale copies are used")
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

    def check_gain(what: str, gain: float, bound: float) -> None:
        nonlocal good
        good &= gain >= -bound
        verdict = "met" if gain >= -bound else "NOT MET"
        print(f"{what}: {100 * gain:+.2f} Dice points; bound -{100 * bound}: {verdict}")

    if "K = 0" in by_steps:
        check_gain("\nrefined - prior (K = 0)", means[options.trainer] - by_steps["K = 0"], REFINED_MARGIN)
    if options.raw is None:
        high = all(mean >= BOUND for mean in means.values())
        print(f"\nbound: mean Dice of at least {BOUND} on phantoms: {'met' if high else 'NOT MET'}")
        good &= high
    if len(means) == 2:
        (first, own), (second, other) = means.items()
        check_gain(f"{first} - {second}", own - other, MARGIN)
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
    prefix, cases = "predict_", len(list((job.raw / "labelsTs").glob(f"*{job.ending}")))
    result = {k.removeprefix(prefix): s / cases for k, s in job.seconds.items() if k.startswith(prefix)}
    print("\nseconds per case, start included:", ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.items()))
    return result


def draw(job: Job, trainers: list[str]) -> Path:
    """The picture of the first unseen case."""
    truth = sorted((job.raw / "labelsTs").glob(f"*{job.ending}"))[0]
    case = truth.name.removesuffix(job.ending)
    images = sorted((job.raw / "imagesTs").glob(f"{glob.escape(case)}_????{job.ending}"))
    steps = reverse_steps(job.model_folder(trainers[0]), images, steps=5, device=job.options.device)
    masks = {t: job.out / f"predictions_{t}" / truth.name for t in trainers}
    draw_case(job.out / "demo.png", images, truth, job.ending, masks, steps)
    return job.out / "demo.png"


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
    job = Job(out, name, options, settings)
    plan(job)
    for trainer in trainers:
        train(job, trainer)
    scores = {trainer: predict_and_score(job, trainer) for trainer in trainers}
    if "HiDiff" in options.trainer:
        options.steps = sorted({0, *options.steps})  # the segmentor's own mask beside the refined one
    by_steps = {f"K = {k}": predict_and_score(job, trainers[0], k) for k in options.steps}
    means, means_by_steps = print_scores(scores), print_scores(by_steps)
    good = judge(means, means_by_steps, options)
    result = {
        "options": {k: v for k, v in vars(options).items() if k not in ("raw", "out")},
        "dataset": job.dataset,
        "mean_dice": means,
        "mean_dice_by_steps": means_by_steps,
        "dice_by_class": {t: {k: v.tolist() for k, v in s.items()} for t, s in scores.items()},
        "spread_of_samples": spread_of_samples(job, trainers[0]),
        "seconds": job.seconds,
        "seconds_per_case": seconds_per_case(job),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, {options.device}",
        "versions": package_versions(),
    }
    (out / "result.json").write_text(json.dumps(result, indent=2))
    print(f"\npicture: {draw(job, trainers)}\nnumbers: {out / 'result.json'}")
    return 0 if good else 1
