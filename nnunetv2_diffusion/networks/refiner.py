"""The diffusion refiner of HiDiff (Chen et al. 2024, section II-B): a U-Net that finds the wrong voxels of a mask.

It is told the image, the noisy mask, the segmentor's probabilities, the time, and the segmentor's features at matching
strides. One class is the binarised and the real-valued network, in 2D and in 3D.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from nnunetv2_diffusion.networks.binary import CONVS, BasicBlock, BlockStyle, Conv, TimeOffsets, full_precision, shift
from nnunetv2_diffusion.networks.cross_transformer import CrossTransformer
from nnunetv2_diffusion.networks.time_conditioning import sinusoidal_embedding

MULTIPLIERS = (1, 1, 2, 2, 4, 4)  # of the width at each stage; that of the last one further on
GROUPS = 32
EMBEDDING = 4  # width of the time embedding, in widths
NOISE_PROBABILITY = 0.01  # that a voxel is wrong, as an untrained refiner says


def _same_conv(channels_in: int, channels_out: int, kernel: Sequence[int], bias: bool = True) -> Conv:
    """Real-valued convolution that keeps the grid."""
    padding = tuple(size // 2 for size in kernel)
    return CONVS[len(kernel)](channels_in, channels_out, tuple(kernel), padding=padding, bias=bias)


class TimeEmbedding(nn.Module):
    """Sinusoidal features of the time index through two layers; float32 under autocast.

    Args:
        width: of the sinusoidal features, even; the embedding is 4 times as wide.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(
            nn.Linear(width, EMBEDDING * width), nn.SiLU(), nn.Linear(EMBEDDING * width, EMBEDDING * width), nn.SiLU()
        )

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """t: 0-based training index (B,). Returns the activated embedding that all blocks share, (B, 4 * width)."""
        first = self.mlp[0]
        assert isinstance(first, nn.Linear), "the first layer above"
        with full_precision(t):
            return self.mlp(sinusoidal_embedding(t, self.width).to(first.weight.dtype))


class ConditionBlock(nn.Module):
    """Real-valued residual block on a feature of the segmentor, scaled and shifted by time behind its second norm.

    Args:
        channels_in: of the feature.
        channels_out: of the output.
        kernel: odd size along each axis of space.
        embedding: width of the activated time embedding.
        bias: whether anything constant over space is of use in the output; False where a norm follows at once.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: Sequence[int], embedding: int, bias: bool = True):
        super().__init__()
        groups = math.gcd(GROUPS, channels_out)
        self.norm_in = nn.GroupNorm(math.gcd(GROUPS, channels_in), channels_in)
        self.conv_in = _same_conv(channels_in, channels_out, kernel, bias=groups < channels_out)
        self.norm_out = nn.GroupNorm(groups, channels_out)
        self.offsets = TimeOffsets(embedding, {"scale": channels_out, "shift": channels_out})
        self.conv_out = _same_conv(channels_out, channels_out, kernel, bias)
        nn.init.zeros_(self.conv_out.weight)
        if self.conv_out.bias is not None:
            nn.init.zeros_(self.conv_out.bias)
        self.skip: nn.Module = nn.Identity()
        if channels_in != channels_out:
            self.skip = _same_conv(channels_in, channels_out, [1] * len(kernel), bias=False)  # conv_out has the bias

    def forward(self, feature: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """feature (B, in, *spatial), embedding (B, width) -> (B, out, *spatial)."""
        h = self.norm_out(self.conv_in(F.silu(self.norm_in(feature))))
        offsets = self.offsets(embedding)
        scale = offsets["scale"].to(h.dtype).view(*h.shape[:2], *[1] * (h.ndim - 2))
        h = shift(h * (1 + scale), offsets["shift"])
        return self.skip(feature) + self.conv_out(F.silu(h))


class ConcatLayer(nn.Module):
    """Joins a feature of the segmentor and halves the channels again.

    Args:
        feature_channels: of the segmentor's feature.
        channels: of the refiner's feature.
        kernel: odd size along each axis of space.
        style: shared by all blocks.
    """

    def __init__(self, feature_channels: int, channels: int, kernel: Sequence[int], style: BlockStyle):
        super().__init__()
        self.condition = ConditionBlock(feature_channels, channels, kernel, style.embedding)
        self.block = BasicBlock(2 * channels, channels, style, kernel)

    def forward(self, x: torch.Tensor, feature: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """x (B, C, *spatial), feature (B, F, *spatial), embedding (B, width) -> like x."""
        return self.block(torch.cat([x, self.condition(feature, embedding)], dim=1), embedding)


class EncoderStage(nn.Module):
    """A stage of the encoder and the way to the next one.

    Args:
        channels: of this stage and of the next one.
        kernels: of this stage and of the next one.
        stride: to the next stage.
        feature_channels: of the segmentor's feature on this grid, None if there is none.
        style: shared by all blocks.
    """

    def __init__(
        self,
        channels: tuple[int, int],
        kernels: tuple[Sequence[int], Sequence[int]],
        stride: Sequence[int],
        feature_channels: int | None,
        style: BlockStyle,
    ):
        super().__init__()
        self.concat = ConcatLayer(feature_channels, channels[0], kernels[0], style) if feature_channels else None
        self.block = BasicBlock(channels[0], channels[0], style, kernels[0])
        self.down = BasicBlock(channels[0], channels[1], style, kernels[1], stride)

    def forward(
        self, x: torch.Tensor, feature: torch.Tensor | None, embedding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, C, *spatial) -> the skip connection, like x, and (B, next C, *spatial / stride)."""
        if self.concat is not None:
            x = self.concat(x, feature, embedding)
        skip = self.block(x, embedding)
        return skip, self.down(skip, embedding)


class Bottleneck(nn.Module):
    """The coarsest stage: two basic blocks with the cross transformer between them.

    Args:
        channels: of this stage.
        kernel: odd size along each axis of space.
        feature_channels: of the segmentor's feature on this grid, None for no cross transformer.
        style: shared by all blocks.
    """

    def __init__(self, channels: int, kernel: Sequence[int], feature_channels: int | None, style: BlockStyle):
        super().__init__()
        self.enter = BasicBlock(channels, channels, style, kernel)
        self.cross_transformer = None
        if feature_channels:
            self.condition = ConditionBlock(feature_channels, channels, kernel, style.embedding, bias=False)
            self.cross_transformer = CrossTransformer(channels, len(kernel), style)
        self.leave = BasicBlock(channels, channels, style, kernel)

    def forward(self, x: torch.Tensor, feature: torch.Tensor | None, embedding: torch.Tensor) -> torch.Tensor:
        """x (B, C, *grid) -> like x."""
        x = self.enter(x, embedding)
        if self.cross_transformer is not None:
            x = self.cross_transformer(x, self.condition(feature, embedding), embedding)
        return self.leave(x, embedding)


class DecoderStage(nn.Module):
    """A stage of the decoder: nearest-neighbour upsampling, a block, the skip connection, a block.

    Args:
        channels: of the coarser stage and of this one.
        kernel: of this stage.
        style: shared by all blocks.
    """

    def __init__(self, channels: tuple[int, int], kernel: Sequence[int], style: BlockStyle):
        super().__init__()
        self.up = BasicBlock(*channels, style, kernel)
        self.block = BasicBlock(2 * channels[1], channels[1], style, kernel)

    def forward(self, x: torch.Tensor, skip: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """x (B, coarser C, *grid), skip (B, C, *spatial) -> like skip."""
        x = self.up(F.interpolate(x, size=skip.shape[2:], mode="nearest"), embedding)
        return self.block(torch.cat([x, skip], dim=1), embedding)


def _make_head(width: int, num_heads: int, kernel: Sequence[int], probability: float) -> nn.Sequential:
    """Real-valued last layer; says one probability of noise everywhere at the start (Lin et al. 2017, 4.1)."""
    conv = _same_conv(width, num_heads, kernel)
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None, "_same_conv makes one by default"
    nn.init.constant_(conv.bias, math.log(probability / (1 - probability)))
    # groups of one channel would be instance norm, and cancel the last block's offset
    return nn.Sequential(nn.GroupNorm(math.gcd(GROUPS, width // 4), width), nn.SiLU(), conv)


def _check_plan(
    kernel_sizes: Sequence[Sequence[int]],
    strides: Sequence[Sequence[int]],
    condition_channels: Mapping[int, int],
    width: int,
) -> None:
    if len(kernel_sizes) != len(strides) or len(strides) < 2:
        raise ValueError(
            f"kernel_sizes has {len(kernel_sizes)} and strides {len(strides)} entries; expected one for each stage, "
            "and at least 2 stages"
        )
    dims = {len(entry) for entry in (*kernel_sizes, *strides)}
    if dims not in ({2}, {3}):
        raise ValueError(f"entries of kernel_sizes and strides have lengths {sorted(dims)}; expected all 2 or all 3")
    if any(size % 2 == 0 for kernel in kernel_sizes for size in kernel):
        raise ValueError(f"kernel_sizes is {kernel_sizes}; expected odd sizes")
    if any(step != 1 for step in strides[0]):
        raise ValueError(f"strides[0] is {strides[0]}; expected all 1, as the first stage is at full resolution")
    unknown = sorted(set(condition_channels) - set(range(len(strides))))
    if unknown:
        raise ValueError(f"condition_channels names stages {unknown}; expected stages 0 to {len(strides) - 1}")
    if width < 4 or width % 4:
        raise ValueError(f"width is {width}; expected a multiple of 4")


class Refiner(nn.Module):
    """Predicts where a noisy mask differs from the true one.

    Stages, kernels and strides are those of nnU-Net's plans. Stage i has width * (1, 1, 2, 2, 4, 4, 4, ...) channels.
    Untrained, it says that few voxels are wrong.

    Args:
        image_channels: of the image.
        num_heads: channels of the mask (K): classes with background, or regions.
        kernel_sizes: odd sizes, one entry for each stage, with one number for each axis of space.
        strides: from the stage before, one entry for each stage; the first one is all 1.
        condition_channels: stage -> channels of the segmentor's feature on that stage's grid. It is concatenated, but
            at the last stage, the bottleneck, it goes into the cross transformer.
        width: channels of the first stage, a multiple of 4; the paper's is 128.
        norm: "instance", or the paper's "batch".
        binarized: binary weights and activations in all but the first and the last layer, the time path and the
            blocks on the segmentor's features.
        cross_transformer: whether there is one at the bottleneck, if there is a feature for it.
        noise_probability: what it says everywhere before training, in (0, 1).

    Attributes:
        condition_channels: the features that forward expects, as above.

    Raises:
        ValueError: the arguments contradict each other.
    """

    def __init__(
        self,
        image_channels: int,
        num_heads: int,
        kernel_sizes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        condition_channels: Mapping[int, int],
        width: int = 32,
        norm: str = "instance",
        binarized: bool = True,
        cross_transformer: bool = True,
        noise_probability: float = NOISE_PROBABILITY,
    ):
        super().__init__()
        _check_plan(kernel_sizes, strides, condition_channels, width)
        last = len(strides) - 1
        self.image_channels, self.num_heads = image_channels, num_heads
        self.strides = [tuple(stride) for stride in strides]
        self.condition_channels = {
            stage: size for stage, size in sorted(condition_channels.items()) if stage < last or cross_transformer
        }
        self.style = BlockStyle(EMBEDDING * width, binarized, norm)
        self._build(width, [tuple(kernel) for kernel in kernel_sizes])
        self.head = _make_head(width, num_heads, kernel_sizes[0], noise_probability)

    def _build(self, width: int, kernels: list[tuple[int, ...]]) -> None:
        last, style, conditions = len(kernels) - 1, self.style, self.condition_channels
        channels = [width * MULTIPLIERS[min(i, len(MULTIPLIERS) - 1)] for i in range(len(kernels))]
        pairs = [(channels[i], channels[i + 1]) for i in range(last)]
        self.time = TimeEmbedding(width)
        self.stem = _same_conv(self.image_channels + 2 * self.num_heads, width, kernels[0])
        self.encoder = nn.ModuleList(
            EncoderStage(pair, (kernels[i], kernels[i + 1]), self.strides[i + 1], conditions.get(i), style)
            for i, pair in enumerate(pairs)
        )
        self.bottleneck = Bottleneck(channels[-1], kernels[-1], conditions.get(last), style)
        self.decoder = nn.ModuleList(DecoderStage(pairs[i][::-1], kernels[i], style) for i in reversed(range(last)))

    def forward(
        self,
        image: torch.Tensor,
        y_t: torch.Tensor,
        prior: torch.Tensor,
        t: torch.Tensor,
        features: Mapping[int, torch.Tensor],
    ) -> torch.Tensor:
        """Find the wrong voxels of y_t.

        Args:
            image: (B, image channels, *spatial).
            y_t: noisy mask, 0 or 1, (B, K, *spatial).
            prior: the segmentor's probabilities, (B, K, *spatial).
            t: 0-based training index, (B,).
            features: stage -> feature of the segmentor, at least for the stages of condition_channels.

        Returns:
            Logits of P(y_t is wrong), (B, K, *spatial).

        Raises:
            ValueError: a shape does not fit.
        """
        self._check_inputs(image, y_t, prior, features)
        embedding = self.time(t)
        x = self.stem(torch.cat([image, y_t.to(image.dtype), prior.to(image.dtype)], dim=1))
        skips = []
        for i, stage in enumerate(self.encoder):
            skip, x = stage(x, features.get(i), embedding)
            skips.append(skip)
        x = self.bottleneck(x, features.get(len(self.encoder)), embedding)
        for stage in self.decoder:
            x = stage(x, skips.pop(), embedding)
        return self.head(x)

    def grids(self, spatial: Sequence[int]) -> list[tuple[int, ...]]:
        """Size of each stage for a patch.

        Raises:
            ValueError: the strides do not divide it, or it has another number of axes.
        """
        grids = [tuple(spatial)]
        total = tuple(math.prod(steps) for steps in zip(*self.strides, strict=True))
        if len(spatial) != len(total) or any(size % step for size, step in zip(spatial, total, strict=True)):
            raise ValueError(
                f"the patch is {tuple(spatial)}; expected multiples of {total}, the product of the strides"
            )
        for stride in self.strides[1:]:
            grids.append(tuple(size // step for size, step in zip(grids[-1], stride, strict=True)))
        return grids

    def _check_inputs(
        self, image: torch.Tensor, y_t: torch.Tensor, prior: torch.Tensor, features: Mapping[int, torch.Tensor]
    ) -> None:
        batch, spatial = image.shape[0], image.shape[2:]
        grids = self.grids(spatial)
        expected = {
            "image": (image, self.image_channels),
            "y_t": (y_t, self.num_heads),
            "prior": (prior, self.num_heads),
        }
        shapes = {name: (x.shape, (batch, channels, *spatial)) for name, (x, channels) in expected.items()}
        for stage, channels in self.condition_channels.items():
            if stage not in features:
                raise ValueError(f"features has stages {sorted(features)}; expected also stage {stage}")
            shapes[f"features[{stage}]"] = (features[stage].shape, (batch, channels, *grids[stage]))
        for name, (found, wanted) in shapes.items():
            if tuple(found) != wanted:
                raise ValueError(f"{name} has shape {tuple(found)}; expected {wanted}")
        if self.style.norm == "instance" and math.prod(grids[-1]) == 1:
            raise ValueError(
                f"a patch of {tuple(spatial)} has a bottleneck grid of a single voxel, of which instance norm leaves "
                "nothing; expected a larger patch, fewer stages or norm='batch'"
            )
