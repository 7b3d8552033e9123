"""The checkout's tools do not grow."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST = 5_800  # lines of all of scripts/; the goal is 5 000


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="counts what is in git")
def test_the_tools_of_the_checkout_stay_below_their_limit():
    script = [sys.executable, ROOT / "scripts" / "lines"]
    said = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert int(re.search(r"(\d+)  checkout tools", said)[1]) <= MOST
