"""Verbs ``pack`` and ``unpack``: a HiDiff checkpoint with 1-bit weights, and back to one to predict with."""

import argparse
import sys
from pathlib import Path

import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunetv2_diffusion.networks.binary_weights import pack, read_packed, unpack
from nnunetv2_diffusion.training.checks import CheckpointError, load_checkpoint_file

FOR_PREDICTION = ("init_args", "trainer_name", "inference_allowed_mirroring_axes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of both verbs."""
    parser.add_argument("-i", "--input", required=True, type=Path, metavar="FILE", help="checkpoint, or packed file")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="new file")


def run(arguments: argparse.Namespace) -> int:
    """Pack or unpack, as the verb says; 1 with a message if it cannot be done."""
    convert = pack_checkpoint if arguments.verb == "pack" else unpack_checkpoint
    try:
        convert(arguments.input, arguments.output)
    except (CheckpointError, OSError, ValueError) as error:
        print(f"nnunetv2_diffusion {arguments.verb}: {error}", file=sys.stderr)
        return 1
    sizes = [file.stat().st_size / 2**20 for file in (arguments.input, arguments.output)]
    print(f"{arguments.output}: {sizes[1]:.1f} MiB, from {sizes[0]:.1f} MiB")
    return 0


def checkpoint_network(checkpoint: dict) -> nn.Module:
    """The network of an nnU-Net checkpoint with its weights, on the CPU and in eval mode."""
    arguments = checkpoint["init_args"]
    plans = PlansManager(arguments["plans"])
    configuration = plans.get_configuration(arguments["configuration"])
    trainer = recursive_find_trainer_class_by_name(checkpoint["trainer_name"])
    network = trainer.build_network_architecture(
        plans,
        configuration,
        determine_num_input_channels(plans, configuration, arguments["dataset_json"]),
        plans.get_label_manager(arguments["dataset_json"]).num_segmentation_heads,
        enable_deep_supervision=False,
    )
    network.load_state_dict(checkpoint["network_weights"])
    return network.eval()


def pack_checkpoint(source: Path, target: Path) -> None:
    """Write what prediction needs of a checkpoint, binary weights as single bits.

    The predictions are the same, bit for bit. Training cannot be continued from it.

    Raises:
        CheckpointError: if source is no checkpoint that can be used.
        ValueError: if its network has no binary weights.
        FileExistsError: if target exists.
    """
    checkpoint = load_checkpoint_file(source)
    packed = {**pack(checkpoint_network(checkpoint)), **{key: checkpoint.get(key) for key in FOR_PREDICTION}}
    _write_new(packed, target)


def unpack_checkpoint(source: Path, target: Path) -> None:
    """Write a checkpoint for nnU-Net's predictor from what ``pack_checkpoint`` wrote.

    Raises:
        ValueError: if source is not such a file.
        FileExistsError: if target exists.
    """
    packed = read_packed(source)
    try:
        weights = unpack(packed)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    _write_new({"network_weights": weights, **{key: packed[key] for key in FOR_PREDICTION}}, target)


def _write_new(content: dict, target: Path) -> None:
    """Write a file that does not exist, whole or not at all."""
    if target.exists():
        raise FileExistsError(f"{target} exists; it is not overwritten")
    part = target.with_name(target.name + ".part")
    try:
        torch.save(content, part)
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)
