"""What the trainers share. Importing it checks the versions of nnU-Net and torch.

Strategies know tensors alone; the trainers, which need nnU-Net, are imported when they are asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nnunetv2_diffusion.compat import check_versions

check_versions()

from nnunetv2_diffusion.training.strategies import (  # noqa: E402  versions first: a clear error beats a traceback
    RecycleXT,
    RecycleXtPlus1,
    SelfConditionXt,
    SelfConditionXtPlus1,
    Standard,
)

if TYPE_CHECKING:
    from nnunetv2_diffusion.training.trainer import BaselineTrainer, DiffusionTrainer, NoDiffTrainer

__all__ = [
    "BaselineTrainer",
    "DiffusionTrainer",
    "NoDiffTrainer",
    "RecycleXT",
    "RecycleXtPlus1",
    "SelfConditionXt",
    "SelfConditionXtPlus1",
    "Standard",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("nnunetv2_diffusion.training.trainer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
