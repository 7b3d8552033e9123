"""What the README says against what is there."""

import re
from pathlib import Path

from nnunetv2_diffusion import __version__
from nnunetv2_diffusion.settings import SUBSECTIONS, settings_table

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_settings_tables_are_the_generated_ones():
    assert settings_table() in README
    for section in SUBSECTIONS.values():
        assert settings_table(section) in README


def test_every_trainer_and_planner_is_described():
    for folder in ("trainers", "plans"):
        for file in (REPOSITORY / folder).glob("nnUNet*.py"):
            assert f"`{file.stem}`" in README or f" {file.stem}" in README, file.stem


def test_every_linked_file_exists():
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert targets
    for target in targets:
        assert (REPOSITORY / target).exists(), target


def test_commands_of_the_quick_start_can_be_run():
    for name in ("demo", "test", "benchmark"):
        assert f"scripts/{name}" in README
        assert (REPOSITORY / "scripts" / name).stat().st_mode & 0o100, name


def test_versions_agree():
    citation = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {__version__}" in citation
