"""Class probabilities sum to 1 in everything that leaves a chain, whatever network and file format."""

import json
import math

import numpy as np
import pytest
import tifffile
import torch
from skimage import io
from test_predict import predict

from nnunetv2_diffusion import predict_image
from nnunetv2_diffusion.inference.cases import draw_case
from nnunetv2_diffusion.inference.loading import load_predictor
from nnunetv2_diffusion.inference.options import PredictionOptions
from nnunetv2_diffusion.sampling import BoxNoise, Estimator, run_chain

CHAINS = {
    "RecycleXT": "GaussianChain",
    "HiDiff": "BernoulliChain",
    "RecycleScore": "CodeChain",
    "NoDiff": "SinglePass",
    "HiDiff prior only": "SinglePass",
    "HiDiff that does not pay": "SinglePass",
}


def network_of(models, name, regions=False):
    network = load_predictor(models(f"nnUNetTrainer{name.split()[0]}", regions=regions), progress=False).network
    if name.endswith("not pay"):
        network.refiner_pays, network.always_refine = False, False
    return network, None if name.endswith("only") else network.sampling


def answers(network, config, regions, image=None):
    """What a chain yields for one tile, and the chain."""
    torch.manual_seed(0)
    image = torch.randn(1, 1, 8, 12, 8) if image is None else image
    chain = network.make_chain(config)
    noise = BoxNoise(0, 0, chain.channels, (0, 0, 0), (8, 12, 8), False, torch.device("cpu"))
    schedule = [[(), (0,)]] * chain.steps
    with torch.inference_mode():
        estimator = Estimator(chain, image)
        return chain, [step.answer for step in run_chain(chain, estimator, schedule, noise)]


@pytest.mark.parametrize("name", CHAINS)
def test_classes_of_every_chain_are_a_distribution_after_every_step(models, name):
    network, config = network_of(models, name)
    chain, found = answers(network, config, False)
    assert type(chain).__name__ == CHAINS[name]
    assert len(found) == chain.steps
    for p in found:
        assert p.min() >= 0
        torch.testing.assert_close(p.sum(1), torch.ones(1, 8, 12, 8), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CHAINS)
def test_regions_of_every_chain_stay_what_they_are(models, name):
    network, config = network_of(models, name, regions=True)
    chain, found = answers(network, config, True)
    for p in found:
        assert 0 <= p.min() <= p.max() <= 1
        assert torch.equal(chain.answer(p), p)


def test_classes_that_are_all_improbable_are_a_distribution(models):
    network, config = network_of(models, "HiDiff")
    chain = network.make_chain(config)
    p = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1e-9, 0.0, 0.2]])[..., None, None]
    found = chain.answer(p)
    torch.testing.assert_close(found.sum(1), torch.ones(3, 1, 1))
    torch.testing.assert_close(found[:2, :, 0, 0], torch.full((2, 3), 1 / 3))
    assert found[2, 2] > 0.999


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("bad", ["weights", "image"])
def test_what_is_not_finite_is_an_error_and_no_mask(models, name, bad):
    network, config = network_of(models, name)
    image = torch.randn(1, 1, 8, 12, 8)
    if bad == "weights":
        first = next(network.parameters())
        first.data.flatten()[0] = math.nan
        reason = "1 of its weights are not finite.*-chk checkpoint_best.pth"
    else:
        image[0, 0, 3, 3, 3] = math.nan
        reason = "NaN or infinite values"
    network.sampling = config
    with torch.inference_mode(), pytest.raises(ValueError, match=reason):
        network(image)  # as nnU-Net's own command calls it


def test_a_finite_network_may_have_large_logits(models):
    """The sum that is looked at can overflow where no value does."""
    network, _ = network_of(models, "NoDiff")
    network.check_answer(torch.full((4,), 3e38))


# ---- files and arrays


def image_2d(seed=0):
    return np.random.default_rng(seed).integers(0, 255, (18, 23)).astype(np.uint8)


FORMATS = {
    ".nii.gz": {"reader": "SimpleITKIO"},
    ".png": {"reader": "NaturalImage2DIO", "patch": (16, 20), "spacing": (1.0, 1.0)},
    ".tif": {"reader": "Tiff3DIO"},
}


def inputs(folder, ending, images):
    if ending == ".nii.gz":
        return images
    folder.mkdir()
    if ending == ".png":
        io.imsave(str(folder / "case_0_0000.png"), image_2d(), check_contrast=False)
    else:
        volume = np.random.default_rng(0).normal(size=(9, 13, 10)).astype(np.float32)
        tifffile.imwrite(folder / "case_0_0000.tif", volume)
        (folder / "case_0.json").write_text(json.dumps({"spacing": [1.0, 1.0, 1.0]}))
    return folder


def read_map(folder, kind, scales):
    (file,) = (f for f in (folder / "uncertainty" / kind).glob("case_0.*") if f.suffix != ".json")
    if file.suffix == ".png":
        return io.imread(file) * scales[kind] / 65535
    if file.suffix == ".tif":
        return tifffile.imread(file)
    import SimpleITK as sitk  # noqa: N813, its usual name

    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("trainer", ["HiDiff", "RecycleXT"])
def test_written_maps_are_a_distribution_and_agree_with_the_npz(models, images, tmp_path, trainer, ending):
    model = models(f"nnUNetTrainer{trainer}", ending=ending, **FORMATS[ending])
    given = inputs(tmp_path / "in", ending, images)
    asked = ("--samples", 2, "--steps", 2, "--save_uncertainty", "--save_probabilities", "--save_steps")
    assert predict(model, given, tmp_path / "out", *asked) == 0
    npz = np.load(tmp_path / "out" / "case_0.npz")["probabilities"].astype(float)
    np.testing.assert_allclose(npz.sum(0), 1, atol=2e-3)
    scales = json.loads((tmp_path / "out" / "uncertainty" / "case_0.json").read_text()).get("map_scales", {})
    maps = {k: read_map(tmp_path / "out", k, scales) for k in ("probability_left_part", "probability_right_part")}
    for head, values in enumerate(maps.values(), start=1):
        np.testing.assert_allclose(values, npz[head].reshape(values.shape), atol=2e-3)
    assert sum(maps.values()).max() <= 1 + 1e-4
    assert read_map(tmp_path / "out", "entropy", scales).max() <= math.log(3) + 1e-4


def test_the_programming_interface_gives_a_distribution(models):
    model = load_predictor(models("nnUNetTrainerHiDiff", ending=".png", **FORMATS[".png"]), progress=False)
    found = predict_image(model, image_2d().astype(np.float32), spacing=(1.0, 1.0), samples=2, steps=2)
    total = found.maps["probability_left_part"] + found.maps["probability_right_part"]
    assert total.max() <= 1 + 1e-5
    assert found.maps["entropy"].max() <= math.log(3) + 1e-5


@pytest.mark.parametrize("tta", ["none", "full"])
def test_steps_and_moments_of_a_case_are_distributions(models, tta):
    options = PredictionOptions(steps=2, samples=2, save_steps=True, tta=tta)
    predictor = load_predictor(models("nnUNetTrainerHiDiff"), options=options, progress=False)
    members = []
    result = draw_case(predictor, torch.randn(1, 9, 14, 9), keep=lambda member, number: members.append(member))
    for p in [result.moments.mean(), *result.steps, *(step for member in members for step in member.steps)]:
        torch.testing.assert_close(p.sum(0), torch.ones(p.shape[1:]), atol=1e-4, rtol=0)
    assert result.moments.entropy().max() <= math.log(3) + 1e-5
    assert result.moments.mutual_information().max() <= math.log(3)


# ---- what plans and environment say


@pytest.mark.parametrize("trainer", ["HiDiff", "RecycleXT"])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_the_spacing_of_the_plans_is_that_of_the_network(models, trainer, spacing):
    predictor = load_predictor(models(f"nnUNetTrainer{trainer}", step_spacing=spacing), progress=False)
    assert predictor.network.sampling.step_spacing == predictor.sampling.step_spacing == spacing


@pytest.mark.parametrize("trainer", ["HiDiff", "RecycleXT", "RecycleScore"])
def test_a_network_that_the_host_compiles_keeps_its_chain(models, monkeypatch, trainer):
    folder = models(f"nnUNetTrainer{trainer}")
    expected = type(load_predictor(folder, progress=False).chain())
    monkeypatch.setenv("nnUNet_compile", "1")
    predictor = load_predictor(folder, progress=False)  # nothing is compiled before the first pass
    assert type(predictor.chain()) is expected
    network = predictor.network
    assert network.refiner._compiled_call_impl is not None if trainer == "HiDiff" else network._run != network.denoise


@pytest.mark.parametrize("pays", [(True, False), (False, True), (False, False)])
def test_folds_with_and_without_a_refiner_that_pays_are_averaged(models, pays, capsys):
    """Each by its own verdict, unless steps are asked for."""
    folder, image = models("nnUNetTrainerHiDiff", folds=2), torch.randn(1, 8, 12, 8)
    found = {}
    for steps in (None, 0, 3):
        options = PredictionOptions(steps=steps, tta="none", save_steps=True)
        predictor = load_predictor(folder, options=options, progress=False)
        if steps is None:
            for weights, used in zip(predictor.list_of_parameters, pays, strict=True):
                state = weights["_extra_state"]
                weights["_extra_state"] = state if used else state + 2
        found[steps] = [member.steps[-1] for member in predictor.members(image)]
    for fold, used in enumerate(pays):
        torch.testing.assert_close(found[None][fold], found[3 if used else 0][fold])
    assert capsys.readouterr().out.count("the segmentor's own masks are given") == 1
