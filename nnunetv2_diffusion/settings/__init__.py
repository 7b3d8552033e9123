"""What plans may say, by method; standard library alone, so that every command can read it at once."""

from nnunetv2_diffusion.settings.environment import (
    ALLOW,
    ENVIRONMENT_KEYS,
    ENVIRONMENT_PREFIX,
    apply_environment,
    environment_overrides,
)
from nnunetv2_diffusion.settings.gaussian import GaussianSettings
from nnunetv2_diffusion.settings.hidiff import HiDiffSettings
from nnunetv2_diffusion.settings.reference import settings_table
from nnunetv2_diffusion.settings.removed import without_removed
from nnunetv2_diffusion.settings.schema import S, Settings, SettingsError, documented, parse, setting
from nnunetv2_diffusion.settings.score import RecycleScoreSettings
from nnunetv2_diffusion.settings.sections import (
    SECTION,
    SUBSECTIONS,
    DiffusionSettings,
    earlier_notes,
    flatten,
    merge_settings,
    nest,
    parse_settings,
    read_assignments,
    read_settings,
)
from nnunetv2_diffusion.settings.vocabulary import (
    GAUSSIAN,
    HIDIFF,
    LARGEST_SEED,
    MOST_EPOCHS,
    MOST_SAMPLES,
    SAMPLERS,
    SPACINGS,
)

__all__ = [
    "ALLOW",
    "ENVIRONMENT_KEYS",
    "ENVIRONMENT_PREFIX",
    "GAUSSIAN",
    "HIDIFF",
    "LARGEST_SEED",
    "MOST_EPOCHS",
    "MOST_SAMPLES",
    "SAMPLERS",
    "SECTION",
    "SPACINGS",
    "SUBSECTIONS",
    "DiffusionSettings",
    "GaussianSettings",
    "HiDiffSettings",
    "RecycleScoreSettings",
    "S",
    "Settings",
    "SettingsError",
    "apply_environment",
    "documented",
    "earlier_notes",
    "environment_overrides",
    "flatten",
    "merge_settings",
    "nest",
    "parse",
    "parse_settings",
    "read_assignments",
    "read_settings",
    "setting",
    "settings_table",
    "without_removed",
]
