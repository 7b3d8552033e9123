"""The line about a GPU's memory at the end of a training's log."""

import pytest
import torch

from nnunetv2_diffusion.training.host import PEAK_GPU_MEMORY, MemoryLog, PlannedTrainer
from nnunetv2_diffusion.training.trainer import BaselineTrainer


class Host:
    def __init__(self, device: str):
        self.device, self.lines = torch.device(device), []

    def print_to_log_file(self, line: str) -> None:
        self.lines.append(line)

    def on_train_end(self) -> None:
        self.lines.append("Training done.")


class Trainer(MemoryLog, Host):
    pass


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cuda:0", [f"{PEAK_GPU_MEMORY}: 123 bytes", "Training done."]), ("cpu", ["Training done."])],
)
def test_the_peak_is_told_on_a_gpu_only(monkeypatch, device, expected):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    trainer = Trainer(device)
    trainer.on_train_end()
    assert trainer.lines == expected


@pytest.mark.parametrize("trainer", [PlannedTrainer, BaselineTrainer])
def test_trainers_tell_it_before_nnunets_own_end(trainer):
    order = [c.__name__ for c in trainer.__mro__]
    assert order.index("MemoryLog") < order.index("nnUNetTrainer")
