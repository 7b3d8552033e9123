"""Rectified flow (Liu et al. 2023; Lipman et al. 2023) for masks: noise and mask are joined by a straight line.

x_t = (1 - s) x_start + s noise with s = (t + 1) / T. The network estimates x_start from x_t, as all of the family here,
and not the velocity noise - x_start, which follows from it: (x_t - x_start) / s. Euler's step along the line from s to
s' is x_{t'} = (s' / s) x_t + (1 - s' / s) x_start, which is ``GaussianProcess.ddim_step`` for this signal and spread.
"""

import torch

from nnunetv2_diffusion.diffusion import GaussianProcess
from nnunetv2_diffusion.sampling import SamplingConfig
from nnunetv2_diffusion.settings import DiffusionSettings
from nnunetv2_diffusion.training.continuing import COMMON, section_names
from nnunetv2_diffusion.training.trainer import DiffusionTrainer

TIMESTEPS = 1000  # of training; the line is straight, so their number matters little


class FlowTrainer(DiffusionTrainer):
    """Rectified flow in x0-parametrisation: standard denoising along a straight line, predicted by Euler's steps."""

    time_sampling = "uniform"
    section = "flow"

    @classmethod
    def reads(cls) -> frozenset[str]:
        """As ``CommonTrainer.reads``."""
        return COMMON | section_names("flow") | {"mask_encoding"}

    @classmethod
    def build_process(cls, settings: DiffusionSettings) -> GaussianProcess:
        """See ``DiffusionTrainer``."""
        s = torch.arange(1, TIMESTEPS + 1, dtype=torch.float64) / TIMESTEPS
        return GaussianProcess(1 - s, s)

    @classmethod
    def make_sampling(cls, settings: DiffusionSettings) -> SamplingConfig:
        """See ``DiffusionTrainer``: Euler's steps of equal length, from noise alone to the mask."""
        steps = settings.flow.steps
        return SamplingConfig(steps, "ddim", samples=settings.samples, seed=settings.seed, step_spacing="trailing")
