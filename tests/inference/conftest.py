"""Models with random weights, one folder each for all tests."""

import pytest
from tiny_model import make_model, write_images


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Build a model folder once for each set of arguments of ``make_model``."""
    made = {}

    def get(trainer="nnUNetTrainerRecycleXT", **arguments):
        key = (trainer, *sorted((k, str(v)) for k, v in arguments.items()))
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp("model") / "m", trainer, **arguments)
        return made[key]

    return get


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Two volumes, larger than the patch of a tiny model."""
    return write_images(tmp_path_factory.mktemp("images") / "in")
