"""Which weights of one network go to which of another: all of the U-Net, and by name what a channel stands for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_diffusion.networks.heads import HOST_SKIPS
from nnunetv2_diffusion.plans_content import foreground_labels

Weights = Mapping[str, torch.Tensor]
Pairs = list[tuple[int, int]]  # index there, index here
HEADS = (HOST_SKIPS, "segmentor.heads.", "refiner.head.2.")  # in keys whose first axis is classes or regions
STEMS = ("encoder.stem.convs.0.conv.weight", "encoder.stages.0.0.convs.0.conv.weight", "to_rgb.0.weight")
WITHOUT_EFFECT = ("dropout_op", "dropout_op_kwargs", "deep_supervision")  # on the logits of a trained network
BODY = ("encoder.", "decoder.", "segmentor.")


def _channel_number(key: Any) -> int:
    """Of a channel in channel_names; what is no number comes first, as nnU-Net does not mind either."""
    return int(key) if str(key).isdecimal() else -1


def is_head(key: str) -> bool:
    """The first axis of these weights is classes or regions."""
    return any(part in key for part in HEADS)


def body_prefix(keys: Mapping) -> str:
    """What precedes the names of the network that sees the image alone, or the whole one if there is only one."""
    return "segmentor." if any(key.startswith("segmentor.") for key in keys) else ""


def head_names(plans: PlansManager, dataset_json: Mapping) -> tuple[str, ...]:
    """Names of classes or regions in the order of the heads; those of regions say so, as their heads are others."""
    foreground = foreground_labels(dataset_json)
    if plans.get_label_manager(dataset_json).has_regions:
        return tuple(f"region {name}" for name in foreground)
    background = [name for name in dataset_json["labels"] if name not in foreground and name != "ignore"]
    return (*background, *foreground)


def _number(value: int | Sequence[int]) -> int:
    return int(value[0] if isinstance(value, Sequence) else value)


def image_names(plans: PlansManager, configuration: str, dataset_json: Mapping) -> tuple[str, ...]:
    """Names of a network's inputs that are not a mask of the diffusion process, those of a cascade included."""
    channels = dataset_json.get("channel_names") or dataset_json["modality"]
    names = [str(channels[key]) for key in sorted(channels, key=_channel_number)]
    if plans.get_configuration(configuration).previous_stage_name is not None:
        manager = plans.get_label_manager(dataset_json)
        of_number = {_number(value): name for name, value in dataset_json["labels"].items()}
        names += [f"previous stage: {of_number.get(int(n), n)}" for n in manager.foreground_labels]
    return tuple(names)


@dataclass(frozen=True)
class Layout:
    """What the channels of a network stand for.

    Attributes:
        images: names of the image channels.
        heads: names of classes or regions, in the order of the heads.
        bits: masks are given in analog bits instead of one-hot.
    """

    images: tuple[str, ...]
    heads: tuple[str, ...]
    bits: bool = False

    def code(self) -> list[tuple]:
        """What the channels of one mask stand for; a bit is a matter of all labels and their order."""
        if self.bits and len(self.heads) > 1:
            return [(bit, self.heads) for bit in range((len(self.heads) - 1).bit_length())]
        return [(name,) for name in self.heads]

    def inputs(self, channels: int) -> list[tuple]:
        """What the inputs of a first convolution after the images stand for; unknown ones have no counterpart."""
        extra, code = channels - len(self.images), self.code()
        if extra % len(code):
            return [("unknown", id(self), i) for i in range(extra)]
        return [(block, *name) for block in range(extra // len(code)) for name in code]


def match(there: Sequence, here: Sequence) -> Pairs:
    """Indices of what both have, once each."""
    return [
        (there.index(name), i) for i, name in enumerate(here) if there.count(name) == 1 and list(here).count(name) == 1
    ]


def match_images(there: Sequence[str], here: Sequence[str]) -> Pairs:
    """Image channels: by name if the names are the same or their number differs, by position otherwise."""
    by_name = match(there, here)
    if len(there) == len(here) and len(by_name) < len(here):
        return [(i, i) for i in range(len(here))]
    return by_name


def comparable(weights: Weights) -> dict[str, torch.Tensor]:
    """The body of a network by nnU-Net's names, without what depends on numbers of inputs and heads."""
    prefix = body_prefix(weights)
    body = {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix or ("encoder.", "decoder."))}
    stems = stem_keys(body)
    return {k: w[:, :1] if k in stems else w[:1] if is_head(prefix + k) else w for k, w in body.items()}


def stem_keys(body: Weights) -> set[str]:
    """Names of the first convolution, which nnU-Net's blocks register more than once."""
    first = next((key for key in STEMS if key in body), None)
    if first is None:
        return set()
    ends = {first, first.replace(".conv.weight", ".all_modules.0.weight")}
    return {key for key in body if key.removeprefix("decoder.") in ends}


def parts(weights: Weights) -> dict[str, dict[str, torch.Tensor]]:
    """What is no body: time, latent, transformer, refiner, by their names."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, w in weights.items():
        if "." in key and not key.startswith(BODY):
            found.setdefault(key.split(".")[0], {})[key] = w
    return found


def _open(key: str, w: torch.Tensor) -> tuple[int, ...]:
    """Shape without the axis that names decide about."""
    shape = tuple(w.shape)
    if is_head(key):
        return shape[1:]
    return (shape[0], *shape[2:]) if key == "refiner.stem.weight" else shape


def shared_parts(there: Weights, here: Weights) -> dict[str, str]:
    """Of every part of the network here: "copied", or why it is fresh."""
    found, own = parts(there), parts(here)
    result = {}
    for name, weights in own.items():
        shapes = [{k: _open(k, w) for k, w in d.items()} for d in (found.get(name, {}), weights)]
        same = shapes[0] == shapes[1]
        result[name] = "copied" if same else "fresh, other settings there" if name in found else "new"
    return result


def _copy(own: torch.Tensor, given: torch.Tensor, pairs: Pairs, axis: int) -> None:
    for there, here in pairs:
        own.select(axis, here).copy_(given.select(axis, there))


def transfer(there: Weights, here: Weights, layouts: tuple[Layout, Layout], with_heads: bool) -> None:
    """Copy weights in place.

    Args:
        there: of the source.
        here: views of the target's own; bodies have the same shapes but for inputs and heads.
        layouts: of source and target; names that they share are copied.
        with_heads: also the heads, of the names that agree.
    """
    source, target = layouts
    images, heads = match_images(source.images, target.images), match(source.heads, target.heads)
    prefixes = body_prefix(there), body_prefix(here)
    stems = {prefixes[1] + k for k in stem_keys({k.removeprefix(prefixes[1]): w for k, w in here.items()})}
    stems.add("refiner.stem.weight")
    copied = {name for name, what in shared_parts(there, here).items() if what == "copied"}
    for key, own in here.items():
        in_body = key.startswith(BODY)
        if not in_body and key.split(".")[0] not in copied:
            continue
        given = there[prefixes[0] + key.removeprefix(prefixes[1])] if in_body else there[key]
        if is_head(key):
            _copy(own, given, heads if with_heads else [], 0)
        elif key in stems:
            names = [_inputs(layout, w.shape[1], key) for layout, w in zip(layouts, (given, own), strict=True)]
            offset = len(source.images), len(target.images)
            masks = [(i + offset[0], j + offset[1]) for i, j in match(*names)]
            _copy(own, given, images + masks, 1)
        else:
            own.copy_(given)


def _inputs(layout: Layout, channels: int, key: str) -> list[tuple]:
    """Inputs after the images; the refiner's masks are one-hot whatever the encoding."""
    if key == "refiner.stem.weight":
        layout = Layout(layout.images, layout.heads)
    return layout.inputs(channels)


def plain(value: Any) -> Any:
    """Sequences of plans as lists."""
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def compare_architectures(source: ConfigurationManager, target: ConfigurationManager) -> list[str]:
    """What differs between two planned networks and changes their logits, also where all shapes agree."""
    names = [c.network_arch_class_name.rsplit(".", 1)[-1] for c in (source, target)]
    lines = [f"network: found {names[0]}, expected {names[1]}"] if names[0] != names[1] else []
    there, here = source.network_arch_init_kwargs, target.network_arch_init_kwargs
    for key in dict.fromkeys([*here, *there]):
        values = [plain(kwargs.get(key)) for kwargs in (there, here)]
        if values[0] != values[1] and key not in WITHOUT_EFFECT:
            lines.append(f"{key}: found {values[0]}, expected {values[1]}")
    return lines
