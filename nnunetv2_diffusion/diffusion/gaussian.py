"""Gaussian processes in x0-parametrisation (Ho et al. 2020, Song et al. 2021, Fu et al. 2024 section 3).

x_t = signal_t x_start + spread_t noise. ``GaussianDiffusion`` is the variance-preserving one of the papers, given by
its betas; ``GaussianProcess`` is any other, given by signal and spread, a straight line (rectified flow) for example.
"""

from collections.abc import Callable

import torch

from nnunetv2_diffusion.diffusion.process import DiffusionProcess, TimeSteps, check_sampler


class GaussianSteps(TimeSteps):
    """What follows from signal and spread of every step, float64 (T,), and from those of the step before."""

    signal: torch.Tensor
    spread: torch.Tensor
    signal_prev: torch.Tensor
    spread_prev: torch.Tensor
    posterior_mean_coef_start: torch.Tensor
    posterior_mean_coef_t: torch.Tensor
    posterior_variance: torch.Tensor

    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Draw x_t ~ q(x_t | x_start), eq. 2.

        Args:
            x_start: (B, K, *spatial), values in [-1, 1].
            t: LongTensor (B,), 0 .. T-1.
            noise: standard normal, shape of x_start.

        Returns:
            x_t, shape of x_start; not clipped.
        """
        return self._at(self.signal, t, x_start) * x_start + self._at(self.spread, t, x_start) * noise

    def q_posterior(
        self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of q(x_{t-1} | x_t, x_start) (Ho et al. 2020, eq. 6, 7).

        Returns:
            mean (B, K, *spatial) and variance (B, 1, ..., 1); at t = 0 they are x_start and 0.
        """
        mean = (
            self._at(self.posterior_mean_coef_start, t, x_t) * x_start
            + self._at(self.posterior_mean_coef_t, t, x_t) * x_t
        )
        return mean, self._at(self.posterior_variance, t, x_t)

    def ddpm_step(self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Ancestral step with the fixed small variance (Ho et al. 2020, algorithm 2).

        Args:
            x_start: the network's estimate, (B, K, *spatial) in [-1, 1].
            x_t: current state, same shape.
            t: LongTensor (B,).
            noise: standard normal, same shape; without effect at t = 0.

        Returns:
            x_{t-1}; x_start itself at t = 0.
        """
        mean, variance = self.q_posterior(x_start, x_t, t)
        return mean + variance.sqrt() * noise

    def ddim_step(
        self,
        x_start: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor | None = None,
        eta: float = 0.0,
    ) -> torch.Tensor:
        """Step of Song et al. 2021, eq. 12, with sigma_t = eta * sqrt(posterior variance), eq. 16.

        Args:
            x_start: the network's estimate, (B, K, *spatial) in [-1, 1].
            x_t: current state, same shape.
            t: LongTensor (B,).
            noise: standard normal, same shape; needed if eta > 0.
            eta: 0 is deterministic; 1 has the mean and variance of ``ddpm_step``.

        Returns:
            x_{t-1}; x_start itself at t = 0.

        Raises:
            ValueError: if eta is outside [0, 1], or eta > 0 without noise.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {eta}")
        if eta > 0 and noise is None:
            raise ValueError(f"ddim_step with eta = {eta} needs noise")
        variance = eta**2 * self.posterior_variance
        # x_{t-1} = signal_prev x_start + sqrt(spread_prev^2 - sigma^2) eps with eps solved from x_t and x_start
        coef_t = (self.spread_prev.square() - variance).clamp(min=0).sqrt() / self.spread
        coef_start = self.signal_prev - coef_t * self.signal
        x_prev = self._at(coef_start, t, x_t) * x_start + self._at(coef_t, t, x_t) * x_t
        if eta > 0 and noise is not None:
            x_prev = x_prev + self._at(variance.sqrt(), t, x_t) * noise
        return x_prev

    def reverse_step(
        self,
        x_start: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor,
        noise: Callable[[], torch.Tensor],
        sampler: str = "ddpm",
        eta: float = 0.0,
    ) -> torch.Tensor:
        """x_{t-1} by the sampler of a name; noise is called only if it is needed.

        Raises:
            ValueError: for an unknown sampler.
        """
        check_sampler(sampler)
        if sampler == "ddpm":
            return self.ddpm_step(x_start, x_t, t, noise())
        return self.ddim_step(x_start, x_t, t, noise() if eta > 0 else None, eta)


class GaussianDiffusion(DiffusionProcess, GaussianSteps):
    """Noising process q and the reverse steps that an estimate of x_start allows."""

    def _set_posterior(self) -> None:
        remaining = 1 - self.alphas_cumprod
        self.signal, self.spread = self.alphas_cumprod.sqrt(), remaining.sqrt()
        self.signal_prev, self.spread_prev = self.alphas_cumprod_prev.sqrt(), (1 - self.alphas_cumprod_prev).sqrt()
        self.posterior_mean_coef_start = self.betas * self.alphas_cumprod_prev.sqrt() / remaining
        self.posterior_mean_coef_t = (1 - self.betas).sqrt() * (1 - self.alphas_cumprod_prev) / remaining
        self.posterior_variance = self.betas * (1 - self.alphas_cumprod_prev) / remaining
        # q(x_{-1} | x_0, x_start) is a point mass on x_start; set, because 1 - (1 - beta) != beta in floating point
        self.posterior_mean_coef_start[0] = 1
        self.posterior_mean_coef_t[0] = 0
        self.posterior_variance[0] = 0


class GaussianProcess(GaussianSteps):
    """A process given by signal and spread instead of betas.

    Args:
        signal: share of x_start in x_t, float64 (T,), falling, each in [0, 1].
        spread: standard deviation of the noise in x_t, float64 (T,), rising, each above 0.
        timestep_map: see ``DiffusionProcess``.

    Raises:
        ValueError: if they are no process: a step back would need noise of negative variance.
    """

    def __init__(self, signal: torch.Tensor, spread: torch.Tensor, timestep_map: torch.Tensor | None = None):
        self.signal, self.spread = (torch.as_tensor(c, dtype=torch.float64) for c in (signal, spread))
        if self.signal.ndim != 1 or self.signal.shape != self.spread.shape or not len(self.signal):
            raise ValueError(
                f"signal has shape {tuple(self.signal.shape)} and spread {tuple(self.spread.shape)}, expected (T,) both"
            )
        self._set_steps(len(self.signal), timestep_map)
        self.signal_prev = torch.cat([self.signal.new_ones(1), self.signal[:-1]])
        self.spread_prev = torch.cat([self.spread.new_zeros(1), self.spread[:-1]])
        if not bool(((self.signal >= 0) & (self.signal_prev > 0) & (self.spread > 0)).all()):
            raise ValueError("signal must be above 0 before the last step and spread above 0 everywhere")
        kept = self.signal / self.signal_prev
        added = self.spread.square() - (kept * self.spread_prev).square()  # variance of q(x_t | x_{t-1})
        if bool((added < 0).any()):
            raise ValueError("signal and spread are no process: the noise of a step would have a negative variance")
        self.posterior_mean_coef_start = self.signal_prev * added / self.spread.square()
        self.posterior_mean_coef_t = kept * self.spread_prev.square() / self.spread.square()
        self.posterior_variance = added * self.spread_prev.square() / self.spread.square()

    def respace(self, num_timesteps: int, spacing: str = "linspace") -> "GaussianProcess":
        """See ``TimeSteps``."""
        kept = self._kept(num_timesteps, spacing)
        return type(self)(self.signal[kept], self.spread[kept], self.timestep_map[kept])
