"""The verb evaluate: nnU-Net's numbers and file, ours beside them, and files that cannot be used."""

import csv
import json
import multiprocessing.dummy
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from nnunetv2.evaluation import evaluate_predictions
from skimage.io import imsave

from nnunetv2_diffusion import cli
from nnunetv2_diffusion.evaluation import EvaluationError, evaluate, results, surface
from nnunetv2_diffusion.evaluation.evaluate import EvaluationSettings, evaluate_folders
from nnunetv2_diffusion.evaluation.results import NNUNET_KEYS

CLASSES = {"labels": {"background": 0, "organ": 1, "tumour": 2, "never": 3}, "file_ending": ".nii.gz"}
REGIONS = {
    "labels": {"background": 0, "whole": [1, 2], "core": 2},
    "regions_class_order": [1, 2],
    "file_ending": ".nii.gz",
}
IGNORE = {"labels": {"background": 0, "organ": 1, "tumour": 2, "ignore": 3}, "file_ending": ".nii.gz"}
SPACING = (0.5, 0.8, 3.0)  # x, y, z
SHAPE = (5, 12, 14)
NO_SURFACE = EvaluationSettings(surface=False)


def write(file, values, spacing=SPACING, origin=(4.0, -7.0, 2.0), angle=0.2):
    image = sitk.GetImageFromArray(values)
    c, s = np.cos(angle), np.sin(angle)
    if values.ndim == 3:
        image.SetSpacing(spacing)
        image.SetOrigin(origin)
        image.SetDirection([c, -s, 0, s, c, 0, 0, 0, 1])
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))


def random_mask(seed, labels, shape=SHAPE):
    values = np.random.default_rng(seed).integers(0, labels, [-(-size // 3) for size in shape])
    for axis in range(len(shape)):
        values = values.repeat(3, axis)
    return values[tuple(slice(size) for size in shape)].astype(np.uint8)


@pytest.fixture
def make(tmp_path):
    """Write folders of references and predictions, three cases; returns them."""

    def folders(dataset=CLASSES, references=3, predictions=3, cases=3):
        for case in range(cases):
            write(tmp_path / f"gt/case_{case}.nii.gz", random_mask(case, references))
            write(tmp_path / f"pred/case_{case}.nii.gz", random_mask(10 + case, predictions))
        (tmp_path / "pred/dataset.json").write_text(json.dumps(dataset))
        return tmp_path / "gt", tmp_path / "pred"

    return folders


@pytest.fixture
def verb(monkeypatch, capsys):
    """Run the verb in this process; returns its status and what it printed to stdout and stderr."""
    monkeypatch.setitem(cli.VERBS, "evaluate", ("nnunetv2_diffusion.evaluation.evaluate", "evaluate predictions"))

    def call(*arguments):
        arguments = [str(argument) for argument in arguments]
        status = cli.main(["evaluate", *arguments, "-np", "1", "--disable_progress_bar"])
        return status, *capsys.readouterr()

    return call


def nnunet_summary(gt, pred, dataset, tmp_path, monkeypatch):
    """The real function; threads in place of its processes, which take seconds to start."""
    threads = SimpleNamespace(get_context=lambda method: multiprocessing.dummy)
    monkeypatch.setattr(evaluate_predictions, "multiprocessing", threads)
    files = [tmp_path / name for name in ("d.json", "p.json", "nnunet.json")]
    files[0].write_text(json.dumps(dataset))
    files[1].write_text(json.dumps({"label_manager": "LabelManager"}))
    evaluate_predictions.compute_metrics_on_folder2(str(gt), str(pred), *map(str, files), num_processes=1)
    monkeypatch.undo()
    return json.loads(files[2].read_text())


# ---- the file


def as_number(value):
    """nnU-Net writes NaN, which is no JSON."""
    return np.nan if value is None else value


@pytest.mark.filterwarnings("ignore:Mean of empty slice")  # of nnU-Net
@pytest.mark.parametrize(
    ("dataset", "references"), [(CLASSES, 3), (REGIONS, 3), (IGNORE, 4)], ids=["classes", "regions", "ignore"]
)
def test_what_nnunet_writes_is_the_same_here(dataset, references, make, tmp_path, monkeypatch):
    gt, pred = make(dataset, references)
    theirs = nnunet_summary(gt, pred, dataset, tmp_path, monkeypatch)
    ours = json.loads(results.to_json(evaluate_folders(gt, pred, NO_SURFACE).summary))
    assert set(theirs["foreground_mean"]) == set(NNUNET_KEYS)
    for mine, other in zip(ours["metric_per_case"], theirs["metric_per_case"], strict=True):
        assert [mine[key] for key in ("reference_file", "prediction_file")] == [
            other[key] for key in ("reference_file", "prediction_file")
        ]
        assert mine["metrics"].keys() == other["metrics"].keys()
        for key, metrics in other["metrics"].items():
            np.testing.assert_equal({name: as_number(mine["metrics"][key][name]) for name in metrics}, metrics)
    for key, metrics in {**theirs["mean"], "foreground": theirs["foreground_mean"]}.items():
        found = {**ours["mean"], "foreground": ours["foreground_mean"]}[key]
        np.testing.assert_equal({name: as_number(found[name]) for name in metrics}, metrics)


def test_the_file_is_json_as_its_standard_has_it(make, verb):
    """Classes that no case has leave means and strata without a value."""
    gt, pred = make()
    assert verb(gt, pred, "--no-surface")[0] == 0
    text = (pred / "summary.json").read_text()
    assert ": null" in text

    def refuse(word):
        raise AssertionError(word)

    summary = json.loads(text, parse_constant=refuse)
    assert summary["strata"]["lesion"]["1"]["<100"]["n"] >= 0


def test_file_is_read_by_nnunet_and_by_python(make, verb):
    gt, pred = make(REGIONS)
    assert verb(gt, pred, "--no-surface")[0] == 0
    summary = evaluate_predictions.load_summary_json(str(pred / "summary.json"))
    assert set(summary["mean"]) == {(1, 2), 2}
    assert {"strata", "nan_ratio", "foreground_nan_ratio", "conventions"} < summary.keys()
    rows = list(csv.DictReader((pred / "summary.csv").open()))
    assert [(row["case"], row["class"], row["label"]) for row in rows[:2]] == [
        ("case_0", "whole", "(1, 2)"),
        ("case_0", "core", "2"),
    ]
    assert len(rows) == 6
    per_case = summary["metric_per_case"][0]["metrics"][2]
    assert float(rows[1]["Dice"]) == per_case["Dice"]
    assert Path(rows[0]["prediction_file"]) == pred / "case_0.nii.gz"


def test_output_can_be_elsewhere(make, verb, tmp_path):
    gt, pred = make()
    assert verb(gt, pred, "--no-surface", "-o", tmp_path / "scores.json")[0] == 0
    assert {file.name for file in tmp_path.glob("scores.*")} == {"scores.json", "scores.csv"}
    assert not (pred / "summary.json").exists()


@pytest.mark.parametrize("name", ["summary.json", "summary.csv"])
def test_results_that_exist_are_not_overwritten_unless_asked(name, make, verb, monkeypatch):
    gt, pred = make()
    (pred / name).write_text("kept")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate_folders", None)  # no work is done in vain
        status, _, message = verb(gt, pred, "--no-surface")
    assert status == 1
    assert f"{pred / name} exists; it is not overwritten; use --overwrite" in message
    assert (pred / name).read_text() == "kept"
    assert verb(gt, pred, "--no-surface", "--overwrite")[0] == 0
    assert (pred / name).read_text() != "kept"


def test_results_get_their_names_when_they_are_complete(make, verb, monkeypatch):
    written, write_bytes = [], Path.write_bytes
    gt, pred = make()
    monkeypatch.setattr(Path, "write_bytes", lambda self, content: written.append(self) or write_bytes(self, content))
    assert verb(gt, pred, "--no-surface")[0] == 0
    assert [file.suffix for file in written] == [".part"] * 2


def test_full_disk_leaves_nothing_half_written(make, verb, monkeypatch):
    gt, pred = make()
    before = sorted(pred.iterdir())
    write_bytes = Path.write_bytes

    def full(self, content):
        assert self.suffix == ".part"  # nothing is written under its own name
        write_bytes(self, content[:100])
        if ".csv" in self.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    status, _, message = verb(gt, pred, "--no-surface")
    assert status == 1
    assert re.search(r"cannot be written: No space left on device: '.*summary\.csv'", message)
    assert sorted(pred.iterdir()) == before


def test_conventions_are_written(make):
    gt, pred = make()
    settings = EvaluationSettings(surface=False, empty="hidiff", strata=(7, 50), lesion_overlap=0.25)
    found = evaluate_folders(gt, pred, settings).summary["conventions"]
    assert found["versions"].keys() >= {"nnunetv2_diffusion", "nnunetv2", "batchgeneratorsv2", "acvl_utils"}
    assert (found["unit"], found["volume_unit"], found["surface_distances"]) == ("mm", "ml", None)
    assert found["empty_masks"].startswith("hidiff: both masks empty: Dice, IoU and NSD 1, HD95 nan")
    assert (found["strata"]["thresholds"], found["strata"]["lesion_overlap"]) == ([7, 50], 0.25)
    assert found["names"] == {"1": "organ", "2": "tumour", "3": "never"}


# ---- numbers


def test_volumes_are_in_ml_and_pixels_are_counted(make):
    gt, pred = make()
    metrics = evaluate_folders(gt, pred, NO_SURFACE).summary["metric_per_case"][0]["metrics"]["1"]
    assert metrics["volume_ref"] == pytest.approx(metrics["n_ref"] * 0.5 * 0.8 * 3 / 1000)
    assert metrics["volume_error"] == pytest.approx((metrics["n_pred"] - metrics["n_ref"]) * 0.0012)
    in_px = evaluate_folders(gt, pred, EvaluationSettings(surface=False, unit="px"))
    assert in_px.summary["metric_per_case"][0]["metrics"]["1"]["volume_ref"] == metrics["n_ref"]
    assert in_px.summary["conventions"]["volume_unit"] == "px"


def test_undefined_scores_are_left_out_and_counted(make):
    gt, pred = make()
    write(pred / "case_1.nii.gz", np.zeros(SHAPE, np.uint8))  # no Precision there
    evaluation = evaluate_folders(gt, pred, NO_SURFACE)
    summary = evaluation.summary
    values = [case["metrics"]["1"]["Precision"] for case in summary["metric_per_case"]]
    assert summary["mean"]["1"]["Precision"] == pytest.approx((values[0] + values[2]) / 2)
    assert summary["nan_count"]["1"]["Precision"] == 1
    assert summary["nan_ratio"]["1"]["Precision"] == pytest.approx(1 / 3)
    assert summary["nan_ratio"]["3"]["Precision"] == 1  # class that is never there
    assert summary["foreground_nan_ratio"]["Precision"] == pytest.approx((1 + 1 + 3) / 9)
    classes = [summary["mean"][key]["Precision"] for key in ("1", "2")]
    assert summary["foreground_mean"]["Precision"] == pytest.approx(np.mean(classes))
    row = next(csv.DictReader(results.to_csv(evaluation.results[1:2], evaluation.labels).splitlines()))
    assert (row["Precision"], row["Dice"]) == ("", "0.0")


def test_strata_hold_cases_slices_and_lesions(tmp_path):
    reference, prediction = np.zeros((2, 4, 10, 10), np.uint8)
    reference[0:2, 0:2, 0:2] = 1  # 4 voxels in each of two slices
    reference[3, 0:4, 5:9] = 1  # 16 in another one
    prediction[0:2, 0:2, 0:2] = 1
    prediction[2, 8:, 8:] = 1
    write(tmp_path / "gt/a.nii.gz", reference)
    write(tmp_path / "pred/a.nii.gz", prediction)
    (tmp_path / "pred/dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "tumour": 1}, "file_ending": ".nii.gz"})
    )
    settings = EvaluationSettings(surface=False, strata=(5, 20))
    strata = evaluate_folders(tmp_path / "gt", tmp_path / "pred", settings).summary["strata"]
    assert strata["case"]["1"][">=20"]["n"] == 1
    assert strata["case"]["1"][">=20"]["mean"]["Dice"] == 16 / (24 + 12)
    assert strata["slice"]["1"]["<5"] == {"n": 2, "detected": 2, "detection_rate": 1, "Dice": 1}
    assert strata["slice"]["1"]["<20"] == {"n": 3, "detected": 2, "detection_rate": 2 / 3, "Dice": 2 / 3}
    assert strata["lesion"]["1"]["all"] == {"n": 2, "detected": 1, "detection_rate": 0.5, "Dice": 0.5}
    assert strata["lesion"]["1"]["false"] == {"<5": 1, "<20": 1, ">=20": 0, "all": 1}


@pytest.mark.parametrize(("overlap", "detected"), [(0.0, 1), (0.5, 1), (0.51, 0)])
def test_objects_in_the_ignored_region_do_not_exist(overlap, detected, tmp_path):
    reference, prediction = np.zeros((2, 1, 10, 10), np.uint8)
    reference[0, 0:4, 0] = prediction[0, 2:8, 0] = 1  # 2 of 4 voxels are found, 2 more lie beyond
    prediction[0, 0:4, 8] = 1
    reference[0, 6:, :] = reference[0, :, 7:] = 3
    write(tmp_path / "gt/a.nii.gz", reference)
    write(tmp_path / "pred/a.nii.gz", prediction)
    (tmp_path / "pred/dataset.json").write_text(json.dumps(IGNORE))
    settings = EvaluationSettings(surface=False, lesion_overlap=overlap)
    metrics = evaluate_folders(tmp_path / "gt", tmp_path / "pred", settings).results[0].metrics["1"]
    expected = {"Dice": 0.5, "n_pred": 4, "lesions_pred": 1, "lesions_false": 0, "lesion_Dice": 0.5}
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["lesions_detected"] == detected


def test_surface_distances_are_in_mm_of_the_files_geometry(tmp_path):
    pytest.importorskip("monai", reason="surface distances need MONAI")
    for folder, place in (("gt", np.s_[1, 4:9, 4:9]), ("pred", np.s_[3, 4:9, 4:9])):
        values = np.zeros(SHAPE, np.uint8)
        values[place] = 1
        write(tmp_path / folder / "a.nii.gz", values)
    (tmp_path / "pred/dataset.json").write_text(json.dumps(CLASSES))
    evaluation = evaluate_folders(tmp_path / "gt", tmp_path / "pred", EvaluationSettings(tolerances=(4.0,)))
    metrics = evaluation.results[0].metrics
    assert {name: metrics["1"][name] for name in ("HD", "HD95", "ASSD")} == pytest.approx(
        dict.fromkeys(("HD", "HD95", "ASSD"), 6)
    )
    assert 0 < metrics["1"]["NSD_4mm"] < 1
    assert np.isnan(metrics["2"]["HD95"])
    assert evaluation.summary["nan_ratio"]["2"]["HD95"] == 1
    conventions = evaluation.summary["conventions"]["surface_distances"]
    assert conventions["library"].startswith("monai 1.")
    assert conventions["HD95"].startswith("directed: ")


@pytest.mark.parametrize("ending", [".png", ".nii.gz"])
def test_2d_images_are_measured_in_pixels(ending, tmp_path):
    pytest.importorskip("monai", reason="surface distances need MONAI")
    for folder, row in (("gt", 2), ("pred", 5)):
        values = np.zeros((12, 14), np.uint8)
        values[row] = 1
        file = tmp_path / folder / f"a{ending}"
        file.parent.mkdir()
        imsave(file, values, check_contrast=False) if ending == ".png" else write(file, values)
    dataset = {"labels": {"background": 0, "vessel": 1}, "file_ending": ending}
    (tmp_path / "pred/dataset.json").write_text(json.dumps(dataset))
    evaluation = evaluate_folders(tmp_path / "gt", tmp_path / "pred")
    metrics = evaluation.results[0].metrics["1"]
    assert (metrics["HD95"], metrics["volume_ref"]) == (3, 14)
    assert "NSD_2px" in metrics
    assert evaluation.summary["conventions"]["unit"] == "px"
    assert not evaluation.summary["strata"]["slice"]


def test_small_folders_are_scored_without_processes(make, monkeypatch):
    """A process takes seconds to start."""
    monkeypatch.setattr(evaluate, "ProcessPoolExecutor", None)
    evaluate_folders(*make(), NO_SURFACE, processes=8)


def test_processes_give_what_one_process_gives(make, monkeypatch):
    monkeypatch.setattr(evaluate, "CASES_A_PROCESS", 1)
    gt, pred = make()
    one, two = (evaluate_folders(gt, pred, NO_SURFACE, processes=n).summary for n in (1, 2))
    np.testing.assert_equal(one, two)


# ---- further scores


def test_scores_of_probabilities_samples_and_raters_reach_the_files(make, verb, tmp_path):
    gt, pred = make(REGIONS)
    for folder in ("pred/samples/000", "pred/samples/001", "other"):
        for case in range(3):
            write(tmp_path / folder / f"case_{case}.nii.gz", random_mask(case, 3))
    for case in range(3):
        np.savez(pred / f"case_{case}.npz", probabilities=np.full((2, *SHAPE), 0.5, np.float32))

    status, out, message = verb(gt, pred, "--no-surface", "--probabilities", "--raters", tmp_path / "other")
    assert (status, message) == (0, "")
    summary = json.loads((pred / "summary.json").read_text())
    assert summary["mean"]["(1, 2)"]["Brier"] == pytest.approx(0.25)
    assert 0 <= summary["metric_per_case"][2]["metrics"]["2"]["GED2"] <= 2
    assert summary["failure_detection"]["cases"] == 3
    rows = list(csv.DictReader((pred / "summary.csv").open()))
    assert all(float(row["ECE"]) == pytest.approx(summary["mean"][row["label"]]["ECE"], abs=1) for row in rows)
    assert out.splitlines()[0] == "Means of 3 cases"


def test_probabilities_of_2d_images_have_the_shape_of_the_masks(tmp_path):
    for folder in ("gt", "pred"):
        write(tmp_path / folder / "a.nii.gz", random_mask(0, 3, (12, 14)))
    (tmp_path / "pred/dataset.json").write_text(json.dumps(CLASSES))
    np.savez(tmp_path / "pred/a.npz", probabilities=np.zeros((4, 1, 12, 14)))  # as nnU-Net exports them
    settings = EvaluationSettings(surface=False, probabilities=True)
    mean = evaluate_folders(tmp_path / "gt", tmp_path / "pred", settings).summary["mean"]["1"]
    assert mean["Brier"] == pytest.approx(mean["ECE"]), "all probabilities are 0"


def test_samples_are_those_named(make, tmp_path):
    gt, pred = make(cases=1)
    for folder in ("pred/samples/0", "mine"):
        write(tmp_path / folder / "case_0.nii.gz", random_mask(0, 3))
    seen = []
    for samples in (None, [tmp_path / "mine"], []):
        jobs = evaluate._jobs(gt, pred, NO_SURFACE, None, None, samples, ())
        seen.append([file.parent.name for file in jobs[0].files.samples])
    assert seen == [["0"], ["mine"], []]


# ---- what cannot be used


def break_missing_prediction(gt, pred):
    (pred / "case_1.nii.gz").unlink()
    return f"{pred}: 1 file(s) missing that are in {gt}: case_1.nii.gz"


def break_missing_reference(gt, pred):
    (gt / "case_2.nii.gz").unlink()
    return f"{gt}: 1 file(s) missing that are in {pred}: case_2.nii.gz"


def break_shape(gt, pred):
    write(pred / "case_1.nii.gz", random_mask(0, 3)[:, :-1])
    return f"{pred / 'case_1.nii.gz'}: shape is (5, 11, 14) (volume), expected (5, 12, 14) (volume)"


def break_dimension(gt, pred):
    write(pred / "case_1.nii.gz", random_mask(0, 3)[0])
    return f"{pred / 'case_1.nii.gz'}: shape is (12, 14) (2D image), expected (5, 12, 14) (volume)"


def break_spacing(gt, pred):
    write(pred / "case_1.nii.gz", random_mask(0, 3), spacing=(0.5, 0.8, 3.1))
    return f"{pred / 'case_1.nii.gz'}: spacing is (0.5, 0.8, 3.1), expected (0.5, 0.8, 3)"


def break_origin(gt, pred):
    write(pred / "case_1.nii.gz", random_mask(0, 3), origin=(4.0, -7.1, 2.0))
    return f"{pred / 'case_1.nii.gz'}: origin is (4, -7.1, 2), expected (4, -7, 2)"


def break_direction(gt, pred):
    write(pred / "case_1.nii.gz", random_mask(0, 3), angle=0.25)
    return f"{pred / 'case_1.nii.gz'}: direction is (0.968912,"


def break_label(gt, pred):
    write(gt / "case_1.nii.gz", random_mask(0, 6))
    return f"{gt / 'case_1.nii.gz'}: has the value(s) 4, 5, expected only the labels 0-3"


def break_file(gt, pred):
    (pred / "case_1.nii.gz").write_bytes(b"no image")
    return f"{pred / 'case_1.nii.gz'}: cannot be read: RuntimeError"


def break_first_file(gt, pred):
    (gt / "case_0.nii.gz").write_bytes(b"no image")
    return f"{gt / 'case_0.nii.gz'}: no reader of nnU-Net can read it"


def break_empty(gt, pred):
    for file in gt.iterdir():
        file.unlink()
    return f"{gt}: has no file that ends with .nii.gz"


def break_folder(gt, pred):
    gt.rename(gt.with_name("moved"))
    return f"{gt}: no such folder"


def break_dataset(gt, pred):
    (pred / "dataset.json").unlink()
    return f"{pred / 'dataset.json'}: missing, expected dataset.json there; or name it with -djfile"


def break_json(gt, pred):
    (pred / "plans.json").write_text("{")
    return f"{pred / 'plans.json'}: not JSON ("


def break_ending(gt, pred):
    (pred / "dataset.json").write_text(json.dumps({"labels": CLASSES["labels"]}))
    return f"{pred / 'dataset.json'}: 'file_ending' is None"


def break_sample(gt, pred):
    write(pred / "samples/0/case_0.nii.gz", random_mask(0, 3))
    return f"{pred / 'samples/0/case_1.nii.gz'}: missing"


BREAKS = [value for name, value in globals().items() if name.startswith("break_")]


@pytest.mark.parametrize("damage", BREAKS, ids=[damage.__name__[6:] for damage in BREAKS])
def test_error_names_file_found_and_expected(damage, make, verb):
    gt, pred = make()
    expected = damage(gt, pred)
    status, _, message = verb(gt, pred, "--no-surface")
    assert status == 1
    assert message.startswith(f"nnunetv2_diffusion evaluate: {expected}")
    assert message.count("\n") == 1
    assert not [file for file in pred.iterdir() if "summary" in file.name]


def test_ignore_label_is_none_of_a_prediction(make):
    gt, pred = make(IGNORE, references=4, predictions=4)
    with pytest.raises(
        EvaluationError, match=r"pred.case_0\.nii\.gz: has the value\(s\) 3, expected only the labels 0-2"
    ):
        evaluate_folders(gt, pred, NO_SURFACE)


def test_all_cases_that_cannot_be_used_are_named_together(make):
    gt, pred = make()
    break_label(gt, pred)
    write(pred / "case_2.nii.gz", random_mask(0, 3)[1:])
    with pytest.raises(EvaluationError, match=r"^2 of 3 cases cannot be evaluated: .*case_1.*; .*case_2"):
        evaluate_folders(gt, pred, NO_SURFACE)


@pytest.mark.parametrize("damage", [break_missing_prediction, break_missing_reference])
def test_chill_leaves_out_what_is_in_one_folder_only(damage, make):
    gt, pred = make()
    damage(gt, pred)
    assert len(evaluate_folders(gt, pred, EvaluationSettings(surface=False, chill=True)).results) == 2


@pytest.mark.parametrize("damage", [break_origin, break_direction])
def test_place_of_the_files_can_be_ignored(damage, make):
    gt, pred = make()
    damage(gt, pred)
    assert len(evaluate_folders(gt, pred, EvaluationSettings(surface=False, ignore_geometry=True)).results) == 3


def test_spacing_cannot_be_ignored(make):
    gt, pred = make()
    break_spacing(gt, pred)
    with pytest.raises(EvaluationError, match="spacing is"):
        evaluate_folders(gt, pred, EvaluationSettings(surface=False, ignore_geometry=True))


def test_rounding_of_headers_is_no_other_geometry(make):
    gt, pred = make()
    write(pred / "case_1.nii.gz", random_mask(0, 3), (0.50001, 0.8, 3.0), (4.001, -7.0, 2.0), 0.2001)
    assert len(evaluate_folders(gt, pred, NO_SURFACE).results) == 3


def test_folder_that_cannot_be_written_to_is_found_before_the_work(make, verb, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    gt, pred = make()
    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr(evaluate, "evaluate_folders", None)  # not called
    status, _, message = verb(gt, pred, "--no-surface")
    assert status == 1
    assert f"cannot be written: Permission denied: '{pred / 'summary.json'}'" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "scores.txt"], "-o is scores.txt, expected a file that ends with .json"),
        (["-o", "missing/scores.json"], "missing is no folder; make it, or name another file than scores.json"),
        (["--tolerances", "-1"], "tolerances are [-1.0], expected"),
        (["--strata", "5", "5"], "strata: thresholds are [5, 5], expected"),
        (["--lesion_overlap", "2"], "lesion_overlap is 2.0, expected"),
        (["--probabilities"], "case_0.npz: missing"),
        (["-djfile", "no.json"], "no.json: no such file, expected"),
        (["-pfile", "no.json"], "no.json: no such file, expected"),
    ],
)
def test_option_that_cannot_be_used_is_named(options, message, make, verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, printed = verb(*make(), "--no-surface", *options)
    assert status == 1
    assert message in printed


@pytest.mark.parametrize("processes", [0, -1])
def test_at_least_one_process_works(processes, make):
    with pytest.raises(EvaluationError, match=f"-np is {processes}"):
        evaluate_folders(*make(), NO_SURFACE, processes=processes)


def test_without_the_library_the_same_call_scores_the_rest_and_says_what_to_type(make, verb, monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(surface, "version", version)
    gt, pred = make()
    status, out, message = verb(gt, pred, "--disable_progress_bar")
    assert status == 0
    assert "Dice" in out
    assert "HD95" not in out
    assert message.startswith("nnunetv2_diffusion evaluate: HD, HD95, ASSD and NSD are left out: surface distances")
    assert "Type: pip install 'monai" in message
    assert message.endswith("evaluate again with --overwrite\n")
    written = json.loads((pred / "summary.json").read_text())
    assert written["conventions"]["surface_distances"].startswith("HD, HD95, ASSD and NSD are left out")
    assert "Dice" in written["foreground_mean"]
    assert verb(gt, pred, "--no-surface", "--overwrite", "--disable_progress_bar")[2] == ""


@pytest.mark.parametrize("asked", [("--percentile", "pooled"), ("--tolerances", 3)])
def test_who_asks_for_distances_is_told_before_the_work_that_the_library_is_missing(make, verb, monkeypatch, asked):
    monkeypatch.setattr(surface, "missing_library", lambda: "no library. Type: pip install")
    gt, pred = make()
    status, _, message = verb(gt, pred, *asked)
    assert (status, message.startswith("nnunetv2_diffusion evaluate: no library. Type: pip install")) == (1, True)
    assert not (pred / "summary.json").exists()


def test_pngs_have_no_mm(tmp_path):
    for folder in ("gt", "pred"):
        (tmp_path / folder).mkdir()
        imsave(tmp_path / folder / "a.png", np.eye(5, dtype=np.uint8), check_contrast=False)
    dataset = {"labels": {"background": 0, "vessel": 1}, "file_ending": ".png"}
    (tmp_path / "pred/dataset.json").write_text(json.dumps(dataset))
    with pytest.raises(EvaluationError, match=r"a\.png: has no spacing"):
        evaluate_folders(tmp_path / "gt", tmp_path / "pred", EvaluationSettings(surface=False, unit="mm"))


def test_probabilities_of_another_shape_are_an_error(make):
    gt, pred = make(cases=1)
    np.savez(pred / "case_0.npz", probabilities=np.zeros((2, *SHAPE)))
    with pytest.raises(EvaluationError, match=r"case_0\.npz: probabilities have shape \(2, .*expected \(4, "):
        evaluate_folders(gt, pred, EvaluationSettings(surface=False, probabilities=True))


def test_progress_is_shown_unless_disabled(make, capsys):
    for progress in (True, False):
        evaluate_folders(*make(), NO_SURFACE, progress=progress)
        assert ("3/3" in capsys.readouterr().err) == progress
