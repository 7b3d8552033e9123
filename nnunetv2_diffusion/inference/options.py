"""What can be asked of a prediction."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from nnunetv2_diffusion.diffusion import SAMPLERS, SPACINGS
from nnunetv2_diffusion.sampling import SamplingConfig
from nnunetv2_diffusion.sampling.views import TTA
from nnunetv2_diffusion.settings import LARGEST_SEED, MOST_SAMPLES, environment_overrides

CHOICES = {"sampler": SAMPLERS, "step_spacing": SPACINGS, "tta": TTA}
BOUNDS = {"steps": (0, 100_000), "samples": (1, MOST_SAMPLES), "seed": (0, LARGEST_SEED)}


class OptionError(ValueError):
    """An option cannot be used, or not with this model."""


def check_number(name: str, value: float | None, low: float, high: float) -> None:
    """Raise OptionError unless a number lies in [low, high]; None is not given."""
    if value is None or (isinstance(value, int | float) and low <= value <= high):
        return
    expected = f"at least {low}" if isinstance(value, int | float) and value < low else f"a value in [{low}, {high}]"
    found = f"{value!r}"
    raise OptionError(f"{name} is {found if len(found) < 60 else found[:57] + '...'}, expected {expected}")


@dataclass(frozen=True)
class PredictionOptions:
    """Options of a prediction; None takes what the model's plans (or the environment) say.

    Attributes:
        steps: K, reverse steps; 0 for the segmentor's own mask of a HiDiff model.
        sampler: "ddpm" or "ddim", see ``SamplingConfig``.
        samples: N, masks drawn; the result is their mean.
        seed: of the noise.
        step_spacing: "linspace": the steps end at t = 0. "trailing": at T / K, one of equal length from there.
        tta: "full": a chain for each of nnU-Net's mirrored views. "interleaved": one chain whose steps see different
            views. "none".
        save_uncertainty: maps and a JSON of statistics for each case.
        save_samples: the mask of every sample.
        save_steps: the mask after every step.
        save_probabilities: nnU-Net's npz and pkl.

    Raises:
        OptionError: for a value out of range.
    """

    steps: int | None = None
    sampler: str | None = None
    samples: int | None = None
    seed: int | None = None
    step_spacing: str | None = None
    tta: str = "interleaved"
    save_uncertainty: bool = False
    save_samples: bool = False
    save_steps: bool = False
    save_probabilities: bool = False

    def __post_init__(self) -> None:
        for name, (low, high) in BOUNDS.items():
            check_number(f"--{name}", getattr(self, name), low, high)
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise OptionError(f"--{name} is {value!r}, expected one of {', '.join(known)}")


def resolve_sampling(network: nn.Module, options: PredictionOptions) -> SamplingConfig | None:
    """How a network samples with these options; None if it has no chain.

    Raises:
        OptionError: if the network cannot do what is asked for.
    """
    given = {k: getattr(options, k) for k in ("steps", "sampler", "samples", "seed", "step_spacing")}
    given = {k: v for k, v in given.items() if v is not None}
    if not getattr(network, "has_chain", False):
        return _without_chain(given, "the network of this model has no diffusion process")
    if given.get("steps") == 0 and network.least_steps > 0:
        raise OptionError("--steps is 0: this model needs at least one step; 0 is for HiDiff models")
    insists = bool(given.get("steps") or environment_overrides().get("steps"))
    try:
        config = network.resolve(given, insists)
    except ValueError as error:
        raise OptionError(f"--steps, --sampler, --step_spacing, --samples or --seed cannot be used: {error}") from error
    return config or _without_chain(given, "--steps 0 predicts with HiDiff's segmentor alone")


def _without_chain(given: dict[str, Any], reason: str) -> None:
    """None, if nothing is asked for that needs a chain."""
    if given.get("samples", 1) > 1 or given.get("steps", 0) > 1:
        asked = ", ".join(f"--{k} {v}" for k, v in given.items() if k in ("samples", "steps"))
        raise OptionError(f"{asked}: {reason}, so there is one step and nothing to draw samples from")
