"""The verb ``plan``: what it writes, what it says about data, and where it says values come from."""

import json

import pytest

from laboratory.benchmarking.problem import synthetic_problem
from nnunetv2_diffusion import cli
from nnunetv2_diffusion.planning.derive import PlansError, derive_plans
from nnunetv2_diffusion.settings import ENVIRONMENT_PREFIX

NAME = "Dataset501_Tiny"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """nnUNet_preprocessed with stock plans of one data set, and preprocessed data for 3D."""
    plans = {}
    for dim, patch in ((2, (32, 32)), (3, (16, 32, 32))):
        problem = synthetic_problem(dim, patch, 2, 32, 3, 4)
        plans = {
            **problem.plans,
            "configurations": {**plans.get("configurations", {}), **problem.plans["configurations"]},
        }
    for configuration in plans["configurations"].values():
        configuration["median_image_size_in_voxels"] = configuration["patch_size"]
    plans["dataset_name"] = NAME
    plans["configurations"]["child"] = {"inherits_from": "3d_fullres", "batch_size": 4}
    dataset = tmp_path / NAME
    (dataset / "nnUNetPlans_3d_fullres").mkdir(parents=True)
    (dataset / "nnUNetPlans.json").write_text(json.dumps(plans))
    for variable in ("nnUNet_raw", "nnUNet_results"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    return dataset


@pytest.fixture
def plan(folder, capsys):
    """Run the verb: (status, output, error)."""

    def run(*options: str, dataset: str = "501") -> tuple[int, str, str]:
        status = cli.main(["plan", "-d", dataset, *options])
        return status, *capsys.readouterr()

    return run


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_a_preset_reaches_every_configuration_by_its_axes(plan, folder):
    stock = (folder / "nnUNetPlans.json").read_bytes()
    status, text, _ = plan("--preset", "recycling-paper", "-o", "mine")
    assert status == 0
    assert "-p mine" in text
    written = read(folder, "mine")["configurations"]
    assert written["2d"]["batch_size"] == 256
    assert written["3d_fullres"]["batch_size"] == 8
    assert written["2d"]["diffusion"]["num_epochs"] == 5
    assert written["3d_fullres"]["diffusion"]["num_epochs"] == 50
    assert written["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] == [32, 64, 128, 256]
    assert set(written["child"]) == {"inherits_from", "batch_size"}
    assert (folder / "nnUNetPlans.json").read_bytes() == stock


def test_set_wins_over_the_preset_and_changes_network_and_settings(plan, folder):
    options = ["gaussian.steps=3", "hidiff.steps=2", "batch_size=6", "patch_size=[16,16,16]"]
    plan("--preset", "recycling-paper", "-c", "3d_fullres", "-o", "mine", "--set", *options)
    written = read(folder, "mine")["configurations"]
    assert (written["3d_fullres"]["batch_size"], written["3d_fullres"]["patch_size"]) == (6, [16, 16, 16])
    assert written["3d_fullres"]["diffusion"]["gaussian"]["steps"] == 3
    assert written["3d_fullres"]["diffusion"]["hidiff"]["steps"] == 2
    assert written["2d"]["batch_size"] == 2
    assert written["2d"]["diffusion"]["gaussian"]["steps"] is None


def test_a_configuration_that_inherits_can_be_set_alone(plan, folder):
    plan("-c", "child", "-o", "mine", "--set", "gaussian.steps=4")
    written = read(folder, "mine")["configurations"]
    assert written["child"]["diffusion"]["gaussian"]["steps"] == 4
    assert written["3d_fullres"]["diffusion"]["gaussian"]["steps"] is None


def test_data_are_reused_if_geometry_and_normalisation_stay(plan, folder):
    _, text, _ = plan("-o", "mine", "--set", "batch_size=1", "spacing=[1.0,1.0,1.0]", "-c", "3d_fullres")
    assert read(folder, "mine")["configurations"]["3d_fullres"]["data_identifier"] == "nnUNetPlans_3d_fullres"
    assert "3d_fullres: uses the preprocessed data in nnUNetPlans_3d_fullres" in text
    assert "2d:" not in text
    _, text, _ = plan("-o", "all", "--set", "batch_size=1")
    assert "2d: there are no preprocessed data in nnUNetPlans_2d; type: nnUNetv2_preprocess -d 501" in text


@pytest.mark.parametrize("change", ["spacing=[2.0,1.0,1.0]", 'normalization_schemes=["CTNormalization"]'])
def test_other_geometry_or_normalisation_gets_data_of_its_own(plan, folder, change):
    _, text, _ = plan("-c", "3d_fullres", "-o", "mine", "--set", change)
    written = read(folder, "mine")["configurations"]["3d_fullres"]
    assert written["data_identifier"] == "mine_3d_fullres"
    assert "type: nnUNetv2_preprocess -d 501 -plans_name mine -c 3d_fullres" in text
    if change.startswith("spacing"):
        assert written["median_image_size_in_voxels"] == [8, 32, 32]


def test_the_default_name_tells_preset_and_base(plan, folder):
    plan("--preset", "fast")
    assert read(folder, "diffusion_fast_nnUNetPlans")["plans_name"] == "diffusion_fast_nnUNetPlans"


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ((), True),
        (("--set", "gaussian.steps=null"), True),
        (("--preset", "recycling-paper"), False),
        (("--set", "batch_size=7"), False),
    ],
)
def test_plans_that_change_nothing_are_told(plan, options, same):
    _, text, _ = plan("-o", "mine", *options)
    assert ("Nothing but the name differs from nnUNetPlans" in text) == same


def test_show_names_the_origin_of_every_value(plan, folder, monkeypatch):
    plan("--preset", "fast", "-o", "mine", "--set", "transformer_layers=2", "eta=0.5")
    edited = read(folder, "mine")
    edited["configurations"]["3d_fullres"]["diffusion"]["recipe"] = "nnunet"
    (folder / "mine.json").write_text(json.dumps(edited))
    monkeypatch.setenv(f"{ENVIRONMENT_PREFIX}steps", "7")
    _, text, _ = plan("--base", "mine", "--show", "-c", "3d_fullres")
    lines = {line.split()[0]: line.split(None, 2)[2] for line in text.splitlines() if line.startswith("  ")}
    assert lines["hidiff.steps"] == "preset fast"
    assert lines["transformer_layers"] == "--set"
    assert lines["gaussian.sampler"] == "preset fast"
    assert lines["gaussian.eta"] == "--set"  # as version 0.1 had it
    assert lines["gaussian.betas"].endswith("default")
    assert lines["recipe"] == "plans derived from nnUNetPlans"
    assert "patch 16x32x32, batch 2, PlainConvUNet with features [32, 64, 128, 256]" in text
    assert f"{ENVIRONMENT_PREFIX}steps=7" in text


def test_show_writes_nothing_and_works_on_stock_plans(plan, folder):
    before = sorted(folder.iterdir())
    status, text, _ = plan("--show", "--preset", "nnunet-native", "--set", "gaussian.steps=3")
    assert status == 0
    assert "preset nnunet-native" in text
    assert plan("--show")[1].count("default") > 30
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "quick"], "no preset 'quick', expected one of"),
        (["--set", "stepz=3"], "unknown setting 'stepz'"),
        (["--set", "steps"], "'steps' cannot be read, expected key=value"),
        (["--base", "none"], "none.json: no such file; plans there: nnUNetPlans"),
        (["-c", "3d_lowres"], "-c 3d_lowres: no such configuration"),
        (["-o", "nnUNetPlans"], "expected none of nnU-Net's own"),
        (["--set", "n_stages=5"], "n_stages is 5, expected 2 .. 4"),
        (["--set", "spacing=[1.0]"], r"spacing is [1.0], expected 2 positive numbers"),
        (["--set", "spacing=[1.0,-1.0]"], "expected 2 positive numbers"),
        (["--set", 'normalization_schemes=["None"]'], "has 'None', expected a name of nnU-Net's"),
        (["--set", "normalization_schemes=[]"], "expected 1 names, one a channel"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(plan, folder, options, message):
    before = sorted(folder.iterdir())
    status, _, error = plan(*options)
    assert status == 1
    assert error.startswith("nnunetv2_diffusion plan: ")
    assert message in error
    assert sorted(folder.iterdir()) == before


def test_an_unknown_data_set_is_named(plan):
    status, _, error = plan(dataset="777")
    assert status == 1
    assert "-d 777" in error


def test_plans_that_exist_are_not_overwritten(plan, folder):
    plan("-o", "mine")
    before = (folder / "mine.json").read_bytes()
    status, _, error = plan("-o", "mine", "--set", "gaussian.steps=3")
    assert status == 1
    assert "mine.json exists and holds other plans" in error
    assert (folder / "mine.json").read_bytes() == before


@pytest.mark.parametrize("resenc", [False, True])
def test_a_shorter_network_can_be_built(resenc):
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunetv2_diffusion.training.host import plans_unet

    problem = synthetic_problem(3, (16, 32, 32), 2, 8, 3, 4, resenc)
    derived = derive_plans(problem.plans, "mine", {"3d_fullres": {"n_stages": 3, "base_features": 4}}, {})
    network = plans_unet(PlansManager(derived).get_configuration("3d_fullres"), 1, 3, True)
    assert network.encoder.output_channels == [4, 8, 16]
    assert len(network.decoder.stages) == 2
    with pytest.raises(PlansError, match=r"n_stages is 1, expected 2 \.\. 4"):
        derive_plans(problem.plans, "mine", {"3d_fullres": {"n_stages": 1}}, {})
