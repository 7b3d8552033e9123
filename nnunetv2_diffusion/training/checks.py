"""Looks at plans, labels and images before hours are spent on them."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_diffusion.architecture import check_configuration
from nnunetv2_diffusion.networks import UnsupportedArchitectureError
from nnunetv2_diffusion.networks.denoiser import SUPPORTED
from nnunetv2_diffusion.plans_content import check_transposes, foreground_labels
from nnunetv2_diffusion.settings import SettingsError, read_settings
from nnunetv2_diffusion.training.label_scan import scan_labels


def check_plans(plans: dict, configuration: str, dataset_json: dict) -> None:
    """Raise before anything is written if the settings or the architecture of a configuration cannot be used.

    Raises:
        SettingsError: unknown key or unusable value in the ``diffusion`` section, or an encoding for classes where
            dataset.json has regions.
        ValueError: classes are not numbered 0, 1, 2, ...
        PlansContentError: transpose_backward does not undo transpose_forward.
        UnsupportedArchitectureError: not a PlainConvUNet or ResidualEncoderUNet, or numbers or names that cannot be
            used; nothing was imported.
    """
    plans_manager = PlansManager(plans)
    manager = plans_manager.get_configuration(configuration)
    where = f"configuration {configuration} of {plans.get('plans_name', 'the plans')}"
    settings = read_settings(manager.configuration, where)
    labels = plans_manager.get_label_manager(dataset_json)
    check_label_numbers(labels)
    if settings.mask_encoding != "one-hot" and labels.has_regions:
        raise SettingsError(
            f"{where}: mask_encoding is {settings.mask_encoding!r}, expected 'one-hot': dataset.json defines regions, "
            "which overlap and have no class numbers to write in bits"
        )
    name = manager.network_arch_class_name.rsplit(".", 1)[-1]
    supported = [c.__name__ for c in SUPPORTED]
    if name not in supported:
        raise UnsupportedArchitectureError(
            f"{where}: the network is {manager.network_arch_class_name}, the diffusion trainers support "
            f"{' and '.join(supported)}. Plan with a stock nnU-Net planner and pass its plans with -p."
        )
    check_configuration(manager.configuration, where)
    check_transposes(plans, where)


def check_label_numbers(labels: LabelManager) -> None:
    """Raise if classes are not numbered 0, 1, 2, ...: a class's number is its place in the network's output.

    Regions are not concerned, they have no number of their own.

    Raises:
        ValueError: with nnU-Net's words of ``--verify_dataset_integrity``.
    """
    if labels.has_regions:
        return
    numbers = [int(n) for n in labels.all_labels] + ([int(labels.ignore_label)] if labels.has_ignore_label else [])
    wrong = [n for before, n in itertools.pairwise(numbers) if n != before + 1]
    if wrong:
        raise ValueError(
            f"Labels must be in consecutive order (0, 1, 2, ...). The labels {wrong} do not satisfy this restriction. "
            f"dataset.json has {numbers}: renumber it and the files in labelsTr, then plan and preprocess again."
        )


def check_labels(
    datasets: Iterable[Any], labels: LabelManager, folder: str, show_progress: bool, cache: Path | None = None
) -> dict[str, set[int]]:
    """Raise if a preprocessed segmentation holds a label that dataset.json does not define.

    nnU-Net would train on (regions) or stop deep inside a CUDA kernel (classes).

    Args:
        datasets: nnU-Net's preprocessed data sets.
        labels: the label manager of plans and dataset.json.
        folder: named in the error.
        show_progress: show a progress bar.
        cache: see ``scan_labels``.

    Returns:
        labels of every case.

    Raises:
        ValueError: naming the case, the label and the known ones.
    """
    known = {-1, 0, *map(int, labels.all_labels)}  # -1 marks voxels outside of the cropped image
    if labels.ignore_label is not None:
        known.add(int(labels.ignore_label))
    found = scan_labels(datasets, show_progress, cache)
    for case, values in found.items():
        unknown = sorted(values - known)
        if unknown:
            raise ValueError(
                f"case {case} in {folder}: the segmentation holds label {unknown[0]}, which dataset.json does not "
                f"define; expected {sorted(known - {-1})}. Correct labelsTr or dataset.json and preprocess again."
            )
    return found


def absent_classes(found: Iterable[set[int]], labels: LabelManager, folder: str) -> list[str]:
    """Names of classes or regions that none of the cases has.

    Args:
        found: labels of each training case.
        labels: the label manager of plans and dataset.json.
        folder: named in the error.

    Raises:
        ValueError: if there is no foreground in any case.
    """
    present, foreground = set().union(*found), foreground_labels({"labels": labels.label_dict})
    absent = [name for name, values in foreground.items() if not present & set(values)]
    if len(absent) == len(foreground):
        raise ValueError(
            f"no training case in {folder} has any foreground: the labels there are {sorted(present - {-1})}, expected "
            f"some of {labels.label_dict}. Check labelsTr, and the fold's split in splits_final.json."
        )
    return absent


def never_found(dice: Sequence[Sequence[float]], names: Sequence[str]) -> list[str]:
    """Names of classes whose Dice was 0, or not defined, in every epoch.

    Args:
        dice: of each epoch and class or region, NaN where neither truth nor prediction had it.
        names: of the classes or regions.
    """
    if not len(dice):
        return []
    best = np.nan_to_num(np.asarray(dice, dtype=float)).max(0)
    return [name for name, value in zip(names, best, strict=False) if not value > 0]


def check_images(batch: dict, images: torch.Tensor) -> None:
    """Raise if images of a batch are not finite.

    Args:
        batch: nnU-Net's batch; ``keys`` names the cases.
        images: (B, C, *spatial).

    Raises:
        ValueError: naming the cases.
    """
    bad = ~torch.isfinite(images).flatten(1).all(1)
    if bad.any():
        cases = [str(case) for case, is_bad in zip(batch["keys"], bad.tolist(), strict=True) if is_bad]
        raise ValueError(
            f"the preprocessed image of case {', '.join(cases)} holds NaN or infinite values, expected finite ones. "
            "Check the input image with nnUNetv2_plan_and_preprocess --verify_dataset_integrity and preprocess again."
        )
