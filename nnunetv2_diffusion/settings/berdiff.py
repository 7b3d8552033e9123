"""Settings of nnUNetTrainerBerDiff."""

from dataclasses import dataclass

from nnunetv2_diffusion.settings.schema import Settings, setting


@dataclass(frozen=True)
class BerDiffSettings(Settings):
    """Section ``berdiff``, read by nnUNetTrainerBerDiff."""

    steps: int = setting(10, "K, reverse steps of a prediction", low=1, high=1000)
