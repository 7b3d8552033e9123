"""What a continued training may change of its settings, and which settings a trainer reads."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from nnunetv2_diffusion.architecture import short
from nnunetv2_diffusion.settings import DiffusionSettings, flatten

# with another value of these the network is another one, or means something else
FIXED = frozenset(
    {
        "time_conditioning",
        "mask_encoding",
        "transformer_layers",
        "transformer_heads",
        "transformer_width",
        "recipe",  # the optimiser's state is in the checkpoint
        "gaussian.timesteps",
        "gaussian.betas",
        "gaussian.training_steps",
        "gaussian.time_sampling",  # its history is in the checkpoint
        "hidiff.timesteps",
        "hidiff.binarized",
        "hidiff.cross_transformer",
        "hidiff.refiner_width",
        "hidiff.refiner_norm",
        "hidiff.published",
        "hidiff.prior_residual",
        "hidiff.noise_loss",  # what the refiner's output means follows from its loss
        "hidiff.focal_gamma",
        "hidiff.lambda_focal",
        "hidiff.merit",
        "score.latent_channels",
    }
)
# lengths, rates, weights of losses, and what prediction alone uses
FREE = frozenset(
    {
        "samples",
        "seed",
        "num_epochs",
        "num_iterations_per_epoch",
        "num_val_iterations_per_epoch",
        "max_bad_steps",
        "gaussian.steps",
        "gaussian.sampler",
        "gaussian.step_spacing",
        "gaussian.eta",
        "gaussian.self_conditioning_probability",
        "hidiff.steps",
        "hidiff.sampler",
        "hidiff.samples",
        "hidiff.seed",
        "hidiff.step_spacing",
        "hidiff.calibrated",
        "hidiff.lambda_diffusion",
        "hidiff.collaborative",
        "hidiff.learning_rate",
        "hidiff.segmentor_learning_rate",
        "hidiff.segmentor",
        "hidiff.pretraining_epochs",
        "hidiff.pretraining_learning_rate",
        "hidiff.merit_weights",
        "score.weight",
        "score.steps",
        "berdiff.steps",
        "flow.steps",
    }
)
# of plans: with another value images reach the network otherwise, or the network computes something else
MEANING = (
    *("spacing", "normalization_schemes", "use_mask_for_norm", "preprocessor_name", "architecture"),
    *("resampling_fn_data", "resampling_fn_data_kwargs", "resampling_fn_seg", "resampling_fn_seg_kwargs"),
    *("transpose_forward", "transpose_backward"),
)
AXES = ("transpose_forward", "transpose_backward")  # beside the configurations

# groups that trainers read
LENGTHS = frozenset({"num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "max_bad_steps"})
TRANSFORMER = frozenset({"transformer_layers", "transformer_heads", "transformer_width"})
COMMON = LENGTHS | TRANSFORMER | {"recipe", "samples", "seed", "time_conditioning"}


def flat(settings: DiffusionSettings) -> dict[str, Any]:
    """All settings by name, those of a section as ``hidiff.steps``, those of version 0.1 included."""
    return flatten(settings.to_dict(everything=True))


def section_names(section: str) -> frozenset[str]:
    """Names of all settings of a section, as ``hidiff.steps``."""
    return frozenset(name for name in flat(DiffusionSettings()) if name.startswith(f"{section}."))


GAUSSIAN = section_names("gaussian") | {"time_conditioning", "mask_encoding", "samples", "seed"}


def changes(old: DiffusionSettings, new: DiffusionSettings, names: Iterable[str]) -> dict[str, str]:
    """Settings that differ, of those named, each as ``name old -> new``."""
    before, after = flat(old), flat(new)
    return {n: f"{n} {before[n]} -> {after[n]}" for n in before if n in names and before[n] != after[n]}


def plans_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What differs between a configuration of a checkpoint and that of the plans, beside the settings.

    Args:
        old: of the checkpoint, resolved; keys that it lacks are not compared.
        new: of the plans, resolved.

    Returns:
        what changes the meaning of the network or its input, and all else, each as ``name old -> new``.
    """
    meaning: list[str] = []
    other: list[str] = []
    for key in sorted(set(old) - {"diffusion", "inherits_from"}):
        before, after = _leaves(old[key], key), _leaves(new.get(key), key)
        found = [_change(n, before.get(n), after.get(n)) for n in {**before, **after} if before.get(n) != after.get(n)]
        (meaning if key in MEANING else other).extend(found)
    return meaning, other


def dataset_changes(old: Any, new: Mapping[str, Any]) -> list[str]:
    """Labels and channels of dataset.json that differ from those of a checkpoint, each as ``name old -> new``.

    The order of keys is no difference, but for regions: it is that of the network's outputs.

    Args:
        old: of the checkpoint; what it lacks is not compared.
        new: of the data set.
    """
    old = old if isinstance(old, Mapping) else {}
    found = []
    for what, read in (("label", _labels), ("channel", _channels)):
        before, after = read(old), read(new)
        names = {**before, **after} if before else {}
        found += [_change(f"{what} {n!r}", before.get(n), after.get(n)) for n in names if before.get(n) != after.get(n)]
    before, after = _labels(old), _labels(new)
    if found or not any(isinstance(value, list) for value in after.values()):
        return found
    if list(before) != list(after) and before:
        found.append(_change("order of the regions", list(before), list(after)))
    key = "regions_class_order"
    if key in old and _plain(old[key]) != _plain(new.get(key)):
        found.append(_change(key, old[key], new.get(key)))
    return found


def _change(name: str, old: Any, new: Any) -> str:
    return f"{name} {short(old)} -> {short(new)}"


def _plain(value: Any) -> Any:
    """A value with lists for tuples, as JSON has them."""
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _leaves(value: Any, name: str) -> dict[str, Any]:
    """Values within mappings by dotted names."""
    if not isinstance(value, Mapping):
        return {name: _plain(value)}
    found: dict[str, Any] = {}
    for key, entry in value.items():
        found.update(_leaves(entry, f"{name}.{key}"))
    return found


def _labels(dataset_json: Mapping[str, Any]) -> dict[str, int | list[int]]:
    """Numbers of labels by name; several of a region sorted, and background and ignore, no outputs, last."""
    labels = dataset_json.get("labels")
    if not isinstance(labels, Mapping):
        return {}
    last = ("background", "ignore")
    names = [name for name in labels if name not in last] + [name for name in last if name in labels]
    try:
        numbers = {name: sorted({int(n) for n in np.ravel(labels[name])}) for name in names}
    except (TypeError, ValueError):  # nothing that nnU-Net could train with
        return {}
    return {name: values[0] if len(values) == 1 else values for name, values in numbers.items()}


def _channels(dataset_json: Mapping[str, Any]) -> dict[str, str]:
    """Names of channels by number."""
    channels = dataset_json.get("modality", dataset_json.get("channel_names"))
    return {str(n): name for n, name in channels.items()} if isinstance(channels, Mapping) else {}


def unread(settings: DiffusionSettings, reads: Iterable[str]) -> list[str]:
    """Settings with another value than the default that a trainer does not read, as ``steps=5``.

    Where it reads one of the same name in another section, that is named.
    """
    default, reads = flat(DiffusionSettings()), frozenset(reads)
    found = []
    for name, value in flat(settings).items():
        if value != default[name] and name not in reads:
            last = name.rpartition(".")[2]
            own = sorted(other for other in reads if other.rpartition(".")[2] == last)
            found.append(f"{name}={value}" + (f" (it reads {own[0]})" if own else ""))
    return found
