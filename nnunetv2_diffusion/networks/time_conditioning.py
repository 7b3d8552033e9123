"""Time conditioning that instance normalisation does not cancel.

An offset per channel that is added before an instance norm, or fed as a constant channel, is subtracted again by the
next norm. What survives is a scale and a shift between the normalisation and the nonlinearity.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def sinusoidal_embedding(t: torch.Tensor, dim: int, max_period: float = 10000.0) -> torch.Tensor:
    """Sinusoidal features of a time index (Vaswani et al. 2017): (B,) -> float32 (B, dim), dim even."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ModulatedInstanceNorm(nn.Module):
    """Instance norm whose affine parameters are scaled and shifted per sample.

    ``(1 + scale) * norm(x) + shift`` is folded into the affine parameters, so it costs no pass over x and no memory
    for the backward pass. Parameters are those of the replaced norm, under the same names.

    Args:
        norm: affine InstanceNorm2d or InstanceNorm3d whose parameters are taken over.
    """

    def __init__(self, norm: nn.InstanceNorm2d | nn.InstanceNorm3d):
        super().__init__()
        self.weight = norm.weight
        self.bias = norm.bias
        self.eps = norm.eps
        self.num_features = norm.num_features
        self.modulation: torch.Tensor | None = None  # (B, 2 * num_features), set for the time of one forward pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x (B, C, *spatial) over space."""
        if self.modulation is None:
            return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
        scale, shift = self.modulation.chunk(2, dim=1)
        weight = self.weight * (1 + scale)
        bias = self.bias * (1 + scale) + shift
        # instance norm treats (1, B*C) exactly as (B, C), and then takes parameters per sample
        merged = x.reshape(1, -1, *x.shape[2:])
        merged = F.instance_norm(merged, weight=weight.flatten(), bias=bias.flatten(), eps=self.eps)
        return merged.reshape(x.shape)

    def extra_repr(self) -> str:
        """Shown by print(network)."""
        return f"{self.num_features}, eps={self.eps}"


class NormConditioning(nn.Module):
    """Maps numbers of a sample to the scale and shift of every modulated norm; zero, hence the identity, at the start.

    Args:
        norms: the norms to modulate, in any fixed order.
        inputs: how many numbers.
        dim: width of the layers.
    """

    def __init__(self, norms: list[ModulatedInstanceNorm], inputs: int, dim: int):
        super().__init__()
        self.sizes = [2 * norm.num_features for norm in norms]
        self.mlp = nn.Sequential(nn.Linear(inputs, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        self.project = nn.Linear(dim, sum(self.sizes))
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, numbers: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """numbers: (B, inputs). Returns one (B, 2 * features) for each norm, float32."""
        # fp32: time indices up to 1000 lose their last digits in half precision
        with torch.autocast(numbers.device.type, enabled=False):
            return self.project(self.mlp(numbers.float())).split(self.sizes, dim=1)


class TimeConditioning(NormConditioning):
    """``NormConditioning`` on a time index.

    Args:
        norms: the norms to modulate, in any fixed order.
        dim: width of the embedding, even.
    """

    def __init__(self, norms: list[ModulatedInstanceNorm], dim: int):
        super().__init__(norms, dim, dim)
        self.dim = dim

    def forward(self, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """t: training index (B,), float or integer. Returns one (B, 2 * features) for each norm, float32."""
        return super().forward(sinusoidal_embedding(t, self.dim))
