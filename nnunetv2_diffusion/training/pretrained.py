"""The segmentor that HiDiff starts from: an existing result of nnU-Net."""

import os
from pathlib import Path

from nnunetv2.paths import nnUNet_results
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunetv2_diffusion.checkpoints import CheckpointError, load_checkpoint_file
from nnunetv2_diffusion.networks.heads import describe_mismatch


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
            raise CheckpointError(f"segmentor_checkpoint: no file {file}, expected an nnU-Net checkpoint")
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
