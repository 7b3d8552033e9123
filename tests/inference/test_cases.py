"""Laws of what is made of the samples of a case: numbers only, no copies, nnU-Net's own masks."""

import math
import weakref

import numpy as np
import pytest
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from tiny_model import make_model

from nnunetv2_diffusion import cli
from nnunetv2_diffusion.analysis.cases import LabelledCase
from nnunetv2_diffusion.analysis.studies import Laboratory
from nnunetv2_diffusion.checkpoints import CheckpointError
from nnunetv2_diffusion.inference import cases, sliding_window
from nnunetv2_diffusion.inference.api import predict_image
from nnunetv2_diffusion.inference.cases import draw_case, model_files
from nnunetv2_diffusion.inference.export import bounded_logits, label_map
from nnunetv2_diffusion.inference.inputs import CaseError
from nnunetv2_diffusion.inference.loading import load_predictor
from nnunetv2_diffusion.inference.options import PredictionOptions

FAMILIES = ["nnUNetTrainer", "nnUNetTrainerRecycleXT", "nnUNetTrainerHiDiff", "nnUNetTrainerRecycleScore"]
SHAPE = (10, 15, 9)
VOXELS = math.prod(SHAPE)


def load(folder, **options):
    return load_predictor(folder, options=PredictionOptions(**{"tta": "none", **options}), progress=False)


def image():
    """Preprocessed, (1, z, y, x)."""
    return torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(4))


def properties(original=SHAPE, margin=0, spacing=(1.0, 1.0, 1.0)):
    """Of a case that was cropped by a margin on every side and has the original shape then."""
    return {
        "spacing": list(spacing),
        "shape_before_cropping": tuple(n + 2 * margin for n in original),
        "bbox_used_for_cropping": [[margin, margin + n] for n in original],
        "shape_after_cropping_and_before_resampling": tuple(original),
    }


def spoil(predictor, value=math.nan):
    """Make one of the weights that the answer is made of something that is not a number."""
    network = getattr(predictor.network, "segmentor", predictor.network)
    with torch.no_grad():
        network.decoder.seg_layers[-1].bias[1] = value
    return predictor


# --- nothing that is not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", FAMILIES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_answer_that_is_not_finite_is_an_error_that_says_where(models, tmp_path, trainer, value):
    kept = []
    predictor = spoil(load(models(trainer)), value)
    with pytest.raises(CaseError) as error:
        draw_case(predictor, image(), "case_7", tmp_path, lambda member, number: kept.append(number))
    assert str(error.value).startswith("case_7: sample 0: ")
    assert f"'background' at {VOXELS} of {VOXELS} voxels" in str(error.value)
    assert kept == []


def test_of_regions_only_the_one_that_is_not_finite_is_named(models):
    with pytest.raises(CaseError, match=f"finite, of 'core' at {VOXELS} of {VOXELS} voxels; ") as error:
        draw_case(spoil(load(models("nnUNetTrainer", regions=True))), image(), "a")
    assert "whole" not in str(error.value)


@pytest.mark.parametrize("bad", [0, 1])
def test_one_voxel_of_one_step_of_the_second_sample_is_found(models, monkeypatch, bad):
    predictor = load(models(), samples=3, steps=2, save_steps=True)
    members, kept = predictor.members, []

    def spoiled(*args):
        for member in members(*args):
            if member.sample == 1:
                member.steps[bad][2, 3, 4, 5] = math.inf
            yield member

    monkeypatch.setattr(predictor, "members", spoiled)
    with pytest.raises(CaseError, match=f"a: sample 1: .*, of 'right part' at 1 of {VOXELS} voxels;"):
        draw_case(predictor, image(), "a", keep=lambda member, number: kept.append(number))
    assert kept == [0]


def test_of_many_classes_three_are_named():
    labels = {"background": 0, **{f"c{i}": i for i in range(1, 6)}}
    predictor = type("P", (), {"dataset_json": {"labels": labels}, "label_manager": type("L", (), {})()})()
    predictor.label_manager.has_regions = False
    with pytest.raises(CaseError, match=r"of 'background' at 4 of 4 voxels, 'c1' .*, 'c2' .* and 3 more;"):
        cases.check_finite(torch.full((6, 2, 2), math.nan), predictor, "a")
    cases.check_finite(torch.ones(6, 2, 2), predictor, "a")


def test_every_command_goes_through_the_check(models, images, tmp_path, capsys):
    """Weights so large that the network's answer is infinite, though they are numbers themselves."""
    folder = make_model(tmp_path / "m")
    file = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["network_weights"]["decoder.seg_layers.1.weight"].mul_(1e38)
    torch.save(checkpoint, file)
    command = ["predict", "-m", folder, "-i", images, "-o", tmp_path / "out", "-device", "cpu", "-npp", 0, "-nps", 0]
    assert cli.main([*map(str, command), "--save_uncertainty", "--disable_progress_bar"]) == 1
    printed = capsys.readouterr()
    assert "case_0: sample 0: probabilities that are not finite" in printed.err + printed.out
    assert not list((tmp_path / "out").rglob("*.nii.gz"))
    with pytest.raises(CaseError, match="not finite"):
        predict_image(load(folder), np.random.default_rng(0).normal(size=SHAPE), (1.0, 1.0, 1.0))
    labels = np.zeros(SHAPE, np.int16)
    case = LabelledCase("b", image(), properties(), image()[0].numpy(), labels)
    with pytest.raises(CaseError, match=r"b: sample 0: .*not finite"):
        Laboratory(load(folder), PredictionOptions(), 2, 2, [1], ["none"]).study(case)


@pytest.mark.parametrize("name", ["refiner.encoder.0.block.offsets.bias", "segmentor.decoder.seg_layers.1.bias"])
def test_weights_that_are_not_finite_are_refused_also_where_signs_hide_them(tmp_path, name):
    folder = make_model(tmp_path / "m", "nnUNetTrainerHiDiff", folds=2)
    file = folder / "fold_1" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["network_weights"][name].view(-1)[0] = math.nan
    torch.save(checkpoint, file)
    with pytest.raises(CheckpointError, match=f"fold_1.*{name} holds NaN"):
        load(folder)
    load_predictor(folder, folds=[0], progress=False)


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regions", [False, True])
def test_a_single_sample_is_the_blend_itself_up_to_its_logits(models, monkeypatch, regions):
    blends, mean = [], sliding_window.Blend.mean
    monkeypatch.setattr(sliding_window.Blend, "mean", lambda self: blends.append(self.total) or mean(self))
    result = draw_case(load(models(regions=regions)), image())
    (total,) = blends
    expected = bounded_logits(result.moments.mean().clone(), regions)
    logits = bounded_logits(result.take_mean(), regions, given_away=True)
    assert np.shares_memory(logits, total.numpy())
    np.testing.assert_array_equal(logits, expected)
    assert result.steps == []
    with pytest.raises(ValueError, match="no sample"):
        result.moments.mean()


def test_a_sample_is_gone_when_the_next_one_is_drawn(models, monkeypatch):
    predictor, drawn, alive = load(models(), samples=3), [], []
    members = predictor.members

    def watched(*args):
        own = members(*args)
        while True:
            alive.append(sum(sample() is not None for sample in drawn))
            member = next(own, None)
            if member is None:
                return
            drawn.append(weakref.ref(member.steps[-1]))
            yield member
            del member

    monkeypatch.setattr(predictor, "members", watched)
    draw_case(predictor, image())
    assert alive == [0] * 4


# --- masks --------------------------------------------------------------------------------------------------------

GEOMETRIES = {
    "as it is": ((1.0, 1.0, 1.0), SHAPE, 0, (1.0, 1.0, 1.0)),
    "cropped": ((1.0, 1.0, 1.0), SHAPE, 2, (1.0, 1.0, 1.0)),
    "resampled": ((1.0, 1.0, 1.0), (12, 11, 13), 1, (0.9, 1.3, 0.7)),
    "anisotropic": ((5.0, 1.0, 1.0), (12, 11, 13), 1, (4.2, 1.3, 0.7)),
    "2d": ((1.0, 1.0), (10, 11, 13), 1, (3.0, 1.3, 0.7)),
}


@pytest.mark.parametrize("function", ["resample_data_or_seg_to_shape", "resample_torch_fornnunet"])
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_masks_are_those_of_nnunets_export(models, geometry, regions, function):
    spacing, original, margin, found = GEOMETRIES[geometry]
    predictor = load(models(patch=(8, 12, 8)[-len(spacing) :], spacing=spacing, regions=regions))
    configuration = predictor.configuration_manager
    configuration.configuration["resampling_fn_probabilities"] = function
    if function.startswith("resample_torch"):
        kwargs = {"is_seg": False, "force_separate_z": False, "memefficient_seg_resampling": False}
        configuration.configuration["resampling_fn_probabilities_kwargs"] = kwargs
    logits = np.random.default_rng(0).normal(size=(2 if regions else 3, *SHAPE)).astype(np.float32)
    known = properties(original, margin, found)
    ours = label_map(logits, known, model_files(predictor))
    stock = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, predictor.plans_manager, configuration, predictor.label_manager, known, num_threads_torch=1
    )
    np.testing.assert_array_equal(ours, stock)
    assert ours.dtype == stock.dtype
    assert len(np.unique(ours)) == 3
