"""Settings of the trainers with Gaussian noise: recycling, standard denoising, self-conditioning."""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from operator import mul

from nnunetv2_diffusion.settings.schema import Settings, SettingsError, setting
from nnunetv2_diffusion.settings.vocabulary import SAMPLERS, SPACINGS


@dataclass(frozen=True)
class GaussianSettings(Settings):
    """Section ``gaussian``, read by RecycleXT, RecycleXtPlus1, DiffSeg, SelfCondXt and SelfCondXtPlus1."""

    timesteps: int = setting(1001, "T, length of the noise schedule", low=1, high=100_000)
    betas: tuple[float, float] = setting(
        (1e-4, 0.02), "first and last beta of the linear schedule", low=1e-8, high=0.999
    )
    training_steps: int | None = setting(
        None,
        "train on a schedule respaced to so many steps (5 in table 8 of the paper); null: all T",
        low=1,
        high=100_000,
    )
    time_sampling: str = setting(
        "uniform",
        "how training draws t; importance-published reproduces the wrong weight of the published code",
        choices=("uniform", "importance", "importance-published"),
    )
    self_conditioning_probability: float = setting(
        0.5, "share of training samples of a SelfCond trainer that see the first pass's estimate", low=0.0, high=1.0
    )
    steps: int | None = setting(
        None,
        "K, network passes of one predicted sample; null: 1 for recycling, 5 for the others; 5 in the paper",
        low=1,
        high=100_000,
    )
    sampler: str = setting("ddpm", "reverse step", choices=SAMPLERS)
    step_spacing: str = setting(
        "trailing",
        "the K steps: linspace from T - 1 to 0, as in the paper; trailing from T - 1 to T / K, which is better",
        choices=SPACINGS,
    )
    eta: float = setting(0.0, "DDIM's noise, 0 deterministic to 1 as DDPM", low=0.0, high=1.0, earlier=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        first, last = self.betas
        if last < first:
            raise SettingsError(f"betas is [{first}, {last}], expected the last to be at least the first")
        if self.training_steps is not None and self.training_steps > self.timesteps:
            raise SettingsError(
                f"training_steps is {self.training_steps}, expected at most timesteps = {self.timesteps}"
            )
        if self.steps is not None and self.steps > self.chain_length:
            raise SettingsError(
                f"steps is {self.steps}, expected 1 .. {self.chain_length}, the length of the trained schedule"
            )
        steps = self.steps or 1  # no number asks for more
        if not _has_signal(self.timesteps, first, last, self.training_steps, steps, self.step_spacing):
            raise SettingsError(
                f"betas is [{first}, {last}], expected a smaller last one, or fewer timesteps than {self.timesteps}: "
                f"a step of the chain of {self.training_steps or steps} would be noise alone, with a beta of 1"
            )

    @property
    def chain_length(self) -> int:
        """Number of time steps that training uses."""
        return self.training_steps or self.timesteps

    def with_steps(self, own: int) -> "GaussianSettings":
        """With a number of steps: the method's own one, as far as the trained schedule goes, where none is set.

        Raises:
            SettingsError: if the schedule cannot be taken in so many steps.
        """
        return self if self.steps is not None else replace(self, steps=min(own, self.chain_length))


def _kept(length: int, number: int, spacing: str) -> list[int]:
    """Indices of a respaced chain, as ``DiffusionProcess.respace`` keeps them."""
    if number == 1:
        return [length - 1]
    if spacing == "linspace":
        return [round(k * (length - 1) / (number - 1)) for k in range(number)]
    return [round(k / number * length) - 1 for k in range(1, number + 1)]


@lru_cache(maxsize=64)
def _has_signal(length: int, first: float, last: float, trained: int | None, steps: int, spacing: str) -> bool:
    """Whether all betas of a linear schedule are below 1 in double precision, also after it was respaced.

    The shares of signal that are left after each step, ``alphas_cumprod``, fall fast where betas are large.
    """
    betas = (first + (last - first) * t / max(length - 1, 1) for t in range(length))
    shares = list(accumulate((1 - beta for beta in betas), mul))
    for number, kind in ((trained, "linspace"), (steps, spacing)):
        if number is not None:
            shares = [shares[i] for i in _kept(len(shares), number, kind)]
            if not all(before > 0 and 0 < 1 - after / before < 1 for before, after in pairwise([1.0, *shares])):
                return False
    return True
