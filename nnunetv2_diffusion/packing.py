"""Verbs ``pack`` and ``unpack``: a HiDiff checkpoint with 1-bit weights, and back to one to predict with."""

import argparse
import sys
from pathlib import Path

import torch

from nnunetv2_diffusion.checkpoints import CheckpointError, checkpoint_network, load_checkpoint_file
from nnunetv2_diffusion.networks import UnsupportedArchitectureError
from nnunetv2_diffusion.networks.binary_weights import pack, read_packed, unpack

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
    except (CheckpointError, UnsupportedArchitectureError, OSError, ValueError) as error:
        print(f"nnunetv2_diffusion {arguments.verb}: {error}", file=sys.stderr)
        return 1
    sizes = [file.stat().st_size / 2**20 for file in (arguments.input, arguments.output)]
    print(f"{arguments.output}: {sizes[1]:.1f} MiB, from {sizes[0]:.1f} MiB")
    return 0


def pack_checkpoint(source: Path, target: Path) -> None:
    """Write what prediction needs of a checkpoint, binary weights as single bits.

    The predictions are the same, bit for bit. Training cannot be continued from it.

    Raises:
        CheckpointError: if source is no checkpoint that can be used.
        ValueError: if its network has no binary weights.
        FileExistsError: if target exists.
    """
    checkpoint = load_checkpoint_file(source)
    network = checkpoint_network(checkpoint, source)
    try:
        bits = pack(network)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    packed = {**bits, **{key: checkpoint.get(key) for key in FOR_PREDICTION}}
    write_new(packed, target)


def unpack_checkpoint(source: Path, target: Path) -> None:
    """Write a checkpoint for nnU-Net's predictor from what ``pack_checkpoint`` wrote.

    Raises:
        ValueError: if source is not such a file, or damaged.
        CheckpointError: if its weights are not those of the network that its plans describe.
        FileExistsError: if target exists.
    """
    packed = read_packed(source)
    try:
        weights = unpack(packed)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    checkpoint = {"network_weights": weights, **{key: packed.get(key) for key in FOR_PREDICTION}}
    checkpoint_network(checkpoint, source)  # raises unless it fits
    write_new(checkpoint, target)


def write_new(content: dict, target: Path) -> None:
    """Write a file that does not exist, whole or not at all."""
    if target.exists():
        raise FileExistsError(f"{target} exists; it is not overwritten")
    part = target.with_name(target.name + ".part")
    try:
        torch.save(content, part)
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)
