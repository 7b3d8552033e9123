"""Presets are valid, are what the documents say, and are found where the package is installed."""

import dataclasses
from pathlib import Path

import pytest

from nnunetv2_diffusion.planning.presets import load_preset, parse_preset, preset_names, presets_table
from nnunetv2_diffusion.settings import SettingsError, flatten, parse_settings, sections

NAMES = ["cpu-demo", "fast", "hidiff-paper", "nnunet-native", "recycling-paper"]
ROOT = Path(__file__).resolve().parents[2]
EMPTY = {"summary": "", "source": "", "trainers": [], "network": {}, "diffusion": {}}


def test_all_presets_are_there():
    assert preset_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axes", [2, 3])
def test_presets_pass_the_schema_and_name_trainers_that_exist(name, axes, caplog):
    preset = load_preset(name)
    sections._told.clear()
    settings = flatten(parse_settings(preset.settings(axes)).to_dict())
    assert settings.items() >= flatten(preset.settings(axes)).items()
    assert not caplog.messages, "presets have no setting of an earlier version"
    for trainer in preset.trainers:
        assert (ROOT / "trainers" / f"{trainer}.py").is_file()


def test_the_paper_of_recycling_sees_as_many_batches_as_in_its_table():
    planar, volume = (load_preset("recycling-paper").settings(axes) for axes in (2, 3))
    updates = [s["num_epochs"] * s["num_iterations_per_epoch"] for s in (planar, volume)]
    batches = [load_preset("recycling-paper").overrides(axes)["batch_size"] for axes in (2, 3)]
    assert [u * b for u, b in zip(updates, batches, strict=True)] == [320_000, 100_000]


def test_the_paper_of_hidiff_trains_its_segmentor_alone_for_40000_iterations():
    settings = parse_settings(load_preset("hidiff-paper").settings(2))
    assert settings.hidiff.pretraining_epochs * settings.num_iterations_per_epoch == 40_000
    assert settings.hidiff.refiner_width == 128
    assert parse_settings(load_preset("hidiff-paper").settings(3)).hidiff.refiner_width == 32


def test_the_table_in_the_docs_is_the_generated_one():
    assert presets_table() in (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "keys are .*'extra'"),
        ({"network": {"4d": {}}}, "network has '4d', expected one of 2d, 3d"),
        ({"network": {"3d": {"batch": 2}}}, "network has 'batch', expected one of patch_size, batch_size"),
        ({"diffusion": {"2d": {"gaussian": {"stepz": 2}}}}, "unknown setting 'stepz'.*'steps'"),
        ({"diffusion": {"all": {"hidiff": {"steps": 11}}}}, "steps is 11"),
    ],
)
def test_a_preset_that_cannot_be_used_is_named(change, message):
    with pytest.raises(SettingsError, match=f"preset mine: .*{message}"):
        parse_preset("mine", {**EMPTY, **change})


def test_an_unknown_preset_is_named_with_the_known_ones():
    with pytest.raises(SettingsError, match="no preset 'quick', expected one of cpu-demo, fast"):
        load_preset("quick")


def test_settings_of_the_kind_come_on_top_of_those_for_all():
    content = {
        **EMPTY,
        "diffusion": {"all": {"seed": 3, "hidiff": {"steps": 4, "timesteps": 5}}, "2d": {"hidiff": {"steps": 1}}},
    }
    preset = parse_preset("mine", content)
    assert preset.settings(2) == {"seed": 3, "hidiff": {"steps": 1, "timesteps": 5}}
    assert preset.settings(3) == content["diffusion"]["all"]
    assert dataclasses.asdict(preset)["diffusion"] == content["diffusion"]
