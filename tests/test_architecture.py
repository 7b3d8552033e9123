"""What plans may name and number: refused by name, and before anything is imported."""

import copy
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.helper import convert_dim_to_conv_op, get_matching_instancenorm
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "inference"))
from tiny_model import architecture, make_plans

from nnunetv2_diffusion.architecture import check_architecture, check_configuration
from nnunetv2_diffusion.networks import UnsupportedArchitectureError
from nnunetv2_diffusion.settings import ALLOW, environment_overrides

DOTTED = "dynamic_network_architectures.architectures.unet"


@pytest.fixture(autouse=True)
def no_import(monkeypatch):
    """Whatever is checked, nothing is imported for it."""
    before = set(sys.modules)
    monkeypatch.delenv(ALLOW, raising=False)
    yield
    assert not {name for name in set(sys.modules) - before if name.startswith(("evil", "antigravity"))}


def check(**changes):
    """Check the architecture of tiny plans with changes to it; those with a dot are of arch_kwargs."""
    described = architecture(3)
    for key, value in changes.items():
        (described if key in described else described["arch_kwargs"])[key] = value
    check_architecture(*(described[k] for k in ("network_class_name", "arch_kwargs", "_kw_requires_import")))


def dotted(cls):
    return f"{cls.__module__}.{cls.__name__}"


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_what_nnunets_planners_write_is_allowed(dims):
    check(conv_op=dotted(convert_dim_to_conv_op(dims)), norm_op=dotted(get_matching_instancenorm(dimension=dims)))


@pytest.mark.parametrize("cls", [PlainConvUNet, ResidualEncoderUNet])
def test_both_networks_are_allowed_by_the_name_that_planners_write(cls):
    described = architecture(2)["arch_kwargs"]
    blocks = described.pop("n_conv_per_stage")
    key = "n_conv_per_stage" if cls is PlainConvUNet else "n_blocks_per_stage"
    check_architecture(dotted(cls), {**described, key: blocks}, ["conv_op", "norm_op", "dropout_op", "nonlin"])


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("nonlin", "torch.nn.LeakyReLU"),
        ("nonlin", "torch.nn.modules.activation.GELU"),
        ("dropout_op", "torch.nn.modules.dropout.Dropout3d"),
        ("norm_op", "torch.nn.modules.batchnorm.BatchNorm3d"),
        ("norm_op", "torch.nn.InstanceNorm3d"),
    ],
)
def test_operators_of_pytorch_are_allowed(key, name):
    check(**{key: name})


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "evilmod.PlainConvUNet", f"evil.{DOTTED}.PlainConvUNet", "PlainConvUNet", f"{DOTTED}.os",
        f"{DOTTED}.PlainConvUNet.__init__", "", None, 3, ["os.system"], {"a": 1}, f"{DOTTED}.PlainConvUNet ",
    ],
)  # fmt: skip
def test_another_network_is_refused_by_its_name(name):
    with pytest.raises(UnsupportedArchitectureError, match=rf"network_class_name is {re.escape(repr(name))}, expected"):
        check(network_class_name=name)


@pytest.mark.parametrize("key", ["conv_op", "norm_op", "dropout_op", "nonlin"])
@pytest.mark.parametrize(
    "name",
    [
        "os.system", "evilmod.run", "torch.load", "torch.hub.load", "torch.nn.modules.module.torch", "torch.nn.init",
        "torch.nn.functional.relu", "torch.nn.Module", "torch.nn.Sequential", "torch.nn.modules.activation.evil",
        "torch.nn.modules.evil.LeakyReLU", "torch.nn.LeakyReLU.forward", "torch.nn.LeakyReLU\n", "antigravity", 3,
        ["torch.nn.LeakyReLU"], {"torch.nn.LeakyReLU": 1}, True,
    ],
)  # fmt: skip
def test_another_operator_is_refused_by_its_name(key, name):
    with pytest.raises(UnsupportedArchitectureError, match=rf"{key} is {re.escape(repr(name))}, expected a class of"):
        check(**{key: name})


def test_an_operator_of_another_kind_is_refused():
    for key, name in (
        ("conv_op", "torch.nn.LeakyReLU"),
        ("nonlin", "torch.nn.Embedding"),
        ("norm_op", "torch.nn.GELU"),
    ):
        with pytest.raises(UnsupportedArchitectureError, match=key):
            check(**{key: name})


@pytest.mark.parametrize(
    ("key", "name"),
    [
        *(("conv_op", f"torch.nn.{name}") for name in ("LazyConv3d", "ConvTranspose3d", "LazyConvTranspose2d")),
        *(("conv_op", f"torch.nn.modules.conv.{name}") for name in ("LazyConv3d", "ConvTranspose3d", "_ConvNd")),
        ("norm_op", "torch.nn.LazyBatchNorm3d"),
        ("norm_op", "torch.nn.modules.instancenorm.LazyInstanceNorm3d"),
        ("norm_op", "torch.nn.modules.batchnorm._BatchNorm"),
    ],
)
def test_a_class_that_builds_no_network_is_refused(key, name):
    with pytest.raises(UnsupportedArchitectureError, match=f"{key} is '{name}', expected a class of torch.nn.modules"):
        check(**{key: name})


def test_convolutions_are_required():
    with pytest.raises(UnsupportedArchitectureError, match="conv_op is None, expected one of Conv1d, Conv2d, Conv3d"):
        check(conv_op=None)
    with pytest.raises(UnsupportedArchitectureError, match="conv_op in it"):
        check(conv_op=3, _kw_requires_import=["norm_op", "dropout_op", "nonlin"])


def tiny(network):
    """A configuration with this network, and its arguments."""
    configuration = make_plans((8, 8, 8), (1.0, 1.0, 1.0))["configurations"]["only"]
    described = configuration["architecture"]
    described["network_class_name"] = f"{DOTTED}.{network}"
    kwargs = described["arch_kwargs"]
    if network == "ResidualEncoderUNet":
        kwargs["n_blocks_per_stage"] = kwargs.pop("n_conv_per_stage")
    return configuration, kwargs


@pytest.mark.parametrize(
    ("network", "null"), [("PlainConvUNet", ("norm_op", "nonlin")), ("ResidualEncoderUNet", ("nonlin",))]
)
def test_other_operators_may_be_null(network, null):
    configuration, kwargs = tiny(network)
    kwargs.update(dict.fromkeys(null))
    check_configuration(configuration, "here")
    names = configuration["architecture"]["_kw_requires_import"]
    built = get_network_from_plans(f"{DOTTED}.{network}", kwargs, names, 1, 2, deep_supervision=False)
    assert built(torch.zeros(1, 1, 8, 8, 8)).shape == (1, 2, 8, 8, 8)


@pytest.mark.parametrize("changes", [{"norm_op": None}, {"norm_op_kwargs": {"affine": False}}, {"norm_op_kwargs": {}}])
def test_a_residual_network_needs_a_normalisation_with_weights(changes):
    configuration, kwargs = tiny("ResidualEncoderUNet")
    check_configuration(configuration, "here")
    kwargs.update(changes)
    with pytest.raises(UnsupportedArchitectureError, match=r"^here: .*norm_op.* weights, .*ResidualEncoderUNet needs"):
        check_configuration(configuration, "here")


@pytest.mark.parametrize("keys", [["conv_bias"], ["norm_op_kwargs"], ["evil"]])
def test_other_keys_are_never_imported(keys):
    kwargs = {"conv_bias": "evilmod.run", "norm_op_kwargs": "evilmod.run", "evil": "evilmod.run"}
    with pytest.raises(
        UnsupportedArchitectureError, match=rf"_kw_requires_import is '{keys[0]}', expected only conv_op"
    ):
        check(_kw_requires_import=["conv_op", "norm_op", "dropout_op", "nonlin", *keys], **{keys[0]: kwargs[keys[0]]})


@pytest.mark.parametrize("value", [None, "conv_op", 3, [3], {"conv_op": 1}])
def test_a_list_of_keys_that_is_none_is_refused(value):
    with pytest.raises(UnsupportedArchitectureError, match="_kw_requires_import"):
        check(_kw_requires_import=value)


def test_a_site_adds_names_by_a_variable(monkeypatch):
    monkeypatch.setenv(ALLOW, "mysite.nets.MyUNet, mysite.nets.Swish")
    check(nonlin="mysite.nets.Swish")
    check(network_class_name="mysite.nets.MyUNet")
    check(network_class_name="mysite.nets.MyUNet", conv_op=None)
    monkeypatch.setenv(ALLOW, "torch.nn.LazyConv3d, mysite.nets.Swish")
    check(conv_op="torch.nn.LazyConv3d")
    with pytest.raises(UnsupportedArchitectureError, match=r"nonlin is 'mysite.nets.Other'"):
        check(nonlin="mysite.nets.Other")
    assert environment_overrides() == {}  # it is no setting, and is not refused as one


def test_the_refusal_names_the_variable():
    with pytest.raises(UnsupportedArchitectureError, match=f"not imported.*{ALLOW}"):
        check(nonlin="mysite.nets.Swish")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_stages", 0), ("n_stages", 10**9), ("n_stages", "3"), ("n_stages", 2), ("n_stages", 4), ("n_stages", None),
        ("features_per_stage", [4, 8]), ("features_per_stage", [4, 8, 0]), ("features_per_stage", [4, 8, 10**9]),
        ("features_per_stage", [4, 8, math.nan]), ("features_per_stage", [4, 8, math.inf]),
        ("features_per_stage", -4), ("kernel_sizes", [[3, 3, 3]] * 2), ("kernel_sizes", [[3, 3, 0]] * 3),
        ("kernel_sizes", [[999] * 3] * 3), ("strides", [[0] * 3] * 3), ("strides", "2"), ("strides", 2),
        ("n_conv_per_stage", [1, 1, 10**7]), ("n_conv_per_stage_decoder", [1, 1, 1]), ("conv_bias", 1e30),
        ("norm_op_kwargs", {"eps": math.nan}), ("norm_op_kwargs", {"x": "y" * 1000}), ("unknown", 1),
        ("norm_op_kwargs", [[[[[0] * 30]]]]),
    ],
)  # fmt: skip
def test_numbers_out_of_bounds_are_named(key, value):
    with pytest.raises(UnsupportedArchitectureError, match=r"n_stages|" + key):
        check(**{key: value})


def test_a_network_of_more_weights_than_any_machine_holds_is_refused():
    with pytest.raises(UnsupportedArchitectureError, match="fewer than 10,000,000,000 weights"):
        check(features_per_stage=[8192] * 3, kernel_sizes=[[7] * 3] * 3)


def test_a_missing_argument_is_named():
    described = architecture(2)
    del described["arch_kwargs"]["strides"]
    with pytest.raises(UnsupportedArchitectureError, match="no strides"):
        check_architecture(described["network_class_name"], described["arch_kwargs"], ["conv_op"])


def test_a_key_without_an_argument_is_named():
    with pytest.raises(UnsupportedArchitectureError, match="_kw_requires_import is 'nonropout_op', expected keys of"):
        check(_kw_requires_import=["conv_op", "norm_op", "nonropout_op", "nonlin"])


def test_an_operator_that_would_stay_a_text_is_named():
    with pytest.raises(UnsupportedArchitectureError, match="nonlin in it"):
        check(_kw_requires_import=["conv_op", "norm_op"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("patch_size", [0, 8, 8]), ("patch_size", [-8, 8, 8]), ("patch_size", [10**7] * 3), ("patch_size", [8192] * 3),
        ("patch_size", [8.5, 8, 8]), ("patch_size", [8]), ("patch_size", None), ("patch_size", "888"),
        ("patch_size", [9, 8, 8]), ("patch_size", [8, 8]), ("patch_size", [math.nan] * 3),
        ("batch_size", 0), ("batch_size", -1), ("batch_size", 10**9), ("batch_size", None), ("batch_size", True),
        ("spacing", [0, 1, 1]), ("spacing", [math.nan, 1, 1]), ("spacing", [math.inf, 1, 1]), ("spacing", [1, 1]),
        ("spacing", [-1, 1, 1]), ("spacing", ["1", 1, 1]), ("spacing", None), ("architecture", None),
        ("architecture", {}), ("nonlin_kwargs", {"inplcae": True}), ("norm_op_kwargs", {"eps": "x"}),
        ("norm_op_kwargs", {"no": 1}),
    ],
)  # fmt: skip
def test_numbers_of_a_configuration_are_named_with_their_place(key, value):
    configuration = copy.deepcopy(make_plans((8, 8, 8), (1.0, 1.0, 1.0))["configurations"]["only"])
    check_configuration(configuration, "here")
    (configuration["architecture"]["arch_kwargs"] if key.endswith("kwargs") else configuration)[key] = value
    with pytest.raises(UnsupportedArchitectureError, match=rf"^here: .*({key}|spacing|conv_op)"):
        check_configuration(configuration, "here")


@pytest.mark.parametrize(
    ("key", "name", "given"),
    [
        ("nonlin", "MultiheadAttention", {}), ("nonlin", "MultiheadAttention", {"embed_dim": 4, "num_heads": 2}),
        ("nonlin", "GLU", {}), ("nonlin", "Threshold", {}), ("nonlin", "PReLU", {"num_parameters": 4}),
        ("norm_op", "LayerNorm", {}), ("norm_op", "GroupNorm", {}), ("norm_op", "GroupNorm", {"num_channels": 8}),
        ("dropout_op", "Dropout3d", {"p": 2}),
    ],
)  # fmt: skip
def test_operators_that_do_not_take_the_features_are_named(key, name, given):
    configuration = make_plans((8, 8, 8), (1.0, 1.0, 1.0))["configurations"]["only"]
    kwargs = configuration["architecture"]["arch_kwargs"]
    kwargs.update({key: f"torch.nn.{name}", f"{key}_kwargs": given, "features_per_stage": [6, 8, 8]})
    with pytest.raises(UnsupportedArchitectureError, match=rf"^here: .*{key}_kwargs is .*, expected .*{name} for"):
        check_configuration(configuration, "here")


@pytest.mark.parametrize(
    ("key", "name", "given"),
    [
        ("nonlin", "PReLU", {}), ("nonlin", "Hardtanh", None), ("nonlin", "ELU", {"inplace": True}),
        ("norm_op", "BatchNorm3d", None), ("norm_op", "SyncBatchNorm", {}), ("dropout_op", "Dropout3d", {"p": 0.1}),
    ],
)  # fmt: skip
def test_operators_that_take_the_features_are_allowed(key, name, given):
    configuration = make_plans((8, 8, 8), (1.0, 1.0, 1.0))["configurations"]["only"]
    kwargs = configuration["architecture"]["arch_kwargs"]
    kwargs.update({key: f"torch.nn.{name}", f"{key}_kwargs": given})
    check_configuration(configuration, "here")


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("patch", "dims"), [((8, 8), 3), ((8, 8, 8), 2)])
def test_normalisation_of_other_dimensions_than_the_patch_is_named(patch, dims, affine):
    configuration = make_plans(patch, [1.0] * len(patch))["configurations"]["only"]
    kwargs = configuration["architecture"]["arch_kwargs"]
    kwargs.update(norm_op=f"torch.nn.InstanceNorm{dims}d", norm_op_kwargs={"affine": affine})
    with pytest.raises(UnsupportedArchitectureError, match=rf"norm_op is .* expected one of {len(patch)} dimensions"):
        check_configuration(configuration, "here")


def test_convolutions_of_other_dimensions_than_the_patch_are_named():
    configuration = make_plans((8, 8, 8), (1.0, 1.0, 1.0))["configurations"]["only"]
    configuration["architecture"]["arch_kwargs"]["conv_op"] = dotted(nn.Conv2d)
    with pytest.raises(UnsupportedArchitectureError, match=r"conv_op is .* expected one of 3 dimensions"):
        check_configuration(configuration, "here")
