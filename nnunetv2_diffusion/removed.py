"""What earlier versions had: who still asks for it is told why it is gone, and which version has it."""

from collections.abc import Mapping, Sequence
from typing import Any

VERSION = "0.2"  # that everything here was removed in
LAST = "0.1"  # that still has it
NO_GAIN = "it brought nothing"

TRAINERS = {
    "nnUNetTrainerRecycleMixed": "its masks were no better than those of an ordinary training (docs/steps.md)",
}
OPTIONS = {
    "--aggregate": f"{NO_GAIN} (docs/experiments.md): every tile has a chain of its own",
    "--combine": f"{NO_GAIN} (docs/steps.md): a chain goes on from the mean of its mirrored views' latest estimates",
    "--early_exit": "it saved nothing (docs/experiments.md)",
    "--mask_use": "it was made for nnUNetTrainerRecycleMixed, which was removed as well (docs/steps.md)",
}
# section of settings -> why
SECTIONS = {"mixture": "its trainer nnUNetTrainerRecycleMixed was removed (docs/steps.md)"}
# setting, value -> what is used instead, and why; options of the command line have the names of the settings
VALUES = {
    ("sampler", "renoise"): ("ddpm", f"{NO_GAIN} (docs/steps.md)"),
    ("step_spacing", "low"): ("trailing", f"{NO_GAIN} (docs/steps.md)"),
}


def removed_trainer(name: Any) -> str | None:
    """A sentence about a trainer that was removed; None for any other name."""
    if name not in TRAINERS:
        return None
    return (
        f"{name} was removed in version {VERSION} of nnunetv2-diffusion: {TRAINERS[name]}. Version {LAST} reads its "
        "checkpoints"
    )


def removed_option(name: str, value: Any = None) -> str | None:
    """A sentence about an option of the command line, ``--name``, or about its value; None if both are known."""
    if name in OPTIONS:
        return f"{name} was removed in {VERSION}: {OPTIONS[name]}"
    if (name.removeprefix("--"), value) in VALUES:
        instead, reason = VALUES[name.removeprefix("--"), value]
        return f"{name} {value} was removed in {VERSION}: {reason}; use {instead}"
    return None


def removed_argument(arguments: Sequence[str]) -> str | None:
    """A sentence about the first argument of a command line that was removed; None if all are known."""
    for word, following in zip(arguments, [*arguments[1:], None], strict=True):
        name, sign, value = word.partition("=")
        found = removed_option(name, value if sign else following) if word.startswith("--") else None
        if found:
            return found
    return None


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
