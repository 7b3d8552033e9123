"""RecycleScore's network: one pass turns an image and a code, a few random numbers, into one plausible mask."""

from typing import Any

import torch
from torch import nn

from nnunetv2_diffusion.diffusion import ContentNoise, SamplingConfig
from nnunetv2_diffusion.diffusion.noise import content_hash
from nnunetv2_diffusion.networks.diffusion_unet import DiffusionUNet
from nnunetv2_diffusion.networks.heads import average_samples


class RecycleScoreUNet(DiffusionUNet):
    """The plans' U-Net with a code: standard normal numbers that scale and shift every norm, the same at all voxels.

    ``forward(image, code)`` is one pass and makes one mask. ``forward(image)`` is what nnU-Net calls to predict: the
    mean of ``sampling.samples`` masks, whose codes follow from seed and image. So each of the host's mirrored views has
    a code of its own.

    Args:
        unet: see ``DenoisingUNet``.
        sampling: samples and seed. Its steps count the masks that ``nnunetv2_diffusion predict`` averages.
        num_heads: K, classes with background, or regions.
        latent_channels: length of the code. The name is that of the setting, and its layers are ``latent`` in
            checkpoints.
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
        self, image: torch.Tensor, code: torch.Tensor | None = None, full_resolution_only: bool = False
    ) -> torch.Tensor | list[torch.Tensor]:
        """One mask if a code is given, else the mean of several, see ``predict``.

        Args:
            image: (B, C, *spatial).
            code: (B, latent_channels), standard normal.
            full_resolution_only: leave out deep-supervision heads.

        Returns:
            logits (B, K, *spatial), a list of them under deep supervision.

        Raises:
            ValueError: when predicting from an image with NaN or infinite values.
        """
        if code is None:
            return self.predict(image, torch.compiler.is_compiling())
        return self._run(image, full_resolution_only=full_resolution_only, latent=code)

    @torch.compiler.disable  # as ``DiffusionUNet.predict``
    def predict(self, image: torch.Tensor, compiled: bool = False) -> torch.Tensor | list[torch.Tensor]:
        """Mean over samples, as logits whose softmax or sigmoid is that mean; see ``DiffusionUNet.predict``."""
        if compiled:
            self.compile_passes()
        hashes = content_hash(image)

        def draw(sample: int) -> list[torch.Tensor]:
            noise = ContentNoise(hashes, self.sampling.seed, sample, image.device)
            heads = self(image, noise((self.latent_channels,)))
            return [self.probabilities(logits) for logits in (heads if isinstance(heads, list | tuple) else [heads])]

        logits = [self.bounded_logits(p) for p in average_samples(draw, self.sampling.samples)]
        return logits if self.decoder.deep_supervision else logits[0]
