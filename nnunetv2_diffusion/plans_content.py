"""Whether plans and dataset.json hold what a prediction uses, with names of nnU-Net's own classes alone."""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import nnunetv2
from batchgenerators.utilities.file_and_folder_operations import join
from nnunetv2.preprocessing.resampling.utils import recursive_find_resampling_fn_by_name
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_diffusion.architecture import check_configuration, short

PLANS_KEYS = {
    "dataset_name": str,
    "plans_name": str,
    "image_reader_writer": str,
    "transpose_forward": list,
    "transpose_backward": list,
}
# functions and classes that plans name: key -> (folder of nnU-Net, whether it is a class)
CONFIGURATION_NAMES = {
    "preprocessor_name": (("preprocessing",), True),
    "resampling_fn_data": (("preprocessing", "resampling"), False),
    "resampling_fn_seg": (("preprocessing", "resampling"), False),
    "resampling_fn_probabilities": (("preprocessing", "resampling"), False),
}
MOST_LABELS = 1024


class PlansContentError(ValueError):
    """Plans or dataset.json lack something, or hold what cannot be used."""


def check_plans_content(plans: Any, configuration: str, dataset_json: Any, where: str) -> ConfigurationManager:
    """A configuration of plans, if it and dataset.json can be used to predict.

    Args:
        plans: content of plans.json, or of a checkpoint.
        configuration: its name.
        dataset_json: content of dataset.json.
        where: the file or folder, for errors.

    Raises:
        PlansContentError: naming the key, what was found and what was expected.
        UnsupportedArchitectureError: if the architecture or a number cannot be used.
    """
    manager, settings = _resolve(plans, configuration, where)
    for key, kind in PLANS_KEYS.items():
        if not isinstance(plans.get(key), kind):
            raise _bad(where, f"{key} of the plans", plans.get(key), f"a {kind.__name__}")
    check_transposes(plans, where)
    check_configuration(settings.configuration, f"{where}: configuration {configuration}")
    _check_name(plans["image_reader_writer"], ("imageio",), True, where, "image_reader_writer")
    if "label_manager" in plans:
        _check_name(plans["label_manager"], ("utilities", "label_handling"), True, where, "label_manager")
    for key, (folders, is_class) in CONFIGURATION_NAMES.items():
        _check_name(settings.configuration.get(key), folders, is_class, where, key)
    _check_resampling(settings.configuration, where)
    _check_dataset(dataset_json, where)
    channels = _check_labels(manager, settings, dataset_json, where)
    _check_normalization(plans, settings.configuration, channels, where)
    return settings


def check_transposes(plans: Mapping[str, Any], where: str) -> None:
    """Raise unless transpose_forward is an order of the three axes, and transpose_backward undoes it.

    Raises:
        PlansContentError: naming the key, what was found and what was expected.
    """
    for key in ("transpose_forward", "transpose_backward"):
        axes = plans.get(key)
        if not isinstance(axes, list | tuple) or not all(type(n) is int for n in axes) or sorted(axes) != [0, 1, 2]:
            raise _bad(where, f"{key} of the plans", axes, "0, 1 and 2 in some order")
    forward, backward = plans["transpose_forward"], plans["transpose_backward"]
    undoes = [forward.index(axis) for axis in range(3)]
    if list(backward) != undoes:
        raise _bad(
            where, "transpose_backward of the plans", backward, f"{undoes}, which undoes transpose_forward {forward}"
        )


def _bad(where: str, key: str, found: Any, expected: str) -> PlansContentError:
    return PlansContentError(f"{where}: {key} is {short(found)}, expected {expected}")


def _resolve(plans: Any, configuration: str, where: str) -> tuple[PlansManager, ConfigurationManager]:
    """A configuration with what it inherits, as nnU-Net resolves it."""
    if not isinstance(plans, dict):
        raise _bad(where, "the content of the plans", plans, "a mapping")
    known = plans.get("configurations")
    if not isinstance(known, dict) or not all(isinstance(c, dict) for c in known.values()):
        raise _bad(where, "configurations of the plans", known, "a mapping of names to configurations")
    if configuration not in known:
        raise _bad(where, "the configuration", configuration, f"one of the plans: {', '.join(known)}")
    manager = PlansManager(plans)
    try:
        return manager, manager.get_configuration(configuration)
    except (RuntimeError, ValueError, TypeError, KeyError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PlansContentError(f"{where}: configuration {configuration} cannot be resolved ({reason})") from None


def _check_name(name: Any, folders: tuple[str, ...], is_class: bool, where: str, key: str) -> None:
    """Raise unless nnU-Net has a class or function of that name of its own: its finder takes whatever is imported."""
    module = ".".join(("nnunetv2", *folders))
    found = None
    if isinstance(name, str) and re.fullmatch(r"[A-Za-z_]\w*", name):
        found = recursive_find_python_class(join(nnunetv2.__path__[0], *folders), name, module)
    fits: Callable[[Any], bool] = (lambda x: isinstance(x, type)) if is_class else callable
    if not fits(found) or not str(getattr(found, "__module__", "")).startswith(f"{module}."):
        raise _bad(where, key, name, f"a {'class' if is_class else 'function'} in nnU-Net's {module}")


def _check_resampling(configuration: Mapping[str, Any], where: str) -> None:
    for key in (name for name in CONFIGURATION_NAMES if name.startswith("resampling")):
        kwargs = configuration.get(f"{key}_kwargs")
        if not isinstance(kwargs, dict):
            raise _bad(where, f"{key}_kwargs", kwargs, "a mapping")
        try:  # data, new shape, current and new spacing come from nnU-Net
            inspect.signature(recursive_find_resampling_fn_by_name(configuration[key])).bind(*[None] * 4, **kwargs)
        except TypeError as error:
            raise _bad(where, f"{key}_kwargs", kwargs, f"arguments of {configuration[key]} ({error})") from None
        for name, value in kwargs.items():
            if name.startswith("order") and (isinstance(value, bool) or value not in range(6)):
                raise _bad(where, f"{key}_kwargs.{name}", value, "an order of splines, 0 .. 5")


def _check_dataset(dataset_json: Any, where: str) -> None:
    """Raise unless dataset.json has channels, labels and the ending of files, of the right kinds."""
    if not isinstance(dataset_json, dict):
        raise _bad(where, "the content of dataset.json", dataset_json, "a mapping")
    check_channels_and_labels(dataset_json, where)
    ending = dataset_json.get("file_ending")
    if not isinstance(ending, str) or not re.fullmatch(r"\.[\w.+-]{1,30}", ending):
        raise _bad(where, "file_ending of dataset.json", ending, "an ending as .nii.gz")


def check_channels_and_labels(dataset_json: Mapping[str, Any], where: str) -> None:
    """Raise unless channels have names, and labels are names with integers, or lists of them.

    Raises:
        PlansContentError: naming the key, what was found and what was expected.
    """
    channels, labels = dataset_json.get("modality", dataset_json.get("channel_names")), dataset_json.get("labels")
    if not isinstance(channels, dict) or not 1 <= len(channels) <= MOST_LABELS:
        raise _bad(where, "channel_names of dataset.json", channels, "a mapping with a name for each channel")
    if not isinstance(labels, dict) or not 2 <= len(labels) <= MOST_LABELS:
        raise _bad(where, "labels of dataset.json", labels, "a mapping of names to labels, background: 0 among them")
    for name, value in labels.items():
        values = value if isinstance(value, list | tuple) else [value]
        numbers = [int(v) if isinstance(v, str) and v.isdecimal() and len(v) < 6 else v for v in values]
        if not numbers or not all(type(v) is int and 0 <= v < 65536 for v in numbers):
            raise _bad(where, f"label {name!r} of dataset.json", value, "an integer from 0 to 65535, or a list of them")
    lists = [list(value) if isinstance(value, list | tuple) else [value] for value in labels.values()]
    regions = any(len(values) > 1 for values in lists)  # may overlap
    if not regions and len({int(values[0]) for values in lists}) < len(lists):
        raise _bad(where, "labels of dataset.json", labels, "another value for each name")


def _check_labels(manager: PlansManager, settings: ConfigurationManager, dataset_json: dict, where: str) -> int:
    """Number of image channels, if nnU-Net can make heads and inputs of the labels."""
    try:
        labels = manager.get_label_manager(dataset_json)
        heads = labels.num_segmentation_heads
        determine_num_input_channels(manager, settings, dataset_json)
    except (AssertionError, RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PlansContentError(f"{where}: labels of dataset.json cannot be used ({reason})") from None
    if not 1 <= heads <= MOST_LABELS:
        raise _bad(where, "labels of dataset.json", dataset_json["labels"], f"1 .. {MOST_LABELS} classes or regions")
    return len(dataset_json.get("modality", dataset_json.get("channel_names")))


def _check_normalization(plans: dict, configuration: Mapping[str, Any], channels: int, where: str) -> None:
    """Raise unless every image channel has a scheme of nnU-Net's and the numbers for it."""
    schemes, masks = configuration.get("normalization_schemes"), configuration.get("use_mask_for_norm")
    for key, value in (("normalization_schemes", schemes), ("use_mask_for_norm", masks)):
        if not isinstance(value, list | tuple) or len(value) < channels:
            raise _bad(where, key, value, f"a list with one for each of {channels} channels")
    for scheme in schemes:
        _check_name(scheme, ("preprocessing", "normalization"), True, where, "normalization_schemes")
    old = plans.get("foreground_intensity_properties_by_modality")
    key = "foreground_intensity_properties_per_channel"
    properties = plans.get(key, old)
    if not isinstance(properties, dict) or not all(isinstance(properties.get(str(c)), dict) for c in range(channels)):
        raise _bad(where, key, properties, f"a mapping for {channels} channels")
    for channel, values in properties.items():
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, int | float) and not math.isfinite(value):
                raise _bad(where, f"intensity {name} of channel {channel}", value, "a finite number")


def foreground_labels(dataset_json: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> values of every label or region of a dataset.json but for background and ignore, in the order of heads.

    As in nnU-Net's label manager, heads follow the values of labels, and the order of the file for regions.
    """
    values = {
        name: tuple(int(v) for v in (value if isinstance(value, list | tuple) else [value]))
        for name, value in dataset_json["labels"].items()
        if name != "ignore"
    }
    foreground = [(name, value) for name, value in values.items() if set(value) != {0}]
    if all(len(value) == 1 for value in values.values()):
        foreground.sort(key=lambda item: item[1])
    return dict(foreground)
