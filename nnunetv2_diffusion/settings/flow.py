"""Settings of nnUNetTrainerFlow."""

from dataclasses import dataclass

from nnunetv2_diffusion.planning.schema import Settings, setting


@dataclass(frozen=True)
class FlowSettings(Settings):
    """Settings of nnUNetTrainerFlow: section ``flow`` within ``diffusion``."""

    steps: int = setting(5, "K, Euler steps of a prediction", low=1, high=1000)
