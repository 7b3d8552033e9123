"""Settings of nnUNetTrainerRecycleScore."""

from dataclasses import dataclass

from nnunetv2_diffusion.settings.schema import Settings, setting


@dataclass(frozen=True)
class RecycleScoreSettings(Settings):
    """Section ``score``, read by nnUNetTrainerRecycleScore."""

    weight: float = setting(
        4.0,
        "weight of the score in the loss, beside the recipe's; the score makes the masks of one image differ; 0: they "
        "are all alike",
        low=0.0,
        high=1000.0,
    )
    latent_channels: int = setting(8, "how many random numbers one mask is made from", low=1, high=256)
    steps: int = setting(
        8, "how many single masks nnunetv2_diffusion predict averages, each of another mirrored view", low=1, high=1000
    )
