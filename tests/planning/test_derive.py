"""Derived plans use the same data, and nothing that exists is overwritten."""

import json
from copy import deepcopy

import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_diffusion.planning.derive import PlansError, derive_plans, write_plans
from nnunetv2_diffusion.settings import DiffusionSettings, SettingsError, parse_settings


def configuration(strides, patch_size, name):
    kernel = [3] * len(patch_size)
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": len(strides),
            "features_per_stage": [32, 64, 128, 256][: len(strides)],
            "kernel_sizes": [kernel] * len(strides),
            "strides": strides,
        },
        "_kw_requires_import": ["conv_op"],
    }
    return {
        "data_identifier": f"nnUNetPlans_{name}",
        "batch_size": 2,
        "patch_size": patch_size,
        "architecture": architecture,
    }


@pytest.fixture
def plans():
    """Stock plans, cut down to what matters here."""
    return {
        "dataset_name": "Dataset501_Tiny",
        "plans_name": "nnUNetPlans",
        "configurations": {
            "2d": configuration([[1, 1], [2, 2], [2, 1]], [32, 32], "2d"),
            "3d_fullres": configuration([[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]], [16, 32, 32], "3d_fullres"),
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        },
    }


def test_nothing_to_change_changes_the_name_and_adds_the_settings(plans):
    expected = deepcopy(plans)
    expected["plans_name"] = "Mine"
    for name in ("2d", "3d_fullres"):
        expected["configurations"][name]["diffusion"] = DiffusionSettings().to_dict()
    assert derive_plans(plans, "Mine", {}, {}) == expected


def test_given_plans_are_not_changed_and_not_shared(plans):
    before = deepcopy(plans)
    derived = derive_plans(
        plans, "Mine", {"2d": {"batch_size": 5, "max_features": 8, "base_features": 8}}, {"steps": 3}
    )
    derived["configurations"]["3d_fullres"]["patch_size"].append(1)
    derived["configurations"]["2d"]["architecture"]["arch_kwargs"]["strides"].clear()
    assert plans == before


def test_overrides_change_their_configuration_only(plans):
    overrides = {"3d_fullres": {"patch_size": [20, 24, 40], "batch_size": 4}}
    derived = derive_plans(plans, "Mine", overrides, {})["configurations"]
    assert derived["3d_fullres"]["patch_size"] == [20, 24, 40]
    assert derived["3d_fullres"]["batch_size"] == 4
    assert derived["2d"]["patch_size"] == [32, 32]
    assert derived["2d"]["batch_size"] == 2
    for name in ("2d", "3d_fullres"):
        assert derived[name]["data_identifier"] == f"nnUNetPlans_{name}"


@pytest.mark.parametrize(
    ("overrides", "features"),
    [
        ({"max_features": 100}, [32, 64, 100, 100]),
        ({"base_features": 8}, [8, 16, 32, 64]),
        ({"base_features": 64}, [64, 128, 256, 256]),
        ({"base_features": 8, "max_features": 24}, [8, 16, 24, 24]),
    ],
)
def test_features_double_from_the_base_up_to_the_maximum(plans, overrides, features):
    derived = derive_plans(plans, "Mine", {"3d_fullres": overrides}, {})["configurations"]
    assert derived["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] == features
    rest = deepcopy(plans["configurations"]["3d_fullres"]["architecture"])
    rest["arch_kwargs"]["features_per_stage"] = features
    assert derived["3d_fullres"]["architecture"] == rest


def test_configuration_that_inherits_can_be_overridden_and_nnunet_resolves_it(plans):
    derived = derive_plans(plans, "Mine", {"3d_cascade_fullres": {"max_features": 64, "patch_size": (8, 16, 16)}}, {})
    manager = PlansManager(derived)
    cascade, fullres = (manager.get_configuration(name) for name in ("3d_cascade_fullres", "3d_fullres"))
    assert cascade.network_arch_init_kwargs["features_per_stage"] == [32, 64, 64, 64]
    assert cascade.patch_size == [8, 16, 16]
    assert cascade.data_identifier == "nnUNetPlans_3d_fullres"
    assert fullres.network_arch_init_kwargs["features_per_stage"] == [32, 64, 128, 256]
    assert fullres.patch_size == [16, 32, 32]


def test_settings_are_merged_into_those_that_are_there(plans):
    plans["configurations"]["2d"]["diffusion"] = {"gaussian": {"steps": 2}, "seed": 7}
    derived = derive_plans(plans, "Mine", {}, {"gaussian": {"steps": 3}})["configurations"]
    assert derived["2d"]["diffusion"] == parse_settings({"gaussian": {"steps": 3}, "seed": 7}).to_dict()
    assert derived["3d_fullres"]["diffusion"] == parse_settings({"gaussian": {"steps": 3}}).to_dict()


def test_settings_reach_a_configuration_that_inherits_but_has_its_own(plans):
    plans["configurations"]["3d_cascade_fullres"]["diffusion"] = {"seed": 7}
    derived = derive_plans(plans, "Mine", {}, {"gaussian": {"steps": 3}})["configurations"]
    assert derived["3d_cascade_fullres"]["diffusion"] == parse_settings({"gaussian": {"steps": 3}, "seed": 7}).to_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"stepps": 3},
            "2d of Mine: unknown setting 'stepps' in diffusion; did you mean 'gaussian.steps'",
        ),
        (
            {"gaussian": {"steps": 0}},
            "2d of Mine: in diffusion.gaussian, steps is 0, expected a value in",
        ),
    ],
)
def test_settings_that_cannot_be_used_are_refused(plans, settings, message):
    with pytest.raises(SettingsError, match=message):
        derive_plans(plans, "Mine", {}, settings)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"patch_size": [16, 32, 36]}, r"patch_size is \[16, 32, 36\], expected multiples of \[4, 8, 8\]"),
        ({"patch_size": [18, 32, 32]}, r"patch_size is \[18, 32, 32\], expected multiples of \[4, 8, 8\]"),
        ({"patch_size": [4, 8, 8]}, "a single voxel"),
        ({"patch_size": [32, 32]}, r"patch_size is \[32, 32\], expected 3 integers"),
        ({"patch_size": [0, 32, 32]}, "patch_size is 0, expected an integer of at least 1"),
        ({"patch_size": [16.0, 32, 32]}, "patch_size is 16.0, expected an integer"),
        ({"patch_size": 32}, "patch_size is 32, expected 3 integers"),
        ({"batch_size": 0}, "batch_size is 0, expected an integer of at least 1"),
        ({"batch_size": True}, "batch_size is True, expected an integer"),
        ({"base_features": -8}, "base_features is -8, expected an integer of at least 1"),
        ({"max_features": "many"}, "max_features is 'many', expected an integer"),
        ({"base_features": 64, "max_features": 32}, "base_features is 64, expected at most max_features = 32"),
        ({"patchsize": [16, 32, 32]}, "'patchsize' cannot be overridden; did you mean 'patch_size'"),
        ({"data_identifier": "x"}, "'data_identifier' cannot be overridden; expected one of patch_size, batch_size"),
    ],
)
def test_override_that_cannot_be_used_is_refused(plans, overrides, message):
    with pytest.raises(PlansError, match=f"^configuration 3d_fullres of Mine: .*{message}"):
        derive_plans(plans, "Mine", {"3d_fullres": overrides}, {})


def test_unknown_configuration_is_refused_with_the_known_ones(plans):
    with pytest.raises(PlansError, match=r"3d_lowres of Mine.*expected one of 2d, 3d_fullres, 3d_cascade_fullres"):
        derive_plans(plans, "Mine", {"3d_lowres": {"batch_size": 2}}, {})


@pytest.mark.parametrize(("parent", "found"), [("3d_cascade_fullres", "3d_cascade_fullres ->"), ("3d", "-> 3d,")])
def test_inheritance_that_does_not_end_is_refused(plans, parent, found):
    plans["configurations"]["3d_cascade_fullres"]["inherits_from"] = parent
    with pytest.raises(PlansError, match=f"inherits_from: found .*{found}"):
        derive_plans(plans, "Mine", {}, {})


@pytest.mark.parametrize("content", [{}, [], {"configurations": ["2d"]}])
def test_what_is_no_plans_is_refused(content):
    with pytest.raises(PlansError, match="no 'configurations'"):
        derive_plans(content, "Mine", {}, {})


def test_plans_of_an_old_nnunet_are_refused_where_the_architecture_is_needed(plans):
    del plans["configurations"]["2d"]["architecture"]
    with pytest.raises(PlansError, match=r"2d of Mine: no 'architecture', expected plans of nnU-Net 2.5 or newer"):
        derive_plans(plans, "Mine", {"2d": {"batch_size": 1}}, {})


STOCK_NAMES = ["nnUNetPlans", "NNUNETPLANS", "nnUNetPlans_torchres", "nnUNetResEncUNetMPlans", "nnUNetResEncUNetPlans"]
UNUSABLE_NAMES = ["", "a/b", "../a", "a\\b", ".hidden", "a__b", "a b", None, 5]


@pytest.mark.parametrize("name", STOCK_NAMES + UNUSABLE_NAMES)
def test_stock_and_unusable_names_are_refused(plans, name, tmp_path):
    with pytest.raises(PlansError, match="plans name is"):
        derive_plans(plans, name, {}, {})
    with pytest.raises(PlansError, match="plans name is"):
        write_plans({**plans, "plans_name": name}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_written_plans_are_read_back_and_may_be_written_again(plans, tmp_path):
    derived = derive_plans(plans, "Mine", {"2d": {"patch_size": (16, 8)}}, {})
    file = write_plans(derived, tmp_path)
    assert file == tmp_path / "Mine.json"
    assert json.loads(file.read_text()) == derived
    written = file.stat().st_mtime_ns
    assert write_plans(derived, tmp_path) == file
    assert file.stat().st_mtime_ns == written
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("present", ['{"plans_name": "Mine"}', "not JSON", ""])
def test_file_that_holds_anything_else_is_not_overwritten(plans, tmp_path, present):
    file = tmp_path / "Mine.json"
    file.write_text(present)
    with pytest.raises(PlansError, match=r"Mine.json exists and holds other plans"):
        write_plans(derive_plans(plans, "Mine", {}, {}), tmp_path)
    assert file.read_text() == present


def test_missing_folder_is_named_and_not_made(plans, tmp_path):
    with pytest.raises(PlansError, match="no_such_dataset: no such folder"):
        write_plans(derive_plans(plans, "Mine", {}, {}), tmp_path / "no_such_dataset")
    assert not list(tmp_path.iterdir())


def test_plans_that_are_no_json_leave_no_file(plans, tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_plans({**plans, "plans_name": "Mine", "extra": object()}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_plans_with_numbers_that_json_does_not_know_are_refused(plans, tmp_path):
    with pytest.raises(PlansError, match="Mine: the plans hold NaN or an infinite number"):
        write_plans({**plans, "plans_name": "Mine", "extra": float("nan")}, tmp_path)
    assert not list(tmp_path.iterdir())
