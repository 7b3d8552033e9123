"""The study that fills the rest of the day: with and without diffusion, by nnU-Net's recipe and by the paper's."""

import json
from pathlib import Path
from typing import Any

from nnunetv2_diffusion.pages import write_whole

ITERATIONS = 250  # of an epoch, nnU-Net's
OVERHEAD = 240  # seconds for preprocessing, compiling, predicting and scoring
CELLS: list[dict[str, Any]] = [
    {"name": "nnUNet", "trainer": "nnUNetTrainerBaseline", "runs": 1},
    {"name": "RecycleXT_nnunet", "trainer": "nnUNetTrainerRecycleXT", "runs": 1, "settings": {"recipe": "nnunet"}},
    {"name": "NoDiff_paper", "trainer": "nnUNetTrainerNoDiff", "runs": 1, "settings": {"recipe": "paper"}},
    {"name": "RecycleXT_paper", "trainer": "nnUNetTrainerRecycleXT", "runs": 1, "settings": {"recipe": "paper"}},
]
SPLIT = Path(__file__).resolve().parents[3] / "studies" / "hippocampus_split.json"


def affordable_epochs(out: Path, seconds: float) -> int:
    """Epochs that all trainings side by side reach in so many seconds, if nothing overlaps.

    Args:
        out: folder with ``train_step_compiled.json``, whose steps are counted.
        seconds: that are left.

    Raises:
        FileNotFoundError: if steps were not timed.
    """
    results = json.loads((out / "train_step_compiled.json").read_text())["results"]
    step = {result["trainer"]: result["seconds"]["median"] for result in results}
    epoch = sum(step.get(cell["trainer"], step["nnUNetTrainer"]) for cell in CELLS) * ITERATIONS * 1.1
    return max(1, int((seconds - OVERHEAD) / epoch))


def write_study(out: Path, device: str, epochs: int | None, seconds: float, tiny: bool) -> Path:
    """The study's file in a folder; one that is there stays, so that trainings go on.

    Args:
        out: folder.
        device: of the trainings.
        epochs: of each, None for what ``seconds`` allow.
        seconds: that are left.
        tiny: a few steps of a small network.
    """
    file = out / "gpu_day_study.json"
    if file.exists():
        return file
    epochs = epochs or (1 if tiny else affordable_epochs(out, seconds))
    iterations, validation = (2, 1) if tiny else (ITERATIONS, 10)
    (out / SPLIT.name).write_text(SPLIT.read_text())
    study = {
        "name": "gpu_day",
        "summary": f"nnU-Net's own planned network, {epochs} epochs of {iterations} steps.",
        "dataset": "Dataset501_Hippocampus",
        "configuration": "3d_fullres",
        "split": SPLIT.name,
        "device": device,
        "settings": {
            "num_epochs": epochs,
            "num_iterations_per_epoch": iterations,
            "num_val_iterations_per_epoch": validation,
        },
        "predictions": [{"steps": 1}, {"steps": 5, "sampler": "ddim"}],
        "reference": "nnUNet",
        "cells": CELLS,
    }
    if tiny:
        study["network"] = {"base_features": 4, "n_stages": 3, "patch_size": [16, 16, 16], "batch_size": 2}
    write_whole(file, json.dumps(study, indent=1))
    return file
