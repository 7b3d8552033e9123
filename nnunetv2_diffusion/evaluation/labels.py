"""Classes and regions of a dataset.json as boolean masks, and the label that is to be ignored."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_diffusion.evaluation import EvaluationError


@dataclass(frozen=True)
class Target:
    """A foreground class or region that is scored.

    Attributes:
        key: as nnU-Net writes it in summary.json: "1" for a class, "(1, 2)" for a region.
        name: of dataset.json.
        labels: the values in a segmentation that belong to it.
        head: its channel in the probabilities that nnU-Net exports.
    """

    key: str
    name: str
    labels: tuple[int, ...]
    head: int


@dataclass(frozen=True)
class LabelSet:
    """What the values of a segmentation mean.

    Attributes:
        targets: classes, or regions if the data set has any, in nnU-Net's order; no background.
        known: all values that a prediction may have.
        heads: channels of exported probabilities.
        ignore: value of a reference whose voxels do not count; None if there is none.
    """

    targets: tuple[Target, ...]
    known: tuple[int, ...]
    heads: int
    ignore: int | None = None

    def mask(self, segmentation: np.ndarray, target: Target) -> np.ndarray:
        """Where a segmentation is of a class or region; bool, of the same shape."""
        if len(target.labels) == 1:
            return segmentation == target.labels[0]
        return np.isin(segmentation, target.labels)

    def masks(self, segmentation: np.ndarray) -> np.ndarray:
        """One mask for each target: (targets, *spatial), bool."""
        return np.stack([self.mask(segmentation, target) for target in self.targets])

    def valid(self, reference: np.ndarray) -> np.ndarray | None:
        """Where a reference is not to be ignored, bool; None if the data set has no ignore label."""
        return None if self.ignore is None else reference != self.ignore

    def check_values(self, values: np.ndarray, where: str, ignore: bool) -> None:
        """Raise if a segmentation has values that are no label.

        Args:
            values: of the segmentation; of any number type.
            where: names it in the error.
            ignore: whether it may have the ignore label, as references may and predictions may not.

        Raises:
            EvaluationError: with the values found and those expected.
        """
        expected = sorted({*self.known, *([self.ignore] if ignore and self.ignore is not None else [])})
        low, high = (values.min(), values.max()) if values.size else (0, 0)
        table = np.zeros(expected[-1] + 1, bool)
        table[expected] = True
        with np.errstate(invalid="ignore"):  # NaN and infinity become some integer, which is not equal to them
            integers = values.astype(np.int32)
        whole = np.array_equal(integers, values)
        if whole and low >= 0 and high < len(table) and table[integers].all():
            return
        found = np.setdiff1d(values, expected)
        text = ", ".join(f"{value:g}" for value in found[:5]) + (", ..." if len(found) > 5 else "")
        raise EvaluationError(f"{where}: has the value(s) {text}, expected only the labels {_ranges(expected)}")


def read_labels(dataset_json: Mapping[str, Any], plans: Mapping[str, Any] | None, where: str) -> LabelSet:
    """Classes or regions as nnU-Net's label manager reads them.

    Args:
        dataset_json: content of dataset.json.
        plans: content of plans.json, which may name another label manager; nnU-Net's default one without.
        where: names dataset.json in errors.

    Raises:
        EvaluationError: if nnU-Net cannot use the labels.
    """
    try:
        if plans is None:
            manager = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
        else:
            manager = PlansManager(dict(plans)).get_label_manager(dict(dataset_json))
        scored = manager.foreground_regions if manager.has_regions else manager.foreground_labels
        names = {_values(value): str(name) for name, value in manager.label_dict.items()}
        known = tuple(int(label) for label in manager.all_labels)
    except Exception as error:
        raise EvaluationError(f"{where}: 'labels' cannot be used: {type(error).__name__}: {error}") from error
    if not scored:
        raise EvaluationError(f"{where}: 'labels' has no foreground, expected one class or region at least")
    targets = []
    for index, item in enumerate(scored):
        values = _values(item)
        key = str(values) if isinstance(item, (tuple, list)) else str(values[0])
        head = index if manager.has_regions else known.index(values[0])
        targets.append(Target(key, names.get(values, key), values, head))
    return LabelSet(tuple(targets), known, manager.num_segmentation_heads, manager.ignore_label)


def _values(item: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in item) if isinstance(item, (tuple, list)) else (int(item),)


def _ranges(values: list[int]) -> str:
    """Sorted integers, runs of three or more as a range: 0-3, 7."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts)
