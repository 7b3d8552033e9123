"""Which time steps are trained: uniformly, or in proportion to their loss."""

import math
from collections.abc import Sequence

import torch

TIME_SAMPLERS = ("uniform", "importance", "importance-published")


class UniformTimeSampler:
    """t uniform over the allowed range, weight 1."""

    learns = False  # from losses

    def __init__(self, num_timesteps: int):
        self.num_timesteps = num_timesteps

    def sample(self, batch_size: int, t_range: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw t in t_range = [low, high): LongTensor (B,) and float32 weights (B,)."""
        return torch.randint(*t_range, (batch_size,)), torch.ones(batch_size)

    def update(self, t: Sequence[int], loss: Sequence[float]) -> None:
        """Nothing is learned."""

    def state_dict(self) -> dict:
        """No state."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Accept an empty state only."""
        if state:
            raise ValueError(f"uniform time sampling has no state, the checkpoint holds {sorted(state)}")


class ImportanceTimeSampler:
    """Loss-aware time sampling (Nichol & Dhariwal 2021, eq. 18; Fu et al. 2024, section 3.1).

    A moving average of the squared loss is kept for every t. Once each allowed t was seen ``warmup`` times,
    p_t = (1 - uniform_share) * sqrt(E[L_t^2]) / sum + uniform_share / T, renormalised over the allowed range.
    The loss of a sample is weighted by 1 / (p_t * N), N the number of allowed steps, which leaves the expected
    gradient that of uniform sampling. During warm-up the steps that lack visits are drawn, each equally often, with
    weight 1.

    Args:
        num_timesteps: T.
        warmup: visits of each step before its loss is trusted.
        decay: of the moving average.
        uniform_share: part of the probability that stays uniform.
        published: weight by p_t * T as the published code of Fu et al. 2024 does, p_t before it is renormalised. High
            losses then count twice, and the expected gradient is not that of uniform sampling: for comparison only.
    """

    learns = True

    def __init__(
        self,
        num_timesteps: int,
        warmup: int = 10,
        decay: float = 0.9,
        uniform_share: float = 0.01,
        published: bool = False,
    ):
        self.num_timesteps = num_timesteps
        self.warmup = warmup
        self.decay = decay
        self.uniform_share = uniform_share
        self.published = published
        self.loss_sq = torch.zeros(num_timesteps, dtype=torch.float64)
        self.count = torch.zeros(num_timesteps, dtype=torch.long)

    def probabilities(self, t_range: tuple[int, int]) -> torch.Tensor:
        """p_t of all T steps, float64; 0 outside t_range = [low, high), summing to 1."""
        p = self._probabilities()
        allowed = torch.zeros_like(p)
        allowed[slice(*t_range)] = p[slice(*t_range)]
        return allowed / allowed.sum()

    def _probabilities(self) -> torch.Tensor:
        """p_t over all T steps, before some are ruled out."""
        root = self.loss_sq.sqrt()
        total = root.sum()
        uniform = torch.full_like(root, 1 / self.num_timesteps)
        if total > 0:
            return (1 - self.uniform_share) * root / total + self.uniform_share * uniform
        return uniform

    def sample(self, batch_size: int, t_range: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw t in t_range = [low, high): LongTensor (B,) and float32 weights (B,), 1 / (p_t * N) or as published."""
        low, high = t_range
        if not 0 <= low < high <= self.num_timesteps:
            raise ValueError(f"t_range is {t_range}, expected 0 <= low < high <= {self.num_timesteps}")
        deficit = torch.zeros(self.num_timesteps, dtype=torch.float64)
        deficit[low:high] = (self.warmup - self.count[low:high]).clamp(min=0).double()
        if deficit.sum() > 0:
            return torch.multinomial(deficit, batch_size, replacement=True), torch.ones(batch_size)
        p = self.probabilities(t_range)
        t = torch.multinomial(p, batch_size, replacement=True)
        if self.published:
            return t, (self._probabilities()[t] * self.num_timesteps).float()
        return t, (1 / (p[t] * (high - low))).float()

    def update(self, t: Sequence[int], loss: Sequence[float]) -> None:
        """Record unweighted losses of samples. Of one step's losses in a batch the last one counts.

        A loss that is not finite is left out: one NaN would make every probability NaN for the rest of the run.
        """
        before = self.loss_sq.clone()
        for step, value in zip(t, loss, strict=True):
            if math.isfinite(value):
                self.loss_sq[step] = (1 - self.decay) * value**2 + self.decay * before[step]
                self.count[step] += 1

    def state_dict(self) -> dict:
        """History as tensors."""
        return {"loss_sq": self.loss_sq, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        """Restore a history.

        Raises:
            ValueError: if keys are missing or it belongs to another number of time steps.
        """
        for key in ("loss_sq", "count"):
            if key not in state:
                raise ValueError(f"the checkpoint's time-sampling history has no {key!r}: {sorted(state)}")
            if len(state[key]) != self.num_timesteps:
                raise ValueError(
                    f"the checkpoint's time-sampling history has {len(state[key])} steps, "
                    f"the settings have {self.num_timesteps}"
                )
        self.loss_sq = state["loss_sq"].detach().to("cpu", torch.float64, copy=True)
        self.count = state["count"].detach().to("cpu", torch.long, copy=True)


def make_time_sampler(name: str, num_timesteps: int) -> UniformTimeSampler | ImportanceTimeSampler:
    """The sampler of a name in TIME_SAMPLERS.

    Raises:
        ValueError: for another name.
    """
    if name not in TIME_SAMPLERS:
        raise ValueError(f"time_sampling is {name!r}, expected one of {', '.join(TIME_SAMPLERS)}")
    if name == "uniform":
        return UniformTimeSampler(num_timesteps)
    return ImportanceTimeSampler(num_timesteps, published=name == "importance-published")
