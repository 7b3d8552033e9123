"""The score that makes masks draws: laws of the distance, of its gradient, and of what is learnt."""

import itertools

import pytest
import torch

from nnunetv2_diffusion.methods.recycle_score import RecycleScoreTrainer, jaccard_distance, score_gap

PATCH = (8, 12, 8)
EVERYWHERE = torch.ones(1, 1, 4, 5)


def masks(number, channels=2, hard=False):
    p = torch.rand(number, channels, 4, 5)
    return (p > 0.5).float() if hard else p


def distance(a, b, valid=EVERYWHERE, smooth=0.0):
    return jaccard_distance(a, b, valid, smooth)


def test_of_sets_it_is_one_minus_the_jaccard_index():
    a, b = masks(1, 1, hard=True)[0].bool(), masks(1, 1, hard=True)[0].bool()
    expected = 1 - float((a & b).sum() / (a | b).sum())
    assert float(distance(a[None].float(), b[None].float())) == pytest.approx(expected)


def test_it_is_a_metric():
    for a, b, c in (masks(3)[:, None] for _ in range(50)):
        assert float(distance(a, a)) == 0
        assert 0 < float(distance(a, b)) <= 1
        assert float(distance(a, b)) == pytest.approx(float(distance(b, a)))
        assert float(distance(a, c)) <= float(distance(a, b) + distance(b, c)) + 1e-6


@pytest.mark.parametrize("smooth", [0.0, 3.0])
@pytest.mark.parametrize("hard", [True, False])
def test_one_minus_it_is_a_positive_definite_kernel(smooth, hard):
    found = masks(24, 1, hard)
    gram = torch.stack([1 - distance(found, m[None].expand_as(found), smooth=smooth) for m in found])
    assert float(torch.linalg.eigvalsh(gram.double()).min()) > -1e-5


def test_voxels_without_a_truth_do_not_count():
    a, b = masks(1), masks(1)
    valid = torch.ones(1, 1, 4, 5)
    valid[..., 2:] = 0
    changed = a.clone()
    changed[..., 2:] = 1 - changed[..., 2:]
    assert torch.equal(distance(a, b, valid), distance(changed, b, valid))
    assert float(distance(a, b, torch.zeros_like(valid), smooth=1.0)) == 0, "nothing is known: no loss, no NaN"


def test_masks_that_are_empty_are_alike_and_finite():
    empty = torch.zeros(1, 2, 4, 5, requires_grad=True)
    d = distance(empty, torch.zeros(1, 2, 4, 5), smooth=10.0)
    d.sum().backward()
    assert float(d.detach()) == 0
    assert torch.isfinite(empty.grad).all()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_score_is_least_for_the_distribution_of_the_truth(share):
    a, b = masks(2, 1, hard=True)[:, None]
    d = float(distance(a, b))

    def score(q):  # the truth is a with probability share, a draw with probability q
        to_truth = d * (share * (1 - q) + (1 - share) * q)
        return to_truth - d * q * (1 - q)  # E d(p, p') / 2

    grid = [n / 100 for n in range(101)]
    assert min(grid, key=score) == pytest.approx(share)


def test_the_gradient_through_one_draw_is_that_of_the_score_in_the_mean():
    truth, codes = masks(1, hard=True), torch.randn(4, 3)
    weight = torch.randn(3, 40, requires_grad=True)

    def draw(code):
        return (code @ weight).sigmoid().reshape(1, 2, 4, 5)

    pairs = list(itertools.product(codes, codes))
    spread = torch.stack([jaccard_distance(draw(z), draw(o), EVERYWHERE) for z, o in pairs]).mean()
    score = torch.stack([jaccard_distance(draw(z), truth, EVERYWHERE) for z in codes]).mean() - spread / 2
    (expected,) = torch.autograd.grad(score, weight)
    gaps = torch.stack([score_gap(draw(z), draw(o), truth, EVERYWHERE) for z, o in pairs])
    (found,) = torch.autograd.grad(gaps.mean(), weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_no_gradient_reaches_the_other_draw():
    p, other = masks(1).requires_grad_(), masks(1).requires_grad_()
    score_gap(p, other, masks(1, hard=True), EVERYWHERE).sum().backward()
    assert other.grad is None
    assert float(p.grad.abs().sum()) > 0


def two_truths(number):
    """Images that are all alike, and targets that are one half of the patch or the other."""
    target = torch.zeros(number, 1, *PATCH, dtype=torch.int16)
    for own, left in zip(target, torch.rand(number) < 0.5, strict=True):
        own[..., : PATCH[1] // 2, :] = int(left)
        own[..., PATCH[1] // 2 :, :] = int(not left)
    return torch.linspace(-1, 1, PATCH[1])[None, None, None, :, None].expand(number, 1, *PATCH).clone(), target


def draws_after(trainer, steps):
    """Probability of the first class in the left half, for 32 draws, after some steps of training."""
    for _ in range(steps):
        image, target = two_truths(4)
        trainer.train_step({"data": image, "target": target})
    with torch.no_grad():
        image = two_truths(1)[0].expand(32, 1, *PATCH)
        p = trainer.network.probabilities(trainer.network(image, torch.randn(32, 8), full_resolution_only=True))
    return p[:, 1, :, : PATCH[1] // 2].flatten(1).mean(1)


def test_draws_take_sides_where_the_truth_does_and_their_mean_is_its_frequency(make):
    short = {"num_epochs": 1, "num_iterations_per_epoch": 200}
    draws = draws_after(make(RecycleScoreTrainer, score={"weight": 100.0}, **short), 200)
    alike = draws_after(make(RecycleScoreTrainer, score={"weight": 0.0}, **short), 200)
    assert float(draws.std()) > max(0.03, 20 * float(alike.std())), "without the score every mask is the mean"
    assert 0.35 < float(draws.mean()) < 0.65
