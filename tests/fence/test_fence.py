"""What earlier code wrote is read by this code, with the same results; ``README.md`` beside this file has the terms.

Only public entry points are used, see ``fence_runs``. What was found is compared with tolerances for other processors,
not for other mathematics.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from fence_planners import PLANNERS, planned
from fence_runs import (
    CASES,
    CHECKPOINT,
    HERE,
    faces,
    find_planner,
    make_trainer,
    read_case,
    run_own,
    run_stock,
    train_once,
    unpack,
    use_checkout,
)
from fence_settings import outcome, settings_trainer

NAMES = sorted(folder.name for folder in CASES.iterdir() if (folder / "case.json").is_file())
SETTINGS = json.loads((HERE / "settings.json").read_text(encoding="utf-8"))
PLANS = json.loads((HERE / "planners.json").read_text(encoding="utf-8"))
TRAINERS = {  # of version 0.1, but RecycleMixed, which is announced to go
    f"nnUNetTrainer{name}"
    for name in (
        *("Baseline", "DiffSeg", "HiDiff", "HiDiffMERIT", "NoDiff", "RecycleScore", "RecycleXT", "RecycleXtPlus1"),
        *("SelfCondXt", "SelfCondXtPlus1"),
    )
}
# Of a mask, of probabilities on average and anywhere, of the numbers that maps and samples are told by. With another
# instruction set (ATEN_CPU_CAPABILITY=default, ONEDNN_MAX_CPU_ISA=SSE41), masks and maps were the same but for
# binarised networks, where a rounding turns the sign of an activation over: 0.2 % of voxels, 0.0013 on average.
EXACT = {"mask": 0.001, "mean": 1e-4, "any": 5e-3, "told": 1e-4}
SIGNS = {"mask": 0.008, "mean": 4e-3, "any": 0.5, "told": 4e-3}
LOSS = 1e-4
WHOLE = ("recycle_xt_3d", "recycle_xt_2d", "self_cond_xt_3d", "diff_seg_2d", "recycle_score_3d", "hidiff_2d")


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory):
    """nnU-Net's folders, and where models are unpacked."""
    root = tmp_path_factory.mktemp("fence")
    with pytest.MonkeyPatch.context() as patch:
        use_checkout(patch, root)
        yield root


@pytest.fixture(scope="module")
def model(work):
    """Folder of a case's model, unpacked once."""
    return cache(lambda name: unpack(name, work / "models"))


@cache
def expected(name: str) -> dict[str, np.ndarray]:
    with np.load(CASES / name / "expected.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def tolerance(name: str) -> dict[str, float]:
    return SIGNS if name.startswith("hidiff") and "paper" not in name else EXACT


def check_mask(found: np.ndarray, wanted: np.ndarray, most: float, clear: np.ndarray | None = None) -> None:
    """Compare masks, where given only in voxels that are no ties."""
    assert found.shape == wanted.shape
    clear = np.ones_like(found, bool) if clear is None else clear
    assert clear.mean() > 0.75
    changed = float((found != wanted)[clear].mean())
    assert changed <= most, f"{changed:.2%} of the mask's voxels are others"


def runs(kind: str) -> list:
    """All runs of all cases; long ones are marked as slow but for a case of each kind."""
    found = []
    for name in NAMES:
        for run in read_case(name)[kind]:
            slow = run in ("K3_mirrored", "K3_samples") and name not in WHOLE
            found.append(pytest.param(name, run, id=f"{name}-{run}", marks=[pytest.mark.slow] * slow))
    return found


def test_every_trainer_of_version_0_1_is_there_and_behind_the_fence():
    fenced = {read_case(name)["trainer"] for name in NAMES}
    assert fenced == TRAINERS
    assert set(faces()) >= TRAINERS


# --- predictions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "run"), runs("stock"))
def test_nnunets_predictor_gives_the_masks_that_it_gave(model, name, run):
    case, arrays, most = read_case(name), expected(name), tolerance(name)
    image = arrays["image"].astype(np.float32)
    found = run_stock(model(name), image, case["spacing"], case["stock"][run])
    check_mask(found["mask"], arrays[f"stock/{run}/mask"], most["mask"], found["clear"])
    off = np.abs(found["probabilities"].astype(np.float32) - arrays[f"stock/{run}/probabilities"].astype(np.float32))
    assert off.mean() <= most["mean"]
    assert off.max() <= most["any"]


@pytest.mark.parametrize(("name", "run"), runs("own"))
def test_predict_image_gives_the_masks_and_maps_that_it_gave(model, name, run):
    case, arrays, most = read_case(name), expected(name), tolerance(name)
    image = arrays["image"].astype(np.float32)
    found, told = run_own(model(name), image, case["spacing"], {"options": case["own"][run]})
    check_mask(found["mask"], arrays[f"own/{run}/mask"], most["mask"])
    check_told(told, case["found"][run], most["told"])


def check_told(found: dict, wanted: dict, most: float) -> None:
    """Maps by mean, deviation, median and 95th percentile; agreement of samples and their number."""
    assert found["samples"] == wanted["samples"]
    assert found["agreement"] == pytest.approx(wanted["agreement"], abs=most)
    assert set(wanted["maps"]) <= set(found["maps"])
    for kind, values in wanted["maps"].items():
        assert found["maps"][kind] == pytest.approx(values, rel=most, abs=most), kind


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_has_the_loss_that_it_had(model, name):
    case, folder = read_case(name), model(name)
    plans, dataset = (json.loads((folder / file).read_text()) for file in ("plans.json", "dataset.json"))
    trainer = make_trainer(case["trainer"], plans, dataset, case["configuration"])
    assert sum(p.numel() for p in trainer.network.parameters()) == case["parameters"]
    weights = torch.load(Path(folder) / "fold_0" / CHECKPOINT, weights_only=False)["network_weights"]
    check_training(train_once(trainer, weights, name, case["labels"]), case["training"])


def check_training(found: dict, wanted: dict) -> None:
    assert found["loss"] == pytest.approx(wanted["loss"], rel=LOSS, abs=LOSS)
    assert found["optimizer"] == wanted["optimizer"]
    assert found["rate"] == pytest.approx(wanted["rate"], rel=1e-6)
    assert found["moved"] == pytest.approx(wanted["moved"], rel=1e-2)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS["valid"])
def test_a_section_of_version_0_1_does_what_it_did(name):
    given = SETTINGS["valid"][name]
    found, wanted = outcome(given["trainer"], given["section"]), given["outcome"]
    assert found["parameters"] == wanted["parameters"]
    assert found["lengths"] == wanted["lengths"]
    check_training(found["training"], wanted["training"])
    most = tolerance(name)
    check_told(found["prediction"], wanted["prediction"], most["told"])
    assert found["prediction"]["foreground"] == pytest.approx(wanted["prediction"]["foreground"], abs=most["mask"])


def test_every_section_makes_a_difference():
    """Else the fence would not see that a key of it is no longer read."""
    told = [json.dumps(given["outcome"], sort_keys=True) for given in SETTINGS["valid"].values()]
    assert len(set(told)) == len(told)


@pytest.mark.parametrize("name", SETTINGS["invalid"])
def test_a_section_that_was_refused_is_refused_by_the_names_in_it(name):
    trainer, section, words = SETTINGS["invalid"][name]
    with pytest.raises(ValueError, match=r"\w+") as error:
        settings_trainer(trainer, section)
    assert [word for word in words if word not in str(error.value)] == []


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan():
    """What a planner plans, planned once."""
    return cache(planned)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * ("ResEnc" in n)) for n in PLANNERS])
def test_a_planner_plans_what_it_planned(plan, name):
    wanted, found = PLANS[name], plan(name)
    assert found["plans_name"] == wanted["plans_name"]
    assert set(found["configurations"]) == set(wanted["configurations"])
    for key, numbers in wanted["configurations"].items():
        own = found["configurations"][key]
        assert {k: own[k] for k in numbers if k != "diffusion"} == {k: numbers[k] for k in numbers if k != "diffusion"}
        assert own["diffusion"], "the settings are written out, whatever their layout"


@pytest.mark.parametrize(("family", "trainer"), [("Diffusion", "RecycleXT"), ("HiDiff", "HiDiff")])
def test_settings_as_planned_make_the_network_that_they_made(plan, family, trainer):
    """Whatever the layout in which tomorrow's planner writes them."""
    name = f"nnUNetTrainer{trainer}"
    sizes = [
        sum(p.numel() for p in settings_trainer(name, section).network.parameters())
        for section in (
            plan(f"nnUNetPlanner{family}")["configurations"]["2d"]["diffusion"],
            PLANS[f"nnUNetPlanner{family}"]["configurations"]["2d"]["diffusion"],
        )
    ]
    assert sizes[0] == sizes[1]


def test_planners_of_version_0_1_are_there():
    assert set(PLANS) == set(PLANNERS)
    assert all(find_planner(name).__name__ == name for name in PLANS)
