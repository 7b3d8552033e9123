"""The module behind nnU-Net's one call ``network(image) -> logits``."""

from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import nn

from nnunetv2_diffusion.diffusion import MaskEncoding, TimeSteps
from nnunetv2_diffusion.networks.chain_network import ChainNetwork
from nnunetv2_diffusion.networks.denoiser import DenoisingUNet
from nnunetv2_diffusion.sampling import Chain, GaussianChain, SamplingConfig, SinglePass


def to_mask(x: torch.Tensor) -> torch.Tensor:
    """Diffusion state -> mask as the network sees it: clipped to [-1, 1], mapped to [0, 1]."""
    return (x.clamp(-1, 1) + 1) / 2


def to_x_start(probabilities: torch.Tensor) -> torch.Tensor:
    """Probabilities in [0, 1] -> diffusion space [-1, 1]."""
    return 2 * probabilities - 1


class DiffusionUNet(ChainNetwork, DenoisingUNet):
    """A denoising U-Net together with its diffusion process.

    ``forward(image, x_t, t)`` is one denoising pass with gradients, for training. ``forward(image)`` is what nnU-Net
    calls to predict: it runs the reverse process and returns bounded log-probabilities as logits. Set ``sigmoid`` if
    heads are independent regions instead of exclusive classes; it is stored with the weights.

    Args:
        unet: see ``DenoisingUNet``.
        process: trained diffusion process; None for a network without mask, whose forward is a plain pass.
        sampling: how predictions are drawn; may be replaced at any time.
        num_heads: K, classes with background, or regions.
        encoding: of the mask; x_t and estimate have its channels (C_mask), K for one-hot, the default.
        **kwargs: see ``DenoisingUNet``.

    Raises:
        ValueError: if sampling wants more steps than the process has.
    """

    min_probability = 1e-6  # |log p| < 14
    parts = ("time", "latent", "transformer")
    process: TimeSteps | None

    def __init__(
        self,
        unet: nn.Module,
        process: TimeSteps | None,
        sampling: SamplingConfig | None,
        num_heads: int,
        encoding: MaskEncoding | None = None,
        **kwargs: Any,
    ):
        encoding = encoding or MaskEncoding(num_heads)
        super().__init__(unet, encoding.channels if process is not None else 0, **kwargs)
        self.encoding = encoding
        self.process = process
        self.sampling = sampling
        self.num_heads = num_heads
        self._run = self.denoise
        if process is not None:
            assert sampling is not None, "a network with a process predicts by its chain"
            self.respace(sampling)  # raises now rather than at the first prediction

    def compile_denoiser(self, **kwargs: Any) -> None:
        """torch.compile one pass; the loop stays outside and names in the state dict do not change."""
        self._run = torch.compile(self.denoise, **kwargs)

    def forward(
        self,
        image: torch.Tensor,
        x_t: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
        estimate: torch.Tensor | None = None,
        full_resolution_only: bool = False,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Denoise if x_t is given, else predict.

        Args:
            image: (B, C, *spatial).
            x_t: diffusion state (B, C_mask, *spatial), unclipped, in [-1, 1] space.
            t: training time index (B,).
            estimate: encoded probabilities (B, C_mask, *spatial) for self-conditioning.
            full_resolution_only: leave out deep-supervision heads.

        Returns:
            logits, a list of them under deep supervision.

        Raises:
            ValueError: when predicting from an image with NaN or infinite values, or with weights that are not finite.
        """
        if self.process is None:
            heads = self._run(image, full_resolution_only=full_resolution_only)
            if not self.training and not torch.is_grad_enabled():
                self.check_answer(heads[0] if isinstance(heads, list | tuple) else heads)
            return heads
        if x_t is None:
            return self.predict(image, torch.compiler.is_compiling())
        return self._pass(image, x_t, t, estimate, full_resolution_only)

    def _pass(
        self,
        image: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor | None,
        estimate: torch.Tensor | None,
        full_resolution_only: bool,
    ) -> torch.Tensor | list[torch.Tensor]:
        t = t.to(image.device, non_blocking=True) if self.time is not None and t is not None else None
        return self._run(image, self.shown(x_t), t, estimate, full_resolution_only)

    def shown(self, x_t: torch.Tensor) -> torch.Tensor:
        """What of a state the network sees, in [0, 1]."""
        return to_mask(x_t)

    def compile_passes(self) -> None:
        """As the host asks for by compiling the whole network to predict: a pass alone, once."""
        if self._run == self.denoise:
            self.compile_denoiser()

    @property
    def has_chain(self) -> bool:
        """See ``ChainNetwork``; NoDiff has none."""
        return self.process is not None

    def make_chain(self, config: SamplingConfig | None) -> Chain:
        """See ``ChainNetwork``."""
        if not self.has_chain:
            return SinglePass(self, self.sigmoid)
        assert config is not None, "this network has no mask without its chain"
        return GaussianChain(self, config)

    def respace(self, config: SamplingConfig) -> None:
        """See ``ChainNetwork``."""
        if self.process is not None:
            self.process.respace(config.steps, config.step_spacing)

    def coarse_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """See ``ChainNetwork``."""
        if not self.decoder.deep_supervision:
            return []
        per_axis = zip(
            *[s if isinstance(s, list | tuple) else [s] * len(shape) for s in self.encoder.strides], strict=True
        )
        strides = zip(*[accumulate(axis, mul) for axis in per_axis], strict=True)
        return [tuple(-(-n // s) for n, s in zip(shape, stride, strict=True)) for stride in strides][1:-1]
