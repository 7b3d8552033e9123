"""The page: numbers are those of the JSONs, and the same JSONs make the same page."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from laboratory.study import StudyError, report
from laboratory.study.records import CELL, SCHEMA, STUDY, plain, to_text
from laboratory.study.results import load_results
from laboratory.study.tables import (
    all_tables,
    cost_table,
    holm,
    sample_table,
    score_table,
    settings_table,
)
from laboratory.study.tables import test_table as difference_table

DOCS = Path(__file__).parents[3] / "docs"
CASES = [f"case_{i}" for i in range(8)]
RNG = np.random.default_rng(0)


def scores(shift):
    made = {}
    for index, case in enumerate(CASES):
        made[case] = {
            label: {"Dice": float(d), "HD95": None if index == 0 else 3.0 - shift, "volume_error": 1.0,
                    "volume_error_rel": -0.1}
            for label, d in zip("12", 0.5 + shift + 0.05 * np.sin(index) + RNG.normal(scale=0.01, size=2), strict=True)
        }  # fmt: skip
    return made


def record(cell, run, shift, chain=True):
    kinds = [(1, "ddpm"), (2, "ddpm")] if chain else [(None, "ddpm")]
    predictions = [
        {"name": f"K{k}_{s}" if k else "one_pass", "steps": k, "sampler": s, "samples": 1, "mirroring": False,
         "seconds": 16.0 * (k or 1), "attempts": 1, "peak_memory_bytes": None, "scores": scores(shift)}
        for k, s in kinds
    ]  # fmt: skip
    rows = [(case, n, k, 0.5 + 0.1 * k + 0.02 * n) for case in CASES for n in range(2) for k in (1, 2)]
    steps = {"case": [r[0] for r in rows], "sample": [r[1] for r in rows], "step": [r[2] for r in rows]}
    analysis = {
        "steps": {**steps, "label": ["mean"] * len(rows), "Dice": [r[3] for r in rows]},
        "samples": {"case": CASES, "Dice": [0.7] * 8, "sample_dice": [0.69] * 8, "pairwise_dice": [0.9] * 8},
    }
    return {
        "schema": SCHEMA, "kind": CELL,
        "request": {"study": "made", "cell": cell, "run": run, "trainer": f"nnUNetTrainer{cell}",
                    "dataset": "Dataset001_Some", "configuration": "3d_fullres", "split": "abc",
                    "settings": {"num_epochs": 2, **({"steps": 5} if chain else {})}, "segmentor": None},
        "split": {"train": 20, "val": 2, "test": 8}, "labels": {"1": "organ", "2": "lesion"},
        "network": {"class": "PlainConvUNet", "patch_size": [8, 8, 8], "batch_size": 2, "features_per_stage": [4, 8]},
        "settings": {"num_epochs": 2, "num_iterations_per_epoch": None},
        "hardware": {"gpu": None, "cpu": "Some CPU", "cpus": 2, "device": "cpu"}, "jobs": 1,
        "versions": {"python": "3.11", "torch": "2.6"},
        "code": {"commit": "0123456789abcdef", "dirty": False, "package_sha256": "f00"},
        "code_changed": False,
        "training": {"seconds": 9.0, "attempts": 1, "peak_memory_bytes": 2**31, "epoch_seconds": [3.0, 2.0],
                     "curve": {"mean_fg_dice": [0.3, None]}},
        "predictions": predictions, "analysis": analysis if chain else None,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    made = {
        "schema": SCHEMA, "kind": STUDY, "name": "made", "summary": "A made-up study.", "reference": "Base",
        "cells": ["Base", "Diff", "Later"], "settings": {"num_epochs": 2},
        "questions": [{"title": "Is it better?", "cells": ["Base", "Diff"]},
                      {"title": "And later?", "cells": ["Later", "Diff"]}],
    }  # fmt: skip
    place = tmp_path / "results" / "made"
    place.mkdir(parents=True)
    contents = {"study": made, "Base_run0": record("Base", 0, 0.0, chain=False)}
    contents |= {f"Diff_run{run}": record("Diff", run, 0.1 + 0.02 * run) for run in range(2)}
    for name, content in contents.items():
        (place / f"{name}.json").write_text(to_text(content))
    return place.parent


@pytest.fixture
def study(folder):
    return load_results(folder)[0]


def cell_text(row):
    return [getattr(cell, "text", cell) for cell in row]


def test_values_are_means_over_runs_and_labels_case_by_case(study):
    diff = study.cell("Diff")
    expected = [
        np.mean([r["predictions"][0]["scores"][case][label]["Dice"] for r in diff.records for label in "12"])
        for case in CASES
    ]
    np.testing.assert_allclose(diff.by_case("K1_ddpm", "Dice"), expected)
    rows = {tuple(cell_text(row)[:2]): cell_text(row) for row in score_table(study).rows}
    row = rows["Diff", "K1_ddpm"]
    assert row[2] == f"{np.mean(expected):.4f} ± {np.std(expected, ddof=1):.4f}"
    of_runs = diff.values("K1_ddpm", "Dice").mean(1)
    assert row[-1] == f"{np.std(of_runs, ddof=1):.4f} (2)"
    assert rows["Base", "one_pass"][-1] == "-"
    assert row[5].endswith("(7 of 8)"), "a case without HD95 is counted"
    assert row[6] == "10.0"


def test_only_the_best_mean_is_bold(study):
    marked = [row[0] for row in score_table(study).rows if row[2].best]
    assert marked == ["Diff"]


def test_tests_are_paired_with_the_references_only_prediction(study):
    base, diff = study.cell("Base"), study.cell("Diff")
    rows = [cell_text(row) for row in difference_table(base, study.cells, "Dice").rows]
    assert [row[:3] for row in rows] == [["Diff", "K1_ddpm", "one_pass"], ["Diff", "K2_ddpm", "one_pass"]]
    difference = diff.by_case("K1_ddpm", "Dice") - base.by_case("one_pass", "Dice")
    assert rows[0][4] == f"{difference.mean():+.4f}"
    assert stats.ttest_1samp(difference, 0).pvalue < 0.001
    assert rows[0][6] == "<0.0001"
    assert rows[0][9] == "100 %"
    hausdorff = cell_text(difference_table(base, study.cells, "HD95").rows[0])
    assert hausdorff[3] == "7 (-1)"
    assert hausdorff[9] == "100 %", "a smaller distance is better"


def test_holms_correction():
    corrected = holm([0.01, 0.04, float("nan"), 0.03, 0.9])
    np.testing.assert_allclose(corrected, [0.04, 0.09, np.nan, 0.09, 0.9])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_samples_come_from_the_analysis(study):
    row = cell_text(sample_table(study).rows[0])
    assert row[:4] == ["Diff", "0.7000", "0.6900", "0.9000"]
    assert float(row[4]) == pytest.approx(0.02 / np.sqrt(2), abs=1e-5)


def test_cost_is_that_of_epochs_and_of_a_case(study):
    rows = [cell_text(row) for row in cost_table(study).rows]
    assert rows[0] == ["Base", "5", "2.50", "2.00", "-", "-", "2.00"]
    assert rows[1] == ["Diff", "5", "2.50", "-", "2.00", "4.00", "2.00"]


def test_settings_of_its_own_are_those_the_study_has_not(study):
    rows = [cell_text(row) for row in settings_table(study).rows]
    assert [row[-1] for row in rows] == ["-", "steps=5"]
    assert rows[0][3] == "2 x 250", "what is not set is nnU-Net's"


def test_the_page_is_the_same_again_and_says_where_it_comes_from(folder):
    page, figures = report.build(load_results(folder), "results")
    again, others = report.build(load_results(folder), "results")
    assert page == again
    assert figures == others
    assert all(f"]({path})" in page and png.startswith(b"\x89PNG") for path, png in figures.items())
    for said in ("made", "0123456789ab", "Some CPU", "torch 2.6", "Without results so far: Later", "Is it better?"):
        assert said in page
    assert "Not answered yet" in page
    assert {Path(path).name for path in figures} == {
        "made_curves.png",
        "made_question_1_curves.png",
    }


def test_code_that_cannot_be_traced_is_told(folder):
    file = folder / "made" / "Diff_run0.json"
    content = json.loads(file.read_text())
    content["code"]["dirty"] = True
    content["code_changed"] = True
    file.write_text(to_text(content))
    page, _ = report.build(load_results(folder), "results")
    assert "with changes that were not committed, changed while it ran" in page


def test_an_ensemble_is_no_interrupted_training(folder):
    continued, ensemble = record("Diff", 0, 0.1), record("Later", 0, 0.1)
    continued["training"]["attempts"] = 2
    ensemble["request"]["ensemble"] = {"cell": "Diff", "runs": 2}
    ensemble["training"]["attempts"] = 3
    for content in (continued, ensemble):
        (folder / "made" / f"{content['request']['cell']}_run0.json").write_text(to_text(content))
    page, _ = report.build(load_results(folder), "results")
    assert "1 of 3 trainings were interrupted" in page


def test_only_its_own_page_is_overwritten(folder, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("mine")
    with pytest.raises(FileExistsError, match="not made by scripts/study report"):
        report.write_page(page, report.MARK, {})
    assert page.read_text() == "mine"
    page.unlink()
    for text in ("first", "second"):
        report.write_page(page, f"{report.MARK}{text}", {"page/figures/a.png": b"x"})
        assert page.read_text().endswith(text)
    assert (tmp_path / "page" / "figures" / "a.png").read_bytes() == b"x"


def damage(record, key):
    changed = copy.deepcopy(record)
    if key == "cases":
        changed["predictions"][0]["scores"].pop(CASES[0])
    elif key == "kind":
        changed["kind"] = "benchmark"
    elif key == "cell":
        changed["request"]["cell"] = "Nobody"
    else:
        changed["request"][key] = "other"
    return changed


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("cases", "not all predictions have the same cases"),
        ("split", "more than one split"),
        ("dataset", "more than one dataset"),
        ("kind", "kind 'benchmark'"),
        ("cell", "cells that it does not have: Nobody"),
        ("study", "study other without its study.json"),
    ],
)
def test_results_that_do_not_belong_together_are_refused(folder, key, said):
    file = folder / "made" / "Diff_run1.json"
    file.write_text(to_text(damage(json.loads(file.read_text()), key)))
    with pytest.raises(StudyError, match=said):
        load_results(folder)


def test_json_is_compact_strict_and_reads_back():
    content = {"a": [1, 2.5, None, "x, [y]"], "b": {"c": {"d": 1}, "e": []}, "f": [[1, 2], [3]], "g": {}}
    text = to_text(content)
    assert json.loads(text) == content
    assert '"a": [1, 2.5, null, "x, [y]"]' in text
    with pytest.raises(ValueError, match="JSON"):
        to_text({"a": float("nan")})
    assert plain({"a": [np.float32(0.1), np.nan, np.float64(np.inf), True]}) == {"a": [0.1, None, None, True]}


def test_the_page_in_the_docs_is_what_its_jsons_make():
    folder = DOCS / "results" / "study"
    finished = folder.is_dir() and any(file.name != "study.json" for file in folder.rglob("*.json"))
    page = DOCS / "results.md"
    assert page.exists() == finished, "run: scripts/study report docs/results/study"
    if finished:
        made, figures = report.build(load_results(folder), page.stem)
        assert page.read_text(encoding="utf-8") == made, "run: scripts/study report docs/results/study"
        assert all((DOCS / path).is_file() for path in figures)


def test_modes_are_compared_with_one_pass_of_the_same_model(study):
    title = "Mirroring and tiles in the chain"
    assert title not in {table.title for table in all_tables(study)}
    rng = np.random.default_rng(1)
    gains = rng.normal(0.02, 0.01, len(CASES))
    plain = np.full(len(CASES), 0.61)  # step 1 of record(), mean of two samples
    for number, record in enumerate(study.cell("Diff").records):
        dice = [*(plain + gains + (-1) ** number * 0.001), *plain]
        record["analysis"]["modes"] = {
            "case": CASES * 2 + CASES[:1], "mode": ["full"] * 8 + ["none"] * 9, "label": ["mean"] * 16 + ["organ"],
            "Dice": [*map(float, dice), 0.0], "HD95": [2.0] * 17, "passes_per_tile": [16] * 8 + [1] * 9,
        }  # fmt: skip
    table = next(table for table in all_tables(study) if table.title == title)
    full, none = (dict(zip(table.columns, cell_text(row), strict=True)) for row in table.rows)
    p = stats.ttest_1samp(gains, 0).pvalue
    assert full["minus one pass"] == f"{100 * gains.mean():+.2f} (p {'<0.0001' if p < 0.0001 else f'{p:.4f}'})"
    assert none["minus one pass"].startswith("+0.00")
    assert full["Dice"].startswith(f"{0.61 + gains.mean():.4f} ± ")
    assert (full["HD95"], full["ECE"], full["passes a tile"]) == ("2.00", "n/a", "16.00")
    assert none["Dice"] == "0.6100 ± 0.0000"


def test_the_correlation_of_variance_is_shown_where_it_was_measured(study):
    for record in study.cell("Diff").records:
        record["analysis"]["samples"]["error_correlation"] = [0.25] * 8
    tables = {table.title: [cell_text(row) for row in table.rows] for table in all_tables(study)}
    assert tables["Samples"][0][-1] == "0.250"
