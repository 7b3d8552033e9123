"""Settings of nnUNetTrainerBerDiff."""

from dataclasses import dataclass

from nnunetv2_diffusion.planning.schema import Settings, setting


@dataclass(frozen=True)
class BerDiffSettings(Settings):
    """Settings of nnUNetTrainerBerDiff: section ``berdiff`` within ``diffusion``."""

    steps: int = setting(10, "K, reverse steps of a prediction", low=1, high=1000)
