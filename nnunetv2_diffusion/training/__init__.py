"""What the trainers share. Importing it checks the versions of nnU-Net and torch."""

from nnunetv2_diffusion.compat import check_versions

check_versions()

from nnunetv2_diffusion.training.strategies import (  # noqa: E402  versions first: a clear error beats a traceback
    RecycleXT,
    RecycleXtPlus1,
    SelfConditionXt,
    SelfConditionXtPlus1,
    Standard,
)
from nnunetv2_diffusion.training.trainer import (  # noqa: E402
    BaselineTrainer,
    DiffusionTrainer,
    NoDiffTrainer,
)

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
