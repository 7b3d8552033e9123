"""What plans may name and number: checked before anything that they name is imported, or built.

nnU-Net imports every name that the architecture in plans gives and calls it with the arguments that stand beside it.
Plans come with models from elsewhere, also within checkpoints, so only names of a list are taken, and numbers in
bounds.
"""

import inspect
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunetv2_diffusion.networks.denoiser import UnsupportedArchitectureError
from nnunetv2_diffusion.settings import ALLOW

_ARCHITECTURES = "dynamic_network_architectures.architectures"
NETWORKS = {
    f"{_ARCHITECTURES}.unet.PlainConvUNet": PlainConvUNet,
    f"{_ARCHITECTURES}.unet.ResidualEncoderUNet": ResidualEncoderUNet,
    f"{_ARCHITECTURES}.residual_unet.ResidualEncoderUNet": ResidualEncoderUNet,  # of plans that nnU-Net converts
}
# what may be an operator -> modules of torch.nn.modules with the classes for it
OPERATORS = {
    "conv_op": ("conv",),
    "norm_op": ("batchnorm", "instancenorm", "normalization"),
    "dropout_op": ("dropout",),
    "nonlin": ("activation",),
}
CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")  # nnU-Net tells the dimensions by them
GIVEN_BY_THE_HOST = ("self", "input_channels", "num_classes", "deep_supervision")
LISTS = {  # a number for each stage, or one for all; and what it may be
    "features_per_stage": (1, 8192),
    "n_conv_per_stage": (1, 64),
    "n_blocks_per_stage": (1, 64),
    "n_conv_per_stage_decoder": (1, 64),
    "kernel_sizes": (1, 31),
    "strides": (1, 16),
    "bottleneck_channels": (1, 8192),
}
AXES = ("kernel_sizes", "strides")  # entries may be a number for each axis
MOST_STAGES = 16
MOST_WEIGHTS = 10**10
MOST_VOXELS = 2**30  # of a patch


def allowed_names(environ: Mapping[str, str] = os.environ) -> set[str]:
    """Dotted names that this site adds to those that plans may use, separated by commas in nnUNet_diffusion_allow."""
    return {name.strip() for name in environ.get(ALLOW, "").split(",") if name.strip()}


def check_architecture(class_name: Any, arch_kwargs: Any, requires_import: Any) -> None:
    """Raise unless plans describe a network that may be built; nothing is imported.

    Args:
        class_name: ``network_class_name`` of the plans.
        arch_kwargs: arguments of that class.
        requires_import: ``_kw_requires_import``, keys of the arguments that name a class.

    Raises:
        UnsupportedArchitectureError: naming the key, what it is and what was expected.
    """
    extra = allowed_names()
    if class_name not in (*NETWORKS, *extra):
        raise _refused("network_class_name", class_name, f"one of {', '.join(list(NETWORKS)[:2])}")
    if not isinstance(arch_kwargs, Mapping) or not all(isinstance(key, str) for key in arch_kwargs):
        raise _unusable("arch_kwargs", arch_kwargs, "the arguments of the network by name")
    if not isinstance(requires_import, list | tuple) or not all(isinstance(key, str) for key in requires_import):
        raise _unusable("_kw_requires_import", requires_import, f"a list of {', '.join(OPERATORS)}")
    for key in requires_import:
        if key not in arch_kwargs:
            raise _unusable("_kw_requires_import", key, f"keys of arch_kwargs: {', '.join(OPERATORS)}")
        name = arch_kwargs[key]
        if name is None or (isinstance(name, str) and name in extra):
            continue
        if key not in OPERATORS:
            raise _refused("_kw_requires_import", key, f"only {', '.join(OPERATORS)}")
        if not _is_operator(name, key):
            which = ": Conv1d, Conv2d or Conv3d" if key == "conv_op" else ", none that is lazy"
            raise _refused(key, name, f"a class of torch.nn.modules.{' or '.join(OPERATORS[key])}{which}")
    if class_name in NETWORKS:
        _check_arguments(NETWORKS[class_name], arch_kwargs, requires_import)


def _refused(key: str, found: Any, expected: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"the plans' {key} is {short(found)}, expected {expected}; it was not imported. If you trust it and need it, "
        f"add its name to the variable {ALLOW}"
    )


def _unusable(key: str, found: Any, expected: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(f"the plans' {key} is {short(found)}, expected {expected}")


def short(value: Any) -> str:
    """A value for a message, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _is_operator(name: Any, key: str) -> bool:
    """Whether a name is that of a class of torch.nn that may be this operator; PyTorch is imported already."""
    match = re.fullmatch(r"torch\.nn\.(?:modules\.(\w+)\.)?(\w+)", name) if isinstance(name, str) else None
    found = getattr(nn, match[2], None) if match else None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        return False
    if match[2].startswith("Lazy") or (key == "conv_op" and match[2] not in CONVOLUTIONS):
        return False
    home = found.__module__.removeprefix("torch.nn.modules.")
    return home in OPERATORS[key] and match[1] in (None, home)


# ---- numbers --------------------------------------------------------------------------------------------------------


def _whole(value: Any, low: int, high: int) -> bool:
    """Whether a value is an integer in [low, high]; JSON of some writers has 2.0 for 2."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and low <= value <= high and value == int(value)


def _check_arguments(network: type[nn.Module], kwargs: Mapping[str, Any], requires_import: Iterable[str]) -> None:
    """Raise unless the arguments are those of the network, in bounds and of as many stages as it has."""
    parameters = inspect.signature(network.__init__).parameters
    expected = [name for name in parameters if name not in GIVEN_BY_THE_HOST]
    for key in kwargs:
        if key not in (*expected, "deep_supervision"):
            raise _unusable("arch_kwargs", key, f"only {', '.join(expected)}")
    for key in expected:
        if key not in kwargs and parameters[key].default is inspect.Parameter.empty:
            raise UnsupportedArchitectureError(f"the plans' arch_kwargs have no {key}, which {network.__name__} needs")
    for key in OPERATORS:
        if kwargs.get(key) is not None and key not in requires_import:
            raise _unusable("_kw_requires_import", list(requires_import), f"{key} in it, which is a name")
    if kwargs["conv_op"] is None:
        raise _unusable("conv_op", None, f"one of {', '.join(CONVOLUTIONS)} of torch.nn")
    if not _whole(kwargs["n_stages"], 1, MOST_STAGES):
        raise _unusable("n_stages", kwargs["n_stages"], f"an integer in [1, {MOST_STAGES}]")
    for key in LISTS:
        if kwargs.get(key) is not None:
            _check_list(key, kwargs[key], int(kwargs["n_stages"]))
    for key, value in kwargs.items():
        if key not in LISTS and not _plain(value):
            raise _unusable(key, value, "finite numbers below 1e6, true, false, null or a short text")
    if _weights(kwargs) > MOST_WEIGHTS:
        raise _unusable("features_per_stage", kwargs["features_per_stage"], f"fewer than {MOST_WEIGHTS:,} weights")


def _check_list(key: str, value: Any, stages: int) -> None:
    """Raise unless a value is one number in bounds, or a list of one for each stage."""
    low, high = LISTS[key]
    length = stages - 1 if key == "n_conv_per_stage_decoder" else stages

    def fits(entry: Any) -> bool:
        if key in AXES and isinstance(entry, list | tuple):
            return len(entry) in (1, 2, 3) and all(_whole(n, low, high) for n in entry)
        return _whole(entry, low, high)

    if isinstance(value, list | tuple):
        if len(value) == length and all(map(fits, value)):
            return
    elif key not in AXES and fits(value):  # planners write those of axes for every stage, and they are gone through
        return
    raise _unusable(key, value, f"{length} integers in [{low}, {high}], one for each stage (n_stages is {stages})")


def _plain(value: Any) -> bool:
    """Whether an argument is plain data of a modest size."""
    if isinstance(value, Mapping):
        return len(value) <= 20 and all(isinstance(k, str) and _plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return len(value) <= 20 and all(map(_plain, value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return math.isfinite(value) and abs(value) < 1e6
    return value is None or isinstance(value, bool) or (isinstance(value, str) and len(value) <= 200)


def _weights(kwargs: Mapping[str, Any]) -> float:
    """A rough number of weights: of the convolutions of the encoder."""
    stages = int(kwargs["n_stages"])

    def each(key: str) -> list:
        value = kwargs.get(key)
        return list(value) if isinstance(value, list | tuple) else [1 if value is None else value] * stages

    dims = 3 if "3d" in str(kwargs["conv_op"]) else 2
    kernels = [math.prod(k) if isinstance(k, list | tuple) else k**dims for k in each("kernel_sizes")]
    blocks = each("n_conv_per_stage" if "n_conv_per_stage" in kwargs else "n_blocks_per_stage")
    return sum(n * f * f * k for n, f, k in zip(blocks, each("features_per_stage"), kernels, strict=True))


def check_configuration(configuration: Mapping[str, Any], where: str) -> None:
    """Raise unless the numbers of a configuration can be worked with.

    Args:
        configuration: of plans, resolved.
        where: named in errors.

    Raises:
        UnsupportedArchitectureError: naming the key, what it is and what was expected.
    """
    try:
        _check_numbers(configuration)
    except UnsupportedArchitectureError as error:
        raise UnsupportedArchitectureError(f"{where}: {error}") from None


def _check_numbers(configuration: Mapping[str, Any]) -> None:
    patch, spacing = configuration.get("patch_size"), configuration.get("spacing")
    if not (
        isinstance(patch, list | tuple)
        and len(patch) in (2, 3)
        and all(_whole(n, 1, 16384) for n in patch)
        and math.prod(patch) <= MOST_VOXELS
    ):
        raise _unusable("patch_size", patch, f"2 or 3 integers from 1 on, of at most {MOST_VOXELS:,} voxels")
    if not _whole(configuration.get("batch_size"), 1, 65536):
        raise _unusable("batch_size", configuration.get("batch_size"), "an integer in [1, 65536]")
    numbers = isinstance(spacing, list | tuple) and all(isinstance(s, int | float) for s in spacing)
    if not numbers or len(spacing) != len(patch) or not all(1e-9 < s < 1e6 for s in spacing):
        raise _unusable("spacing", spacing, f"{len(patch)} numbers above 0, in mm")
    architecture = configuration.get("architecture")
    keys = {"network_class_name", "arch_kwargs", "_kw_requires_import"}
    if not isinstance(architecture, Mapping) or not keys <= set(architecture):
        raise _unusable("architecture", architecture, f"a mapping with {', '.join(sorted(keys))}")
    check_architecture(*(architecture[key] for key in ("network_class_name", "arch_kwargs", "_kw_requires_import")))
    network = NETWORKS.get(architecture["network_class_name"])
    if network:
        _check_geometry(patch, architecture["arch_kwargs"])
        _try_operators(network, architecture["arch_kwargs"], len(patch))


def _try_operators(network: type[nn.Module], kwargs: Mapping[str, Any], dims: int) -> None:
    """Raise unless the operators, which are PyTorch's by now, take their arguments and the features of every stage."""
    features = kwargs["features_per_stage"]
    widths = sorted({int(n) for n in (features if isinstance(features, list | tuple) else [features])})
    # as many voxels along an axis as no stage has features: a layer must not take the one for the other
    voxels = next(n for n in range(2, 99) if n not in widths)
    weights = network is ResidualEncoderUNet  # whose initialisation sets them, of norm_op
    if weights and kwargs.get("norm_op") is None:
        raise _unusable("norm_op", None, f"a normalisation with weights, as {network.__name__} needs")
    for key in ("norm_op", "dropout_op", "nonlin"):
        name, given = kwargs.get(key), kwargs.get(f"{key}_kwargs")
        if name is None or name in allowed_names():
            continue
        try:
            for width in widths:
                image = torch.zeros(1, width, *[voxels] * dims)
                cls = getattr(nn, name.rsplit(".", 1)[-1])
                operator = cls(*[width] if key == "norm_op" else [], **(given or {})).eval()
                if key == "norm_op" and weights and getattr(operator, "weight", None) is None:
                    raise ValueError(f"it has no weights, which {network.__name__} needs: affine is false")
                found = operator(image)
                if found.shape != image.shape:
                    raise ValueError(f"an image of shape {tuple(image.shape)} becomes {tuple(found.shape)}")
        except Exception as error:  # PyTorch's classes raise many kinds
            reason = " ".join(str(error).split())[:200]
            raise _unusable(f"{key}_kwargs", given, f"arguments of {name} for {dims}D images ({reason})") from None


def _check_geometry(patch: list | tuple, kwargs: Mapping[str, Any]) -> None:
    """Raise unless convolutions, kernels and strides have the patch's axes, and strides divide the patch."""
    for key in ("conv_op", "norm_op"):  # PyTorch takes an image without a batch for one of fewer dimensions
        dims = re.search(r"([123])d$", str(kwargs.get(key)))
        if dims and int(dims[1]) != len(patch):
            raise _unusable(key, kwargs[key], f"one of {len(patch)} dimensions, as patch_size {list(patch)}")
    factors = [1] * len(patch)
    for key in AXES:
        for entry in kwargs[key]:
            axes = list(entry) if isinstance(entry, list | tuple) else [entry] * len(patch)
            if len(axes) not in (1, len(patch)):
                raise _unusable(key, entry, f"{len(patch)} numbers, as patch_size {list(patch)}")
            if key == "strides":
                axes = axes * len(patch) if len(axes) == 1 else axes
                factors = [int(a * b) for a, b in zip(factors, axes, strict=True)]
    if any(n % f for n, f in zip(patch, factors, strict=True)):
        raise _unusable("patch_size", list(patch), f"multiples of {factors}, the product of the strides")
