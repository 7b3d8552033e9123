"""Cascaded attention decoder (Rahman and Marculescu, WACV 2023), with aggregation by addition, in 2D."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F


def conv_norm_relu(channels_in: int, channels_out: int) -> nn.Sequential:
    """3x3 convolution, batch norm and ReLU; keeps the grid."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)
    )


class ChannelAttention(nn.Module):
    """Weight in (0, 1) for every channel from its mean and maximum over space (Woo et al. 2018, eq. 2).

    Args:
        channels: of the feature map.
        reduction: the hidden layer has channels // reduction units, at least 1.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = max(1, channels // reduction)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.ReLU(), nn.Conv2d(hidden, channels, 1, bias=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W), weighted."""
        mean, maximum = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        return x * (self.mlp(mean) + self.mlp(maximum)).sigmoid()


class SpatialAttention(nn.Module):
    """Weight in (0, 1) for every pixel from its mean and maximum over channels (Woo et al. 2018, eq. 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W) for any C, weighted."""
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return x * self.conv(pooled).sigmoid()


class AttentionGate(nn.Module):
    """Weight in (0, 1) for every pixel of a skip connection (Oktay et al. 2018, eq. 1 and 2), additive.

    Args:
        channels: of the skip connection and of the gating signal.
        hidden: channels in which the two are added.
    """

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.gate = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.BatchNorm2d(hidden))
        self.skip = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.BatchNorm2d(hidden))
        self.weight = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(hidden, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())

    def forward(self, gate: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """Gate and skip (B, C, H, W) -> skip, weighted."""
        return skip * self.weight(self.gate(gate) + self.skip(skip))


class CascadedDecoder(nn.Module):
    """From a pyramid of features to one map for each of its levels, with the same channels and grids.

    Every level has channel attention, spatial attention and two convolutions. Its result is brought to the next finer
    grid, gates the skip connection there, and is added to it.

    Args:
        channels: of the features, fine to coarse.
    """

    def __init__(self, channels: list[int]):
        super().__init__()
        deep_to_fine = list(channels)[::-1]
        pairs = list(pairwise(deep_to_fine))
        # a gate works in as many channels as the next finer level has; there is none below the finest
        hidden = [*deep_to_fine[2:], deep_to_fine[-1] // 2]
        self.enter = nn.Conv2d(deep_to_fine[0], deep_to_fine[0], 1)
        self.up = nn.ModuleList([conv_norm_relu(coarse, fine) for coarse, fine in pairs])
        self.gates = nn.ModuleList([AttentionGate(fine, h) for (_, fine), h in zip(pairs, hidden, strict=True)])
        self.channel_attention = nn.ModuleList([ChannelAttention(c) for c in deep_to_fine])
        self.spatial_attention = SpatialAttention()  # one for all levels
        self.convs = nn.ModuleList([nn.Sequential(conv_norm_relu(c, c), conv_norm_relu(c, c)) for c in deep_to_fine])

    def _refine(self, level: int, x: torch.Tensor) -> torch.Tensor:
        return self.convs[level](self.spatial_attention(self.channel_attention[level](x)))

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Features (B, C_i, H_i, W_i), fine to coarse -> maps of the same shapes, deep to fine."""
        deepest, *skips = features[::-1]
        maps = [self._refine(0, self.enter(deepest))]
        for level, skip in enumerate(skips, start=1):
            up = self.up[level - 1](F.interpolate(maps[-1], size=skip.shape[2:], mode="nearest"))
            maps.append(self._refine(level, up + self.gates[level - 1](up, skip)))
        return maps
