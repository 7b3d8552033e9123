"""What is benchmarked: plans, made up or read from files, and random cases that fit them."""

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from laboratory.files import read_keys
from nnunetv2_diffusion.settings import SECTION, merge_settings

REFERENCE_SHAPES = {3: ((40, 56, 40), 9), 2: ((56, 40), 366)}  # nnU-Net's own plans for Task04_Hippocampus
MAX_FEATURES = {3: 320, 2: 512}  # as nnU-Net's planner
RESENC_BLOCKS = (1, 3, 4, 6, 6, 6)


class BenchmarkError(ValueError):
    """An option or a file cannot be used; the message names it, what was found and what was expected."""


@dataclass(frozen=True)
class Problem:
    """Plans, the name of one of their configurations, and dataset.json, as nnU-Net's trainers take them."""

    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]


def synthetic_problem(
    dim: int = 3,
    patch: tuple[int, ...] | None = None,
    batch: int | None = None,
    base_features: int = 32,
    classes: int = 3,
    stages: int = 4,
    resenc: bool = False,
) -> Problem:
    """Plans in the style of nnU-Net's planner; the defaults are its plans for Task04_Hippocampus.

    Classes count the background; channels, ``base_features`` in the first stage, double up to nnU-Net's limit.
    BenchmarkError if a number is out of range or the patch has another number of axes than dim.
    """
    patch, batch = patch or REFERENCE_SHAPES[dim][0], batch or REFERENCE_SHAPES[dim][1]
    if len(patch) != dim or min(patch) < 4:
        raise BenchmarkError(f"--patch is {'x'.join(map(str, patch))}, expected {dim} sizes of at least 4 voxels")
    if classes < 2:
        raise BenchmarkError(f"--classes is {classes}, expected at least 2: background and one more")
    if not 2 <= stages <= len(RESENC_BLOCKS):
        raise BenchmarkError(f"--stages is {stages}, expected 2 .. {len(RESENC_BLOCKS)}")
    name = "3d_fullres" if dim == 3 else "2d"
    configuration = {
        "data_identifier": f"nnUNetPlans_{name}", "batch_size": batch, "patch_size": list(patch),
        "spacing": [1.0] * dim, "normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False],
        "architecture": _architecture(dim, patch, base_features, stages, resenc), "batch_dice": dim == 2,
    }  # fmt: skip
    plans = {
        "dataset_name": "Dataset999_Benchmark", "plans_name": "nnUNetPlans", "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2], "configurations": {name: configuration}, "label_manager": "LabelManager",
    }  # fmt: skip
    labels = {"background": 0, **{f"class_{i}": i for i in range(1, classes)}}
    dataset_json = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": 0, "file_ending": ".nii.gz"}
    return Problem(plans, name, dataset_json)


def _architecture(dim: int, patch: tuple[int, ...], base_features: int, stages: int, resenc: bool) -> dict[str, Any]:
    blocks = {"n_blocks_per_stage": list(RESENC_BLOCKS[:stages])} if resenc else {"n_conv_per_stage": [2] * stages}
    name = "ResidualEncoderUNet" if resenc else "PlainConvUNet"
    kwargs = {
        "n_stages": stages, "kernel_sizes": [[3] * dim for _ in range(stages)], "strides": _strides(patch, stages),
        "features_per_stage": [min(base_features * 2**i, MAX_FEATURES[dim]) for i in range(stages)],
        "n_conv_per_stage_decoder": [1 if resenc else 2] * (stages - 1), **blocks,
        "conv_op": f"torch.nn.modules.conv.Conv{dim}d", "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True}, "dropout_op": None, "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
        "arch_kwargs": kwargs,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def _strides(patch: tuple[int, ...], stages: int) -> list[list[int]]:
    """Halve every axis that is even and stays at 4 voxels or more, nnU-Net's smallest feature map."""
    size, strides = list(patch), [[1] * len(patch)]
    for _ in range(stages - 1):
        strides.append([2 if s % 2 == 0 and s >= 8 else 1 for s in size])
        size = [s // k for s, k in zip(size, strides[-1], strict=True)]
    return strides


def read_problem(plans: Path, configuration: str, dataset_json: Path, batch: int | None = None) -> Problem:
    """Real plans, as nnU-Net wrote them; ``batch`` replaces their batch size. BenchmarkError names what is missing."""
    read = read_keys(plans, BenchmarkError, ("dataset_name", "plans_name", "configurations"))
    if configuration not in read["configurations"]:
        known = ", ".join(read["configurations"])
        raise BenchmarkError(f"{plans}: no configuration {configuration!r}, expected one of {known}")
    if batch is not None:
        read["configurations"][configuration]["batch_size"] = batch
    return Problem(read, configuration, read_keys(dataset_json, BenchmarkError, ("labels",)))


def with_settings(problem: Problem, settings: dict[str, Any]) -> Problem:
    """The same plans with diffusion settings beside those that they have."""
    plans = deepcopy(problem.plans)
    configuration = plans["configurations"][problem.configuration]
    configuration[SECTION] = merge_settings(configuration.get(SECTION, {}), settings)
    return replace(problem, plans=plans)


def random_case(
    channels: int, shape: tuple[int, ...], labels: list[int], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """One blob a label in noise: image float32 (C, *shape), about standard normal, and labels int16 (1, *shape)."""
    grid = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, s) for s in shape], indexing="ij"))
    segmentation = torch.zeros(1, *shape, dtype=torch.int16)
    for label in labels:
        centre = 0.2 + 0.6 * torch.rand(len(shape), generator=generator)
        radius = 0.1 + 0.2 * torch.rand(1, generator=generator)
        distance = (grid - centre.view(-1, *[1] * len(shape))).square().sum(0).sqrt()
        segmentation[0][distance < radius] = label
    image = torch.randn(channels, *shape, generator=generator) + segmentation.float() / max(labels)
    return image, segmentation
