"""HiDiff's trainer in this process: turns, what is frozen, what is saved, what is printed."""

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_project import batch_for

from nnunetv2_diffusion.checkpoints import CheckpointError
from nnunetv2_diffusion.methods.hidiff import frozen
from nnunetv2_diffusion.settings import SettingsError

SMALL = {"refiner_width": 8}
JOINT = {**SMALL, "pretraining_epochs": 0}


@pytest.fixture
def make_hidiff(make_trainer):
    def make(name="HiDiff", hidiff=None, configuration="3d_fullres", **settings):
        return make_trainer(name, configuration, hidiff={**JOINT, **(hidiff or {})}, **settings)

    return make


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


def changed(module, before):
    after = state(module)
    return {key for key in before if not torch.equal(before[key], after[key])}


def use_batch_norm(module):
    """A segmentor with running statistics, as MERIT has."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.InstanceNorm3d):
                setattr(parent, name, torch.nn.BatchNorm3d(child.num_features))


def phases(trainer, seed=0):
    """Inputs of both phases."""
    torch.manual_seed(seed)
    batch = batch_for(trainer)
    trainer.network.train()
    output = trainer.network.segmentor(batch["data"])
    loss = trainer._discriminative_loss(output, batch["target"])
    return batch["data"], output, loss, trainer._draw(output, batch["target"])


def test_frozen_keeps_parameters_and_statistics_and_lets_gradients_through():
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Dropout())
    module[0].bias.requires_grad_(False)
    module[2].eval()
    before = state(module)
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    with frozen(module):
        module(x).sum().backward()
    assert not changed(module, before)
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in module.parameters())
    assert [p.requires_grad for p in module.parameters()] == [True, False, True, True]
    assert [m.training for m in module] == [True, True, False]


def test_phase_a_moves_the_refiner_and_nothing_of_the_segmentor(make_hidiff):
    trainer = make_hidiff(hidiff={"refiner_norm": "batch"})
    use_batch_norm(trainer.network.segmentor)
    image, output, _, draw = phases(trainer)
    segmentor, refiner = state(trainer.network.segmentor), state(trainer.network.refiner)
    trainer.refiner_phase(image, output, draw)
    assert not changed(trainer.network.segmentor, segmentor)
    assert all(p.grad is None for p in trainer.network.segmentor.parameters())
    moved = changed(trainer.network.refiner, refiner)
    assert any("running_mean" in key for key in moved)
    assert any("weight" in key for key in moved)


def test_phase_b_moves_the_segmentor_and_nothing_of_the_refiner(make_hidiff):
    trainer = make_hidiff(hidiff={"refiner_norm": "batch"})
    image, output, loss, draw = phases(trainer)
    trainer.refiner_phase(image, output, draw)
    image, output, loss, draw = phases(trainer)
    segmentor, refiner = state(trainer.network.segmentor), state(trainer.network.refiner)
    trainer.segmentor_phase(image, output, loss, draw)
    assert not changed(trainer.network.refiner, refiner)
    assert len(changed(trainer.network.segmentor, segmentor)) > 10
    assert trainer.network.refiner.training


def test_the_diffusion_loss_reaches_the_segmentor_in_phase_b(make_hidiff):
    trainer = make_hidiff()
    for _ in range(3):  # zero-initialised branches let nothing through at first
        image, output, _, draw = phases(trainer)
        trainer.refiner_phase(image, output, draw)
    image, output, _, draw = phases(trainer)
    trainer.segmentor_phase(image, output, torch.zeros(()), draw)
    with_loss = [p.grad for p in trainer.network.segmentor.encoder.parameters()]
    assert all(g is not None for g in with_loss)
    assert sum(g.abs().sum() for g in with_loss) > 0


def test_both_phases_use_one_time_and_one_noise(make_hidiff, monkeypatch):
    trainer = make_hidiff()
    seen = []
    estimate = trainer.network.estimate_noise
    trainer.network.estimate_noise = lambda image, y_t, prior, t, features: (
        seen.append((y_t, t)) or estimate(image, y_t, prior, t, features)
    )
    trainer.train_step(batch_for(trainer))
    assert len(seen) == 2
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])


def test_a_segmentor_that_does_not_collaborate_never_moves(make_hidiff):
    trainer = make_hidiff(hidiff={"collaborative": False, "pretraining_epochs": 1})
    trainer.current_epoch = 1
    segmentor, refiner = state(trainer.network.segmentor), state(trainer.network.refiner)
    for seed in range(2):
        trainer.train_step(batch_for(trainer, seed))
    assert not changed(trainer.network.segmentor, segmentor)
    assert changed(trainer.network.refiner, refiner)


def test_random_weights_are_not_kept_frozen_for_good(make_hidiff):
    with pytest.raises(CheckpointError, match="collaborative is false and pretraining_epochs is 0"):
        make_hidiff(hidiff={"collaborative": False})


def test_the_segmentor_is_trained_alone_first_if_there_is_no_checkpoint(make_hidiff):
    trainer = make_hidiff(hidiff={"pretraining_epochs": None}, num_epochs=4)
    assert trainer.pretraining_epochs == 2
    refiner = state(trainer.network.refiner)
    rates = []
    for epoch in range(4):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        rates.append(trainer.segmentor_optimizer.param_groups[0]["lr"])
        trainer.train_step(batch_for(trainer))
        assert bool(changed(trainer.network.refiner, refiner)) == (epoch >= 2)
    np.testing.assert_allclose(rates, [8e-4, 8e-4 * 0.5**0.9, 1e-4, 1e-4 * 0.5**0.9])


@pytest.mark.parametrize(
    "hidiff",
    [
        {"collaborative": False, "noise_loss": "bce", "cross_transformer": False, "binarized": False},  # V1
        *[
            pytest.param(variant, marks=pytest.mark.slow)
            for variant in (
                {"noise_loss": "bce", "cross_transformer": False, "binarized": False},
                {"cross_transformer": False, "binarized": False},
                {"binarized": False},
            )
        ],
        {},  # V5
    ],
)
def test_every_variant_of_the_ablation_learns(make_hidiff, hidiff):
    frozen_first = {"pretraining_epochs": 1} if "collaborative" in hidiff else {}
    trainer = make_hidiff(hidiff={**hidiff, **frozen_first, "learning_rate": 3e-3}, num_iterations_per_epoch=30)
    trainer.current_epoch = trainer.pretraining_epochs
    trainer.num_epochs = 10
    batch, untrained = batch_for(trainer), state(trainer.network.refiner)
    trainer.on_train_epoch_start()
    losses = [float(trainer.train_step(batch)["loss"]) for _ in range(30)]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-8:]) < np.mean(losses[:8])
    assert diffusion_loss(trainer, batch) < 0.97 * diffusion_loss(trainer, batch, refiner=untrained)


def diffusion_loss(trainer, batch, refiner=None):
    """The refiner's own loss at every t, with the trained segmentor and this refiner's weights."""
    network = trainer.network
    trained = state(network.refiner)
    network.refiner.load_state_dict(refiner or trained)
    network.train()
    total = 0.0
    with torch.no_grad():
        output = network.segmentor(batch["data"])
        for t in range(trainer.process.num_timesteps):
            torch.manual_seed(t)
            draw = trainer._draw(output, batch["target"])
            t = torch.full_like(draw.t, t)
            y_t = trainer.process.q_sample(draw.y_start, network.prior(output.logits), t, torch.rand_like(draw.y_t))
            total += float(trainer.diffusion_loss(batch["data"], output, draw._replace(y_t=y_t, t=t)))
    network.refiner.load_state_dict(trained)
    return total


def test_validation_shows_prior_and_refined_dice(make_hidiff, capsys):
    trainer = make_hidiff()
    batch = batch_for(trainer)
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    trainer.on_train_epoch_end([trainer.train_step(batch)])
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        trainer.on_validation_epoch_end([trainer.validation_step(batch_for(trainer)) for _ in range(2)])
    trainer.on_epoch_end()
    printed = capsys.readouterr().out
    assert "Pseudo dice of the prior [" in printed
    assert "refined in 1 step [" in printed
    assert len(trainer.pseudo_dice["prior"][0]) == len(trainer.pseudo_dice["refined"][0]) == 2
    assert trainer.network.sampling.steps == 1
    # the prior's is what nnU-Net computes for the segmentor alone
    trainer.network.sampling = None
    with torch.no_grad():
        found = super(type(trainer).__mro__[1], trainer).validation_step(batch_for(trainer))
    dice = 2 * found["tp_hard"] / (2 * found["tp_hard"] + found["fp_hard"] + found["fn_hard"])
    np.testing.assert_allclose(trainer.pseudo_dice["prior"][0], dice, atol=1e-5)


@pytest.mark.parametrize(("refined", "told"), [([0.4, 0.3], True), ([0.6, 0.3], False)])
def test_the_end_tells_whether_the_refiner_pays(make_hidiff, monkeypatch, capsys, refined, told):
    trainer = make_hidiff(hidiff={"pretraining_epochs": 0})
    monkeypatch.setattr(nnUNetTrainer, "on_train_end", lambda self: None)
    trainer.pseudo_dice = {"prior": [[0.5, 0.3]], "refined": [refined]}
    trainer.on_train_end()
    assert ("The refiner does not pay yet: -5.00 points" in capsys.readouterr().out) == told


def epoch(trainer, refined, number):
    """An epoch whose prior has a pseudo Dice of 0.5; returns the file written if it was the best one, else None."""
    trainer.current_epoch = number
    trainer.on_epoch_start()
    trainer.logger.log("train_losses", 0.5, number)
    trainer.logger.log("lrs", 0.5, number)
    counts = {key: np.array([1.0, 1.0]) for key in ("tp_hard", "fp_hard", "fn_hard")}
    prior = {f"prior_{key}": value for key, value in counts.items()}
    dice = 0.5 if number < trainer.pretraining_epochs else refined
    counts["tp_hard"] = np.full(2, dice / (1 - dice))
    trainer.on_validation_epoch_end([{"loss": np.array(0.0), **counts, **prior}])
    trainer.on_epoch_end()


@pytest.mark.parametrize(("refined", "pays"), [(0.4, False), (0.5, True), (0.6, True)])
def test_the_best_checkpoint_has_a_trained_refiner_and_knows_whether_it_pays(make_hidiff, monkeypatch, refined, pays):
    trainer = make_hidiff(hidiff={"pretraining_epochs": 2}, num_epochs=5)
    written = []
    monkeypatch.setattr(trainer, "save_checkpoint", lambda name: written.append((trainer.current_epoch, name[-8:])))
    monkeypatch.setattr(trainer.logger, "plot_progress_png", lambda folder: None)
    image = batch_for(trainer)["data"][:1]
    for number in range(4):
        epoch(trainer, refined, number)
        assert trainer.network.refiner_pays == (pays and number >= 2)
        copy = trainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 2, 3, False)
        copy.load_state_dict(trainer.network.state_dict())
        copy.eval()
        with torch.inference_mode():
            prior = torch.equal(copy(image), copy.segmentor(image).logits)
        assert prior == (not copy.refiner_pays)
    assert (2, "best.pth") in written  # whatever the epochs before had


def test_a_refiner_that_does_not_pay_is_used_if_steps_are_asked_for(make_hidiff, monkeypatch, capsys):
    trainer = make_hidiff()
    assert not trainer.network.refiner_pays  # untrained
    image = batch_for(trainer)["data"][:1]
    arguments = trainer.plans_manager, trainer.configuration_manager, 2, 3, False
    plain = trainer.build_network_architecture(*arguments)
    monkeypatch.setenv("nnUNet_diffusion_steps", "2")
    asked = trainer.build_network_architecture(*arguments)
    capsys.readouterr()
    masks = []
    for network in (plain, asked):
        network.load_state_dict(trainer.network.state_dict())
        with torch.inference_mode():
            network.eval()(image)  # says it, the second time no more
            masks.append(network(image))
    assert capsys.readouterr().out.count("the segmentor's own masks are given") == 1
    with torch.inference_mode():
        assert torch.equal(masks[0], plain.segmentor(image).logits)
    assert not torch.allclose(masks[0].softmax(1), masks[1].softmax(1), atol=1e-3)


def test_weights_of_version_0_1_are_refined_from_the_focal_losss_logits(make_hidiff):
    """Their extra state tells of regions alone."""
    network = make_hidiff().network
    weights = {**network.state_dict(), "_extra_state": torch.tensor([0])}
    network.load_state_dict(weights)
    assert network.refiner_pays
    assert not network.start.bound
    assert torch.equal(network.get_extra_state(), torch.tensor([0]))
    network.load_state_dict(make_hidiff().network.state_dict())
    assert network.start.bound
    assert not network.refiner_pays


def test_terms_of_the_loss_are_logged_apart_and_counted_once(make_hidiff, capsys):
    trainer = make_hidiff(hidiff={"pretraining_epochs": 1, "lambda_focal": 2.0, "lambda_diffusion": 3.0})
    batch = batch_for(trainer)
    outputs = []
    for number in range(2):
        trainer.current_epoch = number
        trainer.on_train_epoch_start()
        outputs.append(trainer.train_step(batch))
        trainer.on_train_epoch_end(outputs[-1:])
    first, second = outputs
    assert first["loss"] == first["discriminative"]
    assert np.isnan([first["kl"], first["noise"]]).all()
    expected = second["discriminative"] + 3 * (second["kl"] + 2 * second["noise"])
    # the refiner has moved a little between both phases
    np.testing.assert_allclose(second["loss"], expected, rtol=0.02)
    printed = [line.split(": ", 1)[1] for line in capsys.readouterr().out.splitlines() if "Terms of the loss" in line]
    assert printed[0] == f"Terms of the loss: L_Disc {first['loss']:.4f}"
    assert printed[1].startswith(f"Terms of the loss: L_Disc {second['discriminative']:.4f}, KL ")


def test_a_frozen_segmentors_loss_is_not_computed(make_hidiff, monkeypatch):
    trainer = make_hidiff(hidiff={"collaborative": False, "pretraining_epochs": 1})
    trainer.current_epoch = 1
    monkeypatch.setattr(trainer, "_discriminative_loss", lambda *given: pytest.fail("computed for nothing"))
    output = trainer.train_step(batch_for(trainer))
    np.testing.assert_allclose(output["loss"], output["kl"] + output["noise"], rtol=1e-5)


def test_validation_runs_the_segmentor_once_and_samples_as_planned(make_hidiff, monkeypatch):
    trainer = make_hidiff(hidiff={"steps": 3, "samples": 4, "sampler": "ddpm"}, step_spacing="linspace")
    seen, passes = [], []
    refine, segment = trainer.network.refine, trainer.network.segmentor.forward
    monkeypatch.setattr(
        trainer.network, "refine", lambda image, out, config: seen.append(config) or refine(image, out, config)
    )
    monkeypatch.setattr(trainer.network.segmentor, "forward", lambda image: passes.append(1) or segment(image))
    trainer.network.eval()
    with torch.no_grad():
        trainer.validation_step(batch_for(trainer))
    assert len(passes) == len(seen) == 1
    assert (seen[0].steps, seen[0].samples, seen[0].sampler, seen[0].step_spacing) == (3, 1, "ddpm", "linspace")


@pytest.mark.parametrize(("spacing", "kept"), [("linspace", [9, 4, 0]), ("trailing", [9, 6, 2])])
def test_the_plans_spacing_reaches_both_ways_to_predict(make_hidiff, spacing, kept):

    from nnunetv2_diffusion.inference.options import PredictionOptions, resolve_sampling

    network = make_hidiff(hidiff={"steps": 3}, step_spacing=spacing).network.eval()
    network.refiner_pays = True
    times = []
    estimate = network.estimate_noise
    network.estimate_noise = lambda image, y_t, prior, t, f: (
        times.append(int(t[0])) or estimate(image, y_t, prior, t, f)
    )
    with torch.inference_mode():
        network(torch.randn(1, 2, *network_patch(network)))
    assert times == kept
    chain = network.make_chain(resolve_sampling(network, PredictionOptions()))
    assert chain.process.timestep_map.flip(0).tolist() == kept


def network_patch(network):
    return [8 * max(s) for s in zip(*network.strides, strict=True)]


def test_continued_training_is_identical(make_hidiff, tmp_path):
    first = make_hidiff(hidiff={"pretraining_epochs": 1})
    batch = batch_for(first)
    for epoch in (0, 1):
        first.current_epoch = epoch
        first.on_train_epoch_start()
        first.on_train_epoch_end([first.train_step(batch)])
    first.pseudo_dice["prior"].append([0.5, 0.25])
    file = tmp_path / "checkpoint_latest.pth"
    first.save_checkpoint(str(file))
    second = make_hidiff(hidiff={"pretraining_epochs": None}, num_epochs=9)
    second.load_checkpoint(str(file))
    assert second.pretraining_epochs == 1
    assert second.pseudo_dice == first.pseudo_dice
    second.num_epochs = first.num_epochs
    first.current_epoch = 2
    assert second.current_epoch == 2
    for trainer in (first, second):
        trainer.on_train_epoch_start()
        torch.manual_seed(3)
        trainer.train_step(batch)
    for key, value in first.network.state_dict().items():
        assert torch.equal(value, second.network.state_dict()[key]), key
    for name in ("optimizer", "segmentor_optimizer"):
        rates = [getattr(t, name).param_groups[0]["lr"] for t in (first, second)]
        assert rates[0] == rates[1]


def test_an_existing_result_is_the_segmentor(make_trainer, make_hidiff, project, capsys):
    host = make_trainer("Baseline")
    host.network.encoder.stages[0][0].convs[0].conv.bias.data += 1
    model = project.model("nnUNetTrainer") / "fold_0"
    model.mkdir(parents=True)
    file = model / "checkpoint_final.pth"
    host.save_checkpoint(str(file))
    try:
        capsys.readouterr()
        trainer = make_hidiff(hidiff={"pretraining_epochs": 7})
        assert f"segmentor: {file}" in capsys.readouterr().out
        assert trainer.pretraining_epochs == 0
        for key, value in host.network.state_dict().items():
            assert torch.equal(value, trainer.network.segmentor.state_dict()[key]), key
        x = batch_for(trainer)["data"]
        trainer.network.sampling = None
        for network in (trainer.network, host.network):
            network.eval()
        with torch.inference_mode():
            for ours, theirs in zip(trainer.network(x), host.network(x), strict=True):
                assert torch.equal(ours, theirs)
    finally:
        file.unlink()


def test_a_named_checkpoint_must_exist_and_fit(make_trainer, make_hidiff, tmp_path):
    with pytest.raises(CheckpointError, match=r"hidiff\.segmentor: no file .*nothing\.pth"):
        make_hidiff(hidiff={"segmentor_checkpoint": str(tmp_path / "nothing.pth")})
    other = make_trainer("RecycleXT")
    file = tmp_path / "other.pth"
    other.save_checkpoint(str(file))
    with pytest.raises(CheckpointError, match=r"other\.pth: the checkpoint belongs to another network"):
        make_hidiff(hidiff={"segmentor_checkpoint": str(file)})


def test_the_segmentor_of_another_hidiff_training_can_be_used(make_hidiff, tmp_path):
    first = make_hidiff(hidiff={"refiner_width": 16})
    file = tmp_path / "hidiff.pth"
    first.save_checkpoint(str(file))
    second = make_hidiff(hidiff={"segmentor_checkpoint": str(file)})
    assert not changed(second.network.segmentor, state(first.network.segmentor))


def test_ignored_voxels_carry_no_ground_truth(make_hidiff):
    trainer = make_hidiff()
    trainer.label_manager._ignore_label = 2
    batch = batch_for(trainer)
    _, output, _, _ = phases(trainer)
    draws = []
    for hidden in (2, 2):
        target = [x.clone() for x in batch["target"]]
        target[0][target[0] == 1] = hidden  # all foreground is to be ignored
        torch.manual_seed(0)
        draws.append(trainer._draw(output, target))
    ignored = draws[0].valid == 0
    assert ignored.any()
    prior = trainer.network.prior(output.logits)
    found = draws[0].y_start[ignored.expand_as(prior)].mean()
    assert abs(found - prior[ignored.expand_as(prior)].mean()) < 0.02


def test_nan_image_names_the_case(make_hidiff):
    trainer = make_hidiff()
    batch = batch_for(trainer)
    batch["data"][1, 0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="case case_1 "):
        trainer.train_step(batch)


def test_merit_in_3d_is_refused_before_training(make_hidiff):
    with pytest.raises(NotImplementedError, match=r"MERIT is a 2D network\. Use -c 2d, or nnUNetTrainerHiDiff"):
        make_hidiff("HiDiffMERIT")


def test_merit_trains_and_predicts_in_2d(make_hidiff):
    trainer = make_hidiff("HiDiffMERIT", {"merit_variant": "nano"}, "2d")
    batch = batch_for(trainer)
    segmentor, refiner = state(trainer.network.segmentor), state(trainer.network.refiner)
    trainer.on_train_epoch_start()
    assert np.isfinite(trainer.train_step(batch)["loss"])
    assert len(changed(trainer.network.segmentor, segmentor)) > 100
    assert changed(trainer.network.refiner, refiner)
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        trainer.on_validation_epoch_end([trainer.validation_step(batch)])
    trainer.set_deep_supervision_enabled(False)
    with torch.inference_mode():
        assert trainer.network.eval()(batch["data"][:1]).shape[1:] == (3, *trainer.configuration_manager.patch_size)


def test_pretrained_backbones_are_needed_to_train_and_not_to_predict(make_hidiff, tmp_path):
    import timm

    from nnunetv2_diffusion.networks.merit import VARIANTS

    file = tmp_path / "backbones.pth"
    states = [timm.create_model(name).state_dict() for name in VARIANTS["nano"]]
    torch.save(dict(zip(("scale1", "scale2"), states, strict=True)), file)
    trainer = make_hidiff("HiDiffMERIT", {"merit_variant": "nano", "merit_weights": str(file)}, "2d")
    key = "stem.conv1.weight"
    assert torch.equal(trainer.network.segmentor.scale1.model.state_dict()[key], states[0][key])
    file.unlink()
    trainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 2, 3, False)


def test_a_typo_in_its_section_is_named_before_training(make_trainer):
    with pytest.raises(SettingsError, match=r"unknown setting 'refinerwidth' in diffusion\.hidiff; did you mean"):
        make_trainer("HiDiff", hidiff={"refinerwidth": 8}, initialize=False)
