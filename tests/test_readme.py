"""What the README says against what is there."""

import json
import re
from pathlib import Path

from nnunetv2_diffusion import __version__
from nnunetv2_diffusion.settings import DiffusionSettings, flatten

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def classes(folder):
    return [file.stem for file in (REPOSITORY / folder).glob("nnUNet*.py")]


def test_it_is_a_page():
    assert len(README.splitlines()) <= 150


def test_every_trainer_is_described():
    for name in classes("trainers"):
        assert f"| `{name}` | " in README, name


def test_every_planner_is_described():
    planning = (REPOSITORY / "docs" / "planning.md").read_text(encoding="utf-8")
    for name in classes("plans"):
        assert name in planning, name


def test_five_settings_are_shown_with_their_defaults():
    rows = re.findall(r"^\| `([\w.]+)` \| (null|\d+|\"\w+\") \|", README, re.MULTILINE)
    known = flatten(DiffusionSettings().to_dict())
    assert len(rows) == 5
    assert [(name, json.loads(default)) for name, default in rows] == [(name, known[name]) for name, _ in rows]


def test_every_linked_file_exists():
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert targets
    for target in targets:
        assert (REPOSITORY / target).exists(), target


def test_commands_of_the_checkout_can_be_run():
    for name in ("demo", "test", "docs"):
        assert f"scripts/{name}" in README
        assert (REPOSITORY / "scripts" / name).stat().st_mode & 0o100, name


def test_versions_agree():
    citation = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {__version__}" in citation
