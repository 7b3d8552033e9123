"""Torch modules: nnU-Net's U-Nets told about a noisy mask and a time step, and the reverse loop around them."""

from nnunetv2_diffusion.networks.denoiser import DenoisingUNet, UnsupportedArchitectureError
from nnunetv2_diffusion.networks.hybrid import HybridSegmentor
from nnunetv2_diffusion.networks.latent import LatentSegmentor
from nnunetv2_diffusion.networks.refiner import Refiner
from nnunetv2_diffusion.networks.segmentor import DiffusionSegmentor, to_mask, to_x_start

__all__ = [
    "DenoisingUNet",
    "DiffusionSegmentor",
    "HybridSegmentor",
    "LatentSegmentor",
    "Refiner",
    "UnsupportedArchitectureError",
    "to_mask",
    "to_x_start",
]
