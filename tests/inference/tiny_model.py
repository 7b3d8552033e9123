"""Folders of trained models with tiny random networks, made without training."""

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813, its usual name
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_diffusion.checkpoints import build_network

CLASSES = {"background": 0, "left part": 1, "right part": 2}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2}


def architecture(dims: int) -> dict:
    norm = f"torch.nn.modules.instancenorm.InstanceNorm{dims}d"
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [4, 8, 8],
            "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
            "kernel_sizes": [[3] * dims] * 3,
            "strides": [[1] * dims, [2] * dims, [2] * dims],
            "n_conv_per_stage": [1] * 3,
            "n_conv_per_stage_decoder": [1] * 2,
            "conv_bias": True,
            "norm_op": norm,
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def make_plans(patch, spacing, reader="SimpleITKIO", channels=1, **diffusion) -> dict:
    """Plans with one configuration, "only", of as many dimensions as the patch has."""
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    only = {
        "data_identifier": "only",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch),
        "median_image_size_in_voxels": list(patch),
        "spacing": list(spacing),
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "architecture": architecture(len(patch)),
        "batch_dice": False,
        "diffusion": {"hidiff": {"refiner_width": 4, "steps": 3}, **diffusion},
    }
    for kind in ("data", "seg", "probabilities"):
        only[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
        only[f"resampling_fn_{kind}_kwargs"] = {**resampling, "is_seg": kind == "seg"}
    return {
        "dataset_name": "Dataset903_Random",
        "plans_name": "tiny",
        "original_median_spacing_after_transp": [1.0] * 3,
        "original_median_shape_after_transp": [20] * 3,
        "image_reader_writer": reader,
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(number): {} for number in range(channels)},
        "configurations": {"only": only},
    }


def make_model(
    folder: Path,
    trainer: str = "nnUNetTrainerRecycleXT",
    patch=(8, 12, 8),
    spacing=(1.0, 1.0, 1.0),
    regions: bool = False,
    folds: int = 1,
    ending: str = ".nii.gz",
    reader: str = "SimpleITKIO",
    channels: int = 1,
    **diffusion,
) -> Path:
    """Write plans.json, dataset.json and a checkpoint with random weights for each fold; returns the folder."""
    plans = make_plans(patch, spacing, reader, channels, **diffusion)
    names = {str(number): ("MR", "R", "G", "B")[number] for number in range(channels)}
    dataset = {"channel_names": names, "labels": REGIONS if regions else CLASSES, "file_ending": ending}
    if regions:
        dataset["regions_class_order"] = [1, 2]
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    for fold in range(folds):
        manager = PlansManager(plans)
        network = build_network(trainer, manager, manager.get_configuration("only"), dataset)
        generator = torch.Generator().manual_seed(fold)
        with torch.no_grad():
            for parameter in network.parameters():
                size = 0.3 * parameter.abs().mean().clamp(min=0.3)
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
        if hasattr(network, "sigmoid"):
            network.sigmoid = regions
        checkpoint = {
            "network_weights": network.state_dict(),
            "trainer_name": trainer,
            "init_args": {"configuration": "only", "plans": plans, "dataset_json": dataset},
            "inference_allowed_mirroring_axes": tuple(range(len(patch))),
        }
        (folder / f"fold_{fold}").mkdir()
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


def write_images(folder: Path, cases: int = 2, shape=(10, 15, 9), spacing=(1.0, 1.0, 1.0), direction=None) -> Path:
    """Smooth random volumes, (z, y, x); spacing as SimpleITK gives it, (x, y, z)."""
    folder.mkdir(parents=True)
    for index in range(cases):
        rng = np.random.default_rng(index)
        image = sitk.GetImageFromArray(rng.normal(size=shape).astype(np.float32) + np.linspace(-2, 2, shape[-1]))
        image = sitk.Cast(image, sitk.sitkFloat32)
        image.SetSpacing(spacing)
        image.SetOrigin((11.0, -7.5, 3.25))
        if direction is not None:
            image.SetDirection(direction)
        sitk.WriteImage(image, str(folder / f"case_{index}_0000.nii.gz"))
    return folder
