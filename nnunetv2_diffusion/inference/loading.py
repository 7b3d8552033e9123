"""A predictor from nnU-Net's folder of a trained model."""

from collections.abc import Sequence
from pathlib import Path

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_diffusion.checkpoint_files import whole_neighbour
from nnunetv2_diffusion.checkpoints import (
    CheckpointError,
    build_network,
    check_plans,
    load_checkpoint_file,
    load_weights,
    read_model_json,
    validated,
)
from nnunetv2_diffusion.inference.devices import check_device
from nnunetv2_diffusion.inference.options import PredictionOptions
from nnunetv2_diffusion.inference.predictor import DiffusionPredictor

MOST_NAMED = 5  # in a message


def find_folds(folder: Path, folds: Sequence[int | str] | None, checkpoint: str) -> list[Path]:
    """Checkpoints of the folds, all that have one if folds is None.

    Raises:
        CheckpointError: if there is none, or one is missing, naming what there is.
    """
    if folder.is_file():
        install = f"; type: nnUNetv2_install_pretrained_model_from_zip {folder}" if folder.suffix == ".zip" else ""
        raise CheckpointError(f"{folder}: a file, expected the folder of a trained model of nnU-Net{install}")
    if not folder.is_dir():
        beside = sorted(f.name for f in folder.parent.glob("*__*__*") if f.is_dir())
        there = f"; there are {', '.join(beside[:MOST_NAMED])}" if beside else ""
        raise CheckpointError(f"{folder}: no such folder, expected a trained model of nnU-Net{there}")
    if Path(checkpoint).name != checkpoint:
        raise CheckpointError(f"-chk {checkpoint}: expected the name of a file in the folders of the folds")
    _check_folder(folder)
    present = sorted(p.parent.name.removeprefix("fold_") for p in folder.glob(f"fold_*/{checkpoint}"))
    if folds is None:
        folds = [f for f in present if f != "all"] or present
    missing = [str(f) for f in folds if str(f) not in present]
    if missing or not folds:
        found = f"there is {checkpoint} in fold {', '.join(present)}" if present else f"no fold has a {checkpoint}"
        raise CheckpointError(f"{folder}: no {checkpoint} for fold {', '.join(missing) or '0, 1, ...'}; {found}")
    return [folder / f"fold_{f}" / checkpoint for f in folds]


def _check_folder(folder: Path) -> None:
    """Raise if a folder holds no folds, with what it is in nnU-Net's terms."""
    if any(f.is_dir() for f in folder.glob("fold_*")):
        return
    expected = "expected nnU-Net's TRAINER__PLANS__CONFIGURATION with fold_0, fold_1, ... in it"
    models = sorted(f.parent for pattern in ("*/fold_*", "*/*/fold_*") for f in folder.glob(pattern) if f.is_dir())
    if folder.name.startswith("fold_"):
        raise CheckpointError(f"{folder}: a single fold; give its parent folder, and -f {folder.name[5:]}")
    raise CheckpointError(f"{folder}: no fold in it, {expected}" + (f", as {models[0]}" if models else ""))


def _read(file: Path) -> dict:
    """A checkpoint; the error of one that was cut off names the whole one beside it."""
    try:
        return load_checkpoint_file(file)
    except CheckpointError as error:
        other = whole_neighbour(file)
        if other is None:
            raise
        raise CheckpointError(f"{error}. {other.name} beside it is whole: use it with -chk {other.name}") from error


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
    """A predictor that is ready; nothing that the model's files hold or name is run, but nnU-Net's own classes.

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
        UnsupportedArchitectureError: the plans name or number what is not allowed.
        OptionError: the model cannot do what is asked for, or there is no such device.
    """
    check_device(device)
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
    content, dataset_json = read_model_json(folder / "plans.json"), read_model_json(folder / "dataset.json")
    checkpoints = [validated(_read(file), file) for file in files]
    first = checkpoints[0]
    name = first["init_args"]["configuration"]
    check_plans(content, name, dataset_json, folder)
    plans = PlansManager(content)
    configuration = plans.get_configuration(name)
    network = build_network(first["trainer_name"], plans, configuration, dataset_json)
    parameters = [c["network_weights"] for c in checkpoints]
    for file, weights in reversed(list(zip(files, parameters, strict=True))):
        load_weights(network, weights, file)
    axes = first.get("inference_allowed_mirroring_axes")
    predictor.manual_initialization(
        network, plans, configuration, parameters, dataset_json, first["trainer_name"], axes
    )
    if predictor.network is not network and hasattr(network, "compile_passes"):
        network.compile_passes()  # nnUNet_compile: of networks here a pass is compiled, and not the loop around it
        predictor.network = network
