"""Binary layers whose thresholds and activations move with the diffusion time (Chen et al. 2024, HiDiff, eq. 14 to 16).

The channel axis is always axis 1, so that the same block serves 2D and 3D maps (B, C, *spatial) and tokens (B, C, N).
Every block has its real-valued twin: the same graph without the signs.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
# callables of anything: torch has a type of its own for the numbers of each dimension
CONVS: dict[int, Callable[..., Conv]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[str, dict[int, Callable[..., nn.Module]]] = {
    "instance": {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d},
    "batch": {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
}


class _Sign(torch.autograd.Function):
    """Sign with the derivative of a piecewise quadratic; saves its input alone."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype).mul_(2).sub_(1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return grad * (2 - 2 * x.abs()).clamp_(min=0)


def binarize(x: torch.Tensor) -> torch.Tensor:
    """Eq. 15 at threshold 0: +1 where x > 0, else -1.

    Its derivative is taken as that of a piecewise quadratic, ``2 - 2|x|`` in [-1, 1] and 0 outside (Liu et al. 2018,
    Bi-Real Net).
    """
    return _Sign.apply(x)


def _bounded_mean(rows: torch.Tensor) -> torch.Tensor:
    """Mean over axis 1, (n, m) -> (n, 1), never outside the row's range: exact for a row of equal numbers."""
    low, high = torch.aminmax(rows.detach(), dim=1, keepdim=True)
    return rows.mean(1, keepdim=True).clamp(low, high)


def _centre(weight: torch.Tensor, centred: bool) -> torch.Tensor:
    """The numbers whose signs are taken: the weight, or what it has above the mean of its output channel."""
    if not centred:
        return weight
    rows = weight.flatten(1)
    return (rows - _bounded_mean(rows)).view(weight.shape)


def sign_and_scale(weight: torch.Tensor, centred: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """What is left of a weight when it is binarised, without gradients.

    The scale of ``scale * sign`` is the same scale, bit for bit, and so are its signs: 1-bit storage loses nothing.

    Args:
        weight: (out, in, *kernel).
        centred: subtract each output's mean weight before taking signs, but not before taking the scale.

    Returns:
        Positive (bool, shape of weight) and the mean magnitude of each output channel, (out,).
    """
    weight = weight.detach()
    return _centre(weight, centred) > 0, _bounded_mean(weight.flatten(1).abs())[:, 0]


def binarize_weight(weight: torch.Tensor, centred: bool = False) -> torch.Tensor:
    """``scale * sign`` for each output channel (Rastegari et al. 2016), see sign_and_scale.

    For the gradient the scale is a constant 1 and the sign is clamp(weight, -1, 1), of the centred weight if centred.
    """
    positive, scale = sign_and_scale(weight, centred)
    scale = scale.view(-1, *[1] * (weight.ndim - 1))
    binary = torch.where(positive, scale, -scale)
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return binary
    proxy = _centre(weight, centred).clamp(-1, 1)
    return binary + (proxy - proxy.detach())  # adds an exact 0


class BinaryConv(nn.Module):
    """Convolution with binarised weights, zero padding and no bias; a norm is meant to follow.

    Args:
        channels_in: of the input, which is expected to hold -1 and +1.
        channels_out: of the output.
        kernel: odd size along each of 1, 2 or 3 axes.
        stride: along each axis.
        centred: zero-centre the weights before taking their signs (for linear layers, see sign_and_scale).
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: Sequence[int], stride: Sequence[int], centred: bool = False
    ):
        super().__init__()
        conv = CONVS[len(kernel)](channels_in, channels_out, tuple(kernel), bias=False)
        self.weight = conv.weight  # as torch initialises it: symmetric, so that half of the signs are negative
        self.stride = tuple(stride)
        self.padding = tuple(size // 2 for size in kernel)
        self.centred = centred

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, in, *spatial) -> (B, out, *spatial / stride)."""
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(self.stride) - 1]
        return conv(x, binarize_weight(self.weight, self.centred), stride=self.stride, padding=self.padding)

    def extra_repr(self) -> str:
        """Shown by print(network)."""
        return f"{tuple(self.weight.shape)}, stride={self.stride}, centred={self.centred}"


@dataclass(frozen=True)
class BlockStyle:
    """What all blocks of a network share.

    Args:
        embedding: width of the activated time embedding that the blocks are given.
        binarized: binary convolutions behind signs; otherwise ordinary convolutions without signs.
        norm: "instance" or "batch".
    """

    embedding: int
    binarized: bool = True
    norm: str = "instance"

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm is {self.norm!r}; expected one of {sorted(NORMS)}")

    @property
    def keeps_constants(self) -> bool:
        """False if the norms cancel whatever is constant over the space of one sample and channel."""
        return self.norm == "batch"

    def make_norm(self, dims: int, channels: int) -> nn.Module:
        """Norm with affine parameters over 1 (tokens), 2 or 3 axes."""
        return NORMS[self.norm][dims](channels, affine=True)

    def make_conv(self, channels_in: int, channels_out: int, kernel: Sequence[int], stride: Sequence[int]) -> nn.Module:
        """Convolution in front of a norm, hence without bias; a single axis means a linear layer over tokens."""
        if self.binarized:
            return BinaryConv(channels_in, channels_out, kernel, stride, centred=len(kernel) == 1)
        padding = tuple(size // 2 for size in kernel)
        conv = CONVS[len(kernel)]
        return conv(channels_in, channels_out, tuple(kernel), tuple(stride), padding, bias=False)


def full_precision(like: torch.Tensor) -> AbstractContextManager:
    """Autocast off on the device of a tensor; the meta device has no autocast."""
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def shift(x: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """Add an offset per sample and channel (B, C), or none, to x (B, C, *spatial); keeps the type of x."""
    return x if offset is None else x + offset.to(x.dtype).view(*offset.shape, *[1] * (x.ndim - 2))


class TimeOffsets(nn.Linear):
    """Numbers per sample and channel that depend on time; all zero at the start, float32 under autocast.

    Args:
        embedding: width of the activated time embedding.
        channels: name of each offset -> its channels, 0 if it is left out.
    """

    def __init__(self, embedding: int, channels: dict[str, int]):
        super().__init__(embedding, sum(channels.values()))
        self.channels = channels
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(  # type: ignore[override]  # a linear layer, whose keys in checkpoints it has, and whose output is split
        self, embedding: torch.Tensor
    ) -> dict[str, torch.Tensor | None]:
        """embedding (B, width) -> name of each offset: (B, channels), None if left out."""
        with full_precision(embedding):
            parts = super().forward(embedding).split(list(self.channels.values()), dim=1)
        return {name: part if part.shape[1] else None for name, part in zip(self.channels, parts, strict=True)}


def activate(x: torch.Tensor, slope: torch.Tensor, offsets: dict[str, torch.Tensor | None]) -> torch.Tensor:
    """Time-dependent activation, eq. 16: PReLU(x - gamma) + zeta with one slope for each channel."""
    return shift(F.prelu(shift(x, offsets["minus_gamma"]), slope.to(x.dtype)), offsets["zeta"])


class BasicBlock(nn.Module):
    """Binarisation, convolution, norm, plus a shortcut without parameters, activation; each told the time.

    One class is the paper's basic block, its down block (stride > 1, the shortcut is average-pooled), and the block of
    linear layers over tokens (no kernel). Where the channels grow, the shortcut is repeated; where they shrink, it is
    the mean of adjacent channels.

    Args:
        channels_in: of the input.
        channels_out: a multiple or a divisor of channels_in.
        style: shared by all blocks.
        kernel: odd size along each axis of space; None for tokens (B, C, N).
        stride: along each axis of space, 1 if None.
        zeta: whether the activation has an offset behind it. Leave it out where an instance norm follows at once.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        style: BlockStyle,
        kernel: Sequence[int] | None = None,
        stride: Sequence[int] | None = None,
        zeta: bool = True,
    ):
        super().__init__()
        kernel = (1,) if kernel is None else tuple(kernel)
        self.stride = (1,) * len(kernel) if stride is None else tuple(stride)
        self.channels_out = channels_out
        self.binarized = style.binarized
        self.conv = style.make_conv(channels_in, channels_out, kernel, self.stride)
        self.norm = style.make_norm(len(kernel), channels_out)
        self.slope = nn.Parameter(torch.full((channels_out,), 0.25))
        # without a sign, the norm behind the convolution cancels this one
        threshold = channels_in if style.binarized or style.keeps_constants else 0
        offsets = {"minus_alpha": threshold, "minus_gamma": channels_out, "zeta": channels_out if zeta else 0}
        self.offsets = TimeOffsets(style.embedding, offsets)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """x (B, in, *spatial), embedding (B, width) -> (B, out, *spatial / stride); strides must divide space."""
        offsets = self.offsets(embedding)
        signs = shift(x, offsets["minus_alpha"])
        if self.binarized:
            signs = binarize(signs)
        return activate(self.norm(self.conv(signs)) + self._shortcut(x), self.slope, offsets)

    def _shortcut(self, x: torch.Tensor) -> torch.Tensor:
        if any(step > 1 for step in self.stride):
            x = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(self.stride) - 1](x, self.stride)
        channels = x.shape[1]
        if channels > self.channels_out:
            return x.unflatten(1, (self.channels_out, channels // self.channels_out)).mean(2)
        if channels < self.channels_out:
            return x.repeat(1, self.channels_out // channels, *[1] * (x.ndim - 2))
        return x
