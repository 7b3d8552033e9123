"""The planner plans as nnU-Net's does, writes the settings, and leaves stock plans and data alone."""

import hashlib
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
)
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_diffusion.planning.derive import PlansError
from nnunetv2_diffusion.planning.planner import DiffusionPlannerMixin
from nnunetv2_diffusion.planning.settings import DiffusionSettings, SettingsError, read_settings

DATASET = "Dataset501_Tiny"
CASES = ("case_0", "case_1")
ARCHITECTURES = {"2d", "3d_fullres", "3d_lowres"}


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


def test_signature_is_nnunets_but_for_the_plans_name():
    folder = str(Path(nnunetv2.__path__[0]) / "experiment_planning")
    planner = recursive_find_python_class(folder, "nnUNetPlannerDiffusion", "nnunetv2.experiment_planning")
    ours = inspect.signature(planner.__init__).parameters
    stock = inspect.signature(ExperimentPlanner.__init__).parameters
    assert list(ours) == list(stock)
    changed = [name for name in stock if ours[name].default != stock[name].default]
    assert changed == ["plans_name"]
    assert ours["plans_name"].default == "nnUNetDiffusionPlans"


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
    default = DiffusionSettings().steps
    file = plan_and_edit(preprocessed, "3d_fullres", steps=default + 1)
    plans = read(file)
    manager = PlansManager(str(file))
    steps = {
        name: read_settings(manager.get_configuration(name).configuration).steps for name in plans["configurations"]
    }
    assert steps == {"2d": default, "3d_lowres": default, "3d_fullres": default + 1, "3d_cascade_fullres": default + 1}


def test_planning_again_keeps_edited_settings(preprocessed):
    file = plan_and_edit(preprocessed, "2d", steps=2)
    plan()
    again = read(file)["configurations"]
    assert again["2d"]["diffusion"] == DiffusionSettings(steps=2).to_dict()
    assert again["3d_fullres"]["diffusion"] == DiffusionSettings().to_dict()


def test_planning_again_refuses_settings_that_cannot_be_used_and_keeps_the_file(preprocessed):
    plan_and_edit(preprocessed, "2d", stepps=2)
    before = hashes(preprocessed)
    with pytest.raises(SettingsError, match=r"2d of .*nnUNetDiffusionPlans.json.*'stepps'.*'steps'"):
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
