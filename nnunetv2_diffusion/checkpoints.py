"""Reading nnU-Net's checkpoints without running code from them."""

import re
import threading
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

_ALLOWING = threading.Lock()  # PyTorch's list of allowed types is one for all threads, and each would empty it


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used here."""


def _safe_types() -> list:
    """What nnU-Net stores in a checkpoint beyond tensors and plain types: numpy scalars of its log."""
    scalar = type(np.float64(0)).__reduce__(np.float64(0))[0]  # numpy's reconstructor, whose module moved in numpy 2
    names = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar")
    dtypes = [type(np.dtype(t)) for t in (np.float16, np.float32, np.float64, np.int32, np.int64, bool)]
    return [*[(scalar, name) for name in names], np.dtype, *dtypes]


def load_checkpoint_file(path: str | Path) -> dict:
    """Read an nnU-Net checkpoint without running code from it; tensors stay on disk until used.

    Args:
        path: a checkpoint written by an nnU-Net trainer.

    Raises:
        CheckpointError: if the file is missing, damaged, or holds more than tensors and plain data.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file, expected a checkpoint")
    try:
        with _ALLOWING, torch.serialization.safe_globals(_safe_types()):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can end in nearly any error of the unpickler
        raise CheckpointError(
            f"{path}: damaged, or holds more than tensors and plain data; it was not loaded ({_reason(error)})"
        ) from error
    if not isinstance(checkpoint, dict) or "network_weights" not in checkpoint:
        raise CheckpointError(f"{path}: no 'network_weights' in it, expected a checkpoint of an nnU-Net trainer")
    return checkpoint


def _reason(error: Exception) -> str:
    """What an unpickler says, without its advice to load the file unsafely."""
    refused = re.search(r"WeightsUnpickler error: (.*?)(?: was not an allowed|\n|$)", str(error))
    if refused:
        return refused[1]
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def check_checkpoint(path: str | Path, trainer_name: str, num_heads: int) -> None:
    """Raise unless a checkpoint was written by this trainer for as many classes.

    Raises:
        CheckpointError: naming what was found and expected.
    """
    checkpoint = load_checkpoint_file(path)
    found = checkpoint.get("trainer_name")
    if found != trainer_name:
        raise CheckpointError(
            f"{path}: written by trainer {found}, expected {trainer_name}. Continue with -tr {found}, or move the file."
        )
    weights = checkpoint["network_weights"]
    heads = next((w for key, w in weights.items() if key.endswith("decoder.seg_layers.0.weight")), None)
    if heads is not None and len(heads) != num_heads:
        raise CheckpointError(
            f"{path}: its network segments {len(heads)} classes or regions, dataset.json defines {num_heads}"
        )


def find_trainer(name: str) -> type[nnUNetTrainer]:
    """The class that ``nnUNetv2_train -tr name`` would use.

    Raises:
        CheckpointError: if nnU-Net does not find it.
    """
    try:
        return recursive_find_trainer_class_by_name(name)
    except RuntimeError as error:
        raise CheckpointError(f"{error}. Type: nnunetv2_diffusion doctor") from error


def build_network(
    trainer_name: str, plans: PlansManager, configuration: ConfigurationManager, dataset_json: dict
) -> nn.Module:
    """The network of a trainer, for prediction, without weights.

    Raises:
        CheckpointError: if nnU-Net does not find the trainer.
    """
    return find_trainer(trainer_name).build_network_architecture(
        plans,
        configuration,
        determine_num_input_channels(plans, configuration, dataset_json),
        plans.get_label_manager(dataset_json).num_segmentation_heads,
        enable_deep_supervision=False,
    )


def checkpoint_network(checkpoint: dict) -> nn.Module:
    """The network of an nnU-Net checkpoint with its weights, on the CPU and in eval mode."""
    arguments = checkpoint["init_args"]
    plans = PlansManager(arguments["plans"])
    configuration = plans.get_configuration(arguments["configuration"])
    network = build_network(checkpoint["trainer_name"], plans, configuration, arguments["dataset_json"])
    network.load_state_dict(checkpoint["network_weights"])
    return network.eval()
