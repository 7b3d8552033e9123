"""The reverse loop: nnU-Net's call of a network and our own predictor run this one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from operator import add
from typing import NamedTuple

import torch

from nnunetv2_diffusion.diffusion.noise import content_hash
from nnunetv2_diffusion.sampling.chain import Chain, Window
from nnunetv2_diffusion.sampling.config import SamplingConfig
from nnunetv2_diffusion.sampling.noise import Noise, NoiseByContent
from nnunetv2_diffusion.sampling.views import Schedule, View, mirror


class Step(NamedTuple):
    """One step of a chain.

    Attributes:
        state: that it saw, (B, C_mask, *spatial); None for a network without a chain.
        answer: probabilities of the mask after it, (B, K, *spatial).
    """

    state: torch.Tensor | None
    answer: torch.Tensor


def _seen(x: torch.Tensor | None, view: View) -> torch.Tensor | None:
    return None if x is None else mirror(x, view)


def _sum(maps: Iterable[torch.Tensor]) -> torch.Tensor:
    return reduce(add, maps)


class Estimator:
    """A chain's network passes on a batch of tiles, in any view.

    Args:
        chain: of the network.
        image: the tiles, (B, C, *spatial).
        tick: called after every pass with the number of tiles.
        windows: what was computed already, by view.
    """

    def __init__(
        self,
        chain: Chain,
        image: torch.Tensor,
        tick: Callable[[int], None] = lambda tiles: None,
        windows: dict[View, Window] | None = None,
    ):
        self.chain, self.image, self.tick = chain, image, tick
        self.windows = windows or {}

    def _window(self, view: View) -> Window:
        if view not in self.windows:
            self.windows[view] = self.chain.look(mirror(self.image, view))
        return self.windows[view]

    def _prior(self, view: View) -> torch.Tensor:
        prior = self._window(view).prior
        assert prior is not None, "a chain that has a prior looks it up for every view"
        return mirror(prior, view)

    def prior(self, views: Sequence[View]) -> torch.Tensor | None:
        """Mean prior over views, None if the chain has none."""
        if not self.chain.has_prior:
            return None
        return _sum(map(self._prior, views)) / len(views)

    def __call__(
        self,
        view: View,
        state: torch.Tensor | None,
        prior: torch.Tensor | None,
        previous: torch.Tensor | None,
        step: int,
    ) -> torch.Tensor:
        """The estimate of a view, turned back."""
        state, prior, previous = (_seen(x, view) for x in (state, prior, previous))
        p = mirror(self.chain.estimate(self._window(view), state, prior, previous, step), view)
        self.tick(len(self.image))
        return p


def run_chain(chain: Chain, estimator: Estimator, schedule: Schedule, noise: Noise) -> Iterator[Step]:
    """Run one chain and yield every step.

    The estimate of a step, from which the chain goes on, is the mean of each view's latest estimate, so every view
    counts once; it is the answer. Where steps are draws that know nothing of each other (``Chain.independent``), the
    answer is the mean of all passes so far.

    Args:
        chain: of the network.
        estimator: of the tiles.
        schedule: views of every step.
        noise: of the tiles.
    """
    prior = estimator.prior(list(dict.fromkeys(view for step in schedule for view in step)))
    state = chain.start(prior, noise)
    latest: dict[View, torch.Tensor] = {}
    total: torch.Tensor | None = None
    previous: torch.Tensor | None = None
    passes = 0
    for step, seen in enumerate(schedule):
        if chain.independent:
            latest.clear()
        for view in seen:
            latest[view] = estimator(view, state, prior, previous, step)
        answer = estimate = _sum(latest.values()) / len(latest)
        if chain.independent:
            drawn, passes = estimate * len(seen), passes + len(seen)
            total = drawn if total is None else total + drawn
            answer = total / passes
        yield Step(state, chain.answer(answer))
        if step + 1 == len(schedule):
            return
        state = chain.advance(state, estimate, prior, step, noise)
        previous = estimate


def mean_of_samples(estimator: Estimator, config: SamplingConfig) -> torch.Tensor:
    """What nnU-Net's call of a network returns: the loop without mirrors, its noise from the tiles' contents.

    Args:
        estimator: of the tiles.
        config: samples and seed.

    Returns:
        probabilities (B, K, *spatial), the mean over samples of the last step's answer.

    Raises:
        ValueError: for an image with NaN or infinite values.
    """
    chain, image = estimator.chain, estimator.image
    hashes, shape = content_hash(image), (chain.channels, *image.shape[2:])
    mean: torch.Tensor | None = None
    for sample in range(config.samples):
        noise = NoiseByContent(hashes, config.seed, sample, shape, image.device)
        *_, last = run_chain(chain, estimator, [[()]] * chain.steps, noise)
        mean = last.answer if mean is None else mean + (last.answer - mean) / (sample + 1)
    assert mean is not None, "a SamplingConfig has at least one sample"
    return mean
