"""Which settings a continued training may change."""

from dataclasses import replace

import pytest

from nnunetv2_diffusion.planning.continuing import (
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
from nnunetv2_diffusion.settings import SUBSECTIONS, DiffusionSettings

DEFAULT = DiffusionSettings()


def test_every_setting_either_may_change_or_may_not():
    assert set(flat(DEFAULT)) == FIXED | FREE
    assert not FIXED & FREE


def test_groups_hold_settings():
    for group in (GAUSSIAN, LENGTHS, TRANSFORMER, *map(section_names, SUBSECTIONS)):
        assert group
        assert group <= set(flat(DEFAULT))


def test_what_shapes_the_network_or_its_meaning_may_not_change():
    assert {"timesteps", "beta_start", "beta_end", "training_steps", "hidiff.timesteps", "mask_encoding"} <= FIXED
    assert {"num_epochs", "steps", "samples", "hidiff.learning_rate", "max_bad_steps"} <= FREE


def test_flat_names_have_their_section():
    assert flat(DEFAULT)["hidiff.timesteps"] == DEFAULT.hidiff.timesteps
    assert flat(DEFAULT)["timesteps"] == DEFAULT.timesteps
    assert not set(flat(DEFAULT)) & set(SUBSECTIONS)


def test_changes_name_the_old_and_the_new_value():
    new = replace(DEFAULT, timesteps=500, hidiff=replace(DEFAULT.hidiff, timesteps=20, samples=3))
    assert changes(DEFAULT, DEFAULT, FIXED | FREE) == {}
    assert changes(DEFAULT, new, FIXED | FREE) == {
        "timesteps": "timesteps 1001 -> 500",
        "hidiff.timesteps": "hidiff.timesteps 10 -> 20",
        "hidiff.samples": f"hidiff.samples {DEFAULT.hidiff.samples} -> 3",
    }
    assert list(changes(DEFAULT, new, {"hidiff.samples"})) == ["hidiff.samples"]


@pytest.mark.parametrize(
    ("settings", "reads", "expected"),
    [
        ({}, LENGTHS, []),
        ({"num_epochs": 3}, LENGTHS, []),
        ({"steps": 2}, LENGTHS, []),  # the default: nothing is lost
        ({"steps": 5, "num_epochs": 3}, LENGTHS, ["steps=5"]),
        ({"steps": 5}, section_names("hidiff"), ["steps=5 (it reads hidiff.steps)"]),
        ({"recipe": "nnunet", "eta": 0.5}, GAUSSIAN, ["recipe=nnunet"]),
    ],
)
def test_settings_without_effect_are_named(settings, reads, expected):
    assert unread(DiffusionSettings(**settings), reads) == expected
