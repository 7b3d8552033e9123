"""Laws of chains taken apart, and of the loop that puts them together."""

import pytest
import torch

from nnunetv2_diffusion.diffusion import GaussianDiffusion, linear_beta_schedule
from nnunetv2_diffusion.inference.loading import load_predictor
from nnunetv2_diffusion.inference.options import PredictionOptions
from nnunetv2_diffusion.inference.sliding_window import (
    Blend,
    at_once,
    make_tiles,
)
from nnunetv2_diffusion.sampling import BoxNoise, Chain, Estimator, SamplingConfig, SinglePass, Window, loop, run_chain
from nnunetv2_diffusion.sampling.views import mirror, mirror_views, schedules

CPU = torch.device("cpu")
VIEWS = mirror_views((0, 1, 2))


def box(size, channels=2, start=(0, 0, 0), sample=0):
    return BoxNoise(0, sample, channels, start, size, False, CPU)


class Counting(Chain):
    """Estimates that tell what they were given: the image's first channel, the step and the state."""

    steps = 4

    def __init__(self, estimate):
        self.function, self.given = estimate, []

    def look(self, image):
        return Window(image)

    def start(self, prior, noise):
        return noise.normal(0)

    def estimate(self, window, state, prior, previous, step):
        self.given.append((step, state, previous))
        return self.function(window.image, state, step)

    def advance(self, state, estimate, prior, step, noise):
        return state + noise.normal(step + 1)


def classes(image):
    """Probabilities that follow the image, whatever its view."""
    p = image[:, :1].sigmoid()
    return torch.cat([p, 1 - p], 1)


def run(chain, image, schedule):
    return [step.answer for step in run_chain(chain, Estimator(chain, image), schedule, box(image.shape[2:]))]


@pytest.mark.parametrize("tta", ["none", "full", "interleaved"])
def test_views_are_turned_back(tta):
    image = torch.randn(1, 1, 4, 5, 6)
    for schedule in schedules(tta, VIEWS, 4):
        for estimate in run(Counting(lambda x, state, step: classes(x)), image, schedule):
            torch.testing.assert_close(estimate, classes(image))


def test_the_state_is_mirrored_with_the_image():
    image = torch.randn(1, 1, 4, 5, 6)
    expected = box((4, 5, 6)).normal(0).softmax(1)
    for view in VIEWS:
        first = run(Counting(lambda x, state, step: state.softmax(1)), image, [[view]] * 4)[0]
        torch.testing.assert_close(first, expected)


def test_the_chain_goes_on_from_the_mean_estimate_and_passes_it_on():
    image = torch.zeros(1, 1, 2, 2, 2)
    chain = Counting(lambda x, state, step: torch.full((1, 2, 2, 2, 2), float(step)))
    run(chain, image, [[()]] * 4)
    assert [step for step, _, _ in chain.given] == [0, 1, 2, 3]
    assert chain.given[0][2] is None
    assert [float(previous.mean()) for _, _, previous in chain.given[1:]] == [0.0, 1.0, 2.0]
    noise = box((2, 2, 2))
    for index, (_, state, _) in enumerate(chain.given):
        torch.testing.assert_close(state, sum(noise.normal(i) for i in range(index + 1)))


def cover(shape, patch, order=1):
    """Overlapping tiles of a volume, as nnU-Net would place them, in either order."""
    starts = [sorted({0, n - p}) for n, p in zip(shape, patch, strict=True)]
    slicers = [
        (slice(None), *(slice(s, s + p) for s, p in zip((a, b, c), patch, strict=True)))
        for a in starts[0]
        for b in starts[1]
        for c in starts[2]
    ]
    return make_tiles(slicers[::order], (0, 0, 0))


def test_tiles_come_in_one_order():
    shape, patch = (6, 7, 8), (4, 5, 8)
    groups = at_once(cover(shape, patch), 3)
    assert groups == at_once(cover(shape, patch, order=-1), 3)
    assert [len(group) for group in groups] == [3, 1]


def test_a_blend_of_equal_opinions_is_that_opinion():
    shape, patch = (6, 7, 8), (4, 5, 8)
    blend = Blend(2, shape, torch.rand(patch) + 0.01, CPU)
    values = torch.randn(2, *shape)
    for tile in cover(shape, patch):
        blend.add(tile, values[tile.index][None])
    torch.testing.assert_close(blend.mean()[0], values)


# --- what a chain returns ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("independent", "answers", "given"),
    [(False, [0.0, 0.5, 1.5, 2.5], [0.0, 0.5, 1.5]), (True, [0.0, 0.5, 1.0, 1.5], [0.0, 1.0, 2.0])],
)
def test_what_a_chain_returns_and_what_it_goes_on_from(independent, answers, given):
    image, order = torch.zeros(1, 1, 2, 2, 2), iter(range(100))
    chain = Counting(lambda x, state, step: torch.full((1, 2, 2, 2, 2), float(next(order))))
    chain.independent = independent
    found = run(chain, image, [[()], [(0,)], [()], [(0,)]])
    assert [float(e.mean()) for e in found] == answers
    assert [float(previous.mean()) for _, _, previous in chain.given[1:]] == given


def test_the_mean_of_draws_counts_every_pass_once():
    image, order = torch.zeros(1, 1, 2, 2, 2), iter([0.0, 3.0, 6.0])
    chain = Counting(lambda x, state, step: torch.full((1, 2, 2, 2, 2), next(order)))
    chain.independent = True
    found = run(chain, image, [[()], [(0,), (1,)]])
    assert [float(e.mean()) for e in found] == [0.0, 3.0]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_gaussian_chain_told_the_truth_returns_it(make_segmentor, sampler):
    network = make_segmentor(steps=5, sampler=sampler)
    truth = torch.nn.functional.one_hot(torch.arange(16 * 20).reshape(1, 16, 20) % 3, 3).movedim(-1, 1).float()
    network.denoise = network._run = lambda *a, **k: 40 * truth - 20
    chain = network.make_chain(network.sampling)
    noise = BoxNoise(0, 0, 3, (7, 0, 0), (1, 16, 20), True, CPU)
    image = torch.randn(1, 1, 16, 20)
    *_, last = run_chain(chain, Estimator(chain, image), [[()]] * 5, noise)
    torch.testing.assert_close(last.answer, truth, atol=1e-6, rtol=0)


class BoxStreams:
    """Noise by position where the stock call takes noise by content; one tile is the whole case."""

    def __init__(self, hashes, seed, sample, shape, device):
        size = (1,) * (4 - len(shape)) + tuple(shape[1:])
        self.box = BoxNoise(seed, sample, shape[0], (0, 0, 0), size, len(shape) == 3, device)

    def __getattr__(self, kind):
        return getattr(self.box, kind)


@pytest.mark.parametrize(
    "trainer", ["RecycleXT", "SelfCondXt", "RecycleScore", "HiDiff", "DiffSeg", "NoDiff", "Flow", "BerDiff"]
)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_stock_call_and_our_predictor_agree_where_their_noise_does(models, monkeypatch, trainer, sampler):
    folder = models(f"nnUNetTrainer{trainer}")
    steps = 1 if trainer in ("RecycleScore", "NoDiff") else 3  # the stock call draws one mask of RecycleScore
    ours = load_predictor(folder, progress=False)
    samples = 1 if trainer == "NoDiff" else 2
    given = {} if trainer == "NoDiff" else {"sampler": sampler, "step_spacing": "trailing", "seed": 3}
    ours.set_options(PredictionOptions(steps=steps, samples=samples, tta="none", **given))
    image = torch.randn(1, *ours.configuration_manager.patch_size)
    mean = sum(member.steps[-1] for member in ours.members(image)) / samples
    monkeypatch.setattr(loop, "NoiseByContent", BoxStreams)
    ours.network.sampling = ours.sampling
    with torch.inference_mode():
        stock = ours.network(image[None])
    assert torch.equal(stock.argmax(1)[0], mean.argmax(0))
    torch.testing.assert_close(stock.softmax(1)[0], mean, atol=2e-4, rtol=0)


def test_the_prior_of_interleaved_views_is_their_mean(models):
    network = load_predictor(models("nnUNetTrainerHiDiff"), progress=False).network
    image = torch.randn(1, 1, 8, 12, 8)
    chain = network.make_chain(SamplingConfig(2, "ddim"))
    with torch.inference_mode():
        found = Estimator(chain, image).prior(VIEWS)
        expected = [mirror(network.prior(network.segmentor(mirror(image, v)).logits), v) for v in VIEWS]
    torch.testing.assert_close(found, sum(expected) / len(expected))


def test_mirroring_of_a_single_pass_is_nnunets_mean_of_views_in_probabilities(make_unet):
    network = make_unet(deep_supervision=False)
    image, views = torch.randn(1, 1, 16, 20), mirror_views((0, 1))
    chain = SinglePass(network, sigmoid=False)
    with torch.inference_mode():
        found = [run(chain, image, schedule)[-1] for schedule in schedules("full", views, 1)]
        expected = [mirror(network(mirror(image, v)).softmax(1), v) for v in views]
    torch.testing.assert_close(sum(found) / 4, sum(expected) / 4)


def test_gaussian_process_of_more_steps_than_trained_is_refused(make_segmentor):
    network = make_segmentor(timesteps=3, steps=3)
    with pytest.raises(ValueError, match="4"):
        network.make_chain(SamplingConfig(4))
    assert GaussianDiffusion(linear_beta_schedule(3)).respace(3).num_timesteps == 3
