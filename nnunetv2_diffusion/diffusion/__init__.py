"""Diffusion processes on tensors: no network and no nnU-Net is known here."""

from nnunetv2_diffusion.diffusion.bernoulli import BernoulliDiffusion
from nnunetv2_diffusion.diffusion.bernoulli_loss import NoiseCalibration, noise_loss, variational_bound
from nnunetv2_diffusion.diffusion.gaussian import GaussianDiffusion, GaussianProcess, GaussianSteps
from nnunetv2_diffusion.diffusion.mask_encoding import ENCODINGS, AnalogBits, MaskEncoding, make_encoding
from nnunetv2_diffusion.diffusion.noise import ContentNoise
from nnunetv2_diffusion.diffusion.position_noise import PositionNoise
from nnunetv2_diffusion.diffusion.process import SAMPLERS, SPACINGS, DiffusionProcess, TimeSteps
from nnunetv2_diffusion.diffusion.schedules import cosine_beta_schedule, linear_beta_schedule
from nnunetv2_diffusion.diffusion.time_sampling import (
    TIME_SAMPLERS,
    ImportanceTimeSampler,
    UniformTimeSampler,
    make_time_sampler,
)

__all__ = [
    "ENCODINGS",
    "SAMPLERS",
    "SPACINGS",
    "TIME_SAMPLERS",
    "AnalogBits",
    "BernoulliDiffusion",
    "ContentNoise",
    "DiffusionProcess",
    "GaussianDiffusion",
    "GaussianProcess",
    "GaussianSteps",
    "ImportanceTimeSampler",
    "MaskEncoding",
    "NoiseCalibration",
    "PositionNoise",
    "TimeSteps",
    "UniformTimeSampler",
    "cosine_beta_schedule",
    "linear_beta_schedule",
    "make_encoding",
    "make_time_sampler",
    "noise_loss",
    "variational_bound",
]
