"""Scores are of one run: files of two in a folder are refused by their ids."""

import json

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813, its usual name

from nnunetv2_diffusion import cli
from nnunetv2_diffusion.evaluation import EvaluationError, run_ids
from nnunetv2_diffusion.evaluation.evaluate import EvaluationSettings, evaluate_folders
from nnunetv2_diffusion.evaluation.results import to_json
from nnunetv2_diffusion.evaluation.summaries import read_summary
from nnunetv2_diffusion.inference.runs import fingerprint

DATASET = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}
SETTINGS = EvaluationSettings(surface=False)
CASES = ("one", "two")


def write_json(file, **content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def record(pred, case, run, **content):
    files = {f.relative_to(pred).as_posix(): fingerprint(f) for f in pred.rglob(f"{case}.nii.gz")}
    write_json(pred / ".run/cases" / f"{case}.json", **{"run_id": run, "case": case, "files": files, **content})


@pytest.fixture
def folders(tmp_path):
    """References, and a run "A" with two samples of each of two cases."""
    gt, pred = tmp_path / "gt", tmp_path / "pred"
    mask = np.zeros((4, 6, 6), np.uint8)
    mask[1:3, 2:5, 2:5] = 1
    for folder in (gt, pred, pred / "samples/000", pred / "samples/001"):
        folder.mkdir(parents=True)
        for case in CASES:
            sitk.WriteImage(sitk.GetImageFromArray(mask), str(folder / f"{case}.nii.gz"))
    write_json(pred / "dataset.json", **DATASET)
    write_json(pred / "predict_from_raw_data_args.json", run_id="A", samples=2)
    write_json(pred / ".run/run.json", run_id="A")
    for case in CASES:
        write_json(pred / f"uncertainty/{case}.json", run_id="A")
        record(pred, case, "A")
    return gt, pred


def test_one_run_is_scored_and_named(folders):
    assert evaluate_folders(*folders, SETTINGS).summary["conventions"]["run_id"] == "A"


def test_results_without_ids_are_scored_as_before(folders):
    gt, pred = folders
    for file in [*pred.glob("*args.json"), *pred.glob("uncertainty/*.json"), *pred.glob(".run/*.json")]:
        file.unlink()
    assert evaluate_folders(gt, pred, SETTINGS).summary["conventions"]["run_id"] is None


@pytest.mark.parametrize(
    ("run", "words"), [({"run_id": "B"}, "two.json is of run B"), ({}, "two.json is of a run without id")]
)
def test_a_json_of_another_run_is_refused_by_both_ids(folders, run, words):
    write_json(folders[1] / "uncertainty/two.json", **run)
    with pytest.raises(EvaluationError, match=r"args.json is of run A, .*" + words):
        evaluate_folders(*folders, SETTINGS)


def test_a_stock_prediction_over_a_run_is_refused(folders):
    gt, pred = folders
    write_json(pred / "predict_from_raw_data_args.json", samples=2)  # as nnU-Net writes it
    with pytest.raises(EvaluationError, match=r"args.json is of a run without id .* is of run A"):
        evaluate_folders(gt, pred, SETTINGS)
    for file in pred.glob("uncertainty/*.json"):
        file.unlink()
    with pytest.raises(EvaluationError, match=r"one.nii.gz: is of run A, the folder of a run without id"):
        evaluate_folders(gt, pred, SETTINGS)


def test_samples_that_the_run_has_not_made_are_refused(folders):
    """Those of an older run with more samples, whose folder nobody has cleared."""
    gt, pred = folders
    (pred / "samples/002").mkdir()
    for case in CASES:
        (pred / f"samples/002/{case}.nii.gz").write_bytes((pred / f"{case}.nii.gz").read_bytes())
    with pytest.raises(EvaluationError, match=r"samples/002/one.nii.gz: was not made by run A"):
        evaluate_folders(gt, pred, SETTINGS)
    assert evaluate_folders(gt, pred, SETTINGS, samples=[pred / "samples/000", pred / "samples/001"])


def test_a_mask_that_the_run_has_not_made_or_failed_at_is_refused(folders):
    gt, pred = folders
    record(pred, "two", "B")
    with pytest.raises(EvaluationError, match=r"two.nii.gz: is of run B, the folder of run A"):
        evaluate_folders(gt, pred, SETTINGS)
    record(pred, "two", "A", failed="too thin", files={})
    with pytest.raises(EvaluationError, match=r"two.nii.gz: run A failed at this case: too thin"):
        evaluate_folders(gt, pred, SETTINGS)


def test_a_summary_of_the_run_before_is_refused_by_compare(folders):
    gt, pred = folders
    (pred / "summary.json").write_text(to_json(evaluate_folders(gt, pred, SETTINGS).summary))
    assert read_summary(pred, "pred").cases
    write_json(pred / "predict_from_raw_data_args.json", run_id="B")
    with pytest.raises(EvaluationError, match=r"summary.json scores run A, .*pred holds run B: type .* --overwrite"):
        read_summary(pred, "pred")


def test_a_mask_that_the_run_did_not_write_so_is_scored_and_named(folders, capsys):
    """Corrected by hand, or of another run: nobody can tell, but everybody should know."""
    gt, pred = folders
    command = ["evaluate", str(gt), str(pred), "--no-surface", "-np", "1", "--disable_progress_bar", "--overwrite"]
    assert cli.main(command) == 0
    assert "warning" not in capsys.readouterr().err
    assert json.loads((pred / "summary.json").read_text())["conventions"]["masks_changed_since_run"] == []
    other = np.zeros((4, 6, 6), np.uint8)
    other[1, 2, 2] = 1
    sitk.WriteImage(sitk.GetImageFromArray(other), str(pred / "two.nii.gz"))
    assert cli.main(command) == 0
    message = capsys.readouterr().err
    assert f"warning: 1 of 2 masks in {pred} are not as run A wrote them: two. They are scored as they are" in message
    assert json.loads((pred / "summary.json").read_text())["conventions"]["masks_changed_since_run"] == ["two"]


def test_only_masks_that_are_scored_are_hashed(folders, monkeypatch):
    gt, pred = folders
    (gt / "two.nii.gz").unlink()
    hashed = []
    monkeypatch.setattr(run_ids, "fingerprint", lambda file, size: hashed.append(file) or fingerprint(file, size))
    evaluate_folders(gt, pred, EvaluationSettings(surface=False, chill=True))
    assert hashed == [pred / "one.nii.gz"]
