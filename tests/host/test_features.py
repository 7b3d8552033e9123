"""Configurations and label kinds of the host, through its commands."""

import json

import numpy as np
import pytest
import torch
from tiny_project import tiny_plans

TRAINER = "nnUNetTrainerRecycleXT"
SEQUENTIAL = ("-npp", "0", "-nps", "0")


def test_2d_trains_and_predicts(project):
    project.train(TRAINER, "--disable_checkpointing", configuration="2d", fold="1")
    assert not list((project.model(TRAINER, "2d") / "fold_1").glob("*.pth")), "--disable_checkpointing"
    project.train(TRAINER, configuration="2d")
    masks = project.predict("2d", TRAINER, *SEQUENTIAL, configuration="2d")
    assert len(masks) == 2


def test_a_model_of_draws_is_trained_and_predicted_by_both_commands(project):
    trainer = "nnUNetTrainerRecycleScore"
    project.train(trainer)
    masks = project.predict("draws", trainer, *SEQUENTIAL)
    assert len(masks) == 2
    assert all(set(np.unique(mask)) <= {0, 1, 2} for mask in masks.values())
    folder = project.root / "draws_of_our_own"
    model = ("-d", project.number, "-c", "3d_fullres", "-f", "0", "-tr", trainer, "-p", "tiny", "-device", "cpu")
    options = ("--save_samples", "--save_uncertainty", "--samples", "3", "--steps", "1", "--disable_progress_bar")
    images = ("-i", str(project.raw / "imagesTs"), "-o", str(folder))
    project.run("nnunetv2_diffusion", "predict", *model, *images, *options, *SEQUENTIAL)
    assert len(list(folder.glob("*.nii.gz"))) == 2
    assert len(list((folder / "samples").glob("*/*.nii.gz"))) == 2 * 3


@pytest.mark.parametrize("trainer", ["nnUNetTrainerFlow", "nnUNetTrainerBerDiff"])
def test_a_method_is_trained_and_predicted_by_both_commands(project, trainer):
    project.train(trainer)
    masks = project.predict(trainer, trainer, *SEQUENTIAL)
    assert len(masks) == 2
    assert all(set(np.unique(mask)) <= {0, 1, 2} for mask in masks.values())
    folder = project.root / f"own_{trainer}"
    model = ("-d", project.number, "-c", "3d_fullres", "-f", "0", "-tr", trainer, "-p", "tiny", "-device", "cpu")
    options = ("--save_uncertainty", "--samples", "2", "--steps", "2", "--disable_progress_bar")
    images = ("-i", str(project.raw / "imagesTs"), "-o", str(folder))
    project.run("nnunetv2_diffusion", "predict", *model, *images, *options, *SEQUENTIAL)
    assert len(list(folder.glob("*.nii.gz"))) == 2


def test_continuing_goes_on_where_it_ended(project):
    plans = tiny_plans(project, "longer", time_sampling="importance")
    project.train(TRAINER, plans="longer")
    file = project.model(TRAINER, plans="longer") / "fold_0" / "checkpoint_final.pth"
    before = torch.load(file, weights_only=False)
    plans["configurations"]["3d_fullres"]["diffusion"]["num_epochs"] = 3
    (project.preprocessed / "longer.json").write_text(json.dumps(plans))
    project.train(TRAINER, "--c", plans="longer")
    after = torch.load(file, weights_only=False)
    assert (before["current_epoch"], after["current_epoch"]) == (2, 3)
    for key in ("train_losses", "val_losses", "mean_fg_dice"):
        assert after["logging"][key][:2] == before["logging"][key]
        assert len(after["logging"][key]) == 3
    counts = [c["optimizer_state"]["diffusion_time_sampler"]["count"].sum().item() for c in (before, after)]
    assert counts == [2 * 2 * 2, 3 * 2 * 2]  # epochs * iterations * batch


def test_checkpoint_of_another_trainer_is_refused_and_kept(project):
    source = project.model("nnUNetTrainerDiffSeg") / "fold_0"
    source.mkdir(parents=True)
    torch.save({"network_weights": {}, "trainer_name": "nnUNetTrainerOther"}, source / "checkpoint_final.pth")
    content = (source / "checkpoint_final.pth").read_bytes()
    printed = project.train("nnUNetTrainerDiffSeg", "--c", fails=True)
    assert "written by trainer nnUNetTrainerOther, expected nnUNetTrainerDiffSeg" in printed
    assert (source / "checkpoint_final.pth").read_bytes() == content


def test_typo_in_the_plans_stops_before_anything_is_written(project):
    plans = json.loads((project.preprocessed / "tiny.json").read_text())
    plans["plans_name"] = "typo"
    plans["configurations"]["3d_fullres"]["diffusion"]["setps"] = 3
    (project.preprocessed / "typo.json").write_text(json.dumps(plans))
    printed = project.train(TRAINER, plans="typo", fails=True)
    assert "unknown setting 'setps'" in printed
    assert "did you mean 'gaussian.steps'" in printed
    assert not project.model(TRAINER, plans="typo").exists()


def test_regions_with_ignore_label(regions):
    regions.train(TRAINER, "--npz")
    masks = regions.predict("regions", TRAINER, "--save_probabilities", *SEQUENTIAL)
    assert len(masks) == 2
    p = np.load(next((regions.root / "regions").glob("*.npz")))["probabilities"]
    assert len(p) == 2  # one head a region, none for ignore
    assert not np.allclose(p.sum(0), 1, atol=1e-2)  # sigmoid, not softmax: the weights said so


def test_unknown_label_is_named(regions):
    dataset = json.loads((regions.preprocessed / "dataset.json").read_text())
    kept = dict(dataset)
    dataset["labels"] = {"background": 0, "whole": 1, "ignore": 2}
    dataset.pop("regions_class_order")
    try:
        (regions.preprocessed / "dataset.json").write_text(json.dumps(dataset))
        printed = regions.train(TRAINER, fold="1", fails=True)
    finally:
        (regions.preprocessed / "dataset.json").write_text(json.dumps(kept))
    assert "holds label 3, which dataset.json does not define" in printed
    assert "case case_" in printed


@pytest.mark.slow
def test_cascade(project):
    plans = json.loads((project.preprocessed / "tiny.json").read_text())
    plans["plans_name"] = "cascade"
    configurations = plans["configurations"]
    configurations["3d_fullres"]["diffusion"]["steps"] = 1
    low = json.loads(json.dumps(configurations["3d_fullres"]))
    low.update(data_identifier="cascade_3d_lowres", next_stage="3d_cascade_fullres")
    low["spacing"] = [1.25 * s for s in low["spacing"]]
    configurations["3d_lowres"] = low
    configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    (project.preprocessed / "cascade.json").write_text(json.dumps(plans))
    project.run("nnUNetv2_preprocess", "-d", "901", "-plans_name", "cascade", "-c", "3d_lowres", "-np", "1")
    # fold all validates on all cases, so every case has a mask for the next stage
    project.train(TRAINER, configuration="3d_lowres", fold="all", plans="cascade")
    project.train(TRAINER, configuration="3d_cascade_fullres", plans="cascade")
    common = ("-d", "901", "-tr", TRAINER, "-p", "cascade", "-i", project.raw / "imagesTs", "-device", "cpu")
    low_masks, masks = project.root / "low", project.root / "high"
    project.run("nnUNetv2_predict", *common, "-c", "3d_lowres", "-f", "all", "-o", low_masks, *SEQUENTIAL)
    project.run(
        "nnUNetv2_predict", *common, "-c", "3d_cascade_fullres", "-f", "0", "-o", masks,
        "-prev_stage_predictions", low_masks, *SEQUENTIAL,
    )  # fmt: skip
    assert len(list(masks.glob("*.nii.gz"))) == 2
