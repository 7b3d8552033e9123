"""Settings of version 0.1 are read in their new places, and act as they did."""

import json
import logging

import pytest

from nnunetv2_diffusion.settings import (
    DiffusionSettings,
    SettingsError,
    earlier_notes,
    merge_settings,
    parse_settings,
    read_assignments,
    sections,
)

FLAT = {  # of version 0.1, name by name, and where each is now
    "timesteps": (500, "gaussian"),
    "training_steps": (50, "gaussian"),
    "time_sampling": ("importance", "gaussian"),
    "self_conditioning_probability": (0.25, "gaussian"),
    "steps": (7, "gaussian"),
    "sampler": ("ddim", "gaussian"),
    "eta": (0.5, "gaussian"),
}
# still act, though no table has them: section, name, another value
ACTING = [
    ("", "transformer_heads", 4),
    ("", "max_bad_steps", 3),
    ("hidiff", "samples", 3),
    ("hidiff", "seed", 5),
    ("hidiff", "prior_residual", False),
    ("hidiff", "calibrated", False),
    ("hidiff", "focal_gamma", 1.0),
    ("hidiff", "lambda_focal", 0.5),
    ("hidiff", "lambda_diffusion", 0.0),
    ("hidiff", "segmentor_learning_rate", 2e-4),
    ("hidiff", "pretraining_learning_rate", 1e-2),
]


@pytest.fixture(autouse=True)
def _fresh_log(caplog):
    sections._told.clear()
    caplog.set_level(logging.WARNING, "nnunetv2_diffusion")


@pytest.mark.parametrize("name", FLAT)
def test_a_flat_setting_is_read_in_its_section(name, caplog):
    value, section = FLAT[name]
    assert parse_settings({name: value}, "plans") == parse_settings({section: {name: value}})
    assert name in caplog.messages[0]


def test_betas_are_a_pair_now():
    assert parse_settings({"beta_start": 2e-4, "beta_end": 0.03}).gaussian.betas == (2e-4, 0.03)
    assert parse_settings({"beta_end": 0.03}).gaussian.betas == (1e-4, 0.03)
    merged = merge_settings({"gaussian": {"betas": [2e-4, 0.02]}}, {"beta_end": 0.03})
    assert parse_settings(merged).gaussian.betas == (2e-4, 0.03)


def test_the_spacing_was_that_of_all_methods():
    settings = parse_settings({"step_spacing": "linspace"})
    assert (settings.gaussian.step_spacing, settings.hidiff.step_spacing) == ("linspace", "linspace")
    assert parse_settings({"gaussian": {"step_spacing": "linspace"}}).hidiff.step_spacing == "trailing"


@pytest.mark.parametrize(
    ("old", "segmentor"),
    [
        ({"segmentor_trainer": "nnUNetTrainer", "segmentor_checkpoint": None}, None),
        ({"segmentor_trainer": "nnUNetTrainerBaseline"}, "nnUNetTrainerBaseline"),
        ({"segmentor_trainer": "nnUNetTrainerBaseline", "segmentor_checkpoint": "a/b.pth"}, "a/b.pth"),
        ({"segmentor_checkpoint": "final"}, "./final"),
        ({"segmentor_checkpoint": ""}, None),
    ],
)
def test_the_segmentors_start_is_one_setting_now(old, segmentor):
    assert parse_settings({"hidiff": old}).hidiff.segmentor == segmentor


def test_merit_variant_is_merit():
    assert parse_settings({"hidiff": {"merit_variant": "nano"}}).hidiff.merit == "nano"


@pytest.mark.parametrize(
    ("old", "published", "corrects", "calibrated", "rate"),
    [
        ({"prior_residual": True, "calibrated": True}, False, True, True, 8e-4),
        ({"prior_residual": False, "calibrated": False}, True, False, False, 8e-4),
        ({"prior_residual": False}, False, False, True, 8e-4),
        ({"calibrated": False}, False, True, False, 8e-4),
        ({"prior_residual": False, "calibrated": True, "pretraining_learning_rate": 1e-4}, False, False, True, 1e-4),
        ({"prior_residual": False, "calibrated": False, "pretraining_learning_rate": 1e-4}, True, False, False, 1e-4),
    ],
)
def test_two_switches_are_published_now_and_each_alone_still_acts(old, published, corrects, calibrated, rate):
    own = parse_settings({"hidiff": old}).hidiff
    assert own.published == published
    assert (own.corrects_prior, own.is_calibrated, own.rate_alone) == (corrects, calibrated, rate)
    assert parse_settings({"hidiff": own.to_dict()}).hidiff == own


@pytest.mark.parametrize(("section", "name", "value"), ACTING)
def test_what_has_no_place_any_more_still_acts_and_is_kept(section, name, value, caplog):
    content = {section: {name: value}} if section else {name: value}
    settings = parse_settings(content, "plans")
    place = getattr(settings, section) if section else settings
    assert getattr(place, name) == value
    assert parse_settings(json.loads(json.dumps(settings.to_dict()))) == settings
    full = f"{section}.{name}" if section else name
    assert caplog.messages[0].startswith("plans: settings of version 0.1 still act")
    assert f"{full}={value}" in caplog.messages[0]


@pytest.mark.parametrize(("section", "name", "value"), ACTING)
def test_at_its_default_it_is_written_nowhere(section, name, value):
    written = DiffusionSettings().to_dict()
    assert name not in (written[section] if section else written)


def test_hidiff_draws_what_version_0_1_drew_where_the_others_have_more():
    old = {"samples": 3, "seed": 9, "hidiff": {"samples": 1, "seed": 0}}
    settings = parse_settings(old)
    assert (settings.samples, settings.hidiff.samples, settings.hidiff.seed) == (3, 1, 0)
    same = parse_settings({"samples": 3, "hidiff": {"samples": 3, "seed": 0}})
    assert (same.hidiff.samples, same.hidiff.seed) == (None, None)


def test_one_line_a_plans_file_names_old_and_new(caplog):
    old = {"steps": 5, "beta_end": 0.03, "max_bad_steps": 20, "eta": 0.5, "hidiff": {"merit_variant": "nano"}}
    for configuration in ("2d", "3d_fullres", "2d"):
        parse_settings(old, f"configuration {configuration} of minePlans")
    (line,) = caplog.messages
    assert line.startswith("configuration 2d of minePlans: settings of version 0.1 have new names: ")
    for text in (
        "steps -> gaussian.*",
        "beta_end -> gaussian.betas",
        "hidiff.merit_variant -> hidiff.merit",
        "not needed any more, their value is always used: max_bad_steps",
        "still act, but are not documented any more: eta=0.5",
    ):
        assert text in line
    assert earlier_notes(old) == [line.partition(": ")[2]]
    parse_settings(old, "other plans")
    assert len(caplog.messages) == 2


def test_settings_of_this_version_say_nothing(caplog):
    parse_settings(DiffusionSettings().to_dict())
    assert not caplog.messages
    assert earlier_notes(DiffusionSettings().to_dict()) == earlier_notes(None) == []


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ({"steps": 0}, r"in diffusion\.gaussian, steps is 0, .*\(steps is gaussian\.steps now\)"),
        ({"beta_start": 0.02, "beta_end": 0.001}, r"betas is .*beta_start is gaussian\.betas now, beta_end is"),
        ({"hidiff": {"merit_variant": "huge"}}, r"merit is 'huge', .*\(hidiff\.merit_variant is hidiff\.merit now\)"),
        ({"hidiff": {"lambda_focal": -1.0}}, r"in diffusion\.hidiff, lambda_focal is -1\.0, expected a value in"),
        ({"hidiff": {"prior_residual": 3}}, r"prior_residual is 3, expected bool or null"),
        ({"hidiff": {"segmentor_trainer": 3}}, r"segmentor is 3, .*segmentor_trainer is hidiff\.segmentor now"),
        ({"steps": 5, "gaussian": 3}, r"diffusion\.gaussian is 3, expected a mapping|unknown setting 'steps'"),
    ],
)
def test_an_error_names_the_key_in_the_file(old, message):
    with pytest.raises(SettingsError, match=f"^plans: .*{message}"):
        parse_settings(old, "plans")


def test_an_old_key_beside_a_complete_section_of_now_counts():
    complete = DiffusionSettings().to_dict()
    assert parse_settings({**complete, "steps": 3}).gaussian.steps == 3
    assert parse_settings({"gaussian": {"steps": 5}, "steps": 3}).gaussian.steps == 3
    assert parse_settings({"gaussian": {"sampler": "ddim"}, "sampler": "ddpm"}).gaussian.sampler == "ddim"


def test_assignments_of_version_0_1_are_taken_with_a_warning(caplog):
    assert read_assignments(["steps=5", "recipe=paper"]) == {"recipe": "paper", "gaussian": {"steps": 5}}
    assert caplog.messages == ["--set: settings of version 0.1 have new names: steps -> gaussian.*"]


def test_changes_go_to_the_same_place_as_what_they_change():
    present = {"steps": 2, "sampler": "ddim"}
    assert merge_settings(present, {"gaussian": {"steps": 4}}) == {"gaussian": {"steps": 4, "sampler": "ddim"}}
    assert merge_settings({"gaussian": {"steps": 2}}, {"steps": 4}) == {"gaussian": {"steps": 4}}
