"""One training step of a real trainer, with spies: that recipe, settings and strategy arrive where they count."""

import math

import pytest
import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from torch import nn

from nnunetv2_diffusion.training.recipes import WarmupCosine
from nnunetv2_diffusion.training.strategies import LastPass

SMALL = {"refiner_width": 4, "steps": 3}
LENGTHS = {"num_epochs": 5, "num_iterations_per_epoch": 20}  # the tenth of it is the warm-up
CLIPS = {"paper": 1, "nnunet": 12}


@pytest.fixture
def build(make):
    def build(name, **settings):
        return make(recursive_find_trainer_class_by_name(f"nnUNetTrainer{name}"), **{**LENGTHS, **settings})

    return build


@pytest.fixture
def clips(monkeypatch):
    """(parameters, norm) of every clipping."""
    seen, clip = [], nn.utils.clip_grad_norm_

    def spy(parameters, max_norm, *args, **kwargs):
        parameters = list(parameters)
        seen.append((parameters, max_norm))
        return clip(parameters, max_norm, *args, **kwargs)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy)
    return seen


def make_batch(trainer, seed=0):
    patch = trainer.configuration_manager.patch_size
    labels = torch.zeros(2, 1, *patch, dtype=torch.int16)
    labels[..., 2:6, 3:9, 2:6], labels[..., 3:5, 4:7, 3:5] = 1, 2
    image = torch.randn(2, 1, *patch, generator=torch.Generator().manual_seed(seed)) + labels
    scales = trainer._get_deep_supervision_scales()
    if scales is None:
        return {"data": image, "target": labels, "keys": ["a", "b"]}
    sizes = [[round(n * s) for n, s in zip(patch, scale, strict=True)] for scale in scales]
    targets = [nn.functional.interpolate(labels.float(), size).to(torch.int16) for size in sizes]
    return {"data": image, "target": targets, "keys": ["a", "b"]}


def same_parameters(found, expected):
    return {id(p) for p in found} == {id(p) for p in expected}


class SpyStrategy:
    """Records what a strategy is given and what it gives."""

    def __init__(self, strategy):
        self.strategy, self.given, self.made = strategy, [], []

    def __getattr__(self, name):
        return getattr(self.strategy, name)

    def __call__(self, predict, process, x_start, t):
        self.given.append((predict, process, x_start, t))
        self.made.append(self.strategy(predict, process, x_start, t))
        return self.made[-1]


# --- recycling and its family ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", CLIPS)
@pytest.mark.parametrize("name", ["RecycleXT", "SelfCondXt", "NoDiff", "RecycleScore"])
def test_gradients_are_clipped_as_the_recipe_says(build, clips, name, recipe):
    trainer = build(name, recipe=recipe)
    trainer.on_train_epoch_start()
    trainer.train_step(make_batch(trainer))
    ((parameters, norm),) = clips
    assert norm == CLIPS[recipe]
    assert same_parameters(parameters, trainer.network.parameters())


def test_a_large_gradient_moves_the_weights_by_the_clipped_one_alone(build):
    """Plain gradient descent of rate 1: the step's length is the recipe's norm."""
    trainer = build("NoDiff", recipe="paper")
    trainer.on_train_epoch_start()
    trainer.optimizer = torch.optim.SGD(trainer.network.parameters(), lr=1.0)
    trainer.lr_scheduler = None
    weights = [p.detach().clone() for p in trainer.network.parameters()]
    loss = trainer.loss
    trainer.loss = lambda *arguments: 1e4 * loss(*arguments)
    trainer.train_step(make_batch(trainer))
    moved = [p.detach() - w for p, w in zip(trainer.network.parameters(), weights, strict=True)]
    assert float(torch.nn.utils.get_total_norm(moved)) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("epoch", [0, 3])
def test_the_papers_rate_changes_with_every_step(build, epoch):
    trainer, seen = build("RecycleXT", recipe="paper"), []
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    trainer.current_epoch = epoch
    trainer.logger.local_logger.my_fantastic_logging["lrs"] = [0.0] * epoch
    trainer.on_train_epoch_start()
    for _ in range(3):
        trainer.train_step(make_batch(trainer))
    assert isinstance(trainer.lr_scheduler, WarmupCosine)
    assert trainer.lr_scheduler.warmup_steps == 10  # of 5 x 20
    first = 20 * epoch
    if epoch == 0:
        expected = [1e-5 + (8e-4 - 1e-5) * step / 10 for step in range(3)]
    else:
        shares = [(first + i - 10) / 90 for i in range(3)]
        expected = [5e-5 + (8e-4 - 5e-5) * (1 + math.cos(math.pi * share)) / 2 for share in shares]
    assert seen == pytest.approx(expected, rel=1e-6)


def test_the_hosts_rate_changes_with_every_epoch(build):
    trainer, seen = build("RecycleXT", recipe="nnunet"), []
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    for epoch in (0, 1):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        for _ in range(2):
            trainer.train_step(make_batch(trainer))
    assert seen == pytest.approx([1e-2, 1e-2, *[1e-2 * (1 - 1 / 5) ** 0.9] * 2])


@pytest.mark.parametrize("name", ["RecycleXT", "DiffSeg", "SelfCondXtPlus1"])
def test_the_strategy_is_asked_and_its_answer_is_what_the_network_is_shown(build, name):
    trainer = build(name, gaussian={"training_steps": 50})
    trainer.strategy = spy = SpyStrategy(trainer.strategy)
    batch, passes, sampled = make_batch(trainer), [], []
    forward, sample = trainer.network.forward, trainer.time_sampler.sample

    def see(image, x_t=None, t=None, estimate=None, full_resolution_only=False):
        passes.append((image, x_t, t, estimate, full_resolution_only))
        return forward(image, x_t, t, estimate, full_resolution_only)

    def draw(size, t_range):
        sampled.append((size, t_range, sample(size, t_range)))
        return sampled[-1][2]

    trainer.network.forward, trainer.time_sampler.sample = see, draw
    trainer.on_train_epoch_start()
    trainer.train_step(batch)
    ((_, process, x_start, t),), (last,) = spy.given, spy.made
    ((size, t_range, (drawn, _)),) = sampled
    assert process is trainer.process
    assert (size, t_range) == (2, (0, 49 if spy.uses_next_step else 50))
    assert torch.equal(t, drawn)
    assert isinstance(last, LastPass)
    encoded = nn.functional.one_hot(trainer_labels(batch).long(), 3).movedim(-1, 1).float()
    assert torch.equal(x_start, 2 * encoded - 1)
    image, x_t, told, estimate, coarse = passes[-1]
    assert torch.equal(image, batch["data"])
    assert x_t is last.x_t
    assert estimate is last.estimate
    assert torch.equal(told, process.timestep_map[t]), "the step of the whole schedule"
    assert not coarse
    assert all(first for *_, first in passes[:-1]), "passes without gradient need no coarse heads"


def trainer_labels(batch):
    target = batch["target"]
    return (target[0] if isinstance(target, list) else target)[:, 0]


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["SelfCondXt", "SelfCondXtPlus1"])
def test_the_share_of_self_conditioning_is_that_of_the_plans(build, name, probability):
    assert build(name, self_conditioning_probability=probability).strategy.probability == probability


def test_the_time_sampler_is_told_losses_without_their_weights(build):
    """Told weighted ones it would feed on itself."""
    trainer, told, plain = build("RecycleXT", gaussian={"time_sampling": "importance", "training_steps": 10}), [], []
    per_sample, sample = trainer.loss.per_sample, trainer.time_sampler.sample
    trainer.loss.per_sample = lambda *arguments: plain.append(per_sample(*arguments)) or plain[-1]
    trainer.time_sampler.sample = lambda *arguments: (sample(*arguments)[0], torch.tensor([3.0, 0.5]))
    trainer.time_sampler.update = lambda t, losses: told.append((t, losses))
    trainer.on_train_epoch_start()
    output = trainer.train_step(make_batch(trainer))
    ((steps, losses),) = told
    assert losses == pytest.approx(plain[0].tolist())
    assert len(steps) == 2
    assert float(output["loss"]) == pytest.approx((3.0 * losses[0] + 0.5 * losses[1]) / 2)


@pytest.mark.parametrize(("recipe", "heads"), [("paper", 1), ("nnunet", 2)])
def test_coarse_heads_are_trained_with_deep_supervision_only(build, recipe, heads):
    trainer, outputs = build("RecycleXT", recipe=recipe), []
    loss = trainer.loss.forward
    trainer.loss.forward = lambda output, target: outputs.append(output) or loss(output, target)
    if hasattr(trainer.loss, "per_sample"):
        per_sample = trainer.loss.per_sample
        trainer.loss.per_sample = lambda output, target: outputs.append(output) or per_sample(output, target)
    trainer.on_train_epoch_start()
    trainer.train_step(make_batch(trainer))
    assert len(outputs[0]) == (heads if heads > 1 else 2)  # two samples, or a list of heads
    assert isinstance(outputs[0], list | tuple) == (heads > 1)
    assert [layer.weight.requires_grad for layer in trainer.network.decoder.seg_layers] == [heads > 1, True]


def test_the_papers_cross_entropy_weighs_twenty_times_the_dice(build):
    trainer = build("NoDiff", recipe="paper")
    logits, target = torch.randn(2, 3, 8, 12, 8), trainer_labels(make_batch(trainer))[:, None]
    ce = nn.functional.cross_entropy(logits, target[:, 0].long())
    p = logits.softmax(1)[:, 1:]
    truth = nn.functional.one_hot(target[:, 0].long(), 3).movedim(-1, 1)[:, 1:]
    space = (2, 3, 4)
    dice = 2 * (p * truth).sum(space) / (p.sum(space) + truth.sum(space))
    assert float(trainer.loss(logits, target)) == pytest.approx(float(20 * ce + 1 - dice.mean()), abs=1e-3)


@pytest.mark.parametrize("weight", [0.0, 4.0])
def test_the_score_has_the_weight_of_the_plans(build, weight):
    losses = []
    for value in (weight, 0.0):
        trainer = build("RecycleScore", score={"weight": value})
        trainer.on_train_epoch_start()
        torch.manual_seed(7)
        losses.append(float(trainer.train_step(make_batch(trainer))["loss"]))
    assert (losses[0] == losses[1]) == (weight == 0)


# --- HiDiff ----------------------------------------------------------------------------------------------------------


def test_hidiff_clips_each_network_apart_by_the_hosts_norm(build, clips):
    trainer = build("HiDiff", hidiff={**SMALL, "pretraining_epochs": 0})
    trainer.on_train_epoch_start()
    trainer.train_step(make_batch(trainer))
    (refiner, first), (segmentor, second) = clips
    assert (first, second) == (12, 12)
    assert same_parameters(refiner, [p for p in trainer.network.refiner.parameters() if p.grad is not None])
    assert same_parameters(segmentor, [p for p in trainer.network.segmentor.parameters() if p.grad is not None])


def test_hidiff_trains_the_segmentor_alone_first(build, clips):
    trainer = build("HiDiff", hidiff={**SMALL, "pretraining_epochs": 1})
    trainer.on_train_epoch_start()
    trainer.train_step(make_batch(trainer))
    ((parameters, norm),) = clips
    assert norm == 12
    assert same_parameters(parameters, [p for p in trainer.network.segmentor.parameters() if p.grad is not None])


def test_the_rates_of_hidiff_are_those_of_the_plans(build):
    rates = {"learning_rate": 1e-3, "segmentor_learning_rate": 2e-4, "pretraining_learning_rate": 5e-3}
    trainer, seen = build("HiDiff", hidiff={**SMALL, **rates, "pretraining_epochs": 2}), []
    for name in ("optimizer", "segmentor_optimizer"):
        getattr(trainer, name).register_step_pre_hook(
            lambda optimizer, *_, name=name: seen.append((name, optimizer.param_groups[0]["lr"]))
        )
    for epoch in (0, 1, 2, 4):
        trainer.current_epoch = epoch
        trainer.logger.local_logger.my_fantastic_logging["lrs"] = [0.0] * epoch
        trainer.on_train_epoch_start()
        trainer.train_step(make_batch(trainer))
    decay = (1 - 2 / 3) ** 0.9
    assert [name for name, _ in seen] == ["segmentor_optimizer"] * 2 + ["optimizer", "segmentor_optimizer"] * 2
    expected = [5e-3, 5e-3 * 0.5**0.9, 1e-3, 2e-4, 1e-3 * decay, 2e-4 * decay]
    assert [rate for _, rate in seen] == pytest.approx(expected)


def test_both_phases_of_hidiff_see_the_same_noise_and_time(build):
    trainer, seen = build("HiDiff", hidiff={**SMALL, "pretraining_epochs": 0}), []
    estimate = trainer.network.estimate_noise

    def spy(image, y_t, prior, t, *rest, **kwargs):
        seen.append((y_t, t, prior.requires_grad))
        return estimate(image, y_t, prior, t, *rest, **kwargs)

    trainer.network.estimate_noise = spy
    trainer.on_train_epoch_start()
    trainer.train_step(make_batch(trainer))
    (first, t_first, gradient_first), (second, t_second, gradient_second) = seen[0], seen[-1]
    assert torch.equal(first, second)
    assert torch.equal(t_first, t_second)
    assert 0 <= int(t_first.min()) <= int(t_first.max()) < trainer.process.num_timesteps
    assert (gradient_first, gradient_second) == (False, True), "the refiner's phase leaves the segmentor alone"
