"""Looks at plans, labels and images before hours are spent on them."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnunetv2_diffusion.architecture import check_configuration
from nnunetv2_diffusion.networks import UnsupportedArchitectureError
from nnunetv2_diffusion.networks.denoiser import SUPPORTED
from nnunetv2_diffusion.planning.settings import SettingsError, read_settings


def check_plans(plans: dict, configuration: str, dataset_json: dict) -> None:
    """Raise before anything is written if the settings or the architecture of a configuration cannot be used.

    Raises:
        SettingsError: unknown key or unusable value in the ``diffusion`` section, or an encoding for classes where
            dataset.json has regions.
        UnsupportedArchitectureError: not a PlainConvUNet or ResidualEncoderUNet, or numbers or names that cannot be
            used; nothing was imported.
    """
    plans_manager = PlansManager(plans)
    manager = plans_manager.get_configuration(configuration)
    where = f"configuration {configuration} of {plans.get('plans_name', 'the plans')}"
    settings = read_settings(manager.configuration, where)
    if settings.mask_encoding != "one-hot" and plans_manager.get_label_manager(dataset_json).has_regions:
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


def check_labels(datasets: Iterable[Any], labels: LabelManager, folder: str, show_progress: bool) -> None:
    """Raise if a preprocessed segmentation holds a label that dataset.json does not define.

    nnU-Net would train on (regions) or stop deep inside a CUDA kernel (classes).

    Args:
        datasets: nnU-Net's preprocessed data sets.
        labels: the label manager of plans and dataset.json.
        folder: named in the error.
        show_progress: show a progress bar.

    Raises:
        ValueError: naming the case, the label and the known ones.
    """
    known = {-1, 0, *map(int, labels.all_labels)}  # -1 marks voxels outside of the cropped image
    if labels.ignore_label is not None:
        known.add(int(labels.ignore_label))
    cases = [(dataset, case) for dataset in datasets for case in dataset.identifiers]
    for dataset, case in tqdm(cases, desc="checking labels", disable=not show_progress, leave=False):
        segmentation = dataset.load_case(case)[1]
        unknown = sorted(_label_values(segmentation) - known)
        if unknown:
            raise ValueError(
                f"case {case} in {folder}: the segmentation holds label {unknown[0]}, which dataset.json does not "
                f"define; expected {sorted(known - {-1})}. Correct labelsTr or dataset.json and preprocess again."
            )


def _label_values(segmentation: Any) -> set[int]:
    """Distinct labels of a (1, *spatial) array that may lie on disk, slice by slice."""
    found: set[int] = set()
    for index in range(segmentation.shape[1]):
        values = np.asarray(segmentation[0, index]).astype(np.int64).ravel()
        low = int(values.min())
        found.update(int(v) + low for v in np.flatnonzero(np.bincount(values - low)))
    return found


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
