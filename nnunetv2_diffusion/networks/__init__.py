"""Torch modules: nnU-Net's U-Nets told about a noisy mask and a time step, and the reverse loop around them."""

from nnunetv2_diffusion.networks.denoiser import DenoisingUNet, UnsupportedArchitectureError
from nnunetv2_diffusion.networks.diffusion_unet import DiffusionUNet, to_mask, to_x_start
from nnunetv2_diffusion.networks.hidiff import HiDiffNetwork
from nnunetv2_diffusion.networks.recycle_score import RecycleScoreUNet
from nnunetv2_diffusion.networks.refiner import Refiner

__all__ = [
    "DenoisingUNet",
    "DiffusionUNet",
    "HiDiffNetwork",
    "RecycleScoreUNet",
    "Refiner",
    "UnsupportedArchitectureError",
    "to_mask",
    "to_x_start",
]
