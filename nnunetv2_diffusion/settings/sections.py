"""Settings of the diffusion trainers: section ``diffusion`` of a configuration in nnU-Net's plans.

A configuration without the section uses the defaults, so stock plans work as they are.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from nnunetv2_diffusion.settings.berdiff import BerDiffSettings
from nnunetv2_diffusion.settings.earlier import describe, relocate, simplified
from nnunetv2_diffusion.settings.flow import FlowSettings
from nnunetv2_diffusion.settings.gaussian import GaussianSettings
from nnunetv2_diffusion.settings.hidiff import HiDiffSettings
from nnunetv2_diffusion.settings.removed import without_removed
from nnunetv2_diffusion.settings.schema import Settings, SettingsError, parse, section, setting
from nnunetv2_diffusion.settings.score import RecycleScoreSettings
from nnunetv2_diffusion.settings.vocabulary import LARGEST_SEED, MOST_EPOCHS, MOST_SAMPLES

LOG = logging.getLogger("nnunetv2_diffusion")  # without a handler: warnings go to the standard error stream
SECTION = "diffusion"
_told: set[tuple[str, str]] = set()  # settings are read several times in a command


@dataclass(frozen=True)
class DiffusionSettings(Settings):
    """All settings with their defaults: those of all methods, then a section a method."""

    num_epochs: int | None = setting(None, "training length; null: nnU-Net's 1000", low=1, high=MOST_EPOCHS)
    num_iterations_per_epoch: int | None = setting(None, "null: nnU-Net's 250", low=1, high=1_000_000)
    num_val_iterations_per_epoch: int | None = setting(None, "null: nnU-Net's 50", low=1, high=1_000_000)
    recipe: str = setting(
        "paper",
        "optimiser, schedule and loss: the host's own, or those of Fu et al. 2024; HiDiff has its own",
        choices=("nnunet", "paper"),
    )
    samples: int = setting(1, "masks drawn in a prediction; their probabilities are averaged", low=1, high=MOST_SAMPLES)
    seed: int = setting(0, "seed of the noise in prediction", low=0, high=LARGEST_SEED)
    mask_encoding: str = setting(
        "one-hot",
        "channels of the noisy mask: one a class, or ceil(log2 classes) analog bits; HiDiff has one a class",
        choices=("one-hot", "analog-bits"),
    )
    time_conditioning: bool = setting(
        True, "tell the network the time step; false reproduces the published, time-blind network"
    )
    transformer_layers: int = setting(1, "self-attention layers at the bottleneck, 0 for none", low=0, high=64)
    transformer_width: float = setting(
        0.25, "share of the bottleneck's channels that attention works in; 1 in the paper", low=0.01, high=1.0
    )

    # Of version 0.1. The defaults are what every training uses; 8 heads as in the paper.
    transformer_heads: int = setting(8, "attention heads", low=1, high=1024, earlier=True)
    max_bad_steps: int = setting(
        20,
        "stop a training after so many steps in a row whose loss or gradients are not finite",
        low=2,
        high=10_000,
        earlier=True,
    )

    # a section a method: a new one adds its line here
    gaussian: GaussianSettings = field(
        default_factory=GaussianSettings, metadata=section("recycling, standard denoising and self-conditioning")
    )
    hidiff: HiDiffSettings = field(default_factory=HiDiffSettings, metadata=section("the HiDiff trainers"))
    score: RecycleScoreSettings = field(
        default_factory=RecycleScoreSettings, metadata=section("nnUNetTrainerRecycleScore")
    )
    berdiff: BerDiffSettings = field(default_factory=BerDiffSettings, metadata=section("nnUNetTrainerBerDiff"))
    flow: FlowSettings = field(default_factory=FlowSettings, metadata=section("nnUNetTrainerFlow"))


# sections within the section: name -> its settings
SUBSECTIONS: dict[str, type[Settings]] = {
    f.name: f.type for f in fields(DiffusionSettings) if isinstance(f.type, type) and issubclass(f.type, Settings)
}


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings with dotted names: those of a section within as ``hidiff.steps``."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with dotted names as sections: what ``flatten`` took apart."""
    content: dict[str, Any] = {}
    for key, value in flat.items():
        *outer, inner = key.split(".")
        place = content
        for name in outer:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise SettingsError(f"{key}: {name} is given a value and settings of its own")
        place[inner] = value
    return content


def merge_settings(present: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A section with the changes in it; sections within it are merged and not replaced.

    Settings of version 0.1, in either, are in their new places afterwards.
    """
    present = relocate(present).content
    changes = relocate(changes, present).content
    merged = {**present, **changes}
    for name in SUBSECTIONS:
        if isinstance(present.get(name), Mapping) and isinstance(changes.get(name), Mapping):
            merged[name] = {**present[name], **changes[name]}
    return merged


def read_assignments(texts: Iterable[str]) -> dict[str, Any]:
    """Changes from a command line: ``recipe=nnunet``, ``gaussian.steps=5``, ``hidiff.refiner_norm=batch``.

    Names of version 0.1 are taken, with a warning.

    Args:
        texts: key=value each; the value is JSON, or a string if it is none.

    Returns:
        a section as for ``parse_settings``, which is not validated.

    Raises:
        SettingsError: for a text without key or sign, and for what an earlier version had.
    """
    flat: dict[str, Any] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise SettingsError(
                f"{text!r} cannot be read, expected key=value, for example num_epochs=50 or gaussian.steps=5"
            )
        try:
            flat[key.strip()] = json.loads(value)
        except ValueError:
            flat[key.strip()] = value
    content = nest(flat)
    for note in without_removed(content)[1]:
        raise SettingsError(note)
    content, renamed = relocate(content)
    if renamed:
        _tell("--set", describe(renamed, [], {}))
    return content


class _Read(NamedTuple):
    settings: DiffusionSettings
    notes: list[str]


def _read(content: Mapping[str, Any] | None, where: str) -> _Read:
    """Settings, and what is to be said about those of earlier versions."""
    if not isinstance(content, Mapping):
        return _Read(parse(DiffusionSettings, content, where, SECTION), [])
    found, notes = without_removed(content)
    notes = [f"setting {note}" for note in notes]
    found, renamed = relocate(found)
    found = simplified(found)
    try:
        inner = {
            name: parse(cls, found[name], where, f"{SECTION}.{name}", _names(outside=name))
            for name, cls in SUBSECTIONS.items()
            if name in found
        }
        settings = parse(DiffusionSettings, {**found, **inner}, where, SECTION, _names(outside=""))
    except SettingsError as error:
        words = set(re.findall(r"\w+", str(error)))
        old = [f"{old} is {new} now" for old, new in renamed.items() if new.rpartition(".")[2] in words]
        raise SettingsError(f"{error} ({', '.join(old)})" if old else str(error)) from None
    note = _describe_earlier(content, found, renamed, settings)
    return _Read(settings, [*notes, note] if note else notes)


def _names(outside: str) -> list[str]:
    """Names of all documented settings that are not in a section ("": not at the top), as a message has them."""
    names = flatten(DiffusionSettings().to_dict())
    if not outside:
        return [name for name in names if "." in name]
    return [f"{SECTION}.{name}" for name in names if not name.startswith(f"{outside}.")]


def _describe_earlier(
    given: Mapping[str, Any], found: Mapping[str, Any], renamed: Mapping[str, str], settings: DiffusionSettings
) -> str:
    """A sentence about settings of version 0.1, by the names in the file; "" if it has none."""
    named = flatten(given)
    old = {new: before for before, new in renamed.items()}
    shown, values = flatten(DiffusionSettings().to_dict()), flatten(settings.to_dict(everything=True))
    hidden = [name for name in flatten(found) if name in values and name not in shown]
    default = flatten(DiffusionSettings().to_dict(everything=True))
    acting = {old.get(name, name): values[name] for name in hidden if values[name] != default[name]}
    left_out = [old.get(n, n) for n in hidden if values[n] == default[n] and (n in named or n in old)]
    return describe({k: v for k, v in renamed.items() if v not in hidden}, left_out, acting)


def earlier_notes(content: Mapping[str, Any] | None) -> list[str]:
    """What is to be said about settings of earlier versions in a section, a sentence each.

    Raises:
        SettingsError: as ``parse_settings``.
    """
    return _read(content, SECTION).notes


def parse_settings(content: Mapping[str, Any] | None, where: str = SECTION) -> DiffusionSettings:
    """Validate a settings section; what an earlier version had is told in the log, once for a plans file.

    Args:
        content: the mapping found in the plans; None for all defaults.
        where: named in errors, e.g. "configuration 3d_fullres of nnUNetPlans".

    Raises:
        SettingsError: for an unknown key (naming the nearest known one) or a value that cannot be used.
    """
    settings, notes = _read(content, where)
    for note in notes:
        _tell(where, note)
    return settings


def _tell(where: str, note: str) -> None:
    """Warn, but not twice about configurations of the same plans."""
    plans = where.rpartition(" of ")[2]
    if (plans, note) not in _told:
        _told.add((plans, note))
        LOG.warning(f"{where}: {note}")


def read_settings(configuration: Mapping[str, Any], name: str = "plans") -> DiffusionSettings:
    """Settings of one resolved configuration (``ConfigurationManager.configuration``)."""
    return parse_settings(configuration.get(SECTION), name)
