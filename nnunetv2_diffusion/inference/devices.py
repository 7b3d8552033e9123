"""Whether a device is there, before a model is loaded for it."""

import torch

from nnunetv2_diffusion.inference.options import OptionError

INSTEAD = "Type -device cpu to go on without (slower), in Python device='cpu'"


def check_device(name: str) -> None:
    """Refuse a device that PyTorch cannot use.

    Args:
        name: "cpu", "cuda" or "mps".

    Raises:
        OptionError: in two lines, with what to type.
    """
    if name == "cuda" and not torch.cuda.is_available():
        built = "this PyTorch is built without CUDA" if torch.version.cuda is None else "no GPU or no driver was found"
        raise OptionError(f"-device cuda: {built}\n{INSTEAD}")
    if name == "mps" and not torch.backends.mps.is_available():
        raise OptionError(f"-device mps: PyTorch finds no GPU of Apple\n{INSTEAD}")
