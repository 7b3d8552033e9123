"""The trainers of views and mixtures: what they load, what each pass sees, and what is learnt, on a tiny data set."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetNumpy

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
from tiny_model import CLASSES, make_plans

from nnunetv2_diffusion.training import DiffusionTrainer, MixedTrainer, RecycleXT, Standard, ViewTrainer
from nnunetv2_diffusion.training.views import Frame, Views

PATCHES = {"2d": (12, 8), "3d": (8, 12, 8)}
DATASET = {"channel_names": {"0": "MR"}, "labels": CLASSES, "file_ending": ".nii.gz", "numTraining": 2}
LENGTHS = {"num_iterations_per_epoch": 2, "num_epochs": 1, "num_val_iterations_per_epoch": 1}


class Recycling(DiffusionTrainer):
    strategy = RecycleXT()


class Denoising(DiffusionTrainer):
    strategy = Standard()


@pytest.fixture(scope="module")
def preprocessed(tmp_path_factory):
    """Two cases as nnU-Net stores them; the image is ten times the label."""
    root = tmp_path_factory.mktemp("project")
    for kind in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (root / kind).mkdir()
    folder = root / "nnUNet_preprocessed" / "Dataset903_Random"
    (folder / "only").mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(DATASET))
    for index in range(2):
        seg = np.zeros((1, 10, 14, 9), np.int16)
        seg[:, 2:7, 3:9, 2:6], seg[:, 3:5, 4:6, 3:5] = 1, 2
        places = {k: np.argwhere(seg == k) for k in (1, 2)}
        case = str(folder / "only" / f"case_{index}")
        nnUNetDatasetNumpy.save_case(10.0 * seg.astype(np.float32), seg, {"class_locations": places}, case)
    return root


@pytest.fixture
def make(preprocessed, monkeypatch):
    """Build and initialize a trainer: (class, dimensions, settings)."""
    for kind in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setitem(os.environ, kind, str(preprocessed / kind))
    monkeypatch.setitem(os.environ, "nnUNet_n_proc_DA", "0")

    def build(cls, dims="3d", **settings):
        plans = make_plans(PATCHES[dims], [1.0] * len(PATCHES[dims]), **{**LENGTHS, **settings})
        plans["continue_training"] = False
        torch.manual_seed(1)
        trainer = cls(plans, "only", "all", DATASET, torch.device("cpu"))
        trainer.initialize()
        return trainer

    return build


def batch(trainer, margin=0):
    """Image (B, 1, *loaded) and target, as loaded with so many voxels around the patch."""
    size = [n + 2 * margin for n in trainer.configuration_manager.patch_size]
    target = torch.randint(0, 3, (2, 1, *size), dtype=torch.int16)
    return torch.randn(2, 1, *size), target


def loss(trainer, image, target):
    torch.manual_seed(2)
    return trainer._training_loss(image, target)


def spied(trainer):
    """Notes what every pass is given."""
    passes, original = [], trainer.network.forward

    def forward(image, x_t=None, t=None, estimate=None, full_resolution_only=False):
        passes.append((image, x_t, torch.is_grad_enabled()))
        return original(image, x_t, t, estimate, full_resolution_only)

    trainer.network.forward = forward
    return passes


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", PATCHES)
@pytest.mark.parametrize("recipe", ["paper", "nnunet"])
def test_training_loads_more_and_validation_the_planned_patch(make, dims, recipe):
    trainer, patch = make(ViewTrainer, dims, recipe=recipe, views={"zoom": 2.0}), PATCHES[dims]
    training, validation = trainer.get_dataloaders()
    assert trainer.loaded_size == tuple(2 * n for n in patch)
    loaded, validated = next(training), next(validation)
    assert loaded["data"].shape[2:] == loaded["target"].shape[2:] == trainer.loaded_size
    assert validated["data"].shape[2:] == patch
    heads = validated["target"]
    expected = [h.shape for h in heads] if isinstance(heads, list) else heads.shape
    found = trainer._patch_target(loaded["target"])
    assert ([h.shape for h in found] if isinstance(found, list) else found.shape) == expected
    assert np.isfinite(trainer.train_step(loaded)["loss"])


def test_without_views_beyond_the_patch_loading_is_nnunets(make):
    trainer = make(ViewTrainer, recipe="nnunet", views={"coarse": 0.0})
    plain = make(Recycling, recipe="nnunet")
    found, expected = (
        t.configure_rotation_dummyDA_mirroring_and_inital_patch_size() for t in (trainer, plain)
    )  # fmt: skip
    assert tuple(found[2]) == tuple(expected[2])
    assert isinstance(next(trainer.get_dataloaders()[0])["target"], list)


def test_patch_and_target_are_cut_at_the_same_place(make):
    trainer = make(ViewTrainer, recipe="nnunet")
    target = torch.randint(0, 3, (2, 1, 16, 24, 16), dtype=torch.int16)
    heads, image = trainer._patch_target(target), trainer._patch(10.0 * target)
    assert torch.equal(image, 10.0 * heads[0])
    assert torch.equal(heads[0], target[..., 4:12, 6:18, 4:12])
    assert [tuple(h.shape[2:]) for h in heads] == [(8, 12, 8), (4, 6, 4)]
    assert heads[1].dtype == target.dtype


# --- passes ----------------------------------------------------------------------------------------------------------


class Shifted(Views):
    """Always the same view, a crop shifted by half a patch along the first axis: where it reaches is easy to tell."""

    def draw(self, size):
        return Frame((4, 0, 0), tuple(size), tuple(size))


def test_each_pass_sees_its_own_crop(make):
    trainer = make(ViewTrainer)
    trainer.strategy = type(trainer.strategy)(Shifted())
    image, target = batch(trainer, margin=4)
    passes = spied(trainer)
    loss(trainer, image, target)
    (first, _, first_learns), (second, _, second_learns) = passes
    assert torch.equal(first, image[..., 8:16, 4:16, 4:12])
    assert torch.equal(second, image[..., 4:12, 4:16, 4:12])
    assert (first_learns, second_learns) == (True, True)


def test_what_the_patch_does_not_show_reaches_its_mask(make, wake):
    trainer = make(ViewTrainer)
    wake(trainer.network)
    trainer.strategy = type(trainer.strategy)(Shifted())
    image, target = batch(trainer, margin=4)
    other = image.clone()
    other[..., 12:16, 4:16, 4:12] += 5  # behind the patch, within the view
    unseen = image.clone()
    unseen[..., 0:4, :, :] += 5  # before the patch, where the view does not reach
    masks = []
    for changed in (image, other, unseen):
        passes = spied(trainer)
        loss(trainer, changed, target)
        assert torch.equal(passes[1][0], image[..., 4:12, 4:16, 4:12])
        masks.append(passes[1][1])
        trainer.network.forward = type(trainer.network).forward.__get__(trainer.network)
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0][..., 4:, :, :], masks[1][..., 4:, :, :])
    assert torch.equal(masks[0][..., :4, :, :], masks[1][..., :4, :, :]), "pure noise where the view does not reach"


@pytest.mark.parametrize("recipe", ["paper", "nnunet"])
@pytest.mark.parametrize("coarse", [0.0, 1.0])
def test_the_first_pass_learns_from_pure_noise_and_leaves_the_mask_alone(make, coarse, recipe):
    trainer = make(ViewTrainer, recipe=recipe, views={"coarse": coarse, "zoom": 1.5})
    margin = 3 if coarse else 0
    image, target = batch(trainer, margin)
    given = [target, target[..., ::2, ::2, ::2]] if recipe == "nnunet" and not margin else target
    name = "per_sample" if hasattr(trainer.loss, "per_sample") else "forward"
    passes, targets, original, compute = [], [], trainer.network.forward, getattr(trainer.loss, name)
    trainer.network.forward = lambda *inputs: (passes.append(inputs), original(*inputs))[1]
    setattr(trainer.loss, name, lambda output, heads: (targets.append(heads), compute(output, heads))[1])
    total = loss(trainer, image, given)
    total.backward()
    found = [p.grad.clone() for p in trainer.network.parameters() if p.grad is not None]
    trainer.network.zero_grad(set_to_none=True)
    assert len(passes) == len(targets) == 2
    assert not passes[1][1].requires_grad, "the mask"
    assert passes[0][2].tolist() == [1000, 1000]
    assert abs(float(passes[0][1].mean())) < 0.1
    assert abs(float(passes[0][1].std()) - 1) < 0.1
    losses = [compute(original(*inputs), heads).mean() for inputs, heads in zip(passes, targets, strict=True)]
    expected = sum(losses) / 2
    expected.backward()
    torch.testing.assert_close(total.detach(), expected.detach())
    torch.testing.assert_close(found, [p.grad for p in trainer.network.parameters() if p.grad is not None])
    own, plain = (heads[0] if isinstance(heads, list) else heads for heads in targets)
    assert own.shape == plain.shape
    assert torch.equal(own, plain) == (not coarse)
    assert torch.equal(passes[0][0], passes[1][0]) == (not coarse)
    assert torch.equal(passes[1][0], trainer._patch(image))


def test_the_target_of_a_coarse_pass_is_that_of_its_view(make):
    trainer = make(ViewTrainer, recipe="nnunet", views={"coarse": 1.0, "zoom": 2.0})
    _, target = batch(trainer, 6)
    target[...] = torch.arange(target.shape[-1]) * 3 // target.shape[-1]  # 0, 1, 2 from left to right
    found = []
    trainer.loss = lambda output, heads: (found.append(heads), output[0].sum())[1]
    trainer._training_loss(10.0 * target, target)
    heads = found[0]
    assert [tuple(h.shape[2:]) for h in heads] == [(8, 12, 8), (4, 6, 4)]
    assert heads[0].dtype == target.dtype
    columns = heads[0][0, 0, 0, 0]
    assert columns.unique().tolist() == [0, 1, 2], "it covers more than the patch, whose columns are of one label"
    assert found[1][0][0, 0, 0, 0].unique().numel() < 3


def test_true_masks_become_fewer_and_end(make):
    trainer = make(ViewTrainer, views={"truth_until": 0.5})
    trainer.num_epochs, shares = 8, []
    for epoch in range(8):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        shares.append(trainer.strategy.truth_share)
    assert shares == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]


def times_of_second_passes(trainer, number):
    image, target = batch(trainer)
    times, original = [], trainer.network.forward
    trainer.network.forward = lambda image, x_t, t, *more: (times.append(t.tolist()), original(image, x_t, t, *more))[1]
    for _ in range(number):
        trainer._training_loss(image, target)
    assert all(t == [1000, 1000] for t in times[::2])
    return [t for pair in times[1::2] for t in pair]


def test_the_second_pass_is_shown_times_below_the_share_alone(make):
    seen = times_of_second_passes(make(ViewTrainer, views={"coarse": 0.0, "time_below": 0.5, "noise_share": 0.0}), 20)
    assert 250 < max(seen) < 501
    assert min(seen) < 250


def test_a_second_pass_can_be_shown_noise_alone(make):
    trainer = make(ViewTrainer, views={"coarse": 0.0, "noise_share": 1.0})
    assert set(times_of_second_passes(trainer, 3)) == {1000}


def test_a_share_of_batches_is_shown_noise_alone(make):
    trainer = make(ViewTrainer, views={"noise_share": 0.25})
    noise = sum(trainer._draw_time_range() == (1000, 1001) for _ in range(1000))
    assert 200 < noise < 300


# --- mixtures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "other"), [(1.0, Recycling), (0.0, Denoising)])
def test_a_mixture_of_one_kind_trains_as_that_kind_bit_for_bit(make, share, other):
    mixed, pure = make(MixedTrainer, mixture={"recycle_share": share}), make(other)
    image, target = batch(mixed)
    assert torch.equal(loss(mixed, image, target), loss(pure, image, target))


def test_settings_reach_the_strategy_and_the_sampler(make):
    given = {"recycle_share": 0.2, "truth_above": 0.4, "truth_corruption": "swap", "mask_scale": 0.5}
    trainer = make(MixedTrainer, mixture=given)
    strategy = trainer.strategy
    assert (strategy.share, strategy.truth_above, strategy.mask_scale) == (0.2, 0.4, 0.5)
    assert (strategy.corruption.kind, strategy.corruption.regions) == ("swap", False)
    assert trainer.network.mask_scale == 0.5
    assert make(Recycling, mixture=given).network.mask_scale == 1, "other trainers are left alone"
    assert torch.isfinite(loss(trainer, *batch(trainer)))
