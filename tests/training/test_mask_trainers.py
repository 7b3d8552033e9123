"""The trainer of mixtures on a tiny data set."""

import pytest
import torch

from nnunetv2_diffusion.training import DiffusionTrainer, MixedTrainer, RecycleXT, Standard

PATCH = (8, 12, 8)


class Recycling(DiffusionTrainer):
    strategy = RecycleXT()


class Denoising(DiffusionTrainer):
    strategy = Standard()


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
