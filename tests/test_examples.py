"""What is shown to be copied runs as it stands."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_toy_learns_and_samples_squares():
    found = runpy.run_path(str(ROOT / "examples" / "toy.py"))
    assert found["mask"].shape == (8, 16, 16)
    assert found["loss"].item() < 0.2  # log 2 = 0.69 says nothing of the image
    assert found["dice"] > 0.9
    assert "nnunetv2" not in (ROOT / "examples" / "toy.py").read_text().replace("nnunetv2_diffusion", "")
