"""Presets: named settings, and changes of nnU-Net's network, to be merged into plans."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_diffusion.planning.derive import OVERRIDES
from nnunetv2_diffusion.settings import SettingsError, flatten, merge_settings, parse_settings

KEYS = ("summary", "source", "trainers", "network", "diffusion")
KINDS = ("2d", "3d")


@dataclass(frozen=True)
class Preset:
    """One file of ``plans/presets``.

    Attributes:
        name: of the file, without its ending.
        summary: what it is, in a line.
        source: where its numbers come from.
        trainers: that it is meant for; empty for all.
        network: for "2d" and "3d", changes as for ``derive_plans``.
        diffusion: settings for "all" configurations, and for those of "2d" and "3d" beside them.
    """

    name: str
    summary: str
    source: str
    trainers: list[str]
    network: dict[str, dict[str, Any]]
    diffusion: dict[str, dict[str, Any]]

    def settings(self, axes: int) -> dict[str, Any]:
        """Settings for a configuration whose patch has two or three axes."""
        return merge_settings(self.diffusion.get("all", {}), self.diffusion.get(f"{axes}d", {}))

    def overrides(self, axes: int) -> dict[str, Any]:
        """Changes of the network of a configuration whose patch has two or three axes."""
        return dict(self.network.get(f"{axes}d", {}))


def _folder() -> Path:
    """``plans/presets`` of the checkout that is run, or where it is installed."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "presets"
    return installed if installed.is_dir() else package.parent / "plans" / "presets"


def preset_names() -> list[str]:
    """Names of all presets."""
    return sorted(file.name.removesuffix(".json") for file in _folder().iterdir() if file.name.endswith(".json"))


def load_preset(name: str) -> Preset:
    """Read and validate a preset.

    Raises:
        SettingsError: naming the preset and the key, if there is no such preset or it cannot be used.
    """
    names = preset_names()
    if name not in names:
        raise SettingsError(f"there is no preset {name!r}, expected one of {', '.join(names)}")
    return parse_preset(name, json.loads((_folder() / f"{name}.json").read_text(encoding="utf-8")))


def parse_preset(name: str, content: Mapping[str, Any]) -> Preset:
    """A preset from the content of its file, validated.

    Raises:
        SettingsError: naming the key.
    """
    where = f"preset {name}"
    if set(content) != set(KEYS):
        raise SettingsError(f"{where}: keys are {sorted(content)}, expected {sorted(KEYS)}")
    for key, kinds, known in (("network", KINDS, OVERRIDES), ("diffusion", ("all", *KINDS), None)):
        for kind, values in content[key].items():
            if kind not in kinds:
                raise SettingsError(f"{where}: {key} has {kind!r}, expected one of {', '.join(kinds)}")
            unknown = [k for k in values if known is not None and k not in known]
            if unknown:
                raise SettingsError(f"{where}: {key} has {unknown[0]!r}, expected one of {', '.join(known)}")
    preset = Preset(name, **content)
    for axes in (2, 3):
        parse_settings(preset.settings(axes), where)
    return preset


def presets_table() -> str:
    """All presets, then a row for each setting, as Markdown; the docs hold a copy that a test compares."""
    presets = [load_preset(name) for name in preset_names()]
    lines = [f"- `{p.name}`: {p.summary}. Source: {p.source}." for p in presets]
    columns = [[flatten({**p.overrides(axes), **p.settings(axes)}) for axes in (2, 3)] for p in presets]
    keys = dict.fromkeys(key for column in columns for values in column for key in values)
    lines += ["", f"| setting | {' | '.join(p.name for p in presets)} |", "|---" * (len(presets) + 1) + "|"]
    lines += [f"| `{key}` | {' | '.join(_cell(key, *column) for column in columns)} |" for key in keys]
    return "\n".join(lines)


def _cell(key: str, planar: Mapping[str, Any], volume: Mapping[str, Any]) -> str:
    """What a preset sets in 2D and in 3D; empty where it leaves the plans' value."""
    by_kind = {kind: json.dumps(values[key]) for kind, values in (("2D", planar), ("3D", volume)) if key in values}
    if len(by_kind) == 2 and len(set(by_kind.values())) == 1:
        return by_kind["2D"]
    return ", ".join(f"{value} ({kind})" for kind, value in by_kind.items())
