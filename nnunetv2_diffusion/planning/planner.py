"""What planners of this package share: their own plans, with the diffusion settings in them."""

import json
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed

from nnunetv2_diffusion.compat import check_versions
from nnunetv2_diffusion.planning.derive import add_settings, check_plans_name
from nnunetv2_diffusion.planning.settings import SECTION

check_versions()


class DiffusionPlannerMixin:
    """Put in front of one of nnU-Net's planners: it plans as before, under a name and with a data folder of its own.

    Every configuration that has an architecture gets the section ``diffusion`` with all settings, to be seen and
    edited in the file. Planning again keeps them as they were edited.

    The estimate of GPU memory is nnU-Net's: it counts the outputs of convolutions, to which the mask channels at the
    input add nothing. The first pass of recycling runs without gradients, but time modulation and transformer do need
    some memory that is not counted; plan with a smaller ``-gpu_memory_target`` where it is short.

    Raises:
        PlansError: if the plans would get a name of nnU-Net's own (``-overwrite_plans_name``).
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_plans_name(self.plans_identifier)

    def generate_data_identifier(self, configuration_name: str) -> str:
        """Folder of preprocessed data: never one of another planner, whose data preprocessing would replace."""
        return f"{self.plans_identifier}_{configuration_name}"

    def save_plans(self, plans: dict) -> None:
        """As nnU-Net's, with the settings.

        Raises:
            SettingsError: if a section of the file that is there cannot be used; nothing is written then.
        """
        file = Path(nnUNet_preprocessed) / self.dataset_name / f"{self.plans_identifier}.json"
        edited = json.loads(file.read_text(encoding="utf-8"))["configurations"] if file.is_file() else {}
        for name, configuration in plans["configurations"].items():
            if SECTION in edited.get(name, {}):
                configuration[SECTION] = edited[name][SECTION]
        add_settings(plans["configurations"], {}, str(file))
        super().save_plans(plans)
