"""The reverse processes: K calls of an estimator."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from nnunetv2_diffusion.diffusion.bernoulli import BernoulliDiffusion
from nnunetv2_diffusion.diffusion.gaussian import GaussianDiffusion
from nnunetv2_diffusion.diffusion.process import SPACINGS

SAMPLERS = ("ddpm", "ddim")


def _check_sampler(sampler: str) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}, expected one of {', '.join(SAMPLERS)}")


@dataclass(frozen=True)
class SamplingConfig:
    """How a prediction is drawn.

    Attributes:
        steps: K, network evaluations of one sample.
        sampler: "ddpm" (ancestral, fixed small variance) or "ddim".
        eta: DDIM's noise level in [0, 1]; without effect for DDPM.
        samples: masks drawn; their probabilities are averaged.
        seed: any integer; the same seed and image give the same result.
        step_spacing: of the K steps over the schedule, see ``DiffusionProcess.respace``.
    """

    steps: int
    sampler: str = "ddpm"
    eta: float = 0.0
    samples: int = 1
    seed: int = 0
    step_spacing: str = "linspace"

    def __post_init__(self) -> None:
        _check_sampler(self.sampler)
        if self.step_spacing not in SPACINGS:
            raise ValueError(f"step_spacing is {self.step_spacing!r}, expected one of {', '.join(SPACINGS)}")
        for name in ("steps", "samples"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}, expected a number in [0, 1]")


def gaussian_reverse_step(
    process: GaussianDiffusion,
    x_start: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
    noise: Callable[[], torch.Tensor],
    sampler: str = "ddpm",
    eta: float = 0.0,
) -> torch.Tensor:
    """x_{t-1} from x_t and the estimate of x_start; noise is called only if it is needed."""
    if sampler == "ddpm":
        return process.ddpm_step(x_start, x_t, t, noise())
    return process.ddim_step(x_start, x_t, t, noise() if eta > 0 else None, eta)


def bernoulli_reverse_step(
    process: BernoulliDiffusion,
    eps: torch.Tensor,
    y_t: torch.Tensor,
    prior: torch.Tensor,
    t: torch.Tensor,
    uniform: Callable[[], torch.Tensor],
    sampler: str = "ddpm",
) -> torch.Tensor:
    """Draw y_{t-1} from y_t and the estimate eps of P(y_t != y_start)."""
    mean = process.p_mean if sampler == "ddpm" else process.ddim_mean
    return (uniform() < mean(eps, y_t, prior, t)).to(y_t.dtype)


def reverse_process(
    process: GaussianDiffusion,
    predict_x_start: Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor],
    x_t: torch.Tensor,
    noise: Callable[[], torch.Tensor],
    sampler: str = "ddpm",
    eta: float = 0.0,
) -> Iterator[torch.Tensor]:
    """Run the chain from pure noise and yield the estimate of x_start of every step.

    Args:
        process: the chain, usually ``process.respace(K)``.
        predict_x_start: called as (x_t, t, is_last) with t the **training** index (B,) of the step.
        x_t: standard normal start, (B, K, *spatial).
        noise: returns fresh standard normal noise of x_t's shape; called in every step but the last, if needed.
        sampler: one of ``SAMPLERS``.
        eta: see ``GaussianDiffusion.ddim_step``.

    Yields:
        x_start estimates, first to last. The last one is the result: both reverse steps return it at index 0.
    """
    _check_sampler(sampler)
    for index in reversed(range(process.num_timesteps)):
        # kept on the CPU: looking up coefficients then needs no transfer from the device
        t = torch.full((len(x_t),), index, dtype=torch.long)
        x_start = predict_x_start(x_t, process.timestep_map[t], index == 0)
        yield x_start
        if index == 0:
            return
        x_t = gaussian_reverse_step(process, x_start, x_t, t, noise, sampler, eta)


def bernoulli_reverse_process(
    process: BernoulliDiffusion,
    predict_eps: Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor],
    y_t: torch.Tensor,
    prior: torch.Tensor,
    uniform: Callable[[], torch.Tensor],
    sampler: str = "ddpm",
) -> Iterator[torch.Tensor]:
    """Run the chain from a draw of the prior and yield the soft estimate of y_start of every step.

    Both samplers are stochastic.

    Args:
        process: the chain, usually ``process.respace(K)``.
        predict_eps: called as (y_t, t, is_last) with t the **training** index (B,) of the step; returns the estimate
            of P(y_t != y_start), probabilities.
        y_t: start, (B, K, *spatial), values 0 or 1, drawn from B(prior).
        prior: same shape, probabilities.
        uniform: returns fresh uniform draws in [0, 1) of y_t's shape; called in every step but the last.
        sampler: "ddpm" (``BernoulliDiffusion.p_mean``) or "ddim" (``ddim_mean``).

    Yields:
        |y_t - eps|, first to last. The last one is the result: both reverse steps return it at index 0.
    """
    _check_sampler(sampler)
    for index in reversed(range(process.num_timesteps)):
        t = torch.full((len(y_t),), index, dtype=torch.long)  # on the CPU, as above
        eps = predict_eps(y_t, process.timestep_map[t], index == 0)
        yield process.predict_y_start(y_t, eps)
        if index == 0:
            return
        y_t = bernoulli_reverse_step(process, eps, y_t, prior, t, uniform, sampler)
