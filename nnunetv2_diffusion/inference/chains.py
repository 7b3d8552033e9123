"""Reverse processes taken apart, so that views, tiles and samples can be averaged between their steps."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from nnunetv2_diffusion.diffusion import (
    PositionNoise,
    SamplingConfig,
    bernoulli_reverse_step,
    gaussian_reverse_step,
)
from nnunetv2_diffusion.networks import DiffusionUNet, HiDiffNetwork, RecycleScoreUNet, to_x_start

LEAST = 1e-6  # probability of a class before a distribution is made of them, as in export: all may be 0


@dataclass(frozen=True)
class BoxNoise:
    """Noise of one sample in one box of a case; see ``PositionNoise``.

    Attributes:
        seed: the user's.
        sample: index of the sample.
        channels: of a state.
        start: first voxel of the box along three axes.
        size: voxels along three axes.
        planar: leave out the first axis, of size 1: a tile of a 2D network.
        device: where noise is made.
    """

    seed: int
    sample: int
    channels: int
    start: tuple[int, int, int]
    size: tuple[int, int, int]
    planar: bool
    device: torch.device

    def _draw(self, kind: str, step: int) -> torch.Tensor:
        noise = PositionNoise(self.seed, (self.sample, step), self.device)
        field = getattr(noise, kind)(self.channels, self.start, self.size)
        return (field[:, 0] if self.planar else field)[None]

    def normal(self, step: int) -> torch.Tensor:
        """Standard normal noise before a step, (1, C_mask, *spatial)."""
        return self._draw("normal", step)

    def uniform(self, step: int) -> torch.Tensor:
        """Uniform noise in (0, 1) before a step, (1, C_mask, *spatial)."""
        return self._draw("uniform", step)

    def code(self, step: int) -> torch.Tensor:
        """Standard normal numbers of a sample and step, the same in every box and voxel: (1, channels, *spatial)."""
        numbers = PositionNoise(self.seed, (self.sample, step), self.device).normal(self.channels, (), ())
        size = self.size[1:] if self.planar else self.size
        return numbers.reshape(1, -1, *[1] * len(size)).expand(1, -1, *size)


@dataclass(frozen=True)
class JoinedNoise:
    """Noise of several boxes that are computed at once: (B, C_mask, *spatial), each as it would be alone."""

    parts: Sequence[BoxNoise]

    def normal(self, step: int) -> torch.Tensor:
        """See ``BoxNoise``."""
        return torch.cat([part.normal(step) for part in self.parts])

    def uniform(self, step: int) -> torch.Tensor:
        """See ``BoxNoise``."""
        return torch.cat([part.uniform(step) for part in self.parts])

    def code(self, step: int) -> torch.Tensor:
        """See ``BoxNoise``."""
        return torch.cat([part.code(step) for part in self.parts])


Noise = BoxNoise | JoinedNoise


class Window(NamedTuple):
    """What is computed once for images: the images, and what a segmentor says of it (HiDiff)."""

    image: torch.Tensor
    prior: torch.Tensor | None = None
    features: list[torch.Tensor] | None = None


class Chain(ABC):
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
    network: nn.Module | None = None
    channels: int = 0
    has_prior = False
    stochastic = True
    independent = False

    @abstractmethod
    def look(self, image: torch.Tensor) -> Window:
        """What every step needs of images (B, C, *spatial)."""

    @abstractmethod
    def start(self, prior: torch.Tensor | None, noise: Noise) -> torch.Tensor | None:
        """The first state."""

    @abstractmethod
    def estimate(
        self,
        window: Window,
        state: torch.Tensor | None,
        prior: torch.Tensor | None,
        previous: torch.Tensor | None,
        step: int,
    ) -> torch.Tensor:
        """The mask as one network pass sees it; previous is the estimate of the step before, None at first."""

    @abstractmethod
    def advance(
        self, state: torch.Tensor | None, estimate: torch.Tensor, prior: torch.Tensor | None, step: int, noise: Noise
    ) -> torch.Tensor | None:
        """The state after a step."""

    def answer(self, estimate: torch.Tensor) -> torch.Tensor:
        """What leaves the chain, from a mean of estimates (B, K, *spatial): of classes a distribution over them.

        Estimates of a softmax are one already.
        """
        return estimate


class GaussianChain(Chain):
    """The recycling family: a Gaussian process, its network told about state and time."""

    def __init__(self, network: DiffusionUNet, config: SamplingConfig):
        self.network, self.config = network, config
        self.steps, self.channels = config.steps, network.encoding.channels
        self.process = network.process.respace(config.steps, config.step_spacing)

    def _index(self, step: int) -> torch.Tensor:
        return torch.tensor([self.steps - 1 - step])  # on the CPU, where coefficients are

    def look(self, image: torch.Tensor) -> Window:
        """See ``Chain``."""
        return Window(image)

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
        conditioned = self.network.self_conditioning and previous is not None
        seen = self.network.encoding.encode(previous) if conditioned else None
        heads = self.network(window.image, state, t, seen, full_resolution_only=True)
        return self.network.probabilities(heads[0] if isinstance(heads, list | tuple) else heads)

    def advance(
        self, state: torch.Tensor, estimate: torch.Tensor, prior: torch.Tensor | None, step: int, noise: Noise
    ) -> torch.Tensor:
        """See ``Chain``."""
        x_start = to_x_start(self.network.encoding.encode(estimate))
        return gaussian_reverse_step(
            self.process, x_start, state, self._index(step), lambda: noise.normal(step + 1),
            self.config.sampler, self.config.eta,
        )  # fmt: skip


class BernoulliChain(Chain):
    """HiDiff: a Bernoulli process from the segmentor's mask, its noise estimated by the refiner."""

    has_prior = True

    def __init__(self, network: HiDiffNetwork, config: SamplingConfig, sigmoid: bool):
        self.network, self.config, self.sigmoid = network, config, sigmoid
        self.steps, self.channels = config.steps, network.num_heads
        self.process = network.process.respace(config.steps, config.step_spacing)

    def _index(self, step: int) -> torch.Tensor:
        return torch.tensor([self.steps - 1 - step])

    def look(self, image: torch.Tensor) -> Window:
        """See ``Chain``."""
        output = self.network.segmentor(image)
        return Window(image, self.network.prior(output.logits), output.features)

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
        return bernoulli_reverse_step(
            self.process, eps, state, prior, self._index(step), lambda: noise.uniform(step + 1), self.config.sampler
        )

    def answer(self, estimate: torch.Tensor) -> torch.Tensor:
        """See ``Chain``: an estimate is a probability for each class by itself, which do not sum to 1."""
        if self.sigmoid:
            return estimate
        estimate = estimate.clamp(min=LEAST)
        return estimate / estimate.sum(1, keepdim=True)


class RecycleScoreChain(Chain):
    """RecycleScore: every step makes a mask of its own from a code of its own, the same for the whole case."""

    independent = True

    def __init__(self, network: RecycleScoreUNet, config: SamplingConfig):
        self.network, self.steps, self.channels = network, config.steps, network.latent_channels

    def look(self, image: torch.Tensor) -> Window:
        """See ``Chain``."""
        return Window(image)

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


class SinglePass(Chain):
    """A network without a chain: stock models, NoDiff, and HiDiff's segmentor alone (K = 0).

    Further steps are the same pass again: folds of a model share a plan of views, and one may do without its refiner.
    """

    stochastic = False

    def __init__(self, network: nn.Module, sigmoid: bool, steps: int = 1):
        self.network, self.sigmoid, self.steps = network, sigmoid, steps

    def look(self, image: torch.Tensor) -> Window:
        """See ``Chain``."""
        return Window(image)

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


class _PriorOnly(nn.Module):
    """HiDiff's segmentor as a network with one output."""

    def __init__(self, network: HiDiffNetwork):
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network.segmentor(image).logits


def make_chain(network: nn.Module, config: SamplingConfig | None, sigmoid: bool) -> Chain:
    """The chain of a network.

    Args:
        network: any network of nnU-Net, in eval mode.
        config: how to sample; None for HiDiff's segmentor alone.
        sigmoid: heads are regions.
    """
    if isinstance(network, HiDiffNetwork):
        if config is not None and network.uses_refiner():
            return BernoulliChain(network, config, sigmoid)
        return SinglePass(_PriorOnly(network), sigmoid, 1 if config is None else config.steps)
    if isinstance(network, RecycleScoreUNet):
        return RecycleScoreChain(network, config)
    if isinstance(network, DiffusionUNet) and network.process is not None:
        return GaussianChain(network, config)
    return SinglePass(network, sigmoid)
