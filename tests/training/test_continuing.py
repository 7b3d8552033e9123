"""Which settings a continued training may change."""

from dataclasses import replace

import pytest

from nnunetv2_diffusion.settings import SUBSECTIONS, DiffusionSettings, parse_settings
from nnunetv2_diffusion.training.continuing import (
    FIXED,
    FREE,
    GAUSSIAN,
    LENGTHS,
    TRANSFORMER,
    changes,
    flat,
    section_names,
    unread,
)

DEFAULT = DiffusionSettings()


def test_every_setting_either_may_change_or_may_not():
    assert set(flat(DEFAULT)) == FIXED | FREE
    assert not FIXED & FREE


def test_groups_hold_settings():
    for group in (GAUSSIAN, LENGTHS, TRANSFORMER, *map(section_names, SUBSECTIONS)):
        assert group
        assert group <= set(flat(DEFAULT))


def test_what_shapes_the_network_or_its_meaning_may_not_change():
    assert {
        "gaussian.timesteps",
        "gaussian.betas",
        "gaussian.training_steps",
        "hidiff.timesteps",
        "mask_encoding",
    } <= FIXED
    assert {"num_epochs", "gaussian.steps", "samples", "hidiff.learning_rate", "max_bad_steps"} <= FREE


def test_flat_names_have_their_section():
    assert flat(DEFAULT)["hidiff.timesteps"] == DEFAULT.hidiff.timesteps
    assert flat(DEFAULT)["samples"] == DEFAULT.samples
    assert not set(flat(DEFAULT)) & set(SUBSECTIONS)


def test_changes_name_the_old_and_the_new_value():
    new = replace(DEFAULT, samples=2, hidiff=replace(DEFAULT.hidiff, timesteps=20, samples=3))
    assert changes(DEFAULT, DEFAULT, FIXED | FREE) == {}
    assert changes(DEFAULT, new, FIXED | FREE) == {
        "samples": "samples 1 -> 2",
        "hidiff.timesteps": "hidiff.timesteps 10 -> 20",
        "hidiff.samples": f"hidiff.samples {DEFAULT.hidiff.samples} -> 3",
    }
    assert list(changes(DEFAULT, new, {"hidiff.samples"})) == ["hidiff.samples"]


@pytest.mark.parametrize(
    ("settings", "reads", "expected"),
    [
        ({}, LENGTHS, []),
        ({"num_epochs": 3}, LENGTHS, []),
        ({"gaussian": {"steps": None}}, LENGTHS, []),  # the default: nothing is lost
        ({"gaussian": {"steps": 5}, "num_epochs": 3}, LENGTHS, ["gaussian.steps=5"]),
        ({"gaussian": {"steps": 5}}, section_names("hidiff"), ["gaussian.steps=5 (it reads hidiff.steps)"]),
        ({"hidiff": {"lambda_focal": 0.5}}, LENGTHS, ["hidiff.lambda_focal=0.5"]),
        ({"recipe": "nnunet", "gaussian": {"eta": 0.5}}, GAUSSIAN, ["recipe=nnunet"]),
    ],
)
def test_settings_without_effect_are_named(settings, reads, expected):
    assert unread(parse_settings(settings), reads) == expected
