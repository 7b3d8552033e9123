"""Laws of mixing recycled masks with the ground truth."""

import pytest
import torch
from torch import nn

from nnunetv2_diffusion.diffusion import GaussianDiffusion, MaskEncoding, linear_beta_schedule
from nnunetv2_diffusion.training import RecycleMixed, RecycleXT, Standard
from nnunetv2_diffusion.training.corruption import Corruption

T = 1001
STEPS = torch.tensor([0, 250, 700, 999])


@pytest.fixture(scope="module")
def process() -> GaussianDiffusion:
    return GaussianDiffusion(linear_beta_schedule(T))


def masks(batch=4, size=8, heads=3):
    labels = torch.randint(0, heads, (batch, size, size))
    return 2 * nn.functional.one_hot(labels, heads).movedim(-1, 1).float() - 1


class FirstPass:
    """A first pass whose answer depends on all that it is given; notes what it was asked."""

    def __init__(self, answer=lambda x: x.softmax(1)):
        self.answer, self.asked = answer, []

    def __call__(self, x, t, samples=None):
        self.asked.append((x, t, samples))
        return self.answer(x)


def run(strategy, process, x_start, t=STEPS, predict=None, seed=3):
    torch.manual_seed(seed)
    return strategy(predict or FirstPass(), process, x_start, t).x_t


def test_share_1_is_recycling_and_share_0_standard_bit_for_bit(process):
    x_start = masks()
    assert torch.equal(run(RecycleMixed(1.0), process, x_start), run(RecycleXT(), process, x_start))
    assert torch.equal(run(RecycleMixed(0.0), process, x_start), run(Standard(), process, x_start))
    assert (RecycleMixed(1.0).uses_next_step, RecycleMixed(0.0).uses_next_step) == (True, False)
    assert RecycleMixed(0.0, truth_above=0.5).uses_next_step


def test_share_is_the_chance_to_be_recycled_and_the_others_have_no_first_pass(process, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    batch = 2000
    x_start, t = masks(batch, size=2), torch.full((batch,), 300)
    predict = FirstPass(lambda x: torch.full_like(x, 0.75))
    found = RecycleMixed(0.3)(predict, process, x_start, t).x_t / process.alphas_cumprod[300].sqrt().float()
    ((x, steps, samples),) = predict.asked
    assert len(samples) / batch == pytest.approx(0.3, abs=0.04)
    assert len(x) == len(steps) == len(samples)
    assert (steps == T - 1).all()
    expected = x_start.clone()
    expected[samples] = 0.5
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_below_the_noise_level_all_are_recycled(process, share):
    t, counts = torch.tensor([0, 499, 500, 501, 1000]), torch.zeros(5)
    for _ in range(200):
        predict = FirstPass()
        RecycleMixed(share, truth_above=0.5)(predict, process, masks(5, 2), t)
        (_, _, samples), *_ = predict.asked
        counts[slice(None) if samples is None else samples] += 1
    assert counts[:3].tolist() == [200] * 3, "0.5 T = 500.5"
    assert counts[3:].tolist() == [0, 0] if share == 0 else all(50 < n < 110 for n in counts[3:])


def test_only_given_ground_truth_is_corrupted(process, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    x_start = masks(40, size=12)
    corruption = Corruption("drop", MaskEncoding(3))
    predict = FirstPass(lambda x: torch.full_like(x, 0.75))
    t = torch.full((40,), 300)
    found = RecycleMixed(0.5, corruption=corruption)(predict, process, x_start, t).x_t
    found = found / process.alphas_cumprod[300].sqrt().float()
    ((x, _, samples),) = predict.asked
    given = [i for i in range(40) if i not in samples]
    torch.testing.assert_close(found[samples], torch.full_like(found[samples], 0.5))
    torch.testing.assert_close(found[given].abs(), torch.ones_like(found[given]))
    assert all(not torch.allclose(found[i], x_start[i]) for i in given)
    # what little the first pass is told of the truth is the truth
    torch.testing.assert_close(x, process.q_sample(x_start[samples], torch.full((len(samples),), T - 1), 0 * x))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_mask_scale_scales_the_mean_of_x_t_and_not_its_noise(process, share):
    x_start, b = masks(), 0.3
    predict = FirstPass(lambda x: (x_start + 1) / 2)
    found = run(RecycleMixed(share, mask_scale=b), process, x_start, predict=predict)
    plain = run(RecycleMixed(share), process, x_start, predict=predict)
    signal = process.alphas_cumprod[STEPS].sqrt().float().view(-1, 1, 1, 1) * x_start
    torch.testing.assert_close(plain - found, (1 - b) * signal, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_sampler_visits_the_states_that_training_shows(make_segmentor, process, sampler):
    """Told the truth, every state of a chain has the moments of q(x_t | b x_start)."""
    network, b = make_segmentor(steps=5, sampler=sampler), 0.3
    network.mask_scale = b
    truth = nn.functional.one_hot(torch.randint(0, 3, (1, 160, 160)), 3).movedim(-1, 1).float()
    network.denoise = network._run = lambda *a, **k: 40 * truth - 20
    states = list(network.chain(torch.zeros(1, 1, 160, 160), torch.randn, network.sampling))
    for state in states[1:]:
        t = torch.tensor([state.t])
        noise = state.x_t - b * process.alphas_cumprod[t].sqrt().float() * (2 * truth - 1)
        spread = float((1 - process.alphas_cumprod[t]).sqrt())
        assert float(noise.std()) == pytest.approx(spread, rel=0.02)
        assert abs(float((noise * (2 * truth - 1)).mean())) < 0.02
