"""Plans derived from stock plans: another name, smaller networks or patches, diffusion settings, the same data."""

import difflib
import json
import os
import re
from collections.abc import Mapping
from copy import deepcopy
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nnunetv2_diffusion.files import read_json_if_any
from nnunetv2_diffusion.settings import SECTION, merge_settings, parse_settings

STOCK_PLANS = ("nnUNetPlans*", "nnUNetResEnc*")
OVERRIDES = ("patch_size", "batch_size", "base_features", "max_features", "n_stages")


class PlansError(ValueError):
    """Plans, or what is to be changed in them, cannot be used."""


def check_plans_name(name: str) -> None:
    """Raise unless plans may be written under a name.

    Raises:
        PlansError: if it belongs to a stock planner (in any case: file systems may not tell them apart), or is not
            usable in the names of files and result folders.
    """
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name) or "__" in name:
        raise PlansError(
            f"plans name is {name!r}, expected letters, digits, '_', '.', '+' or '-', and no '__', at which nnU-Net "
            "splits the names of result folders"
        )
    if any(fnmatchcase(name.lower(), pattern.lower()) for pattern in STOCK_PLANS):
        raise PlansError(
            f"plans name is {name!r}, expected none of nnU-Net's own ({', '.join(STOCK_PLANS)}), whose plans and data "
            "would be overwritten"
        )


def add_settings(configurations: Mapping[str, dict], settings: Mapping[str, Any], where: str) -> None:
    """Merge diffusion settings, in place, into every configuration that does not inherit all of its own.

    A configuration that has a section keeps what ``settings`` does not name. The section is complete afterwards, so
    that all settings can be seen and edited in the file.

    Args:
        configurations: of plans, by name.
        settings: to be merged; may be empty.
        where: names the plans in errors.

    Raises:
        SettingsError: naming configuration and setting; nothing is changed then.
    """
    merged = {}
    for name, configuration in configurations.items():
        if "architecture" in configuration or SECTION in configuration:
            place = f"configuration {name} of {where}"
            present = configuration.get(SECTION)
            parse_settings(present, place)  # a section that is no mapping cannot be merged
            merged[name] = parse_settings(merge_settings(present or {}, settings), place).to_dict()
    for name, section in merged.items():
        configurations[name][SECTION] = section


def derive_plans(
    plans: Mapping[str, Any],
    name: str,
    configurations: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Plans under another name that use the preprocessed data of the ones given.

    ``data_identifier`` stays as it is in every configuration, so nothing has to be preprocessed again.

    Args:
        plans: nnU-Net's plans (2.5 or newer), as read from their JSON file; not changed.
        name: ``plans_name`` of the result.
        configurations: for each configuration to change, any of ``patch_size`` (voxels, one integer an axis),
            ``batch_size``, ``base_features`` (channels of the first stage, doubled at each next one),
            ``max_features`` (upper limit of the channels of a stage) and ``n_stages`` (at most as many as there are).
        settings: diffusion settings for all configurations; defaults for those not named.

    Raises:
        PlansError: naming the key, what was found and what was expected.
        SettingsError: for diffusion settings that cannot be used.
    """
    check_plans_name(name)
    resolved = resolve_configurations(plans)
    derived = deepcopy(dict(plans))
    derived["plans_name"] = name
    for configuration, overrides in configurations.items():
        where = f"configuration {configuration} of {name}"
        if configuration not in resolved:
            raise PlansError(f"{where}: no such configuration in the plans, expected one of {', '.join(resolved)}")
        _check_keys(overrides, where)
        changes = _changes(resolved[configuration], overrides, where)
        derived["configurations"][configuration].update(changes)
    add_settings(derived["configurations"], settings, name)
    return derived


def resolve_configurations(plans: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every configuration with what it inherits.

    Raises:
        PlansError: for a content that is no nnU-Net plans.
    """
    if not isinstance(plans, Mapping) or not isinstance(plans.get("configurations"), Mapping):
        raise PlansError("plans have no 'configurations', expected the content of an nnU-Net plans file")
    return {name: _resolve(plans["configurations"], name) for name in plans["configurations"]}


def write_plans(plans: Mapping[str, Any], folder: str | os.PathLike) -> Path:
    """Write plans to ``<folder>/<plans_name>.json``, where nnU-Net's ``-p`` looks for them.

    Args:
        plans: with a ``plans_name`` that is not one of nnU-Net's own.
        folder: the data set's folder in nnUNet_preprocessed, which must exist.

    Returns:
        The file. One that holds the same plans already is left alone.

    Raises:
        PlansError: for a name of nnU-Net's own, a folder that is missing, a file that holds anything else, or a
            number that is not finite.
    """
    name = plans.get("plans_name")
    check_plans_name(name)
    file = Path(folder) / f"{name}.json"
    if not file.parent.is_dir():
        raise PlansError(f"{file.parent}: no such folder, expected the data set's folder in nnUNet_preprocessed")
    try:
        text = json.dumps(plans, indent=4, allow_nan=False)
    except ValueError:
        raise PlansError(f"{name}: the plans hold NaN or an infinite number; plan and preprocess again") from None
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        if read_json_if_any(file) != json.loads(text):
            raise PlansError(
                f"{file} exists and holds other plans, it was not overwritten. Choose another name, or move the file."
            ) from None
    return file


def _resolve(configurations: Mapping[str, Mapping], name: str, chain: tuple[str, ...] = ()) -> dict[str, Any]:
    """A configuration with what it inherits, as nnU-Net resolves it."""
    if name in chain or name not in configurations:
        found = " -> ".join((*chain, name))
        raise PlansError(f"inherits_from: found {found}, expected a chain of configurations that ends")
    own = configurations[name]
    if "inherits_from" not in own:
        return dict(own)
    return {**_resolve(configurations, own["inherits_from"], (*chain, name)), **own}


def _check_keys(overrides: Mapping[str, Any], where: str) -> None:
    for key in overrides:
        if key not in OVERRIDES:
            near = difflib.get_close_matches(str(key), OVERRIDES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(OVERRIDES)}"
            raise PlansError(f"{where}: {key!r} cannot be overridden; {hint}")


def _changes(configuration: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> dict[str, Any]:
    """New values of a configuration's keys."""
    if overrides and "architecture" not in configuration:
        raise PlansError(f"{where}: no 'architecture', expected plans of nnU-Net 2.5 or newer")
    changes: dict[str, Any] = {}
    if "n_stages" in overrides:
        changes["architecture"] = _shorten(configuration["architecture"], overrides["n_stages"], where)
        configuration = {**configuration, **changes}
    if "batch_size" in overrides:
        changes["batch_size"] = _positive(overrides["batch_size"], "batch_size", where)
    if "patch_size" in overrides:
        strides = configuration["architecture"]["arch_kwargs"]["strides"]
        axes = len(configuration["patch_size"])
        changes["patch_size"] = _patch_size(overrides["patch_size"], strides, axes, where)
    if "base_features" in overrides or "max_features" in overrides:
        architecture = deepcopy(configuration["architecture"])
        present = architecture["arch_kwargs"]["features_per_stage"]
        base = _positive(overrides.get("base_features", present[0]), "base_features", where)
        largest = _positive(overrides.get("max_features", max(present)), "max_features", where)
        if base > largest:
            raise PlansError(f"{where}: base_features is {base}, expected at most max_features = {largest}")
        architecture["arch_kwargs"]["features_per_stage"] = [min(base * 2**i, largest) for i in range(len(present))]
        changes["architecture"] = architecture
    return changes


def _shorten(architecture: Mapping[str, Any], n_stages: Any, where: str) -> dict[str, Any]:
    """An architecture without its last stages."""
    shorter = deepcopy(dict(architecture))
    kwargs = shorter["arch_kwargs"]
    most = kwargs["n_stages"]
    if _positive(n_stages, "n_stages", where) > most or n_stages < 2:
        raise PlansError(f"{where}: n_stages is {n_stages}, expected 2 .. {most}, the stages of the plans")
    kwargs["n_stages"] = n_stages
    for key, values in kwargs.items():
        if isinstance(values, list) and len(values) in (most, most - 1):  # one a stage, or one a decoder stage
            kwargs[key] = values[: n_stages - (most - len(values))]
    return shorter


def _positive(value: Any, key: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlansError(f"{where}: {key} is {value!r}, expected an integer of at least 1")
    return value


def _patch_size(patch_size: Any, strides: list, axes: int, where: str) -> list[int]:
    """The patch size, if the network can halve it as often as its strides say."""
    if not isinstance(patch_size, (list, tuple)) or len(patch_size) != axes:
        raise PlansError(f"{where}: patch_size is {patch_size!r}, expected {axes} integers")
    sizes = [_positive(size, "patch_size", where) for size in patch_size]
    factors = [1] * axes
    for stride in strides:
        stride = [stride] * axes if isinstance(stride, int) else stride
        factors = [factor * s for factor, s in zip(factors, stride, strict=True)]
    if any(size % factor for size, factor in zip(sizes, factors, strict=True)):
        raise PlansError(f"{where}: patch_size is {sizes}, expected multiples of {factors}, the product of the strides")
    if sizes == factors:
        raise PlansError(
            f"{where}: patch_size is {sizes}, expected a multiple of {factors} that is larger along one axis at least: "
            "the last stage would have a single voxel, which cannot be normalised"
        )
    return sizes
