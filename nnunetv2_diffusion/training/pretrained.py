"""Weights that a training starts from: HiDiff's segmentor, and what nnU-Net's ``-pretrained_weights`` names."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from nnunetv2.paths import nnUNet_results
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunetv2_diffusion import shell
from nnunetv2_diffusion.checkpoints import CheckpointError, load_checkpoint_file
from nnunetv2_diffusion.networks.heads import HOST_SKIPS, describe_mismatch
from nnunetv2_diffusion.training.transfer import compare_architectures, head_names, image_names, parts


def find_segmentor(trainer: nnUNetTrainer, segmentor_trainer: str | None, checkpoint: str | None) -> Path | None:
    """The checkpoint to start from.

    Args:
        trainer: whose data set, plans, configuration and fold are meant.
        segmentor_trainer: name of the trainer whose final checkpoint is looked for; None for no search.
        checkpoint: a file to use instead; "" and None stand for none.

    Returns:
        the file, None if there is none.

    Raises:
        CheckpointError: if a file is named that does not exist.
    """
    if checkpoint:
        file = Path(os.path.expanduser(checkpoint))
        if not file.is_file():
            raise CheckpointError(f"setting hidiff.segmentor: no file {file}, expected an nnU-Net checkpoint")
        return file
    if segmentor_trainer is None:
        return None
    plans, configuration = trainer.plans_manager.plans_name, trainer.configuration_name
    model = Path(nnUNet_results) / trainer.plans_manager.dataset_name / f"{segmentor_trainer}__{plans}__{configuration}"
    file = model / f"fold_{trainer.fold}" / "checkpoint_final.pth"
    return file if file.is_file() else None


def load_segmentor(segmentor: nn.Module, file: Path) -> None:
    """Load an nnU-Net checkpoint of the same plans, or the segmentor of a HiDiff checkpoint.

    Raises:
        CheckpointError: if the file cannot be read, or its network is another one.
    """
    weights = load_checkpoint_file(file)["network_weights"]
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    if any(key.startswith("segmentor.") for key in weights):
        weights = {k.removeprefix("segmentor."): w for k, w in weights.items() if k.startswith("segmentor.")}
    problem = describe_mismatch(segmentor.state_dict(), weights)
    if problem:
        raise CheckpointError(f"{file}: {problem}")
    segmentor.load_state_dict(weights)


def check_pretrained_weights(trainer: nnUNetTrainer, network: nn.Module, file: str | Path) -> None:
    """Raise if nnU-Net could not load the file of ``-pretrained_weights``, before it prints whole tensors.

    Args:
        trainer: whose plans are meant.
        network: as it was built.
        file: a checkpoint.

    Raises:
        CheckpointError: of three lines: the first difference, how many weights do not fit, what to type.
    """
    checkpoint = load_checkpoint_file(file)
    found = checkpoint["network_weights"]
    own = {key: w for key, w in network.state_dict().items() if HOST_SKIPS not in key}
    wrong = [key for key, w in own.items() if key not in found or found[key].shape != w.shape]
    if not wrong:
        return
    first = next(_differences(trainer, checkpoint, own), f"{wrong[0]} is another one")
    plans, name = trainer.plans_manager, trainer.configuration_name
    raise CheckpointError(
        f"{file} does not fit {type(trainer).__name__}: {first}\n"
        f"{len(wrong)} of {len(own)} weights are missing or have another shape; nothing was trained. Type\n"
        f"nnunetv2_diffusion warm-start --from {shell.quote(str(file))} -d {plans.dataset_name} -c {name} "
        f"-p {plans.plans_name} -tr {type(trainer).__name__} -o NEW_FILE"
    )


def _differences(trainer: nnUNetTrainer, checkpoint: Mapping, own: Mapping) -> Iterator[str]:
    """What differs in the terms of plans and data set, most telling first."""
    given = checkpoint.get("init_args") or {}
    plans = PlansManager(given["plans"]) if {"plans", "configuration", "dataset_json"} <= set(given) else None
    if plans is not None:
        there = plans.get_configuration(given["configuration"])
        yield from compare_architectures(there, trainer.configuration_manager)
    found = checkpoint["network_weights"]
    left = [name for name in parts(own) if name not in parts(found)]
    if left:
        yield f"trainer: found {checkpoint.get('trainer_name', 'unknown')} without {', '.join(left)}"
    if plans is not None:
        name, here = trainer.configuration_name, (trainer.plans_manager, trainer.dataset_json)
        labels = head_names(plans, given["dataset_json"]), head_names(*here)
        if labels[0] != labels[1]:
            yield f"labels: found {', '.join(labels[0])}, expected {', '.join(labels[1])}"
        images = image_names(plans, given["configuration"], given["dataset_json"]), image_names(here[0], name, here[1])
        if len(images[0]) != len(images[1]):
            yield f"input channels: found {', '.join(images[0])}, expected {', '.join(images[1])}"
    if checkpoint.get("trainer_name", type(trainer).__name__) != type(trainer).__name__:
        yield f"trainer: found {checkpoint['trainer_name']}"
