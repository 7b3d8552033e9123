"""Laws of predictions whose steps are draws of their own (nnUNetTrainerRecycleScore)."""

import itertools

import pytest
import torch

from nnunetv2_diffusion.inference.loading import load_predictor
from nnunetv2_diffusion.inference.options import OptionError, PredictionOptions
from nnunetv2_diffusion.inference.predictor import PassCount
from nnunetv2_diffusion.sampling import BoxNoise, NoiseByPosition

TRAINER = "nnUNetTrainerRecycleScore"
CPU = torch.device("cpu")


def predict(folder, **options):
    """Steps of every member, and the passes."""
    data = torch.randn(1, 10, 15, 9, generator=torch.Generator().manual_seed(4))
    predictor, count = load_predictor(folder, options=PredictionOptions(**options), progress=False), PassCount()
    return [m.steps for m in predictor.members(data, count=count)], count


def single(means):
    """The draws whose means, each over one more of them, are given."""
    totals = [torch.zeros_like(means[0]), *(number * mean for number, mean in enumerate(means, start=1))]
    return [after - before for before, after in itertools.pairwise(totals)]


def test_a_code_is_the_same_everywhere_and_another_for_each_seed_sample_and_step():
    def code(seed=0, sample=0, step=0, start=(0, 0, 0), size=(4, 5, 6), planar=False):
        field = BoxNoise(seed, sample, 8, start, size, planar, CPU).code(step)
        assert field.shape == (1, 8, *(size[1:] if planar else size))
        assert torch.equal(field, field.flatten(2)[..., :1].reshape(1, 8, *[1] * (field.ndim - 2)).expand_as(field))
        return field.flatten(2)[0, :, -1]

    assert torch.equal(code(), code(start=(3, -2, 7), size=(1, 9, 2), planar=True))
    others = [code(), code(seed=1), code(sample=1), code(step=1)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(others, 2))
    many = torch.cat([code(sample=n) for n in range(500)])
    assert abs(float(many.mean())) < 0.06
    assert float(many.std()) == pytest.approx(1, abs=0.05)


def test_tiles_that_are_computed_at_once_have_the_code_of_their_case():
    parts = [BoxNoise(0, 2, 8, (n, 0, 0), (4, 5, 6), False, CPU) for n in (0, 4)]
    joined = NoiseByPosition(parts).code(1)
    assert joined.shape == (2, 8, 4, 5, 6)
    assert torch.equal(joined[0], joined[1])


@pytest.mark.parametrize("dims", [2, 3])
def test_the_answer_is_the_mean_of_the_draws(models, dims):
    patch = {"patch": (8, 8), "spacing": (1.0, 1.0)} if dims == 2 else {}
    ((*_, answer),), count = predict(models(TRAINER, **patch), tta="none", steps=4)
    (means,), _ = predict(models(TRAINER, **patch), tta="none", steps=4, save_steps=True)
    draws = single(means)
    assert count.per_tile == 4
    torch.testing.assert_close(answer, sum(draws) / 4)
    assert float((draws[0] - draws[1]).abs().max()) > 1e-3


def test_after_each_step_it_is_the_mean_of_those_so_far(models):
    """So the first steps are those of a shorter prediction, which averages as many draws."""
    (means,), _ = predict(models(TRAINER), tta="none", steps=3, save_steps=True)
    for number, mean in enumerate(means, start=1):
        ((shorter,), *_), _ = predict(models(TRAINER), tta="none", steps=number)
        torch.testing.assert_close(mean, shorter)
    assert all(float(draw.min()) > -1e-5 for draw in single(means)), "what was averaged are probabilities"


def test_eight_draws_see_the_eight_mirrored_views(models):
    ((*_, p),), count = predict(models(TRAINER))
    assert count.per_tile == 8, "the model's own number of steps"
    torch.testing.assert_close(p.sum(0), torch.ones_like(p[0]))
    (means,), _ = predict(models(TRAINER), save_steps=True)
    draws = single(means)
    assert len(draws) == 8
    assert all(float((a - b).abs().max()) > 1e-3 for a, b in itertools.combinations(draws, 2))


def test_samples_differ_and_come_again(models):
    found, _ = predict(models(TRAINER), tta="none", steps=1, samples=3)
    again, _ = predict(models(TRAINER), tta="none", steps=1, samples=3)
    other, _ = predict(models(TRAINER), tta="none", steps=1, samples=3, seed=1)
    assert all(torch.equal(a[-1], b[-1]) for a, b in zip(found, again, strict=True))
    for a, b in [*itertools.combinations(found, 2), *zip(found, other, strict=True)]:
        assert float((a[-1] - b[-1]).abs().max()) > 1e-3


def test_no_step_at_all_is_refused(models):
    with pytest.raises(OptionError, match="--steps is 0"):
        predict(models(TRAINER), steps=0)
