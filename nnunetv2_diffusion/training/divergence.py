"""A training that diverges: steps that would spoil the weights are left out, and after too many of them it stops."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import distributed as dist

SMALLEST_SCALE = 1.0  # a grad scaler that is below it still overflows: the fault is not the scale


class DivergedError(RuntimeError):
    """Losses, gradients or weights are no longer finite."""


class StepGuard:
    """Leaves out optimiser steps whose gradients are not finite, and counts them.

    A grad scaler leaves them out by itself; without one a hook of the optimiser does. A loss that is not finite
    reaches the gradients by ``backward_seed``. In distributed training gradients are the same in all processes, so
    all leave out the same steps.

    Args:
        limit: steps left out in a row, of one optimiser, after which ``judge`` says stop.

    Attributes:
        left_out: steps left out since ``end_epoch``; those in which a grad scaler looks for its scale do not count.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.left_out = 0
        self._in_a_row: dict[torch.optim.Optimizer, int] = {}
        self._taken = False

    def watch(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
        """Hook an optimiser before its first step; later calls do nothing."""
        if optimizer not in self._in_a_row:
            self._in_a_row[optimizer] = 0
            scaled = scaler is not None and scaler.is_enabled()  # step() is then called for finite gradients only
            optimizer.register_step_pre_hook(self._taken_by_scaler if scaled else self._look)

    def _taken_by_scaler(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._taken = True

    def _look(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._taken = bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))
        if not self._taken:
            optimizer.zero_grad(set_to_none=True)  # optimisers leave parameters without gradient alone

    def judge(
        self, optimizer: torch.optim.Optimizer, loss: torch.Tensor, scaler: torch.amp.GradScaler | None = None
    ) -> bool:
        """After a step that was taken or left out: whether the training is to stop.

        Args:
            optimizer: that was to step.
            loss: of this step, scalar.
            scaler: the grad scaler, if there is one.
        """
        taken, self._taken = self._taken, False
        if taken:
            self._in_a_row[optimizer] = 0
            return False
        if scaler is not None and self._is_searching(loss, scaler):
            return False
        self.left_out += 1
        self._in_a_row[optimizer] += 1
        return self._in_a_row[optimizer] >= self.limit

    @staticmethod
    def _is_searching(loss: torch.Tensor, scaler: torch.amp.GradScaler) -> bool:
        """The loss is finite in all processes, and the scaler may still be too large for half precision."""
        searching = torch.isfinite(loss) & (scaler.get_scale() >= SMALLEST_SCALE)
        if dist.is_available() and dist.is_initialized():  # all are here: they left out the same step
            searching = searching.float()
            dist.all_reduce(searching, dist.ReduceOp.MIN)
        return bool(searching)

    def end_epoch(self) -> int:
        """Number of steps left out since the last call."""
        left_out, self.left_out = self.left_out, 0
        return left_out


def backward_seed(loss: torch.Tensor) -> torch.Tensor:
    """Gradient to start a backward pass with: 1, or NaN for a loss that is not finite.

    The gradients then are not finite either, which a grad scaler and the other processes of a distributed training
    see without a further look at the loss.
    """
    return torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan).to(loss.dtype)


def describe_not_finite(state: Mapping[str, Any]) -> str | None:
    """Which weights or statistics of a state dict are not finite, in a clause; None if all are."""
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    if not tensors:
        return None
    finite = torch.stack([torch.isfinite(v).all() for v in tensors.values()]).tolist()  # one wait for a GPU
    bad = [key for key, good in zip(tensors, finite, strict=True) if not good]
    return f"{len(bad)} of {len(tensors)} tensors are not finite, the first is {bad[0]}" if bad else None
