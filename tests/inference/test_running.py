"""Running moments and entropies against numpy on all samples at once, and against closed forms."""

import math

import numpy as np
import pytest
import torch

from nnunetv2_diffusion.inference.running import RunningMoments, entropy_of, map_limits

SPATIAL = (3, 4, 5)


def samples(count, heads, regions, seed=0):
    logits = torch.randn(count, heads, *SPATIAL, generator=torch.Generator().manual_seed(seed)) * 3
    return logits.sigmoid() if regions else logits.softmax(1)


def running(stack, regions=False):
    moments = RunningMoments(regions)
    for sample in stack:
        moments.add(sample)
    return moments


def numpy_entropy(p, regions):
    """Over the axis of heads, which is the last but three."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [-np.nan_to_num(q * np.log(q)) for q in ((p, 1 - p) if regions else (p,))]
    return sum(terms).mean(-4) if regions else terms[0].sum(-4)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize(("count", "heads"), [(1, 3), (2, 2), (7, 4), (64, 3)])
def test_running_results_equal_those_of_all_samples_at_once_in_float64(count, heads, regions):
    stack = samples(count, heads, regions)
    moments = running(stack, regions)
    p = stack.double().numpy()
    total, expected = numpy_entropy(p.mean(0), regions), numpy_entropy(p, regions).mean(0)
    for result, reference in (
        (moments.mean(), p.mean(0)),
        (moments.variance(), p.var(0).mean(0)),
        (moments.entropy(), total),
        (moments.expected_entropy(), expected),
        (moments.mutual_information(), np.maximum(total - expected, 0)),
    ):
        assert result.dtype == torch.float32
        np.testing.assert_allclose(result.numpy(), reference, atol=2e-6)
    assert moments.count == count


def test_variances_that_are_small_against_the_mean_do_not_cancel():
    """Sums of squares in float32 would lose them."""
    steps = torch.linspace(-1e-4, 1e-4, 32).view(-1, 1, 1)
    stack = torch.cat([0.9 + steps, 0.1 - steps], 1)
    expected = stack.double().numpy().var(0).mean(0)
    np.testing.assert_allclose(running(stack).variance().numpy(), expected, rtol=1e-2)


def test_the_mean_of_many_samples_stays_within_the_stated_error():
    stack = torch.rand(3000, 2, 16, generator=torch.Generator().manual_seed(0))
    error = (running(stack).mean().double() - stack.double().mean(0)).abs().max()
    assert error < (3000 + 9) * 2**-26


@pytest.mark.parametrize("regions", [False, True])
def test_one_sample_has_exactly_no_mutual_information_and_no_variance(regions):
    (sample,) = stack = samples(1, 3, regions)
    moments = running(stack, regions)
    assert torch.equal(moments.mean(), sample)
    assert not moments.mutual_information().any()
    assert not moments.variance().any()
    assert torch.equal(moments.entropy(), entropy_of(sample, regions))
    assert (moments.entropy() > 0).all()


@pytest.mark.parametrize("regions", [False, True])
def test_two_certain_samples_that_disagree_have_mutual_information_ln_2(regions):
    one_hot = torch.eye(2).view(2, 2, 1).expand(2, 2, 6)
    moments = running(one_hot, regions)
    torch.testing.assert_close(moments.mutual_information(), torch.full((6,), math.log(2)))
    assert not moments.expected_entropy().any()
    assert (moments.variance() == 0.25).all()


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_uniform_probabilities_have_entropy_ln_k_and_samples_agree_on_it(classes):
    moments = running(torch.full((4, classes, 5), 1 / classes))
    torch.testing.assert_close(moments.entropy(), torch.full((5,), math.log(classes)))
    torch.testing.assert_close(moments.mutual_information(), torch.zeros(5), atol=1e-6, rtol=0)
    assert (moments.mutual_information() >= 0).all()


def test_the_entropy_of_regions_is_the_mean_over_independent_heads():
    p = torch.tensor([0.5, 1.0, 0.0, 0.5]).view(4, 1)
    assert entropy_of(p, regions=True).item() == pytest.approx(math.log(2) / 2)


def test_samples_that_agree_but_for_rounding_have_no_negative_mutual_information():
    (sample,) = samples(1, 5, False)
    moments = running(sample + 1e-7 * torch.randn(9, *sample.shape))
    assert (moments.entropy() - moments.expected_entropy()).min() < 0
    assert moments.mutual_information().min() == 0
    assert moments.mutual_information().max() < 1e-6


def test_rounding_outside_of_0_to_1_gives_entropy_0_not_infinity():
    p = torch.tensor([[1 + 1e-7], [-1e-9]])
    for regions in (False, True):
        assert entropy_of(p, regions).abs().item() < 1e-6


@pytest.mark.parametrize("regions", [False, True])
def test_no_map_exceeds_its_limit(regions):
    stack = torch.eye(3).view(3, 3, 1) if not regions else torch.tensor([[1.0], [0.0]]).view(2, 1, 1).expand(2, 3, 1)
    moments = running(torch.cat([stack, stack]), regions)
    limits = map_limits(3, regions)
    assert set(moments.maps()) == set(limits) - {"probability"}
    for kind, values in moments.maps().items():
        assert values.max() <= limits[kind] * (1 + 1e-6)
    assert moments.entropy().max().item() == pytest.approx(limits["entropy"])
    assert moments.mutual_information().max().item() == pytest.approx(limits["mutual_information"])


def test_memory_is_independent_of_the_number_of_samples():
    moments, sizes = RunningMoments(), []
    for sample in samples(6, 3, False):
        moments.add(sample)
        held = [v for v in vars(moments).values() if isinstance(v, torch.Tensor)]
        sizes.append(sum(v.untyped_storage().nbytes() for v in held))
    assert sizes[0] == 3 * 4 * math.prod(SPATIAL)  # what is made of a single sample is made when it is asked for
    assert set(sizes[1:]) == {(3 + 2) * 4 * math.prod(SPATIAL)}


def test_samples_are_neither_kept_nor_changed():
    (sample,) = samples(1, 3, False)
    before, moments = sample.clone(), RunningMoments()
    moments.add(sample)
    sample.zero_()
    assert torch.equal(moments.mean(), before)
    again = before.clone()
    moments.add(again)
    assert torch.equal(again, before)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_samples_that_are_given_away_give_the_same_without_a_copy(count, regions):
    stack = samples(count, 3, regions)
    ours, first = RunningMoments(regions), stack[0].clone()
    for number, sample in enumerate(stack):
        ours.add(sample.clone() if number else first, given_away=True)
    expected = running(stack, regions)
    assert ours.mean().data_ptr() == first.data_ptr()
    assert torch.equal(ours.mean(), expected.mean())
    for kind, values in ours.maps().items():
        assert torch.equal(values, expected.maps()[kind])
    assert torch.equal(ours.expected_entropy(), expected.expected_entropy())
    half = RunningMoments(regions)
    half.add(stack[0].half(), given_away=True)
    assert half.mean().dtype == torch.float32


def test_a_mean_that_is_taken_is_no_more_there():
    moments = running(samples(2, 3, False))
    mean = moments.mean()
    assert moments.take_mean() is mean
    assert moments.count == 0
    with pytest.raises(ValueError, match="no sample"):
        moments.take_mean()
    moments.add(mean[:2])  # as if it were the first one


def test_samples_of_half_precision_are_summed_in_float32():
    stack = samples(8, 3, False).half()
    torch.testing.assert_close(running(stack).mean(), stack.float().mean(0))


def test_samples_may_come_from_inside_and_outside_of_inference_mode():
    stack, moments = samples(3, 2, False), RunningMoments()
    with torch.inference_mode():
        moments.add(stack[0] * 1)
    moments.add(stack[1])
    moments.add(stack[2].clone().requires_grad_())
    torch.testing.assert_close(moments.mean(), stack.mean(0))
    assert not any(values.requires_grad for values in moments.maps().values())


@pytest.mark.parametrize(
    ("second", "words"),
    [(torch.rand(3, 4), "first had"), (torch.rand(2), "heads"), (torch.ones(2, 4, dtype=torch.long), "int64")],
)
def test_a_sample_that_does_not_fit_is_refused_and_not_counted(second, words):
    moments = running(torch.rand(1, 2, 4))
    with pytest.raises(ValueError, match=words):
        moments.add(second)
    assert moments.count == 1


@pytest.mark.parametrize("name", ["mean", "variance", "entropy", "expected_entropy", "mutual_information", "maps"])
def test_without_samples_there_is_no_result(name):
    with pytest.raises(ValueError, match="no sample"):
        getattr(RunningMoments(), name)()
