"""What the fence runs, by public entry points alone: the classes by name, nnU-Net's predictor, ``load_model``.

No module of the package is named here but ``nnunetv2_diffusion`` itself, so that its inside can be moved freely. Of a
network, only nnU-Net's contract is used: ``build_network_architecture``, ``state_dict``, ``load_state_dict``.
"""

import importlib.util
import io
import json
import lzma
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from torch.nn import functional as F

from nnunetv2_diffusion import load_model, predict_image

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CASES = HERE / "cases"
CHECKPOINT = "checkpoint_final.pth"
INSTALLED = "nnunetv2.training.nnUNetTrainer.variants.diffusion"  # where pip puts the trainers
CROP = 8  # voxels along an axis, of which probabilities are stored


# --- surroundings ----------------------------------------------------------------------------------------------------


def use_checkout(patch: pytest.MonkeyPatch, root: Path) -> None:
    """nnU-Net's folders below ``root``; its search for trainers finds those of this checkout, not installed ones."""
    for name in [name for name in os.environ if name.lower().startswith("nnunet")]:
        patch.delenv(name)
    for kind in ("raw", "preprocessed", "results"):
        (root / kind).mkdir(parents=True, exist_ok=True)
        patch.setenv(f"nnUNet_{kind}", str(root / kind))
    patch.setenv("nnUNet_extTrainer", str(REPOSITORY / "trainers"))
    patch.setenv("nnUNet_compile", "f")
    if importlib.util.find_spec(INSTALLED):
        for name in [name for name in sys.modules if name.startswith(f"{INSTALLED}.")]:
            patch.delitem(sys.modules, name)
        patch.setattr(importlib.import_module(INSTALLED), "__path__", [str(REPOSITORY / "trainers")])


def host_folder(kind: str) -> Path:
    """One of nnU-Net's folders: raw, preprocessed or results."""
    return Path(os.environ[f"nnUNet_{kind}"])


@contextmanager
def environment(**settings: int | str) -> Iterator[None]:
    """Overrides ``nnUNet_diffusion_<name>`` for the time of a block."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(f"nnUNet_diffusion_{name}", str(value))
        yield


def faces() -> list[str]:
    """Names of all trainers of the checkout, whatever their files are called."""
    return sorted(name for file in (REPOSITORY / "trainers").glob("*.py") for name in _classes(file))


def find_planner(name: str) -> type:
    """A planner of the checkout, whatever its file is called."""
    for file in sorted((REPOSITORY / "plans").glob("*.py")):
        if name in _classes(file):
            spec = importlib.util.spec_from_file_location(file.stem, file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return getattr(module, name)
    raise LookupError(f"no planner {name} in {REPOSITORY / 'plans'}")


def _classes(file: Path) -> list[str]:
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return [line[len("class ") :].split("(")[0] for line in lines if line.startswith("class nnUNet")]


# --- fixed numbers ---------------------------------------------------------------------------------------------------


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers that depend on a name alone; NumPy has frozen this stream."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def fixed_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights that follow from names and shapes, none of them at an identity; exact in bfloat16.

    Integers, extra state and all else that is no floating point tensor stay.
    """
    weights = {}
    for name, value in state.items():
        if not value.is_floating_point():
            weights[name] = value.clone()
            continue
        n = normal(name.replace("decoder.encoder.", "encoder."), tuple(value.shape))  # nnU-Net's has two names
        for axis in range(2, value.ndim):  # nearly the same when mirrored, as what was trained with mirroring is
            n = 0.7 * (n + np.flip(n, axis)) + 0.15 * n
        fan_in = value.numel() // max(len(value), 1) if value.ndim else 1
        if fan_in > 1:
            new = n * np.sqrt(1.5 / fan_in)
        elif name.endswith("running_var"):
            new = 1 + 0.2 * np.abs(n)
        elif name.endswith((".bias", "running_mean")):
            new = 0.2 * n
        else:
            new = value.numpy() + 0.2 * n
        weights[name] = torch.from_numpy(np.asarray(new)).bfloat16().to(value.dtype)
    return weights


def make_image(name: str, channels: int, shape: tuple[int, ...]) -> np.ndarray:
    """Two blobs on noise, (channels, *shape), exact in half precision."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    image = 0.5 * normal(name, (channels, *shape))
    for middle, radius in ((-0.3, 0.6), (0.5, 0.4)):
        image += 2 * (((grid - middle) ** 2).sum(0) < radius**2)
    return image.astype(np.float16).astype(np.float32)


def make_batch(trainer: object, name: str, labels: int) -> dict:
    """A batch as nnU-Net's loader gives it: nested boxes of labels 1 .. labels, on noise."""
    patch, size = trainer.configuration_manager.patch_size, trainer.batch_size
    truth = np.zeros((size, 1, *patch), np.int16)
    for label in range(1, labels + 1):
        for sample in range(size):
            box = tuple(slice(label + sample, n - 2 * label - sample) for n in patch)
            truth[(sample, 0, *box)] = label
    target = torch.from_numpy(truth)
    image = target
    if trainer.label_manager.has_regions:  # as nnU-Net's augmentation gives them, a channel each
        regions = trainer.label_manager.foreground_regions
        target = torch.cat([torch.isin(target, torch.tensor(region)) for region in regions], 1).to(torch.int16)
    noise = torch.from_numpy(normal(f"batch {name}", (size, trainer.num_input_channels, *patch))).float()
    batch = {"data": noise + image, "target": target, "keys": [f"case_{i}" for i in range(size)]}
    scales = trainer._get_deep_supervision_scales()
    if scales is not None:
        sizes = [[round(n * s) for n, s in zip(patch, scale, strict=True)] for scale in scales]
        batch["target"] = [F.interpolate(target.float(), shape).to(torch.int16) for shape in sizes]
    return batch


# --- models on disk --------------------------------------------------------------------------------------------------


def read_case(name: str) -> dict:
    """What is asked of a case, and what came out of it."""
    return json.loads((CASES / name / "case.json").read_text(encoding="utf-8"))


def unpack(name: str, folder: Path) -> Path:
    """The model of a case as nnU-Net's training leaves it; returns its folder."""
    case, packed = read_case(name), CASES / name
    model = folder / name / f"{case['trainer']}__fence__{case['configuration']}"
    model.mkdir(parents=True)
    for file in ("plans.json", "dataset.json"):
        (model / file).write_bytes((packed / file).read_bytes())
    for file in sorted(packed.glob("fold_*.pth.xz")):
        target = model / file.name.removesuffix(".pth.xz")
        target.mkdir()
        content = lzma.decompress(file.read_bytes())
        if case["generated"]:
            content = _with_generated(content, json.loads((packed / "weights.json").read_text(encoding="utf-8")))
        (target / CHECKPOINT).write_bytes(content)
    return model


def _with_generated(content: bytes, shapes: dict[str, list[int]]) -> bytes:
    """A checkpoint with the weights that are too many to be stored: they follow from their names."""
    checkpoint = torch.load(io.BytesIO(content), weights_only=False)
    weights = fixed_weights({key: torch.full(shape, 1.0) for key, shape in shapes.items()})
    checkpoint["network_weights"] = {**weights, **checkpoint["network_weights"]}
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return file.getvalue()


# --- predictions -----------------------------------------------------------------------------------------------------


def crop(array: np.ndarray) -> np.ndarray:
    """The middle of the last three axes, in half precision."""
    middle = [slice(max(0, n // 2 - CROP // 2), n // 2 + CROP // 2) for n in array.shape[-3:]]
    return array[(..., *middle)].astype(np.float16)


def is_clear(p: np.ndarray, margin: float = 2e-3) -> np.ndarray:
    """Where the largest probability (K, z, y, x) leads by a margin, or those of regions are not at one half.

    HiDiff's estimates of two classes can both be 1; which one nnU-Net's sums in half precision then put first says
    nothing.
    """
    if np.abs(p.sum(0) - 1).max() > 1e-2:  # regions
        return (np.abs(p - 0.5) > margin).all(0)
    largest = np.sort(p, 0)
    return largest[-1] - largest[-2] > margin


def run_stock(model: Path, image: np.ndarray, spacing: list[float], run: dict) -> dict[str, np.ndarray]:
    """nnU-Net's own predictor.

    Args:
        model: folder.
        image: (C, z, y, x).
        spacing: of the image, as nnU-Net's readers give it.
        run: ``environment``, the overrides; ``mirror``.

    Returns:
        mask (z, y, x) and the middle of the probabilities (K, z, y, x); where the mask is no tie, see ``is_clear``.
    """
    predictor = nnUNetPredictor(
        use_mirroring=run["mirror"], perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
    )
    with environment(**run["environment"]), redirect_stdout(io.StringIO()):
        predictor.initialize_from_trained_model_folder(str(model), None, CHECKPOINT)
        mask, p = predictor.predict_single_npy_array(image, {"spacing": spacing}, save_or_return_probabilities=True)
    return {"mask": mask.astype(np.uint8), "probabilities": crop(p), "clear": is_clear(p)}


def describe(values: np.ndarray) -> list[float]:
    """Mean, standard deviation, median and 95th percentile."""
    return [float(x) for x in (values.mean(), values.std(), *np.quantile(values, [0.5, 0.95]))]


def run_own(model: Path, image: np.ndarray, spacing: list[float], run: dict) -> tuple[dict[str, np.ndarray], dict]:
    """``predict_image`` with the options of a run: its mask; and what its maps and its summary say."""
    with redirect_stdout(io.StringIO()):
        predictor = load_model(model)
        planar = len(predictor.configuration_manager.patch_size) == 2 and image.shape[1] == 1
        given = (image[:, 0], spacing[1:]) if planar else (image, spacing)
        found = predict_image(predictor, given[0], spacing=given[1], keep_samples=True, **run["options"])
    maps = {
        kind: [float(x) for x in (m.mean(), m.std(), *np.quantile(m, [0.5, 0.95]))] for kind, m in found.maps.items()
    }
    told = {"maps": maps, "agreement": found.agreement, "samples": len(found.samples)}
    return {"mask": found.mask.reshape(image.shape[1:]).astype(np.uint8)}, told


# --- training --------------------------------------------------------------------------------------------------------


def make_trainer(name: str, plans: dict, dataset: dict, configuration: str) -> object:
    """A trainer as ``nnUNetv2_train`` makes it, initialized; nnU-Net's folders are those of the environment."""
    plans = json.loads(json.dumps(plans))
    data = host_folder("preprocessed") / plans["dataset_name"]
    cases = data / plans["configurations"][configuration]["data_identifier"]
    cases.mkdir(parents=True, exist_ok=True)
    (cases / "case.npz").touch()  # nnU-Net tells from it how cases are stored
    (data / "dataset.json").write_text(json.dumps(dataset))
    for log in host_folder("results").rglob("training_log_*"):
        log.unlink()  # their names tell seconds: two trainers of one would share a file
    plans["continue_training"] = False
    with redirect_stdout(io.StringIO()):
        torch.manual_seed(0)
        trainer = recursive_find_trainer_class_by_name(name)(plans, configuration, 0, dataset, torch.device("cpu"))
        trainer.initialize()
    return trainer


def train_once(trainer: object, weights: dict, name: str, labels: int, steps: int = 1) -> dict[str, float | str]:
    """A step from given weights, or some: the last one's loss, and how far and by what the weights were moved.

    Args:
        trainer: initialized.
        weights: of its network.
        name: of the batch.
        labels: foreground labels in the batch.
        steps: of the optimiser, all with the same batch.
    """
    network = trainer.network
    network.load_state_dict(weights)
    before = [p.detach().clone() for p in network.parameters()]
    with redirect_stdout(io.StringIO()):
        trainer.on_train_epoch_start()
        torch.manual_seed(3)
        for _ in range(steps):
            output = trainer.train_step(make_batch(trainer, name, labels))
    moved = [
        (p.detach() - start).double().square().sum() for p, start in zip(network.parameters(), before, strict=True)
    ]
    return {
        "loss": float(output["loss"]),
        "moved": float(torch.stack(moved).sum().sqrt()),
        "optimizer": type(trainer.optimizer).__name__,
        "rate": float(trainer.optimizer.param_groups[0]["lr"]),
    }
