"""The module behind nnU-Net's one call ``network(image) -> logits``."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from nnunetv2_diffusion.diffusion import (
    ContentNoise,
    GaussianDiffusion,
    MaskEncoding,
    SamplingConfig,
    reverse_process,
)
from nnunetv2_diffusion.diffusion.noise import content_hash
from nnunetv2_diffusion.networks.denoiser import DenoisingUNet
from nnunetv2_diffusion.networks.heads import HeadsMixin, average_samples


def to_mask(x: torch.Tensor) -> torch.Tensor:
    """Diffusion state -> mask as the network sees it: clipped to [-1, 1], mapped to [0, 1]."""
    return (x.clamp(-1, 1) + 1) / 2


def to_x_start(probabilities: torch.Tensor) -> torch.Tensor:
    """Probabilities in [0, 1] -> diffusion space [-1, 1]."""
    return 2 * probabilities - 1


class ReverseStep(NamedTuple):
    """One step of a reverse chain: the state it saw (unclipped), its training time, and its logits, finest first."""

    x_t: torch.Tensor
    t: int
    heads: list[torch.Tensor]


class DiffusionUNet(HeadsMixin, DenoisingUNet):
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

    def __init__(
        self,
        unet: nn.Module,
        process: GaussianDiffusion | None,
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
            process.respace(sampling.steps, sampling.step_spacing)  # raises now rather than at the first prediction

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
        t: torch.Tensor,
        estimate: torch.Tensor | None,
        full_resolution_only: bool,
    ) -> torch.Tensor | list[torch.Tensor]:
        t = t.to(image.device, non_blocking=True) if self.time is not None else None
        return self._run(image, to_mask(x_t), t, estimate, full_resolution_only)

    def compile_passes(self) -> None:
        """As the host asks for by compiling the whole network to predict: a pass alone, once."""
        if self._run == self.denoise:
            self.compile_denoiser()

    @torch.compiler.disable  # with all that it calls: a loop would be compiled anew for every step, up to a limit
    def predict(self, image: torch.Tensor, compiled: bool = False) -> torch.Tensor | list[torch.Tensor]:
        """Mean over samples of the reverse process's result, as logits whose softmax or sigmoid is that mean.

        Args:
            image: (B, C, *spatial), finite.
            compiled: the caller is compiled, so the passes are to be.

        Returns:
            fresh float32 logits (B, K, *spatial), |logit| < 14; a list under deep supervision.
        """
        if compiled:
            self.compile_passes()
        config = self.sampling
        hashes = content_hash(image)

        def draw(sample: int) -> list[torch.Tensor]:
            noise = ContentNoise(hashes, config.seed, sample, image.device)
            for step in self.chain(image, noise, config):
                last = step
            return [self.probabilities(logits) for logits in last.heads]

        logits = [self.bounded_logits(p) for p in average_samples(draw, config.samples)]
        return logits if self.decoder.deep_supervision else logits[0]

    def chain(self, image: torch.Tensor, noise: ContentNoise, config: SamplingConfig) -> Iterator[ReverseStep]:
        """Run one reverse chain from pure noise and yield every step.

        Args:
            image: (B, C, *spatial).
            noise: one stream for each image of the batch.
            config: steps, sampler and eta are used.

        Yields:
            config.steps steps, noisiest first; only the last one has deep-supervision heads.
        """
        process = self.process.respace(config.steps, config.step_spacing)
        shape = (self.encoding.channels, *image.shape[2:])
        estimate = None
        current: ReverseStep

        def predict_x_start(x_t: torch.Tensor, t: torch.Tensor, is_last: bool) -> torch.Tensor:
            nonlocal estimate, current
            heads = self._pass(image, x_t, t, estimate, not is_last)
            current = ReverseStep(x_t, int(t[0]), list(heads) if isinstance(heads, list | tuple) else [heads])
            if is_last:
                return x_t  # the chain ends here: nobody uses its state any more
            code = self.encoding.encode(self.probabilities(current.heads[0]))
            if self.self_conditioning:
                estimate = code
            return to_x_start(code)

        for _ in reverse_process(
            process, predict_x_start, noise(shape), lambda: noise(shape), config.sampler, config.eta
        ):
            yield current
