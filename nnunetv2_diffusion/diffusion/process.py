"""What all diffusion processes share: a chain of betas and what follows from them.

Time is 0-based here: index t = 0 .. T-1 is the papers' t+1. All coefficients are float64 and are cast where
they meet a tensor, because 1 - alphas_cumprod loses its digits in float32 at the first indices.
"""

from typing import TypeVar

import torch

SPACINGS = ("linspace", "trailing")
SAMPLERS = ("ddpm", "ddim")


Process = TypeVar("Process", bound="TimeSteps")
BetaProcess = TypeVar("BetaProcess", bound="DiffusionProcess")


def check_sampler(sampler: str) -> None:
    """Raise ValueError for a name that is not in ``SAMPLERS``."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}, expected one of {', '.join(SAMPLERS)}")


class TimeSteps:
    """T steps of a process, some of which a shorter chain keeps."""

    num_timesteps: int
    timestep_map: torch.Tensor

    def _set_steps(self, length: int, timestep_map: torch.Tensor | None) -> None:
        self.num_timesteps = length
        self.timestep_map = torch.arange(length) if timestep_map is None else timestep_map.long()
        if self.timestep_map.shape != (length,):
            raise ValueError(f"timestep_map has shape {tuple(self.timestep_map.shape)}, expected ({length},)")

    def _kept(self, num_timesteps: int, spacing: str) -> torch.Tensor:
        """Indices of a respaced chain, ascending.

        Raises:
            ValueError: see ``respace``.
        """
        if spacing not in SPACINGS:
            raise ValueError(f"spacing is {spacing!r}, expected one of {', '.join(SPACINGS)}")
        if not 1 <= num_timesteps <= self.num_timesteps:
            raise ValueError(f"number of steps must be in 1 .. {self.num_timesteps}, got {num_timesteps}")
        last = torch.tensor([self.num_timesteps - 1])
        if num_timesteps == 1:
            return last
        if spacing == "linspace":
            return torch.linspace(0, int(last), num_timesteps, dtype=torch.float64).round().long()
        share = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps
        return (share * self.num_timesteps).round().long() - 1

    def _at(self, coefficients: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Coefficients at t (B,), shaped to broadcast over x (B, K, *spatial), in x's dtype and device."""
        values = coefficients.to(t.device)[t].to(x.dtype).to(x.device)
        return values.reshape(-1, *[1] * (x.ndim - 1))

    def respace(self: Process, num_timesteps: int, spacing: str = "linspace") -> Process:
        """Shorter chain over some indices, with the same marginals at them.

        Args:
            num_timesteps: K in 1 .. T.
            spacing: "linspace" keeps the first and the last index, K = 1 the last, as in the papers. "trailing" keeps
                round(T k / K) - 1 for k = 1 .. K (Lin et al. 2024, table 2): the chain ends at T / K and not at 0.

        Returns:
            process of the same class with K steps; its ``timestep_map`` holds the training indices.

        Raises:
            ValueError: if K is not in this range, or the spacing is unknown.
        """
        raise NotImplementedError


class DiffusionProcess(TimeSteps):
    """A chain of T steps given by its betas; subclasses add their equations and keep this constructor.

    Args:
        betas: float64 tensor of shape (T,), each in (0, 1).
        timestep_map: LongTensor of shape (T,), the training index that each index of this chain stands for;
            default 0 .. T-1. A respaced process carries the kept indices, which is what a network must be told.

    Raises:
        ValueError: if betas is not one-dimensional, empty or outside (0, 1), or the map has another length.
    """

    def __init__(self, betas: torch.Tensor, timestep_map: torch.Tensor | None = None):
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or len(betas) == 0 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"betas must be a non-empty 1D tensor in (0, 1), got {betas}")
        self.betas = betas
        self._set_steps(len(betas), timestep_map)
        self._set_alphas_cumprod(torch.cumprod(1 - betas, dim=0))

    def _set_alphas_cumprod(self, alphas_cumprod: torch.Tensor) -> None:
        self.alphas_cumprod = alphas_cumprod
        self.alphas_cumprod_prev = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        self._set_posterior()

    def _set_posterior(self) -> None:
        """Compute a subclass's coefficients from betas and alphas_cumprod."""

    def respace(self: BetaProcess, num_timesteps: int, spacing: str = "linspace") -> BetaProcess:
        """See ``TimeSteps``; alphas_cumprod stays the same at the kept indices."""
        kept = self._kept(num_timesteps, spacing)
        alphas_cumprod = self.alphas_cumprod[kept]
        previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        respaced = type(self)(1 - alphas_cumprod / previous, self.timestep_map[kept])
        respaced._set_alphas_cumprod(alphas_cumprod)  # not the rounded product of rounded ratios
        return respaced
