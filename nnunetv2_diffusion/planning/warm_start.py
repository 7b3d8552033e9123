"""Verb ``warm-start``: the weights of an ordinary nnU-Net result for stock ``nnUNetv2_train -pretrained_weights``.

The trainers keep nnU-Net's names, and what they add starts as the identity: zero weights for the mask channels, zero
projections of time and transformer, a refiner beside the segmentor. So the file is the trainer's fresh network with
the result's weights in it, and its logits are those of the result. nnU-Net's loader skips segmentation heads; see
``networks.heads.carry_heads`` for how they come along.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_diffusion import shell
from nnunetv2_diffusion.checkpoints import CheckpointError, build_network, check_weights, load_checkpoint_file
from nnunetv2_diffusion.networks import DiffusionSegmentor, HybridSegmentor, UnsupportedArchitectureError
from nnunetv2_diffusion.networks.discriminative import UNetSegmentor
from nnunetv2_diffusion.networks.heads import HOST_SKIPS, carry_heads
from nnunetv2_diffusion.packing import write_new
from nnunetv2_diffusion.planning.derive import PlansError
from nnunetv2_diffusion.planning.plan import dataset_folder
from nnunetv2_diffusion.planning.schema import SettingsError

HEADS = ("auto", "copy", "fresh")
SECOND_NAMES = (".all_modules.", "decoder.encoder.")  # nnU-Net registers these weights a second time
WITHOUT_EFFECT = ("dropout_op", "dropout_op_kwargs", "deep_supervision")  # on the logits of a trained network
DICTS = ("plans", "dataset_json")  # of init_args
COMPARED = ("spacing", "normalization_schemes", "patch_size")


class WarmStartError(ValueError):
    """A checkpoint does not fit a trainer, or the trainer takes no warm start."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add = parser.add_argument
    add("--from", dest="source", required=True, type=Path, metavar="CHECKPOINT", help="of nnU-Net's own network")
    add("-d", required=True, metavar="DATASET", help="name or id of the data set to train on, preprocessed")
    add("-c", required=True, metavar="CONFIGURATION", help="2d, 3d_fullres, ...")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="plans to train with; default nnUNetPlans")
    add("-tr", default="nnUNetTrainerRecycleXT", metavar="TRAINER", help="default nnUNetTrainerRecycleXT")
    add("-o", required=True, type=Path, metavar="FILE", help="new file, for nnUNetv2_train -pretrained_weights")
    add(
        "--heads",
        default="auto",
        choices=HEADS,
        help="segmentation heads: copy them, start with fresh ones, or (default) copy them if the labels are the same",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the file; 1 with a message, and nothing written, if it cannot be done."""
    expected = (WarmStartError, PlansError, CheckpointError, SettingsError, UnsupportedArchitectureError, OSError)
    try:
        _check_output(arguments.o)
        source = Source(arguments.source)
        target = read_target(dataset_folder(arguments.d), arguments.c, arguments.p, arguments.tr)
        content, report = warm_start(source, target, arguments.heads)
        print("\n".join(report), flush=True)  # before the file: what does not match is known by then
        write_new(content, arguments.o)
    except expected as error:
        print(f"nnunetv2_diffusion warm-start: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.o}: {arguments.o.stat().st_size / 2**20:.1f} MiB. Train with\n  {target.command(arguments.o)}")
    return 0


def _check_output(file: Path) -> None:
    if file.exists():
        raise FileExistsError(f"{file} exists; it is not overwritten")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file.parent}: no such folder, expected one to write {file.name} to")


def _describe(labels: Mapping) -> list:
    """Labels as the heads see them: names and values in their order, without the one that no head has."""
    return [(name, value) for name, value in labels.items() if name != "ignore"]


class Source:
    """A checkpoint of nnU-Net's own network.

    Args:
        file: written by an nnU-Net trainer.

    Raises:
        CheckpointError: if the file cannot be read safely.
    """

    def __init__(self, file: Path):
        self.file = file
        checkpoint = load_checkpoint_file(file)
        weights = checkpoint["network_weights"]
        check_weights(weights, file)
        self.weights = {key.removeprefix("module."): w for key, w in weights.items()}
        self.trainer = str(checkpoint.get("trainer_name", "unknown"))
        arguments = checkpoint.get("init_args") or {}
        if not isinstance(arguments, dict) or not all(isinstance(arguments.get(k, {}), dict) for k in DICTS):
            raise CheckpointError(f"{file}: init_args is damaged, expected a mapping with {' and '.join(DICTS)}")
        self.arguments: dict[str, Any] = arguments

    @cached_property
    def configuration(self) -> ConfigurationManager | None:
        """The configuration that it was trained with; None if the checkpoint does not tell."""
        if not {"plans", "configuration"} <= set(self.arguments):
            return None
        try:
            return PlansManager(self.arguments["plans"]).get_configuration(self.arguments["configuration"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{self.file}: its plans cannot be read ({reason[:200]})") from error

    @property
    def labels(self) -> dict | None:
        """Of its data set; None if the checkpoint does not tell."""
        return (self.arguments.get("dataset_json") or {}).get("labels")

    def __str__(self) -> str:
        """What it was trained as, in one line."""
        given = {k: self.arguments.get(k, "?") for k in ("configuration", "fold")}
        plans = self.arguments.get("plans") or {}
        return (
            f"{self.file}: {self.trainer}, {plans.get('dataset_name', '?')}, plans {plans.get('plans_name', '?')}, "
            f"{given['configuration']}, fold {given['fold']}"
        )


@dataclass(frozen=True)
class Target:
    """A trainer's network, freshly initialised.

    Attributes:
        trainer: name of its class.
        plans: to train with.
        name: of the configuration.
        dataset_json: of the data set to train on.
        network: as the trainer builds it.
        image_channels: inputs of the network that are not a mask.
    """

    trainer: str
    plans: PlansManager
    name: str
    dataset_json: dict
    network: DiffusionSegmentor | HybridSegmentor
    image_channels: int

    @property
    def configuration(self) -> ConfigurationManager:
        """To train with."""
        return self.plans.get_configuration(self.name)

    @property
    def prefix(self) -> str:
        """What precedes nnU-Net's names in the network's state dict."""
        return "segmentor." if isinstance(self.network, HybridSegmentor) else ""

    def host_weights(self) -> dict[str, torch.Tensor]:
        """Weights that nnU-Net's own network has as well, by its names; the first convolution for images alone."""
        unet = self.network.segmentor if self.prefix else self.network
        stem = next(m for m in unet.encoder.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)).weight
        return {
            key: w[:, : self.image_channels] if w.data_ptr() == stem.data_ptr() else w
            for key, w in unet.state_dict().items()
            if key.startswith(("encoder.", "decoder."))
        }

    def command(self, file: Path) -> str:
        """What trains from a warm-start file."""
        number = self.plans.dataset_name[len("Dataset") :][:3]
        return (
            f"nnUNetv2_train {number} {self.name} FOLD -tr {self.trainer} -p {self.plans.plans_name} "
            f"-pretrained_weights {shell.quote(str(file))}"
        )


def _read_json(file: Path) -> dict:
    if not file.is_file():
        raise WarmStartError(f"{file}: no such file, expected that of a preprocessed data set")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WarmStartError(f"{file}: {error}, expected JSON") from error


def read_target(folder: Path, configuration: str, plans: str, trainer: str) -> Target:
    """The network that a trainer would start with.

    Args:
        folder: of the data set in nnUNet_preprocessed, with dataset.json and the plans.
        configuration: one of the plans.
        plans: name, as nnU-Net's -p.
        trainer: name, as nnU-Net's -tr.

    Raises:
        WarmStartError: for a missing file or configuration, or a trainer that takes no warm start.
        CheckpointError: if nnU-Net does not find the trainer.
        SettingsError: for unusable settings in the plans.
        UnsupportedArchitectureError: if the plans' network cannot be extended.
    """
    file = folder / f"{plans}.json"
    manager = PlansManager(_read_json(file))
    if configuration not in manager.available_configurations:
        raise WarmStartError(
            f"{file}: no configuration {configuration}, expected one of {', '.join(manager.available_configurations)}"
        )
    settings, dataset_json = manager.get_configuration(configuration), _read_json(folder / "dataset.json")
    network = build_network(trainer, manager, settings, dataset_json)
    of_host = isinstance(getattr(network, "segmentor", None), UNetSegmentor)
    if not isinstance(network, DiffusionSegmentor) and not of_host:
        raise WarmStartError(
            f"{trainer} cannot start from nnU-Net's own network, expected a trainer of the recycling family or "
            "nnUNetTrainerHiDiff. nnU-Net's trainers take the checkpoint itself as -pretrained_weights"
        )
    network.sigmoid = manager.get_label_manager(dataset_json).has_regions
    channels = determine_num_input_channels(manager, settings, dataset_json)
    return Target(trainer, manager, configuration, dataset_json, network, channels)


def choose_heads(source: Source, target: Target, heads: str = "auto") -> tuple[bool, str]:
    """Whether the heads are copied, and why.

    Args:
        source: where they would come from.
        target: where they would go to.
        heads: "copy", "fresh", or "auto": copied if both data sets have the same labels, fresh ones otherwise.
    """
    if heads != "auto":
        return heads == "copy", "as asked for"
    key = next(key for key in target.host_weights() if HOST_SKIPS in key)
    here = len(target.host_weights()[key])
    there = len(source.weights[key]) if key in source.weights else None
    if here != there:
        return False, f"the checkpoint segments {there or 'no'} classes or regions, the data set has {here}"
    if source.labels is None:
        return True, "as many classes or regions; the checkpoint does not tell their names"
    if _describe(source.labels) != _describe(target.dataset_json["labels"]):
        return False, f"the labels differ: {source.labels} there, {target.dataset_json['labels']} here"
    return True, "the labels are the same"


def find_mismatches(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[str]:
    """Weights that two networks do not share: key, found and expected shape; weights with two names once.

    Args:
        found: of the checkpoint.
        expected: of the network.
    """
    lines = {}
    for key in [*expected, *(key for key in found if key not in expected)]:
        there, here = (tuple(w[key].shape) if key in w else None for w in (found, expected))
        if there != here:
            texts = ["none" if shape is None else str(shape) for shape in (there, here)]
            lines[key] = f"{key}: found {texts[0]}, expected {texts[1]}"
    first_names = [line for key, line in lines.items() if not any(part in key for part in SECOND_NAMES)]
    return first_names or list(lines.values())


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def compare_architectures(source: ConfigurationManager, target: ConfigurationManager) -> list[str]:
    """What differs between two planned networks and changes their logits, also where all shapes agree."""
    names = [c.network_arch_class_name.rsplit(".", 1)[-1] for c in (source, target)]
    lines = [f"network: found {names[0]}, expected {names[1]}"] if names[0] != names[1] else []
    there, here = source.network_arch_init_kwargs, target.network_arch_init_kwargs
    for key in dict.fromkeys([*here, *there]):
        values = [_plain(kwargs.get(key)) for kwargs in (there, here)]
        if values[0] != values[1] and key not in WITHOUT_EFFECT:
            lines.append(f"{key}: found {values[0]}, expected {values[1]}")
    return lines


def check_fit(source: Source, target: Target, with_heads: bool) -> None:
    """Raise unless every weight of the plans' network is in the checkpoint, and no other.

    Raises:
        WarmStartError: with all that does not match, a line each.
    """
    expected, found = target.host_weights(), source.weights
    if not with_heads:
        expected, found = ({k: w for k, w in d.items() if HOST_SKIPS not in k} for d in (expected, found))
    lines = _reasons(source, target, found, expected) + find_mismatches(found, expected)
    if lines:
        raise WarmStartError(
            f"{source} does not fit {target.trainer}, plans {target.plans.plans_name}, {target.name}; nothing was "
            "written. Copy the plans that it was trained with (nnUNetv2_move_plans_between_datasets), or train nnU-Net "
            "with these. What does not match, in the checkpoint and in these plans:\n  " + "\n  ".join(lines)
        )


def _reasons(source: Source, target: Target, found: Mapping, expected: Mapping) -> list[str]:
    """Why weights do not match, as far as the checkpoint tells."""
    lines = []
    if any(key.startswith(("time.", "transformer.", "segmentor.", "_extra_state")) for key in found):
        lines.append(f"trainer: found {source.trainer}, expected one of nnU-Net's own")
    if source.configuration is not None:
        lines += compare_architectures(source.configuration, target.configuration)
    stem = next(key for key, w in expected.items() if w.ndim > 3)
    if stem in found and found[stem].shape[1] != expected[stem].shape[1]:
        channels = target.dataset_json.get("channel_names")
        lines.append(
            f"input channels: found {found[stem].shape[1]}, expected {target.image_channels} (channel_names {channels})"
        )
    if any("running_mean" in key for key in found):
        lines.append("normalisation: found batch norm, expected instance norm")
    return lines


def _notes(source: Source, target: Target) -> Iterator[str]:
    """What differs and does not prevent a warm start."""
    if source.configuration is None:
        yield "note: the checkpoint does not tell its plans; only names and shapes of its weights were compared"
        return
    for key in COMPARED:
        values = [_plain(c.configuration.get(key)) for c in (source.configuration, target.configuration)]
        if values[0] != values[1]:
            yield f"note: {key} was {values[0]}, is {values[1]}"
    names = [d.get("channel_names") for d in (source.arguments.get("dataset_json") or {}, target.dataset_json)]
    if names[0] != names[1]:
        yield f"note: channel_names were {names[0]}, are {names[1]}"


def warm_start(source: Source, target: Target, heads: str = "auto") -> tuple[dict, list[str]]:
    """Put a checkpoint's weights into a trainer's fresh network.

    Args:
        source: the checkpoint.
        target: the network; it gets the weights.
        heads: see ``choose_heads``.

    Returns:
        content of a file for nnU-Net's ``-pretrained_weights``, complete, and what was done, in lines.

    Raises:
        WarmStartError: if they do not match, naming everything that does not.
    """
    with_heads, why = choose_heads(source, target, heads)
    check_fit(source, target, with_heads)
    report = [f"from {source}"]
    for key, own in target.host_weights().items():
        if with_heads or HOST_SKIPS not in key:
            own.copy_(source.weights[key])  # a view of the network's own weights
    weights = target.network.state_dict()
    carry_heads(weights, with_heads)
    report += [f"segmentation heads: {'copied' if with_heads else 'fresh'}, {why}", *_new_parts(target)]
    report += _notes(source, target)
    origin = {"trainer": target.trainer, "heads": "copied" if with_heads else "fresh", "from": source.trainer}
    return {"network_weights": weights, "warm_start": origin}, report


def _new_parts(target: Target) -> Iterator[str]:
    """What the network has beyond the checkpoint's, in lines."""
    stem = next(m for m in target.network.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    extra = 0 if target.prefix else stem.in_channels - target.image_channels
    if extra:
        yield f"first convolution: {extra} input channels for masks, with zero weights"
    for name, child in target.network.named_children():
        if name not in ("encoder", "decoder", "segmentor"):
            count = sum(p.numel() for p in child.parameters())
            yield f"{name}: new, {count:,} parameters, {'fresh' if target.prefix else 'without effect at the start'}"
