"""Variance schedules: betas for t = 0 .. T-1 (0-based; the papers count from 1)."""

import math

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


def cosine_beta_schedule(num_timesteps: int, s: float = 0.008, max_beta: float = 0.999) -> torch.Tensor:
    """Betas whose alphas_cumprod falls as a squared cosine (Nichol & Dhariwal 2021, eq. 17; Chen et al. 2024).

    alphas_cumprod after n of T steps is cos^2((n / T + s) / (1 + s) * pi / 2) over its value at n = 0. It would be 0
    after the last step, whose beta is therefore clipped.

    Args:
        num_timesteps: T, at least 1.
        s: offset that keeps the first betas from vanishing, at least 0.
        max_beta: upper bound of the betas, in (0, 1).

    Returns:
        float64 tensor of shape (T,).

    Raises:
        ValueError: if T < 1, s < 0 or max_beta is outside (0, 1).
    """
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
    if not 0 <= s < math.inf:
        raise ValueError(f"s must be at least 0 and finite, got {s}")
    if not 0 < max_beta < 1:
        raise ValueError(f"max_beta must be in (0, 1), got {max_beta}")
    elapsed = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    signal = torch.cos((elapsed + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - signal[1:] / signal[:-1]).clamp(max=max_beta)
