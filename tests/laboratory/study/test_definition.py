"""Studies and splits: what is wrong with a file is named, with what was expected."""

import json
from pathlib import Path

import pytest

from laboratory.study import StudyError
from laboratory.study.definition import (
    CELL_KEYS,
    QUESTION_KEYS,
    SPLIT_KEYS,
    STUDY_KEYS,
    Analysis,
    Prediction,
    predictions_of,
    read_split,
    read_study,
)
from laboratory.study.split import draw_split
from nnunetv2_diffusion.settings import settings_table

STUDIES = Path(__file__).parents[3] / "studies"
SPLIT = {"train": ["a", "b", "c"], "val": ["c"], "test": ["d", "e"]}
STUDY = {
    "name": "small",
    "dataset": "Dataset001_Some",
    "configuration": "3d_fullres",
    "split": "split.json",
    "network": {"base_features": 8},
    "settings": {"num_epochs": 3, "hidiff": {"refiner_width": 8}},
    "cells": [
        {"name": "Stock", "trainer": "nnUNetTrainerBaseline", "runs": 2},
        {"name": "Hi", "trainer": "nnUNetTrainerHiDiff", "segmentor": "Stock", "settings": {"hidiff": {"steps": 3}}},
    ],
    "predictions": [{"steps": 1}, {"steps": 5, "sampler": "ddim"}, {"steps": 5, "mirroring": True}],
    "questions": [{"title": "Why?", "cells": ["Stock", "Hi"]}],
}


@pytest.fixture
def write(tmp_path):
    def make(study=STUDY, split=SPLIT):
        (tmp_path / "split.json").write_text(json.dumps(split))
        (tmp_path / "study.json").write_text(json.dumps(study))
        return tmp_path / "study.json"

    return make


def test_cells_have_what_the_study_says_for_all_and_their_own(write):
    study = read_study(write())
    stock, hidiff = study.cells
    assert (stock.runs, hidiff.runs) == (2, 1)
    assert stock.settings == {"num_epochs": 3, "hidiff": {"refiner_width": 8}}
    assert hidiff.settings == {"num_epochs": 3, "hidiff": {"refiner_width": 8, "steps": 3}}
    assert stock.network == hidiff.network == {"base_features": 8}
    assert [p.name for p in hidiff.predictions] == ["K1_ddpm", "K5_ddim", "K5_ddpm_mirrored"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nam": "x"}, "unknown key 'nam'; did you mean 'name'.*expected keys are name, summary"),
        ({"cells": [{"name": "a", "trainer": "T", "run": 2}]}, r"cells\[0\]: unknown key 'run'; did you mean 'runs'"),
        ({"cells": [{"name": "a"}]}, r"cells\[0\]: no key 'trainer', expected name, trainer"),
        ({"cells": [{"name": "a__b", "trainer": "T"}]}, "name is 'a__b'"),
        ({"cells": [{"name": "a", "trainer": "T"}, {"name": "A", "trainer": "T"}]}, "more than one cell .* a, A"),
        ({"cells": [{"name": "a", "trainer": "T", "runs": 0}]}, "runs is 0, expected an integer of at least 1"),
        ({"cells": [{"name": "a", "trainer": "T", "segmentor": "b"}]}, "no cell 'b', expected one of a"),
        ({"cells": [{"name": "a", "trainer": "T", "warm_start": "b"}]}, "no cell 'b', expected one of a"),
        (
            {
                "cells": [
                    {"name": "a", "trainer": "T"},
                    {"name": "b", "trainer": "T", "segmentor": "a", "warm_start": "a"},
                ]
            },
            "cell b has a segmentor and a warm_start, expected one of them",
        ),
        (
            {"cells": [{"name": "a", "trainer": "T", "warm_start": "a"}]},
            "cell a: warm_start a starts from another cell itself",
        ),
        (
            {"cells": [{"name": "a", "trainer": "T"}, {"name": "b", "trainer": "T", "ensemble": "a"}]},
            "cell b: ensemble of 1 run of a, expected runs of at least 2",
        ),
        (
            {"cells": [{"name": "a", "trainer": "T", "runs": 2}, {"name": "b", "trainer": "U", "ensemble": "a"}]},
            "cell b: trainer is U, expected that of its members, T",
        ),
        (
            {
                "cells": [
                    {"name": "a", "trainer": "T", "runs": 2},
                    {"name": "b", "trainer": "T", "ensemble": "a", "settings": {"steps": 3}},
                ]
            },
            "cell b has settings, but an ensemble has those of its members, a",
        ),
        ({"cells": [{"name": "a", "trainer": "T", "settings": {"stepz": 1}}]}, "unknown setting 'stepz'"),
        ({"predictions": [{"steps": 1, "tta": True}]}, r"predictions\[0\]: unknown setting 'tta'.*steps, sampler"),
        ({"predictions": [{"steps": 1}, {"steps": 1}]}, "K1_ddpm twice"),
        ({"settings": {"num_epochs": 0}}, "num_epochs is 0"),
        ({"analyse": {"step": 1}}, "unknown setting 'step'"),
        ({"reference": "None"}, "no cell 'None', expected one of Stock, Hi"),
        ({"questions": [{"title": "?", "cells": ["Stock"]}]}, "expected two names of cells"),
        ({"device": "tpu"}, "device is 'tpu', expected one of cpu, cuda, mps"),
        ({"dataset": "Some"}, "dataset is 'Some', expected a folder's name"),
    ],
)
def test_what_is_wrong_in_a_study_is_named(write, change, said):
    file = write({**STUDY, "questions": [], **change})
    with pytest.raises(StudyError, match=said) as failure:
        read_study(file)
    assert "study.json" in str(failure.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"test": ["a", "d"]}, "1 cases are in test and in train or val: a"),
        ({"val": ["z"]}, "val has z, expected cases of train only"),
        ({"val": ["a", "b", "c"]}, "all cases of train are in val"),
        ({"test": ["d", "d"]}, "test has cases twice: d"),
        ({"test": []}, "expected a list of names"),
        ({"tests": ["f"]}, "unknown key 'tests'; did you mean 'test'"),
    ],
)
def test_a_split_that_leaks_or_misses_a_part_is_refused(write, tmp_path, change, said):
    write(split={**SPLIT, **change})
    with pytest.raises(StudyError, match=said):
        read_split(tmp_path / "split.json")


def test_fold_0_trains_on_no_validation_or_test_case(write, tmp_path):
    write()
    (fold,) = read_split(tmp_path / "split.json").fold()
    assert fold == {"train": ["a", "b"], "val": ["c"]}


def test_a_trainer_without_a_chain_predicts_once_for_each_kind_of_mirroring(write):
    cell = read_study(write()).cells[0]
    assert predictions_of(cell, None) == (Prediction(), Prediction(mirroring=True))
    assert predictions_of(cell, "gaussian") == cell.predictions


@pytest.mark.parametrize(
    ("kind", "steps", "good"),
    [("gaussian", 0, False), ("gaussian", 1001, True), ("gaussian", 1002, False), ("gaussian", None, False),
     ("hidiff", 0, True), ("hidiff", 10, True), ("hidiff", 11, False)],
)  # fmt: skip
def test_steps_must_fit_the_chain(write, kind, steps, good):
    cell = read_study(write({**STUDY, "predictions": [{"steps": steps}]})).cells[0]
    if good:
        assert len(predictions_of(cell, kind)) == 1
    else:
        with pytest.raises(StudyError, match=r"cell Stock: steps of a prediction is .*, expected "):
            predictions_of(cell, kind)


def test_a_draw_depends_on_names_and_seed_alone():
    cases = [f"case_{i}" for i in range(20)]
    first = draw_split(cases, 4, 2, seed=1)
    assert first == draw_split(cases[::-1], 4, 2, seed=1) != draw_split(cases, 4, 2, seed=2)
    assert sorted(first["train"] + first["test"]) == sorted(cases)
    assert (len(first["test"]), len(first["val"])) == (4, 2)
    assert set(first["val"]) < set(first["train"])
    with pytest.raises(StudyError, match="18 test and 2 validation cases of 20"):
        draw_split(cases, 18, 2, seed=1)


@pytest.mark.parametrize("file", sorted(STUDIES.glob("hippocampus_*_?pu.json")), ids=lambda f: f.stem)
def test_studies_of_the_repository_can_be_run(file):
    study = read_study(file)
    assert study.name == file.stem
    assert study.split.counts() == {"train": 152, "val": 8, "test": 40}
    for cell in study.cells:
        kind = "hidiff" if "HiDiff" in cell.trainer else "gaussian"
        assert predictions_of(cell, None if cell.trainer.endswith(("Baseline", "NoDiff")) else kind)
        if "HiDiff" in cell.trainer:
            assert study.cell(cell.segmentor).trainer == "nnUNetTrainerBaseline"


def test_the_docs_name_every_key_and_hold_the_generated_tables():
    page = (STUDIES.parent / "docs" / "study.md").read_text(encoding="utf-8")
    for key in {*STUDY_KEYS, *CELL_KEYS, *QUESTION_KEYS, *SPLIT_KEYS}:
        assert f"`{key}`" in page, key
    assert settings_table(Prediction) in page
    assert settings_table(Analysis) in page


def test_the_template_can_be_read():
    study = read_study(STUDIES / "template.json")
    assert [cell.name for cell in study.cells] == ["Baseline", "RecycleXT", "RecycleXT_warm"]
    assert study.cell("RecycleXT_warm").source == "Baseline"
