"""Trainers, networks and batches as nnU-Net makes them, in folders that vanish afterwards."""

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from laboratory.benchmarking.problem import BenchmarkError, Problem, random_case
from nnunetv2_diffusion.architecture import check_configuration
from nnunetv2_diffusion.checkpoints import CheckpointError, find_trainer
from nnunetv2_diffusion.networks import UnsupportedArchitectureError
from nnunetv2_diffusion.settings import SettingsError

CHECKOUT_TRAINERS = Path(__file__).resolve().parents[3] / "trainers"
SEED = 0
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
WANDB, EXTRA = "nnUNet_wandb_enabled", "nnUNet_extTrainer"


@contextlib.contextmanager
def _quietly(name: str) -> Iterator[None]:
    """Keep nnU-Net off stdout, which is for results, and say which trainer cannot be found or refuses the plans."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except CheckpointError as error:
        raise BenchmarkError(f"--trainers: {error}") from error
    except (SettingsError, UnsupportedArchitectureError) as error:
        raise BenchmarkError(f"{name} cannot use the plans: {error}") from error


@contextlib.contextmanager
def temporary_folders() -> Iterator[Path]:
    """nnU-Net's three folders in a new temporary one; the environment is put back and the folder removed.

    Trainers that nnU-Net itself does not have are those of this checkout.
    """
    before = {name: os.environ.get(name) for name in (*FOLDERS, WANDB, EXTRA)}
    with tempfile.TemporaryDirectory(prefix="nnunetv2_diffusion_benchmark_") as folder:
        try:
            os.environ.update({name: str(Path(folder) / name) for name in FOLDERS})
            os.environ |= {WANDB: "0", EXTRA: before[EXTRA] or str(CHECKOUT_TRAINERS)}  # a benchmark is no experiment
            yield Path(folder)
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def create_trainer(name: str, problem: Problem, device: torch.device) -> nnUNetTrainer:
    """An initialised trainer with network, optimiser and loss; call it within ``temporary_folders``.

    Raises:
        BenchmarkError: if there is no such trainer, or it refuses the plans.
    """
    plans = {**deepcopy(problem.plans), "continue_training": False}  # nnU-Net's command adds the key, trainers pop it
    torch.manual_seed(SEED)
    with _quietly(name):
        configuration = PlansManager(plans).get_configuration(problem.configuration).configuration
        check_configuration(configuration, f"configuration {problem.configuration}")
        trainer = find_trainer(name)(plans, problem.configuration, 0, deepcopy(problem.dataset_json), device)
        folder = Path(trainer.preprocessed_dataset_folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "case.b2nd").touch()  # nnU-Net infers the file format of its cases from the folder
        trainer.initialize()
    if hasattr(trainer, "pretraining_epochs"):
        trainer.pretraining_epochs = 0  # a step of both networks, and not of the segmentor alone
    trainer.network.train()
    return trainer


def build_network(name: str, problem: Problem, device: torch.device) -> nn.Module:
    """A network in eval mode without deep supervision, built as nnU-Net's predictor does; raises as above."""
    plans = PlansManager(deepcopy(problem.plans))
    configuration = plans.get_configuration(problem.configuration)
    torch.manual_seed(SEED)
    with _quietly(name):
        check_configuration(configuration.configuration, f"configuration {problem.configuration}")
        channels = determine_num_input_channels(plans, configuration, problem.dataset_json)
        heads = plans.get_label_manager(problem.dataset_json).num_segmentation_heads
        network = find_trainer(name).build_network_architecture(plans, configuration, channels, heads, False)
    return network.to(device).eval()


def make_batches(trainer: nnUNetTrainer, count: int) -> list[dict]:
    """Batches as nnU-Net's loader hands them out: the same cases for every trainer, its own form of targets."""
    labels = trainer.label_manager
    cascaded = trainer.is_cascaded
    transforms = trainer.get_validation_transforms(  # they make regions and coarser targets
        trainer._get_deep_supervision_scales(), is_cascaded=cascaded, foreground_labels=labels.foreground_labels,
        regions=labels.foreground_regions if labels.has_regions else None, ignore_label=labels.ignore_label,
    )  # fmt: skip
    ignored = [] if labels.ignore_label is None else [labels.ignore_label]
    blobs = [*labels.all_labels[1:], *ignored]
    channels = trainer.num_input_channels - (len(labels.foreground_labels) if cascaded else 0)
    shape = tuple(trainer.configuration_manager.patch_size)
    generator = torch.Generator().manual_seed(SEED)
    batches = []
    for _ in range(count):
        samples = []
        for _ in range(trainer.batch_size):
            image, segmentation = random_case(channels, shape, blobs, generator)
            if cascaded:  # the stage before segmented just the same
                segmentation = torch.cat([segmentation, segmentation])
            samples.append(transforms(image=image, segmentation=segmentation))
        batches.append(_collate(samples))
    return batches


def make_images(problem: Problem, device: torch.device, count: int) -> list[torch.Tensor]:
    """Patches as nnU-Net's predictor hands them to a network: float32 (1, C, *patch) on the device."""
    plans = PlansManager(problem.plans)
    configuration = plans.get_configuration(problem.configuration)
    channels = determine_num_input_channels(plans, configuration, problem.dataset_json)
    generator = torch.Generator().manual_seed(SEED)
    shape = tuple(configuration.patch_size)
    return [random_case(channels, shape, [1], generator)[0][None].to(device) for _ in range(count)]


def describe_problem(problem: Problem, batch: int | None = None) -> dict[str, Any]:
    """The numbers of a problem that decide its cost; batch None stands for the plans' own."""
    plans = PlansManager(problem.plans)
    configuration = plans.get_configuration(problem.configuration)
    return {
        "configuration": problem.configuration,
        "network": configuration.network_arch_class_name.rsplit(".", 1)[-1],
        "patch": list(configuration.patch_size),
        "batch": batch or configuration.batch_size,
        "features": list(configuration.network_arch_init_kwargs["features_per_stage"]),
        "outputs": plans.get_label_manager(problem.dataset_json).num_segmentation_heads,
    }


def _collate(samples: list[dict]) -> dict:
    targets = [s["segmentation"] for s in samples]
    supervised = isinstance(targets[0], list)
    return {
        "data": torch.stack([s["image"] for s in samples]),
        "target": [torch.stack(level) for level in zip(*targets, strict=True)] if supervised else torch.stack(targets),
        "keys": [f"random_{i}" for i in range(len(samples))],
    }
