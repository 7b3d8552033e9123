"""How a prediction is drawn."""

from dataclasses import dataclass

from nnunetv2_diffusion.diffusion.process import SAMPLERS, SPACINGS


@dataclass(frozen=True)
class SamplingConfig:
    """How a prediction is drawn.

    Attributes:
        steps: K, network evaluations of one sample.
        sampler: "ddpm" (ancestral, fixed small variance) or "ddim".
        eta: DDIM's noise level in [0, 1]; without effect for DDPM.
        samples: masks drawn; their probabilities are averaged.
        seed: any integer; the same seed and image give the same result.
        step_spacing: of the K steps over the schedule, see ``DiffusionProcess.respace``.

    Raises:
        ValueError: for a value out of range.
    """

    steps: int
    sampler: str = "ddpm"
    eta: float = 0.0
    samples: int = 1
    seed: int = 0
    step_spacing: str = "linspace"

    def __post_init__(self) -> None:
        for name, known in (("sampler", SAMPLERS), ("step_spacing", SPACINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name in ("steps", "samples"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}, expected a number in [0, 1]")
