"""The planner plans as nnU-Net's does, writes the settings, and leaves stock plans and data alone."""

import hashlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import nnunetv2
import numpy as np
import pytest
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    ResEncUNetPlanner,
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
    nnUNetPlannerResEncXL,
)
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_diffusion.planning import memory
from nnunetv2_diffusion.planning.derive import PlansError
from nnunetv2_diffusion.planning.memory import MemoryEstimate, estimate_memory
from nnunetv2_diffusion.planning.planner import DiffusionPlannerMixin
from nnunetv2_diffusion.settings import DiffusionSettings, SettingsError, parse_settings, read_settings

DATASET = "Dataset501_Tiny"
CASES = ("case_0", "case_1")
ARCHITECTURES = {"2d", "3d_fullres", "3d_lowres"}
FOLDER = Path(__file__).resolve().parents[2] / "plans"
PLANNERS = {
    "nnUNetPlannerDiffusion": (ExperimentPlanner, "nnUNetDiffusionPlans"),
    "nnUNetPlannerDiffusionResEncM": (nnUNetPlannerResEncM, "nnUNetDiffusionResEncMPlans"),
    "nnUNetPlannerDiffusionResEncL": (nnUNetPlannerResEncL, "nnUNetDiffusionResEncLPlans"),
    "nnUNetPlannerDiffusionResEncXL": (nnUNetPlannerResEncXL, "nnUNetDiffusionResEncXLPlans"),
    "nnUNetPlannerHiDiff": (ExperimentPlanner, "nnUNetHiDiffPlans"),
    "nnUNetPlannerHiDiffResEncM": (nnUNetPlannerResEncM, "nnUNetHiDiffResEncMPlans"),
    "nnUNetPlannerHiDiffResEncL": (nnUNetPlannerResEncL, "nnUNetHiDiffResEncLPlans"),
    "nnUNetPlannerHiDiffResEncXL": (nnUNetPlannerResEncXL, "nnUNetHiDiffResEncXLPlans"),
}


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)


@pytest.fixture
def quick_estimate(monkeypatch):
    """Memory by the number of voxels: nnU-Net builds a network for every patch size that it considers."""

    def estimate(patch_size, *architecture):
        return 250 * int(np.prod(patch_size))

    monkeypatch.setattr(ExperimentPlanner, "static_estimate_VRAM_usage", staticmethod(estimate))
    memory_model(monkeypatch)


def memory_model(monkeypatch, fixed=10**8, classes=0, **factors):
    """Bytes by the number of voxels; those of a family as a multiple of stock's.

    Args:
        monkeypatch: the fixture.
        fixed: bytes for any patch, of all families.
        classes: share that one-hot masks add.
        factors: by family, of what a sample takes; 1 for those not named.

    Returns:
        configurations that were asked for.
    """
    asked = []

    def estimate(family, configuration, dataset_json, channels, device="cuda"):
        asked.append((family, configuration))
        saved = 1000 * factors.get(family, 1) * int(np.prod(configuration["patch_size"]))
        one_hot = (configuration.get("diffusion") or {}).get("mask_encoding") != "analog-bits"
        return MemoryEstimate(fixed, 0, 0, 0, 0, int(saved * (1 + classes * one_hot * (family != "stock"))), 0)

    monkeypatch.setattr(memory, "estimate_memory", estimate)
    return asked


@pytest.fixture
def dataset(tmp_path):
    """Two small images in nnU-Net's raw layout."""
    raw = tmp_path / "raw" / DATASET
    rng = np.random.default_rng(0)
    for folder, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        (raw / folder).mkdir(parents=True)
        for case in CASES:
            image = rng.random((20, 18, 16), dtype=np.float32)
            image = (image > 0.5).astype(np.uint8) if folder == "labelsTr" else image
            nib.save(nib.Nifti1Image(image, np.eye(4)), raw / folder / f"{case}{ending}")
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "object": 1}}
    description |= {"numTraining": len(CASES), "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(description))
    return raw


@pytest.fixture
def preprocessed(tmp_path, dataset, quick_estimate):
    """The folder of the plans, with a fingerprint of images so large that nnU-Net plans a cascade."""
    folder = tmp_path / "preprocessed" / DATASET
    folder.mkdir(parents=True)
    intensities = {"mean": 0.5, "std": 0.3, "min": 0, "max": 1, "median": 0.5}
    intensities |= {"percentile_00_5": 0.01, "percentile_99_5": 0.99}
    fingerprint = {
        "spacings": [[1.0, 1.0, 1.0]] * 2,
        "shapes_after_crop": [[180, 320, 320]] * 2,
        "foreground_intensity_properties_per_channel": {"0": intensities},
        "median_relative_size_after_cropping": 1.0,
    }
    (folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    return folder


def plan(planner="nnUNetPlannerDiffusion", **kwargs):
    """As nnUNetv2_plan_experiment -d 501 -pl PLANNER."""
    return plan_experiments([501], planner, **kwargs)


def read(file):
    return json.loads(Path(file).read_text())


def hashes(folder):
    return {f: hashlib.sha256(f.read_bytes()).hexdigest() for f in Path(folder).rglob("*") if f.is_file()}


def without_settings(plans):
    """Plans as a stock planner would have written them."""
    plans["plans_name"] = "nnUNetPlans"
    plans["experiment_planner_used"] = "ExperimentPlanner"
    for configuration in plans["configurations"].values():
        configuration.pop("diffusion", None)
        if "data_identifier" in configuration:
            configuration["data_identifier"] = configuration["data_identifier"].replace("Diffusion", "")
    return plans


def load(name):
    """A planner of this checkout, installed or not."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


@pytest.mark.parametrize("name", PLANNERS)
def test_nnunet_finds_the_planner(name):
    folder = str(Path(nnunetv2.__path__[0]) / "experiment_planning")
    assert recursive_find_python_class(folder, name, "nnunetv2.experiment_planning").__name__ == name


def test_every_planner_of_the_folder_is_tested():
    assert {file.stem for file in FOLDER.glob("*.py")} - {"__init__"} == set(PLANNERS)


# residual encoders are planned in the same way and rehearsed for longer
each_planner = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "ResEnc" in name else name for name in PLANNERS]
)


@each_planner
def test_planner_is_made_as_nnunets_and_differs_in_the_plans_name(preprocessed, name):
    stock_class, plans_name = PLANNERS[name]
    defaults = {p.name: p.default for p in inspect.signature(stock_class.__init__).parameters.values()}
    target = defaults["gpu_memory_target_in_gb"]
    planner, stock = load(name)(501), stock_class(501)
    assert planner.plans_identifier == plans_name
    ours = {key: value for key, value in vars(planner).items() if key in vars(stock)}
    assert {**ours, "plans_identifier": stock.plans_identifier} == vars(stock)
    positional = load(name)(501, target, "Other", "Mine", [1.0, 1.0, 1.0], True)
    assert (positional.preprocessor_name, positional.plans_identifier) == ("Other", "Mine")
    assert (positional.overwrite_target_spacing, positional.suppress_transpose) == ([1.0, 1.0, 1.0], True)


@each_planner
def test_plans_of_a_network_that_costs_no_more_are_nnunets(preprocessed, name):
    stock_class, plans_name = PLANNERS[name]
    ours, stock = load(name)(501).plan_experiment(), stock_class(501).plan_experiment()
    assert ours["plans_name"] == plans_name
    assert set(ours["configurations"]) == set(stock["configurations"])
    for key, configuration in stock["configurations"].items():
        own = dict(ours["configurations"][key])
        own.pop("diffusion", None)
        if "data_identifier" in own:
            assert own.pop("data_identifier") == f"{plans_name}_{key}"
        assert own == {k: v for k, v in configuration.items() if k != "data_identifier"}


@pytest.mark.parametrize(
    ("name", "family"), [("nnUNetPlannerDiffusion", "recycling"), ("nnUNetPlannerHiDiff", "hidiff")]
)
@pytest.mark.parametrize("factor", [2, 7])
def test_patch_and_batch_take_no_more_memory_than_nnunets_network_at_its_limit(
    preprocessed, monkeypatch, name, family, factor
):
    """quick_estimate: 250 of nnU-Net's units and 1000 bytes a voxel."""
    fixed = 10**8
    memory_model(monkeypatch, fixed, **{family: factor})
    stock = ExperimentPlanner(501).plan_experiment()["configurations"]
    plans = load(name)(501).plan_experiment()["configurations"]
    for key, limit, reference_batch in (("3d_fullres", 560e6, 2), ("2d", 85e6, 12)):
        voxels, batch = int(np.prod(plans[key]["patch_size"])), plans[key]["batch_size"]
        assert voxels * batch <= int(np.prod(stock[key]["patch_size"])) * stock[key]["batch_size"]
        budget = fixed + 1000 * limit / 250 * reference_batch
        assert fixed + factor * 1000 * voxels * (batch - 0.5) <= budget  # nnU-Net rounds the batch
        assert batch >= 2
    assert np.prod(plans["3d_fullres"]["patch_size"]) < np.prod(stock["3d_fullres"]["patch_size"])


def test_weights_leave_less_for_activations(preprocessed, monkeypatch):
    def voxels(extra):
        def estimate(family, configuration, *rest):
            own = 0 if family == "stock" else extra
            return MemoryEstimate(own, 0, 0, 0, 0, 1000 * int(np.prod(configuration["patch_size"])), 0)

        monkeypatch.setattr(memory, "estimate_memory", estimate)
        return np.prod(
            load("nnUNetPlannerDiffusion")(501).plan_experiment()["configurations"]["3d_fullres"]["patch_size"]
        )

    assert voxels(2 * 10**9) < voxels(0)


def test_smaller_target_gives_smaller_patches_and_larger_ones_are_not_counted(preprocessed, monkeypatch):
    asked = memory_model(monkeypatch, recycling=2)
    sizes = {}
    for target in (8, 3):
        asked.clear()
        plan = load("nnUNetPlannerDiffusion")(501, target).plan_experiment()["configurations"]["3d_fullres"]
        sizes[target] = np.prod(plan["patch_size"])
        units = [250 * np.prod(c["patch_size"]) for _, c in asked if len(c["patch_size"]) == 3]
        assert max(units) <= 560e6 * target / 8  # nnU-Net's own network would not fit either
    assert sizes[3] < sizes[8]


def test_many_classes_are_written_in_bits_and_the_reason_is_printed(preprocessed, monkeypatch, capsys):
    memory_model(monkeypatch, fixed=0, classes=0.1)
    configurations = load("nnUNetPlannerDiffusion")(501).plan_experiment()["configurations"]
    printed = capsys.readouterr().out
    for name in ARCHITECTURES:
        assert configurations[name]["diffusion"] == DiffusionSettings(mask_encoding="analog-bits").to_dict()
        assert f"{name}: mask_encoding is analog-bits: one channel for each of 2 labels would take 9.1%" in printed


def test_patch_is_planned_for_the_encoding_that_was_chosen(preprocessed, monkeypatch):
    memory_model(monkeypatch, fixed=0, classes=9)
    plans = load("nnUNetPlannerDiffusion")(501).plan_experiment()["configurations"]
    stock = ExperimentPlanner(501).plan_experiment()["configurations"]
    assert plans["3d_fullres"]["patch_size"] == stock["3d_fullres"]["patch_size"]


@pytest.mark.parametrize("case", ["few", "regions", "hidiff", "edited"])
def test_masks_stay_one_hot(preprocessed, dataset, monkeypatch, capsys, case):
    memory_model(monkeypatch, fixed=0, classes=0.03 if case == "few" else 0.1)
    if case == "regions":
        description = read(dataset / "dataset.json")
        description |= {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
        (dataset / "dataset.json").write_text(json.dumps(description))
    planner = load("nnUNetPlannerHiDiff" if case == "hidiff" else "nnUNetPlannerDiffusion")
    if case == "edited":
        section = {"diffusion": {"mask_encoding": "one-hot"}}
        content = {"configurations": {name: dict(section) for name in ARCHITECTURES}}
        (preprocessed / "nnUNetDiffusionPlans.json").write_text(json.dumps(content))
    configurations = planner(501).plan_experiment()["configurations"]
    assert {configurations[name]["diffusion"]["mask_encoding"] for name in ARCHITECTURES} == {"one-hot"}
    assert "analog-bits:" not in capsys.readouterr().out


def test_planning_again_plans_for_the_edited_settings(preprocessed, monkeypatch):
    plan_and_edit(preprocessed, "2d", transformer_layers=3)
    asked = memory_model(monkeypatch)
    load("nnUNetPlannerDiffusion")(501).plan_experiment()
    layers = {len(c["patch_size"]): c["diffusion"].get("transformer_layers") for f, c in asked if f == "recycling"}
    assert layers[2] == 3
    assert layers[3] in (None, DiffusionSettings().transformer_layers)


def test_planning_counts_the_real_network(tmp_path, dataset, monkeypatch):
    """Small images and a small target; nothing is replaced."""
    folder = tmp_path / "preprocessed" / DATASET
    folder.mkdir(parents=True)
    intensities = dict.fromkeys(("mean", "std", "min", "max", "median", "percentile_00_5", "percentile_99_5"), 0.5)
    fingerprint = {
        "spacings": [[1.0, 1.0, 1.0]] * 2,
        "shapes_after_crop": [[1, 96, 96]] * 2,
        "foreground_intensity_properties_per_channel": {"0": intensities},
        "median_relative_size_after_cropping": 1.0,
    }
    (folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    target = 0.1
    planner = load("nnUNetPlannerDiffusion")(501, target)
    monkeypatch.setattr(planner, "max_dataset_covered", 100)
    configuration = planner.plan_experiment()["configurations"]["2d"]
    stock_planner = ExperimentPlanner(501, target)
    monkeypatch.setattr(stock_planner, "max_dataset_covered", 100)
    stock = stock_planner.plan_experiment()["configurations"]["2d"]
    labels = {"labels": {"background": 0, "a": 1, "b": 2}}
    own = estimate_memory("recycling", configuration, labels, 1)
    reference = estimate_memory("stock", stock, labels, 1)
    batch = configuration["batch_size"] - 1  # both are rounded
    assert own.fixed + batch * own.per_sample <= reference.fixed + (stock["batch_size"] + 1) * reference.per_sample


def test_plans_are_nnunets_plus_settings_and_stock_plans_stay_untouched(preprocessed):
    assert plan("ExperimentPlanner") == "nnUNetPlans"
    before = hashes(preprocessed)
    assert plan() == "nnUNetDiffusionPlans"
    after = hashes(preprocessed)
    new = preprocessed / "nnUNetDiffusionPlans.json"
    assert {file: after[file] for file in before} == before
    assert set(after) - set(before) == {new}

    plans = read(new)
    for name, configuration in plans["configurations"].items():
        if name in ARCHITECTURES:
            assert configuration["diffusion"] == DiffusionSettings().to_dict()
            assert configuration["data_identifier"] == f"nnUNetDiffusionPlans_{name}"
        else:
            assert name == "3d_cascade_fullres"
            assert set(configuration) == {"inherits_from", "previous_stage"}
    assert without_settings(plans) == read(preprocessed / "nnUNetPlans.json")


def plan_and_edit(preprocessed, configuration, **settings):
    """Plan, then set diffusion settings of a configuration in the file, which is returned."""
    plan()
    file = preprocessed / "nnUNetDiffusionPlans.json"
    plans = read(file)
    plans["configurations"][configuration]["diffusion"] = settings  # the rest may be left out
    file.write_text(json.dumps(plans))
    return file


def test_trainers_read_the_settings_of_every_configuration(preprocessed):
    default = DiffusionSettings().samples
    file = plan_and_edit(preprocessed, "3d_fullres", samples=default + 1)
    plans = read(file)
    manager = PlansManager(str(file))
    samples = {
        name: read_settings(manager.get_configuration(name).configuration).samples for name in plans["configurations"]
    }
    assert samples == {
        "2d": default,
        "3d_lowres": default,
        "3d_fullres": default + 1,
        "3d_cascade_fullres": default + 1,
    }


def test_planning_again_keeps_edited_settings(preprocessed):
    file = plan_and_edit(preprocessed, "2d", samples=2, steps=2)
    plan()
    again = read(file)["configurations"]
    assert again["2d"]["diffusion"] == parse_settings({"samples": 2, "gaussian": {"steps": 2}}).to_dict()
    assert again["3d_fullres"]["diffusion"] == DiffusionSettings().to_dict()


def test_planning_again_refuses_settings_that_cannot_be_used_and_keeps_the_file(preprocessed):
    plan_and_edit(preprocessed, "2d", stepps=2)
    before = hashes(preprocessed)
    with pytest.raises(SettingsError, match=r"2d of .*nnUNetDiffusionPlans.json.*'stepps'.*'gaussian\.steps'"):
        plan()
    assert hashes(preprocessed) == before


@pytest.mark.parametrize("name", ["nnUNetPlans", "nnunetplans", "nnUNetResEncUNetMPlans", "../nnUNetPlans", "a__b"])
def test_stock_and_unusable_plans_names_are_refused_before_anything_is_written(preprocessed, name):
    before = hashes(preprocessed)
    with pytest.raises(PlansError, match="plans name is"):
        plan(overwrite_plans_name=name)
    assert hashes(preprocessed) == before


def test_other_plans_name_has_other_data(preprocessed):
    plan(overwrite_plans_name="MyPlans")
    identifiers = [c.get("data_identifier") for c in read(preprocessed / "MyPlans.json")["configurations"].values()]
    assert sorted(filter(None, identifiers)) == sorted(f"MyPlans_{name}" for name in ARCHITECTURES)


def test_mixin_keeps_the_data_of_any_planner_apart(preprocessed):
    class Planner(DiffusionPlannerMixin, ResEncUNetPlanner):
        pass

    assert ResEncUNetPlanner(501).generate_data_identifier("2d") == "nnUNetPlans_2d"  # shared, and so overwritten
    assert Planner(501, plans_name="Mine").generate_data_identifier("2d") == "Mine_2d"


@pytest.mark.slow
def test_stock_command_plans_and_preprocesses_and_leaves_stock_data_alone(tmp_path, dataset):
    command = Path(sys.executable).with_name("nnUNetv2_plan_and_preprocess")
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        line = [command, "-d", "501", "-c", "2d", "3d_fullres", "-np", "1", "-npfp", "1", *arguments]
        subprocess.run(line, env=variables, check=True, capture_output=True, timeout=600)

    run()
    folder = tmp_path / "preprocessed" / DATASET
    stock = {file: value for file, value in hashes(folder).items() if "nnUNetPlans" in str(file)}
    run("-pl", "nnUNetPlannerDiffusion")
    after = hashes(folder)
    assert {file: after[file] for file in stock} == stock
    for name in ("2d", "3d_fullres"):
        data = folder / f"nnUNetDiffusionPlans_{name}"
        assert {file.stem for file in data.glob("*.pkl")} == set(CASES)
