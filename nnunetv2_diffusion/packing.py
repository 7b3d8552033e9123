"""Verbs ``pack`` and ``unpack``: a HiDiff checkpoint with 1-bit weights, and back to one to predict with."""

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nnunetv2_diffusion.checkpoints import CheckpointError, checkpoint_network, load_checkpoint_file
from nnunetv2_diffusion.files import check_target, written_whole
from nnunetv2_diffusion.networks import UnsupportedArchitectureError
from nnunetv2_diffusion.networks.binary_weights import pack, read_packed, unpack

FOR_PREDICTION = ("init_args", "trainer_name", "inference_allowed_mirroring_axes")


EXAMPLES = """
nnunetv2_diffusion pack -i fold_0/checkpoint_final.pth -o packed.pth
nnunetv2_diffusion unpack -i packed.pth -o fold_0/checkpoint_final.pth
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of both verbs."""
    parser.add_argument(
        "-i",
        "--input",
        required=True,
        type=Path,
        metavar="FILE",
        help="Checkpoint of a HiDiff model, or for unpack a packed file.",
    )
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="New file.")


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

    The predictions are the same, bit for bit. Training cannot be continued from it. What it saves is printed first.

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
    print("\n".join(what_it_saves(bits)), flush=True)
    packed = {**bits, **{key: checkpoint.get(key) for key in FOR_PREDICTION}}
    write_new(packed, target)


def what_it_saves(packed: Mapping[str, Any]) -> list[str]:
    """Sizes of weights by what becomes of them, a line each; an optimiser's state in a checkpoint is not counted.

    Args:
        packed: of ``networks.binary_weights.pack``.
    """
    signs = sum(math.prod(layer["shape"]) for layer in packed["binary"].values())
    bits = sum(_mib(layer["signs"]) + _mib(layer["scale"]) for layer in packed["binary"].values())
    real = dict.fromkeys(("refiner", "segmentor"), 0.0)
    for name, value in packed["real"].items():
        part = "segmentor" if name.startswith("segmentor.") else "refiner"
        real[part] += _mib(value)
    before = 4 * signs / 2**20
    whole, rest = before + sum(real.values()), bits + sum(real.values())
    return [
        f"{signs:,} binary weights: {before:.2f} MiB become {bits:.2f} MiB",
        f"as they are: {real['refiner']:.2f} MiB of the refiner, {real['segmentor']:.2f} MiB of the segmentor",
        f"together {rest:.2f} MiB instead of {whole:.2f} MiB, {100 * (1 - rest / whole):.1f} % less",
    ]


def _mib(value: Any) -> float:
    return value.numel() * value.element_size() / 2**20 if isinstance(value, torch.Tensor) else 0.0


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
    check_target(target)
    with written_whole(target) as part:
        torch.save(content, part)
