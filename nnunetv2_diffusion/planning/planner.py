"""What planners of this package share: plans of their own that fit the memory, with the diffusion settings in them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.paths import nnUNet_preprocessed

from nnunetv2_diffusion.compat import check_versions
from nnunetv2_diffusion.files import read_json
from nnunetv2_diffusion.planning.derive import add_settings, check_plans_name
from nnunetv2_diffusion.settings import SECTION, SettingsError, parse_settings

if TYPE_CHECKING:
    from nnunetv2_diffusion.planning.memory import MemoryEstimate

check_versions()

REFERENCE_CHANNELS, REFERENCE_LABELS = 1, {"background": 0, "first": 1, "second": 2}
"""Of the network that nnU-Net's limits were found with; it counts neither loss nor input channels."""
ONE_HOT_SHARE = 0.04
"""The classes of one-hot masks may take this share of the memory; beyond it, the planner writes them in bits."""
MANY = {"mask_encoding": "analog-bits"}


class DiffusionPlannerMixin:
    """Put in front of one of nnU-Net's planners: its rules, for the memory of another network.

    nnU-Net reduces patch and batch until a number that it counts meets a limit, which stands for so many GB. Here the
    number is replaced: the memory of one training step in bytes (``planning.memory``) has to be no more than that of
    nnU-Net's own network with few classes where it just meets the limit, counted in the same way. So nnU-Net's
    calibration is kept, and patch and batch shrink by what the trained network needs more: mask channels, modulation,
    transformer, optimiser, HiDiff's second network. The loss of many classes is counted as well, which nnU-Net does
    not do: its plans for a hundred classes take more than ``-gpu_memory_target``, these do not. No patch and no batch
    is larger than in nnU-Net's plans for few classes.

    Plans have a name and a data folder of their own. Every configuration that has an architecture gets the section
    ``diffusion`` with all settings, to be seen and edited in the file. Planning again keeps them as they were edited,
    and plans for them.

    The class keyword ``plans_name`` is the default name of the plans.

    Raises:
        PlansError: if the plans would get a name of nnU-Net's own (``-overwrite_plans_name``).
        SettingsError: if a section of the file that is there cannot be used; nothing is written then.
    """

    family = "recycling"  # see ``planning.memory``
    default_plans_name: str | None = None

    def __init_subclass__(cls, plans_name: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if plans_name is not None:
            cls.default_plans_name = plans_name

    def __init__(self, dataset_name_or_id: str | int, *args: Any, **kwargs: Any):
        if len(args) < 3 and self.default_plans_name:  # nnU-Net's order: memory target, preprocessor, plans name
            kwargs.setdefault("plans_name", self.default_plans_name)
        super().__init__(dataset_name_or_id, *args, **kwargs)
        check_plans_name(self.plans_identifier)
        self._settings: Mapping[str, Any] = {}
        self._caches: dict[str, dict] = {}
        self._notes: dict[str, str] = {}

    def generate_data_identifier(self, configuration_name: str) -> str:
        """Folder of preprocessed data: never one of another planner, whose data preprocessing would replace."""
        return f"{self.plans_identifier}_{configuration_name}"

    def get_plans_for_configuration(
        self, spacing: Any, median_shape: Any, data_identifier: str, approximate_n_voxels_dataset: float, _cache: dict
    ) -> dict:
        """As nnU-Net's, for the settings that the configuration has in the file, or with the mask encoding that fits.

        The cache given is not used: configurations with other settings need other memory.
        """
        given = spacing, median_shape, data_identifier, approximate_n_voxels_dataset
        name = data_identifier.removeprefix(self.generate_data_identifier(""))
        edited = self._edited_settings().get(name)
        plan = self._plan(given, edited or {})
        if edited is None and self._may_write_bits():
            share = self._one_hot_share(plan)
            self._notes.pop(name, None)
            if share > ONE_HOT_SHARE:
                plan = self._plan(given, MANY)
                self._notes[name] = (
                    f"{name}: mask_encoding is {MANY['mask_encoding']}: one channel for each of "
                    f"{len(self.dataset_json['labels'])} labels would take {share:.1%} of the memory, the limit is "
                    f"{ONE_HOT_SHARE:.0%}"
                )
        return plan

    def _plan(self, given: tuple, settings: Mapping[str, Any]) -> dict:
        """nnU-Net's plan for a configuration with some settings, which it has in it."""
        self._settings = settings
        cache = self._caches.setdefault(json.dumps(settings, sort_keys=True), {})
        plan = super().get_plans_for_configuration(*given, cache)
        if settings:
            plan[SECTION] = dict(settings)
        return plan

    def _may_write_bits(self) -> bool:
        """Only recycling chooses, and only for classes: regions are bits as they are."""
        regions = any(
            isinstance(label, list | tuple) and len(label) > 1 for label in self.dataset_json["labels"].values()
        )
        return self.family == "recycling" and not regions

    def _one_hot_share(self, plan: dict) -> float:
        """Part of the memory that is saved by writing classes in bits, at a plan's patch and batch."""
        one_hot, bits = (
            self._estimate(plan["patch_size"], plan["architecture"], settings).allocated(plan["batch_size"])
            for settings in ({}, MANY)
        )
        return 1 - bits / one_hot

    def _estimate(
        self, patch_size: Any, architecture: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> "MemoryEstimate":
        """Memory of the network that is trained."""
        from nnunetv2_diffusion.planning.memory import estimate_memory  # nnU-Net's trainer takes seconds to import

        configuration = {"patch_size": patch_size, "architecture": architecture, SECTION: settings}
        names = self.dataset_json.get("channel_names") or self.dataset_json["modality"]
        return estimate_memory(self.family, configuration, self.dataset_json, len(names))

    def static_estimate_VRAM_usage(  # noqa: N802 - nnU-Net's name
        self,
        patch_size: Any,
        input_channels: int,
        output_channels: int,
        arch_class_name: str,
        arch_kwargs: dict,
        arch_kwargs_req_import: tuple[str, ...],
    ) -> float:
        """In nnU-Net's units, the limit times the batch that it is meant for, over the batch that fits.

        nnU-Net calls it on the planner, so that it need not be static.
        """
        from nnunetv2_diffusion.planning.memory import WithoutContent, estimate_memory

        names = ("network_class_name", "arch_kwargs", "_kw_requires_import")
        architecture = dict(zip(names, (arch_class_name, arch_kwargs, arch_kwargs_req_import), strict=True))
        with WithoutContent():
            units = super().static_estimate_VRAM_usage(
                patch_size, REFERENCE_CHANNELS, len(REFERENCE_LABELS), *architecture.values()
            )
        limit, batch = self._limit(len(patch_size))
        if units / batch * 2 > limit:
            return units  # nnU-Net reduces this patch for its own network: no need to count
        planned = {"patch_size": patch_size, "architecture": architecture}
        stock = estimate_memory("stock", planned, {"labels": REFERENCE_LABELS}, REFERENCE_CHANNELS)
        own = self._estimate(patch_size, architecture, self._settings)
        budget = stock.fixed + limit * batch / units * stock.per_sample
        fitting = max((budget - own.fixed) / own.per_sample, 1e-3)  # weights alone may be too much
        return max(units, limit * batch / fitting)

    def _limit(self, dimensions: int) -> tuple[float, int]:
        """nnU-Net's number for the memory target, and the batch that it stands for."""
        scale = self.UNet_vram_target_GB / self.UNet_reference_val_corresp_GB
        if dimensions == 2:
            return self.UNet_reference_val_2d * scale, self.UNet_reference_val_corresp_bs_2d
        return self.UNet_reference_val_3d * scale, self.UNet_reference_val_corresp_bs_3d

    def _edited_settings(self) -> dict[str, Mapping[str, Any]]:
        """Sections of the file that is there, by configuration."""
        file = self._file()
        if not file.is_file():
            return {}
        configurations = read_json(file, SettingsError, "plans of nnU-Net").get("configurations", {})
        sections = {name: c[SECTION] for name, c in configurations.items() if SECTION in c}
        return {name: parse_settings(c, f"configuration {name} of {file}").to_dict() for name, c in sections.items()}

    def _file(self) -> Path:
        return Path(nnUNet_preprocessed) / self.dataset_name / f"{self.plans_identifier}.json"

    def save_plans(self, plans: dict) -> None:
        """As nnU-Net's, with the settings, and a word on those that were chosen.

        Raises:
            SettingsError: if a section of the file that is there cannot be used; nothing is written then.
        """
        edited = self._edited_settings()
        for name, configuration in plans["configurations"].items():
            if name in edited:
                configuration[SECTION] = edited[name]
        add_settings(plans["configurations"], {}, str(self._file()))
        super().save_plans(plans)
        for name in plans["configurations"]:
            if name in self._notes:
                print(f"{type(self).__name__}: {self._notes[name]}")


class HiDiffPlannerMixin(DiffusionPlannerMixin):
    """For HiDiff's trainers: two networks, of which one waits with its graph while the other is trained."""

    family = "hidiff"
