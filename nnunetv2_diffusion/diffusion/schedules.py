"""Variance schedules: betas for t = 0 .. T-1 (0-based; the papers count from 1)."""

import torch


def linear_beta_schedule(num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> torch.Tensor:
    """Betas that grow linearly (Ho et al. 2020; Fu et al. 2024, section 4.2).

    Args:
        num_timesteps: T, at least 1.
        beta_start: first beta, in (0, 1).
        beta_end: last beta, in [beta_start, 1).

    Returns:
        float64 tensor of shape (T,), both ends included.

    Raises:
        ValueError: if T < 1 or the betas are not 0 < beta_start <= beta_end < 1.
    """
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"betas must satisfy 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
    return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
