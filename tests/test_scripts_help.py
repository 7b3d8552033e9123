"""The scripts' help answers before anything is installed."""

import subprocess
import sys
from pathlib import Path

import pytest

from nnunetv2_diffusion.demo.options import RECIPES
from nnunetv2_diffusion.training import recipes

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("script", "words"), [("demo", "--compare TRAINER"), ("test", "PYTEST OPTIONS")])
def test_help_answers_without_an_environment(tmp_path, script, words):
    # a bare Python and a folder for the environment that must not come into being
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHON": sys._base_executable,
        "NNUNETV2_DIFFUSION_ENV": str(tmp_path / "env"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    result = subprocess.run(
        [ROOT / "scripts" / script, "--help"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert words in result.stdout
    assert "examples:" in result.stdout
    assert not list(tmp_path.iterdir())


def test_the_demo_offers_every_recipe():
    assert set(RECIPES) == set(recipes.RECIPES)
