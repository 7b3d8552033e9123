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
