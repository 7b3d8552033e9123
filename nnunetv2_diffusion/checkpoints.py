"""Reading nnU-Net's checkpoints, plans and dataset.json without running code from them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_diffusion.architecture import check_configuration
from nnunetv2_diffusion.files import read_json
from nnunetv2_diffusion.networks.heads import describe_mismatch
from nnunetv2_diffusion.out_of_memory import is_out_of_memory
from nnunetv2_diffusion.plans_content import PlansContentError, check_channels_and_labels, check_plans_content
from nnunetv2_diffusion.removed import removed_trainer
from nnunetv2_diffusion.tensor_files import TensorFileError, check_tensor, read_tensor_file


class CheckpointError(RuntimeError):
    """A checkpoint, or another file of a trained model, cannot be used here."""


def load_checkpoint_file(path: str | Path) -> dict:
    """Read an nnU-Net checkpoint without running code from it; tensors stay on disk until used.

    Args:
        path: a checkpoint written by an nnU-Net trainer.

    Raises:
        CheckpointError: if the file is missing, damaged, or holds more than tensors and plain data.
    """
    if not Path(path).exists():
        raise CheckpointError(f"{path}: no such file, expected a checkpoint")
    try:
        checkpoint = read_tensor_file(path, mmap=True)
    except TensorFileError as error:
        raise CheckpointError(str(error)) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read, {error.strerror}") from None
    if not isinstance(checkpoint, dict) or "network_weights" not in checkpoint:
        raise CheckpointError(f"{path}: no 'network_weights' in it, expected a checkpoint of an nnU-Net trainer")
    weights = checkpoint["network_weights"]
    if not isinstance(weights, Mapping) or not all(isinstance(key, str) for key in weights):
        raise CheckpointError(f"{path}: 'network_weights' is no mapping of names to tensors")
    return checkpoint


def check_weights(weights: Mapping[str, Any], path: str | Path) -> None:
    """Raise unless all weights are dense tensors of finite numbers.

    Raises:
        CheckpointError: with the name of the first one that is not.
    """
    for name, value in weights.items():
        problem = check_tensor(name, value)
        if problem:
            raise CheckpointError(f"{path}: {problem}; the weights cannot be used")


def validated(checkpoint: Mapping[str, Any], path: str | Path) -> dict:
    """A checkpoint, if it describes a model that can be used to predict.

    Args:
        checkpoint: of ``load_checkpoint_file``.
        path: its file, for errors.

    Raises:
        CheckpointError: naming the key, what was found and what was expected.
        UnsupportedArchitectureError: if its plans name or number what is not allowed.
    """
    name, arguments = checkpoint.get("trainer_name"), checkpoint.get("init_args")
    if not isinstance(name, str):
        raise CheckpointError(f"{path}: trainer_name is {name!r}, expected the name of a trainer")
    if not isinstance(arguments, Mapping):
        raise CheckpointError(f"{path}: init_args is {type(arguments).__name__}, expected a mapping")
    for key, kind in (("configuration", str), ("plans", dict), ("dataset_json", dict)):
        if not isinstance(arguments.get(key), kind):
            found = type(arguments[key]).__name__ if key in arguments else "missing"
            raise CheckpointError(f"{path}: init_args.{key} is {found}, expected {kind.__name__}")
    configuration = check_plans(arguments["plans"], arguments["configuration"], arguments["dataset_json"], path)
    dims = len(configuration.patch_size)
    axes = checkpoint.get("inference_allowed_mirroring_axes")
    known = isinstance(axes, list | tuple) and all(isinstance(a, int) and 0 <= a < dims for a in axes)
    if axes is not None and not (known and len(set(axes)) == len(axes)):
        raise CheckpointError(f"{path}: inference_allowed_mirroring_axes is {axes!r}, expected some of 0 .. {dims - 1}")
    check_weights(checkpoint["network_weights"], path)
    return dict(checkpoint)


def check_plans(plans: Any, configuration: str, dataset_json: Any, where: str | Path) -> ConfigurationManager:
    """A configuration of plans, if it and dataset.json can be used to predict.

    Raises:
        CheckpointError: naming the key, what was found and what was expected.
        UnsupportedArchitectureError: if the plans name or number what is not allowed.
    """
    try:
        return check_plans_content(plans, configuration, dataset_json, str(where))
    except PlansContentError as error:
        raise CheckpointError(str(error)) from None


def read_model_json(file: Path) -> dict:
    """plans.json or dataset.json of a trained model.

    Raises:
        CheckpointError: if it is missing, no JSON, or no mapping.
    """
    return read_json(file, CheckpointError, "as nnU-Net writes it, beside the folds of a trained model")


def check_checkpoint(path: str | Path, trainer_name: str, num_heads: int) -> None:
    """Raise unless a checkpoint was written by this trainer for as many classes.

    Raises:
        CheckpointError: naming what was found and expected.
    """
    checkpoint = load_checkpoint_file(path)
    found = checkpoint.get("trainer_name")
    gone = removed_trainer(found)
    if gone:
        raise CheckpointError(f"{path}: {gone}")
    if found != trainer_name:
        raise CheckpointError(
            f"{path}: written by trainer {found}, expected {trainer_name}. Continue with -tr {found}, or move the file."
        )
    weights = checkpoint["network_weights"]
    heads = next((w for key, w in weights.items() if key.endswith("decoder.seg_layers.0.weight")), None)
    if isinstance(heads, torch.Tensor) and heads.ndim and len(heads) != num_heads:
        raise CheckpointError(
            f"{path}: its network segments {len(heads)} classes or regions, dataset.json defines {num_heads}"
        )


def find_trainer(name: str) -> type[nnUNetTrainer]:
    """The class that ``nnUNetv2_train -tr name`` would use.

    Raises:
        CheckpointError: if nnU-Net does not find it, or it was removed.
    """
    gone = removed_trainer(name)
    if gone:
        raise CheckpointError(gone)
    if not re.fullmatch(r"\w+", name):
        raise CheckpointError(f"trainer {name!r}: expected the name of a class")
    try:
        return recursive_find_trainer_class_by_name(name)
    except RuntimeError as error:
        raise CheckpointError(f"{error}. Type: nnunetv2_diffusion doctor") from error
    except (AssertionError, TypeError):  # nnU-Net: something of that name, which is no trainer
        raise CheckpointError(f"trainer {name}: found what is no trainer of nnU-Net") from None


def build_network(
    trainer_name: str, plans: PlansManager, configuration: ConfigurationManager, dataset_json: dict
) -> nn.Module:
    """The network of a trainer, for prediction, without weights.

    Raises:
        CheckpointError: if nnU-Net does not find the trainer, labels or channels cannot be used, or memory is too
            little.
        UnsupportedArchitectureError: if the plans name or number what is not allowed; nothing was imported.
    """
    check_configuration(configuration.configuration, f"plans {plans.plans.get('plans_name', '')}".strip())
    trainer = find_trainer(trainer_name)
    try:
        check_channels_and_labels(dataset_json, "dataset.json")
        channels = determine_num_input_channels(plans, configuration, dataset_json)
        heads = plans.get_label_manager(dataset_json).num_segmentation_heads
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"dataset.json or the plans' label manager cannot be used ({reason})") from error
    try:
        return trainer.build_network_architecture(
            plans,
            configuration,
            channels,
            heads,
            enable_deep_supervision=False,
        )
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise CheckpointError(f"too little memory for the network of {trainer_name} and these plans") from None
        raise


def load_weights(network: nn.Module, weights: Mapping[str, Any], path: str | Path) -> None:
    """Give a network the weights of a file.

    Raises:
        CheckpointError: if they are of another network.
    """
    problem = describe_mismatch(network.state_dict(), weights)
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    try:
        network.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:  # of another kind, as settings in an extra state
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from error


def checkpoint_network(checkpoint: dict, path: str | Path = "checkpoint") -> nn.Module:
    """The network of an nnU-Net checkpoint with its weights, on the CPU and in eval mode.

    Raises:
        CheckpointError, UnsupportedArchitectureError: see ``validated`` and ``build_network``.
    """
    checkpoint = validated(checkpoint, path)
    arguments = checkpoint["init_args"]
    plans = PlansManager(arguments["plans"])
    configuration = plans.get_configuration(arguments["configuration"])
    network = build_network(checkpoint["trainer_name"], plans, configuration, arguments["dataset_json"])
    load_weights(network, checkpoint["network_weights"], path)
    return network.eval()
