"""Trainers of a tiny data set that has no cases: for their losses and their networks, without nnU-Net's loaders."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
from tiny_model import CLASSES, make_plans

PATCH = (8, 12, 8)
DATASET = {"channel_names": {"0": "MR"}, "labels": CLASSES, "file_ending": ".nii.gz", "numTraining": 2}


@pytest.fixture(scope="module")
def preprocessed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with the name of a case, from which nnU-Net tells how cases are stored."""
    root = tmp_path_factory.mktemp("project")
    for kind in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (root / kind).mkdir()
    folder = root / "nnUNet_preprocessed" / "Dataset903_Random"
    (folder / "only").mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(DATASET))
    (folder / "only" / "case.npz").touch()
    return root


@pytest.fixture
def make(preprocessed: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., nnUNetTrainer]:
    """Build and initialize a trainer: (class, --c, settings); patches are 8 x 12 x 8, with two classes."""
    for kind in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setitem(os.environ, kind, str(preprocessed / kind))

    def build(cls: type[nnUNetTrainer], continue_training: bool = False, **settings: object) -> nnUNetTrainer:
        for log in (preprocessed / "nnUNet_results").rglob("training_log_*"):
            log.unlink()  # their names tell seconds: two trainers of one would share a file
        plans = make_plans(PATCH, [1.0] * len(PATCH), **settings)
        plans["continue_training"] = continue_training
        torch.manual_seed(1)
        trainer = cls(plans, "only", "all", DATASET, torch.device("cpu"))
        trainer.initialize()
        return trainer

    return build
