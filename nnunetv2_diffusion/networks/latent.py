"""A network whose mask is a draw: one pass from an image and a code of a few random numbers."""

from typing import Any

import torch
from torch import nn

from nnunetv2_diffusion.diffusion import ContentNoise, SamplingConfig
from nnunetv2_diffusion.diffusion.noise import content_hash
from nnunetv2_diffusion.networks.heads import average_samples
from nnunetv2_diffusion.networks.segmentor import DiffusionSegmentor


class LatentSegmentor(DiffusionSegmentor):
    """A U-Net f(image, z) -> mask whose code z ~ N(0, I) scales and shifts every norm, the same at all places.

    ``forward(image, z)`` is one pass, for training. ``forward(image)`` is what nnU-Net calls to predict: the mean over
    ``sampling.samples`` codes that follow from seed and image, so each of the host's mirrored views has its own.

    Args:
        unet: see ``DenoisingUNet``.
        sampling: steps are the draws of one prediction by ``nnunetv2_diffusion predict``; samples, seed.
        num_heads: K, classes with background, or regions.
        latent_channels: numbers of a code.
        **kwargs: see ``DenoisingUNet``.
    """

    def __init__(
        self,
        unet: nn.Module,
        sampling: SamplingConfig,
        num_heads: int,
        latent_channels: int,
        **kwargs: Any,
    ):
        super().__init__(
            unet, None, sampling, num_heads, time_conditioning=False, latent_channels=latent_channels, **kwargs
        )
        self.latent_channels = latent_channels

    def forward(
        self, image: torch.Tensor, latent: torch.Tensor | None = None, full_resolution_only: bool = False
    ) -> torch.Tensor | list[torch.Tensor]:
        """A draw if a code is given, else predict.

        Args:
            image: (B, C, *spatial).
            latent: code (B, latent_channels), standard normal.
            full_resolution_only: leave out deep-supervision heads.

        Returns:
            logits (B, K, *spatial), a list of them under deep supervision.

        Raises:
            ValueError: when predicting from an image with NaN or infinite values.
        """
        if latent is None:
            return self.predict(image, torch.compiler.is_compiling())
        return self._run(image, full_resolution_only=full_resolution_only, latent=latent)

    @torch.compiler.disable  # as ``DiffusionSegmentor.predict``
    def predict(self, image: torch.Tensor, compiled: bool = False) -> torch.Tensor | list[torch.Tensor]:
        """Mean over samples, as logits whose softmax or sigmoid is that mean; see ``DiffusionSegmentor.predict``."""
        if compiled:
            self.compile_passes()
        hashes = content_hash(image)

        def draw(sample: int) -> list[torch.Tensor]:
            noise = ContentNoise(hashes, self.sampling.seed, sample, image.device)
            heads = self(image, noise((self.latent_channels,)))
            return [self.probabilities(logits) for logits in (heads if isinstance(heads, list | tuple) else [heads])]

        logits = [self.bounded_logits(p) for p in average_samples(draw, self.sampling.samples)]
        return logits if self.decoder.deep_supervision else logits[0]
