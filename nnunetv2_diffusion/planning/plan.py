"""Verb ``plan``: plans derived from existing ones, and their settings with where each value came from."""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2_diffusion.files import read_json
from nnunetv2_diffusion.planning.derive import (
    OVERRIDES,
    PlansError,
    add_settings,
    derive_plans,
    resolve_configurations,
    write_plans,
)
from nnunetv2_diffusion.planning.geometry import GEOMETRY, geometry_changes
from nnunetv2_diffusion.planning.presets import Preset, load_preset, preset_names
from nnunetv2_diffusion.settings import (
    ENVIRONMENT_PREFIX,
    SECTION,
    SettingsError,
    environment_overrides,
    flatten,
    merge_settings,
    nest,
    parse_settings,
    read_assignments,
)

VARIABLE = "nnUNet_preprocessed"
RECORD = "diffusion_plan"  # top-level key of plans: what this verb was told


EXAMPLES = """
nnunetv2_diffusion plan -d 501 --preset recycling-paper -o paper
nnunetv2_diffusion plan -d 501 --base paper --show
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    network = ", ".join((*OVERRIDES, *GEOMETRY))
    add = parser.add_argument
    add("-d", required=True, metavar="DATASET", help="Name or number of the data set, which is planned.")
    add(
        "-c",
        nargs="+",
        metavar="CONFIGURATION",
        help="Configurations to change. Default: all with a network.",
    )
    add("--base", "-p", default="nnUNetPlans", metavar="PLANS", help="Plans to start from.")
    add("--preset", metavar="NAME", help=f"Settings of a preset: {', '.join(preset_names())}. See docs/planning.md.")
    add(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help=f"Settings, as num_epochs=300 or gaussian.steps=5, or changes of the plans themselves: {network}.",
    )
    add("-o", metavar="NAME", help="Name of the new plans. Default: diffusion_[PRESET_]PLANS.")
    add(
        "--show",
        action="store_true",
        help="Write nothing; print the settings, and where each comes from, of --base or of what would be derived.",
    )


def run(arguments: argparse.Namespace) -> int:
    """Derive or show; 1 with a message if it cannot be done."""
    try:
        folder = dataset_folder(arguments.d)
        plans = base = read_plans(folder, arguments.base)
        if arguments.preset or arguments.set or not arguments.show:
            plans = derive(plans, arguments)
        if arguments.show:
            print(show(plans, arguments.c))
            return 0
        file = write_plans(plans, folder)
    except (PlansError, SettingsError, OSError) as error:
        print(f"nnunetv2_diffusion plan: {error}", file=sys.stderr)
        return 1
    print(f"wrote {file}; use it with -p {plans['plans_name']}")
    if not says_more(base, plans):
        print(f"Nothing but the name differs from {base['plans_name']}: --preset and --set give what it says already.")
    for line in data_lines(plans, folder, arguments.d, arguments.c):
        print(line)
    return 0


def dataset_folder(dataset: str) -> Path:
    """The data set's folder in nnUNet_preprocessed.

    Raises:
        PlansError: if there is none.
    """
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    root = os.environ.get(VARIABLE)
    if not root:
        raise PlansError(f"the environment variable {VARIABLE} is not set, expected the folder of plans and data")
    try:
        name = maybe_convert_to_dataset_name(int(dataset) if dataset.isdecimal() else dataset)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # the last two: no folder variable
        reason = str(error).split(".")[0]
        if isinstance(error, ValueError):
            reason = "expected a number, or a name as Dataset001_NAME"
        raise PlansError(f"-d {dataset}: {reason}; looked in {root}") from None
    folder = Path(root) / name
    if not folder.is_dir():
        raise PlansError(f"{folder}: no such folder; type nnUNetv2_plan_and_preprocess -d {dataset} first")
    return folder


def read_plans(folder: Path, name: str) -> dict[str, Any]:
    """Plans of a data set.

    Raises:
        PlansError: naming the file if it is not there or not JSON.
    """
    file = folder / f"{name}.json"
    if not file.is_file():
        found = ", ".join(sorted(f.stem for f in folder.glob("*lans*.json"))) or "none"
        raise PlansError(f"{file}: no such file; plans there: {found}")
    plans = read_json(file, PlansError, "plans of nnU-Net")
    configurations = plans.get("configurations")
    if not isinstance(configurations, dict) or not all(isinstance(c, dict) for c in configurations.values()):
        raise PlansError(f"{file}: no mapping of configurations, expected plans of nnU-Net")
    if not isinstance(plans.get("plans_name"), str):
        raise PlansError(f"{file}: plans_name is {str(plans.get('plans_name'))[:100]}, expected a name")
    return plans


def derive(base: Mapping[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The plans that options describe, with a record of them.

    Raises:
        PlansError, SettingsError: naming what cannot be used.
    """
    preset = load_preset(arguments.preset) if arguments.preset else None
    given = read_assignments(arguments.set)
    own = {key: given.pop(key) for key in (*OVERRIDES, *GEOMETRY) if key in given}
    resolved = resolve_configurations(base)
    chosen = chosen_configurations(resolved, base, arguments.c)
    name = arguments.o or "_".join(["diffusion", *([arguments.preset] if preset else []), base["plans_name"]])
    networks, changes, settings = {}, {}, {}
    for configuration in chosen:
        axes = len(resolved[configuration]["patch_size"])
        settings[configuration] = merge_settings(preset.settings(axes) if preset else {}, given)
        networks[configuration] = {
            **(preset.overrides(axes) if preset else {}), **{k: v for k, v in own.items() if k in OVERRIDES}
        }  # fmt: skip
        geometry = {key: value for key, value in own.items() if key in GEOMETRY}
        where = f"configuration {configuration} of {name}"
        changes[configuration] = geometry_changes(resolved[configuration], geometry, f"{name}_{configuration}", where)
    plans = derive_plans(base, name, networks, {})
    for configuration in chosen:
        own = plans["configurations"][configuration]
        own.update(changes[configuration])
        own.setdefault(SECTION, resolved[configuration].get(SECTION, {}))  # inherited so far
        add_settings({configuration: own}, settings[configuration], name)
    plans[RECORD] = {"base": base["plans_name"], "preset": arguments.preset, "set": flatten(given)}
    return plans


def says_more(base: Mapping[str, Any], plans: Mapping[str, Any]) -> bool:
    """Whether a configuration of derived plans differs from the base's; settings at their defaults are none."""
    before, after = resolve_configurations(base), resolve_configurations(plans)
    without = [{k: v for k, v in c.items() if k != SECTION} for c in (*before.values(), *after.values())]
    settings = [parse_settings(c.get(SECTION)) for c in (*before.values(), *after.values())]
    half = len(before)
    return without[:half] != without[half:] or settings[:half] != settings[half:]


def chosen_configurations(
    resolved: Mapping[str, Mapping], plans: Mapping[str, Any], names: list[str] | None
) -> list[str]:
    """Configurations that are meant: by default those with a network of their own.

    Raises:
        PlansError: naming one that is not there.
    """
    for name in names or []:
        if name not in resolved:
            raise PlansError(f"-c {name}: no such configuration in the plans, expected one of {', '.join(resolved)}")
    chosen = names or [name for name, own in plans["configurations"].items() if "architecture" in own]
    for name in chosen:
        _check_keys(resolved[name], name)
    return chosen


def _check_keys(configuration: Mapping[str, Any], name: str) -> None:
    """Raise unless a configuration has what is shown and changed here."""
    for key, kind in (("patch_size", list), ("batch_size", int), ("architecture", dict), ("data_identifier", str)):
        if not isinstance(configuration.get(key), kind):
            found = repr(configuration.get(key))[:100]
            raise PlansError(f"configuration {name}: {key} is {found}, expected a {kind.__name__}")
    arguments, network = (configuration["architecture"].get(key) for key in ("arch_kwargs", "network_class_name"))
    if not isinstance(network, str) or not isinstance(arguments, dict) or "features_per_stage" not in arguments:
        raise PlansError(f"configuration {name}: architecture has no network_class_name or no features_per_stage")


def data_lines(plans: Mapping[str, Any], folder: Path, dataset: str, names: list[str] | None = None) -> list[str]:
    """For every configuration, or those named, whether its preprocessed data are there, and what to type if not."""
    lines = []
    for name, configuration in resolve_configurations(plans).items():
        if "data_identifier" not in configuration or (names and name not in names):
            continue
        identifier = configuration["data_identifier"]
        command = f"nnUNetv2_preprocess -d {dataset} -plans_name {plans['plans_name']} -c {name}"
        if (folder / identifier).is_dir():
            lines.append(f"{name}: uses the preprocessed data in {identifier}, geometry and normalisation are the same")
        else:
            lines.append(f"{name}: there are no preprocessed data in {identifier}; type: {command}")
    return lines


def show(plans: Mapping[str, Any], names: list[str] | None) -> str:
    """Settings of configurations as a table: name, value, where it came from.

    Raises:
        PlansError, SettingsError: for plans that cannot be used.
    """
    resolved = resolve_configurations(plans)
    blocks = []
    for name in chosen_configurations(resolved, plans, names):
        where = f"configuration {name} of {plans['plans_name']}"
        values = flatten(parse_settings(resolved[name].get(SECTION), where).to_dict())
        origins = _origins(plans.get(RECORD, {}), values, len(resolved[name]["patch_size"]))
        width = max(map(len, values))
        rows = [f"  {key:<{width}}  {json.dumps(value):<12}  {origins[key]}" for key, value in values.items()]
        blocks.append("\n".join([f"{where}: {_network(resolved[name])}", *rows]))
    overrides = [f"{ENVIRONMENT_PREFIX}{key}={value}" for key, value in environment_overrides().items()]
    if overrides:
        blocks.append(f"the environment changes predictions: {', '.join(overrides)}")
    return "\n\n".join(blocks)


def _network(configuration: Mapping[str, Any]) -> str:
    """What a configuration trains on, in a line."""
    kwargs = configuration["architecture"]["arch_kwargs"]
    sizes = "x".join(map(str, configuration["patch_size"]))
    return (
        f"patch {sizes}, batch {configuration['batch_size']}, "
        f"{configuration['architecture']['network_class_name'].rsplit('.', 1)[-1]} with features "
        f"{kwargs['features_per_stage']}, data {configuration['data_identifier']}"
    )


def _origins(record: Mapping[str, Any], values: Mapping[str, Any], axes: int) -> dict[str, str]:
    """Where each value came from."""
    defaults = flatten(parse_settings(None).to_dict(everything=True))
    preset: Preset | None = load_preset(record["preset"]) if record.get("preset") in preset_names() else None
    from_preset = flatten(preset.settings(axes)) if preset else {}
    from_command = flatten(merge_settings({}, nest(record.get("set", {}))))
    origins = {}
    for key, value in values.items():
        if key in from_command and from_command[key] == value:
            origins[key] = "--set"
        elif key in from_preset and from_preset[key] == value:
            origins[key] = f"preset {record['preset']}"
        elif value == defaults[key]:
            origins[key] = "default"
        else:
            origins[key] = f"plans{' derived from ' + record['base'] if record.get('base') else ''}"
    return origins
