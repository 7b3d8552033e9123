"""Overrides of the sampling for one prediction, because ``nnUNetv2_predict`` passes no options on."""

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from nnunetv2_diffusion.settings.removed import removed_value
from nnunetv2_diffusion.settings.schema import SettingsError
from nnunetv2_diffusion.settings.sections import SUBSECTIONS, DiffusionSettings
from nnunetv2_diffusion.settings.vocabulary import SAMPLERS

ENVIRONMENT_PREFIX = "nnUNet_diffusion_"
ENVIRONMENT_KEYS = ("sampler", "steps", "samples", "seed")
ALLOW = f"{ENVIRONMENT_PREFIX}allow"  # no setting: names that plans may use as well, see ``architecture``


def environment_overrides(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Sampling settings set by nnUNet_diffusion_{sampler,steps,samples,seed}; they are those of the chosen trainer.

    Raises:
        SettingsError: if a variable of that prefix is unknown, one that must be an integer is not, or the sampler is
            unknown or was removed.
    """
    overrides: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.lower().startswith(ENVIRONMENT_PREFIX.lower()):
            continue
        key = variable[len(ENVIRONMENT_PREFIX) :].lower()  # Windows gives names in upper case
        if variable.lower() == ALLOW.lower():
            continue
        if key not in ENVIRONMENT_KEYS:
            expected = ", ".join([*(ENVIRONMENT_PREFIX + k for k in ENVIRONMENT_KEYS), ALLOW])
            raise SettingsError(f"unknown environment variable {variable}; known are {expected}")
        if key == "sampler":
            overrides[key] = _sampler(variable, text.strip().lower())
            continue
        try:
            overrides[key] = int(text)
        except ValueError:
            raise SettingsError(f"{variable} is {text!r}, expected an integer") from None
    return overrides


def _sampler(variable: str, name: str) -> str:
    """The sampler that a variable names."""
    gone = removed_value("--sampler", name)
    if gone:
        raise SettingsError(f"{variable}: {gone}")
    if name not in SAMPLERS:
        raise SettingsError(
            f"environment {variable}={name}: sampler is {name!r}, expected one of {', '.join(SAMPLERS)}"
        )
    return name


def apply_environment(
    settings: DiffusionSettings, section: str, environ: Mapping[str, str] = os.environ
) -> DiffusionSettings:
    """Settings with the environment's overrides, validated as a whole.

    Args:
        settings: of the plans.
        section: that of the trainer's method; steps and sampler are its own, where it has them.
        environ: variables by name.

    Raises:
        SettingsError: naming the variables if the result cannot be used.
    """
    overrides = environment_overrides(environ)
    common = {key: value for key, value in overrides.items() if key in ("samples", "seed")}
    # samples and seed as well where the section has them of its own, from version 0.1
    own = {key: value for key, value in overrides.items() if key in {f.name for f in fields(SUBSECTIONS[section])}}
    try:
        return replace(settings, **common, **{section: replace(getattr(settings, section), **own)})
    except SettingsError as error:
        names = ", ".join(f"{ENVIRONMENT_PREFIX}{k}={v}" for k, v in overrides.items())
        raise SettingsError(f"environment {names}: {error}") from None
