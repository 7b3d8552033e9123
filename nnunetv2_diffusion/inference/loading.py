"""A predictor from nnU-Net's folder of a trained model."""

from collections.abc import Sequence
from pathlib import Path

import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunetv2_diffusion.checkpoints import CheckpointError, build_network, load_checkpoint_file
from nnunetv2_diffusion.inference.options import PredictionOptions
from nnunetv2_diffusion.inference.predictor import DiffusionPredictor
from nnunetv2_diffusion.networks.heads import HeadsMixin


def find_folds(folder: Path, folds: Sequence[int | str] | None, checkpoint: str) -> list[Path]:
    """Checkpoints of the folds, all that have one if folds is None.

    Raises:
        CheckpointError: if there is none, or one is missing, naming what there is.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder, expected a trained model of nnU-Net")
    present = sorted(p.parent.name.removeprefix("fold_") for p in folder.glob(f"fold_*/{checkpoint}"))
    if folds is None:
        folds = [f for f in present if f != "all"] or present
    missing = [str(f) for f in folds if str(f) not in present]
    if missing or not folds:
        found = f"there is {checkpoint} in fold {', '.join(present)}" if present else f"no fold has a {checkpoint}"
        raise CheckpointError(f"{folder}: no {checkpoint} for fold {', '.join(missing) or '0, 1, ...'}; {found}")
    return [folder / f"fold_{f}" / checkpoint for f in folds]


def _json(file: Path) -> dict:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file, expected beside the folds of a trained model")
    return load_json(str(file))


def _check_weights(network: nn.Module, weights: dict[Path, dict]) -> None:
    """Load the weights of every fold, the first ones last."""
    for file, values in reversed(weights.items()):
        try:
            network.load_state_dict(values)
        except RuntimeError as error:
            raise CheckpointError(f"{file}: {error}") from error


def load_predictor(
    folder: Path,
    folds: Sequence[int | str] | None = None,
    checkpoint: str = "checkpoint_final.pth",
    device: str = "cpu",
    options: PredictionOptions | None = None,
    step_size: float = 0.5,
    on_device: bool = True,
    progress: bool = True,
    verbose: bool = False,
) -> DiffusionPredictor:
    """A predictor that is ready; nothing in a checkpoint is run.

    Args:
        folder: nnU-Net's ``TRAINER__PLANS__CONFIGURATION``, with plans.json, dataset.json and ``fold_*``.
        folds: to be averaged; None for all that were trained.
        checkpoint: name of the file in each fold.
        device: "cpu", "cuda" or "mps".
        options: of the prediction.
        step_size: of the sliding window, in parts of the patch.
        on_device: keep results on a GPU if there is room.
        progress: show progress bars.
        verbose: as nnU-Net's.

    Raises:
        CheckpointError: a file is missing, damaged, or of another network.
        OptionError: the model cannot do what is asked for.
    """
    predictor = DiffusionPredictor(
        options or PredictionOptions(),
        tile_step_size=step_size,
        device=torch.device(device),
        perform_everything_on_device=on_device and device == "cuda",
        verbose=verbose,
        verbose_preprocessing=verbose,
        allow_tqdm=progress,
    )
    _load(predictor, folder, find_folds(folder, folds, checkpoint))
    predictor.prepare()
    return predictor


def _load(predictor: DiffusionPredictor, folder: Path, files: list[Path]) -> None:
    """Give a predictor the network of a model, and the weights of its folds."""
    plans, dataset_json = PlansManager(_json(folder / "plans.json")), _json(folder / "dataset.json")
    checkpoints = [load_checkpoint_file(file) for file in files]
    first = checkpoints[0]
    configuration = plans.get_configuration(first["init_args"]["configuration"])
    network = build_network(first["trainer_name"], plans, configuration, dataset_json)
    parameters = [c["network_weights"] for c in checkpoints]
    _check_weights(network, dict(zip(files, parameters, strict=True)))
    axes = first.get("inference_allowed_mirroring_axes")
    predictor.manual_initialization(
        network, plans, configuration, parameters, dataset_json, first["trainer_name"], axes
    )
    if predictor.network is not network and isinstance(network, HeadsMixin):
        network.compile_passes()  # nnUNet_compile: of networks here a pass is compiled, and not the loop around it
        predictor.network = network
