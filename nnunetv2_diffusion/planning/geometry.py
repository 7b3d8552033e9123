"""Changes of plans that need data of their own: voxel spacing and normalisation."""

from collections.abc import Mapping
from typing import Any

import nnunetv2
from batchgenerators.utilities.file_and_folder_operations import join
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

from nnunetv2_diffusion.planning.derive import PlansError

GEOMETRY = ("spacing", "normalization_schemes")


def geometry_changes(
    configuration: Mapping[str, Any], overrides: Mapping[str, Any], identifier: str, where: str
) -> dict[str, Any]:
    """New values of a configuration's keys.

    Args:
        configuration: with what it inherits; not changed.
        overrides: any of ``spacing`` (mm, one number an axis, in the plans' order of axes) and
            ``normalization_schemes`` (names of nnU-Net's, one a channel).
        identifier: of the data that belong to the changed configuration.
        where: named in errors.

    Returns:
        {} if the overrides are what the configuration has.

    Raises:
        PlansError: naming the key, what was found and what was expected.
    """
    changes = {key: value for key, value in overrides.items() if value != configuration[key]}
    if not changes:
        return {}
    if "spacing" in changes:
        old, new = configuration["spacing"], changes["spacing"]
        numbers = isinstance(new, list) and all(isinstance(s, int | float) and s > 0 for s in new)
        if not numbers or len(new) != len(old):
            raise PlansError(f"{where}: spacing is {new!r}, expected {len(old)} positive numbers, in mm")
        sizes = configuration["median_image_size_in_voxels"]
        changes["median_image_size_in_voxels"] = [n * a / b for n, a, b in zip(sizes, old, new, strict=True)]
    if "normalization_schemes" in changes:
        _check_schemes(changes["normalization_schemes"], configuration["normalization_schemes"], where)
    return {**changes, "data_identifier": identifier}


def _check_schemes(schemes: Any, present: list[str], where: str) -> None:
    """Raise unless there is a scheme of nnU-Net's for each channel."""
    if not isinstance(schemes, list) or len(schemes) != len(present):
        raise PlansError(
            f"{where}: normalization_schemes is {schemes!r}, expected {len(present)} names, one a channel, as {present}"
        )
    folder = join(nnunetv2.__path__[0], "preprocessing", "normalization")
    for scheme in schemes:
        if recursive_find_python_class(folder, str(scheme), "nnunetv2.preprocessing.normalization") is None:
            raise PlansError(
                f"{where}: normalization_schemes has {scheme!r}, expected a name of nnU-Net's, as {present}"
            )
