"""Trainers and options that earlier versions had: who asks for one is told why it is gone, and which version has it."""

from collections.abc import Sequence
from typing import Any

from nnunetv2_diffusion.settings.removed import LAST, NO_GAIN, VERSION, removed_value

TRAINERS = {
    "nnUNetTrainerRecycleMixed": "its masks were no better than those of an ordinary training (docs/steps.md)",
}
OPTIONS = {
    "--aggregate": f"{NO_GAIN} (docs/experiments.md): every tile has a chain of its own",
    "--combine": f"{NO_GAIN} (docs/steps.md): a chain goes on from the mean of its mirrored views' latest estimates",
    "--early_exit": "it saved nothing (docs/experiments.md)",
    "--mask_use": "it was made for nnUNetTrainerRecycleMixed, which was removed as well (docs/steps.md)",
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
    return removed_value(name, value)


def removed_argument(arguments: Sequence[str]) -> str | None:
    """A sentence about the first argument of a command line that was removed; None if all are known."""
    for word, following in zip(arguments, [*arguments[1:], None], strict=True):
        name, sign, value = word.partition("=")
        found = removed_option(name, value if sign else following) if word.startswith("--") else None
        if found:
            return found
    return None
