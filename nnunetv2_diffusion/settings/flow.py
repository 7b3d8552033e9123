"""Settings of nnUNetTrainerFlow."""

from dataclasses import dataclass

from nnunetv2_diffusion.settings.schema import Settings, setting


@dataclass(frozen=True)
class FlowSettings(Settings):
    """Section ``flow``, read by nnUNetTrainerFlow."""

    steps: int = setting(5, "K, Euler steps of a prediction", low=1, high=1000)
