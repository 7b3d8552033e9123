"""Settings of the diffusion trainers: section ``diffusion`` of a configuration in nnU-Net's plans.

A configuration without the section uses the defaults, so stock plans work as they are. Sampling can be changed for
one prediction by environment variables, because ``nnUNetv2_predict`` passes no options on.
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache, lru_cache
from itertools import accumulate, pairwise
from operator import mul
from typing import Any

from nnunetv2_diffusion.planning.schema import S, Settings, SettingsError, parse, setting
from nnunetv2_diffusion.removed import removed_option, without_removed
from nnunetv2_diffusion.settings.berdiff import BerDiffSettings
from nnunetv2_diffusion.settings.flow import FlowSettings

LOG = logging.getLogger("nnunetv2_diffusion")  # without a handler: warnings go to the standard error stream
SECTION = "diffusion"
HIDIFF = "hidiff"
ENVIRONMENT_PREFIX = "nnUNet_diffusion_"
ENVIRONMENT_KEYS = ("sampler", "steps", "samples", "seed")
ALLOW = f"{ENVIRONMENT_PREFIX}allow"  # no setting: names that plans may use as well, see ``architecture``
MOST_SAMPLES = 10_000
MOST_EPOCHS = 100_000
LARGEST_SEED = 2**63 - 1
# as ``diffusion`` knows them, which is not imported here: torch takes seconds
SAMPLERS = ("ddpm", "ddim")
SPACINGS = ("linspace", "trailing")


@dataclass(frozen=True)
class HiDiffSettings(Settings):
    """Settings that HiDiff has of its own: section ``hidiff`` within ``diffusion``.

    The ablation of Chen et al. 2024 (table X): V1 is collaborative, cross_transformer and binarized false with
    noise_loss bce; V2 sets collaborative, V3 noise_loss focal, V4 cross_transformer, V5 (default) binarized.
    """

    timesteps: int = setting(10, "T, length of the cosine schedule", low=1, high=1000)
    steps: int = setting(
        1,
        "K, refinement steps of a prediction, 10 in the paper; 0 gives the segmentor's own mask; samples whose masks "
        "differ need more than 1",
        low=0,
        high=1000,
    )
    sampler: str = setting("ddim", "reverse step", choices=SAMPLERS)
    samples: int = setting(1, "masks drawn in a prediction; their probabilities are averaged", low=1, high=MOST_SAMPLES)
    seed: int = setting(0, "seed of the noise in prediction", low=0, high=LARGEST_SEED)
    binarized: bool = setting(True, "refiner with 1-bit weights and activations")
    cross_transformer: bool = setting(True, "exchange features with the segmentor by the X-Former")
    refiner_width: int = setting(32, "channels of the refiner's first stage; 128 in the paper (2D)", low=4, high=1024)
    refiner_norm: str = setting("instance", "normalisation in the refiner; paper: batch", choices=("instance", "batch"))
    prior_residual: bool = setting(
        True, "the refiner corrects the prior's mask; paper: false, it estimates the noise from scratch"
    )
    noise_loss: str = setting("focal", "loss of the estimated noise beside the KL divergence", choices=("focal", "bce"))
    focal_gamma: float = setting(2.0, "focusing parameter of the focal loss", low=0.0, high=100.0)
    calibrated: bool = setting(
        True, "turn what the trained loss makes of probabilities back before sampling; paper: false"
    )
    lambda_focal: float = setting(1.0, "weight of noise_loss in the diffusion loss", low=0.0, high=1000.0)
    lambda_diffusion: float = setting(1.0, "weight of the diffusion loss for the segmentor", low=0.0, high=1000.0)
    collaborative: bool = setting(True, "train the segmentor as well, by turns; false keeps it frozen")
    learning_rate: float = setting(1e-4, "of the refiner, at the start of the polynomial decay", low=0.0, high=1.0)
    segmentor_learning_rate: float = setting(1e-4, "of the segmentor beside the refiner", low=0.0, high=1.0)
    segmentor_trainer: str = setting(
        "nnUNetTrainer", "whose checkpoint_final.pth, same plans and fold, is the segmentor's start, if there is one"
    )
    segmentor_checkpoint: str | None = setting(None, "an nnU-Net checkpoint to use instead")
    pretraining_epochs: int | None = setting(
        None,
        "epochs for the segmentor alone if there is no checkpoint; null: half of the training",
        low=0,
        high=MOST_EPOCHS,
    )
    pretraining_learning_rate: float = setting(8e-4, "of the segmentor in these epochs", low=0.0, high=1.0)
    merit_variant: str = setting("small", "size of MERIT's backbones", choices=("small", "tiny", "nano"))
    merit_weights: str | None = setting(
        None, "MERIT's backbones: null random, timm for its pretrained weights, or a local file"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps > self.timesteps:
            raise SettingsError(f"steps is {self.steps}, expected 0 .. {self.timesteps}, the length of the schedule")
        if self.refiner_width % 4:
            raise SettingsError(f"refiner_width is {self.refiner_width}, expected a multiple of 4")


@dataclass(frozen=True)
class RecycleScoreSettings(Settings):
    """Settings of nnUNetTrainerRecycleScore: section ``score`` within ``diffusion``."""

    weight: float = setting(
        4.0,
        "weight of the score in the loss, beside the recipe's; the score makes the masks of one image differ; 0: they "
        "are all alike",
        low=0.0,
        high=1000.0,
    )
    latent_channels: int = setting(8, "how many random numbers one mask is made from", low=1, high=256)
    steps: int = setting(
        8, "how many single masks nnunetv2_diffusion predict averages, each of another mirrored view", low=1, high=1000
    )


@dataclass(frozen=True)
class DiffusionSettings(Settings):
    """All settings with their defaults. Units and meaning are in each field's ``doc``."""

    timesteps: int = setting(1001, "T, length of the noise schedule", low=1, high=100_000)
    beta_start: float = setting(1e-4, "first beta of the linear schedule", low=1e-8, high=0.999)
    beta_end: float = setting(0.02, "last beta of the linear schedule", low=1e-8, high=0.999)
    training_steps: int | None = setting(
        None,
        "train on a schedule respaced to so many steps (5 in table 8 of the paper); null: all T",
        low=1,
        high=100_000,
    )
    time_sampling: str = setting(
        "uniform",
        "how training draws t; importance-published reproduces the wrong weight of the published code",
        choices=("uniform", "importance", "importance-published"),
    )
    steps: int = setting(2, "K, network passes of one predicted sample; 5 in the paper", low=1, high=100_000)
    sampler: str = setting("ddpm", "reverse step", choices=SAMPLERS)
    step_spacing: str = setting(
        "trailing",
        "the K steps: linspace from T - 1 to 0, as in the paper; trailing from T - 1 to T / K, which is better",
        choices=SPACINGS,
    )
    eta: float = setting(0.0, "DDIM's noise, 0 deterministic to 1 as DDPM", low=0.0, high=1.0)
    samples: int = setting(1, "masks drawn in a prediction; their probabilities are averaged", low=1, high=MOST_SAMPLES)
    seed: int = setting(0, "seed of the noise in prediction", low=0, high=LARGEST_SEED)
    self_conditioning_probability: float = setting(
        0.5, "share of training samples that see the first pass's estimate", low=0.0, high=1.0
    )
    time_conditioning: bool = setting(
        True, "tell the network the time step; false reproduces the published, time-blind network"
    )
    mask_encoding: str = setting(
        "one-hot",
        "channels of the noisy mask: one a class, or ceil(log2 classes) analog bits; HiDiff has one a class",
        choices=("one-hot", "analog-bits"),
    )
    transformer_layers: int = setting(1, "self-attention layers at the bottleneck, 0 for none", low=0, high=64)
    transformer_heads: int = setting(8, "attention heads", low=1, high=1024)
    transformer_width: float = setting(
        0.25, "share of the bottleneck's channels that attention works in; 1 in the paper", low=0.01, high=1.0
    )
    recipe: str = setting(
        "paper",
        "optimiser, schedule and loss: the host's own, or those of Fu et al. 2024",
        choices=("nnunet", "paper"),
    )
    num_epochs: int | None = setting(None, "training length; null: nnU-Net's 1000", low=1, high=MOST_EPOCHS)
    num_iterations_per_epoch: int | None = setting(None, "null: nnU-Net's 250", low=1, high=1_000_000)
    num_val_iterations_per_epoch: int | None = setting(None, "null: nnU-Net's 50", low=1, high=1_000_000)
    max_bad_steps: int = setting(
        20, "stop a training after so many steps in a row whose loss or gradients are not finite", low=2, high=10_000
    )

    hidiff: HiDiffSettings = field(default_factory=HiDiffSettings, metadata={"doc": "settings of the HiDiff trainers"})
    score: RecycleScoreSettings = field(
        default_factory=RecycleScoreSettings, metadata={"doc": "settings of nnUNetTrainerRecycleScore"}
    )
    berdiff: BerDiffSettings = field(
        default_factory=BerDiffSettings, metadata={"doc": "settings of nnUNetTrainerBerDiff"}
    )
    flow: FlowSettings = field(default_factory=FlowSettings, metadata={"doc": "settings of nnUNetTrainerFlow"})

    def __post_init__(self) -> None:
        super().__post_init__()
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
        if not _has_signal(
            self.timesteps, self.beta_start, self.beta_end, self.training_steps, self.steps, self.step_spacing
        ):
            raise SettingsError(
                f"beta_end is {self.beta_end}, expected less, or fewer timesteps than {self.timesteps}: a step of the "
                f"chain of {self.training_steps or self.steps} would be noise alone, with a beta of 1"
            )

    @property
    def chain_length(self) -> int:
        """Number of time steps that training uses."""
        return self.training_steps or self.timesteps


def _kept(length: int, number: int, spacing: str) -> list[int]:
    """Indices of a respaced chain, as ``DiffusionProcess.respace`` keeps them."""
    if number == 1:
        return [length - 1]
    if spacing == "linspace":
        return [round(k * (length - 1) / (number - 1)) for k in range(number)]
    return [round(k / number * length) - 1 for k in range(1, number + 1)]


@lru_cache(maxsize=64)
def _has_signal(length: int, first: float, last: float, trained: int | None, steps: int, spacing: str) -> bool:
    """Whether all betas of a linear schedule are below 1 in double precision, also after it was respaced.

    The shares of signal that are left after each step, ``alphas_cumprod``, fall fast where betas are large.
    """
    betas = (first + (last - first) * t / max(length - 1, 1) for t in range(length))
    shares = list(accumulate((1 - beta for beta in betas), mul))
    for number, kind in ((trained, "linspace"), (steps, spacing)):
        if number is not None:
            shares = [shares[i] for i in _kept(len(shares), number, kind)]
            if not all(before > 0 and 0 < 1 - after / before < 1 for before, after in pairwise([1.0, *shares])):
                return False
    return True


# sections within the section: name -> its settings
SUBSECTIONS: dict[str, type[Settings]] = {
    HIDIFF: HiDiffSettings,
    "score": RecycleScoreSettings,
    "berdiff": BerDiffSettings,
    "flow": FlowSettings,
}


def settings_table(cls: type[Settings] = DiffusionSettings) -> str:
    """All settings of a section as a Markdown table; the README holds copies that a test compares."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for f in fields(cls):
        default = "{}" if f.name in SUBSECTIONS else json.dumps(f.default)
        choices = f.metadata.get("choices")
        named = ", ".join(str(choice) for choice in choices or () if choice is not None)
        meaning = f.metadata["doc"] + (f" ({named})" if named else "")
        rows.append(f"| `{f.name}` | {default} | {meaning} |")
    return "\n".join(rows)


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings with dotted names: those of a section within as ``hidiff.steps``."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def merge_settings(present: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A section with the changes in it; sections within it are merged and not replaced."""
    merged = {**present, **changes}
    for name in SUBSECTIONS:
        if isinstance(present.get(name), Mapping) and isinstance(changes.get(name), Mapping):
            merged[name] = {**present[name], **changes[name]}
    return merged


def read_assignments(texts: Iterable[str]) -> dict[str, Any]:
    """Changes from a command line: ``steps=5``, ``hidiff.refiner_norm=batch``.

    Args:
        texts: key=value each; the value is JSON, or a string if it is none.

    Returns:
        a section as for ``parse_settings``, which is not validated.

    Raises:
        SettingsError: for a text without key or sign, and for what an earlier version had.
    """
    section: dict[str, Any] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise SettingsError(f"{text!r} cannot be read, expected key=value, for example steps=5 or hidiff.steps=1")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        *outer, inner = key.strip().split(".")
        place = section
        for name in outer:
            place = place.setdefault(name, {})
        place[inner] = parsed
    for note in without_removed(section)[1]:
        raise SettingsError(note)
    return section


def parse_settings(section: Mapping[str, Any] | None, where: str = SECTION) -> DiffusionSettings:
    """Validate a settings section; what an earlier version had is told in the log, once, and left out.

    Args:
        section: the mapping found in the plans; None for all defaults.
        where: named in errors, e.g. "configuration 3d_fullres of nnUNetPlans".

    Raises:
        SettingsError: for an unknown key (naming the nearest known one) or a value that cannot be used.
    """
    if isinstance(section, Mapping):
        section, notes = without_removed(section)
        for note in notes:
            _tell(f"{where}: setting {note}")
        inner = {name: cls for name, cls in SUBSECTIONS.items() if name in section}
        parsed = {name: parse(cls, section[name], where, f"{SECTION}.{name}") for name, cls in inner.items()}
        section = {**section, **parsed}
    return parse(DiffusionSettings, section, where, SECTION)


@cache  # settings are read several times in a command
def _tell(note: str) -> None:
    LOG.warning(note)


def read_settings(configuration: Mapping[str, Any], name: str = "plans") -> DiffusionSettings:
    """Settings of one resolved configuration (``ConfigurationManager.configuration``)."""
    return parse_settings(configuration.get(SECTION), name)


def environment_overrides(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Sampling settings set by nnUNet_diffusion_{sampler,steps,samples,seed}.

    Raises:
        SettingsError: if a variable of that prefix is unknown, one that must be an integer is not, or the sampler was
            removed.
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
            overrides[key] = text.strip().lower()
            gone = removed_option(f"--{key}", overrides[key])
            if gone:
                raise SettingsError(f"{variable}: {gone}")
            continue
        try:
            overrides[key] = int(text)
        except ValueError:
            raise SettingsError(f"{variable} is {text!r}, expected an integer") from None
    return overrides


def apply_environment(settings: S, environ: Mapping[str, str] = os.environ) -> S:
    """Settings of a trainer with the environment's overrides, validated as a whole.

    Raises:
        SettingsError: naming the variables if the result cannot be used.
    """
    overrides = environment_overrides(environ)
    try:
        return replace(settings, **overrides)
    except SettingsError as error:
        names = ", ".join(f"{ENVIRONMENT_PREFIX}{k}={v}" for k, v in overrides.items())
        raise SettingsError(f"environment {names}: {error}") from None
