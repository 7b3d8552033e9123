"""Diffusion-based segmentation trainers for a stock nnU-Net v2."""

from typing import Any

__version__ = "0.2.0.dev0"

API = {
    "load_model": "nnunetv2_diffusion.inference.api",
    "predict_image": "nnunetv2_diffusion.inference.api",
}
__all__ = [*API]


def __getattr__(name: str) -> Any:
    """Import the Python API when it is used: the command's help and doctor work without torch and nnU-Net."""
    if name not in API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(API[name]), name)
