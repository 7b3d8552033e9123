"""Writes the fence: models, plans and losses as the code of today makes them, and what it makes of them.

    PYTHONPATH=. python tests/fence/make_fence.py [--results] [PART ...]

A part is ``models``, the name of one, ``planners`` or ``settings``. With ``--results``, models stay as they are.

Run it with the code that the fence is to hold, and never to make a failing test pass: ``README.md`` beside this file
says what may be changed on purpose. Nothing here depends on a random state that is not fixed by a name.
"""

import io
import json
import lzma
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from fence_planners import PLANNERS, planned
from fence_runs import (
    CASES,
    CHECKPOINT,
    HERE,
    fixed_weights,
    make_image,
    make_trainer,
    run_own,
    run_stock,
    train_once,
    unpack,
    use_checkout,
)
from fence_settings import INVALID, VALID, outcome

CLASSES = {"background": 0, "left part": 1, "right part": 2}
FOUR = {"background": 0, "a": 1, "b": 2, "c": 3, "d": 4}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2}
SHARE = {"classes": 0.3, "regions": (0.35, 0.15)}  # of voxels: all foreground, and each region
SHAPES = {3: (17, 20, 16), 2: (1, 28, 24)}
# the chain is written out everywhere: what the defaults become must not matter
CHAIN = {"steps": 4, "sampler": "ddpm", "step_spacing": "trailing", "samples": 1, "seed": 0}
HIDIFF = {"steps": 3, "sampler": "ddim", "samples": 1, "seed": 0, "refiner_width": 4, "pretraining_epochs": 0}
LENGTHS = {"num_epochs": 10, "num_iterations_per_epoch": 20, "num_val_iterations_per_epoch": 2}
TRANSFORMER = {"transformer_layers": 1, "transformer_heads": 2, "transformer_width": 0.5}


def stock(mirror: bool, **environment: int | str) -> dict:
    """A run by nnU-Net's predictor."""
    return {"mirror": mirror, "environment": environment}


STOCK = {
    "K1": stock(False, steps=1),
    "K1_mirrored": stock(True, steps=1),
    "K3": stock(False, steps=3),
    "K3_mirrored": stock(True, steps=3),
    "K3_ddim_samples": stock(False, steps=3, sampler="ddim", samples=2, seed=5),
}
OWN = {
    "K1": {"steps": 1, "samples": 1, "seed": 7, "sampler": "ddpm", "step_spacing": "trailing", "tta": "none"},
    "K3": {"steps": 3, "samples": 1, "seed": 7, "sampler": "ddpm", "step_spacing": "trailing", "tta": "interleaved"},
    "K3_samples": {"steps": 3, "samples": 3, "seed": 7, "sampler": "ddim", "step_spacing": "linspace", "tta": "full"},
}
PLAIN = {"plain": stock(False), "mirrored": stock(True)}  # for networks without steps
OWN_PLAIN = {"plain": {"tta": "none"}, "mirrored": {"tta": "full"}}


def case(trainer: str, dims: int, section: dict | None, **changes: object) -> dict:
    """What makes a case, and how it is run."""
    made = {
        "trainer": f"nnUNetTrainer{trainer}",
        "dims": dims,
        "section": section,
        "labels": CLASSES,
        "channels": 1,
        "residual": False,
        "patch": [16] * dims,
        "shape": SHAPES[dims],
        "spacing": [1.0] * 3 if dims == 3 else [999.0, 1.0, 1.0],
        "folds": 1,
        "flags": 0,  # added to the extra state that is stored with the weights
        "generated": False,  # too large to be stored: weights follow from their names
        "stock": STOCK,
        "own": OWN,
    }
    return {**made, **changes}


def recycling(**settings: object) -> dict:
    """Section of a trainer of the recycling family."""
    return {**CHAIN, **LENGTHS, **TRANSFORMER, **settings}


def hidiff(**settings: object) -> dict:
    """Section of a HiDiff trainer."""
    return {"step_spacing": "trailing", **LENGTHS, "hidiff": {**HIDIFF, **settings}}


PAPER = {
    "binarized": False, "cross_transformer": False, "prior_residual": False, "calibrated": False,
    "noise_loss": "bce", "refiner_norm": "batch", "sampler": "ddpm",
}  # fmt: skip
ALONE = {**STOCK, "as_the_weights_say": stock(False), "segmentor": stock(True, steps=0)}
OWN_ALONE = {**OWN, "as_the_weights_say": {"tta": "none"}, "segmentor": {"steps": 0, "tta": "full"}}
FIRST = {"K1": STOCK["K1"], "K1_mirrored": STOCK["K1_mirrored"]}  # without a section, only K = 1 has no default in it
OWN_FIRST = {"K1": OWN["K1"], "K1_samples": {**OWN["K1"], "samples": 3, "tta": "full"}}

CASE_LIST = {
    "recycle_xt_3d": case("RecycleXT", 3, recycling(step_spacing="linspace")),
    "recycle_xt_bits_3d": case(
        "RecycleXT", 3,
        recycling(
            mask_encoding="analog-bits", timesteps=200, beta_start=2e-4, beta_end=0.05, training_steps=50,
            sampler="ddim", eta=0.5, recipe="nnunet", time_sampling="importance",
        ),
        labels=FOUR, channels=2, residual=True, spacing=[1.25, 0.8, 1.0],
    ),
    "recycle_xt_regions_3d": case("RecycleXT", 3, recycling(eta=0.3), labels=REGIONS),
    "recycle_xt_2d": case("RecycleXT", 2, recycling(transformer_layers=2, transformer_heads=4), folds=2),
    "recycle_xt_stock_plans_2d": case("RecycleXT", 2, None, stock=FIRST, own=OWN_FIRST),
    "recycle_xt_plus1_3d": case("RecycleXtPlus1", 3, recycling(time_conditioning=False, transformer_layers=0)),
    "self_cond_xt_3d": case("SelfCondXt", 3, recycling(self_conditioning_probability=0.7)),
    "self_cond_xt_plus1_3d": case("SelfCondXtPlus1", 3, recycling(self_conditioning_probability=1.0, recipe="nnunet")),
    "diff_seg_3d": case("DiffSeg", 3, recycling(samples=2, seed=11, timesteps=400)),
    "diff_seg_2d": case("DiffSeg", 2, recycling(eta=1.0, sampler="ddim"), shape=(3, 20, 24), spacing=[3.0, 1.0, 1.0]),
    "no_diff_3d": case("NoDiff", 3, recycling(), stock=PLAIN, own=OWN_PLAIN),
    "baseline_3d": case("Baseline", 3, LENGTHS, stock=PLAIN, own=OWN_PLAIN),
    "recycle_score_3d": case("RecycleScore", 3, recycling(score={"weight": 2.0, "latent_channels": 4, "steps": 3})),
    "hidiff_3d": case("HiDiff", 3, hidiff(), flags=4),
    "hidiff_version_0_1_3d": case("HiDiff", 3, hidiff(focal_gamma=1.5, timesteps=20)),
    "hidiff_unused_3d": case("HiDiff", 3, hidiff(), flags=6, stock=ALONE, own=OWN_ALONE),
    "hidiff_paper_3d": case("HiDiff", 3, hidiff(**PAPER), flags=4),
    "hidiff_regions_3d": case("HiDiff", 3, hidiff(lambda_focal=0.5), flags=4, labels=REGIONS, residual=True),
    "hidiff_2d": case("HiDiff", 2, hidiff(samples=2), flags=4),
    "hidiff_stock_plans_2d": case("HiDiff", 2, None, flags=4, generated=True, stock=FIRST, own=OWN_FIRST),
    "hidiff_merit_2d": case(
        "HiDiffMERIT", 2, hidiff(merit_variant="nano"), flags=4, generated=True, patch=[32, 32], channels=2,
        stock={k: STOCK[k] for k in ("K1", "K3_mirrored")}, own={k: OWN[k] for k in ("K1", "K3")},
    ),
}  # fmt: skip


# --- plans and dataset.json ------------------------------------------------------------------------------------------


def architecture(dims: int, residual: bool) -> dict:
    """A network of three stages with at most eight features."""
    blocks = {"n_blocks_per_stage": [1, 1, 1]} if residual else {"n_conv_per_stage": [1, 1, 1]}
    kind = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [4, 8, 8],
            "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
            "kernel_sizes": [[3] * dims] * 3,
            "strides": [[1] * dims, [2] * dims, [2] * dims],
            **blocks,
            "n_conv_per_stage_decoder": [1, 1],
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def make_plans(made: dict) -> dict:
    """Plans with one configuration, as nnU-Net writes them."""
    dims, channels = made["dims"], made["channels"]
    name = "2d" if dims == 2 else "3d_fullres"
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": f"fence_{name}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": made["patch"],
        "median_image_size_in_voxels": list(made["shape"][-dims:]),
        "spacing": [1.0] * dims,
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "architecture": architecture(dims, made["residual"]),
        "batch_dice": dims == 2,
    }
    for kind in ("data", "seg", "probabilities"):
        configuration[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
        configuration[f"resampling_fn_{kind}_kwargs"] = {**resampling, "is_seg": kind == "seg"}
    if made["section"] is not None:
        configuration["diffusion"] = made["section"]
    return {
        "dataset_name": "Dataset902_Fence",
        "plans_name": "fence",
        "original_median_spacing_after_transp": [1.0] * 3,
        "original_median_shape_after_transp": [20] * 3,
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {name: configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(number): {} for number in range(channels)},
    }


def make_dataset(made: dict) -> dict:
    """dataset.json."""
    dataset = {
        "channel_names": {str(number): f"MR{number}" for number in range(made["channels"])},
        "labels": made["labels"],
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    if made["labels"] is REGIONS:
        dataset["regions_class_order"] = [1, 2]
    return dataset


# --- models ----------------------------------------------------------------------------------------------------------


def head_biases(weights: dict[str, torch.Tensor]) -> list[str]:
    """Keys of the finest head's bias; of all heads where they are summed up."""
    summed = [key for key in weights if key.startswith("segmentor.heads.") and key.endswith(".bias")]
    layers = sorted(key for key in weights if "seg_layers." in key and key.endswith(".bias"))
    return summed or layers[-1:]


def balance(weights: dict[str, torch.Tensor], mask: np.ndarray, made: dict, pull: float) -> float:
    """Move the heads' biases towards a mask with as much of each class as of the others; how far it is off."""
    regions = made["labels"] is REGIONS
    if regions:
        found = np.array([(mask > 0).mean(), (mask == 2).mean()])
        wanted = np.array(SHARE["regions"])
    else:
        classes = len(made["labels"])
        found = np.array([(mask == label).mean() for label in range(classes)])
        wanted = np.array([1 - SHARE["classes"], *[SHARE["classes"] / (classes - 1)] * (classes - 1)])
    shift = pull * np.clip(np.log(wanted / np.maximum(found, 1e-3)), -1, 1)
    for key in head_biases(weights):
        weights[key] = (weights[key] + torch.from_numpy(shift).float() / len(head_biases(weights))).half().float()
    return float(np.abs(found - wanted).max())


def save_checkpoint(trainer: object, made: dict, weights: dict, file: Path) -> None:
    """As nnU-Net's trainer writes it, without the optimiser's state."""
    trainer.network.load_state_dict(weights)
    with redirect_stdout(io.StringIO()):
        trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()  # as nnU-Net's loaders do: mirroring axes
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CHECKPOINT
        trainer.save_checkpoint(str(path))
        checkpoint = torch.load(path, weights_only=False)
    checkpoint["optimizer_state"] = None
    checkpoint["init_args"]["plans"].pop("continue_training", None)
    if made["generated"]:
        kept = head_biases(weights)
        shapes = {k: list(v.shape) for k, v in weights.items() if v.is_floating_point() and k not in kept}
        (file.parent / "weights.json").write_text(json.dumps(shapes))
        checkpoint["network_weights"] = {k: v for k, v in checkpoint["network_weights"].items() if k not in shapes}
    content = io.BytesIO()
    torch.save(checkpoint, content)
    file.write_bytes(lzma.compress(content.getvalue(), preset=9 | lzma.PRESET_EXTREME))


def start_weights(trainer: object, made: dict, fold: int) -> dict[str, torch.Tensor]:
    """Weights that follow from their names, other ones in each fold, with the extra state that the case wants."""
    state = trainer.network.state_dict()
    if made["generated"]:  # they are made again from their shapes alone, so they cannot start from the network's own
        state = {k: torch.ones_like(v) if v.is_floating_point() else v for k, v in state.items()}
    weights = fixed_weights({f"{k}{fold or ''}": v for k, v in state.items()})
    weights = dict(zip(state, weights.values(), strict=True))
    if "_extra_state" in weights:
        regions = int(made["labels"] is REGIONS)
        weights["_extra_state"] = torch.tensor([regions + made["flags"]])
    return weights


def some_masks(model: Path, image: np.ndarray, made: dict) -> np.ndarray:
    """Masks of the first run of nnU-Net's route and the last of ours: what the classes are balanced in."""
    stock, own = list(made["stock"].values()), list(made["own"].values())
    masks = [run_stock(model, image, made["spacing"], stock[0])["mask"]]
    return np.concatenate([*masks, run_own(model, image, made["spacing"], {"options": own[-1]})[0]["mask"]])


def make_model(name: str, made: dict, work: Path) -> None:
    """Files of a case: model, image, and what is asked for."""
    folder = CASES / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    plans, dataset = make_plans(made), make_dataset(made)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    (configuration,) = plans["configurations"]
    asked = {k: made[k] for k in ("trainer", "generated", "spacing", "stock", "own")}
    (folder / "case.json").write_text(json.dumps({**asked, "configuration": configuration}))
    image = make_image(name, made["channels"], made["shape"])
    trainer = make_trainer(made["trainer"], plans, dataset, configuration)
    for fold in range(made["folds"]):
        weights = start_weights(trainer, made, fold)
        best = None
        for pull in (1.0, 0.8, 0.6, 0.4, 0.3, 0.0):
            save_checkpoint(trainer, made, weights, folder / f"fold_{fold}.pth.xz")
            with tempfile.TemporaryDirectory(dir=work) as target:
                mask = some_masks(unpack(name, Path(target)), image, made)
            changed = dict(weights)
            off = balance(changed, mask, made, float(pull))
            if best is None or off < best[0]:
                best = off, weights
            weights = changed
        save_checkpoint(trainer, made, best[1], folder / f"fold_{fold}.pth.xz")


def record(name: str, made: dict, work: Path) -> None:
    """What comes out of a case: arrays beside numbers."""
    file = CASES / name / "case.json"
    told = json.loads(file.read_text())
    image = make_image(name, made["channels"], made["shape"])
    arrays: dict[str, np.ndarray] = {"image": image.astype(np.float16)}
    model = unpack(name, work / "models")
    told["found"] = {}
    for run, asked in made["stock"].items():
        found = run_stock(model, image, made["spacing"], asked)
        arrays |= {f"stock/{run}/{k}": found[k] for k in ("mask", "probabilities")}
    for run, options in made["own"].items():
        found, numbers = run_own(model, image, made["spacing"], {"options": options})
        arrays |= {f"own/{run}/{k}": v for k, v in found.items()}
        told["found"][run] = numbers
    plans, dataset = make_plans(made), make_dataset(made)
    trainer = make_trainer(made["trainer"], plans, dataset, told["configuration"])
    weights = torch.load(model / "fold_0" / CHECKPOINT, weights_only=False)["network_weights"]
    told["labels"] = max(made["labels"].values()) if made["labels"] is not REGIONS else 2
    told["training"] = train_once(trainer, weights, name, told["labels"])
    told["parameters"] = sum(p.numel() for p in trainer.network.parameters())
    file.write_text(json.dumps(told, indent=1))
    np.savez_compressed(CASES / name / "expected.npz", **arrays)
    shares = {k.rsplit("/", 1)[0]: round(float((v > 0).mean()), 3) for k, v in arrays.items() if k.endswith("mask")}
    size = sum(f.stat().st_size for f in (CASES / name).iterdir())
    print(f"{name}: {size} bytes, {told['training']}, foreground {shares}", flush=True)


def main(parts: list[str], results_alone: bool) -> None:
    """Write all, or the parts named on the command line."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        use_checkout(patch, Path(folder))
        for name, made in CASE_LIST.items():
            if not parts or "models" in parts or name in parts:
                if not results_alone:
                    make_model(name, made, Path(folder))
                record(name, made, Path(folder))
        if not parts or "planners" in parts:
            (HERE / "planners.json").write_text(json.dumps({name: planned(name) for name in PLANNERS}, indent=1))
        if not parts or "settings" in parts:
            valid = {
                name: {"trainer": trainer, "section": section, "outcome": outcome(trainer, section)}
                for name, (trainer, section) in VALID.items()
            }
            (HERE / "settings.json").write_text(json.dumps({"valid": valid, "invalid": INVALID}, indent=1))


if __name__ == "__main__":
    main([part for part in sys.argv[1:] if part != "--results"], "--results" in sys.argv)
