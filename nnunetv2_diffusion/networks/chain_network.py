"""A network that predicts by a reverse process, behind nnU-Net's one call ``network(image) -> logits``."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from nnunetv2_diffusion.networks.heads import HeadsMixin
from nnunetv2_diffusion.sampling import Chain, Estimator, SamplingConfig, mean_of_samples


class ChainNetwork(HeadsMixin):
    """What planner, predictor and host ask a network for, whatever its method.

    Attributes:
        sampling: how predictions are drawn; may be replaced at any time. None: by one pass, without a chain.
    """

    sampling: SamplingConfig | None
    takes_warm_start = True  # from a checkpoint of nnU-Net's own network, or of one with more or fewer inputs
    least_steps = 1  # that a prediction can have; 0 where there is a mask without the chain

    @property
    def has_chain(self) -> bool:
        """Whether there is a reverse process; else a prediction is one pass."""
        return True

    def make_chain(self, config: SamplingConfig | None) -> Chain:
        """The reverse process as ``run_chain`` takes it; None for a config: as if steps were 0."""
        raise NotImplementedError

    def respace(self, config: SamplingConfig) -> None:
        """Raise ValueError if the trained process has no such steps."""

    def resolve(self, given: Mapping[str, Any], insist: bool = False) -> SamplingConfig | None:
        """How to sample when a user asks for something.

        Args:
            given: fields of a ``SamplingConfig``; the others are those of ``sampling``.
            insist: the user asked for steps.

        Returns:
            None for a prediction without the chain.

        Raises:
            ValueError: if the network cannot do it.
        """
        start = self.sampling or SamplingConfig(steps=1, sampler="ddim")
        if self.least_steps == 0 and given.get("steps", start.steps if self.sampling else 0) == 0:
            return None
        config = replace(start, **given)
        self.respace(config)
        return config

    def compile_passes(self) -> None:
        """As the host asks for by compiling the whole network to predict: single passes, once."""
        raise NotImplementedError

    def coarse_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Grids of the deep-supervision heads but the finest, for an image of a shape; none without such heads."""
        return []

    @torch.compiler.disable  # with all that it calls: a loop would be compiled anew for every step, up to a limit
    def predict(self, image: torch.Tensor, compiled: bool = False) -> torch.Tensor | list[torch.Tensor]:
        """Mean over samples of the reverse process's result, as logits whose softmax or sigmoid is that mean.

        Args:
            image: (B, C, *spatial), finite.
            compiled: the caller is compiled, so the passes are to be.

        Returns:
            fresh bounded float32 logits (B, K, *spatial); under deep supervision a list, the coarser ones being the
            fine one on their grids.

        Raises:
            ValueError: for an image with NaN or infinite values.
            NotFiniteError: for an answer that is not finite.
        """
        if compiled:
            self.compile_passes()
        assert self.sampling is not None, "a network that predicts by one pass does so without this method"
        return self.answer(Estimator(self.make_chain(self.sampling), image), self.sampling)

    def answer(self, estimator: Estimator, config: SamplingConfig) -> torch.Tensor | list[torch.Tensor]:
        """As ``predict``, from tiles of which something may be known already."""
        logits = self.bounded_logits(mean_of_samples(estimator, config))
        coarse = self.coarse_shapes(tuple(logits.shape[2:]))
        return [logits, *[F.interpolate(logits, shape) for shape in coarse]] if coarse else logits
