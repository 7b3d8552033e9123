"""RecycleScore's network: one pass turns an image and a code, a few random numbers, into one plausible mask."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nnunetv2_diffusion.networks.diffusion_unet import DiffusionUNet
from nnunetv2_diffusion.sampling import Chain, CodeChain, Estimator, SamplingConfig


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

    sampling: SamplingConfig

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

    def forward(  # type: ignore[override]  # a code in place of state and time; who calls it knows which network it is
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

    @property
    def has_chain(self) -> bool:
        """See ``ChainNetwork``: single masks are its steps."""
        return True

    def make_chain(self, config: SamplingConfig | None) -> Chain:
        """See ``ChainNetwork``."""
        assert config is not None, "this network has no mask without a code"
        return CodeChain(self, config)

    @torch.compiler.disable  # as ``ChainNetwork.predict``
    def predict(self, image: torch.Tensor, compiled: bool = False) -> torch.Tensor | list[torch.Tensor]:
        """As ``ChainNetwork.predict``, a sample being one mask: its steps are for ``nnunetv2_diffusion predict``."""
        if compiled:
            self.compile_passes()
        config = replace(self.sampling, steps=1)
        return self.answer(Estimator(self.make_chain(config), image), config)
