"""Diffusion-based segmentation trainers for a stock nnU-Net v2."""

__version__ = "0.1.0"
