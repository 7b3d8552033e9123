"""What is timed: a trainer's own training step, and ``network(image)`` as nnU-Net's predictor calls it."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from laboratory.benchmarking.timing import Stopwatch
from nnunetv2_diffusion.diffusion import SamplingConfig


class TrainingStep:
    """``trainer.train_step(batch)``: passes, loss, backward pass and optimiser.

    Args:
        name: of the trainer.
        trainer: initialised.
        batches: used in turn.
    """

    def __init__(self, name: str, trainer: nnUNetTrainer, batches: list[dict]):
        self.name = name
        self.trainer = trainer
        self.batches = batches

    def run(self, index: int) -> None:
        """One step on batch index, counted modulo the number of batches."""
        self.trainer.train_step(self.batches[index % len(self.batches)])

    def pass_seconds(self) -> None:
        """Not measured: passes, loss and backward pass belong together here."""

    def tensors(self) -> Iterable[torch.Tensor]:
        """Weights, their gradients and the optimiser's state."""
        yield from self.trainer.network.buffers()
        for parameter in self.trainer.network.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
        for name in ("optimizer", "segmentor_optimizer"):  # HiDiff has two
            states = getattr(self.trainer, name).state if hasattr(self.trainer, name) else {}
            for state in states.values():
                yield from (value for value in state.values() if isinstance(value, torch.Tensor))


class PassTimer:
    """Times every denoising pass of a network from within, by wrapping the function that the loop calls for it.

    Args:
        network: a ``DiffusionSegmentor``; it is changed.
        stopwatch: for the network's device.
    """

    def __init__(self, network: nn.Module, stopwatch: Stopwatch):
        self.stopwatch = stopwatch
        self.marks: list[tuple[Any, Any]] = []
        self._inner = network._run
        network._run = self._timed

    def _timed(self, *args: Any, **kwargs: Any) -> Any:
        start = self.stopwatch.mark()
        result = self._inner(*args, **kwargs)
        self.marks.append((start, self.stopwatch.mark()))
        return result

    def take(self) -> list[float]:
        """Seconds of each pass since the last call."""
        seconds = [self.stopwatch.between(*pair) for pair in self.marks]
        self.marks.clear()
        return seconds


class Prediction:
    """``network(image)`` in inference mode for a batch of one, under autocast on CUDA.

    Args:
        name: shown and used as key.
        network: in eval mode, without deep supervision.
        images: (1, C, *spatial) each, used in turn.
        sampling: set before every call; None for a network without a loop.
        passes: times the network's passes; None for a network without a loop.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        images: list[torch.Tensor],
        sampling: SamplingConfig | None = None,
        passes: PassTimer | None = None,
    ):
        self.name = name
        self.network = network
        self.images = images
        self.sampling = sampling
        self.passes = passes

    def _autocast(self) -> AbstractContextManager:
        device = self.images[0].device.type
        return torch.autocast(device, enabled=True) if device == "cuda" else nullcontext()

    @torch.inference_mode()
    def run(self, index: int) -> None:
        """Predict image index, counted modulo the number of images."""
        if self.sampling is not None:
            self.network.sampling = self.sampling
        with self._autocast():
            self.network(self.images[index % len(self.images)])

    def pass_seconds(self) -> list[float] | None:
        """Seconds of each pass of the last run.

        Raises:
            RuntimeError: if the loop made another number of passes than it was asked for.
        """
        if self.passes is None:
            return None
        seconds = self.passes.take()
        expected = self.sampling.steps * self.sampling.samples
        if len(seconds) != expected:
            raise RuntimeError(f"{self.name} made {len(seconds)} passes, expected {expected}")
        return seconds

    def tensors(self) -> Iterable[torch.Tensor]:
        """Weights."""
        yield from self.network.parameters()
        yield from self.network.buffers()
