"""Storage of a binarised network with one bit for each binary weight.

Of a binary weight only the signs and one scale for each output channel are used. They are kept exactly: a network that
is read back gives the same outputs, bit for bit. What is lost are the real-valued weights behind the signs, which
further training would need.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnunetv2_diffusion.networks.binary import BinaryConv, sign_and_scale
from nnunetv2_diffusion.tensor_files import TensorFileError, check_tensor, read_tensor_file

FORMAT = "nnunetv2_diffusion 1-bit weights, version 1"
POWERS = (1, 2, 4, 8, 16, 32, 64, 128)


def _binary_layers(module: nn.Module) -> dict[str, BinaryConv]:
    """Name of the weight in the state dict -> its layer."""
    prefixes = {name: f"{name}." if name else "" for name, _ in module.named_modules()}
    return {f"{prefixes[name]}weight": layer for name, layer in module.named_modules() if isinstance(layer, BinaryConv)}


def _pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """Bool of any shape -> uint8, 8 to a byte, the first one in the lowest bit; the last byte is filled with zeros."""
    flat = nn.functional.pad(bits.flatten().to(torch.uint8), (0, -bits.numel() % 8))
    return (flat.view(-1, 8) * torch.tensor(POWERS, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def _unpack_bits(packed: torch.Tensor, shape: list[int]) -> torch.Tensor:
    powers = torch.tensor(POWERS, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, None] & powers) > 0
    return bits.flatten()[: torch.Size(shape).numel()].view(shape)


def pack(module: nn.Module) -> dict[str, Any]:
    """State of a module with binary weights in one bit each.

    Returns:
        format: what this is; real: the state dict without binary weights; binary: name -> signs (uint8, 8 to a byte),
        scale (out,) and shape. Tensors are copies on the CPU.

    Raises:
        ValueError: the module has no binary layer.
    """
    layers = _binary_layers(module)
    if not layers:
        raise ValueError(f"{type(module).__name__} has no binary layer; expected a binarised network")
    binary = {}
    for name, layer in layers.items():
        positive, scale = sign_and_scale(layer.weight, layer.centred)
        binary[name] = {"signs": _pack_bits(positive).cpu(), "scale": scale.cpu(), "shape": list(positive.shape)}
    state = module.state_dict()
    real = {name: value.detach().cpu().clone() for name, value in state.items() if name not in layers}
    return {"format": FORMAT, "real": real, "binary": binary}


def check_packed(packed: Any) -> None:
    """Raise unless something is what pack returns: sizes agree and all numbers are finite.

    Raises:
        ValueError: naming the key, what was found and what was expected.
    """
    found = packed.get("format") if isinstance(packed, dict) else type(packed).__name__
    if found != FORMAT:
        raise ValueError(f"format is {found!r}; expected {FORMAT!r}")
    for key in ("real", "binary"):
        if not isinstance(packed.get(key), Mapping) or not all(isinstance(name, str) for name in packed[key]):
            raise ValueError(f"{key} is {type(packed.get(key)).__name__}; expected a mapping of names")
    problems = [check_tensor(name, value) for name, value in packed["real"].items()]
    problems += [_layer_problem(name, parts) for name, parts in packed["binary"].items()]
    problems += [f"{name} is both real and binary" for name in packed["binary"] if name in packed["real"]]
    first = next((problem for problem in problems if problem), None)
    if first:
        raise ValueError(f"{first}; expected what pack returns")


def _layer_problem(name: str, parts: Any) -> str | None:
    """What is wrong with the signs, scale and shape of a binary weight; None if nothing."""
    if not isinstance(parts, Mapping) or not {"signs", "scale", "shape"} <= set(parts):
        return f"{name} has no signs, scale and shape"
    signs, scale, shape = parts["signs"], parts["scale"], parts["shape"]
    problem = check_tensor(f"signs of {name}", signs) or check_tensor(f"scale of {name}", scale)
    if problem:
        return problem
    if not isinstance(shape, list | tuple) or len(shape) < 2 or not all(type(n) is int and n >= 1 for n in shape):
        return f"shape of {name} is {str(shape)[:100]}"
    if signs.dtype != torch.uint8 or signs.shape != (-(-math.prod(shape) // 8),):
        return f"signs of {name} are {tuple(signs.shape)} of {signs.dtype}, not one bit for each of {shape}"
    if not scale.is_floating_point() or scale.shape != (shape[0],) or bool((scale < 0).any()):
        return (
            f"scale of {name} is {tuple(scale.shape)} of {scale.dtype}, not one number from 0 on for each of {shape[0]}"
        )
    return None


def unpack(packed: dict[str, Any]) -> dict[str, torch.Tensor]:
    """State dict from what pack returned: a binary weight is its scale times its sign, which binarises to itself.

    Raises:
        ValueError: it is not what pack returns.
    """
    check_packed(packed)
    state = dict(packed["real"])
    for name, parts in packed["binary"].items():
        positive = _unpack_bits(parts["signs"], parts["shape"])
        scale = parts["scale"].view(-1, *[1] * (len(parts["shape"]) - 1))
        state[name] = torch.where(positive, scale, -scale)
    return state


def save_packed(module: nn.Module, path: str | Path) -> None:
    """Write a module with binary weights in one bit each.

    Raises:
        FileExistsError: there is such a file already.
        ValueError: the module has no binary layer.
    """
    packed = pack(module)
    with open(path, "xb") as file:
        torch.save(packed, file)


def read_packed(path: str | Path) -> Any:
    """Content of a file of tensors and plain data.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged, or holds more.
    """
    try:
        return read_tensor_file(path)
    except TensorFileError as error:
        raise TensorFileError(f"{error}; expected a file that save_packed wrote") from None


def load_packed(module: nn.Module, path: str | Path) -> None:
    """Read what save_packed wrote into a module of the same architecture.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind or of another architecture; the module is as before.
    """
    packed = read_packed(path)
    try:
        state = unpack(packed)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: {error}; expected a file that save_packed wrote") from error
    other = sorted(set(packed["binary"]) ^ set(_binary_layers(module)))
    if other:
        raise ValueError(f"{path}: {other[0]} is binary in one of file and network; expected in both")
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(f"{path}: {name} has shape {found.get(name)}; expected {expected.get(name)}")
    module.load_state_dict(state)
