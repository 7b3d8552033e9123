"""Losses of Bernoulli diffusion, in bits per element (Chen et al. 2024, equations 11 and 12).

They take the network's logits: a probability that float32 rounds to 0 or 1 has lost the gradient that would correct
it. Results are at least float32; the operations used are those that autocast leaves in float32.
"""

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from nnunetv2_diffusion.diffusion.bernoulli import BernoulliDiffusion, to_common_float

# Far below every probability of a step t > 0. Zeros occur at t = 0 alone, whose KL is not used but must be finite.
_MIN_PROBABILITY = 1e-30

TABLE_EPS = 1e-5
TABLE_LIMIT = math.log((1 - TABLE_EPS) / TABLE_EPS)


def _mean_in_bits(nats: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Mean over all but the first axis, of the voxels that are valid (B, 1, *spatial); 0 where a sample has none."""
    if valid is None:
        return nats.flatten(1).mean(1) / math.log(2)
    expected = (len(nats), 1, *nats.shape[2:])
    if valid.shape != expected:
        raise ValueError(f"valid has shape {tuple(valid.shape)}, expected {expected}")
    valid = valid.bool()
    total = torch.where(valid, nats, 0).flatten(1).sum(1)
    return total / (valid.flatten(1).sum(1).clamp(min=1) * nats.shape[1]) / math.log(2)


def variational_bound(
    process: BernoulliDiffusion,
    eps_logits: torch.Tensor,
    y_start: torch.Tensor,
    y_t: torch.Tensor,
    prior: torch.Tensor,
    t: torch.Tensor,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """KL(q(y_{t-1} | y_t, y_start) || p(y_{t-1} | y_t)), eq. 11; at t = 0 -log p(y_start | y_0 = y_t).

    Gradients reach the logits through p, and the prior through both distributions.

    Args:
        process: the chain that made y_t.
        eps_logits: the network's output, (B, K, *spatial); its sigmoid estimates P(y_t != y_start).
        y_start: same shape, values 0 or 1.
        y_t: same shape, values 0 or 1.
        prior: same shape, probabilities.
        t: LongTensor (B,).
        valid: (B, 1, *spatial), nonzero where voxels count; default everywhere.

    Returns:
        (B,) bits, mean over channels and valid voxels; finite for finite logits. At least 0 up to rounding.

    Raises:
        ValueError: if shapes differ.
    """
    eps_logits, y_start, y_t, prior = to_common_float(eps_logits=eps_logits, y_start=y_start, y_t=y_t, prior=prior)
    logits = (1 - 2 * y_t) * eps_logits  # of the estimated y_start, |y_t - eps|
    likelihood = _log_odds(*process.step_likelihood(y_t, prior, t))
    q_logits = likelihood + _log_odds(*process.previous_marginal(y_start, 1 - y_start, prior, t))
    p_logits = likelihood + _log_odds(*process.previous_marginal(logits.sigmoid(), (-logits).sigmoid(), prior, t))
    kl = _binary_kl(q_logits, p_logits)
    decoder = F.binary_cross_entropy_with_logits(logits, y_start, reduction="none")
    last = (t == 0).to(kl.device).reshape(-1, *[1] * (kl.ndim - 1))
    return _mean_in_bits(torch.where(last, decoder, kl), valid)  # both finite: where passes on the NaN of either


def _log_odds(zero: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
    return one.clamp(min=_MIN_PROBABILITY).log() - zero.clamp(min=_MIN_PROBABILITY).log()


def _binary_kl(q_logits: torch.Tensor, p_logits: torch.Tensor) -> torch.Tensor:
    """KL of two Bernoulli distributions in nats, elementwise: cross-entropy minus entropy, which keep few tensors."""
    q = q_logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(p_logits, q, reduction="none")
    return cross_entropy - F.binary_cross_entropy_with_logits(q_logits, q, reduction="none")


def noise_loss(
    eps_logits: torch.Tensor,
    y_start: torch.Tensor,
    y_t: torch.Tensor,
    gamma: float = 2.0,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Focal loss between the estimated noise and |y_t - y_start|, eq. 12: -(1 - p)^gamma log p, p that of the truth.

    Args:
        eps_logits: the network's output, (B, K, *spatial).
        y_start: same shape, values 0 or 1.
        y_t: same shape, values 0 or 1.
        gamma: at least 0, which is the binary cross-entropy.
        valid: (B, 1, *spatial), nonzero where voxels count; default everywhere.

    Returns:
        (B,) bits, mean over channels and valid voxels.

    Raises:
        ValueError: if gamma is negative or shapes differ.
    """
    if not gamma >= 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    eps_logits, y_start, y_t = to_common_float(eps_logits=eps_logits, y_start=y_start, y_t=y_t)
    logits = (2 * (y_t - y_start).abs() - 1) * eps_logits  # of being right
    # in logarithms: the power of a probability that was rounded to 0 has no gradient, or a NaN for gamma < 1
    focus = (gamma * F.logsigmoid(-logits)).exp()
    return _mean_in_bits(-focus * F.logsigmoid(logits), valid)


def focal_to_probability(p: torch.Tensor, gamma: float) -> torch.Tensor:
    """True probability behind an output that was trained with the focal loss (Charoenphakdee et al. 2021, eq. 8).

    The focal loss is not proper: where noise has probability eta, its minimiser is about (eta / 3)^(1/3) for gamma = 2
    and small eta, 0.07 for eta = 0.001. Drawn from as it is, such an estimate speckles the mask with noise that was
    never seen in training.

    Args:
        p: outputs in [0, 1].
        gamma: of the focal loss; 0 returns p.

    Returns:
        float32 or float64, shape of p, increasing in p; 0, 0.5 and 1 stay.
    """
    p = p if p.dtype == torch.float64 else p.float()
    if gamma == 0:
        return p
    return torch.sigmoid(_true_log_odds(p, gamma))


def _true_log_odds(p: torch.Tensor, gamma: float) -> torch.Tensor:
    """log of [p / phi(p)] / [(1 - p) / phi(1 - p)] with phi(v) = (1 - v)^gamma - gamma (1 - v)^(gamma - 1) v log v."""
    tiny = torch.finfo(p.dtype).tiny

    def log_phi(v: torch.Tensor) -> torch.Tensor:
        phi = (1 - v) ** gamma - gamma * (1 - v) ** (gamma - 1) * v * v.clamp(min=tiny).log()
        return phi.clamp(min=tiny).log()

    q = 1 - p
    return p.clamp(min=tiny).log() - log_phi(p) - q.clamp(min=tiny).log() + log_phi(q)


def focal_logits(eta: torch.Tensor, gamma: float) -> torch.Tensor:
    """Logits that the focal loss would train where noise has probability eta: the inverse of focal_to_probability.

    Args:
        eta: probabilities, used between 1e-5 and 1 - 1e-5.
        gamma: of the focal loss; 0 returns the logits of eta.

    Returns:
        float32 logits, shape of eta; from a table, to about 1e-4.
    """
    logits = torch.logit(eta.float(), eps=TABLE_EPS)
    if gamma == 0:
        return logits
    table = _focal_table(gamma).to(eta.device)
    place = (logits / TABLE_LIMIT + 1) * ((len(table) - 1) / 2)
    below = place.nan_to_num().floor().clamp(0, len(table) - 2).long()  # NaN stays NaN, and is named by the trainer
    return torch.lerp(table[below], table[below + 1], place - below)


@lru_cache(maxsize=4)
def _focal_table(gamma: float) -> torch.Tensor:
    """Focal logits at 4001 equally spaced logits of the true probability, -TABLE_LIMIT .. TABLE_LIMIT."""
    focal = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    true = _true_log_odds(focal.sigmoid(), gamma)
    wanted = torch.linspace(-TABLE_LIMIT, TABLE_LIMIT, 4001, dtype=torch.float64)
    return torch.from_numpy(np.interp(wanted.numpy(), true.numpy(), focal.numpy())).float()
