"""The trainer of mixtures on a tiny data set."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
from tiny_model import CLASSES, make_plans

from nnunetv2_diffusion.training import DiffusionTrainer, MixedTrainer, RecycleXT, Standard

PATCH = (8, 12, 8)
DATASET = {"channel_names": {"0": "MR"}, "labels": CLASSES, "file_ending": ".nii.gz", "numTraining": 2}


class Recycling(DiffusionTrainer):
    strategy = RecycleXT()


class Denoising(DiffusionTrainer):
    strategy = Standard()


@pytest.fixture(scope="module")
def preprocessed(tmp_path_factory):
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
def make(preprocessed, monkeypatch):
    """Build and initialize a trainer: (class, settings)."""
    for kind in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setitem(os.environ, kind, str(preprocessed / kind))

    def build(cls, **settings):
        plans = make_plans(PATCH, [1.0] * len(PATCH), **settings)
        plans["continue_training"] = False
        torch.manual_seed(1)
        trainer = cls(plans, "only", "all", DATASET, torch.device("cpu"))
        trainer.initialize()
        return trainer

    return build


def batch():
    """Image (B, 1, *patch) and target."""
    return torch.randn(2, 1, *PATCH), torch.randint(0, 3, (2, 1, *PATCH), dtype=torch.int16)


def loss(trainer, image, target):
    torch.manual_seed(2)
    return trainer._training_loss(image, target)


@pytest.mark.parametrize(("share", "other"), [(1.0, Recycling), (0.0, Denoising)])
def test_a_mixture_of_one_kind_trains_as_that_kind_bit_for_bit(make, share, other):
    mixed, pure = make(MixedTrainer, mixture={"recycle_share": share, "truth_corruption": "none"}), make(other)
    image, target = batch()
    assert torch.equal(loss(mixed, image, target), loss(pure, image, target))


def test_settings_reach_the_strategy(make):
    trainer = make(MixedTrainer, mixture={"recycle_share": 0.2, "truth_corruption": "swap"})
    strategy = trainer.strategy
    assert (strategy.share, strategy.corruption.kind, strategy.corruption.regions) == (0.2, "swap", False)
    assert make(MixedTrainer).strategy.corruption.kind == "drop"
    assert torch.isfinite(loss(trainer, *batch()))
