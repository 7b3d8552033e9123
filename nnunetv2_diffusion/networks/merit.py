"""MERIT (Rahman and Marculescu, MIDL 2023) as HiDiff's segmentor for 2D: MaxViT at two scales, one decoder for both."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.maxxvit import checkpoint_filter_fn
from torch import nn
from torch.nn import functional as F

from nnunetv2_diffusion.networks.cascaded_decoder import CascadedDecoder
from nnunetv2_diffusion.networks.discriminative import Segmentor, SegmentorOutput
from nnunetv2_diffusion.tensor_files import TensorFileError, read_tensor_file

# timm's names of the backbones of both scales
VARIANTS = {
    "small": ("maxxvit_rmlp_small_rw_256", "maxvit_rmlp_small_rw_224"),
    "tiny": ("maxvit_rmlp_tiny_rw_256", "maxvit_tiny_rw_224"),
    "nano": ("maxvit_rmlp_nano_rw_256", "maxvit_nano_rw_256"),
}
SCALES = ("scale1", "scale2")
STRIDES = [(4, 4), (8, 8), (16, 16), (32, 32)]
CLASSIFIER = "head."  # timm's prefix of what is not used here
POSITION_TABLE = "relative_position_bias_table"


class MeritWeightsError(RuntimeError):
    """Pretrained weights of MERIT are missing, damaged, or belong to another network."""


def scale_sizes(size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sizes that the two backbones see, along each axis a multiple of 32, which is what MaxViT's windows need.

    The first is ``size`` rounded up, the second the multiple nearest to 7/8 of the first, the smaller one of two:
    256 -> 256 and 224. Up to 96 pixels both are equal.
    """
    windows = [-(-n // 32) for n in size]
    # smallest k >= 7/8 m - 1/2, in whole numbers
    smaller = [max(1, -((4 - 7 * m) // 8)) for m in windows]
    return (32 * windows[0], 32 * windows[1]), (32 * smaller[0], 32 * smaller[1])


def resize(x: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Bilinear resampling of x (B, C, H, W) to ``size``; x itself if it has that size."""
    size = tuple(size)
    return x if x.shape[2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class MaxViTPyramid(nn.Module):
    """A MaxViT of timm without its classifier; the coarsest of its feature maps is layer-normalised.

    Args:
        name: timm's name of the model.
        size: of the images, (H, W), multiples of 32.
        weights: None for random ones, "timm" for timm's pretrained ones, or a state dict of the timm model.
        source: what errors call the weights.

    Raises:
        MeritWeightsError: if the weights cannot be had or do not fit.
    """

    def __init__(
        self, name: str, size: tuple[int, int], weights: str | Mapping[str, torch.Tensor] | None, source: str = ""
    ):
        super().__init__()
        model: Any = (
            download(name, size) if weights == "timm" else timm.create_model(name, pretrained=False, img_size=size)
        )
        if isinstance(weights, Mapping):
            load_backbone(model, weights, f"{source} ({name})")
        self.channels = [info["num_chs"] for info in model.feature_info[1:]]
        model.head = nn.Identity()  # weights that never get a gradient would stop distributed training
        self.model = model

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x (B, 3, *size) -> 4 feature maps, strides 4, 8, 16 and 32."""
        levels = list(range(1, len(self.channels) + 1))  # 0 is the stem
        return self.model.forward_intermediates(x, indices=levels, norm=True, intermediates_only=True)


class Merit(Segmentor):
    """Cascaded MERIT: the second scale sees the image weighted by what the first one found.

    Each of the 4 heads is the sum of both scales' predictions from one decoder level; the logits are the sum of the
    heads. The features are those of the first scale's backbone.

    Args:
        image_channels: of the input; other numbers than 3 are mapped to 3 by a learned 1x1 convolution.
        num_heads: K, output channels.
        size: (H, W) for which the attention windows are laid out; see ``scale_sizes``. Inputs of other sizes are
            resampled to it.
        variant: "small" as published, "tiny", or "nano" for small machines.
        weights: of the two backbones. None is random; "timm" downloads timm's pretrained ones; all else is a file
            ``torch.save({"scale1": state_dict, "scale2": state_dict}, path)`` of the two timm models in VARIANTS.

    Attributes:
        feature_channels: of the 4 feature maps, fine to coarse.
        feature_strides: of the feature maps; they have ceil(input / stride) pixels.

    Raises:
        ValueError: for an unknown variant, or numbers that are not positive integers.
        MeritWeightsError: see MaxViTPyramid.
    """

    def __init__(
        self,
        image_channels: int,
        num_heads: int,
        size: tuple[int, int],
        variant: str = "small",
        weights: str | Path | None = None,
    ):
        super().__init__()
        check_arguments(image_channels, num_heads, size, variant)
        self.image_channels = image_channels
        self.sizes = scale_sizes(size)
        self.to_rgb: nn.Module = nn.Identity()
        if image_channels != 3:
            self.to_rgb = nn.Sequential(nn.Conv2d(image_channels, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True))
        per_scale = read_weights(weights, variant)
        self.scale1, self.scale2 = (
            MaxViTPyramid(name, scale, given, f"{weights}: {key}")
            for name, scale, given, key in zip(VARIANTS[variant], self.sizes, per_scale, SCALES, strict=True)
        )
        self.feature_channels = list(self.scale1.channels)
        self.feature_strides: list[tuple[int, ...]] = list(STRIDES)
        self.decoder = CascadedDecoder(self.feature_channels)
        self.heads = nn.ModuleList([nn.Conv2d(c, num_heads, 1) for c in self.feature_channels[::-1]])
        self.feedback = nn.Conv2d(self.feature_channels[0], 1, 1)

    def forward(self, image: torch.Tensor) -> SegmentorOutput:
        """Segment an image.

        Args:
            image: (B, C, H, W), any H and W.

        Returns:
            logits (B, K, H, W), the 4 heads of the same shape, deep to fine, and 4 feature maps, fine to coarse.

        Raises:
            ValueError: if the image has another number of axes or channels.
        """
        if image.ndim != 4 or image.shape[1] != self.image_channels:
            raise ValueError(f"image has shape {tuple(image.shape)}, expected (B, {self.image_channels}, H, W)")
        space = tuple(image.shape[2:])
        first, second = self.sizes
        rgb = self.to_rgb(resize(image, first))
        features = self.scale1(rgb)
        maps = self.decoder(features)
        weight = resize(self.feedback(maps[-1]).sigmoid(), first)
        again = self.scale2(resize(rgb * weight, second))
        again_maps = self.decoder([b + resize(a, b.shape[2:]) for a, b in zip(features, again, strict=True)])
        heads = [
            resize(head(a), space) + resize(head(b), space)
            for head, a, b in zip(self.heads, maps, again_maps, strict=True)
        ]
        grids = [tuple(-(-n // s) for n, s in zip(space, stride, strict=True)) for stride in self.feature_strides]
        features = [resize(f, grid) for f, grid in zip(features, grids, strict=True)]
        return SegmentorOutput(torch.stack(heads).sum(0), heads, features)


def check_arguments(image_channels: int, num_heads: int, size: tuple[int, int], variant: str) -> None:
    """Raise ValueError unless the arguments of Merit make sense."""
    if variant not in VARIANTS:
        raise ValueError(f"MERIT has no variant {variant!r}, expected one of {', '.join(VARIANTS)}")
    if len(size) != 2 or any(n != int(n) or n < 1 for n in size):
        raise ValueError(f"MERIT is 2D: size is {tuple(size)}, expected two positive integers")
    for name, value in (("image_channels", image_channels), ("num_heads", num_heads)):
        if value != int(value) or value < 1:
            raise ValueError(f"{name} is {value}, expected a positive integer")


def download(name: str, size: tuple[int, int]) -> nn.Module:
    """timm's model with its pretrained weights.

    Raises:
        MeritWeightsError: if they cannot be had, with the way around.
    """
    try:
        return timm.create_model(name, pretrained=True, img_size=size)
    except Exception as error:  # the kinds of failure differ between the download clients that timm may use
        raise MeritWeightsError(
            f"timm's pretrained weights of {name} could not be had ({type(error).__name__}: {error}). Without access "
            "to the network, set merit_weights to a local file: on a machine with access, save it with "
            'torch.save({"scale1": timm.create_model(NAME1, pretrained=True).state_dict(), "scale2": ...}, FILE); '
            f"names by variant are {VARIANTS}"
        ) from error


def read_weights(
    weights: str | Path | None, variant: str
) -> tuple[str | Mapping[str, torch.Tensor] | None, str | Mapping[str, torch.Tensor] | None]:
    """What MaxViTPyramid takes as weights, for both scales.

    Raises:
        MeritWeightsError: if a file is missing, damaged, or does not hold a state dict for each scale.
    """
    if weights is None or weights == "timm":
        return weights, weights
    if not Path(weights).is_file():
        raise MeritWeightsError(f"{weights}: no such file, expected weights of MERIT ({variant}), 'timm' or null")
    try:
        content = read_tensor_file(weights)
    except TensorFileError as error:
        raise MeritWeightsError(str(error)) from None
    found = sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
    if not isinstance(content, Mapping) or set(content) != set(SCALES):
        raise MeritWeightsError(
            f"{weights}: holds {shorten(found)}, expected a dict with the keys {' and '.join(SCALES)}"
        )
    for key, name in zip(SCALES, VARIANTS[variant], strict=True):
        state = content[key]
        if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
            raise MeritWeightsError(f"{weights}: {key} is no state dict, expected that of timm's {name}")
    return content["scale1"], content["scale2"]


def load_backbone(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Load a state dict of a timm MaxViT; the classifier may differ or be absent.

    Tables of relative positions are interpolated to the windows of the model's size, as timm does.

    Raises:
        MeritWeightsError: naming what is missing, unexpected, or of another shape.
    """
    wanted = {k: v for k, v in model.state_dict().items() if not k.startswith(CLASSIFIER)}
    given = {k: v for k, v in state.items() if not k.startswith(CLASSIFIER)}
    shapes = [
        f"{k}: {tuple(given[k].shape)}, expected {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in given and given[k].shape != v.shape and not k.endswith(POSITION_TABLE)
    ]
    problems = {
        "missing": sorted(wanted.keys() - given.keys()),
        "unexpected": sorted(given.keys() - wanted.keys()),
        "of another shape": shapes,
    }
    if any(problems.values()):
        text = "; ".join(f"{len(v)} {what}: {shorten(v)}" for what, v in problems.items() if v)
        raise MeritWeightsError(f"{source}: weights do not fit; {text}")
    model.load_state_dict(checkpoint_filter_fn(given, model), strict=False)


def shorten(names: list[str] | str, shown: int = 5) -> str:
    """A list for a message; only the first few of many."""
    if isinstance(names, str):
        return names
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
