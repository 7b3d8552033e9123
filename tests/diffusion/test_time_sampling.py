"""Laws of time-step sampling."""

import io
import math

import pytest
import torch

from nnunetv2_diffusion.diffusion import (
    TIME_SAMPLERS,
    ImportanceTimeSampler,
    UniformTimeSampler,
    make_time_sampler,
)

LOSS_SQ = (0.5, 0.1, 0.0, 2.0, 1.0, 0.3)
ranges = pytest.mark.parametrize("t_range", [(0, 6), (0, 5), (1, 6), (2, 4), (3, 4)], ids=str)


def with_history(loss_sq, count=None, **kwargs) -> ImportanceTimeSampler:
    """A sampler that has seen every step often enough, unless counts are given."""
    sampler = ImportanceTimeSampler(len(loss_sq), **kwargs)
    count = [sampler.warmup] * len(loss_sq) if count is None else count
    loss_sq = torch.as_tensor(loss_sq, dtype=torch.float64)
    sampler.load_state_dict({"loss_sq": loss_sq.clone(), "count": torch.as_tensor(count).clone()})
    return sampler


def weight_of_each_step(sampler, t_range, draws=20_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Frequency and weight of every step in a large draw, (T,) each; NaN where a step was never drawn."""
    t, weights = sampler.sample(draws, t_range)
    table = torch.full((sampler.num_timesteps,), float("nan"), dtype=torch.float64)
    table[t] = weights.double()
    assert torch.equal(table[t].float(), weights)  # a function of t
    return torch.bincount(t, minlength=sampler.num_timesteps) / draws, table


# ---- uniform


def test_samplers_are_made_by_name():
    assert set(TIME_SAMPLERS) == {"uniform", "importance", "importance-published"}
    assert isinstance(make_time_sampler("uniform", 5), UniformTimeSampler)
    assert not make_time_sampler("importance", 5).published
    assert make_time_sampler("importance-published", 5).published
    with pytest.raises(ValueError, match="time_sampling is 'other', expected one of uniform, importance"):
        make_time_sampler("other", 5)


@ranges
def test_uniform_sampling_is_uniform_over_the_allowed_range_with_weight_1(t_range):
    low, high = t_range
    frequency, weights = weight_of_each_step(UniformTimeSampler(6), t_range)
    inside = torch.arange(6).ge(low) & torch.arange(6).lt(high)
    assert bool((frequency[~inside] == 0).all())
    assert bool(((frequency[inside] - 1 / (high - low)).abs() < 0.02).all())
    assert bool((weights[inside] == 1).all())


def test_uniform_sampling_has_no_state():
    sampler = UniformTimeSampler(4)
    sampler.update([1, 2], [3.0, 4.0])
    assert sampler.state_dict() == {}
    sampler.load_state_dict({})
    with pytest.raises(ValueError, match=r"no state, the checkpoint holds \['count', 'loss_sq'\]"):
        sampler.load_state_dict(ImportanceTimeSampler(4).state_dict())


@pytest.mark.parametrize("sampler", [UniformTimeSampler(6), ImportanceTimeSampler(6), with_history(LOSS_SQ)])
def test_a_draw_is_a_batch_of_long_indices_and_float32_weights(sampler):
    t, weights = sampler.sample(7, (0, 6))
    assert t.shape == weights.shape == (7,)
    assert t.dtype == torch.long
    assert weights.dtype == torch.float32


# ---- probabilities


@ranges
@pytest.mark.parametrize(
    "loss_sq", [LOSS_SQ, (0.0,) * 6, (0.0, 0.0, 0.0, 0.0, 0.0, 5.0), (1e-20,) * 5 + (1e20,)], ids=str
)
def test_probabilities_sum_to_1_and_vanish_outside_the_allowed_range(t_range, loss_sq):
    p = with_history(loss_sq).probabilities(t_range)
    low, high = t_range
    assert p.dtype == torch.float64
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    assert bool((p[low:high] > 0).all())  # the uniform share reaches every allowed step
    assert bool((p[:low] == 0).all())
    assert bool((p[high:] == 0).all())


@ranges
def test_probabilities_are_the_root_mean_squares_mixed_with_a_uniform_share(t_range):
    p = with_history(LOSS_SQ, uniform_share=0.2).probabilities(t_range)
    roots = [math.sqrt(value) for value in LOSS_SQ]
    mixed = [0.8 * root / sum(roots) + 0.2 / 6 for root in roots]
    allowed = mixed[slice(*t_range)]
    expected = [value / sum(allowed) for value in allowed]
    torch.testing.assert_close(p[slice(*t_range)], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@ranges
def test_without_any_loss_probabilities_are_uniform_over_the_allowed_range(t_range):
    low, high = t_range
    p = ImportanceTimeSampler(6).probabilities(t_range)
    torch.testing.assert_close(p[low:high], torch.full((high - low,), 1 / (high - low), dtype=torch.float64))


@pytest.mark.parametrize("size", [4, 1001])
def test_probabilities_match_the_reference(golden, size):
    g = {k.removeprefix(f"n{size}__"): v for k, v in golden("imgx_time_sampler").items()}
    for history, expected in (
        (g["loss_sq_hist"], g["probs_from_loss_sq"]),
        (torch.zeros(size), g["probs_from_zero_loss_sq"]),
    ):
        p = with_history(history, torch.full((size,), 10)).probabilities((0, size))
        torch.testing.assert_close(p.float(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("t_range", [(0, 1000), (0, 1), (500, 1001)], ids=str)
def test_restricted_probabilities_are_those_of_the_reference_renormalised(golden, t_range):
    g = golden("imgx_time_sampler")
    p = with_history(g["n1001__loss_sq_hist"]).probabilities(t_range)
    allowed = g["n1001__probs_from_loss_sq"].double()[slice(*t_range)]
    torch.testing.assert_close(p[slice(*t_range)], allowed / allowed.sum(), rtol=1e-5, atol=1e-12)


def test_restricted_draws_have_the_frequencies_of_the_reference(golden):
    g = golden("imgx_time_sampler")
    sampler = with_history(g["upd__loss_sq_hist"])
    expected = g["imp__freq_range0_5"]
    torch.testing.assert_close(sampler.probabilities((0, 5)), expected, rtol=0, atol=5e-3)
    frequency, _ = weight_of_each_step(sampler, (0, 5), draws=200_000)
    torch.testing.assert_close(frequency.double(), expected, rtol=0, atol=1e-2)


# ---- importance weights


@ranges
def test_weights_are_one_over_p_times_the_number_of_allowed_steps(t_range):
    sampler = with_history(LOSS_SQ)
    low, high = t_range
    frequency, weights = weight_of_each_step(sampler, t_range, draws=200_000)
    p = sampler.probabilities(t_range)
    assert bool(weights[low:high].isfinite().all())  # every allowed step was drawn
    torch.testing.assert_close(weights[low:high], 1 / (p[low:high] * (high - low)), rtol=1e-6, atol=0)
    assert bool(((frequency - p).abs() < 5 * (p * (1 - p) / 200_000).sqrt() + 1e-12).all())


@ranges
def test_the_weighted_mean_is_the_uniform_mean_exactly_in_expectation(t_range):
    sampler = with_history(LOSS_SQ)
    low, high = t_range
    values = torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0, 9.0], dtype=torch.float64)
    _, weights = weight_of_each_step(sampler, t_range, draws=200_000)
    expectation = (sampler.probabilities(t_range) * weights.nan_to_num() * values).sum()
    assert expectation.item() == pytest.approx(values[low:high].mean().item(), rel=1e-6)


def test_the_weighted_mean_of_draws_estimates_the_uniform_mean():
    sampler = with_history(LOSS_SQ, uniform_share=0.1)
    values = torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0, 9.0])
    t, weights = sampler.sample(400_000, (0, 5))
    estimates = weights * values[t]
    error = estimates.mean().item() - values[:5].mean().item()
    assert abs(error) < 5 * estimates.std().item() / math.sqrt(len(t))
    assert abs(values[t].mean().item() - values[:5].mean().item()) > 0.3  # without weights it would be biased


@ranges
def test_the_published_weight_is_p_before_renormalising_times_all_steps(t_range):
    sampler, correct = with_history(LOSS_SQ, published=True), with_history(LOSS_SQ)
    low, high = t_range
    frequency, weights = weight_of_each_step(sampler, t_range, draws=100_000)
    p = correct.probabilities((0, 6))
    torch.testing.assert_close(weights[low:high], p[low:high] * 6, rtol=1e-6, atol=0)
    expected = correct.probabilities(t_range)  # drawn as without the mistake
    assert bool(((frequency - expected).abs() < 5 * (expected * (1 - expected) / 100_000).sqrt() + 1e-12).all())


def test_the_published_weight_is_made_of_the_probabilities_that_the_reference_reports(golden):
    g = golden("imgx_time_sampler")
    sampler = with_history(g["upd__loss_sq_hist"], published=True)
    _, weights = weight_of_each_step(sampler, (0, 5), draws=200_000)
    torch.testing.assert_close(weights[:5].double() / 6, g["imp__probs_t_by_index"][:5].double(), rtol=1e-5, atol=1e-9)


# ---- history


def test_an_update_matches_the_reference_with_a_repeated_step(golden):
    g = {k.removeprefix("upd__"): v for k, v in golden("imgx_time_sampler").items() if k.startswith("upd__")}
    sampler = with_history(g["loss_sq_hist"], g["loss_count_hist"])
    sampler.update(g["t_index"].tolist(), g["loss_batch"].tolist())
    torch.testing.assert_close(sampler.loss_sq.float(), g["loss_sq_hist_new"], rtol=1e-6, atol=0)
    assert sampler.count.tolist() == g["loss_count_hist_new"].tolist()


def test_the_average_moves_towards_the_squared_loss():
    sampler = with_history((4.0, 4.0), decay=0.75)
    sampler.update([1], [4.0])
    assert sampler.loss_sq.tolist() == pytest.approx([4.0, 0.75 * 4 + 0.25 * 16])
    for _ in range(200):
        sampler.update([1], [3.0])
    assert sampler.loss_sq[1].item() == pytest.approx(9.0)


def test_steps_with_a_higher_loss_are_drawn_more_often():
    sampler = ImportanceTimeSampler(3, warmup=1)
    for _ in range(50):
        sampler.update([0, 1, 2], [1.0, 2.0, 3.0])
    p = sampler.probabilities((0, 3))
    assert p[0] < p[1] < p[2]
    assert (p[2] / p[1]).item() == pytest.approx(1.5, rel=0.02)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_is_ignored(bad):
    sampler = with_history(LOSS_SQ)
    before = sampler.probabilities((0, 6))
    sampler.update([3, 0], [bad, bad])
    assert torch.equal(sampler.probabilities((0, 6)), before)
    assert sampler.count.tolist() == [10] * 6  # not a visit either


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_does_not_disable_the_sampler(bad):
    sampler, clean = (with_history(LOSS_SQ) for _ in range(2))
    sampler.update([3, 3, 1, 5], [7.0, bad, bad, 0.2])
    clean.update([3, 5], [7.0, 0.2])
    assert torch.equal(sampler.loss_sq, clean.loss_sq)
    _, weights = sampler.sample(100, (0, 6))
    assert bool(weights.isfinite().all())
    assert weights.unique().numel() > 1


def test_steps_and_losses_of_different_numbers_are_an_error():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        ImportanceTimeSampler(4).update([1, 2], [0.5])


# ---- warm-up


def test_warm_up_draws_only_steps_that_lack_visits_with_weight_1(golden):
    g = golden("imgx_time_sampler")
    sampler = with_history(g["upd__loss_sq_hist"], g["upd__loss_count_hist"])  # only the last step lacks visits
    frequency, weights = weight_of_each_step(sampler, (0, 6), draws=1000)
    assert torch.equal(frequency.double(), g["warm__freq_range0_6"])
    assert weights[5] == 1


@pytest.mark.parametrize("size", [4, 1001])
def test_warm_up_draws_in_proportion_to_the_visits_that_are_lacking_as_the_reference(golden, size):
    g = {k.removeprefix(f"n{size}__"): v for k, v in golden("imgx_time_sampler").items()}
    sampler = with_history(g["loss_sq_hist"], g["loss_count_hist"])
    draws = 200_000
    t, weights = sampler.sample(draws, (0, size))
    frequency = torch.bincount(t, minlength=size) / draws
    expected = g["probs_from_count"]
    assert bool((frequency[expected == 0] == 0).all())
    assert bool(((frequency - expected).abs() <= 6 * (expected / draws).sqrt()).all())
    assert bool((weights == 1).all())


def test_after_warm_up_of_a_history_without_losses_draws_are_uniform_as_in_the_reference(golden):
    g = golden("imgx_time_sampler")
    frequency, weights = weight_of_each_step(with_history(torch.zeros(4)), (0, 4))
    torch.testing.assert_close(frequency, g["n4__probs_from_full_count"], rtol=0, atol=0.02)
    torch.testing.assert_close(weights, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("t_range", [(0, 6), (0, 5), (2, 4)], ids=str)
def test_warm_up_ends_after_its_visits_of_every_allowed_step(t_range):
    sampler = ImportanceTimeSampler(6, warmup=3)
    low, high = t_range
    for _ in range(3 * (high - low)):
        assert bool((sampler.count[low:high] < 3).any())
        t, weights = sampler.sample(1, t_range)
        assert weights.item() == 1
        assert sampler.count[t] < 3
        sampler.update(t.tolist(), [0.1 + t.item()])
    assert sampler.count.tolist() == [3 if low <= step < high else 0 for step in range(6)]
    t, weights = sampler.sample(500, t_range)
    torch.testing.assert_close(weights, (1 / (sampler.probabilities(t_range)[t] * (high - low))).float())
    assert weights.unique().numel() == high - low  # every step has its own loss here


def test_without_warm_up_the_first_draw_is_uniform_with_weight_1():
    frequency, weights = weight_of_each_step(ImportanceTimeSampler(4, warmup=0), (0, 3))
    assert bool(((frequency[:3] - 1 / 3).abs() < 0.02).all())
    torch.testing.assert_close(weights[:3], torch.ones(3, dtype=torch.float64))


# ---- checkpoint


def through_a_file(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save({"optimizer": {"history": state}}, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)["optimizer"]["history"]


@pytest.mark.parametrize("carry", [lambda state: state, through_a_file], ids=["direct", "file"])
def test_a_restored_history_continues_identically(carry):
    original = ImportanceTimeSampler(6, warmup=1)
    original.update([0, 1, 2, 3, 4, 5, 1], [0.3, 0.2, 0.9, 1.5, 0.1, 2.0, 0.4])
    restored = ImportanceTimeSampler(6, warmup=1)
    restored.load_state_dict(carry(original.state_dict()))
    assert torch.equal(restored.loss_sq, original.loss_sq)
    assert torch.equal(restored.count, original.count)
    draws = []
    for sampler in (original, restored):
        torch.manual_seed(5)
        draws.append(sampler.sample(50, (0, 5)))
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])


def test_a_restored_history_is_a_copy():
    state = {"loss_sq": torch.zeros(4, dtype=torch.float64), "count": torch.zeros(4, dtype=torch.long)}
    sampler = ImportanceTimeSampler(4)
    sampler.load_state_dict(state)
    sampler.update([1], [2.0])
    assert state["loss_sq"].tolist() == [0.0] * 4
    assert state["count"].tolist() == [0] * 4


def test_a_history_in_other_dtypes_is_restored_in_the_sampler_s_own():
    sampler = ImportanceTimeSampler(2)
    sampler.load_state_dict({"loss_sq": torch.tensor([0.25, 1.0]), "count": torch.tensor([3, 4], dtype=torch.int32)})
    assert sampler.loss_sq.dtype == torch.float64
    assert sampler.count.dtype == torch.long
    assert sampler.loss_sq.tolist() == [0.25, 1.0]


@pytest.mark.parametrize("key", ["loss_sq", "count"])
def test_a_history_of_another_length_is_an_error_and_changes_nothing(key):
    sampler = with_history(LOSS_SQ)
    state = {**ImportanceTimeSampler(6).state_dict(), key: torch.zeros(5)}
    with pytest.raises(ValueError, match=r"history has 5 steps, the settings have 6"):
        sampler.load_state_dict(state)
    assert sampler.loss_sq.tolist() == pytest.approx(LOSS_SQ)
    assert sampler.count.tolist() == [10] * 6


@pytest.mark.parametrize("key", ["loss_sq", "count"])
def test_a_history_without_a_key_is_an_error_that_names_it(key):
    sampler = with_history(LOSS_SQ)
    state = {k: v for k, v in sampler.state_dict().items() if k != key}
    with pytest.raises(ValueError, match=rf"history has no '{key}'"):
        sampler.load_state_dict(state)
