"""The page of all settings."""

import subprocess
import sys
from pathlib import Path

from nnunetv2_diffusion.settings.reference import settings_page

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_in_the_docs_is_the_generated_one():
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == settings_page()


def test_the_command_prints_the_page_without_torch():
    code = "import runpy, sys; runpy.run_module('nnunetv2_diffusion.settings', run_name='__main__')"
    code += "; assert not {'torch', 'nnunetv2'} & set(sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout == settings_page()
    assert not told.stderr
