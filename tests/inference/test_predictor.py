"""Laws of whole predictions, on tiny networks with random weights."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813, its usual name
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunetv2_diffusion.inference import predictor as predictor_module
from nnunetv2_diffusion.inference import sliding_window
from nnunetv2_diffusion.inference.cases import describe, draw_case
from nnunetv2_diffusion.inference.loading import load_predictor
from nnunetv2_diffusion.inference.options import OptionError, PredictionOptions
from nnunetv2_diffusion.inference.predictor import PassCount

FAMILIES = ["nnUNetTrainerRecycleXT", "nnUNetTrainerSelfCondXt", "nnUNetTrainerHiDiff", "nnUNetTrainerNoDiff"]
PROPERTIES = {
    "spacing": [1.0, 1.0, 1.0], "shape_before_cropping": (10, 15, 9),
    "shape_after_cropping_and_before_resampling": (10, 15, 9),
}  # fmt: skip


def load(folder, progress=False, **options):
    return load_predictor(folder, options=PredictionOptions(**options), progress=progress)


def case(shape=(10, 15, 9)):
    """Preprocessed image, (1, z, y, x)."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(4))


def predict(folder, data=None, edit=None, **options):
    """Probabilities of every member, and the passes."""
    predictor, count = load(folder, **options), PassCount()
    if edit is not None:
        edit(predictor)
    members = list(predictor.members(case() if data is None else data, count=count))
    return [m.steps[-1] for m in members], count


def test_probabilities_are_finite_and_sum_to_one(models):
    for tta in ("none", "full", "interleaved"):
        (p,), _ = predict(models(), tta=tta)
        assert p.shape == (3, 10, 15, 9)
        torch.testing.assert_close(p.sum(0), torch.ones_like(p[0]))


@pytest.mark.parametrize("trainer", FAMILIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_tiles_does_not_change_a_bit(models, trainer, seed):
    """Neither of nnU-Net's positions nor of the tiles that are made of them."""

    def shuffled(things):
        order = torch.randperm(len(things), generator=torch.Generator().manual_seed(seed)).tolist()
        return [things[i] for i in order]

    def shuffle(predictor):
        slicers, canvas = predictor._internal_get_sliding_window_slicers, predictor.canvas
        if seed:
            predictor._internal_get_sliding_window_slicers = lambda size: shuffled(slicers(size))
        else:
            predictor.canvas = lambda image: replace(found := canvas(image), tiles=shuffled(found.tiles))

    (p,), count = predict(models(trainer), tta="none")
    (q,), _ = predict(models(trainer), edit=shuffle, tta="none")
    assert count.tiles > 1
    assert torch.equal(p, q)


def test_what_was_predicted_before_does_not_change_a_bit(models):
    predictor = load(models(), tta="none")
    first = next(predictor.members(case())).steps[-1]
    list(predictor.members(case((8, 12, 8))))
    assert torch.equal(next(predictor.members(case())).steps[-1], first)


def test_seeds_and_samples_differ_and_repeat(models):
    (a, b), _ = predict(models(), samples=2, tta="none")
    (again, _), _ = predict(models(), samples=2, tta="none")
    (other,), _ = predict(models(), seed=1, tta="none")
    assert torch.equal(a, again)
    assert not torch.equal(a, b)
    assert not torch.equal(a, other)


def test_a_sample_does_not_depend_on_how_many_are_drawn(models):
    (one,), _ = predict(models(), tta="none")
    (first, *_), _ = predict(models(), samples=3, tta="none")
    assert torch.equal(one, first)


@pytest.mark.parametrize("trainer", FAMILIES)
@pytest.mark.parametrize("options", [{"tta": "interleaved"}, {"tta": "none"}])
def test_tiles_that_are_computed_together_are_those_computed_alone(models, monkeypatch, trainer, options):
    (together,), count = predict(models(trainer), **options)
    for module in (predictor_module, sliding_window):
        monkeypatch.setattr(module, "at_once", lambda tiles, number=1: [[tile] for tile in tiles])
    (alone,), other = predict(models(trainer), **options)
    assert count.passes == other.passes == count.planned
    # a state drawn from a probability may fall on the other side of a uniform number by a rounding error
    close = (together - alone).abs() < 1e-4
    assert close.float().mean() > (0.99 if trainer == "nnUNetTrainerHiDiff" else 0.999999)


@pytest.mark.parametrize("trainer", ["nnUNetTrainerRecycleXT", "nnUNetTrainerHiDiff"])
def test_a_result_names_how_many_tiles_went_together(models, monkeypatch, trainer, tmp_path):
    """The number may change roundings, so equal bytes are claimed for equal numbers alone."""
    results = {}
    for name, batch in (("pair", 2), ("single", 1)):
        predictor = load(models(trainer), tta="none")
        sizes = []
        network = getattr(predictor.network, "segmentor", predictor.network)
        network.encoder.register_forward_pre_hook(lambda module, given, sizes=sizes: sizes.append(len(given[0])))
        monkeypatch.setitem(predictor.configuration_manager.configuration, "batch_size", batch)
        result = draw_case(predictor, case(), folder=tmp_path, to_mask=lambda p: p.argmax(0).numpy())
        named = describe(predictor, "a", PROPERTIES, result)["settings"]["tiles_at_once"]
        assert max(sizes) == named == batch
        results[name] = result.moments.mean()
    near = (results["pair"] - results["single"]).abs() < 1e-4
    assert near.float().mean() > (0.99 if trainer == "nnUNetTrainerHiDiff" else 0.999999)


class Fails:
    """A draw that runs out of the device's memory once; what it had made must be gone when it is repeated."""

    def __init__(self, draw):
        self.draw, self.made, self.left = draw, None, []

    def __call__(self, chain, plan, canvas, sample, count):
        if self.made is None:
            results = torch.zeros(5)
            self.made = weakref.ref(results)
            count.tick(3)
            raise torch.cuda.OutOfMemoryError("no room")
        self.left.append(self.made())
        return self.draw(chain, plan, canvas, sample, count)


def test_results_without_room_on_the_device_are_made_again_on_the_cpu(models, capsys):
    (expected,), passes = predict(models(), tta="none")
    predictor, count = load(models(), tta="none"), PassCount()
    chain, canvas = predictor.chain(), predictor.canvas(case())
    predictor._draw_tiles = fails = Fails(predictor._draw_tiles)
    predictor.results_device = torch.device("cuda")  # nothing is moved there: the first draw fails
    (p,) = predictor._draw(chain, predictor.schedules(chain.steps), canvas, 0, count)
    assert torch.equal(p, expected)
    assert count.passes == passes.passes
    assert fails.left == [None]
    assert "moved to the CPU" in capsys.readouterr().out
    predictor._draw_tiles = Fails(fails.draw)
    with pytest.raises(torch.cuda.OutOfMemoryError):  # there is nowhere else to go
        predictor._draw(chain, predictor.schedules(chain.steps), canvas, 0, count)


def test_no_more_tiles_go_together_than_a_training_step_holds(models):
    folder, masks = models(patch=(12, 8), spacing=(1.0, 1.0)), []
    for batch_size, expected in ((1, 1), (5, 5), (100, 32)):
        sizes = []

        def watch(predictor, batch_size=batch_size, sizes=sizes):
            predictor.configuration_manager.configuration["batch_size"] = batch_size
            predictor.network.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))

        (p,), count = predict(folder, edit=watch, tta="none")
        assert max(sizes) == expected
        assert sum(sizes) == count.passes
        masks.append(p)
    for p in masks[1:]:
        torch.testing.assert_close(p, masks[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("trainer", ["nnUNetTrainer", "nnUNetTrainerNoDiff"])
def test_a_network_without_a_chain_is_predicted_as_by_nnunet(models, trainer):
    """One tile, one view: nnU-Net's mean of logits is then that of probabilities."""
    folder, data = models(trainer), case((8, 12, 8))
    (p,), _ = predict(folder, data, tta="none")
    # without Gaussian weights, which nearly vanish in the corners of a tile in nnU-Net's half precision
    stock = nnUNetPredictor(use_gaussian=False, device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(folder), (0,))
    logits = stock.predict_logits_from_preprocessed_data(data).float()
    torch.testing.assert_close(p, logits.softmax(0), atol=2e-3, rtol=0)  # nnU-Net computes in half precision


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"tta": "none", "steps": 5}, 5),
        ({"tta": "full", "steps": 2}, 16),
        ({"tta": "interleaved", "steps": 5}, 8),
        ({"tta": "interleaved", "steps": 9}, 9),
        ({"tta": "interleaved", "steps": 8}, 8),
    ],
)
def test_passes_of_a_tile_are_those_announced(models, options, passes):
    _, count = predict(models(), **options)
    assert count.per_tile == passes
    assert count.passes == count.planned == passes * count.tiles


def test_every_step_can_be_kept_and_the_last_is_the_result(models):
    predictor = load(models(), steps=4, tta="none", save_steps=True)
    (member,) = predictor.members(case())
    (result,), _ = predict(models(), steps=4, tta="none")
    assert len(member.steps) == 4
    assert torch.equal(member.steps[-1], result)
    assert not torch.equal(member.steps[0], member.steps[1])


def test_folds_are_members_with_their_own_weights(models):
    found, count = predict(models(folds=2), samples=2, tta="none")
    assert count.members == len(found) == 4
    alone = load_predictor(models(folds=2), folds=[1], options=PredictionOptions(samples=2, tta="none"), progress=False)
    expected = [m.steps[-1] for m in alone.members(case())]
    assert torch.equal(found[2], expected[0])
    assert torch.equal(found[3], expected[1])


def test_no_steps_give_the_mask_of_hidiffs_segmentor(models):
    predictor = load(models("nnUNetTrainerHiDiff"), steps=0, tta="none")
    (p,) = (m.steps[-1] for m in predictor.members(case((8, 12, 8))))
    with torch.inference_mode():
        logits = predictor.network.segmentor(case((8, 12, 8))[None]).logits[0]
    torch.testing.assert_close(p, logits.softmax(0))


@pytest.mark.parametrize("trainer", ["nnUNetTrainerRecycleXT", "nnUNetTrainerHiDiff"])
def test_regions_are_independent_heads(models, trainer):
    (p,), _ = predict(models(trainer, regions=True), tta="interleaved")
    assert p.shape[0] == 2
    assert p.min() >= 0
    assert p.max() <= 1
    assert (p.sum(0) - 1).abs().max() > 0.01


def test_a_2d_network_goes_through_the_slices_of_a_volume(models):
    folder = models(patch=(12, 8), spacing=(1.0, 1.0))
    for options in ({"tta": "full"}, {"tta": "interleaved"}):
        (p,), count = predict(folder, **options)
        assert p.shape == (3, 10, 15, 9)
        assert count.tiles % 10 == 0
        assert torch.isfinite(p).all()


def test_slices_of_a_2d_network_see_different_noise(models):
    predictor = load(models(patch=(12, 8), spacing=(1.0, 1.0)), tta="none")
    same = case()[:, :1].expand(-1, 10, -1, -1).contiguous()
    p = next(predictor.members(same)).steps[-1]
    assert not torch.equal(p[:, 0], p[:, 1])


def test_statistics_of_a_case_are_those_of_its_members(models, tmp_path):
    predictor = load(models(), samples=3, tta="none")
    result = draw_case(predictor, case(), folder=tmp_path, to_mask=lambda p: p.argmax(0).numpy())
    members = torch.stack([m.steps[-1] for m in predictor.members(case())]).double()
    torch.testing.assert_close(result.moments.mean().double(), members.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(result.moments.variance().double(), members.var(0, False).mean(0), atol=1e-6, rtol=0)
    labels = members.argmax(1)
    for index, label in enumerate((1, 2)):
        expected = [(labels[i] == label).sum().item() for i in range(3)]
        np.testing.assert_array_equal(result.counts.voxels[index], expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("trainer", "options", "words"),
    [
        ("nnUNetTrainerNoDiff", {"samples": 2}, "samples 2.*no diffusion process"),
        ("nnUNetTrainer", {"steps": 3}, "steps 3.*no diffusion process"),
        ("nnUNetTrainerRecycleXT", {"steps": 0}, "--steps is 0"),
        ("nnUNetTrainerRecycleXT", {"steps": 5000}, "5000"),
        ("nnUNetTrainerHiDiff", {"steps": 11}, "11"),
        ("nnUNetTrainerHiDiff", {"steps": 0, "samples": 4}, "samples 4.*segmentor alone"),
    ],
)
def test_options_that_a_model_cannot_follow_are_refused(models, trainer, options, words):
    with pytest.raises(OptionError, match=words):
        load(models(trainer), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 0}, "--samples is 0, expected at least 1"),
        ({"seed": -1}, "--seed is -1"),
        ({"tta": "half"}, "--tta is 'half', expected one of"),
        ({"sampler": "euler"}, "--sampler is 'euler'"),
        ({"step_spacing": "leading"}, "--step_spacing is 'leading', expected one of linspace, trailing"),
    ],
)
def test_values_out_of_range_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        PredictionOptions(**options)


def test_settings_come_from_option_environment_and_plans_in_this_order(models, monkeypatch):
    assert load(models(steps=3)).sampling.steps == 3
    monkeypatch.setenv("nnUNet_diffusion_steps", "4")
    assert load(models(steps=3)).sampling.steps == 4
    assert load(models(steps=3), steps=6).sampling.steps == 6


def test_images_of_the_tests_are_larger_than_the_patch(images):
    assert sitk.ReadImage(str(images / "case_0_0000.nii.gz")).GetSize() == (9, 15, 10)
