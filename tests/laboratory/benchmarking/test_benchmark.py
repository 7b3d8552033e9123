"""The benchmark measures what it says; no test asserts a duration."""

import contextlib
import io
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from laboratory.benchmarking import host
from laboratory.benchmarking.cli import main
from laboratory.benchmarking.measure import Stopwatch, Turns, measure, total_bytes
from laboratory.benchmarking.memory import allocated_peak
from laboratory.benchmarking.problem import BenchmarkError, random_case, synthetic_problem
from laboratory.benchmarking.report import predict_targets, target_row, train_targets
from laboratory.benchmarking.report import target as make_target
from nnunetv2_diffusion import checkpoints

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
TINY = ["--patch", "16", "--base-features", "8", "--batch", "2"]
SHORT = ["--rounds", "2", "--warmup", "1", "--device", "cpu", "--threads", "1"]
TRAIN = ["train-step", *TINY, *SHORT]
PREDICT = ["predict", *TINY, *SHORT]
SPREAD = {"median", "mean", "min", "max"}
COMMON_KEYS = {"trainer", "seconds", "ratio", "peak_memory_bytes", "peak_memory_ratio"}


def run(folder, arguments):
    """Content of the JSON, printed text and path of the JSON."""
    path, text = folder / "result.json", io.StringIO()
    with contextlib.redirect_stdout(text):
        assert main([*arguments, "--json", str(path)]) == 0
    return json.loads(path.read_text()), text.getvalue(), path


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    trainers = ["nnUNetTrainerRecycleXT", "nnUNetTrainerSelfCondXt", "nnUNetTrainerNoDiff"]
    return run(tmp_path_factory.mktemp("train"), [*TRAIN, "--trainers", *trainers])


@pytest.fixture(scope="module")
def predict(tmp_path_factory):
    options = ["--steps", "1", "3", "--samples", "2", "--sampler", "ddim", "--clock", "cpu"]
    trainers = ["nnUNetTrainerRecycleXT", "nnUNetTrainerNoDiff"]
    return run(tmp_path_factory.mktemp("predict"), [*PREDICT, *options, "--trainers", *trainers])


@pytest.fixture(scope="module", params=["train", "predict"])
def either(request):
    return request.getfixturevalue(request.param)


def test_json_has_the_documented_keys(either):
    content = either[0]
    assert set(content) == {"schema", "command", "settings", "hardware", "versions", "results", "targets"}
    assert content["schema"] == 1
    assert set(content["hardware"]) == {"device", "name", "cpu", "cpus", "threads", "gpu", "gpu_memory_bytes"}
    assert {"python", "torch", "nnunetv2", "nnunetv2_diffusion"} <= set(content["versions"])
    assert all(set(target) == {"name", "limit", "value", "met"} for target in content["targets"])


def test_train_results_have_the_documented_keys(train):
    for result in train[0]["results"]:
        assert set(result) == COMMON_KEYS | {"parameters", "parameter_overhead"}
        assert set(result["seconds"]) == SPREAD | {"rounds"}


def test_predict_results_have_the_documented_keys(predict):
    for result in predict[0]["results"]:
        assert set(result) == COMMON_KEYS | {"steps", "passes", "pass_ratio", "outside_share"}
        assert result["outside_share"] is None or set(result["outside_share"]) == SPREAD


def test_ratios_are_to_the_reference_in_the_same_round(either):
    reference, *others = either[0]["results"]
    assert reference["trainer"] == "nnUNetTrainer"
    for result in [reference, *others]:
        assert len(result["seconds"]["rounds"]) == 2
        pairs = zip(result["seconds"]["rounds"], reference["seconds"]["rounds"], strict=True)
        expected = [seconds / stock for seconds, stock in pairs]
        assert result["ratio"]["min"] == pytest.approx(min(expected))
        assert result["ratio"]["max"] == pytest.approx(max(expected))
        assert result["ratio"]["median"] == pytest.approx(sum(expected) / 2)
    assert reference["ratio"]["median"] == 1


def test_parameter_overhead_is_relative_to_the_reference(train):
    reference, recycling, conditioned, control = train[0]["results"]
    assert reference["parameter_overhead"] == 0
    for result in (recycling, conditioned, control):
        assert result["parameter_overhead"] == pytest.approx(result["parameters"] / reference["parameters"] - 1)
    # a mask of 3 classes at the first convolution: 3 channels, 8 filters of 27 weights
    assert conditioned["parameters"] - recycling["parameters"] == 3 * 8 * 27
    assert reference["parameters"] < control["parameters"] < recycling["parameters"]


def test_memory_is_not_claimed_on_a_cpu(either):
    content, text, _ = either
    assert all(r["peak_memory_bytes"] is None and r["peak_memory_ratio"] is None for r in content["results"])
    assert "not measured" in text


def test_every_pass_of_a_prediction_is_counted(predict):
    looped = [r for r in predict[0]["results"] if r["steps"] is not None]
    assert [(r["steps"], r["passes"]) for r in looped] == [(1, 2), (3, 6)]
    for result in looped:
        assert 0 < result["outside_share"]["min"] <= result["outside_share"]["max"] < 1
        in_passes = result["passes"] * result["pass_ratio"]["mean"]
        assert 0 < in_passes < result["ratio"]["mean"]


def test_network_without_a_loop_is_timed_once_and_has_no_passes(predict):
    (control,) = [r for r in predict[0]["results"] if r["trainer"] == "nnUNetTrainerNoDiff"]
    assert control["steps"] is control["outside_share"] is control["pass_ratio"] is None


def test_report_prints_every_target_and_trainer(either):
    content, text, _ = either
    for target in content["targets"]:
        assert target["name"] in text
    for result in content["results"]:
        assert result["trainer"] in text


def test_targets_of_training_are_those_of_the_trainers_that_ran(train):
    limits = {t["name"]: t["limit"] for t in train[0]["targets"]}
    assert limits["nnUNetTrainerRecycleXT: seconds per step / nnUNetTrainer's"] == 1.45
    assert limits["nnUNetTrainerSelfCondXt: seconds per step / nnUNetTrainer's"] == 1.25
    assert not any("RecycleXtPlus1" in name for name in limits)


def test_targets_on_a_gpu_are_stricter_for_recycling_and_count_passes():
    step = {
        "trainer": "nnUNetTrainerRecycleXT",
        "ratio": {"median": 1.4},
        "peak_memory_ratio": 1.04,
        "parameter_overhead": 0.03,
    }
    found = {t["name"].split(":")[1].strip(): (t["limit"], t["met"]) for t in train_targets([step])}
    assert found["seconds per step / nnUNetTrainer's"] == (1.33, False)
    assert found["peak memory / nnUNetTrainer's"] == (1.05, True)
    five = {
        "trainer": "T",
        "steps": 5,
        "ratio": {"median": 5.1},
        "peak_memory_ratio": 1.0,
        "outside_share": {"median": 0.01},
    }
    _, passes = predict_targets([five])
    assert (passes["limit"], passes["value"], passes["met"]) == (1.03, 5.1 / 5, True)
    assert len(predict_targets([five | {"peak_memory_ratio": None}])) == 1  # a CPU has no goal for it


@pytest.mark.parametrize(
    ("value", "met", "word"), [(1.45, True, "met"), (1.46, False, "NOT met"), (None, None, "not measured")]
)
def test_target_is_met_up_to_its_limit(value, met, word):
    found = make_target("step", 1.45, value)
    assert found == {"name": "step", "limit": 1.45, "value": value, "met": met}
    assert word in target_row(found)


def test_command_in_the_json_spells_out_every_setting(predict):
    command = predict[0]["command"]
    assert command.startswith("scripts/benchmark predict --dim 3 --patch 16x16x16 --base-features 8 ")
    assert "--steps 1 3 --sampler ddim --samples 2" in command


@pytest.fixture(scope="module")
def refiner(tmp_path_factory):
    return run(tmp_path_factory.mktemp("refiner"), ["refiner", "--width", "8", "--stages", "3", *TINY, *SHORT])


def test_refiner_is_counted_and_timed_real_and_binary_beside_its_segmentor(refiner):
    content, text, _ = refiner
    parts = {row["part"]: row for row in content["results"]}
    assert list(parts) == ["segmentor", "refiner, real", "refiner, binary"]
    assert parts["segmentor"]["ratio"]["median"] == 1
    real, binary = parts["refiner, real"], parts["refiner, binary"]
    assert real["binary_parameters"] == real["binary_macs"] == 0
    assert binary["binary_macs"] > binary["macs"] > 0
    assert binary["binary_macs"] + binary["macs"] == pytest.approx(real["macs"], rel=0.01)  # time offsets differ
    assert binary["packed_bytes"] < binary["storage_bytes"]
    assert "torch does not run binary layers faster" in text
    assert content["targets"] == []


def test_hidiff_is_timed_with_both_phases_and_by_steps(tmp_path):
    trained = run(tmp_path, [*TRAIN, "--trainers", "nnUNetTrainerHiDiff"])[0]["results"]
    assert [row["trainer"] for row in trained] == ["nnUNetTrainer", "nnUNetTrainerHiDiff"]
    (tmp_path / "result.json").unlink()
    content, _, _ = run(tmp_path, [*PREDICT, "--trainers", "nnUNetTrainerHiDiff", "--steps", "1", "2"])
    assert [row["steps"] for row in content["results"]] == [None, 1, 2]
    assert content["targets"] == []  # its segmentor is no pass of the loop


def test_peak_memory_on_a_cpu_is_what_tensors_held_together():
    def allocates():
        a = torch.zeros(4000)  # 16000 bytes
        b = a + 1  # and 16000 beside them
        del a, b
        torch.zeros(6000)

    assert allocated_peak(allocates) == pytest.approx(32000, abs=200)  # and a scalar's few bytes


def test_json_names_no_folder(either):
    content, _, path = either
    text = json.dumps(content)
    assert "/" not in text.replace("scripts/benchmark", "").replace(" / nnUNetTrainer's", "")
    assert path.name not in text


def test_environment_is_put_back_and_folders_are_removed(monkeypatch):
    results = "nnUNet_results"
    monkeypatch.setenv(results, "before")
    monkeypatch.delenv("nnUNet_raw", raising=False)
    with host.temporary_folders() as folder:
        assert Path(os.environ[results]).parent == folder
        assert folder.is_dir()
    assert os.environ[results] == "before"
    assert "nnUNet_raw" not in os.environ
    assert not folder.exists()


@pytest.mark.parametrize("labels", ["classes", "regions", "ignore"])
def test_real_plans_of_any_kind_of_labels_are_timed(labels, tmp_path, capsys):
    problem = synthetic_problem(patch=(16, 16, 16), batch=3, base_features=8)
    dataset = {**problem.dataset_json}
    if labels == "regions":
        dataset["labels"] = {"background": 0, "whole": [1, 2], "core": 2}
        dataset["regions_class_order"] = [1, 2]
    if labels == "ignore":
        dataset["labels"] = {**dataset["labels"], "ignore": 3}
    (tmp_path / "plans.json").write_text(json.dumps(problem.plans))
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    files = ["--plans", str(tmp_path / "plans.json"), "--dataset-json", str(tmp_path / "dataset.json")]
    short = ["--rounds", "1", "--warmup", "0", "--device", "cpu", "--threads", "1", "--batch", "2"]
    assert main(["train-step", *files, *short, "--trainers", "nnUNetTrainerRecycleXT"]) == 0
    text = capsys.readouterr().out
    assert "batch 2" in text
    assert f"{2 if labels == 'regions' else 3} outputs" in text
    assert str(tmp_path) not in text
    assert "--configuration 3d_fullres" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [*TRAIN, "--trainers", "nnUNetTrainerNobody"],
            "--trainers: Could not find requested nnunet trainer",
        ),
        ([*TRAIN, "--patch", "16x16"], "--patch is 16x16, expected 3 sizes"),
        ([*TRAIN, "--patch", "a"], "expected e.g. 40x56x40"),
        ([*TRAIN, "--classes", "1"], "--classes is 1, expected at least 2"),
        ([*TRAIN, "--stages", "9"], "--stages is 9, expected 2 .. 6"),
        ([*TRAIN, "--rounds", "0"], "0, expected an integer of at least 1"),
        ([*TRAIN, "--warmup", "-1"], "--warmup is -1, expected 0 or more"),
        (["train-step", "--plans", "none.json"], "--plans needs --dataset-json"),
        (["train-step", "--plans", "none.json", "--dataset-json", "d.json"], "none.json: no such file"),
        (["train-step", "--plans", "none.json", "--classes", "3"], "--classes cannot be used with --plans"),
        ([*TRAIN, "--dataset-json", "d.json"], "--dataset-json is used with --plans only"),
        ([*PREDICT, "--steps", "1", "5000"], "--steps is 5000, expected 1 .. 1001"),
    ],
)
def test_unusable_options_are_named_with_what_was_expected(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ("{}", "no key 'dataset_name'"), (None, "no configuration '3d_lowres'")]
)
def test_unusable_plans_are_named(text, message, tmp_path, capsys):
    problem = synthetic_problem()
    plans = tmp_path / "plans.json"
    plans.write_text(json.dumps(problem.plans) if text is None else text)
    (tmp_path / "dataset.json").write_text(json.dumps(problem.dataset_json))
    files = ["--plans", str(plans), "--dataset-json", str(tmp_path / "dataset.json")]
    with pytest.raises(SystemExit):
        main(["predict", *files, "-c", "3d_lowres"])
    error = capsys.readouterr().err
    assert message in error
    assert str(plans) in error


@pytest.mark.parametrize("command", ["train-step", "predict"])
@pytest.mark.parametrize("refused", ["stepz", "BatchNorm3d"])
def test_plans_that_a_trainer_refuses_end_in_its_message(command, refused, tmp_path, capsys):
    problem = synthetic_problem(patch=(16, 16, 16), batch=2, base_features=8)
    configuration = problem.plans["configurations"]["3d_fullres"]
    if refused == "stepz":
        configuration["diffusion"] = {"stepz": 3}
    else:
        configuration["architecture"]["arch_kwargs"]["norm_op"] = "torch.nn.modules.batchnorm.BatchNorm3d"
    (tmp_path / "plans.json").write_text(json.dumps(problem.plans))
    (tmp_path / "dataset.json").write_text(json.dumps(problem.dataset_json))
    files = ["--plans", str(tmp_path / "plans.json"), "--dataset-json", str(tmp_path / "dataset.json")]
    with pytest.raises(SystemExit):
        main([command, *files, *SHORT, "--trainers", "nnUNetTrainerRecycleXT"])
    error = capsys.readouterr().err
    assert "nnUNetTrainerRecycleXT cannot use the plans" in error
    assert refused in error


def test_existing_json_is_not_overwritten(tmp_path, capsys):
    path = tmp_path / "kept.json"
    path.write_text("kept")
    with pytest.raises(SystemExit):
        main([*TRAIN, "--json", str(path)])
    assert path.read_text() == "kept"
    assert "kept.json exists; it is not overwritten" in capsys.readouterr().err


def test_nnunet_is_told_of_the_trainers_of_the_checkout(monkeypatch):
    monkeypatch.delenv(host.EXTRA, raising=False)
    with host.temporary_folders():
        assert os.environ[host.EXTRA] == str(ROOT / "trainers")
    assert host.EXTRA not in os.environ


def test_trainer_that_cannot_be_used_is_not_replaced_by_another(monkeypatch):
    def broken(name):
        raise RuntimeError(f"{name} cannot be used: no torch")

    monkeypatch.setattr(checkpoints, "recursive_find_trainer_class_by_name", broken)
    with pytest.raises(BenchmarkError, match="cannot be used: no torch"):
        host.build_network("nnUNetTrainerRecycleXT", synthetic_problem(), CPU)


def test_all_trainers_get_the_same_cases():
    problem = synthetic_problem(patch=(16, 16, 16), batch=2, base_features=8)
    problem.plans["configurations"]["3d_fullres"]["diffusion"] = {"recipe": "nnunet"}  # deep supervision as the host
    with host.temporary_folders():
        first, second = (
            host.make_batches(host.create_trainer(name, problem, CPU), 2)
            for name in ("nnUNetTrainer", "nnUNetTrainerRecycleXT")
        )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a["data"], b["data"])
        assert len(a["target"]) == 3
        assert all(torch.equal(x, y) for x, y in zip(a["target"], b["target"], strict=True))
    assert not torch.equal(first[0]["data"], first[1]["data"])


def test_default_plans_are_nnunets_own_for_hippocampus():
    configuration = synthetic_problem().plans["configurations"]["3d_fullres"]
    kwargs = configuration["architecture"]["arch_kwargs"]
    assert configuration["patch_size"] == [40, 56, 40]
    assert configuration["batch_size"] == 9
    assert kwargs["features_per_stage"] == [32, 64, 128, 256]
    assert kwargs["strides"] == [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]


@pytest.mark.parametrize(("dim", "limit"), [(2, 512), (3, 320)])
def test_made_up_networks_respect_nnunets_limits(dim, limit):
    patch = (48, 20, 9)[:dim]
    (configuration,) = synthetic_problem(dim, patch, base_features=32, stages=6).plans["configurations"].values()
    kwargs = configuration["architecture"]["arch_kwargs"]
    assert kwargs["features_per_stage"][-1] == limit
    size = list(patch)
    for strides in kwargs["strides"]:
        assert all(s % k == 0 for s, k in zip(size, strides, strict=True))
        size = [s // k for s, k in zip(size, strides, strict=True)]
    assert min(size) >= 3


@pytest.mark.parametrize("options", [["--dim", "2", "--patch", "16x24"], ["--resenc", "--stages", "3"]])
def test_other_networks_are_timed_as_well(options, capsys):
    assert main([*TRAIN, *options, "--rounds", "1", "--trainers", "nnUNetTrainerRecycleXT"]) == 0
    text = capsys.readouterr().out
    assert ("ResidualEncoderUNet 3d" if "--resenc" in options else "PlainConvUNet 2d") in text


def test_random_case_holds_every_label_and_repeats_with_its_seed():
    image, segmentation = random_case(2, (24, 20), [1, 2], torch.Generator().manual_seed(3))
    again, _ = random_case(2, (24, 20), [1, 2], torch.Generator().manual_seed(3))
    assert image.shape == (2, 24, 20)
    assert image.dtype == torch.float32
    assert torch.equal(image, again)
    assert segmentation.dtype == torch.int16
    assert segmentation.unique().tolist() == [0, 1, 2]


class Recorder:
    def __init__(self, name, turns):
        self.name = name
        self.turns = turns

    def run(self, index):
        self.turns.append((self.name, index))

    def pass_seconds(self):
        return None

    def tensors(self):
        return []


def test_subjects_take_turns_and_warm_up_is_not_recorded():
    turns = []
    measured = Turns(CPU, Stopwatch(CPU), 2, 1).measure([Recorder("a", turns), Recorder("b", turns)], "test")
    assert turns == [("a", -1), ("b", -1), ("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert {name: len(runs) for name, runs in measured.items()} == {"a": 2, "b": 2}
    assert measured["a"][0].peak_bytes is None


class Keeper(Recorder):
    def tensors(self):
        return [torch.zeros(25)]


def test_peak_memory_on_a_gpu_leaves_out_what_other_subjects_keep(monkeypatch):
    stopwatch = Stopwatch(CPU)
    stopwatch.cuda = True  # clock of a CPU, book-keeping of a GPU
    monkeypatch.setattr(Stopwatch, "mark", lambda self: 0.0)
    monkeypatch.setattr(Stopwatch, "between", lambda self, start, end: end - start)
    for name, value in {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 5000,
        "max_memory_allocated": 5700,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    # 700 bytes came on top of all that was there, of which 100 are the subject's own
    assert measure(Keeper("a", []), 0, stopwatch).peak_bytes == 800


def test_shared_storage_counts_once():
    x = torch.zeros(10)
    assert total_bytes([x, x[:5], x.view(2, 5)]) == 40
    assert total_bytes([x, x.clone()]) == 80


def test_script_runs_from_anywhere(tmp_path):
    result = subprocess.run([ROOT / "scripts" / "benchmark", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "train-step" in result.stdout
    assert os.access(ROOT / "scripts" / "benchmark", os.X_OK)
