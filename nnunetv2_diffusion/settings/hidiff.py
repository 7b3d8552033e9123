"""Settings of the HiDiff trainers."""

import re
from dataclasses import dataclass

from nnunetv2_diffusion.settings.schema import Settings, SettingsError, setting
from nnunetv2_diffusion.settings.vocabulary import LARGEST_SEED, MOST_EPOCHS, MOST_SAMPLES, SAMPLERS, SPACINGS

HOST_TRAINER = "nnUNetTrainer"
# rates at which the segmentor learns alone: of the published training, and ours
PUBLISHED_RATE_ALONE, RATE_ALONE = 1e-4, 8e-4


def is_trainer(name: str) -> bool:
    """Whether a segmentor is named by its trainer, and not by a file."""
    return re.fullmatch(r"[A-Za-z_]\w*", name) is not None


@dataclass(frozen=True)
class HiDiffSettings(Settings):
    """Section ``hidiff``, read by nnUNetTrainerHiDiff and nnUNetTrainerHiDiffMERIT.

    The ablation of Chen et al. 2024 (table X): V1 is collaborative, cross_transformer and binarized false with
    noise_loss bce; V2 sets collaborative, V3 noise_loss focal, V4 cross_transformer, V5 (default) binarized.
    """

    steps: int = setting(
        1,
        "K, refinement steps of a prediction, 10 in the paper; 0 gives the segmentor's own mask; samples whose masks "
        "differ need more than 1",
        low=0,
        high=1000,
    )
    sampler: str = setting("ddim", "reverse step", choices=SAMPLERS)
    timesteps: int = setting(10, "T, length of the cosine schedule", low=1, high=1000)
    binarized: bool = setting(True, "refiner with 1-bit weights and activations")
    cross_transformer: bool = setting(True, "exchange features with the segmentor by the X-Former")
    refiner_width: int = setting(32, "channels of the refiner's first stage; 128 in the paper (2D)", low=4, high=1024)
    refiner_norm: str = setting("instance", "normalisation in the refiner; paper: batch", choices=("instance", "batch"))
    noise_loss: str = setting("focal", "loss of the estimated noise beside the KL divergence", choices=("focal", "bce"))
    published: bool = setting(
        False,
        "as in the paper: the refiner estimates the noise from scratch, what its loss makes of probabilities is not "
        "turned back, and the segmentor alone learns at 1e-4; false: the refiner corrects the segmentor's mask, is "
        "calibrated, and the segmentor alone learns at 8e-4",
    )
    collaborative: bool = setting(True, "train the segmentor as well, by turns; false keeps it frozen")
    learning_rate: float = setting(1e-4, "of the refiner, at the start of the polynomial decay", low=0.0, high=1.0)
    segmentor: str | None = setting(
        None,
        "where the segmentor starts: a trainer, whose checkpoint_final.pth of the same plans and fold is used if it is "
        "there, or a checkpoint file; null: nnUNetTrainer",
    )
    pretraining_epochs: int | None = setting(
        None,
        "epochs for the segmentor alone if there is no checkpoint; null: half of the training",
        low=0,
        high=MOST_EPOCHS,
    )
    merit: str = setting("small", "size of MERIT's backbones", choices=("small", "tiny", "nano"))
    merit_weights: str | None = setting(
        None, "MERIT's backbones: null random, timm for its pretrained weights, or a local file"
    )

    # Of version 0.1. The defaults are what every training uses.
    samples: int | None = setting(None, "instead of the common samples", low=1, high=MOST_SAMPLES, earlier=True)
    seed: int | None = setting(None, "instead of the common seed", low=0, high=LARGEST_SEED, earlier=True)
    step_spacing: str = setting("trailing", "as in section gaussian", choices=SPACINGS, earlier=True)
    prior_residual: bool | None = setting(None, "instead of published: correct the prior's mask", earlier=True)
    calibrated: bool | None = setting(None, "instead of published: turn probabilities back", earlier=True)
    # the paper's values, section III-A
    focal_gamma: float = setting(2.0, "focusing parameter of the focal loss", low=0.0, high=100.0, earlier=True)
    lambda_focal: float = setting(1.0, "weight of noise_loss in the diffusion loss", low=0.0, high=1e3, earlier=True)
    lambda_diffusion: float = setting(
        1.0, "weight of the diffusion loss for the segmentor", low=0.0, high=1000.0, earlier=True
    )
    segmentor_learning_rate: float = setting(
        1e-4, "of the segmentor beside the refiner", low=0.0, high=1.0, earlier=True
    )
    pretraining_learning_rate: float | None = setting(
        None, "of the segmentor alone, instead of published's", low=0.0, high=1.0, earlier=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps > self.timesteps:
            raise SettingsError(f"steps is {self.steps}, expected 0 .. {self.timesteps}, the length of the schedule")
        if self.refiner_width % 4:
            raise SettingsError(f"refiner_width is {self.refiner_width}, expected a multiple of 4")

    @property
    def corrects_prior(self) -> bool:
        """The refiner corrects the prior's mask; else it estimates the noise from scratch."""
        return not self.published if self.prior_residual is None else self.prior_residual

    @property
    def is_calibrated(self) -> bool:
        """What the trained loss makes of probabilities is turned back before sampling."""
        return not self.published if self.calibrated is None else self.calibrated

    @property
    def rate_alone(self) -> float:
        """Learning rate of the segmentor while it is trained alone."""
        if self.pretraining_learning_rate is not None:
            return self.pretraining_learning_rate
        return PUBLISHED_RATE_ALONE if self.published else RATE_ALONE

    @property
    def segmentor_trainer(self) -> str:
        """Trainer whose finished checkpoint is the segmentor's start, if there is one."""
        return self.segmentor if self.segmentor and is_trainer(self.segmentor) else HOST_TRAINER

    @property
    def segmentor_checkpoint(self) -> str | None:
        """A file that is the segmentor's start; None if none is named."""
        return None if not self.segmentor or is_trainer(self.segmentor) else self.segmentor
