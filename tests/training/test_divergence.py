"""A training that diverges: which steps are left out, when it stops, and that no such weights are written."""

import copy
import math
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from torch import distributed as dist
from torch import nn

from nnunetv2_diffusion.training.divergence import DivergedError, StepGuard, backward_seed, describe_not_finite

TRAINERS = ["RecycleXT", "SelfCondXtPlus1", "NoDiff", "RecycleScore", "HiDiff", "Baseline"]
NOT_FINITE = [math.nan, math.inf, -math.inf]


@pytest.fixture
def unused_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# --- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "finite"), [(0.0, True), (-3.0, True), *[(x, False) for x in NOT_FINITE]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_loss_that_is_not_finite_reaches_the_gradients(loss, finite, dtype):
    weight = torch.ones(3, requires_grad=True)
    total = (weight.sum() * 0 + loss).to(dtype)
    total.backward(backward_seed(total))
    assert bool(torch.isfinite(weight.grad).all()) == finite


def test_the_gradient_of_a_finite_loss_is_the_usual_one():
    weight, other = (torch.arange(4.0, requires_grad=True) for _ in range(2))
    loss = (weight**3).sum().sqrt()
    loss.backward(backward_seed(loss))
    (other**3).sum().sqrt().backward()
    assert torch.equal(weight.grad, other.grad)


def step(guard, optimizer, gradient, scaler=None, loss=0.0):
    """One step with a given gradient; whether the guard says stop."""
    guard.watch(optimizer, scaler)
    (weight,) = optimizer.param_groups[0]["params"]
    weight.grad = torch.full_like(weight, gradient)
    if scaler is None:
        optimizer.step()
    else:
        scaler.scale(torch.tensor(1.0))
        scaler.step(optimizer)
    stop = guard.judge(optimizer, torch.tensor(loss), scaler)
    if scaler is not None:
        scaler.update()
    return stop


def make(cls=torch.optim.SGD, **kwargs):
    weight = nn.Parameter(torch.ones(3))
    return weight, cls([weight], lr=0.1, **kwargs)


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [(torch.optim.SGD, {"momentum": 0.99, "nesterov": True, "weight_decay": 3e-5}), (torch.optim.AdamW, {})],
)
@pytest.mark.parametrize("gradient", NOT_FINITE)
def test_such_a_step_changes_neither_weights_nor_the_optimizer(cls, kwargs, gradient):
    weight, optimizer = make(cls, **kwargs)
    guard = StepGuard(5)
    step(guard, optimizer, 0.5)
    before, state = weight.detach().clone(), copy.deepcopy(optimizer.state_dict())
    assert not step(guard, optimizer, gradient)
    assert torch.equal(weight, before)
    assert str(optimizer.state_dict()) == str(state)
    step(guard, optimizer, 0.5)
    assert not torch.equal(weight, before)
    assert guard.end_epoch() == 1
    assert guard.end_epoch() == 0


def test_it_says_stop_after_a_number_in_a_row_of_one_optimizer():
    guard = StepGuard(3)
    (_, first), (_, second) = make(), make()
    for _ in range(2):
        assert not step(guard, first, math.nan)
        assert not step(guard, second, 1.0)  # the other one's good steps do not count for it
    assert step(guard, first, math.nan)
    assert not step(guard, first, 1.0)
    assert [step(guard, first, math.nan) for _ in range(3)] == [False, False, True]


def test_a_grad_scaler_may_look_for_its_scale():
    """Sixteen halvings in a row are usual; they are no divergence."""
    weight, optimizer = make()
    guard, scaler = StepGuard(2), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    scales = []
    while scaler.get_scale() > 2.0**20:
        scales.append(scaler.get_scale())
        assert not step(guard, optimizer, math.inf, scaler)
    assert len(scales) == 20
    assert guard.end_epoch() == 0
    assert not step(guard, optimizer, 1.0, scaler)
    assert not torch.equal(weight, torch.ones(3))


def test_a_loss_that_is_not_finite_counts_also_under_a_scaler():
    weight, optimizer = make()
    guard, scaler = StepGuard(3), torch.amp.GradScaler("cpu")
    assert [step(guard, optimizer, math.nan, scaler, math.nan) for _ in range(3)] == [False, False, True]
    assert torch.equal(weight, torch.ones(3))


def test_gradients_that_overflow_at_any_scale_count_under_a_scaler():
    _, optimizer = make()
    guard, scaler = StepGuard(3), torch.amp.GradScaler("cpu", init_scale=2.0)
    found = [step(guard, optimizer, math.nan, scaler, 0.5) for _ in range(5)]
    assert found == [False, False, False, False, True]  # scales 2 and 1 are looked for


def test_a_scaler_that_is_switched_off_does_not_let_them_through():
    weight, optimizer = make()
    guard, scaler = StepGuard(2), torch.amp.GradScaler("cpu", enabled=False)
    assert [step(guard, optimizer, math.nan, scaler, math.nan) for _ in range(2)] == [False, True]
    assert torch.equal(weight, torch.ones(3))


def test_weights_and_statistics_that_are_not_finite_are_named():
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert describe_not_finite({**network.state_dict(), "_extra_state": torch.tensor([1]), "text": "x"}) is None
    assert describe_not_finite({}) is None
    network[1].running_var[1] = math.inf
    assert describe_not_finite(network.state_dict()).endswith("the first is 1.running_var")
    with torch.no_grad():
        network[0].weight[0, 0] = math.nan
    assert describe_not_finite(network.state_dict()).startswith("2 of 6 tensors are not finite, the first is 0.weight")


def _process(rank, port, losses):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    guard, scaler = StepGuard(2), torch.amp.GradScaler("cpu")
    guard.watch(optimizer, scaler)
    before = network.module.weight.detach().clone()
    stops = []
    for value in losses:
        optimizer.zero_grad()
        loss = network(torch.ones(1, 2)).sum() + (value if rank else 0.0)
        scaled = scaler.scale(loss)
        scaled.backward(backward_seed(loss))
        scaler.step(optimizer)
        stops.append(guard.judge(optimizer, loss.detach(), scaler))
        scaler.update()
    assert stops == [False, False, True], stops
    assert guard.end_epoch() == 2
    moved = network.module.weight.detach() - before
    assert torch.allclose(moved, torch.full_like(moved, -0.1)), moved  # by the first step alone
    dist.destroy_process_group()


def test_two_processes_leave_out_the_same_step_and_stop_together(unused_port):
    mp.spawn(_process, args=(unused_port, [0.0, math.nan, math.inf]), nprocs=2, join=True)


# --- trainers --------------------------------------------------------------------------------------------------------


def make_batch(trainer, seed=0):
    patch = trainer.configuration_manager.patch_size
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(2, 1, *patch, dtype=torch.int16)
    labels[..., 2:6, 3:9, 2:6], labels[..., 3:5, 4:7, 3:5] = 1, 2
    image = torch.randn(2, 1, *patch, generator=generator) + labels
    scales = trainer._get_deep_supervision_scales()
    if scales is None:
        return {"data": image, "target": labels, "keys": ["a", "b"]}
    sizes = [[round(n * s) for n, s in zip(patch, scale, strict=True)] for scale in scales]
    targets = [nn.functional.interpolate(labels.float(), size).to(torch.int16) for size in sizes]
    return {"data": image, "target": targets, "keys": ["a", "b"]}


def extreme(batch):
    """Images that are finite, and too large for any network."""
    return {**batch, "data": torch.full_like(batch["data"], 3e38) * batch["data"].sign()}


@pytest.fixture
def started(make):
    """Build a trainer whose first epoch has begun: (name, settings)."""

    def build(name, **settings):
        settings["hidiff"] = {"refiner_width": 4, "steps": 3, "pretraining_epochs": 0}
        trainer = make(recursive_find_trainer_class_by_name(f"nnUNetTrainer{name}"), **settings)
        trainer.on_train_epoch_start()
        return trainer

    return build


def weights(trainer):
    return {k: v.clone() for k, v in trainer.network.state_dict().items() if v.is_floating_point()}


def same(trainer, before):
    return all(torch.equal(value, before[key]) for key, value in weights(trainer).items())


def log_of(trainer):
    with open(trainer.log_file) as file:
        return file.read()


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_leaves_such_steps_out_and_stops(started, name):
    trainer = started(name, max_bad_steps=3)
    batch = make_batch(trainer)
    good = trainer.train_step(batch)
    before = weights(trainer)
    bad = [trainer.train_step(extreme(batch)) for _ in range(2)]
    assert same(trainer, before)
    assert not any(np.isfinite(output["loss"]) for output in bad)
    trainer.train_step(batch)
    assert not same(trainer, before)
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())
    before = weights(trainer)
    for _ in range(2):
        trainer.train_step(extreme(batch))
    with pytest.raises(DivergedError, match=r"diverged in epoch 0: .* of 3 steps in a row"):
        trainer.train_step(extreme(batch))
    assert same(trainer, before)
    trainer.on_train_epoch_end([good, *bad])
    steps = 9 if name == "HiDiff" else 5  # it has two optimisers, of which the first stops the training
    assert f"{steps} optimiser steps of this epoch" in log_of(trainer)
    assert trainer.logger.get_value("train_losses", step=-1) == pytest.approx(float(good["loss"]), rel=1e-6)


@pytest.mark.parametrize("name", ["RecycleXT", "NoDiff", "HiDiff"])
@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_loss_that_is_not_finite_counts_though_its_gradients_are(started, name, value):
    """The seed of the backward pass tells them."""
    trainer = started(name, recipe="nnunet")
    loss = trainer.loss
    trainer.loss = lambda *arguments: loss(*arguments) + value
    part = trainer.network.segmentor if name == "HiDiff" else trainer.network
    before = {k: v.clone() for k, v in part.state_dict().items() if v.is_floating_point()}
    trainer.train_step(make_batch(trainer))
    assert all(torch.equal(value, part.state_dict()[key]) for key, value in before.items())
    assert trainer.guard.end_epoch() == 1


def test_an_epoch_without_such_steps_says_nothing(started):
    trainer = started("RecycleXT")
    trainer.on_train_epoch_end([trainer.train_step(make_batch(trainer)) for _ in range(2)])
    assert "left out" not in log_of(trainer)


def test_an_epoch_without_a_finite_loss_is_logged_as_it_was(started):
    trainer = started("RecycleXT")
    trainer.on_train_epoch_end([trainer.train_step(extreme(make_batch(trainer))) for _ in range(2)])
    assert not np.isfinite(trainer.logger.get_value("train_losses", step=-1))


@pytest.mark.parametrize("name", TRAINERS)
def test_weights_that_are_not_finite_are_not_written(started, name, tmp_path):
    trainer = started(name)
    file = tmp_path / "checkpoint_best.pth"
    trainer.save_checkpoint(str(file))
    before = file.read_bytes()
    with torch.no_grad():
        next(trainer.network.parameters()).view(-1)[0] = math.nan
    with pytest.raises(DivergedError, match=r"checkpoint_best.pth is not written: \d+ of \d+ tensors"):
        trainer.save_checkpoint(str(file))
    assert file.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [file.name]


def test_the_error_names_the_last_good_checkpoint(started):
    trainer = started("RecycleXT", max_bad_steps=2)
    assert "There is no checkpoint yet" in trainer._way_back()
    trainer.current_epoch = 6
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_best.pth")
    trainer.train_step(extreme(make_batch(trainer)))
    with pytest.raises(DivergedError, match=r"checkpoint_best\.pth \(7 epochs\)\. Try --c once"):
        trainer.train_step(extreme(make_batch(trainer)))
