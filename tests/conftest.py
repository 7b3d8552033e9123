"""What all tests share: seeds, golden values and tiny networks as nnU-Net plans them."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunetv2_diffusion.diffusion import GaussianDiffusion, linear_beta_schedule
from nnunetv2_diffusion.networks import DiffusionUNet
from nnunetv2_diffusion.sampling import SamplingConfig

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Geometry:
    """Kernels and strides of three stages, and a patch that they divide; its axes are odd where strides allow it."""

    kernel_sizes: tuple
    strides: tuple
    patch: tuple

    @property
    def dims(self) -> int:
        return len(self.patch)


GEOMETRIES = {
    "2d": Geometry(((3, 3),) * 3, ((1, 1), (2, 2), (2, 2)), (16, 20)),
    "2d_anisotropic": Geometry(((3, 3),) * 3, ((1, 1), (2, 1), (2, 1)), (20, 7)),
    "3d": Geometry(((3, 3, 3),) * 3, ((1, 1, 1), (2, 2, 2), (2, 2, 2)), (8, 12, 16)),
    "3d_anisotropic": Geometry(((1, 3, 3), (3, 3, 3), (3, 3, 3)), ((1, 1, 1), (1, 2, 2), (1, 2, 2)), (5, 12, 20)),
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    """Every test starts from the same random state and leaves that of others alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, torch.Tensor]]:
    """Load a file of golden values: name -> its arrays as tensors, as stored (channels-last)."""

    def load(name: str) -> dict[str, torch.Tensor]:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    return load


@pytest.fixture(scope="session")
def geometries() -> dict[str, Geometry]:
    """Names of geometries -> their kernels, strides and patch."""
    return GEOMETRIES


@pytest.fixture(scope="session")
def make_unet() -> Callable[..., nn.Module]:
    """Build an initialised stock network: (architecture, geometry, ...) -> PlainConvUNet or ResidualEncoderUNet."""

    def make(
        architecture: str = "plain",
        geometry: str = "2d",
        in_channels: int = 1,
        classes: int = 3,
        features: tuple[int, ...] = (8, 16, 24),
        deep_supervision: bool = True,
        **kwargs: Any,
    ) -> nn.Module:
        shape = GEOMETRIES[geometry]
        stages = len(features)
        settings = {
            "n_stages": stages,
            "features_per_stage": list(features),
            "conv_op": nn.Conv2d if shape.dims == 2 else nn.Conv3d,
            "kernel_sizes": [list(k) for k in shape.kernel_sizes[:stages]],
            "strides": [list(s) for s in shape.strides[:stages]],
            "n_conv_per_stage_decoder": [1] * (stages - 1),
            "conv_bias": True,
            "norm_op": nn.InstanceNorm2d if shape.dims == 2 else nn.InstanceNorm3d,
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "nonlin": nn.LeakyReLU,
            "nonlin_kwargs": {"inplace": True},
            "deep_supervision": deep_supervision,
        }
        settings |= kwargs
        if architecture == "plain":
            unet = PlainConvUNet(in_channels, num_classes=classes, n_conv_per_stage=[2] * stages, **settings)
        else:
            unet = ResidualEncoderUNet(
                in_channels, num_classes=classes, n_blocks_per_stage=[1] + [2] * (stages - 1), **settings
            )
        unet.apply(unet.initialize)
        return unet

    return make


@pytest.fixture(scope="session")
def wake() -> Callable[[nn.Module], nn.Module]:
    """Give additions that start at zero random weights, so that mask, time and transformer reach the output."""

    def shake(network: nn.Module, size: float = 0.2) -> nn.Module:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(size * parameter.abs().mean().clamp(min=0.2) * torch.randn_like(parameter))
        return network

    return shake


@pytest.fixture(scope="session")
def make_segmentor(make_unet: Callable[..., nn.Module]) -> Callable[..., DiffusionUNet]:
    """Build a segmentor around a tiny 2D network; deep supervision off, as nnU-Net has it to predict."""

    def make(
        classes: int = 3,
        timesteps: int = 1001,
        steps: int = 5,
        sampler: str = "ddpm",
        samples: int = 1,
        seed: int = 0,
        eta: float = 0.0,
        step_spacing: str = "linspace",
        cls: type[DiffusionUNet] = DiffusionUNet,
        unet: dict | None = None,
        **kwargs: Any,
    ) -> DiffusionUNet:
        return cls(
            make_unet(classes=classes, **{"deep_supervision": False, **(unet or {})}),
            GaussianDiffusion(linear_beta_schedule(timesteps)),
            SamplingConfig(steps, sampler, eta, samples, seed, step_spacing),
            classes,
            **kwargs,
        )

    return make


@pytest.fixture(scope="session")
def trained() -> GaussianDiffusion:
    """The chain of the paper: T = 1001, betas 1e-4 .. 0.02."""
    return GaussianDiffusion(linear_beta_schedule(1001))


# ---- trainers of a tiny data set that has no cases: for their losses and networks, without nnU-Net's loaders

TRAINER_PATCH = (8, 12, 8)
TRAINER_DATASET = {
    "channel_names": {"0": "MR"},
    "labels": {"background": 0, "left part": 1, "right part": 2},
    "file_ending": ".nii.gz",
    "numTraining": 2,
}


@pytest.fixture(scope="session")
def preprocessed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with the name of a case, from which nnU-Net tells how cases are stored."""
    root = tmp_path_factory.mktemp("project")
    for kind in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (root / kind).mkdir()
    folder = root / "nnUNet_preprocessed" / "Dataset903_Random"
    (folder / "only").mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(TRAINER_DATASET))
    (folder / "only" / "case.npz").touch()
    return root


@pytest.fixture
def make(preprocessed: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Build and initialize a trainer: (class, --c, settings); patches are 8 x 12 x 8, with two classes."""
    sys.path.insert(0, str(Path(__file__).parent / "inference"))
    from tiny_model import make_plans  # nnU-Net takes seconds to import, and most tests do without it

    for kind in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setitem(os.environ, kind, str(preprocessed / kind))

    def build(cls: Any, continue_training: bool = False, **settings: object) -> Any:
        for log in (preprocessed / "nnUNet_results").rglob("training_log_*"):
            log.unlink()  # their names tell seconds: two trainers of one would share a file
        plans = make_plans(TRAINER_PATCH, [1.0] * len(TRAINER_PATCH), **settings)
        plans["continue_training"] = continue_training
        torch.manual_seed(1)
        trainer = cls(plans, "only", "all", TRAINER_DATASET, torch.device("cpu"))
        trainer.initialize()
        return trainer

    return build
