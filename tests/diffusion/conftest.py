"""What the tests of the diffusion processes share. Seeds and golden values come from the conftest above."""

import pytest

from nnunetv2_diffusion.diffusion import GaussianDiffusion, linear_beta_schedule


@pytest.fixture(scope="session")
def trained() -> GaussianDiffusion:
    """The chain of the paper: T = 1001, betas 1e-4 .. 0.02."""
    return GaussianDiffusion(linear_beta_schedule(1001))
