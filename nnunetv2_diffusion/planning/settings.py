"""Settings of the diffusion trainers: section ``diffusion`` of a configuration in nnU-Net's plans.

A configuration without the section uses the defaults, so stock plans work as they are. Sampling can be changed for
one prediction by environment variables, because ``nnUNetv2_predict`` passes no options on.
"""

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

SECTION = "diffusion"
ENVIRONMENT_PREFIX = "nnUNet_diffusion_"
ENVIRONMENT_KEYS = ("sampler", "steps", "samples", "seed")


class SettingsError(ValueError):
    """A setting is unknown or has a value that cannot be used."""


def _setting(default: Any, doc: str, *, choices: tuple = (), low: Any = None, high: Any = None) -> Any:
    return field(default=default, metadata={"doc": doc, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True)
class DiffusionSettings:
    """All settings with their defaults. Units and meaning are in each field's ``doc``."""

    timesteps: int = _setting(1001, "T, length of the noise schedule", low=1, high=100_000)
    beta_start: float = _setting(1e-4, "first beta of the linear schedule", low=1e-8, high=0.999)
    beta_end: float = _setting(0.02, "last beta of the linear schedule", low=1e-8, high=0.999)
    training_steps: int | None = _setting(
        None, "train on a schedule respaced to so many steps (5 in table 8 of the paper); null: all T", low=1
    )
    time_sampling: str = _setting("uniform", "how training draws t", choices=("uniform", "importance"))
    steps: int = _setting(2, "K, network passes of one predicted sample; 5 in the paper", low=1)
    sampler: str = _setting("ddpm", "reverse step", choices=("ddpm", "ddim"))
    eta: float = _setting(0.0, "DDIM's noise, 0 deterministic to 1 as DDPM", low=0.0, high=1.0)
    samples: int = _setting(1, "masks drawn in a prediction; their probabilities are averaged", low=1)
    seed: int = _setting(0, "seed of the noise in prediction", low=0)
    self_conditioning_probability: float = _setting(
        0.5, "share of training samples that see the first pass's estimate", low=0.0, high=1.0
    )
    time_conditioning: bool = _setting(
        True, "tell the network the time step; false reproduces the published, time-blind network"
    )
    transformer_layers: int = _setting(1, "self-attention layers at the bottleneck, 0 for none", low=0)
    transformer_heads: int = _setting(8, "attention heads", low=1)
    transformer_width: float = _setting(
        0.25, "share of the bottleneck's channels that attention works in; 1 in the paper", low=0.01, high=1.0
    )
    recipe: str = _setting(
        "nnunet",
        "optimiser, schedule and loss: the host's own, or those of Fu et al. 2024",
        choices=("nnunet", "paper"),
    )
    num_epochs: int | None = _setting(None, "training length; null: nnU-Net's 1000", low=1)
    num_iterations_per_epoch: int | None = _setting(None, "null: nnU-Net's 250", low=1)
    num_val_iterations_per_epoch: int | None = _setting(None, "null: nnU-Net's 50", low=1)

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_value(f.name, getattr(self, f.name), f.type, f.metadata)
        if self.beta_end < self.beta_start:
            raise SettingsError(f"beta_end is {self.beta_end}, expected at least beta_start = {self.beta_start}")
        if self.training_steps is not None and self.training_steps > self.timesteps:
            raise SettingsError(
                f"training_steps is {self.training_steps}, expected at most timesteps = {self.timesteps}"
            )
        if self.steps > self.chain_length:
            raise SettingsError(
                f"steps is {self.steps}, expected 1 .. {self.chain_length}, the length of the trained schedule"
            )

    @property
    def chain_length(self) -> int:
        """Number of time steps that training uses."""
        return self.training_steps or self.timesteps

    def to_dict(self) -> dict[str, Any]:
        """As stored in plans."""
        return asdict(self)


def _check_value(name: str, value: Any, annotation: Any, meta: Mapping[str, Any]) -> None:
    """Raise SettingsError unless value has the field's type and lies in its range."""
    optional = "None" in str(annotation)
    if value is None and optional:
        return
    kind = next(k for k in (bool, int, float, str) if k.__name__ in str(annotation))
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not fits or (isinstance(value, bool) and kind is not bool):
        wanted = f"{kind.__name__}{' or null' if optional else ''}"
        raise SettingsError(f"{name} is {value!r}, expected {wanted}")
    if meta["choices"] and value not in meta["choices"]:
        raise SettingsError(f"{name} is {value!r}, expected one of {', '.join(meta['choices'])}")
    low, high = meta["low"], meta["high"]
    if value != value or (low is not None and value < low) or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"a value in [{low}, {high}]"
        raise SettingsError(f"{name} is {value!r}, expected {limits}")


def settings_table() -> str:
    """All settings as a Markdown table; the README holds a copy that a test compares."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for f in fields(DiffusionSettings):
        default = json.dumps(f.default)
        choices = f.metadata["choices"]
        meaning = f.metadata["doc"] + (f" ({', '.join(choices)})" if choices else "")
        rows.append(f"| `{f.name}` | {default} | {meaning} |")
    return "\n".join(rows)


def parse_settings(section: Mapping[str, Any] | None, where: str = SECTION) -> DiffusionSettings:
    """Validate a settings section.

    Args:
        section: the mapping found in the plans; None for all defaults.
        where: named in errors, e.g. "configuration 3d_fullres of nnUNetPlans".

    Raises:
        SettingsError: for an unknown key (naming the nearest known one) or a value that cannot be used.
    """
    section = {} if section is None else section
    if not isinstance(section, Mapping):
        raise SettingsError(f"{where}: {SECTION} is {section!r}, expected a mapping of settings")
    known = [f.name for f in fields(DiffusionSettings)]
    for key in section:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise SettingsError(f"{where}: unknown setting {key!r} in {SECTION}; {hint}")
    try:
        return DiffusionSettings(**section)
    except SettingsError as error:
        raise SettingsError(f"{where}: in {SECTION}, {error}") from None


def read_settings(configuration: Mapping[str, Any], name: str = "plans") -> DiffusionSettings:
    """Settings of one resolved configuration (``ConfigurationManager.configuration``)."""
    return parse_settings(configuration.get(SECTION), name)


def environment_overrides(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Sampling settings set by nnUNet_diffusion_{sampler,steps,samples,seed}.

    Raises:
        SettingsError: if a variable of that prefix is unknown, or one that must be an integer is not.
    """
    overrides: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.lower().startswith(ENVIRONMENT_PREFIX.lower()):
            continue
        key = variable[len(ENVIRONMENT_PREFIX) :].lower()  # Windows gives names in upper case
        if key not in ENVIRONMENT_KEYS:
            expected = ", ".join(ENVIRONMENT_PREFIX + k for k in ENVIRONMENT_KEYS)
            raise SettingsError(f"unknown environment variable {variable}; known are {expected}")
        if key == "sampler":
            overrides[key] = text.strip().lower()
            continue
        try:
            overrides[key] = int(text)
        except ValueError:
            raise SettingsError(f"{variable} is {text!r}, expected an integer") from None
    return overrides


def apply_environment(settings: DiffusionSettings, environ: Mapping[str, str] = os.environ) -> DiffusionSettings:
    """Settings with the environment's overrides, validated as a whole.

    Raises:
        SettingsError: naming the variables if the result cannot be used.
    """
    overrides = environment_overrides(environ)
    if not overrides:
        return settings
    try:
        return DiffusionSettings(**{**settings.to_dict(), **overrides})
    except SettingsError as error:
        names = ", ".join(f"{ENVIRONMENT_PREFIX}{k}={v}" for k, v in overrides.items())
        raise SettingsError(f"environment {names}: {error}") from None
