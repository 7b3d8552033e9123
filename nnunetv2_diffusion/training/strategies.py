"""Training strategies: what the network is given in the pass that is trained.

They are those of Fu et al. 2024 (eq. 4 to 8).

Every strategy turns (predict, process, x_start, t) into the input of that last pass. ``predict(x, t, samples)`` is
one pass without gradient (the paper's StopGradient) on the image that returns probabilities, encoded, in [0, 1];
``samples`` are the batch indices that x stands for, None for all. Masks are in [-1, 1], t is 0-based, all tensors are
(B, C_mask, *spatial) with the channels of the mask's encoding (classes, if it is one-hot), all noise is fresh.

Steps are indexed in the process's own chain; the network is told ``process.timestep_map[t]``.
"""

from collections.abc import Callable
from dataclasses import Field, dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from nnunetv2_diffusion.diffusion import GaussianSteps
from nnunetv2_diffusion.networks import to_x_start

Predict = Callable[..., torch.Tensor]


class LastPass(NamedTuple):
    """Input of the trained pass: noisy mask and, for self-conditioning, the estimate (zeros where dropped)."""

    x_t: torch.Tensor
    estimate: torch.Tensor | None = None


class Strategy(Protocol):
    """What a trainer needs to know of a strategy, which is a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    self_conditioning: bool
    """The network has input channels for an estimate."""
    uses_next_step: bool
    """t + 1 is needed (or excluded by t < T in the equation): t is drawn from 0 .. T-2."""
    steps: int
    """K of a prediction whose plans say none: 1 where later steps bring nothing."""

    def __call__(self, predict: Predict, process: GaussianSteps, x_start: torch.Tensor, t: torch.Tensor) -> LastPass:
        """Input of the last pass at step t (B,)."""


def _noised(process: GaussianSteps, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return process.q_sample(x, t, torch.randn_like(x))


@dataclass(frozen=True)
class Standard:
    """Standard denoising, eq. 4: the noised ground truth."""

    self_conditioning = False
    uses_next_step = False
    steps = 5

    def __call__(self, predict: Predict, process: GaussianSteps, x_start: torch.Tensor, t: torch.Tensor) -> LastPass:
        """x_t ~ q(x_t | x_0)."""
        return LastPass(_noised(process, x_start, t))


@dataclass(frozen=True)
class RecycleXT:
    """Recycling x_T, eq. 5, the proposed strategy: the first pass sees (nearly) pure noise."""

    self_conditioning = False
    uses_next_step = True
    steps = 1

    def __call__(self, predict: Predict, process: GaussianSteps, x_start: torch.Tensor, t: torch.Tensor) -> LastPass:
        """x_T ~ q(x_T | x_0) (5a); x0^ = f(x_T, T) (5b); x_t ~ q(x_t | x0^) (5c)."""
        last = torch.full_like(t, process.num_timesteps - 1)
        p = predict(_noised(process, x_start, last), last)
        return LastPass(_noised(process, to_x_start(p), t))


@dataclass(frozen=True)
class RecycleXtPlus1:
    """Recycling x_{t+1}, eq. 6 (Fu et al. 2023): the first pass sees the ground truth at the step before."""

    self_conditioning = False
    uses_next_step = True
    steps = 1

    def __call__(self, predict: Predict, process: GaussianSteps, x_start: torch.Tensor, t: torch.Tensor) -> LastPass:
        """x_{t+1} ~ q(x_{t+1} | x_0) (6a); x0^ = f(x_{t+1}, t+1) (6b); x_t ~ q(x_t | x0^) (6c)."""
        p = predict(_noised(process, x_start, t + 1), t + 1)
        return LastPass(_noised(process, to_x_start(p), t))


def _gated_estimate(predict: Predict, x: torch.Tensor, t: torch.Tensor, probability: float) -> torch.Tensor:
    """First pass of self-conditioning for the samples that keep its estimate; zeros for the others (eq. 7b, 7c).

    A sample keeps its estimate with the given probability; the others need no first pass at all.
    """
    estimate = torch.zeros_like(x)
    keep = torch.nonzero(torch.rand(len(x)) < probability).flatten()
    if len(keep):
        kept = keep.to(x.device)
        estimate[kept] = predict(x[kept], t[keep.to(t.device)], kept).to(estimate.dtype)
    return estimate


@dataclass(frozen=True)
class SelfConditionXt:
    """Self-conditioning on x_t, eq. 7 (Chen et al. 2022): both passes see the same noisy mask.

    Attributes:
        probability: chance of a sample to keep the estimate.
    """

    probability: float = 0.5
    self_conditioning = True
    uses_next_step = False
    steps = 5

    def __call__(self, predict: Predict, process: GaussianSteps, x_start: torch.Tensor, t: torch.Tensor) -> LastPass:
        """x_t ~ q(x_t | x_0) (7a); x0^ = f(x_t, t, 0) or 0 (7b, 7c); last pass f(x_t, t, x0^) (7d)."""
        x_t = _noised(process, x_start, t)
        return LastPass(x_t, _gated_estimate(predict, x_t, t, self.probability))


@dataclass(frozen=True)
class SelfConditionXtPlus1:
    """Self-conditioning on x_{t+1}, eq. 8 (Watson et al. 2023), as in the equation.

    The published code computes x_t and then feeds x_{t+1} to both passes.

    Attributes:
        probability: chance of a sample to keep the estimate.
    """

    probability: float = 0.5
    self_conditioning = True
    uses_next_step = True
    steps = 5

    def __call__(self, predict: Predict, process: GaussianSteps, x_start: torch.Tensor, t: torch.Tensor) -> LastPass:
        """x_{t+1} (8a); x0^ = f(x_{t+1}, t+1, 0) or 0 (8b, 8c); x_t ~ q(x_t | x_{t+1}, x_0) (8d)."""
        x_next = _noised(process, x_start, t + 1)
        estimate = _gated_estimate(predict, x_next, t + 1, self.probability)
        x_t = process.ddpm_step(x_start, x_next, t + 1, torch.randn_like(x_start))
        return LastPass(x_t, estimate)
