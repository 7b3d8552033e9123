"""Self-attention at the bottleneck (Fu et al. 2024, figure 2), for any grid in 2D and 3D."""

import math

import torch
from torch import nn
from torch.nn import functional as F


def grid_positional_encoding(shape: tuple[int, ...], channels: int, device: torch.device) -> torch.Tensor:
    """Sinusoidal code of each voxel's coordinates: float32 (prod(shape), channels).

    Every axis gets an equal, even share of the channels; what is left over is zero. Nothing is learned, so that any
    patch size can be used with the same weights.
    """
    per_axis = channels // (2 * len(shape))
    code = torch.zeros(*shape, channels, device=device)
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(per_axis, device=device) / max(per_axis, 1))
    for axis, size in enumerate(shape):
        angles = torch.arange(size, device=device)[:, None] * frequencies
        features = torch.cat([angles.sin(), angles.cos()], dim=1)
        view = [1] * len(shape) + [2 * per_axis]
        view[axis] = size
        start = 2 * per_axis * axis
        code[..., start : start + 2 * per_axis] = features.reshape(view)
    return code.reshape(-1, channels)


class TransformerLayer(nn.Module):
    """Pre-norm attention and MLP (Vaswani et al. 2017, Xiong et al. 2020).

    Args:
        width: of the tokens; a multiple of heads.
        heads: attention heads.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, N, width) -> same shape."""
        b, n, c = tokens.shape
        qkv = self.qkv(self.norm_attention(tokens))
        q, k, v = qkv.reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        tokens = tokens + self.attention_out(attended)
        return tokens + self.mlp(self.norm_mlp(tokens))


class BottleneckTransformer(nn.Module):
    """Residual transformer over the voxels of the coarsest feature map; starts as the identity.

    Args:
        channels: of the feature map.
        layers: number of layers, at least 1.
        heads: attention heads.
        width: share of the channels that attention works in, in (0, 1]; rounded to a multiple of heads.
    """

    def __init__(self, channels: int, layers: int = 1, heads: int = 8, width: float = 1.0):
        super().__init__()
        self.width = max(1, round(channels * width / heads)) * heads
        self.enter = nn.Linear(channels, self.width)
        self.layers = nn.ModuleList([TransformerLayer(self.width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(self.width)
        self.leave = nn.Linear(self.width, channels)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, C, *spatial) -> same shape."""
        tokens = self.enter(x.flatten(2).transpose(1, 2))
        tokens = tokens + grid_positional_encoding(tuple(x.shape[2:]), self.width, x.device)
        for layer in self.layers:
            tokens = layer(tokens)
        change = self.leave(self.norm(tokens)).transpose(1, 2).reshape(x.shape)
        return x + change.to(x.dtype)
