"""Diffusion processes on tensors: no network and no nnU-Net is known here."""

from nnunetv2_diffusion.diffusion.gaussian import GaussianDiffusion
from nnunetv2_diffusion.diffusion.noise import ContentNoise
from nnunetv2_diffusion.diffusion.sampling import SAMPLERS, SamplingConfig, reverse_process
from nnunetv2_diffusion.diffusion.schedules import linear_beta_schedule
from nnunetv2_diffusion.diffusion.time_sampling import (
    TIME_SAMPLERS,
    ImportanceTimeSampler,
    UniformTimeSampler,
)

__all__ = [
    "SAMPLERS",
    "TIME_SAMPLERS",
    "ContentNoise",
    "GaussianDiffusion",
    "ImportanceTimeSampler",
    "SamplingConfig",
    "UniformTimeSampler",
    "linear_beta_schedule",
    "reverse_process",
]
