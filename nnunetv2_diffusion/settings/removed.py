"""Settings, and values of settings, that earlier versions had: who still has them is told why they are gone."""

from collections.abc import Mapping
from typing import Any

VERSION = "0.2"  # that everything was removed in
LAST = "0.1"  # that still has it
NO_GAIN = "it brought nothing"

# section of settings -> why
SECTIONS = {"mixture": "its trainer nnUNetTrainerRecycleMixed was removed (docs/steps.md)"}
# setting, value -> what is used instead, and why; options of the command line have the names of the settings
VALUES = {
    ("sampler", "renoise"): ("ddpm", f"{NO_GAIN} (docs/steps.md)"),
    ("step_spacing", "low"): ("trailing", f"{NO_GAIN} (docs/steps.md)"),
}


def removed_value(name: str, value: Any) -> str | None:
    """A sentence about a value of the option ``--name``, or of the setting, that was removed; None if it was not."""
    if (name.removeprefix("--"), value) not in VALUES:
        return None
    instead, reason = VALUES[name.removeprefix("--"), value]
    return f"{name} {value} was removed in {VERSION}: {reason}; use {instead}"


def without_removed(section: Mapping[str, Any], path: str = "") -> tuple[dict[str, Any], list[str]]:
    """Settings of an earlier version as this one reads them.

    Args:
        section: as found in the plans, sections within included.
        path: dotted name of the section and a dot, "" for the outermost.

    Returns:
        the section without what was removed, and a sentence for everything that has no effect any more.
    """
    kept: dict[str, Any] = {}
    notes = []
    for key, value in section.items():
        name = f"{path}{key}"
        if name in SECTIONS:
            notes.append(f"{name} = {value!r} does nothing since version {VERSION}: {SECTIONS[name]}")
        elif isinstance(value, Mapping):
            kept[key], found = without_removed(value, f"{name}.")
            notes += found
        elif isinstance(value, str) and (key, value) in VALUES:
            kept[key], reason = VALUES[key, value]
            notes.append(f"{name} = {value!r} does nothing since version {VERSION}: {reason}; {kept[key]!r} is used")
        else:
            kept[key] = value
    return kept, notes
