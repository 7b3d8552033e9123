"""The trainers in this process, on preprocessed data: what no command shows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_project import batch_for, tiny_plans

from nnunetv2_diffusion.checkpoints import load_checkpoint_file
from nnunetv2_diffusion.settings import SettingsError
from nnunetv2_diffusion.training import label_scan
from nnunetv2_diffusion.training.divergence import DivergedError

STRATEGIES = ["DiffSeg", "SelfCondXt", "SelfCondXtPlus1", "RecycleXtPlus1", "RecycleXT"]


@pytest.mark.parametrize(
    ("name", "recipe", "encoding"),
    [
        *[
            (name, recipe, "one-hot")
            for name in (*STRATEGIES, "NoDiff", "RecycleScore")
            for recipe in ("nnunet", "paper")
        ],
        *[(name, "paper", "analog-bits") for name in STRATEGIES],
    ],
)
def test_every_trainer_learns_a_simple_task(make_trainer, name, recipe, encoding):
    trainer = make_trainer(name, recipe=recipe, mask_encoding=encoding, num_iterations_per_epoch=25, num_epochs=1)
    torch.manual_seed(0)
    batch = batch_for(trainer)
    trainer.on_train_epoch_start()
    losses = [float(trainer.train_step(batch)["loss"]) for _ in range(25)]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1 * abs(np.mean(losses[:5]))
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        outputs = trainer.validation_step(batch)
    trainer.on_validation_epoch_end([outputs])
    assert np.isfinite(trainer.logger.get_value("val_losses", step=-1))


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("time_sampling", ["uniform", "importance"])
def test_drawn_time_steps_respect_the_strategy(make_trainer, name, time_sampling):
    trainer = make_trainer(name, time_sampling=time_sampling, training_steps=3)
    told = []
    original = trainer.network.forward

    def spy(image, x_t=None, t=None, estimate=None, full_resolution_only=False):
        if not full_resolution_only:
            told.extend(t.tolist())
        return original(image, x_t, t, estimate, full_resolution_only)

    trainer.network.forward = spy
    trainer.on_train_epoch_start()
    batch = batch_for(trainer)
    for _ in range(12):
        trainer.train_step(batch)
    allowed = {0, 500, 1000} if name in ("DiffSeg", "SelfCondXt") else {0, 500}
    assert set(told) == allowed, "training indices of a schedule respaced to 3 steps"


def test_validation_uses_one_step_and_prediction_the_settings(make_trainer):
    trainer = make_trainer(steps=4)
    batch = batch_for(trainer)
    calls = []
    run = trainer.network._run
    trainer.network._run = lambda *args: calls.append(args[2]) or run(*args)
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        trainer.on_validation_epoch_end([trainer.validation_step(batch)])
    assert len(calls) == 1
    trainer.network.eval()
    trainer.set_deep_supervision_enabled(False)
    with torch.inference_mode():
        trainer.network(batch["data"][:1])
    assert len(calls) == 5


@pytest.mark.parametrize("recipe", ["nnunet", "paper"])
def test_continued_training_is_identical(make_trainer, tmp_path, recipe):
    settings = {"recipe": recipe, "time_sampling": "importance", "num_iterations_per_epoch": 3}
    first = make_trainer("RecycleXT", **settings)
    batch = batch_for(first)
    first.on_train_epoch_start()
    for _ in range(3):
        first.train_step(batch)
    first.on_train_epoch_end([{"loss": np.float32(1.0)}])
    file = tmp_path / "checkpoint_latest.pth"
    first.save_checkpoint(str(file))
    second = make_trainer("RecycleXT", **settings)
    second.load_checkpoint(str(file))
    assert second.current_epoch == 1
    assert second.logger.get_value("train_losses", step=None) == first.logger.get_value("train_losses", step=None)
    first.current_epoch = 1
    for trainer in (first, second):
        trainer.on_train_epoch_start()
        torch.manual_seed(3)
        trainer.train_step(batch)
    for key, value in first.network.state_dict().items():
        assert torch.equal(value, second.network.state_dict()[key]), key
    assert first.optimizer.param_groups[0]["lr"] == second.optimizer.param_groups[0]["lr"]
    assert torch.equal(first.time_sampler.loss_sq, second.time_sampler.loss_sq)
    assert first.time_sampler.count.sum() == 8


def test_ignored_voxels_carry_no_ground_truth(make_trainer):
    trainer = make_trainer("DiffSeg")
    trainer.label_manager._ignore_label = 2
    a = torch.randint(0, 2, (1, 1, 4, 4, 4))
    a[..., 0] = 2
    trainer.label_manager._all_labels = [0, 1]
    x = trainer._x_start(a)
    assert (x[..., 0] == 0).all()
    assert (x[..., 1:].abs() == 1).all()


def test_nan_image_names_the_case(make_trainer):
    trainer = make_trainer()
    batch = batch_for(trainer)
    batch["data"][1, 0, 3, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="case case_1 holds NaN"):
        trainer.train_step(batch)
    with pytest.raises(ValueError, match="case case_1 holds NaN"):
        trainer.validation_step(batch)


def test_network_that_cannot_be_extended_is_named_before_training(make_trainer, project):
    def other(configuration):
        configuration["architecture"]["network_class_name"] = "some.where.PrimusNet"

    with pytest.raises(NotImplementedError, match=r"some\.where\.PrimusNet.*PlainConvUNet and ResidualEncoderUNet"):
        make_trainer(edit=other, initialize=False)


def test_recycling_needs_two_steps(make_trainer):
    with pytest.raises(SettingsError, match="at least 2 steps"):
        make_trainer("RecycleXT", training_steps=1, steps=1, initialize=False)


def test_residual_encoder_and_2d(make_trainer):
    def residual(configuration):
        architecture = configuration["architecture"]
        kwargs = architecture["arch_kwargs"]
        architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
        kwargs["n_blocks_per_stage"] = kwargs.pop("n_conv_per_stage")

    for configuration, edit in (("3d_fullres", residual), ("2d", residual), ("2d", None)):
        trainer = make_trainer("SelfCondXt", configuration, edit=edit)
        trainer.on_train_epoch_start()
        assert np.isfinite(trainer.train_step(batch_for(trainer))["loss"])


def test_baseline_is_the_host_with_another_length(make_trainer):
    """The weights of its steps are those of the host's trainer, bit for bit."""
    trainer = make_trainer("Baseline", num_epochs=7)
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch) == (7, 2)
    host = make_trainer("")
    host.num_epochs = 7
    for each in (trainer, host):
        torch.manual_seed(3)
        each.network.apply(each.network.initialize)
        each.on_train_epoch_start()
        for seed in (0, 1):
            each.train_step(batch_for(each, seed))
    for key, value in host.network.state_dict().items():
        assert torch.equal(value, trainer.network.state_dict()[key]), key


def test_plans_without_section_use_the_defaults(make_trainer, project):
    trainer = make_trainer(edit=lambda c: c.pop("diffusion"), initialize=False)
    assert trainer.num_epochs == 1000
    assert trainer.num_iterations_per_epoch == 250


def test_tiny_plans_are_not_rewritten(project):
    tiny_plans(project)  # same content: accepted
    with pytest.raises(ValueError, match="holds other plans"):
        tiny_plans(project, base_features=6)


def test_a_training_that_diverges_stops_and_keeps_the_last_good_checkpoint(make_trainer, monkeypatch):
    """The host's own loop over its own data; in the second epoch no loss is finite."""
    trainer = make_trainer("RecycleXT", num_epochs=3, num_iterations_per_epoch=4, max_bad_steps=3)
    monkeypatch.setattr(trainer, "plot_network_architecture", lambda: None)
    loss = trainer._training_loss
    trainer._training_loss = lambda *batch: loss(*batch) * (float("nan") if trainer.current_epoch else 1.0)
    folder = Path(trainer.output_folder)
    for file in folder.glob("checkpoint_*"):
        file.unlink()
    with pytest.raises(
        DivergedError, match=r"epoch 1: .* The last good checkpoint is .*checkpoint_best\.pth \(1 epochs"
    ):
        trainer.run_training()
    assert [file.name for file in folder.glob("checkpoint_*")] == ["checkpoint_best.pth"]
    assert not (folder / ".training.lock").exists()
    weights = load_checkpoint_file(folder / "checkpoint_best.pth")["network_weights"]
    assert all(torch.isfinite(value).all() for value in weights.values() if value.is_floating_point())


def test_labels_are_looked_at_once_for_all_trainings(make_trainer, project, monkeypatch):
    cache = project.preprocessed / "label_scan.json"
    cache.unlink(missing_ok=True)
    looked = []
    values = label_scan._label_values
    monkeypatch.setattr(label_scan, "_label_values", lambda seg: looked.append(1) or values(seg))
    make_trainer("RecycleXT").get_tr_and_val_datasets()
    assert len(looked) == 6
    make_trainer("HiDiff").get_tr_and_val_datasets()
    assert len(looked) == 6
    make_trainer("RecycleXT", configuration="2d").get_tr_and_val_datasets()
    assert len(looked) == 12
