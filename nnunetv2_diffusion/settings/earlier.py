"""The layout of version 0.1, which had the settings of Gaussian diffusion flat beside the common ones.

What that version wrote is read for good: a setting goes to its new place, and one that has no place any more still acts
if it is not at the value that is always used now.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from nnunetv2_diffusion.settings.gaussian import GaussianSettings
from nnunetv2_diffusion.settings.hidiff import HOST_TRAINER, PUBLISHED_RATE_ALONE, RATE_ALONE, is_trainer
from nnunetv2_diffusion.settings.vocabulary import GAUSSIAN, HIDIFF

FLAT = (
    *("timesteps", "training_steps", "time_sampling", "self_conditioning_probability"),
    *("steps", "sampler", "step_spacing", "eta"),
)
BETAS = ("beta_start", "beta_end")
SEGMENTOR = ("segmentor_trainer", "segmentor_checkpoint")


class Relocated(NamedTuple):
    """Settings in their new places, and what was somewhere else: old name -> new name."""

    content: dict[str, Any]
    renamed: dict[str, str]


def relocate(content: Mapping[str, Any], present: Mapping[str, Any] | None = None) -> Relocated:
    """Settings of version 0.1 in the places that they have now; all others stay as they are.

    Where old and new name are both there, the old one counts, unless it says the default and the new one does not.

    Args:
        content: as found, or changes that are to be made to it.
        present: what changes are made to, in the new places; gives the other beta if only one is changed.
    """
    found = dict(content)
    renamed: dict[str, str] = {}
    if any(key in found for key in (*FLAT, *BETAS)) and isinstance(found.get(GAUSSIAN) or {}, Mapping):
        renamed |= _relocate_gaussian(found, present or {})
    if isinstance(found.get(HIDIFF), Mapping):
        found[HIDIFF] = dict(found[HIDIFF])
        renamed |= _relocate_hidiff(found[HIDIFF])
    return Relocated(found, renamed)


def _relocate_gaussian(found: dict[str, Any], present: Mapping[str, Any]) -> dict[str, str]:
    """Move what is flat into its section, in place."""
    inner = dict(found.get(GAUSSIAN) or {})
    default = GaussianSettings().to_dict(everything=True)
    if "step_spacing" in found and isinstance(found.get(HIDIFF) or {}, Mapping):  # it was that of all methods
        found[HIDIFF] = {"step_spacing": found["step_spacing"], **(found.get(HIDIFF) or {})}
    moved = {key: found.pop(key) for key in FLAT if key in found}
    renamed = {key: f"{GAUSSIAN}.{key}" for key in moved}
    given = {key: found.pop(key) for key in BETAS if key in found}
    if given:
        there = inner.get("betas") or (present.get(GAUSSIAN) or {}).get("betas") or default["betas"]
        pair = there if isinstance(there, list | tuple) and len(there) == 2 else default["betas"]
        moved["betas"] = [given.get(key, beta) for key, beta in zip(BETAS, pair, strict=True)]
        renamed |= dict.fromkeys(given, f"{GAUSSIAN}.betas")
    for key, value in moved.items():
        if value != default[key] or inner.get(key, default[key]) == default[key]:
            inner[key] = value
    found[GAUSSIAN] = inner
    return renamed


def _relocate_hidiff(inner: dict[str, Any]) -> dict[str, str]:
    """Give what has another name within the section that name, in place."""
    renamed = {}
    if "merit_variant" in inner:
        inner["merit"] = inner.pop("merit_variant")
        renamed["hidiff.merit_variant"] = "hidiff.merit"
    given = {key: inner.pop(key) for key in SEGMENTOR if key in inner}
    renamed |= {f"{HIDIFF}.{key}": f"{HIDIFF}.segmentor" for key in given}
    trainer, file = (given.get(key) for key in SEGMENTOR)
    if file or trainer not in (None, HOST_TRAINER):
        bare = isinstance(file, str) and is_trainer(file)  # a file in the folder where the training is started
        inner["segmentor"] = (f"./{file}" if bare else file) or trainer
    elif given:
        inner.setdefault("segmentor", None)
    return renamed


def simplified(content: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which HiDiff's of version 0.1 that say the same as others are null: the others say it."""
    inner = content.get(HIDIFF)
    if not isinstance(inner, Mapping):
        return dict(content)
    inner = dict(inner)
    for key, default in (("samples", 1), ("seed", 0)):
        if key in inner and inner[key] == content.get(key, default):
            inner[key] = None
    switches = {key: inner[key] for key in ("prior_residual", "calibrated") if isinstance(inner.get(key), bool)}
    if switches:
        _as_published(inner, switches)
    if inner.get("pretraining_learning_rate") == (PUBLISHED_RATE_ALONE if inner.get("published") else RATE_ALONE):
        inner["pretraining_learning_rate"] = None
    return {**content, HIDIFF: inner}


def _as_published(inner: dict[str, Any], switches: Mapping[str, bool]) -> None:
    """Say by ``published`` what two switches said that were set together, in place; one alone stays a switch."""
    ours = not inner.get("published", False)
    both = {key: switches.get(key, ours) for key in ("prior_residual", "calibrated")}
    inner["published"] = not any(both.values())
    if inner["published"]:  # this rate did not follow from the switches
        inner["pretraining_learning_rate"] = inner.get("pretraining_learning_rate") or RATE_ALONE
    inner.update({key: None if on is not inner["published"] else on for key, on in both.items()})


def describe(renamed: Mapping[str, str], left_out: list[str], acting: Mapping[str, Any]) -> str:
    """What is said about settings of version 0.1; "" if there are none.

    Args:
        renamed: old name -> new name.
        left_out: names of those that are no settings any more, with the value that is always used.
        acting: the same with another value, which counts.
    """
    parts = []
    moved = [old for old, new in renamed.items() if new == f"{GAUSSIAN}.{old}"]
    told = [f"{', '.join(moved)} -> {GAUSSIAN}.*"] if moved else []
    told += [f"{old} -> {new}" for old, new in renamed.items() if old not in moved]
    if told:
        parts.append(f"have new names: {'; '.join(told)}")
    if left_out:
        parts.append(f"are not needed any more, their value is always used: {', '.join(left_out)}")
    if acting:
        values = ", ".join(f"{name}={value}" for name, value in acting.items())
        parts.append(f"still act, but are not documented any more: {values}")
    return f"settings of version 0.1 {'. Others '.join(parts)}" if parts else ""
