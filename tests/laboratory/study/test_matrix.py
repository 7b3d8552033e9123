"""Two cells on phantoms through the real commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from laboratory.demo.phantoms import write_phantoms
from laboratory.study.__main__ import main

SCRIPT = Path(__file__).parents[3] / "scripts" / "study"
CASES = [f"phantom_{i:03d}" for i in range(7)]
SPLIT = {"train": CASES[:5], "val": CASES[4:5], "test": CASES[5:]}
STUDY = {
    "name": "tiny",
    "dataset": "Dataset501_Tiny",
    "configuration": "3d_fullres",
    "split": "split.json",
    "device": "cpu",
    "network": {"base_features": 4, "batch_size": 2, "n_stages": 3},
    "settings": {"num_epochs": 1, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1},
    "predictions": [{"steps": 2, "sampler": "ddim"}],
    "cells": [
        {"name": "Stock", "trainer": "nnUNetTrainerBaseline"},
        {"name": "Recycle", "trainer": "nnUNetTrainerRecycleXT", "analyse": {"steps": 2, "samples": 2, "cases": 1}},
    ],
    "questions": [{"title": "Does recycling help?", "cells": ["Stock", "Recycle"]}],
}
QUIET = {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1"}


def test_the_script_tells_its_verbs_and_that_nothing_is_seeded():
    environment = {**os.environ, "NNUNETV2_DIFFUSION_ENV": "active"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = [str(SCRIPT), "--help"]
    said = subprocess.run(command, env=environment, cwd=SCRIPT.parents[1], capture_output=True, text=True, check=True)
    assert all(verb in said.stdout for verb in ("run", "report", "split"))
    assert "nnU-Net seeds nothing" in said.stdout


@pytest.mark.slow
def test_a_matrix_of_two_cells_goes_from_cases_to_a_page(tmp_path, monkeypatch):
    for variable, value in QUIET.items():
        monkeypatch.setenv(variable, value)
    raw = tmp_path / STUDY["dataset"]
    write_phantoms(raw, len(CASES), 0, seed=0)
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))
    (tmp_path / "tiny.json").write_text(json.dumps(STUDY))
    work, results, page = tmp_path / "work", tmp_path / "results", tmp_path / "page.md"
    command = ["run", tmp_path / "tiny.json", "--raw", raw, "--out", work, "--results", results, "--jobs", "2"]
    assert main([str(word) for word in command]) == 0

    found = {f.stem: json.loads(f.read_text()) for f in (results / "tiny").glob("*_run0.json")}
    assert set(found) == {"Stock_run0", "Recycle_run0"}
    for record in found.values():
        (prediction,) = record["predictions"]
        assert sorted(prediction["scores"]) == SPLIT["test"]
        for labels in prediction["scores"].values():
            assert set(labels) == {"1", "2"}
            assert all(set(m) == {"Dice", "HD95", "volume_error", "volume_error_rel"} for m in labels.values())
            assert all(0 <= metrics["Dice"] <= 1 for metrics in labels.values())
        assert len(record["training"]["curve"]["mean_fg_dice"]) == 1
        assert record["training"]["peak_memory_bytes"] > 2**27
        assert record["network"]["features_per_stage"] == [4, 8, 16]
        assert str(tmp_path) not in json.dumps(record)
    assert found["Stock_run0"]["predictions"][0]["name"] == "one_pass"
    steps = found["Recycle_run0"]["analysis"]["steps"]
    assert sorted({*zip(steps["sample"], steps["step"], strict=True)}) == [(0, 1), (0, 2), (1, 1), (1, 2)]

    before = {file: file.stat().st_mtime_ns for file in work.rglob("*") if file.is_file()}
    assert main([str(word) for word in command]) == 0
    assert before == {file: file.stat().st_mtime_ns for file in work.rglob("*") if file.is_file()}

    assert main(["report", str(results), "-o", str(page)]) == 0
    text = page.read_text()
    assert "| Recycle | K2\\_ddim | one\\_pass | 2 |" in text
    assert (tmp_path / "page" / "figures" / "tiny_question_1_curves.png").is_file()
