"""What version 0.1 had and this one has not: it is told why, and plans of that version are still read."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

sys.path.insert(0, str(Path(__file__).parent / "inference"))
from tiny_model import make_model

from nnunetv2_diffusion import cli, predict_image
from nnunetv2_diffusion.checkpoints import CheckpointError, check_checkpoint
from nnunetv2_diffusion.inference.loading import load_predictor
from nnunetv2_diffusion.removed import OPTIONS, TRAINERS
from nnunetv2_diffusion.settings import (
    DiffusionSettings,
    SettingsError,
    apply_environment,
    parse_settings,
    read_assignments,
    sections,
    without_removed,
)

MIXED = "nnUNetTrainerRecycleMixed"
OLD = {  # a section as planners of version 0.1 wrote it, and what is read of it
    "steps": 3,
    "sampler": "renoise",
    "step_spacing": "low",
    "mixture": {"recycle_share": 0.5, "truth_corruption": "drop"},
    "hidiff": {"steps": 2, "sampler": "renoise"},
}
LEFT = {"steps": 3, "sampler": "ddpm", "step_spacing": "trailing", "hidiff": {"steps": 2, "sampler": "ddpm"}}
NEW = {
    "gaussian": {"steps": 3, "sampler": "ddpm", "step_spacing": "trailing"},
    "hidiff": {"steps": 2, "sampler": "ddpm"},
}
SAID = (
    ("sampler", "'renoise' does nothing since version 0.2", "'ddpm' is used"),
    ("step_spacing", "'low' does nothing since version 0.2", "'trailing' is used"),
    ("mixture", "{'recycle_share': 0.5, 'truth_corruption': 'drop'} does nothing since version 0.2", MIXED),
    ("hidiff.sampler", "'renoise' does nothing since version 0.2", "'ddpm' is used"),
)


@pytest.fixture(autouse=True)
def _fresh_log():
    sections._told.clear()


def test_old_settings_are_read_and_each_is_named_in_the_log_once(caplog):
    with caplog.at_level(logging.WARNING, "nnunetv2_diffusion"):
        for _ in range(2):
            assert parse_settings(OLD, "some plans") == parse_settings(NEW)
    *removed, renamed = caplog.messages
    assert renamed.startswith("some plans: settings of version 0.1 have new names: ")
    for message, (name, found, more) in zip(removed, SAID, strict=True):
        assert message.startswith(f"some plans: setting {name} = {found}")
        assert more in message


def test_settings_of_this_version_are_left_as_they_are(caplog):
    for section in (LEFT, NEW, DiffusionSettings().to_dict(), {"sampler": 3, "step_spacing": ["low"]}):
        assert without_removed(section) == (section, [])
    with pytest.raises(SettingsError, match="unknown setting 'mixtures'"):
        parse_settings({"mixtures": {}})


def test_replacements_are_values_that_settings_may_have():
    fresh = without_removed({name: value for name, value in OLD.items() if isinstance(value, str)})[0]
    assert fresh["step_spacing"] == DiffusionSettings().gaussian.step_spacing
    assert fresh["sampler"] == DiffusionSettings().gaussian.sampler


@pytest.mark.parametrize("text", ["mixture.recycle_share=0.3", "sampler=renoise", "step_spacing=low"])
def test_what_was_removed_cannot_be_written_into_plans(text):
    with pytest.raises(SettingsError, match=r"does nothing since version 0\.2"):
        read_assignments(["steps=3", text])


def test_a_model_with_old_settings_predicts_as_with_those_that_are_left(tmp_path, caplog):
    found = []
    for name, section in (("old", OLD), ("new", NEW)):
        torch.manual_seed(0)
        section = {**section, "hidiff": {**section["hidiff"], "refiner_width": 4}}
        predictor = load_predictor(make_model(tmp_path / name, **section), progress=False)
        found.append(next(predictor.members(torch.ones(1, 8, 12, 8))).steps[-1])
    assert torch.equal(*found)
    assert any("setting step_spacing = 'low'" in message for message in caplog.messages)


@pytest.fixture(scope="module")
def old_model(tmp_path_factory):
    """A folder as RecycleMixed left it: the network is that of RecycleXT."""
    folder = make_model(tmp_path_factory.mktemp("old") / "model")
    file = folder / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(file, weights_only=True), "trainer_name": MIXED}, file)
    return folder


def test_a_checkpoint_of_a_removed_trainer_is_refused_with_the_version_that_reads_it(old_model):
    words = rf"{MIXED} was removed in version 0\.2 .*Version 0\.1 reads its checkpoints"
    with pytest.raises(CheckpointError, match=words):
        load_predictor(old_model, progress=False)
    with pytest.raises(CheckpointError, match=words):
        check_checkpoint(old_model / "fold_0" / "checkpoint_final.pth", "nnUNetTrainerRecycleXT", 3)


@pytest.mark.parametrize("name", TRAINERS)
def test_nnunet_tells_who_asks_for_a_removed_trainer(name):
    with pytest.raises(RuntimeError, match=rf"{name} was removed in version 0\.2"):
        recursive_find_trainer_class_by_name(name)


@pytest.mark.parametrize("verb", ["predict", "analyse"])
@pytest.mark.parametrize("option", OPTIONS)
def test_removed_options_say_why(capsys, verb, option):
    assert cli.main([verb, "-i", "images", "-o", "out", option, "x"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"nnunetv2_diffusion {verb}: {option} was removed in 0.2: ")
    assert len(said.splitlines()) == 1
    (page,) = [word.strip("():,;") for word in said.split() if ".md" in word]
    assert (Path(__file__).parents[1] / page).is_file()


@pytest.mark.parametrize("words", [["--sampler", "renoise"], ["--step_spacing=low"]])
def test_removed_values_of_options_say_what_to_use(capsys, words):
    assert cli.main(["predict", "-i", "images", "-o", "out", *words]) == 2
    said = capsys.readouterr().err
    assert "was removed in 0.2" in said
    assert said.rstrip().endswith(("use ddpm", "use trailing"))


def test_a_removed_sampler_of_the_environment_is_refused_with_its_variable():
    words = r"nnUNet_diffusion_sampler: --sampler renoise was removed in 0\.2: .*use ddpm"
    with pytest.raises(SettingsError, match=words):
        apply_environment(DiffusionSettings(), "gaussian", {"nnUNet_diffusion_sampler": "renoise"})


def test_words_that_are_no_options_are_left_alone(capsys):
    with pytest.raises(SystemExit):
        cli.main(["predict", "-i", "aggregate", "-o", "--sampler"])
    assert "removed" not in capsys.readouterr().err


def test_the_programming_interface_says_why(tmp_path):
    model = load_predictor(make_model(tmp_path / "model"), progress=False)
    with pytest.raises(TypeError, match=r"--early_exit was removed in 0\.2"):
        predict_image(model, "image.nii.gz", early_exit=True)


def test_old_plans_stay_json():
    assert json.loads(json.dumps(without_removed(OLD)[0])) == LEFT
