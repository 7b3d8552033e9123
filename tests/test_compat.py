"""Which versions of nnU-Net, torch and Python are accepted, and what is said of others."""

import re
from configparser import ConfigParser
from pathlib import Path

import pytest

from nnunetv2_diffusion import compat
from nnunetv2_diffusion.compat import UnsupportedVersionError, check_versions, installed, version_problems

GOOD = {"nnunetv2": "2.8.1", "torch": "2.8.0", "python": (3, 11, 2)}


@pytest.mark.parametrize("nnunetv2", ["2.8", "2.8.0", "2.8.1", "2.8.10", "2.8.0.dev1", "2.8.1+local"])
@pytest.mark.parametrize("torch", ["2.6.0", "2.8.0", "2.8.0+cu128", "2.10.0", "2.10.0+cpu", "2.15.1", "3.0"])
@pytest.mark.parametrize("python", [(3, 10), (3, 10, 0), (3, 13, 1), (4, 0, 0)])
def test_supported_versions_have_no_problems(nnunetv2, torch, python):
    assert version_problems(nnunetv2, torch, python) == []


@pytest.mark.parametrize(
    ("change", "found", "expected"),
    [
        ({"nnunetv2": "2.7.0"}, "2.7.0", r"expected 2\.8\.\*"),
        ({"nnunetv2": "2.9.0"}, "2.9.0", r"expected 2\.8\.\*"),
        ({"nnunetv2": "3.8.0"}, "3.8.0", r"expected 2\.8\.\*"),
        ({"nnunetv2": "2.80"}, "2.80", r"expected 2\.8\.\*"),
        ({"nnunetv2": "1.7"}, "1.7", r"expected 2\.8\.\*"),
        ({"nnunetv2": "2"}, "nnunetv2 is 2,", r"expected 2\.8\.\*"),
        ({"nnunetv2": None}, "nnunetv2 is not installed", r"expected 2\.8\.\*"),
        ({"torch": "2.9.0"}, "2.9.0", "another version"),
        ({"torch": "2.9.1+cu128"}, "2.9.1+cu128", "another version"),
        ({"torch": "2.9+cu128"}, "2.9+cu128", "another version"),
        ({"torch": "2.9.0a0+git123"}, "2.9.0a0+git123", "another version"),
        ({"torch": None}, "torch is not installed", ""),
        ({"python": (3, 9, 18)}, "Python is 3.9.18", "expected 3.10 or newer"),
        ({"python": (2, 7, 18)}, "Python is 2.7.18", "expected 3.10 or newer"),
        ({"torch": "2.5.1"}, "2.5.1", r"expected 2\.6 or newer"),
        ({"torch": "1.13.1"}, "1.13.1", r"expected 2\.6 or newer"),
        ({"torch": "2.9rc1"}, "2.9rc1", "another version"),
    ],
)
def test_an_unsupported_version_is_named_with_what_is_expected(change, found, expected):
    (problem,) = version_problems(**{**GOOD, **change})
    assert found in problem
    assert re.search(expected, problem)


def test_results_name_what_they_depend_on():
    versions = compat.package_versions()
    expected = {"python", "torch", "nnunetv2", "batchgeneratorsv2", "acvl_utils", "nnunetv2_diffusion"}
    assert expected <= set(versions)
    assert versions["batchgeneratorsv2"] == installed("batchgeneratorsv2")


def test_pins_of_monai_are_those_that_a_message_names():
    from nnunetv2_diffusion.evaluation.surface import REQUIREMENT

    parser = ConfigParser()
    parser.read(Path(__file__).parents[1] / "setup.cfg")
    extras = parser["options.extras_require"]
    assert REQUIREMENT == "monai>=1.5.2,<1.7"
    assert all(REQUIREMENT in extras[name].split() for name in ("evaluation", "test"))


def test_a_release_candidate_is_of_its_minor_version():
    assert version_problems("2.8rc1", "2.8.0", (3, 11)) == []


def test_every_problem_is_named_at_once():
    problems = version_problems(None, None, (3, 8, 1))
    assert len(problems) == 3
    for problem, name in zip(problems, ("Python", "nnunetv2", "torch"), strict=True):
        assert problem.startswith(name)


def test_installed_is_the_version_of_a_distribution_or_none():
    assert installed("pytest") == pytest.__version__
    assert installed("surely-no-distribution-has-this-name") is None


def test_the_installed_versions_are_supported():
    check_versions()


def test_unsupported_versions_raise_with_all_problems(monkeypatch):
    versions = {"nnunetv2": "2.5", "torch": "2.9.0"}
    monkeypatch.setattr(compat, "installed", versions.get)
    with pytest.raises(UnsupportedVersionError, match=r"nnunetv2 is 2\.5, expected .*; torch is 2\.9\.0"):
        check_versions()


def test_supported_nnunet_is_what_the_package_requires():
    setup = ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    (nnunet,) = [r for r in setup["options"]["install_requires"].split() if r.startswith("nnunetv2")]
    assert nnunet == f"nnunetv2>={compat.SUPPORTED_NNUNET},<2.9"
