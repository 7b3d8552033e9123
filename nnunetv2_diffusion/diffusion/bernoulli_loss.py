"""Losses of Bernoulli diffusion, in bits per element (Chen et al. 2024, equations 11 and 12).

They take the network's logits: a probability that float32 rounds to 0 or 1 has lost the gradient that would correct
it. Results are at least float32; the operations used are those that autocast leaves in float32.
"""

import math
from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F

from nnunetv2_diffusion.diffusion.bernoulli import MIN_PRIOR, BernoulliDiffusion, to_common_float

# Far below every probability of a step t > 0. Zeros occur at t = 0 alone, whose KL is not used but must be finite.
_MIN_PROBABILITY = 1e-30

SUREST = 1e-3  # probability that is left to the refiner where the prior is 0 or 1
MAX_LOGIT = 30.0  # of outputs that are calibrated
PRIOR_LIMIT = math.log((1 - MIN_PRIOR) / MIN_PRIOR)
TABLE_SIZE = 4001
CHUNK = 2**20  # voxels and channels that are calibrated at once


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


class NoiseCalibration:
    """What a trained estimate of the noise says of its probability: the inverse of the loss that was trained.

    Per voxel and channel the refiner is trained with L = KL + weight * focal (``variational_bound``, ``noise_loss``).
    Where noise has probability eta, training leads to the logit x at which eta L'(x; noise) + (1 - eta) L'(x; none) is
    0, so that eta = g_0 / (g_0 - g_1), with g_v the derivative of L by x if the truth is v. This holds for every loss
    of single voxels. With s = sigmoid(x), g_0 = s w_0 and g_1 = -(1 - s) w_1,

        logit eta = x + log w_0 - log w_1.

    Only for the binary cross-entropy w_0 = w_1, so that s is eta itself (t = 0 has it in place of the KL). The focal
    loss draws s towards 1/2 (Charoenphakdee et al. 2021). The KL does not have eta as its minimiser either for
    0 < t < T - 1: alone it has the odds s / (1 - s) = eta / (1 - eta) * D_0 / D_1, with D_v = P(y_t | truth v, prior)
    up to a factor. That is the estimate of y_start before y_t is seen, because equation 10 of Chen et al. 2024 puts it
    into the posterior of a known y_start, where y_t counts once more.

    Because 0 and 1 can change places, all depends on x, t and f = |y_t - prior| alone, the probability that the prior
    gives to the other value.

    Args:
        process: the trained chain.
        gamma: of the focal loss; 0 is the binary cross-entropy.
        weight: of the focal loss beside the KL, at least 0.
        bound: the KL is trained as well; False inverts the focal loss alone, whatever its weight.

    Raises:
        ValueError: if gamma or weight is negative.
    """

    def __init__(self, process: BernoulliDiffusion, gamma: float = 2.0, weight: float = 1.0, bound: bool = True):
        if not gamma >= 0 or not weight >= 0:
            raise ValueError(f"gamma is {gamma} and weight is {weight}, expected at least 0")
        self.process, self.gamma, self.bound = process, gamma, bound
        self.weight = weight if bound else 1.0

    def logits(self, eps_logits: torch.Tensor, y_t: torch.Tensor, prior: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Log-odds of P(y_t != y_start) behind the network's output.

        Args:
            eps_logits: the network's output, (B, K, *spatial); used between -MAX_LOGIT and MAX_LOGIT.
            y_t: same shape, values 0 or 1.
            prior: same shape, probabilities.
            t: LongTensor (B,), training time.

        Returns:
            float32 or float64, shape of eps_logits, without gradient. Increasing in it, but for a gamma above 1 and a
            y_t that the prior gives less than 1 % (T = 10): there it can fall by up to 0.4 in between.

        Raises:
            ValueError: if shapes differ.
        """
        eps_logits, y_t, prior = to_common_float(eps_logits=eps_logits, y_t=y_t, prior=prior)

        def calibrate(x: torch.Tensor, y_t: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
            return self._true_logits(x.clamp(-MAX_LOGIT, MAX_LOGIT), _other(y_t, prior), t)

        return _in_chunks(calibrate, eps_logits, y_t, prior)

    def prior_logits(self, y_t: torch.Tensor, prior: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Outputs that ``logits`` turns into Bayes' P(y_t != y_start) for a mask drawn from the prior.

        That probability is (1 - alphas_cumprod) |prior - y_t|; a prior of 0 or 1 counts as ``SUREST`` there.

        Args:
            y_t: (B, K, *spatial), values 0 or 1.
            prior: same shape, probabilities.
            t: LongTensor (B,), training time.

        Returns:
            float32 or float64, shape of y_t, from a table, to about 1e-4; NaN where the prior is.

        Raises:
            ValueError: if shapes differ.
        """
        y_t, prior = to_common_float(y_t=y_t, prior=prior)
        rows = self.table[t.cpu()].to(prior.device, prior.dtype)  # t is on the CPU, as a rule

        def look_up(y_t: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
            place = (torch.logit(_other(y_t, prior)) / PRIOR_LIMIT + 1) * ((TABLE_SIZE - 1) / 2)
            below = place.nan_to_num().floor().clamp(0, TABLE_SIZE - 2).long()
            return torch.lerp(rows.gather(1, below), rows.gather(1, below + 1), place - below)

        return _in_chunks(look_up, y_t, prior)

    @cached_property
    def table(self) -> torch.Tensor:
        """float32 (T, TABLE_SIZE): ``prior_logits`` at equally spaced logits of |prior - y_t|, by bisection."""
        t = torch.arange(self.process.num_timesteps)
        other = torch.linspace(-PRIOR_LIMIT, PRIOR_LIMIT, TABLE_SIZE, dtype=torch.float64).sigmoid().expand(len(t), -1)
        noise = self.process.noise_probability(torch.zeros_like(other), other.clamp(SUREST, 1 - SUREST), t)
        wanted = torch.logit(noise)
        low, high = torch.full_like(wanted, -MAX_LOGIT), torch.full_like(wanted, MAX_LOGIT)
        for _ in range(24):  # 2 MAX_LOGIT / 2^24 is less than float32 tells apart
            middle = (low + high) / 2
            above = self._true_logits(middle, other, t) > wanted
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return ((low + high) / 2).float()

    def _true_logits(self, x: torch.Tensor, other: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x + log w_0 - log w_1 of (B, N); in logarithms, because the weights can be far below float32."""
        s, q = x.sigmoid(), (-x).sigmoid()
        # of -(1 - p)^gamma log p, p the probability of the truth
        zero = self.gamma * F.logsigmoid(x) + torch.log1p(self.gamma * q * F.softplus(x) / s)
        one = self.gamma * F.logsigmoid(-x) + torch.log1p(self.gamma * s * F.softplus(-x) / q)
        if self.bound:
            weight = math.log(self.weight) if self.weight else -math.inf
            bound = self._bound_weights(s, q, other, t)
            zero, one = (torch.logaddexp(a, b + weight) for a, b in zip(bound, (zero, one), strict=True))
        return x + zero - one

    def _bound_weights(
        self, s: torch.Tensor, q: torch.Tensor, other: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log w_0 and log w_1 of ``variational_bound``, with q = 1 - s; 0 at t = 0."""
        process = self.process
        signal = process._at(process.alphas_cumprod_prev, t, s)
        noise = process._at(1 - process.alphas_cumprod_prev, t, s)
        beta = process._at(process.betas, t, s)
        ratio = beta * (1 - other) / (1 - beta * other)  # P(y_t | other value before) / P(y_t | same value before)
        m_zero, m_one = signal * q + noise * (1 - other), signal * s + noise * other
        truths = [
            signal + noise * (1 - other) + ratio * noise * other,
            noise * (1 - other) + ratio * (signal + noise * other),
        ]
        common = ratio * signal**2 * s * q / ((m_zero + ratio * m_one) * m_zero * m_one)
        last = (t == 0).to(s.device).reshape(-1, 1)
        tiny = torch.finfo(s.dtype).tiny
        zero, one = (torch.where(last, 0.0, (common / d).clamp(min=tiny).log()) for d in truths)
        return zero, one


def _other(y_t: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """Probability that the prior gives to the value that y_t does not have, within the bounds of the process."""
    return (y_t - prior).abs().clamp(MIN_PRIOR, 1 - MIN_PRIOR)


@torch.no_grad()
def _in_chunks(function: Callable[..., torch.Tensor], *maps: torch.Tensor) -> torch.Tensor:
    """An elementwise function of maps (B, K, *spatial), given as (B, N): a dozen temporaries are made of parts only."""
    flat = [m.flatten(1) for m in maps]
    result = torch.empty_like(flat[0])
    number = max(1, CHUNK // len(result))
    for out, *parts in zip(*(m.split(number, 1) for m in (result, *flat)), strict=True):
        out.copy_(function(*parts))
    return result.reshape(maps[0].shape)
