"""Verb ``warm-start``: the weights of a training for stock ``nnUNetv2_train -pretrained_weights``.

The trainers keep nnU-Net's names, and what they add starts as the identity: zero weights for the mask channels, zero
projections of time and transformer, a refiner beside the segmentor. So the file is the trainer's fresh network with
the result's weights in it; from a stock result, its logits are those of the result. Channels of images, masks and
heads are copied by their names, see ``training.transfer``. nnU-Net's loader skips segmentation heads; see
``networks.heads.carry_heads`` for how they come along.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_diffusion import shell
from nnunetv2_diffusion.checkpoints import CheckpointError, build_network, check_weights, load_checkpoint_file
from nnunetv2_diffusion.diffusion.mask_encoding import AnalogBits
from nnunetv2_diffusion.files import check_target, read_json
from nnunetv2_diffusion.networks import UnsupportedArchitectureError
from nnunetv2_diffusion.networks.chain_network import ChainNetwork
from nnunetv2_diffusion.networks.heads import carry_heads
from nnunetv2_diffusion.packing import write_new
from nnunetv2_diffusion.planning.derive import PlansError
from nnunetv2_diffusion.planning.plan import dataset_folder
from nnunetv2_diffusion.settings import SettingsError
from nnunetv2_diffusion.training.transfer import (
    STEMS,
    Layout,
    body_prefix,
    comparable,
    compare_architectures,
    head_names,
    image_names,
    is_head,
    match,
    match_images,
    parts,
    plain,
    shared_parts,
    stem_keys,
    transfer,
)

HEADS = ("auto", "copy", "fresh")
SECOND_NAMES = (".all_modules.", "decoder.encoder.")  # nnU-Net registers these weights a second time
DICTS = ("plans", "dataset_json")  # of init_args
COMPARED = ("spacing", "normalization_schemes", "patch_size")
MOST_REASONS = 6  # lines of a message


class WarmStartError(ValueError):
    """A checkpoint does not fit a trainer, or the trainer takes no warm start."""


EXAMPLES = """
nnunetv2_diffusion warm-start --from .../fold_0/checkpoint_final.pth -d 501 -c 3d_fullres -o warm.pth
nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerRecycleXT -pretrained_weights warm.pth
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add = parser.add_argument
    add(
        "--from",
        dest="source",
        required=True,
        type=Path,
        metavar="CHECKPOINT",
        help="Checkpoint to start from, of any trainer here or of nnU-Net's.",
    )
    add(
        "-d",
        required=True,
        metavar="DATASET",
        help="Name or number of the preprocessed data set to train on.",
    )
    add("-c", required=True, metavar="CONFIGURATION", help="Configuration to train: 2d, 3d_fullres, ...")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="Plans to train with.")
    add("-tr", default="nnUNetTrainerRecycleXT", metavar="TRAINER", help="Trainer to train with.")
    add("-o", required=True, type=Path, metavar="FILE", help="New file, for nnUNetv2_train -pretrained_weights.")
    add(
        "--heads",
        default="auto",
        choices=HEADS,
        help="Segmentation heads. auto: copy those of labels with the same name; copy: all; fresh: none.",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the file; 1 with a message, and nothing written, if it cannot be done."""
    expected = (WarmStartError, PlansError, CheckpointError, SettingsError, UnsupportedArchitectureError, OSError)
    try:
        check_target(arguments.o)
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


class Source:
    """A checkpoint of a trainer of nnU-Net or of this package.

    Args:
        file: written by it.

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

    @property
    def heads(self) -> int:
        """Classes or regions that it segments."""
        return next((len(w) for key, w in self.weights.items() if is_head(key)), 0)

    def layout(self, target: Layout) -> Layout:
        """What its channels stand for; what the checkpoint does not tell is taken to be as in the target.

        Args:
            target: of the network that gets the weights.
        """
        if self.configuration is None or self.labels is None:
            prefix = body_prefix(self.weights)
            stem = next((self.weights[prefix + key] for key in STEMS if prefix + key in self.weights), None)
            masked = "time" in parts(self.weights) and not prefix
            inputs = len(target.images) if stem is None or masked else stem.shape[1]
            images = target.images if inputs == len(target.images) else ("unknown",) * inputs
            return Layout(images, target.heads if self.heads == len(target.heads) else ("unknown",) * self.heads)
        plans, dataset_json = PlansManager(self.arguments["plans"]), self.arguments["dataset_json"]
        section = self.configuration.configuration.get("diffusion") or {}
        return Layout(
            image_names(plans, self.arguments["configuration"], dataset_json),
            head_names(plans, dataset_json),
            section.get("mask_encoding") == "analog-bits",
        )

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
    """

    trainer: str
    plans: PlansManager
    name: str
    dataset_json: dict
    network: ChainNetwork

    @property
    def configuration(self) -> ConfigurationManager:
        """To train with."""
        return self.plans.get_configuration(self.name)

    @property
    def layout(self) -> Layout:
        """What its channels stand for."""
        heads = head_names(self.plans, self.dataset_json)
        encoding = getattr(self.network, "encoding", None)
        images = image_names(self.plans, self.name, self.dataset_json)
        return Layout(images, heads, isinstance(encoding, AnalogBits))

    def weights(self) -> dict[str, torch.Tensor]:
        """Views of the network's own weights, without its extra state."""
        return {key: w for key, w in self.network.state_dict().items() if key != "_extra_state"}

    def command(self, file: Path) -> str:
        """What trains from a warm-start file."""
        number = self.plans.dataset_name[len("Dataset") :][:3]
        return (
            f"nnUNetv2_train {number} {self.name} FOLD -tr {self.trainer} -p {self.plans.plans_name} "
            f"-pretrained_weights {shell.quote(str(file))}"
        )


def _read(file: Path) -> dict:
    return read_json(file, WarmStartError, "that of a preprocessed data set, as nnU-Net writes it")


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
    manager = PlansManager(_read(file))
    if not isinstance(manager.plans.get("configurations"), dict):
        raise WarmStartError(f"{file}: no mapping of configurations, expected plans of nnU-Net")
    if configuration not in manager.available_configurations:
        raise WarmStartError(
            f"{file}: no configuration {configuration}, expected one of {', '.join(manager.available_configurations)}"
        )
    settings, dataset_json = manager.get_configuration(configuration), _read(folder / "dataset.json")
    network = build_network(trainer, manager, settings, dataset_json)
    if not getattr(network, "takes_warm_start", False):
        raise WarmStartError(
            f"{trainer} has neither mask channels nor a refiner to start, expected a trainer of the recycling family "
            "or of HiDiff. nnU-Net's trainers take the checkpoint itself as -pretrained_weights"
        )
    network.sigmoid = manager.get_label_manager(dataset_json).has_regions
    return Target(trainer, manager, configuration, dataset_json, network)


def choose_heads(source: Source, target: Target, heads: str = "auto") -> tuple[tuple[Layout, Layout], str]:
    """Which labels the networks share, and why.

    Args:
        source: where heads would come from.
        target: where they would go to.
        heads: "copy" takes them by position, "fresh" takes none, "auto" those whose names agree.

    Returns:
        layouts of source and target, in which shared labels have the same name, and the reason.

    Raises:
        WarmStartError: if other numbers of heads are to be copied.
    """
    here = target.layout
    there = source.layout(here)
    counts = f"the checkpoint segments {source.heads or 'no'} classes or regions, the data set has {len(here.heads)}"
    if heads == "copy":
        if source.heads != len(here.heads):
            raise WarmStartError(f"--heads copy: {counts}, expected as many")
        return (replace(there, heads=here.heads), here), "as asked for"
    if heads == "fresh":
        return (there, here), "as asked for"
    if source.labels is None and source.heads == len(here.heads):
        return (there, here), "as many classes or regions; the checkpoint does not tell their names"
    if there.heads == here.heads:
        return (there, here), "the labels are the same"
    shared = [here.heads[i] for _, i in match(there.heads, here.heads)]
    if set(shared) <= {"background"}:  # alone, its trained head would outvote all fresh ones
        reason = counts if source.heads != len(here.heads) else "the labels differ: "
        if source.heads == len(here.heads):
            reason += f"{source.labels} there, {target.dataset_json['labels']} here"
        return (replace(there, heads=tuple(f"{name} there" for name in there.heads)), here), reason
    return (there, here), "by the names of the labels"


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


def check_fit(source: Source, target: Target) -> None:
    """Raise unless the body of the target's network is in the checkpoint, and image channels can be matched.

    Raises:
        WarmStartError: of at most ten lines, with the planned difference first.
    """
    found, expected = comparable(source.weights), comparable(target.weights())
    different = find_mismatches(found, expected)
    lines = _reasons(source, target)
    if different:
        lines = lines[:MOST_REASONS]
        lines.append(f"{len(different)} of {len(expected)} weights have another shape or name, first {different[0]}")
    if lines:
        raise WarmStartError(
            f"{source} does not fit {target.trainer}, plans {target.plans.plans_name}, {target.name}; nothing was "
            "written. Copy the plans that it was trained with (nnUNetv2_move_plans_between_datasets), or train "
            "with these. What does not match, in the checkpoint and in these plans:\n  "
            + "\n  ".join(lines[: MOST_REASONS + 1])
        )


def _reasons(source: Source, target: Target) -> list[str]:
    """What was planned in another way, as far as the checkpoint tells."""
    lines = []
    kinds = ["MERIT" if "segmentor.scale1." in " ".join(d) else "U-Net" for d in (source.weights, target.weights())]
    if kinds[0] != kinds[1]:
        return [f"network: found {kinds[0]} ({source.trainer}), expected {kinds[1]}"]
    if source.configuration is not None and kinds[1] == "U-Net":
        lines += compare_architectures(source.configuration, target.configuration)
    there, here = source.layout(target.layout).images, target.layout.images
    if not match_images(there, here):
        lines.append(
            f"input channels: found {len(there)}, expected {len(here)} "
            f"(channel_names {target.dataset_json.get('channel_names')}); none could be matched by its name"
        )
    body = (key for key in source.weights if not key.startswith("refiner."))
    if kinds[1] == "U-Net" and any("running_mean" in key for key in body):
        lines.append("normalisation: found batch norm, expected instance norm")
    return lines


def _notes(source: Source, target: Target) -> Iterator[str]:
    """What differs and does not prevent a warm start."""
    if source.configuration is None:
        yield "note: the checkpoint does not tell its plans; only names and shapes of its weights were compared"
        return
    for key in COMPARED:
        values = [plain(c.configuration.get(key)) for c in (source.configuration, target.configuration)]
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
    check_fit(source, target)
    layouts, why = choose_heads(source, target, heads)
    transfer(source.weights, target.weights(), layouts, heads != "fresh")
    shared = [] if heads == "fresh" else [layouts[1].heads[i] for _, i in match(layouts[0].heads, layouts[1].heads)]
    fresh = [name for name in layouts[1].heads if name not in shared]
    weights = target.network.state_dict()
    carry_heads(weights, bool(shared), complete=not fresh)
    kind = "copied" if not fresh else "partly copied" if shared else "fresh"
    report = [f"from {source}", f"segmentation heads: {kind}, {why}", *_table(source, target, layouts, shared, fresh)]
    report += _notes(source, target)
    origin = {"trainer": target.trainer, "heads": kind, "from": source.trainer}
    origin |= {"copied": shared, "fresh": fresh, "parts": shared_parts(source.weights, target.weights())}
    return {"network_weights": weights, "warm_start": origin}, report


def _table(
    source: Source, target: Target, layouts: tuple[Layout, Layout], shared: list[str], fresh: list[str]
) -> Iterator[str]:
    """What was copied and what is fresh, in lines."""
    there, here = layouts
    if shared and fresh:
        yield f"labels: copied {', '.join(shared)}; fresh {', '.join(fresh)}"
    images = match_images(there.images, here.images)
    if len(images) < max(len(there.images), len(here.images)):
        names = [here.images[i] for _, i in images]
        left = [name for name in here.images if name not in names]
        yield f"image channels: copied {', '.join(names)}; fresh {', '.join(left) or 'none'}"
        yield f"note: the checkpoint has {len(there.images)} image channels, its logits are not kept"
    yield from _masks(source, target, layouts)
    for name, what in shared_parts(source.weights, target.weights()).items():
        count = sum(w.numel() for w in parts(target.weights())[name].values())
        effect = ", without effect at the start" if what != "copied" and name != "refiner" else ""
        yield f"{name}: {what}, {count:,} parameters{effect}"
    left = [name for name in parts(source.weights) if name not in parts(target.weights())]
    if left:
        yield f"note: {', '.join(left)} of {source.trainer} have no place in {target.trainer} and are left out"


def _masks(source: Source, target: Target, layouts: tuple[Layout, Layout]) -> Iterator[str]:
    """What the first convolution has for masks, in a line."""
    inputs = []
    for weights, layout in zip((source.weights, target.weights()), layouts, strict=True):
        stem = next((weights[key] for key in sorted(stem_keys(weights))), None)
        inputs.append([] if stem is None or body_prefix(weights) else layout.inputs(stem.shape[1]))
    if inputs[1]:
        copied = len(match(*inputs))
        yield f"first convolution: {len(inputs[1])} input channels for masks, {copied} copied, others with zero weights"
    elif inputs[0]:
        yield f"note: {len(inputs[0])} input channels for masks are left out, {target.trainer} has none"
