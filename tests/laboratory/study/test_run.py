"""A study through commands that are faked: what is run, what is skipped, what is written."""

import argparse
import json
import signal
import threading
from pathlib import Path

import pytest
from fake_commands import DATASET, SPLIT, STUDY, TRAINERS, FakeRunner, write_inputs

from laboratory.study import StudyError, records
from laboratory.study import run as run_module
from laboratory.study.run import chain_of
from laboratory.study.workplace import locked
from nnunetv2_diffusion.training.host import PEAK_GPU_MEMORY


@pytest.fixture
def fake(monkeypatch):
    runner = FakeRunner()
    monkeypatch.setattr(run_module, "CommandRunner", lambda: runner)
    monkeypatch.setattr(run_module, "chain_of", TRAINERS.__getitem__)
    return runner


@pytest.fixture
def start(tmp_path):
    """Run a study: (study, options) -> exit status."""

    def run(study=STUDY, split=SPLIT, **options):
        file, raw = write_inputs(tmp_path / "input", study, split)
        places = {"raw": raw, "out": tmp_path / "work", "results": tmp_path / "results"}
        given = {"cells": None, "jobs": 1, "device": None, **places, **options}
        return run_module.run(argparse.Namespace(study=file, **given))

    return run


@pytest.fixture
def results(tmp_path):
    def read():
        folder = tmp_path / "results" / "fake"
        return {f.stem: json.loads(f.read_text()) for f in sorted(folder.glob("*.json")) if f.stem != "study"}

    return read


def test_every_run_of_every_cell_gets_its_json(fake, start, results):
    assert start() == 0
    found = results()
    assert list(found) == ["A_run0", "A_run1", "B_run0", "C_run0"]
    record = found["B_run0"]
    assert record["settings"]["num_epochs"] == 2
    assert record["settings"]["gaussian"]["betas"] == [0.0001, 0.02], "defaults are spelled out"
    assert record["network"]["features_per_stage"] == [4, 8]
    assert record["training"]["epoch_seconds"] == [3.0, 2.0]
    assert record["training"]["peak_memory_bytes"] == 2**30
    assert record["training"]["curve"]["mean_fg_dice"] == [0.5, 0.75]
    assert record["training"]["curve"]["dice_per_class_or_region"][0] == [0.5, None]
    assert [p["name"] for p in record["predictions"]] == ["K1_ddpm", "K2_ddim_N3"]
    assert record["predictions"][0]["scores"]["phantom_005"]["2"] == {
        "Dice": 0.6, "HD95": None, "volume_error": 1.0, "volume_error_rel": 0.1
    }  # fmt: skip
    assert set(record["analysis"]) == {"steps", "samples"}
    assert record["analysis"]["samples"]["case"] == SPLIT["test"]
    assert found["A_run0"]["analysis"] is None
    assert [p["name"] for p in found["A_run0"]["predictions"]] == ["one_pass"]


def test_results_go_into_the_working_folder_by_default(fake, start, tmp_path):
    assert start(results=None) == 0
    assert (tmp_path / "work" / "results" / "fake" / "B_run0.json").is_file()


def test_results_name_no_folder_of_the_machine(fake, start, tmp_path):
    start()
    for file in (tmp_path / "results" / "fake").iterdir():
        assert str(tmp_path) not in file.read_text()


def test_what_is_finished_is_not_done_again(fake, start):
    assert start() == 0
    count = len(fake.commands)
    assert start() == 0
    assert len(fake.commands) == count


def test_a_cell_that_is_added_is_all_that_is_run(fake, start):
    start()
    fake.commands.clear()
    added = {**STUDY, "cells": [*STUDY["cells"], {"name": "D", "trainer": "Stock"}]}
    assert start(added) == 0
    assert {command[1][command[1].index("-p") + 1] for command in fake.named("-p ")} == {"fake-D-0"}
    assert not fake.named("plan_and_preprocess")


def test_an_interrupted_training_is_continued_and_an_interrupted_prediction_starts_again(fake, start, tmp_path):
    cells = {**STUDY, "cells": STUDY["cells"][1:2]}
    for stage in (["nnUNetv2_train"], ["nnUNetv2_predict", "K2_ddim"], ["nnunetv2_diffusion", "analyse"]):
        fake.fail = stage
        assert start(cells) == 1
    assert start(cells) == 0
    assert ["--c" in command[1] for command in fake.named("nnUNetv2_train")] == [False, True]
    assert len(fake.named("nnUNetv2_predict", "K1_ddpm")) == 1
    assert len(fake.named("nnUNetv2_predict", "K2_ddim")) == 2
    assert len(fake.named("evaluate")) == 2
    run = tmp_path / "work" / "runs" / "fake" / "B" / "run_0"
    assert sorted(p.name for p in (run / "predictions").iterdir()) == ["K1_ddpm", "K2_ddim_N3"]
    assert {"train.txt", "train_2.txt"} <= {p.name for p in (run / "logs").iterdir()}, "no log is overwritten"
    record = json.loads((tmp_path / "results" / "fake" / "B_run0.json").read_text())
    assert record["training"]["attempts"] == 2


def test_results_of_another_request_are_named_and_kept(fake, start, tmp_path, capsys):
    start()
    file = tmp_path / "results" / "fake" / "B_run0.json"
    before = file.read_text()
    count = len(fake.commands)
    assert start({**STUDY, "settings": {"num_epochs": 3, "num_iterations_per_epoch": 3}}) == 1
    said = capsys.readouterr().err
    assert "settings is" in said
    assert "not overwritten" in said
    assert file.read_text() == before
    assert len(fake.commands) == count


def test_other_settings_in_an_unfinished_work_folder_are_refused(fake, start, capsys):
    fake.fail = ["nnUNetv2_predict"]
    one = {**STUDY, "cells": STUDY["cells"][1:2]}
    assert start(one) == 1
    assert start({**one, "settings": {"num_epochs": 3}}) == 1
    assert "holds other plans" in capsys.readouterr().err


def test_another_split_in_the_work_folder_is_refused(fake, start, capsys):
    assert start() == 0
    other = {"train": SPLIT["test"], "val": SPLIT["test"][:1], "test": SPLIT["train"]}
    assert start({**STUDY, "name": "other"}, other) == 1
    assert "holds another data set or split" in capsys.readouterr().err


def test_missing_cases_are_named_before_anything_is_written(fake, start, tmp_path, capsys):
    assert start(split={**SPLIT, "test": ["phantom_004", "nobody"]}) == 1
    assert "1 cases are missing: nobody" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
    assert not fake.commands


def test_test_cases_are_linked_apart_from_the_training_part(fake, start, tmp_path):
    start()
    raw = tmp_path / "work" / "nnUNet_raw" / DATASET
    assert sorted(p.name[:11] for p in (raw / "labelsTr").iterdir()) == SPLIT["train"]
    assert sorted(p.name[:11] for p in (raw / "imagesTs").iterdir()) == SPLIT["test"]
    fold = json.loads((tmp_path / "work" / "nnUNet_preprocessed" / DATASET / "splits_final.json").read_text())
    assert fold == [{"train": SPLIT["train"][:3], "val": SPLIT["val"]}]


def test_sampling_is_set_by_variables_and_not_inherited(fake, start, monkeypatch):
    monkeypatch.setenv("nnUNet_diffusion_seed", "7")
    start()

    def sampling(command):
        return {k: v for k, v in command[2].items() if k.startswith("nnUNet_diffusion")}

    (predicted,) = fake.named("nnUNetv2_predict", "fake-B-0", "K2_ddim")
    assert sampling(predicted) == {
        "nnUNet_diffusion_steps": "2", "nnUNet_diffusion_sampler": "ddim", "nnUNet_diffusion_samples": "3"
    }  # fmt: skip
    assert "--disable_tta" in predicted[1]
    assert all(sampling(command) == {} for command in fake.named("nnUNetv2_predict", "fake-A"))


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_passively_unless_asked_otherwise(fake, start, results, monkeypatch, given, expected):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    start()
    assert {command[2]["OMP_WAIT_POLICY"] for command in fake.named("nnUNetv2_train")} == {expected}
    assert results()["A_run0"]["environment"]["OMP_WAIT_POLICY"] == expected


def test_cells_share_the_data_and_have_results_of_their_own(fake, start):
    start()
    trainings = fake.named("nnUNetv2_train")
    assert len({command[2]["nnUNet_results"] for command in trainings}) == len(trainings) == 4
    assert len({command[2]["nnUNet_preprocessed"] for command in trainings}) == 1
    assert len(fake.named("plan_and_preprocess")) == 1


def test_hidiff_starts_from_the_checkpoint_of_its_segmentors_run(fake, start, tmp_path):
    study = {**STUDY, "cells": [*STUDY["cells"][:2], {**STUDY["cells"][2], "runs": 3}]}
    assert start(study, jobs=2) == 0
    for run, expected in ((0, 0), (1, 1), (2, 0)):
        plans = json.loads((tmp_path / "work" / "nnUNet_preprocessed" / DATASET / f"fake-C-{run}.json").read_text())
        checkpoint = plans["configurations"]["3d_fullres"]["diffusion"]["hidiff"]["segmentor"]
        assert (tmp_path / "work" / checkpoint).is_file()
        assert f"/A/run_{expected}/" in checkpoint
        assert not checkpoint.startswith("/")


def test_without_a_chain_nothing_is_analysed_and_nothing_asked_for(fake, start, results):
    assert start({**STUDY, "analyse": {"steps": 2, "samples": 2}}, cells=["A", "B"]) == 0
    assert results()["A_run0"]["request"]["analyse"] is None
    assert results()["B_run0"]["request"]["analyse"] == {"steps": 2, "sampler": "ddpm", "samples": 2, "cases": None}
    assert len(fake.named("analyse")) == 1


def test_modes_and_spacing_are_asked_for_and_named_in_the_request_only_if_used(fake, start, results):
    more = {"steps": 2, "modes": "full interleaved", "step_spacing": "linspace"}
    assert start({**STUDY, "cells": [STUDY["cells"][1], {**STUDY["cells"][1], "name": "D", "analyse": more}]}) == 0
    plain, asked = (next(c[1] for c in fake.named("analyse", f"fake-{name}-0")) for name in "BD")
    assert "--modes" not in plain
    place = asked.index("--modes")
    assert asked[place + 1 : place + 3] == ["full", "interleaved"]
    assert "--step_spacing" not in plain
    assert asked[asked.index("--step_spacing") + 1] == "linspace"
    assert not {"modes", "step_spacing"} & set(results()["B_run0"]["request"]["analyse"])
    assert results()["D_run0"]["request"]["analyse"]["modes"] == more["modes"]


def test_a_cell_without_a_chain_is_analysed_if_it_asks_itself(fake, start, results):
    own = {"steps": 2, "samples": 2, "modes": "none interleaved"}
    assert start({**STUDY, "cells": [{**STUDY["cells"][0], "runs": 1, "analyse": own}]}) == 0
    (command,) = fake.named("analyse")
    assert "--steps" not in command[1]
    assert command[1][command[1].index("--samples") + 1] == "1", "there is nothing to draw samples from"
    assert results()["A_run0"]["request"]["analyse"]["modes"] == own["modes"]


def test_the_runs_of_a_cell_are_the_folds_of_an_ensemble(fake, start, results, tmp_path):
    members = {**STUDY["cells"][1], "runs": 3}
    ensemble = {"name": "E", "trainer": "Recycle", "ensemble": "B", "analyse": {"steps": 2, "samples": 2}}
    assert start({**STUDY, "cells": [ensemble, members]}, jobs=2) == 0
    assert len(fake.named("nnUNetv2_train")) == 3, "nothing more is trained"
    (model,) = (tmp_path / "work" / "runs" / "fake" / "E" / "run_0" / "nnUNet_results" / DATASET).iterdir()
    assert {f.name for f in model.iterdir()} == {"fold_0", "fold_1", "fold_2", "plans.json", "dataset.json"}
    for name in ("nnUNetv2_predict", "analyse"):
        for command in fake.named(name, "fake-E-0"):
            place = command[1].index("-f")
            assert command[1][place + 1 : place + 4] == ["0", "1", "2"]
    record, alone = results()["E_run0"], results()["B_run0"]
    assert record["request"]["ensemble"] == {"cell": "B", "runs": 3}
    assert record["request"]["settings"] == alone["request"]["settings"]
    assert record["training"]["seconds"] == 3 * alone["training"]["seconds"]
    assert record["training"]["epoch_seconds"] == 3 * alone["training"]["epoch_seconds"]
    assert record["training"]["curve"] == {}


def test_an_ensemble_waits_for_all_of_its_members(fake, start, capsys):
    ensemble = {"name": "E", "trainer": "Recycle", "ensemble": "B"}
    study = {**STUDY, "cells": [{**STUDY["cells"][1], "runs": 2}, ensemble]}
    assert start(study, cells=["E"]) == 1
    assert "it needs B run 0 (ensemble), which is not trained" in capsys.readouterr().err


def test_steps_that_are_draws_are_a_chain_of_their_own_kind():
    assert chain_of("nnUNetTrainerRecycleScore") == "draws"
    assert chain_of("nnUNetTrainerRecycleXT") == "gaussian"
    assert chain_of("nnUNetTrainerHiDiff") == "hidiff"
    assert chain_of("nnUNetTrainerNoDiff") is None


def test_an_unknown_mode_is_refused_before_anything_is_trained(fake, start, capsys):
    cell = {**STUDY["cells"][1], "analyse": {"steps": 2, "modes": "full ful"}}
    assert start({**STUDY, "cells": [cell]}) == 1
    assert "cell B: analyse has the mode 'ful', expected some of one-step, full, interleaved" in capsys.readouterr().err
    assert not fake.commands


def test_a_gpus_memory_is_read_from_the_trainers_logs(fake, start, results):
    original = FakeRunner.nnUNetv2_train

    def train(command, environment, fails):
        original(command, environment, fails)
        [folder] = Path(environment["nnUNet_results"]).glob("*/*/fold_0")
        for name, line in (("1", f"date: {PEAK_GPU_MEMORY}: 300 bytes"), ("2", f"{PEAK_GPU_MEMORY}: 200 bytes")):
            (folder / f"training_log_{name}.txt").write_text(f"start\n{line}\nTraining done.\n")

    fake.nnUNetv2_train = train
    assert start(cells=["B"]) == 0
    assert results()["B_run0"]["training"]["peak_memory_bytes"] == 300


WARM = {"name": "W", "trainer": "Recycle", "warm_start": "A", "runs": 2}


def test_a_warm_start_is_made_of_the_sources_run_and_given_to_the_training(fake, start, results):
    assert start({**STUDY, "cells": [*STUDY["cells"], WARM]}, cells=["A", "W"], jobs=2) == 0
    made = {c[1][c[1].index("-p") + 1]: c[1] for c in fake.named("warm-start")}
    assert set(made) == {"fake-W-0", "fake-W-1"}
    for run in range(2):
        words = made[f"fake-W-{run}"]
        assert f"/A/run_{run}/" in words[words.index("--from") + 1]
        assert not words[words.index("--from") + 1].startswith("/")
        [training] = fake.named("nnUNetv2_train", f"fake-W-{run}")
        assert training[1][training[1].index("-pretrained_weights") + 1] == words[words.index("-o") + 1]
        assert results()[f"W_run{run}"]["request"]["warm_start"] == {"cell": "A", "run": run}
    assert not fake.named("-pretrained_weights", "fake-A")


@pytest.mark.parametrize(
    ("command", "when", "again"),
    [
        ("warm-start", "early", "-pretrained_weights"),
        ("nnUNetv2_train", "early", "-pretrained_weights"),
        ("nnUNetv2_train", "late", "--c"),  # nnU-Net takes one of them
    ],
)
def test_a_warm_started_training_that_failed_is_done_again(fake, start, results, monkeypatch, command, when, again):
    monkeypatch.setenv("FAKE_FAILS", when)  # before or after nnU-Net's first checkpoint
    study = {**STUDY, "cells": [STUDY["cells"][0], WARM]}
    fake.fail = [command, "fake-W-0"]
    assert start(study) == 1
    assert start(study) == 0
    assert {"W_run0", "W_run1"} <= set(results())
    last = fake.named("nnUNetv2_train", "fake-W-0")[-1][1]
    assert [word for word in last if word in ("--c", "-pretrained_weights")] == [again]


@pytest.mark.parametrize(("when", "kept"), [("early", "second"), ("late", "first")])
def test_the_code_is_that_of_the_attempt_which_made_the_first_checkpoint(fake, start, results, monkeypatch, when, kept):
    monkeypatch.setenv("FAKE_FAILS", when)
    fake.fail = ["nnUNetv2_train", "fake-B-0"]
    for commit, status in (("first", 1), ("second", 0)):
        found = {"commit": commit, "dirty": False, "package_sha256": commit}
        monkeypatch.setattr(records, "describe_code", lambda *_, found=found: found)
        assert start(cells=["B"]) == status
    record = results()["B_run0"]
    assert record["code"]["commit"] == kept
    assert record["code_changed"] == (kept == "first")


def test_a_warm_start_for_a_trainer_without_a_chain_is_refused(fake, start, capsys):
    assert start({**STUDY, "cells": [STUDY["cells"][0], {**WARM, "trainer": "Stock"}]}) == 1
    assert "it has a warm_start, expected a diffusion trainer and not Stock" in capsys.readouterr().err
    assert not fake.commands


def test_hidiff_without_its_segmentor_is_refused(fake, start, capsys):
    assert start(cells=["C"]) == 1
    assert "it needs A run 0 (segmentor), which is not trained" in capsys.readouterr().err
    assert not fake.named("nnUNetv2_train")


def test_a_segmentor_that_fails_fails_what_waits_for_it_and_nothing_else(fake, start, results, capsys):
    fake.fail = ["nnUNetv2_train", "fake-A-0"]
    assert start() == 1
    assert list(results()) == ["A_run1", "B_run0"]
    said = capsys.readouterr()
    assert "A run 0: nnUNetv2_train ended with status 1" in said.err
    assert "C run 0: it needs A run 0 (segmentor), which is not trained" in said.err
    assert start() == 0
    assert len(results()) == 4


def test_jobs_train_at_once(fake, start, monkeypatch):
    both = threading.Barrier(2, timeout=20)
    original = FakeRunner.nnUNetv2_train

    def together(command, environment, fails):
        both.wait()  # breaks unless two are here at the same time
        original(command, environment, fails)

    fake.nnUNetv2_train = together
    assert start(cells=["A"], jobs=2) == 0


def test_an_interruption_stops_commands_and_the_same_study_continues(fake, start, results, capsys):
    original, stopped = FakeRunner.nnUNetv2_train, []

    def interrupt(command, environment, fails):
        signal.raise_signal(signal.SIGTERM)  # reaches the main thread, as from outside
        original(command, environment, fails)

    fake.nnUNetv2_train, fake.stop = interrupt, lambda: stopped.append(True)
    before = signal.getsignal(signal.SIGTERM)
    assert start() == 130
    assert stopped == [True]
    assert "the same command continues" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    del fake.nnUNetv2_train, fake.stop
    assert start() == 0
    assert len(results()) == 4


def test_a_folder_that_is_in_use_is_left_alone(tmp_path):
    with locked(tmp_path) as descriptors:
        assert len(descriptors) == 1
        with pytest.raises(StudyError, match="is in use"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


def test_a_segmentor_for_a_trainer_that_takes_none_is_refused(fake, start, capsys):
    wrong = {"name": "D", "trainer": "Recycle", "segmentor": "A"}
    assert start({**STUDY, "cells": [*STUDY["cells"], wrong]}) == 1
    assert "expected a HiDiff trainer and not Recycle" in capsys.readouterr().err


def test_an_unknown_cell_is_named(fake, start, capsys):
    assert start(cells=["Z"]) == 1
    assert "no cell 'Z', expected one of A, B, C" in capsys.readouterr().err
