"""Sections ``diffusion`` of plans of version 0.1, flat as that version writes them, and what comes out of them."""

import json
import tempfile
from pathlib import Path

import torch
from fence_runs import CASES, CHECKPOINT, fixed_weights, make_image, make_trainer, run_own, train_once

# all that a planner of version 0.1 writes into every configuration, numbers of a small network and a short training
WRITTEN = {
    "timesteps": 1001,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "training_steps": None,
    "time_sampling": "uniform",
    "steps": 2,
    "sampler": "ddpm",
    "step_spacing": "trailing",
    "eta": 0.0,
    "samples": 1,
    "seed": 0,
    "self_conditioning_probability": 0.5,
    "time_conditioning": True,
    "mask_encoding": "one-hot",
    "transformer_layers": 1,
    "transformer_heads": 8,
    "transformer_width": 0.25,
    "recipe": "paper",
    "num_epochs": None,
    "num_iterations_per_epoch": None,
    "num_val_iterations_per_epoch": None,
    "max_bad_steps": 20,
    "hidiff": {
        "timesteps": 10,
        "steps": 1,
        "sampler": "ddim",
        "samples": 1,
        "seed": 0,
        "binarized": True,
        "cross_transformer": True,
        "refiner_width": 32,
        "refiner_norm": "instance",
        "prior_residual": True,
        "noise_loss": "focal",
        "focal_gamma": 2.0,
        "calibrated": True,
        "lambda_focal": 1.0,
        "lambda_diffusion": 1.0,
        "collaborative": True,
        "learning_rate": 0.0001,
        "segmentor_learning_rate": 0.0001,
        "segmentor_trainer": "nnUNetTrainer",
        "segmentor_checkpoint": None,
        "pretraining_epochs": None,
        "pretraining_learning_rate": 0.0008,
        "merit_variant": "small",
        "merit_weights": None,
    },
    "mixture": {"recycle_share": 0.5, "truth_corruption": "drop"},
    "score": {"weight": 4.0, "latent_channels": 8, "steps": 8},
}
WARM_UP = 16  # steps until importance sampling, with ten losses of each of two time steps, does anything
SMALL = {"refiner_width": 4, "steps": 3, "pretraining_epochs": 0}


def _with(**changes: object) -> dict:
    return {**WRITTEN, **changes}


def _hidiff(**changes: object) -> dict:
    return {**WRITTEN, "hidiff": {**WRITTEN["hidiff"], **SMALL, **changes}}


XT, HIDIFF = "nnUNetTrainerRecycleXT", "nnUNetTrainerHiDiff"
# name -> trainer, section; each changes what ``WRITTEN`` says, so that no default counts
VALID: dict[str, tuple[str, dict]] = {
    "as written": (XT, WRITTEN),
    "schedule": (XT, _with(timesteps=300, beta_start=2e-4, beta_end=0.03)),
    "short schedule": (XT, _with(training_steps=25)),
    "importance": (XT, _with(training_steps=2, time_sampling="importance")),
    "published weight": (XT, _with(training_steps=2, time_sampling="importance-published")),
    "steps": (XT, _with(steps=4, step_spacing="linspace")),
    "sampler": (XT, _with(steps=3, sampler="ddim")),
    "eta": (XT, _with(steps=3, sampler="ddim", eta=0.8)),
    "samples": (XT, _with(samples=3)),
    "seed": (XT, _with(seed=9)),
    "no time": (XT, _with(time_conditioning=False)),
    "bits": (XT, _with(mask_encoding="analog-bits")),
    "no transformer": (XT, _with(transformer_layers=0)),
    "transformer": (XT, _with(transformer_layers=2, transformer_heads=4, transformer_width=1.0)),
    "recipe": (XT, _with(recipe="nnunet", max_bad_steps=3)),
    "lengths": (XT, _with(num_epochs=7, num_iterations_per_epoch=11, num_val_iterations_per_epoch=3)),
    "self-conditioning always": ("nnUNetTrainerSelfCondXt", _with(self_conditioning_probability=1.0)),
    "self-conditioning never": ("nnUNetTrainerSelfCondXt", _with(self_conditioning_probability=0.0)),
    "score": ("nnUNetTrainerRecycleScore", _with(score={"weight": 1.0, "latent_channels": 3, "steps": 2})),
    "hidiff as written": (HIDIFF, _hidiff()),
    "hidiff chain": (HIDIFF, _hidiff(timesteps=20, steps=5, sampler="ddpm", samples=2, seed=4)),
    "hidiff spacing": (HIDIFF, {**_hidiff(), "step_spacing": "linspace"}),
    "hidiff refiner": (HIDIFF, _hidiff(binarized=False, refiner_width=8, refiner_norm="batch")),
    "hidiff no exchange": (HIDIFF, _hidiff(cross_transformer=False, prior_residual=False)),
    "hidiff losses": (HIDIFF, _hidiff(focal_gamma=1.0, lambda_focal=0.5, lambda_diffusion=0.25)),
    "hidiff bce": (HIDIFF, _hidiff(noise_loss="bce", calibrated=False)),
    "hidiff rates": (HIDIFF, _hidiff(learning_rate=3e-4, segmentor_learning_rate=2e-4)),
    "hidiff frozen": (HIDIFF, _hidiff(collaborative=False, pretraining_epochs=1)),
    "hidiff alone first": (HIDIFF, _hidiff(pretraining_epochs=2, pretraining_learning_rate=5e-4)),
}  # fmt: skip
# name -> trainer, section, and the words that the message has to hold: key and value as in the file
INVALID: dict[str, tuple[str, object, list[str]]] = {
    "unknown key": (XT, {"step": 3}, ["step", "steps"]),
    "unknown key within": (HIDIFF, {"hidiff": {"refiner_widht": 8}}, ["refiner_widht", "refiner_width"]),
    "no mapping": (XT, [3], ["diffusion"]),
    "no mapping within": (HIDIFF, {"hidiff": 3}, ["hidiff"]),
    "type": (XT, {"steps": "3"}, ["steps", "'3'"]),
    "float for integer": (XT, {"steps": 2.0}, ["steps", "2.0"]),
    "bool for integer": (XT, {"timesteps": True}, ["timesteps", "True"]),
    "null": (XT, {"sampler": None}, ["sampler", "None"]),
    "choice": (XT, {"sampler": "dpm"}, ["sampler", "dpm", "ddpm", "ddim"]),
    "choice of spacing": (XT, {"step_spacing": "cosine"}, ["step_spacing", "cosine", "trailing"]),
    "range": (XT, {"eta": 1.5}, ["eta", "1.5"]),
    "too few": (XT, {"steps": 0}, ["steps", "0"]),
    "too many steps": (XT, {"timesteps": 10, "steps": 11}, ["steps", "11", "10"]),
    "too many trained": (XT, {"timesteps": 10, "steps": 2, "training_steps": 20}, ["training_steps", "20", "10"]),
    "betas": (XT, {"beta_start": 0.02, "beta_end": 0.001}, ["beta_end", "0.001", "beta_start"]),
    "no signal": (XT, {"beta_end": 0.9, "steps": 2}, ["beta_end", "0.9"]),
    "encoding": (XT, {"mask_encoding": "bits"}, ["mask_encoding", "bits", "analog-bits"]),
    "recipe": (XT, {"recipe": "ours"}, ["recipe", "ours", "paper", "nnunet"]),
    "hidiff steps": (HIDIFF, {"hidiff": {"timesteps": 5, "steps": 6}}, ["steps", "6", "5"]),
    "hidiff width": (HIDIFF, {"hidiff": {"refiner_width": 6}}, ["refiner_width", "6"]),
    "hidiff norm": (HIDIFF, {"hidiff": {"refiner_norm": "layer"}}, ["refiner_norm", "layer", "batch"]),
    "hidiff negative": (HIDIFF, {"hidiff": {"lambda_focal": -1.0}}, ["lambda_focal", "-1.0"]),
    "score": ("nnUNetTrainerRecycleScore", {"score": {"latent_channels": 0}}, ["latent_channels", "0"]),
}  # fmt: skip


def settings_trainer(name: str, section: object) -> object:
    """A trainer whose plans have a section: those of the 2D case, but for that."""
    packed = CASES / "recycle_xt_2d"
    plans, dataset = (
        json.loads((packed / file).read_text(encoding="utf-8")) for file in ("plans.json", "dataset.json")
    )
    plans["configurations"]["2d"]["diffusion"] = section
    return make_trainer(name, plans, dataset, "2d")


def outcome(name: str, section: dict) -> dict:
    """What a trainer makes of a section: network, training and prediction, without a look at its settings."""
    trainer = settings_trainer(name, section)
    weights = fixed_weights(trainer.network.state_dict())
    if name == HIDIFF:
        weights["_extra_state"] = torch.tensor([4])  # the refiner is trained, and pays
    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    trainer.network.load_state_dict(weights)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / f"{name}__fence__2d"
        (model / "fold_0").mkdir(parents=True)
        for file, content in (("plans.json", trainer.plans_manager.plans), ("dataset.json", trainer.dataset_json)):
            (model / file).write_text(json.dumps(content))
        trainer.save_checkpoint(str(model / "fold_0" / CHECKPOINT))
        image = make_image("settings", 1, (1, 20, 16))
        found, told = run_own(model, image, [999.0, 1.0, 1.0], {"options": {"tta": "none"}})
    steps = WARM_UP if section["time_sampling"] != "uniform" else 1
    return {
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
        "lengths": [trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch],
        "prediction": {**told, "foreground": float((found["mask"] > 0).mean())},
        "training": train_once(trainer, weights, "settings", 2, steps),
    }
