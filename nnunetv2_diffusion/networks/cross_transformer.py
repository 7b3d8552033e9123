"""Cross transformer (X-Former, Chen et al. 2024, figure 3) between the segmentor's and the refiner's deepest features.

Tokens are channels-first, (B, C, N), with N = prod(grid) in the order of the grid: any grid in 2D and 3D goes in and
comes back in place.
"""

import math
from itertools import product

import torch
from torch import nn
from torch.nn import functional as F

from nnunetv2_diffusion.networks.binary import BasicBlock, BlockStyle, TimeOffsets, activate, binarize, shift

ATTENTION_THRESHOLD = 0.35  # share of a row's highest score from which on a key is attended to
WINDOWS = (3, 5)  # of the average pooling along each axis in the feed-forward part
EXPANSION = 4  # of the hidden layer in the feed-forward part


def binarize_attention(scores: torch.Tensor) -> torch.Tensor:
    """1 where a score is above 0.35 times the highest one of its row, else 0, (..., queries, keys); not normalised.

    A row whose highest score is negative or zero is all zero. The derivative is taken as that of the softmax.
    """
    highest = scores.detach().amax(-1, keepdim=True)
    attended = (scores.detach() > ATTENTION_THRESHOLD * highest).to(scores.dtype)
    if not (torch.is_grad_enabled() and scores.requires_grad):
        return attended
    proxy = scores.softmax(-1).to(scores.dtype)
    return attended + (proxy - proxy.detach())  # adds an exact 0


class TimeScale(nn.Module):
    """Scale and shift of each channel by functions of time, ``x * s(t) + o(t)``; zero at the start.

    Args:
        channels: of the input.
        style: shared by all blocks.
        offset: whether there is o(t). Leave it out where an instance norm follows at once.
    """

    def __init__(self, channels: int, style: BlockStyle, offset: bool = True):
        super().__init__()
        self.offsets = TimeOffsets(style.embedding, {"scale": channels, "offset": channels if offset else 0})

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """x (B, C, *spatial), embedding (B, width) -> like x."""
        offsets = self.offsets(embedding)
        scale = offsets["scale"].to(x.dtype).view(*x.shape[:2], *[1] * (x.ndim - 2))
        return shift(x * scale, offsets["offset"])


class CrossAttention(nn.Module):
    """Attention whose queries come from one stream and whose keys and values from another one of the same length.

    Binarised, queries, keys and values are -1 or +1 and the attention matrix is 0 or 1; otherwise it is the softmax.

    Args:
        channels: of both streams, a multiple of heads.
        heads: attention heads.
        style: shared by all blocks.
    """

    def __init__(self, channels: int, heads: int, style: BlockStyle):
        super().__init__()
        self.heads = heads
        self.binarized = style.binarized
        self.query = BasicBlock(channels, channels, style)
        self.key = BasicBlock(channels, channels, style)
        self.value = BasicBlock(channels, channels, style)
        self.norm = style.make_norm(1, channels)
        self.slope = nn.Parameter(torch.full((channels,), 0.25))
        names = ["query", "minus_gamma", "zeta"]
        names += ["key"] if style.binarized else []  # the softmax cancels an offset of all keys
        names += (
            ["value"] if style.binarized or style.keeps_constants else []
        )  # and passes one of all values to the norm
        self.offsets = TimeOffsets(style.embedding, dict.fromkeys(names, channels))

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """queries, keys (B, C, N), embedding (B, width) -> (B, C, N)."""
        offsets = self.offsets(embedding)
        real = {
            "query": self.query(queries, embedding),
            "key": self.key(keys, embedding),
            "value": self.value(keys, embedding),
        }
        context = self.attend(*(self._to_heads(x, offsets.get(name)) for name, x in real.items())).reshape(keys.shape)
        return activate(self.norm(context) + real["query"] + real["key"] + real["value"], self.slope, offsets)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """All (B, heads, C / heads, N) -> same shape."""
        scores = query.transpose(-1, -2) @ key / math.sqrt(query.shape[-2])
        attention = binarize_attention(scores) if self.binarized else scores.softmax(-1)
        return value @ attention.transpose(-1, -2).to(value.dtype)

    def _to_heads(self, x: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        x = shift(x, offset)
        return (binarize(x) if self.binarized else x).unflatten(1, (self.heads, -1))


class FeedForward(nn.Module):
    """Residual branches of one token at a time, and of its neighbours by average pooling along each axis.

    Args:
        channels: of the tokens.
        dims: axes of the grid.
        style: shared by all blocks.
        constants: see CrossBlock.
    """

    def __init__(self, channels: int, dims: int, style: BlockStyle, constants: bool):
        super().__init__()
        self.norm = style.make_norm(1, channels)
        self.expand = BasicBlock(channels, EXPANSION * channels, style)
        self.contract = BasicBlock(EXPANSION * channels, channels, style, zeta=constants)
        self.scale = TimeScale(channels, style, constants)
        self.windows = [
            tuple(size if i == axis else 1 for i in range(dims)) for axis, size in product(range(dims), WINDOWS)
        ]
        self.pool_scales = nn.ModuleList(TimeScale(channels, style, constants) for _ in self.windows)

    def forward(self, stream: torch.Tensor, embedding: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        """stream (B, C, N), embedding (B, width), N = prod(grid) -> like stream."""
        normed = self.norm(stream)
        hidden = self.contract(self.expand(normed, embedding), embedding)
        stream = stream + self.scale(hidden, embedding)
        image = normed.unflatten(2, grid)
        pool = F.avg_pool2d if len(grid) == 2 else F.avg_pool3d
        for window, scale in zip(self.windows, self.pool_scales, strict=True):
            # the pooling in 3D refuses grids smaller than its window, whatever its own padding
            padding = [size // 2 for size in reversed(window) for _ in range(2)]
            pooled = pool(F.pad(image, padding), window, stride=1)
            stream = stream + scale(pooled, embedding).flatten(2)
        return stream


class CrossBlock(nn.Module):
    """One cross transformer block: attention, then feed-forward, both added to the stream.

    Args:
        channels: of the tokens.
        dims: axes of the grid.
        heads: attention heads.
        style: shared by all blocks.
        constants: whether anything constant over the tokens of one sample is of use in the resulting stream. False
            leaves out the offsets that the instance norms behind this block would cancel.
    """

    def __init__(self, channels: int, dims: int, heads: int, style: BlockStyle, constants: bool):
        super().__init__()
        self.attention = CrossAttention(channels, heads, style)
        self.project = BasicBlock(channels, channels, style, zeta=constants)
        self.scale = TimeScale(channels, style, constants)
        self.feed_forward = FeedForward(channels, dims, style, constants)

    def forward(
        self,
        stream: torch.Tensor,
        queries: torch.Tensor,
        keys: torch.Tensor,
        embedding: torch.Tensor,
        grid: tuple[int, ...],
    ) -> torch.Tensor:
        """stream, queries and keys (the last two normalised) (B, C, N), embedding (B, width) -> like stream."""
        attended = self.project(self.attention(queries, keys, embedding), embedding)
        return self.feed_forward(stream + self.scale(attended, embedding), embedding, grid)


class CrossTransformer(nn.Module):
    """X-Former, binarised BX-Former: the generative feature moves the discriminative one, which moves it in turn.

    The stream that a block changes gives its keys and values, the other one its queries. Only the generative feature
    comes back; at the start it comes back as it is.

    Args:
        channels: of both features, a multiple of heads.
        dims: axes of space, 2 or 3.
        style: shared by all blocks.
        heads: attention heads.

    Raises:
        ValueError: channels is no multiple of heads.
    """

    def __init__(self, channels: int, dims: int, style: BlockStyle, heads: int = 4):
        super().__init__()
        if channels % heads:
            raise ValueError(f"the cross transformer has {channels} channels; expected a multiple of its {heads} heads")
        self.norm_prior = style.make_norm(1, channels)
        self.norm_generative = style.make_norm(1, channels)
        self.to_prior = CrossBlock(channels, dims, heads, style, constants=style.keeps_constants)
        self.norm_moved_prior = style.make_norm(1, channels)
        self.norm_generative_again = style.make_norm(1, channels)
        self.to_generative = CrossBlock(channels, dims, heads, style, constants=True)

    def forward(self, generative: torch.Tensor, prior: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """generative (f_d), prior (f_p), both (B, C, *grid), embedding (B, width) -> f_d' (B, C, *grid)."""
        grid = tuple(generative.shape[2:])
        stream, prior = generative.flatten(2), prior.flatten(2)
        normed = self.norm_generative(stream)
        prior = self.to_prior(prior, normed, self.norm_prior(prior), embedding, grid)
        keys = self.norm_generative_again(normed)  # the reference normalises it a second time
        stream = self.to_generative(stream, self.norm_moved_prior(prior), keys, embedding, grid)
        return stream.reshape(generative.shape)
