"""Do trained networks give the same masks on the CPU and on a GPU, in full and in mixed precision, compiled or not?"""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from tqdm import tqdm

from laboratory.benchmarking.host import build_network, create_trainer, make_batches, temporary_folders
from laboratory.benchmarking.problem import Problem
from nnunetv2_diffusion.diffusion import ContentNoise

COUNTED = 10  # steps whose mean loss is told, and steps whose synchronisations are counted
IMAGES = 4


@contextmanager
def noise_from_the_cpu() -> Iterator[None]:
    """Let every device use the noise that the CPU would draw: a device's own generator draws other numbers."""
    device: dict[ContentNoise, torch.device] = {}
    make = ContentNoise.__init__

    def init(self: ContentNoise, hashes: Sequence[int], seed: int, sample: int, where: torch.device) -> None:
        make(self, hashes, seed, sample, torch.device("cpu"))
        device[self] = where

    def moved(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda self, shape: draw(self, shape).to(device[self])

    with mock.patch.multiple(
        ContentNoise, __init__=init, __call__=moved(ContentNoise.__call__), uniform=moved(ContentNoise.uniform)
    ):
        yield


@contextmanager
def tensor_float_32(allowed: bool) -> Iterator[None]:
    """Whether convolutions on a GPU may round their operands to 10 bits; PyTorch lets them."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def train(trainer: nnUNetTrainer, steps: int) -> dict[str, Any]:
    """A few steps on made-up cases; losses of the first and the last ones, and how often a step waits for the GPU."""
    batches = make_batches(trainer, 8)
    with redirect_stdout(io.StringIO()):  # nnU-Net's log
        trainer.on_train_epoch_start()
    losses = [float(trainer.train_step(batches[i % len(batches)])["loss"]) for i in range(steps)]
    counted = min(COUNTED, steps)
    return {
        "steps": steps,
        "loss_first": sum(losses[:counted]) / counted,
        "loss_last": sum(losses[-counted:]) / counted,
        "synchronisations_per_step": _synchronisations(trainer, batches),
        "gradient_scale": trainer.grad_scaler.get_scale() if trainer.grad_scaler is not None else None,
    }


def _synchronisations(trainer: nnUNetTrainer, batches: list[dict]) -> float | None:
    """Waits of the CPU for the GPU within one training step, None without a GPU."""
    if trainer.device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for index in range(COUNTED):
                trainer.train_step(batches[index % len(batches)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught) / COUNTED


@torch.inference_mode()
def probabilities(network: nn.Module, images: torch.Tensor, autocast: bool = False) -> torch.Tensor:
    """Of the classes, (B, K, *spatial) in float32 on the CPU; images go through one by one, as tiles do."""
    device = next(network.parameters()).device
    context = torch.autocast(device.type) if autocast else nullcontext()
    with context, noise_from_the_cpu():
        logits = torch.cat([network(image[None].to(device)).float().cpu() for image in images])
    return logits.softmax(1)


def difference(found: torch.Tensor, expected: torch.Tensor) -> dict[str, Any]:
    """Voxels whose class differs, and the largest difference of a probability."""
    masks, reference = found.argmax(1), expected.argmax(1)
    return {
        "voxels": masks.numel(),
        "foreground": int((reference > 0).sum()),
        "differing": int((masks != reference).sum()),
        "largest_difference_of_a_probability": float((found - expected).abs().max()),
    }


def _variants(device: torch.device, compiled: bool) -> dict[str, tuple[bool, bool, bool]]:
    """Name: TF32 allowed, autocast, compiled."""
    variants = {"float32": (False, False, False)}
    if device.type == "cuda":
        variants |= {"float32 with TF32": (True, False, False), "autocast": (True, True, False)}
    return variants | ({"autocast, compiled": (True, True, True)} if compiled else {})


def compare(
    name: str, problem: Problem, weights: dict, images: torch.Tensor, steps: int | None, device: torch.device,
    compiled: bool,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """A trained network's masks of images (B, C, *spatial) on a device next to those of the CPU in float32.

    ``steps`` is K of the reverse process, None for a network without one; there is a result for every precision.
    """
    networks = [build_network(name, problem, torch.device(kind)) for kind in ("cpu", device.type)]
    for network in networks:
        network.load_state_dict(weights)
        if steps is not None:
            network.sampling = replace(network.sampling, steps=steps)
        if hasattr(network, "always_refine"):
            network.always_refine = True  # however well HiDiff's refiner did in so short a training
    expected = probabilities(networks[0], images)
    results = {}
    for variant, (tf32, autocast, compiles) in _variants(device, compiled).items():
        network = torch.compile(networks[1]) if compiles else networks[1]
        with tensor_float_32(tf32):
            results[variant] = difference(probabilities(network, images, autocast), expected)
    return results


def compare_all(
    names: Sequence[str], problem: Problem, train_steps: int, device: torch.device, compiled: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Train each trainer's network for some steps on the device, and compare its masks with the CPU's.

    ``compiled`` are names that are also compared compiled. A result has ``training`` (see ``train``), and ``masks`` by
    K and precision.
    """
    results = []
    for name in tqdm(names, desc="masks", unit="trainer"):
        with temporary_folders():
            trainer = create_trainer(name, problem, device)
            training = train(trainer, train_steps)
            weights = {key: value.cpu() for key, value in trainer.network.state_dict().items()}
            images = make_batches(trainer, 1)[0]["data"][:IMAGES].float()
            has_chain = getattr(build_network(name, problem, torch.device("cpu")), "sampling", None) is not None
            masks = {
                "-" if k is None else str(k): compare(name, problem, weights, images, k, device, name in compiled)
                for k in ((1, 3) if has_chain else (None,))
            }
        results.append({"trainer": name, "training": training, "masks": masks})
    return results
