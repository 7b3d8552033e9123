"""Laws of BerDiff."""

import pytest
import torch
from learning import learn, make_batch

from nnunetv2_diffusion.diffusion import noise_loss, variational_bound
from nnunetv2_diffusion.methods.berdiff import BerDiffTrainer, BerDiffUNet
from nnunetv2_diffusion.sampling import BernoulliChain, Estimator, NoiseByContent, SamplingConfig, run_chain


@pytest.fixture
def trainer(make):
    return make(BerDiffTrainer, berdiff={"steps": 4}, num_epochs=1, num_iterations_per_epoch=60)


def states(network, image, steps=4):
    chain = network.make_chain(SamplingConfig(steps, "ddim"))
    noise = NoiseByContent([1, 2], 0, 0, (3, *image.shape[2:]), image.device)
    with torch.inference_mode():
        return list(run_chain(chain, Estimator(chain, image), [[()]] * steps, noise))


def test_a_prediction_starts_from_fair_coins_and_its_classes_are_a_distribution(trainer):
    network, image = trainer.network.eval(), torch.randn(2, 1, 8, 12, 8)
    assert isinstance(network, BerDiffUNet)
    assert isinstance(network.make_chain(network.sampling), BernoulliChain)
    found = states(network, image)
    assert found[0].state.mean() == pytest.approx(0.5, abs=0.03)
    for step in found:
        assert set(step.state.unique().tolist()) == {0.0, 1.0}
        torch.testing.assert_close(step.answer.sum(1), torch.ones(2, 8, 12, 8))


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_an_oracle_of_the_noise_leads_to_the_mask(trainer, steps, monkeypatch):
    network, image = trainer.network.eval(), torch.randn(2, 1, 8, 12, 8)
    truth = torch.nn.functional.one_hot(torch.randint(3, (2, 8, 12, 8)), 3).movedim(-1, 1).float()
    monkeypatch.setattr(network, "noise_probability", lambda image, y, prior, t, features: (y - truth).abs())
    assert torch.equal(states(network, image, steps)[-1].answer.argmax(1), truth.argmax(1))


def test_the_network_sees_the_state_itself_and_the_training_time(trainer, monkeypatch):
    network, image, seen = trainer.network.eval(), torch.randn(2, 1, 8, 12, 8), []
    run = network._run
    monkeypatch.setattr(
        network, "_run", lambda image, mask, t, *rest: seen.append((mask, t)) or run(image, mask, t, *rest)
    )
    found = states(network, image)
    assert [int(t[0]) for _, t in seen] == [999, 666, 333, 0]
    for (mask, _), step in zip(seen, found, strict=True):
        assert torch.equal(mask, step.state)


def test_the_loss_is_least_where_the_noise_is_exact(trainer):
    process, t = trainer.process, torch.tensor([300, 700])
    truth, prior = torch.randint(0, 2, (2, 3, 500)).double(), torch.full((2, 3, 500), 0.5).double()
    y_t = process.q_sample(truth, prior, t, torch.rand_like(prior))
    exact = 24 * (y_t - truth).abs() - 12
    bounds = [variational_bound(process, logits, truth, y_t, prior, t).mean() for logits in (exact, 0 * exact, -exact)]
    noises = [noise_loss(logits, truth, y_t, 0.0).mean() for logits in (exact, 0 * exact, -exact)]
    assert bounds[0] < 1e-4 < bounds[1] < bounds[2]
    assert noises[0] < 1e-4
    assert noises[1] == pytest.approx(1.0)  # a coin costs one bit


def test_what_is_trained_is_the_bound_and_the_cross_entropy_of_the_noise(trainer, monkeypatch):
    batch, told = make_batch(trainer), {}
    y_t_of = type(trainer.process).q_sample

    def q_sample(self, y_start, prior, t, uniform):
        told.update(y_start=y_start, prior=prior, t=t, y_t=y_t_of(self, y_start, prior, t, uniform))
        return told["y_t"]

    monkeypatch.setattr(type(trainer.process), "q_sample", q_sample)
    loss = trainer._training_loss(batch["data"], batch["target"])
    assert set(told["prior"].unique().tolist()) == {0.5}
    with torch.no_grad():
        eps = trainer.network(batch["data"], told["y_t"], told["t"])
        given = (told["y_start"], told["y_t"])
        expected = variational_bound(trainer.process, eps, *given, told["prior"], told["t"]) + noise_loss(
            eps, *given, 0.0
        )
    torch.testing.assert_close(loss.detach(), expected.mean())


def test_a_training_learns(trainer):
    losses = learn(trainer, 60)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_there_are_no_coarse_heads_by_either_recipe(make):
    for recipe in ("paper", "nnunet"):
        assert make(BerDiffTrainer, recipe=recipe).enable_deep_supervision is False
