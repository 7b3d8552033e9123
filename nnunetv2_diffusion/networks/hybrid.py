"""HiDiff behind nnU-Net's one call: a segmentor, and a Bernoulli-diffusion refiner of its mask (Chen et al. 2024)."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from nnunetv2_diffusion.diffusion import (
    BernoulliDiffusion,
    ContentNoise,
    SamplingConfig,
    bernoulli_reverse_process,
    focal_logits,
    focal_to_probability,
)
from nnunetv2_diffusion.diffusion.noise import content_hash
from nnunetv2_diffusion.networks.discriminative import SegmentorOutput, cumulative_strides
from nnunetv2_diffusion.networks.heads import HeadsMixin, average_samples
from nnunetv2_diffusion.networks.refiner import Refiner

MAX_STAGES = 6  # the paper's refiner goes down to 1/32; deeper maps of a 2D network have few voxels left
SUREST = 1e-3  # probability that is left to the refiner where the prior is 0 or 1
FIRST_CONDITION = 2  # features enter from the third stage on, as in the published refiner (1/4 and coarser)


class RefinementStep(NamedTuple):
    """One step of a refinement: the state that it saw, its training time, and its soft estimate of the mask."""

    y_t: torch.Tensor
    t: int
    y_start: torch.Tensor


def refiner_topology(arch_kwargs: Mapping) -> tuple[list[list[int]], list[list[int]]]:
    """Kernel sizes and strides of the refiner's stages, from the plans' ``arch_kwargs``."""
    axes = max(len(s) if isinstance(s, (list, tuple)) else 1 for s in arch_kwargs["strides"])

    def per_axis(values: list) -> list[list[int]]:
        return [list(v) if isinstance(v, (list, tuple)) else [v] * axes for v in values[:MAX_STAGES]]

    return per_axis(arch_kwargs["kernel_sizes"]), per_axis(arch_kwargs["strides"])


def match_features(
    feature_strides: list[tuple[int, ...]], strides: list[list[int]], first: int = FIRST_CONDITION
) -> dict[int, int]:
    """Which feature of a segmentor enters each stage of the refiner: that of the nearest stride.

    Args:
        feature_strides: cumulative, fine to coarse.
        strides: of the refiner, from stage to stage.
        first: first stage with a feature; the last stage has one in any case.

    Returns:
        stage -> index of the feature. With nnU-Net's own network strides agree exactly.
    """
    stages = cumulative_strides(strides)

    def size(stride: tuple[int, ...]) -> float:
        return math.log(math.prod(stride))

    return {
        stage: min(range(len(feature_strides)), key=lambda i: abs(size(feature_strides[i]) - size(stages[stage])))
        for stage in range(min(first, len(stages) - 1), len(stages))
    }


def _slow_alone(image: torch.Tensor) -> bool:
    """On a CPU, PyTorch convolves one small volume four times as slowly as each of two."""
    return len(image) == 1 and image.device.type == "cpu" and not torch.is_grad_enabled()


def _twice(refiner: Refiner, *given: Any) -> torch.Tensor:
    """Result for a batch of one, computed in a batch of two."""
    *tensors, features = given
    doubled = [torch.cat([x, x]) for x in tensors]
    return refiner(*doubled, {stage: torch.cat([f, f]) for stage, f in features.items()})[:1]


class HybridSegmentor(HeadsMixin):
    """Segmentor f, refiner g and the process between f(image) and the mask.

    ``forward(image)`` is what nnU-Net calls to predict: the segmentor once, then K refinement steps from
    y_T ~ B(f(image)); the soft estimate is returned as bounded logits. K = 0 returns the segmentor's own logits.

    Args:
        segmentor: see ``networks.discriminative.Segmentor``.
        image_channels: C.
        num_heads: K classes, background included, or regions.
        kernel_sizes: of the refiner's stages.
        strides: of the refiner's stages, from each to the next; of the first all 1.
        process: trained diffusion process.
        sampling: how predictions are drawn; None for K = 0. May be replaced at any time.
        width: channels of the refiner's first stage.
        norm: "instance" or "batch", in the refiner.
        binarized: 1-bit weights and activations in the refiner.
        cross_transformer: exchange features at the bottleneck by the X-Former.
        focal_gamma: of the focal loss that the refiner is trained with; 0 if its outputs are probabilities as they are.
        prior_residual: the refiner's output corrects the logit of the prior's mask, see ``estimate_noise``.

    Raises:
        ValueError: if sampling wants more steps than the process has.
    """

    min_probability = 1e-4  # one tile that is too sure must not outvote the others: estimates are nearly binary
    parts = ("segmentor", "refiner")

    def __init__(
        self,
        segmentor: nn.Module,
        image_channels: int,
        num_heads: int,
        kernel_sizes: list[list[int]],
        strides: list[list[int]],
        process: BernoulliDiffusion,
        sampling: SamplingConfig | None,
        width: int = 32,
        norm: str = "instance",
        binarized: bool = True,
        cross_transformer: bool = True,
        focal_gamma: float = 0.0,
        prior_residual: bool = True,
    ):
        super().__init__()
        self.segmentor = segmentor
        self.prior_residual = prior_residual
        self.focal_gamma = focal_gamma
        self.num_heads = num_heads
        self.process = process
        self.sampling = sampling
        if sampling is not None:
            process.respace(sampling.steps, sampling.step_spacing)  # raises now rather than at the first prediction
        self.matches = match_features(segmentor.feature_strides, strides)
        self.strides = cumulative_strides(strides)
        channels = {stage: segmentor.feature_channels[index] for stage, index in self.matches.items()}
        if not cross_transformer:
            channels.pop(len(strides) - 1)
        start = {"noise_probability": 0.5} if prior_residual else {}  # adds nothing to the prior's logits
        self.refiner = Refiner(
            image_channels, num_heads, kernel_sizes, strides, channels, width, norm, binarized, cross_transformer,
            **start,
        )  # fmt: skip

    def compile_parts(self, **kwargs: Any) -> None:
        """torch.compile both networks in place; the loop stays outside and names in the state dict do not change."""
        self.segmentor.compile(**kwargs)
        self.refiner.compile(**kwargs)

    def prior(self, logits: torch.Tensor) -> torch.Tensor:
        """f(image): probabilities of the segmentor's logits, float32 also under autocast."""
        with torch.autocast(logits.device.type, enabled=False):
            return self.probabilities(logits)

    def estimate_noise(
        self, image: torch.Tensor, y_t: torch.Tensor, prior: torch.Tensor, t: torch.Tensor, features: list[torch.Tensor]
    ) -> torch.Tensor:
        """Logits of the Bernoulli noise between y_t and the mask, (B, K, *spatial); one pass of the refiner.

        Args:
            image: (B, C, *spatial).
            y_t: state, 0 or 1, (B, K, *spatial).
            prior: f(image), (B, K, *spatial).
            t: training time index (B,), 0-based.
            features: of the segmentor, fine to coarse.
        """
        given = (image, y_t, prior, t.to(image.device), self._conditions(image, features))
        logits = _twice(self.refiner, *given) if _slow_alone(image) else self.refiner(*given)
        if self.prior_residual:
            # The refiner corrects the logit of the mask, which says the same whatever was drawn as y_t. A correction
            # of the noise's logit would have to change its sign with every voxel of y_t's speckle.
            logits = (1 - 2 * y_t) * logits.float() + self.prior_logits(y_t, prior, t)
        return logits

    def noise_probability(
        self, image: torch.Tensor, y_t: torch.Tensor, prior: torch.Tensor, t: torch.Tensor, features: list[torch.Tensor]
    ) -> torch.Tensor:
        """P(y_t is wrong), calibrated, (B, K, *spatial) in float32; arguments as for ``estimate_noise``."""
        eps = self.estimate_noise(image, y_t, prior, t, features).float().sigmoid()
        return focal_to_probability(eps, self.focal_gamma)

    @torch.no_grad()
    def prior_logits(self, y_t: torch.Tensor, prior: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Logits of the noise in y_t as far as prior and t tell.

        If the mask is drawn from the prior, Bayes gives P(y_t is wrong) = (1 - alphas_cumprod) |prior - y_t|. Before
        training, refinement then draws masks from the prior, and one step (K = 1) returns the prior itself. Without
        it, an undertrained refiner lets y_T's speckle pass, and takes it for truth in the next step.
        """
        with torch.autocast(prior.device.type, enabled=False):
            sure = prior.float().clamp(SUREST, 1 - SUREST)  # the refiner can still overrule a prior of 0 or 1
            return focal_logits(self.process.noise_probability(y_t, sure, t), self.focal_gamma)

    def _conditions(self, image: torch.Tensor, features: list[torch.Tensor]) -> dict[int, torch.Tensor]:
        """Features on the grids of the stages that they enter."""
        conditions = {}
        for stage, index in self.matches.items():
            grid = tuple(-(-n // s) for n, s in zip(image.shape[2:], self.strides[stage], strict=True))
            feature = features[index]
            if feature.shape[2:] != grid:
                mode = "bilinear" if len(grid) == 2 else "trilinear"
                feature = F.interpolate(feature, grid, mode=mode, align_corners=False)
            conditions[stage] = feature
        return conditions

    def forward(self, image: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Predict; see ``predict``."""
        return self.predict(image)

    @torch.compiler.disable(recursive=False)
    def predict(self, image: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """The refined mask, or the prior if sampling is None.

        Args:
            image: (B, C, *spatial), finite.

        Returns:
            logits (B, K, *spatial); under deep supervision a list, whose coarser maps are those of the segmentor or,
            refined, the fine one on their grid.

        Raises:
            ValueError: for an image with NaN or infinite values.
        """
        output = self.segmentor(image)
        supervised = self._deep_supervision
        if self.sampling is None:
            return output.heads if supervised else output.logits
        config, hashes = self.sampling, content_hash(image)

        def draw(sample: int) -> list[torch.Tensor]:
            noise = ContentNoise(hashes, config.seed, sample, image.device)
            for step in self.chain(image, output, noise, config):
                last = step
            return [last.y_start]

        (mean,) = average_samples(draw, config.samples)
        logits = self.bounded_logits(mean)
        if not supervised:
            return logits
        return [logits, *[F.interpolate(logits, head.shape[2:]) for head in output.heads[1:]]]

    def chain(
        self, image: torch.Tensor, output: SegmentorOutput, noise: ContentNoise, config: SamplingConfig
    ) -> Iterator[RefinementStep]:
        """Run one refinement from y_T ~ B(f(image)) and yield every step (algorithm 2).

        Args:
            image: (B, C, *spatial).
            output: of the segmentor.
            noise: one stream for each image of the batch.
            config: steps and sampler are used.

        Yields:
            config.steps steps, noisiest first.
        """
        process = self.process.respace(config.steps, config.step_spacing)
        prior = self.prior(output.logits)
        shape = (self.num_heads, *image.shape[2:])
        y_t = (noise.uniform(shape) < prior).float()
        seen: list[tuple[torch.Tensor, int]] = []

        def predict_eps(y_t: torch.Tensor, t: torch.Tensor, is_last: bool) -> torch.Tensor:
            seen.append((y_t, int(t[0])))
            return self.noise_probability(image, y_t, prior, t, output.features)

        for y_start in bernoulli_reverse_process(
            process, predict_eps, y_t, prior, lambda: noise.uniform(shape), config.sampler
        ):
            yield RefinementStep(*seen.pop(), y_start)

    @property
    def _deep_supervision(self) -> bool:
        decoder = getattr(self.segmentor, "decoder", None)
        return bool(getattr(decoder, "deep_supervision", False))

    def set_deep_supervision(self, enabled: bool) -> None:
        """Switch coarse heads of a segmentor that has them as nnU-Net's do."""
        if hasattr(getattr(self.segmentor, "decoder", None), "deep_supervision"):
            self.segmentor.decoder.deep_supervision = enabled
