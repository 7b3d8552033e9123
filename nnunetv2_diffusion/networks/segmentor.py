"""The module behind nnU-Net's one call ``network(image) -> logits``."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from nnunetv2_diffusion.diffusion import (
    ContentNoise,
    GaussianDiffusion,
    SamplingConfig,
    reverse_process,
)
from nnunetv2_diffusion.diffusion.noise import content_hash
from nnunetv2_diffusion.networks.denoiser import DenoisingUNet

MIN_PROBABILITY = 1e-6  # |log p| < 14: nnU-Net adds up logits times a weight of 10 in half precision


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


class DiffusionSegmentor(DenoisingUNet):
    """A denoising U-Net together with its diffusion process.

    ``forward(image, x_t, t)`` is one denoising pass with gradients, for training. ``forward(image)`` is what nnU-Net
    calls to predict: it runs the reverse process and returns bounded log-probabilities as logits. Set ``sigmoid`` if
    heads are independent regions instead of exclusive classes; it is stored with the weights.

    Args:
        unet: see ``DenoisingUNet``.
        process: trained diffusion process; None for a network without mask, whose forward is a plain pass.
        sampling: how predictions are drawn; may be replaced at any time.
        mask_channels: K.
        **kwargs: see ``DenoisingUNet``.

    Raises:
        ValueError: if sampling wants more steps than the process has.
    """

    def __init__(
        self,
        unet: nn.Module,
        process: GaussianDiffusion | None,
        sampling: SamplingConfig | None,
        mask_channels: int,
        **kwargs: Any,
    ):
        super().__init__(unet, mask_channels if process is not None else 0, **kwargs)
        self.process = process
        self.sampling = sampling
        self.num_heads = mask_channels
        # nnU-Net does not say at inference whether heads are exclusive classes or regions, so the weights do
        self.sigmoid = False
        self._run = self.denoise
        if process is not None:
            process.respace(sampling.steps)  # raises now rather than at the first prediction

    def compile_denoiser(self, **kwargs: Any) -> None:
        """torch.compile one pass; the loop stays outside and names in the state dict do not change."""
        self._run = torch.compile(self.denoise, **kwargs)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Softmax over heads, or sigmoid for regions, in float32."""
        logits = logits.float()
        return logits.sigmoid() if self.sigmoid else logits.softmax(1)

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
            x_t: diffusion state (B, K, *spatial), unclipped, in [-1, 1] space.
            t: training time index (B,).
            estimate: probabilities (B, K, *spatial) for self-conditioning.
            full_resolution_only: leave out deep-supervision heads.

        Returns:
            logits, a list of them under deep supervision.

        Raises:
            ValueError: when predicting from an image with NaN or infinite values.
        """
        if self.process is None:
            return self._run(image, full_resolution_only=full_resolution_only)
        if x_t is None:
            return self.predict(image)
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

    @torch.compiler.disable(recursive=False)
    def predict(self, image: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Mean over samples of the reverse process's result, as logits whose softmax or sigmoid is that mean.

        Args:
            image: (B, C, *spatial), finite.

        Returns:
            fresh float32 logits (B, K, *spatial), |logit| < 14; a list under deep supervision.
        """
        config = self.sampling
        hashes = content_hash(image)
        mean: list[torch.Tensor] = []
        for sample in range(config.samples):
            noise = ContentNoise(hashes, config.seed, sample, image.device)
            for step in self.chain(image, noise, config):
                last = step
            heads = [self.probabilities(logits) for logits in last.heads]
            if not mean:
                mean = heads
            else:
                for total, new in zip(mean, heads, strict=True):
                    total += (new - total) / (sample + 1)
        logits = [self._bounded_logits(p) for p in mean]
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
        process = self.process.respace(config.steps)
        shape = (self.num_heads, *image.shape[2:])
        estimate = None
        current: ReverseStep

        def predict_x_start(x_t: torch.Tensor, t: torch.Tensor, is_last: bool) -> torch.Tensor:
            nonlocal estimate, current
            heads = self._pass(image, x_t, t, estimate, not is_last)
            current = ReverseStep(x_t, int(t[0]), list(heads) if isinstance(heads, list | tuple) else [heads])
            if is_last:
                return x_t  # the chain ends here: nobody uses its state any more
            p = self.probabilities(current.heads[0])
            if self.self_conditioning:
                estimate = p
            return to_x_start(p)

        for _ in reverse_process(
            process, predict_x_start, noise(shape), lambda: noise(shape), config.sampler, config.eta
        ):
            yield current

    def _bounded_logits(self, p: torch.Tensor) -> torch.Tensor:
        if self.sigmoid:
            return torch.logit(p, eps=MIN_PROBABILITY)
        return p.clamp(min=MIN_PROBABILITY).log()

    def get_extra_state(self) -> torch.Tensor:
        """Stored with the weights, as a tensor like everything that nnU-Net expects there: heads are regions."""
        return torch.tensor([int(self.sigmoid)])

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Restored with the weights."""
        self.sigmoid = bool(state.item())

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, but a checkpoint of another network is named as such instead of listing every key."""
        problem = self._mismatch(state_dict) if strict else None
        if problem:
            raise RuntimeError(problem)
        return super().load_state_dict(state_dict, strict, assign)

    def _mismatch(self, state_dict: Mapping[str, Any]) -> str | None:
        """What distinguishes the checkpoint's network from this one, in the terms a user set; None if nothing."""
        own = self.state_dict()
        missing = sorted(set(own) - set(state_dict))
        unknown = sorted(set(state_dict) - set(own))
        shapes = [k for k in own if k in state_dict and own[k].shape != state_dict[k].shape]
        if not (missing or unknown or shapes):
            return None
        parts = []
        for part in ("time", "transformer"):
            here, there = (any(k.startswith(f"{part}.") for k in d) for d in (own, state_dict))
            if here != there:
                parts.append(f"it has {'a' if there else 'no'} {part} part, expected {'one' if here else 'none'}")
        heads = "decoder.seg_layers.0.weight"
        if heads in shapes:
            parts.append(f"it segments {len(state_dict[heads])} classes, expected {len(own[heads])}")
        example = (shapes + missing + unknown)[0]
        if example in shapes:
            parts.append(
                f"{example} has shape {tuple(state_dict[example].shape)}, expected {tuple(own[example].shape)}"
            )
        parts.append(f"{len(missing)} keys missing, {len(unknown)} unknown, {len(shapes)} of another shape")
        return (
            "the checkpoint belongs to another network (trainer, plans, classes or settings differ): "
            + "; ".join(parts)
            + f" (first: {example})"
        )
