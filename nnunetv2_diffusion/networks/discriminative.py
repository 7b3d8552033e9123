"""Segmentors as HiDiff needs them: logits and a pyramid of features. A further one is one more class like these."""

from typing import NamedTuple

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunetv2_diffusion.networks.denoiser import SUPPORTED, UnsupportedArchitectureError


class SegmentorOutput(NamedTuple):
    """What one forward pass of a segmentor gives.

    Attributes:
        logits: of the prior mask at full resolution, (B, K, *spatial).
        heads: what the discriminative loss is given, in the order that it expects.
        features: maps from fine to coarse, each (B, C_i, *spatial_i).
    """

    logits: torch.Tensor
    heads: list[torch.Tensor]
    features: list[torch.Tensor]


class Segmentor(nn.Module):
    """A discriminative segmentor f(image): what HiDiff needs of one.

    Attributes:
        feature_channels: C_i of every feature map, fine to coarse.
        feature_strides: voxels of the image to one of the map along each axis, fine to coarse.
    """

    feature_channels: list[int]
    feature_strides: list[tuple[int, ...]]

    def forward(self, image: torch.Tensor) -> SegmentorOutput:
        """image (B, C, *spatial) to logits, heads and features."""
        raise NotImplementedError


def cumulative_strides(strides: list) -> list[tuple[int, ...]]:
    """Strides from stage to stage, as in nnU-Net's plans, to strides from the image to each stage."""
    axes = max(len(s) if isinstance(s, (list, tuple)) else 1 for s in strides)
    total = (1,) * axes
    result = []
    for stride in strides:
        step = tuple(stride) if isinstance(stride, (list, tuple)) else (stride,) * axes
        total = tuple(a * b for a, b in zip(total, step, strict=True))
        result.append(total)
    return result


class UNetSegmentor(Segmentor):
    """nnU-Net's own network, under its parameter names; the features are its skip connections.

    Args:
        unet: PlainConvUNet or ResidualEncoderUNet; it is taken over.

    Raises:
        UnsupportedArchitectureError: for another architecture.
    """

    def __init__(self, unet: PlainConvUNet | ResidualEncoderUNet):
        super().__init__()
        if not isinstance(unet, SUPPORTED):
            raise UnsupportedArchitectureError(
                f"the plans' network is {type(unet).__module__}.{type(unet).__name__}; HiDiff takes features from "
                f"{' and '.join(c.__name__ for c in SUPPORTED)}. Plan with a stock nnU-Net planner."
            )
        self.encoder = unet.encoder
        self.decoder = unet.decoder
        self.feature_channels = list(self.encoder.output_channels)
        self.feature_strides = cumulative_strides(self.encoder.strides)

    def forward(self, image: torch.Tensor) -> SegmentorOutput:
        """image (B, C, *spatial); heads are the deep-supervision outputs, finest first, or the logits alone."""
        features = self.encoder(image)
        logits = self.decoder(features)
        heads = list(logits) if isinstance(logits, (list, tuple)) else [logits]
        return SegmentorOutput(heads[0], heads, list(features))
