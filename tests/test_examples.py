"""What is shown to be copied runs as it stands."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_HOST = """
import runpy, sys
found = runpy.run_path("examples/toy.py")
assert tuple(found["mask"].shape) == (8, 16, 16)
assert found["loss"].item() < 0.2, found["loss"]  # log 2 = 0.69 says nothing of the image
assert found["dice"] > 0.9, found["dice"]
assert "nnunetv2" not in sys.modules
"""


def test_the_toy_learns_and_samples_squares_without_nnunet():
    subprocess.run([sys.executable, "-c", WITHOUT_HOST], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=True)
