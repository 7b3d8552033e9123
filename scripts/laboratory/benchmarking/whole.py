"""What it takes to predict a case: ``nnUNetv2_predict`` and ``nnunetv2_diffusion predict``, as whole processes.

Both commands predict the same made-up case with the same model of random weights: in one process, so that the largest
resident set is that of all the work (sliding window, resampling, export), or with as many more as nnUNet_npp and
nnUNet_nps say, where it is that of the largest process.
"""

import json
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813, its usual name
import torch

from laboratory.benchmarking.host import SEED, build_network
from laboratory.benchmarking.measure import Measurement, costs
from laboratory.benchmarking.problem import BenchmarkError, Problem
from laboratory.benchmarking.report import Target
from laboratory.commands import CommandError, CommandRunner, Usage
from nnunetv2_diffusion.installation import checkout

STOCK, OURS = "nnUNetv2_predict", "nnunetv2_diffusion predict"
COMMANDS = {STOCK: ["nnUNetv2_predict"], OURS: ["nnunetv2_diffusion", "predict"]}
SPACINGS = {"as the plans": 1.0, "to be resampled": 1.1}
"""What is predicted: spacing of the image in mm, that of the plans being 1."""
LIMIT = 1.2


def whole_predictions(
    problem: Problem, trainer: str, shape: tuple[int, ...], device: str, rounds: int, root: Path
) -> list[dict[str, Any]]:
    """Time and peak memory of both commands, in turn: one result for each spacing and command, as in the JSON.

    Args:
        problem: made-up plans.
        trainer: of the model.
        shape: voxels of the network's input, along three axes.
        device: "cpu" or "cuda".
        rounds: turns of each.
        root: of ``host.temporary_folders``, where nnU-Net finds the model.

    Raises:
        BenchmarkError: if a command fails; with the end of its output.
    """
    write_model(root, problem, trainer)
    model = ["-d", problem.plans["dataset_name"], "-c", problem.configuration, "-tr", trainer]
    results = []
    for name, spacing in SPACINGS.items():
        folder = root / name.replace(" ", "_")
        images = write_case(folder / "images", shape, spacing)
        usages = {command: [] for command in COMMANDS}
        for index in range(rounds):
            for command in COMMANDS:
                usages[command].append(_run(command, model, images, folder / f"{command}_{index}", device))
        measured = {c: [Measurement(u.seconds, None, u.peak_memory_bytes) for u in used] for c, used in usages.items()}
        passes = {"passes": 1, "pass_ratio": None, "outside_share": None}
        for command, found in measured.items():
            results.append({"trainer": f"{command}, {name}", "steps": None, **costs(found, measured[STOCK]), **passes})
    return results


def whole_targets(results: list[dict[str, Any]]) -> list[Target]:
    """Our command takes hardly more memory than nnU-Net's."""
    ours = [r for r in results if r["trainer"].startswith(OURS)]
    return [Target(f"{r['trainer']}: peak memory / {STOCK}'s", LIMIT, r["peak_memory_ratio"]) for r in ours]


def _run(command: str, model: list[str], images: Path, out: Path, device: str) -> Usage:
    words = [*COMMANDS[command], "-i", images, "-o", out, *model, "-f", "0", "-device", device]
    processes = [word for name in ("npp", "nps") for word in (f"-{name}", os.environ.get(f"nnUNet_{name}", "0"))]
    words += [*processes, "-step_size", "1", "--disable_tta"]
    root = checkout()
    paths = [*([str(root)] if root else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        return CommandRunner().run([str(w) for w in words], out.with_suffix(".log"), environment)
    except CommandError as error:
        raise BenchmarkError(f"{command} failed: {error}") from error


def write_model(root: Path, problem: Problem, trainer: str) -> None:
    """A trained model where nnU-Net looks for it, with random weights."""
    plans, dataset_json = deepcopy(problem.plans), problem.dataset_json
    configuration = plans["configurations"][problem.configuration]
    for kind in ("data", "seg", "probabilities"):
        configuration[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
        order = {"is_seg": kind == "seg", "order": 1, "order_z": 0, "force_separate_z": None}
        configuration[f"resampling_fn_{kind}_kwargs"] = order
    configuration["preprocessor_name"] = "DefaultPreprocessor"
    plans["image_reader_writer"] = "SimpleITKIO"
    plans["foreground_intensity_properties_per_channel"] = {"0": {}}
    checkpoint = {
        "network_weights": build_network(trainer, problem, torch.device("cpu")).state_dict(), "trainer_name": trainer,
        "init_args": {"configuration": problem.configuration, "plans": plans, "dataset_json": dataset_json},
        "inference_allowed_mirroring_axes": None,
    }  # fmt: skip
    name = f"{trainer}__{plans['plans_name']}__{problem.configuration}"
    folder = root / "nnUNet_results" / plans["dataset_name"] / name
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")


def write_case(folder: Path, shape: tuple[int, ...], spacing: float) -> Path:
    """A folder with one image of noise that has the shape when it is resampled to 1 mm."""
    folder.mkdir(parents=True)
    size = [round(n / spacing) for n in shape]
    image = sitk.GetImageFromArray(np.random.default_rng(SEED).normal(size=size).astype(np.float32))
    image.SetSpacing([spacing] * 3)
    sitk.WriteImage(image, str(folder / "case_0000.nii.gz"))
    return folder
