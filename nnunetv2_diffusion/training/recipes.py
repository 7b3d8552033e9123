"""How a network is optimised: the host's way or that of Fu et al. 2024, section 4.2 and table 7."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Recipe:
    """Numbers in which the recipes differ.

    Attributes:
        gradient_clip: largest norm of the gradient.
        deep_supervision: use the decoder's coarser heads.
        weight_ce: weight of cross-entropy against a Dice weight of 1.
        host_optimizer: optimiser and learning rate as in nnU-Net.
    """

    gradient_clip: float
    deep_supervision: bool
    weight_ce: float
    host_optimizer: bool


RECIPES = {
    "nnunet": Recipe(gradient_clip=12, deep_supervision=True, weight_ce=1, host_optimizer=True),
    "paper": Recipe(gradient_clip=1, deep_supervision=False, weight_ce=20, host_optimizer=False),
}


class WarmupCosine:
    """Learning rate by optimiser step: linear warm-up, then cosine (Fu et al. 2024, section 4.2).

    It has no state: the rate follows from epoch and iteration, so a continued training finds the same one.

    Args:
        optimizer: whose rate is set.
        iterations_per_epoch: optimiser steps of an epoch.
        num_epochs: length of the training.
        warmup_steps: steps from ``start`` to ``peak``.
        start: first rate.
        peak: rate after warm-up.
        end: last rate.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        iterations_per_epoch: int,
        num_epochs: int,
        warmup_steps: int = 100,
        start: float = 1e-5,
        peak: float = 8e-4,
        end: float = 5e-5,
    ):
        self.optimizer = optimizer
        self.iterations_per_epoch = iterations_per_epoch
        self.total_steps = iterations_per_epoch * num_epochs
        self.warmup_steps = min(warmup_steps, self.total_steps)
        self.start, self.peak, self.end = start, peak, end

    def rate(self, step: int) -> float:
        """Learning rate of optimiser step 0, 1, ..."""
        if step < self.warmup_steps:
            return self.start + (self.peak - self.start) * step / self.warmup_steps
        after = max(self.total_steps - self.warmup_steps, 1)
        progress = min((step - self.warmup_steps) / after, 1.0)
        return self.end + (self.peak - self.end) * (1 + math.cos(math.pi * progress)) / 2

    def step(self, epoch: int, iteration: int = 0) -> None:
        """Set the rate for an iteration of an epoch; nnU-Net calls it with the epoch alone."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(epoch * self.iterations_per_epoch + iteration)


def paper_optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with betas 0.9, 0.999 and weight decay 1e-8; the rate comes from ``WarmupCosine``."""
    return torch.optim.AdamW(parameters, lr=8e-4, betas=(0.9, 0.999), weight_decay=1e-8)
