"""The scripts' help answers before anything is installed."""

import subprocess
import sys
from pathlib import Path

import pytest

from laboratory.demo.options import RECIPES
from nnunetv2_diffusion.training import recipes

ROOT = Path(__file__).resolve().parents[2]
WORDS = {
    "benchmark": "train-step",
    "datasets/convert": "--from PATH",
    "demo": "--compare TRAINER",
    "docs": "MKDOCS OPTIONS",
    "gpu_day": "Each part writes OUT/PART.json",
    "lines": "Lines of code and tests",
    "memory_table": "--refiner-width",
    "study": "There is no seed to",
    "test": "PYTEST OPTIONS",
}
VERBS = {"benchmark": ("train-step", "predict", "page"), "study": ("run", "report", "split")}
CALLS = [(script, ()) for script in WORDS] + [(script, (verb,)) for script, verbs in VERBS.items() for verb in verbs]


def call(tmp_path, script, *words):
    """A script with a bare Python and a folder for the environment that must not come into being."""
    bare = tmp_path / "bin"
    bare.mkdir()
    # without site-packages: a Python for which nothing was ever installed
    (bare / "python3").write_text(f'#!/bin/sh\nexec "{sys._base_executable}" -S "$@"\n')
    (bare / "python3").chmod(0o755)
    environment = {
        "PATH": f"{bare}:/usr/bin:/bin",
        "NNUNETV2_DIFFUSION_ENV": str(tmp_path / "env"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [ROOT / "scripts" / script, *words]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert [file.name for file in tmp_path.iterdir()] == ["bin"]
    return result


def test_every_script_is_asked():
    found = {str(file.relative_to(ROOT / "scripts")) for file in (ROOT / "scripts").glob("**/*") if not file.suffix}
    commands = {name for name in found if (ROOT / "scripts" / name).is_file()}
    assert commands == set(WORDS)


@pytest.mark.parametrize(("script", "verb"), CALLS, ids=[" ".join([s, *v]) for s, v in CALLS])
def test_help_answers_without_an_environment(tmp_path, script, verb):
    result = call(tmp_path, script, *verb, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.startswith(f"usage: scripts/{' '.join([script, *verb])} ")
    assert verb or WORDS[script] in result.stdout
    assert ("examples:" in result.stdout) == (script in ("demo", "test"))


def test_the_demo_offers_every_recipe():
    assert set(RECIPES) == set(recipes.RECIPES)
