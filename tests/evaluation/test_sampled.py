"""Probabilities, samples and raters through the whole verb."""

import json

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813, its usual name

from nnunetv2_diffusion import cli
from nnunetv2_diffusion.evaluation import evaluate
from nnunetv2_diffusion.evaluation.evaluate import EvaluationSettings, evaluate_folders

DATASET = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii.gz"}
SHAPE = (6, 12, 12)


def write(folder, name, values):
    folder.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(values.astype(np.uint8)), str(folder / f"{name}.nii.gz"))


def truth(shift=0):
    values = np.zeros(SHAPE, int)
    values[1:5, 2 + shift : 6 + shift, 2:6] = 1
    values[1:5, 2 + shift : 6 + shift, 7:10] = 2
    return values


@pytest.fixture
def folders(tmp_path):
    """Two cases: samples of the first agree with the truth, those of the second do not agree at all."""
    gt, pred = tmp_path / "gt", tmp_path / "pred"
    for name, shifts in (("good", (0, 0)), ("poor", (0, 6))):
        write(gt, name, truth())
        write(pred, name, truth(shifts[1]))
        for index, shift in enumerate(shifts):
            write(pred / "samples" / f"{index:03d}", name, truth(shift))
        p = np.stack([truth(shifts[1]) == k for k in range(3)]).astype(np.float32)
        np.savez(pred / f"{name}.npz", probabilities=p)
    (pred / "dataset.json").write_text(json.dumps(DATASET))
    return gt, pred


def by_case(summary):
    return {entry["prediction_file"].rsplit("/", 1)[-1][:4]: entry["metrics"] for entry in summary["metric_per_case"]}


def test_scores_by_hand(folders):
    summary = evaluate_folders(*folders, EvaluationSettings(surface=False, probabilities=True)).summary
    scores = by_case(summary)
    for key in ("1", "2"):
        good, poor = scores["good"][key], scores["poor"][key]
        assert good["ECE"] == pytest.approx(0, abs=1e-6)
        assert good["Brier"] == pytest.approx(0, abs=1e-6)
        assert poor["Brier"] > 0.05
        assert good["PairwiseDice"] == good["HungarianIoU"] == 1
        assert good["GED2"] == 0
        assert poor["PairwiseDice"] == 0
        assert poor["HungarianIoU"] == 0.5
        # 2 E d(sample, rater) - E d(sample, sample') - 0, distances 0, 1 to the rater and 1 to each other
        assert poor["GED2"] == pytest.approx(2 * 0.5 - 0.5)
    assert summary["failure_detection"]["ExcessAURC"] == pytest.approx(0)
    assert summary["failure_detection"]["cases"] == 2
    assert "GED2, HungarianIoU" in summary["conventions"]["probabilities_and_samples"]


def test_raters_widen_the_reference(folders, tmp_path):
    for name in ("good", "poor"):
        write(tmp_path / "second", name, truth(6))
    settings = EvaluationSettings(surface=False)
    scores = by_case(evaluate_folders(*folders, settings, raters=[tmp_path / "second"]).summary)
    assert scores["poor"]["1"]["HungarianIoU"] == 1
    assert scores["poor"]["1"]["GED2"] == pytest.approx(0)
    assert scores["good"]["1"]["GED2"] > 0


def test_without_samples_and_probabilities_there_are_masks_only(folders):
    gt, pred = folders
    summary = evaluate_folders(gt, pred, EvaluationSettings(surface=False), samples=[]).summary
    assert "failure_detection" not in summary
    assert "Brier" not in summary["metric_per_case"][0]["metrics"]["1"]


def test_worker_processes_find_the_scorers(folders, monkeypatch):
    monkeypatch.setattr(evaluate, "CASES_A_PROCESS", 1)
    gt, pred = folders
    assert cli.main(["evaluate", str(gt), str(pred), "--no-surface", "--probabilities", "-np", "2"]) == 0
    summary = json.loads((pred / "summary.json").read_text())
    assert summary["mean"]["1"]["GED2"] == pytest.approx(0.25)


def test_a_case_in_which_nothing_is_found_has_no_agreement_and_is_counted_as_left_out(folders):
    gt, pred = folders
    write(gt, "lost", truth())
    for folder in (pred, pred / "samples" / "000", pred / "samples" / "001"):
        write(folder, "lost", 0 * truth())
    summary = evaluate_folders(gt, pred, EvaluationSettings(surface=False)).summary
    assert np.isnan(by_case(summary)["lost"]["1"]["PairwiseDice"])
    assert summary["failure_detection"]["cases"] == 2
    assert summary["failure_detection"]["left_out"] == 1
    assert "no confidence" in summary["conventions"]["probabilities_and_samples"]["failure_detection"]
