"""Bernoulli diffusion that starts from a prior (Chen et al. 2024, "HiDiff", equations 4 to 10).

Everything is elementwise on (B, K, *spatial): K channels of a one-hot or region mask are K independent chains, coupled
by the network alone. Masks y hold 0 or 1; prior = f(x) and eps are probabilities.

Results have the widest dtype of the inputs and at least float32. Only additions, products, quotients, abs, clamp,
comparisons and where are used, which autocast leaves in the dtype they are given: no region has to switch it off.
Derivatives by probabilities reach 1 / MIN_PRIOR, more than float16 holds: make prior and eps in float32 to train.
"""

from collections.abc import Callable
from functools import reduce

import torch

from nnunetv2_diffusion.diffusion.process import DiffusionProcess, check_sampler

# A prior of exactly 0 or 1 makes some pairs (y_start, y_t) impossible, and their posterior 0/0. This bound makes them
# improbable instead. It is 17 float32 steps below 1.
MIN_PRIOR = 1e-6


def to_common_float(**tensors: torch.Tensor) -> list[torch.Tensor]:
    """Cast to the widest dtype among the tensors and float32, in the order given.

    Raises:
        ValueError: if a tensor has another shape than the first.
    """
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != reference.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected that of {first}, {tuple(reference.shape)}"
            )
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors.values()), torch.float32)
    return [x.to(dtype) for x in tensors.values()]


class BernoulliDiffusion(DiffusionProcess):
    """Forward process that replaces a mask by draws from the prior, and the reverse steps that an estimate allows.

    In one step a value is kept with probability 1 - beta_t and redrawn from B(prior) with probability beta_t.
    """

    def _set_posterior(self) -> None:
        self.ddim_keep = (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    def q_mean(self, y_start: torch.Tensor, prior: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """P(y_t = 1 | y_start, prior) = alphas_cumprod y_start + (1 - alphas_cumprod) prior, eq. 6.

        Args:
            y_start: (B, K, *spatial), values in [0, 1].
            prior: same shape, probabilities.
            t: LongTensor (B,), 0 .. T-1.

        Returns:
            probabilities, shape of y_start.
        """
        y_start, prior = to_common_float(y_start=y_start, prior=prior)
        return self._at(self.alphas_cumprod, t, prior) * y_start + self._at(1 - self.alphas_cumprod, t, prior) * prior

    def noise_probability(self, y_start: torch.Tensor, prior: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """P(y_t != y_start) = (1 - alphas_cumprod) |prior - y_start|: the noise of the XOR form of ``q_mean``."""
        y_start, prior = to_common_float(y_start=y_start, prior=prior)
        return self._at(1 - self.alphas_cumprod, t, prior) * (prior - y_start).abs()

    def q_sample(
        self, y_start: torch.Tensor, prior: torch.Tensor, t: torch.Tensor, uniform: torch.Tensor
    ) -> torch.Tensor:
        """Draw y_t ~ q(y_t | y_start, prior) as y_start xor noise (Chen et al. 2024, algorithm 1).

        Args:
            y_start: (B, K, *spatial), values 0 or 1. Where a label is to be ignored, a draw from the prior is a
                y_start that makes y_t a draw from the prior too.
            prior: same shape, probabilities.
            t: LongTensor (B,).
            uniform: uniform draws in [0, 1), shape of y_start.

        Returns:
            y_t, values 0 or 1, shape of y_start; channels are drawn independently, so it is not one-hot.
        """
        y_start, uniform = to_common_float(y_start=y_start, uniform=uniform)
        noise = uniform < self.noise_probability(y_start, prior, t)
        return (y_start - noise.to(y_start.dtype)).abs()

    def step_likelihood(
        self, y_t: torch.Tensor, prior: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """P(y_t | y_{t-1} = 0, prior) and P(y_t | y_{t-1} = 1, prior), eq. 5.

        Args:
            y_t: (B, K, *spatial), values 0 or 1.
            prior: same shape, probabilities; clamped to [MIN_PRIOR, 1 - MIN_PRIOR].
            t: LongTensor (B,).

        Returns:
            two tensors of y_t's shape, values in (0, 1].
        """
        y_t, prior = to_common_float(y_t=y_t, prior=prior)
        prior = prior.clamp(MIN_PRIOR, 1 - MIN_PRIOR)
        keep, redraw = (self._at(c, t, prior) for c in (1 - self.betas, self.betas))
        redrawn = redraw * (1 - y_t - prior).abs()  # beta f if y_t is 1, beta (1 - f) if it is 0
        return keep * (1 - y_t) + redrawn, keep * y_t + redrawn

    def previous_marginal(
        self, y_start: torch.Tensor, complement: torch.Tensor, prior: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """P(y_{t-1} = 0 | y_start, prior) and P(y_{t-1} = 1 | y_start, prior), eq. 6 one step earlier.

        Args:
            y_start: (B, K, *spatial), values in [0, 1].
            complement: 1 - y_start, apart because a caller may know it with more digits than that difference has.
            prior: same shape, probabilities; clamped to [MIN_PRIOR, 1 - MIN_PRIOR].
            t: LongTensor (B,).

        Returns:
            two tensors of y_start's shape; at t = 0 complement and y_start.
        """
        y_start, complement, prior = to_common_float(y_start=y_start, complement=complement, prior=prior)
        prior = prior.clamp(MIN_PRIOR, 1 - MIN_PRIOR)
        signal, noise = (self._at(c, t, prior) for c in (self.alphas_cumprod_prev, 1 - self.alphas_cumprod_prev))
        return signal * complement + noise * (1 - prior), signal * y_start + noise * prior

    def q_posterior_mean(
        self, y_start: torch.Tensor, y_t: torch.Tensor, prior: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """P(y_{t-1} = 1 | y_t, y_start, prior), eq. 7; exact Bayes for y_start in {0, 1}.

        A y_start between 0 and 1 acts as a prior on y_start, which meets the likelihood of y_t here: this is not the
        mixture of the posteriors of 0 and 1.

        Args:
            y_start: (B, K, *spatial), values in [0, 1].
            y_t: same shape, values 0 or 1.
            prior: same shape, probabilities; clamped to [MIN_PRIOR, 1 - MIN_PRIOR].
            t: LongTensor (B,).

        Returns:
            probabilities, shape of y_start, finite for every input in [0, 1]. At t = 0 a binary y_start itself.
        """
        y_start, y_t, prior = to_common_float(y_start=y_start, y_t=y_t, prior=prior)
        likelihood = self.step_likelihood(y_t, prior, t)
        marginal = self.previous_marginal(y_start, 1 - y_start, prior, t)
        zero, one = (a * b for a, b in zip(likelihood, marginal, strict=True))
        return one / (zero + one)

    def predict_y_start(self, y_t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """Soft estimate |y_t - eps| in [0, 1] of y_start, from eps = P(y_t != y_start) as the network estimates it."""
        y_t, eps = to_common_float(y_t=y_t, eps=eps)
        return (y_t - eps).abs()

    def p_mean(self, eps: torch.Tensor, y_t: torch.Tensor, prior: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """P(y_{t-1} = 1) of the ancestral step: the posterior of the soft estimate of y_start, eq. 10.

        Args:
            eps: the network's estimate of P(y_t != y_start), (B, K, *spatial) in [0, 1].
            y_t: current state, same shape, values 0 or 1.
            prior: same shape, probabilities.
            t: LongTensor (B,).

        Returns:
            probabilities, shape of y_t; at t = 0 the soft estimate of y_start itself, which is not to be drawn from.
        """
        y_start = self.predict_y_start(y_t, eps)
        mean = self.q_posterior_mean(y_start, y_t, prior, t)
        last = (t == 0).to(mean.device).reshape(-1, *[1] * (mean.ndim - 1))
        return torch.where(last, y_start.to(mean.dtype), mean)

    def ddim_mean(self, eps: torch.Tensor, y_t: torch.Tensor, prior: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """P(y_{t-1} = 1) of the paper's DDIM-like step (Chen et al. 2024, algorithm 2).

        Every s in [0, (1 - ab_prev) / (1 - ab)], with ab = alphas_cumprod, keeps the marginals of q in the mean
        s y_t + (ab_prev - s ab) y_start + ((1 - ab_prev) - s (1 - ab)) prior. The paper takes the largest s, for which
        the prior's coefficient is 0 and the other two sum to 1: keep y_t with probability s, else draw from y_start.

        Args:
            eps: the network's estimate of P(y_t != y_start), (B, K, *spatial) in [0, 1].
            y_t: current state, same shape, values 0 or 1.
            prior: same shape; without effect, here so that both samplers are called alike.
            t: LongTensor (B,).

        Returns:
            probabilities, shape of y_t; at t = 0 the soft estimate of y_start itself.
        """
        y_t, y_start = to_common_float(y_t=y_t, y_start=self.predict_y_start(y_t, eps))
        return y_start + self._at(self.ddim_keep, t, y_t) * (y_t - y_start)

    def reverse_step(
        self,
        eps: torch.Tensor,
        y_t: torch.Tensor,
        prior: torch.Tensor,
        t: torch.Tensor,
        uniform: Callable[[], torch.Tensor],
        sampler: str = "ddpm",
    ) -> torch.Tensor:
        """Draw y_{t-1} by the sampler of a name from y_t and the estimate eps of P(y_t != y_start).

        Args:
            eps: probabilities, (B, K, *spatial).
            y_t: state, 0 or 1, same shape.
            prior: probabilities, same shape.
            t: LongTensor (B,).
            uniform: returns draws in [0, 1) of y_t's shape.
            sampler: "ddpm" (``p_mean``) or "ddim" (``ddim_mean``); both are stochastic.

        Raises:
            ValueError: for an unknown sampler.
        """
        check_sampler(sampler)
        mean = self.p_mean if sampler == "ddpm" else self.ddim_mean
        return (uniform() < mean(eps, y_t, prior, t)).to(y_t.dtype)
