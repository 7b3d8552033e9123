"""Random changes to the section ``diffusion``: refused by a setting's name, or a network can be built with them."""

import random
import string

import pytest
from harness import batches, outcome
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_model import CLASSES, make_plans

from nnunetv2_diffusion.checkpoints import build_network
from nnunetv2_diffusion.networks import UnsupportedArchitectureError
from nnunetv2_diffusion.settings import SUBSECTIONS, DiffusionSettings, SettingsError, parse_settings

VALUES = [
    None, True, False, 0, 1, 2, 3, 5, 7, 10, 100, 1000, 1001, 10**6, 10**9, 10**30, -1, -(10**9), 0.0, 0.1, 0.2, 0.5,
    0.999, 1.0, 1.5, -0.5, 1e-12, 1e12, 1e300, float("nan"), float("inf"), float("-inf"), "", "x", "ddim", "paper", "5",
    "nan", "../..", "\x00", "ä" * 300, [], [1], {}, {"steps": 1}, {"x": {"y": 1}},
]  # fmt: skip
TRAINERS = ("nnUNetTrainerRecycleXT", "nnUNetTrainerRecycleScore", "nnUNetTrainerHiDiff")
MODEST = {"refiner_width": 64, "transformer_layers": 8}  # above, a network is legal, and large


def random_section(rng: random.Random) -> dict:
    """Some settings with random values; some keys are unknown."""
    section: dict = {}
    for _ in range(rng.choice((1, 1, 2, 3))):
        inner = rng.choice((None, None, *SUBSECTIONS))
        names = list((SUBSECTIONS[inner] if inner else DiffusionSettings).__dataclass_fields__)
        name = rng.choice(names) if rng.random() < 0.93 else "".join(rng.choices(string.printable, k=rng.randint(0, 9)))
        place = section
        if inner:
            place = section.setdefault(inner, {})
            if not isinstance(place, dict):
                continue
        place[name] = rng.choice(VALUES)
    return section


@pytest.mark.parametrize("seed", batches(4, quick=1))
def test_a_changed_section_is_refused_by_name_or_works(seed):
    """4 x 50 sections."""
    rng, counts = random.Random(seed), {"refused": 0}
    for _ in range(50):
        section = random_section(rng)
        result = outcome(lambda section=section: parse_settings(section), (SettingsError,))
        assert result.trace is None, f"{section}\n{result.trace}"
        if isinstance(result.status, SettingsError):
            counts["refused"] += 1
            assert len(str(result.status)) < 1500, section
            assert "\n" not in str(result.status), section
            continue
        if any(
            getattr(s, key, 0) > high for s in (result.status, result.status.hidiff) for key, high in MODEST.items()
        ):
            continue
        plans = PlansManager(make_plans((8, 8), (1.0, 1.0)))
        configuration = plans.get_configuration("only")
        configuration.configuration["diffusion"] = section
        dataset = {"channel_names": {"0": "MR"}, "labels": CLASSES, "file_ending": ".nii.gz"}
        trainer = rng.choice(TRAINERS)
        built = outcome(
            lambda t=trainer, p=plans, c=configuration, d=dataset: build_network(t, p, c, d),
            (SettingsError, UnsupportedArchitectureError, ValueError),
        )
        assert built.trace is None, f"{trainer} {section}\n{built.trace}"
    assert counts["refused"] > 20
