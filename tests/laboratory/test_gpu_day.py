"""Rehearsal on a CPU of what runs on a GPU that is lent for half an hour."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT / "scripts"))

from laboratory.benchmarking.problem import synthetic_problem  # noqa: E402
from laboratory.gpu_day import masks  # noqa: E402
from laboratory.gpu_day.trainings import affordable_epochs, write_study  # noqa: E402
from nnunetv2_diffusion.diffusion import ContentNoise  # noqa: E402


@pytest.fixture
def problem():
    return synthetic_problem(patch=(16, 16, 16), batch=2, base_features=4, stages=3)


@pytest.mark.parametrize("name", ["nnUNetTrainer", "nnUNetTrainerRecycleXT", "nnUNetTrainerHiDiff"])
def test_a_device_agrees_with_itself(name, problem, monkeypatch):
    monkeypatch.setenv("nnUNet_compile", "f")
    (result,) = masks.compare_all([name], problem, 2, torch.device("cpu"))
    assert result["training"]["synchronisations_per_step"] is None
    assert set(result["masks"]) == ({"-"} if name == "nnUNetTrainer" else {"1", "3"})
    for precisions in result["masks"].values():
        assert precisions["float32"]["differing"] == 0
        assert precisions["float32"]["largest_difference_of_a_probability"] == 0


def test_differences_are_counted():
    expected = torch.tensor([[[0.8, 0.4, 0.1]], [[0.2, 0.6, 0.9]]]).movedim(0, 1)
    found = torch.tensor([[[0.8, 0.7, 0.1]], [[0.2, 0.3, 0.9]]]).movedim(0, 1)
    result = masks.difference(found, expected)
    assert (result["voxels"], result["foreground"], result["differing"]) == (3, 2, 1)
    assert result["largest_difference_of_a_probability"] == pytest.approx(0.3)


def test_noise_from_the_cpu_is_the_noise_of_the_cpu_and_leaves_the_class_as_it_was():
    expected = ContentNoise([5], 0, 0, torch.device("cpu"))((2, 3))
    with masks.noise_from_the_cpu():
        assert torch.equal(ContentNoise([5], 0, 0, torch.device("cpu"))((2, 3)), expected)
        assert ContentNoise([5], 0, 0, torch.device("meta"))((2, 3)).device.type == "meta"
    assert torch.equal(ContentNoise([5], 0, 0, torch.device("cpu"))((2, 3)), expected)


def test_trainings_fill_the_time_and_go_on_with_the_study_that_is_there(tmp_path):
    results = [{"trainer": "nnUNetTrainer", "seconds": {"median": 0.1}}]
    (tmp_path / "train_step_compiled.json").write_text(json.dumps({"results": results}))
    assert affordable_epochs(tmp_path, 240 + 10 * 4 * 0.1 * 250 * 1.1 + 1) == 10
    file = write_study(tmp_path, "cpu", 3, 0, tiny=True)
    assert json.loads(file.read_text())["settings"]["num_epochs"] == 3
    assert json.loads(write_study(tmp_path, "cpu", 5, 0, tiny=True).read_text())["settings"]["num_epochs"] == 3


@pytest.mark.slow
def test_the_whole_command_goes_on_where_it_stopped(tmp_path):
    command = [str(CHECKOUT / "scripts" / "gpu_day"), "-o", str(tmp_path), "--device", "cpu", "--tiny"]
    environment = {**os.environ, "NNUNETV2_DIFFUSION_ENV": "active", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    subprocess.run([*command, "--parts", "train_step"], env=environment, check=True)
    before = (tmp_path / "train_step.json").read_text()
    subprocess.run(command, env=environment, check=True)
    assert (tmp_path / "train_step.json").read_text() == before
    assert {"masks", "train_step_compiled", "train_step_large", "predict", "memory"} <= {
        file.stem for file in tmp_path.glob("*.json")
    }
