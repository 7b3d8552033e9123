"""What a continued training may change of its settings, and which settings a trainer reads."""

from collections.abc import Iterable
from typing import Any

from nnunetv2_diffusion.planning.settings import SUBSECTIONS, DiffusionSettings

# with another value of these the network is another one, or means something else
FIXED = frozenset(
    {
        "timesteps",
        "beta_start",
        "beta_end",
        "training_steps",
        "time_sampling",  # its history is in the checkpoint
        "time_conditioning",
        "mask_encoding",
        "transformer_layers",
        "transformer_heads",
        "transformer_width",
        "recipe",  # the optimiser's state is in the checkpoint
        "hidiff.timesteps",
        "hidiff.binarized",
        "hidiff.cross_transformer",
        "hidiff.refiner_width",
        "hidiff.refiner_norm",
        "hidiff.prior_residual",
        "hidiff.noise_loss",  # what the refiner's output means follows from its loss
        "hidiff.focal_gamma",
        "hidiff.lambda_focal",
        "hidiff.merit_variant",
        "score.latent_channels",
    }
)
# lengths, rates, weights of losses, and what prediction alone uses
FREE = frozenset(
    {
        "steps",
        "sampler",
        "step_spacing",
        "eta",
        "samples",
        "seed",
        "self_conditioning_probability",
        "num_epochs",
        "num_iterations_per_epoch",
        "num_val_iterations_per_epoch",
        "max_bad_steps",
        "hidiff.steps",
        "hidiff.sampler",
        "hidiff.samples",
        "hidiff.seed",
        "hidiff.calibrated",
        "hidiff.lambda_diffusion",
        "hidiff.collaborative",
        "hidiff.learning_rate",
        "hidiff.segmentor_learning_rate",
        "hidiff.segmentor_trainer",
        "hidiff.segmentor_checkpoint",
        "hidiff.pretraining_epochs",
        "hidiff.pretraining_learning_rate",
        "hidiff.merit_weights",
        "mixture.recycle_share",
        "mixture.truth_corruption",
        "score.weight",
        "score.steps",
    }
)

# groups that trainers read
LENGTHS = frozenset({"num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "max_bad_steps"})
TRANSFORMER = frozenset({"transformer_layers", "transformer_heads", "transformer_width"})
GAUSSIAN = frozenset(
    {
        *("timesteps", "beta_start", "beta_end", "training_steps", "time_sampling", "time_conditioning"),
        *("mask_encoding", "steps", "sampler", "step_spacing", "eta", "samples", "seed"),
    }
)


def flat(settings: DiffusionSettings) -> dict[str, Any]:
    """All settings by name, those of a section within as ``hidiff.steps``."""
    values: dict[str, Any] = {}
    for name, value in settings.to_dict().items():
        values.update({f"{name}.{key}": v for key, v in value.items()} if name in SUBSECTIONS else {name: value})
    return values


def section_names(section: str) -> frozenset[str]:
    """Names of all settings of a section within, as ``hidiff.steps``."""
    return frozenset(name for name in flat(DiffusionSettings()) if name.startswith(f"{section}."))


def changes(old: DiffusionSettings, new: DiffusionSettings, names: Iterable[str]) -> dict[str, str]:
    """Settings that differ, of those named, each as ``name old -> new``."""
    before, after = flat(old), flat(new)
    return {n: f"{n} {before[n]} -> {after[n]}" for n in before if n in names and before[n] != after[n]}


def unread(settings: DiffusionSettings, reads: Iterable[str]) -> list[str]:
    """Settings with another value than the default that a trainer does not read, as ``steps=5``.

    Where it reads one of the same name in its own section, that is named.
    """
    default, reads = flat(DiffusionSettings()), frozenset(reads)
    found = []
    for name, value in flat(settings).items():
        if value != default[name] and name not in reads:
            own = [other for other in reads if other.endswith(f".{name}")]
            found.append(f"{name}={value}" + (f" (it reads {own[0]})" if own else ""))
    return found
