"""What a reverse process is, one step at a time: views, tiles and samples can be averaged between the steps."""

from abc import ABC, abstractmethod
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import nn

from nnunetv2_diffusion.diffusion import BernoulliDiffusion, GaussianSteps, MaskEncoding, TimeSteps
from nnunetv2_diffusion.sampling.config import SamplingConfig
from nnunetv2_diffusion.sampling.noise import Noise

LEAST = 1e-6  # probability of a class before a distribution is made of them, as in export: all may be 0


# what a chain's steps hand on: tensors, or None for a network without a chain or a chain without a prior
State = TypeVar("State", bound=torch.Tensor | None)
Prior = TypeVar("Prior", bound=torch.Tensor | None)


class Window(NamedTuple):
    """What is computed once for images: the images, and what a segmentor says of it (HiDiff)."""

    image: torch.Tensor
    prior: torch.Tensor | None = None
    features: list[torch.Tensor] | None = None


class Chain(ABC, Generic[State, Prior]):
    """K steps from noise to a mask. Step 0 is the noisiest; masks are probabilities (B, K, *spatial).

    Attributes:
        steps: K.
        has_prior: states are drawn from a prior; else ``prior`` is None everywhere.
        stochastic: samples differ.
        independent: steps are draws that know nothing of each other, so the answer is their mean.
        channels: of a state, C_mask; 0 without states.
        network: whose passes the steps are, for messages.
    """

    steps: int
    network: Any = None  # subclasses say what they call
    channels: int = 0
    has_prior = False
    stochastic = True
    independent = False

    def look(self, image: torch.Tensor) -> Window:
        """What every step needs of images (B, C, *spatial): here the images."""
        return Window(image)

    def _index(self, step: int) -> torch.Tensor:
        """Of the respaced process at a step, (1,), on the CPU, where coefficients are."""
        return torch.tensor([self.steps - 1 - step])

    @abstractmethod
    def start(self, prior: Prior, noise: Noise) -> State:
        """The first state."""

    @abstractmethod
    def estimate(
        self,
        window: Window,
        state: State,
        prior: Prior,
        previous: torch.Tensor | None,
        step: int,
    ) -> torch.Tensor:
        """The mask as one network pass sees it; previous is the estimate of the step before, None at first."""

    @abstractmethod
    def advance(self, state: State, estimate: torch.Tensor, prior: Prior, step: int, noise: Noise) -> State:
        """The state after a step."""

    def answer(self, estimate: torch.Tensor) -> torch.Tensor:
        """What leaves the chain, from a mean of estimates (B, K, *spatial): of classes a distribution over them.

        Estimates of a softmax are one already.
        """
        return estimate


class Denoiser(Protocol):
    """A network of a Gaussian process, as its chain calls it."""

    encoding: MaskEncoding
    self_conditioning: bool

    @property
    def process(self) -> TimeSteps | None:
        """That was trained, a Gaussian one."""

    def __call__(
        self,
        image: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor,
        estimate: torch.Tensor | None,
        full_resolution_only: bool,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Logits (B, K, *spatial) from image, state, training time (B,) and an encoded estimate."""

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities of the classes or regions, (B, K, *spatial)."""


class Refining(Protocol):
    """A network of a Bernoulli process with a prior, as its chain calls it."""

    num_heads: int
    sigmoid: bool

    @property
    def process(self) -> BernoulliDiffusion:
        """That was trained."""

    def look(self, image: torch.Tensor) -> Window:
        """Prior and features of images."""

    def noise_probability(
        self,
        image: torch.Tensor,
        y_t: torch.Tensor,
        prior: torch.Tensor,
        t: torch.Tensor,
        features: list[torch.Tensor] | None,
    ) -> torch.Tensor:
        """P(y_t is wrong), (B, K, *spatial)."""


class GaussianChain(Chain[torch.Tensor, torch.Tensor | None]):
    """The recycling family: a Gaussian process, its network told about state and time."""

    network: Denoiser

    def __init__(self, network: Denoiser, config: SamplingConfig):
        self.network, self.config = network, config
        self.steps, self.channels = config.steps, network.encoding.channels
        process = network.process
        assert isinstance(process, GaussianSteps), "a network of another process makes another chain"
        self.process = process.respace(config.steps, config.step_spacing)

    def start(self, prior: torch.Tensor | None, noise: Noise) -> torch.Tensor:
        """See ``Chain``."""
        return noise.normal(0)

    def estimate(
        self,
        window: Window,
        state: torch.Tensor,
        prior: torch.Tensor | None,
        previous: torch.Tensor | None,
        step: int,
    ) -> torch.Tensor:
        """See ``Chain``."""
        t = self.process.timestep_map[self._index(step)].expand(len(window.image))
        seen = None
        if self.network.self_conditioning and previous is not None:
            seen = self.network.encoding.encode(previous)
        heads = self.network(window.image, state, t, seen, full_resolution_only=True)
        return self.network.probabilities(heads[0] if isinstance(heads, list | tuple) else heads)

    def advance(
        self, state: torch.Tensor, estimate: torch.Tensor, prior: torch.Tensor | None, step: int, noise: Noise
    ) -> torch.Tensor:
        """See ``Chain``."""
        x_start = 2 * self.network.encoding.encode(estimate) - 1
        return self.process.reverse_step(
            x_start, state, self._index(step), lambda: noise.normal(step + 1), self.config.sampler, self.config.eta
        )


class BernoulliChain(Chain[torch.Tensor, torch.Tensor]):
    """A Bernoulli process from a prior, of which the network estimates the noise: HiDiff."""

    has_prior = True
    network: Refining

    def __init__(self, network: Refining, config: SamplingConfig):
        self.network, self.config = network, config
        self.steps, self.channels = config.steps, network.num_heads
        self.process = network.process.respace(config.steps, config.step_spacing)

    def look(self, image: torch.Tensor) -> Window:
        """See ``Chain``."""
        return self.network.look(image)

    def start(self, prior: torch.Tensor, noise: Noise) -> torch.Tensor:
        """See ``Chain``."""
        return (noise.uniform(0) < prior).float()

    def estimate(
        self,
        window: Window,
        state: torch.Tensor,
        prior: torch.Tensor,
        previous: torch.Tensor | None,
        step: int,
    ) -> torch.Tensor:
        """See ``Chain``."""
        t = self.process.timestep_map[self._index(step)].expand(len(window.image))
        eps = self.network.noise_probability(window.image, state, prior, t, window.features)
        return self.process.predict_y_start(state, eps)

    def advance(
        self, state: torch.Tensor, estimate: torch.Tensor, prior: torch.Tensor, step: int, noise: Noise
    ) -> torch.Tensor:
        """See ``Chain``."""
        eps = (state - estimate).abs()  # the same average as of the noise: for a state of 0 or 1, linear
        return self.process.reverse_step(
            eps, state, prior, self._index(step), lambda: noise.uniform(step + 1), self.config.sampler
        )

    def answer(self, estimate: torch.Tensor) -> torch.Tensor:
        """See ``Chain``: an estimate is a probability for each class by itself, which do not sum to 1."""
        if self.network.sigmoid:
            return estimate
        estimate = estimate.clamp(min=LEAST)
        return estimate / estimate.sum(1, keepdim=True)


class Drawing(Protocol):
    """A network that makes a mask of an image and a code in one pass."""

    latent_channels: int

    def __call__(self, image: torch.Tensor, code: torch.Tensor, full_resolution_only: bool) -> torch.Tensor:
        """Logits (B, K, *spatial) from image and code (B, latent_channels)."""

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities of the classes or regions, (B, K, *spatial)."""


class CodeChain(Chain[torch.Tensor, torch.Tensor | None]):
    """Every step makes a mask of its own from a code of its own, the same for the whole case: RecycleScore."""

    independent = True
    network: Drawing

    def __init__(self, network: Drawing, config: SamplingConfig):
        self.network, self.steps, self.channels = network, config.steps, network.latent_channels

    def start(self, prior: torch.Tensor | None, noise: Noise) -> torch.Tensor:
        """See ``Chain``."""
        return noise.code(0)

    def estimate(
        self,
        window: Window,
        state: torch.Tensor,
        prior: torch.Tensor | None,
        previous: torch.Tensor | None,
        step: int,
    ) -> torch.Tensor:
        """See ``Chain``."""
        code = state.flatten(2)[..., 0]  # the same at all voxels: tiles and mirrors of a state are as for all chains
        heads = self.network(window.image, code, full_resolution_only=True)
        return self.network.probabilities(heads)

    def advance(
        self, state: torch.Tensor, estimate: torch.Tensor, prior: torch.Tensor | None, step: int, noise: Noise
    ) -> torch.Tensor:
        """See ``Chain``."""
        return noise.code(step + 1)


class SinglePass(Chain[None, torch.Tensor | None]):
    """A network without a chain: stock models, NoDiff, and HiDiff's segmentor alone (K = 0).

    Further steps are the same pass again: folds of a model share a plan of views, and one may do without its refiner.
    """

    stochastic = False
    network: nn.Module

    def __init__(self, network: nn.Module, sigmoid: bool, steps: int = 1):
        self.network, self.sigmoid, self.steps = network, sigmoid, steps

    def start(self, prior: torch.Tensor | None, noise: Noise) -> None:
        """See ``Chain``."""
        return None

    def estimate(
        self, window: Window, state: None, prior: torch.Tensor | None, previous: torch.Tensor | None, step: int
    ) -> torch.Tensor:
        """See ``Chain``."""
        logits = self.network(window.image).float()
        return logits.sigmoid() if self.sigmoid else logits.softmax(1)

    def advance(self, state: None, estimate: torch.Tensor, prior: torch.Tensor | None, step: int, noise: Noise) -> None:
        """See ``Chain``."""
        return None
