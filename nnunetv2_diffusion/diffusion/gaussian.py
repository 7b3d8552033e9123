"""Gaussian diffusion in x0-parametrisation (Ho et al. 2020, Song et al. 2021, Fu et al. 2024 section 3).

Time is 0-based here: index t = 0 .. T-1 is the papers' t+1. All coefficients are float64 and are cast where
they meet a tensor, because 1 - alphas_cumprod loses its digits in float32 at the first indices.
"""

import torch


class GaussianDiffusion:
    """Noising process q and the reverse steps that an estimate of x_start allows.

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
        self.num_timesteps = len(betas)
        self.timestep_map = torch.arange(self.num_timesteps) if timestep_map is None else timestep_map.long()
        if self.timestep_map.shape != betas.shape:
            raise ValueError(f"timestep_map has shape {tuple(self.timestep_map.shape)}, expected {tuple(betas.shape)}")
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self.alphas_cumprod_prev = torch.cat([betas.new_ones(1), self.alphas_cumprod[:-1]])
        self._set_posterior()

    def _set_posterior(self) -> None:
        remaining = 1 - self.alphas_cumprod
        self.posterior_mean_coef_start = self.betas * self.alphas_cumprod_prev.sqrt() / remaining
        self.posterior_mean_coef_t = (1 - self.betas).sqrt() * (1 - self.alphas_cumprod_prev) / remaining
        self.posterior_variance = self.betas * (1 - self.alphas_cumprod_prev) / remaining
        # q(x_{-1} | x_0, x_start) is a point mass on x_start; set, because 1 - (1 - beta) != beta in floating point
        self.posterior_mean_coef_start[0] = 1
        self.posterior_mean_coef_t[0] = 0
        self.posterior_variance[0] = 0

    def _at(self, coefficients: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Coefficients at t (B,), shaped to broadcast over x (B, K, *spatial), in x's dtype and device."""
        values = coefficients.to(t.device)[t].to(x.dtype).to(x.device)
        return values.reshape(-1, *[1] * (x.ndim - 1))

    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Draw x_t ~ q(x_t | x_start), eq. 2.

        Args:
            x_start: (B, K, *spatial), values in [-1, 1].
            t: LongTensor (B,), 0 .. T-1.
            noise: standard normal, shape of x_start.

        Returns:
            x_t, shape of x_start; not clipped.
        """
        return (
            self._at(self.alphas_cumprod.sqrt(), t, x_start) * x_start
            + self._at((1 - self.alphas_cumprod).sqrt(), t, x_start) * noise
        )

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
        # x_{t-1} = sqrt(ab_prev) x_start + sqrt(1 - ab_prev - sigma^2) eps with eps solved from x_t and x_start
        coef_t = ((1 - self.alphas_cumprod_prev - variance).clamp(min=0)).sqrt()
        coef_t = coef_t / (1 - self.alphas_cumprod).sqrt()
        coef_start = self.alphas_cumprod_prev.sqrt() - coef_t * self.alphas_cumprod.sqrt()
        x_prev = self._at(coef_start, t, x_t) * x_start + self._at(coef_t, t, x_t) * x_t
        if eta > 0:
            x_prev = x_prev + self._at(variance.sqrt(), t, x_t) * noise
        return x_prev

    def respace(self, num_timesteps: int) -> "GaussianDiffusion":
        """Shorter chain over evenly spaced indices, with the same alphas_cumprod at them.

        Args:
            num_timesteps: K in 1 .. T. K = 1 keeps the last index; otherwise the first and the last are kept.

        Returns:
            GaussianDiffusion with K steps; its ``timestep_map`` holds the training indices.

        Raises:
            ValueError: if K is not in 1 .. T.
        """
        if not 1 <= num_timesteps <= self.num_timesteps:
            raise ValueError(f"number of steps must be in 1 .. {self.num_timesteps}, got {num_timesteps}")
        last = self.num_timesteps - 1
        if num_timesteps == 1:
            kept = torch.tensor([last])
        else:
            kept = torch.linspace(0, last, num_timesteps, dtype=torch.float64).round().long()
        alphas_cumprod = self.alphas_cumprod[kept]
        previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        respaced = GaussianDiffusion(1 - alphas_cumprod / previous, self.timestep_map[kept])
        respaced.alphas_cumprod = alphas_cumprod  # not the rounded product of rounded ratios
        respaced.alphas_cumprod_prev = previous
        respaced._set_posterior()
        return respaced
