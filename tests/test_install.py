"""nnU-Net finds our classes, and keeps finding all of its own, whatever state this package is in."""

import ast
import json
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest
from hosts import HOST_FOLDER, OUR_PLANNERS, OUR_TRAINERS, REPOSITORY, broken_package, copy_host, run_python

REASON = "a dependency is missing"

# prints, as JSON on the last line, the module of each class that nnU-Net finds, or the error
PROBE = """
import json, sys
from importlib import metadata
version, trainers, planners = json.loads(sys.argv[1])
if version is not None:
    real = metadata.version
    metadata.version = lambda name: version if name == "nnunetv2" else real(name)
import nnunetv2
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
def find_planner(name):
    folder = nnunetv2.__path__[0] + "/experiment_planning"
    return recursive_find_python_class(folder, name, "nnunetv2.experiment_planning")
found = {}
for find, names in ((recursive_find_trainer_class_by_name, trainers), (find_planner, planners)):
    for name in names:
        try:
            found[name] = find(name).__module__
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def classes_of(folder):
    """Names of all classes that are defined at the top of the modules in a folder of nnunetv2."""
    names = set()
    for file in (HOST_FOLDER / folder).rglob("*.py"):
        if "diffusion" not in file.parts:
            names |= {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)}
    return names


STOCK_TRAINERS = sorted(name for name in classes_of("training/nnUNetTrainer") if "Trainer" in name)
STOCK_PLANNERS = sorted(name for name in classes_of("experiment_planning/experiment_planners") if "Planner" in name)


def probe(*path, nnunetv2_version=None, **variables):
    names = [nnunetv2_version, STOCK_TRAINERS + OUR_TRAINERS, STOCK_PLANNERS + OUR_PLANNERS]
    result = run_python("-c", PROBE, json.dumps(names), path=path, **variables)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What nnU-Net finds in four installations, two at a time: most of it is spent on imports."""
    host = copy_host(tmp_path_factory.mktemp("elsewhere"))
    package = broken_package(tmp_path_factory.mktemp("broken"), "nnunetv2_diffusion", REASON)
    with ThreadPoolExecutor(max_workers=2) as pool:
        running = {
            "installed": pool.submit(probe),
            "broken": pool.submit(probe, package),
            "unsupported": pool.submit(probe, nnunetv2_version="2.7.0"),
            # nnunetv2 as it is without this package; our trainers by the variable
            "elsewhere": pool.submit(probe, host, nnUNet_extTrainer=str(REPOSITORY / "trainers")),
        }
        return {state: future.result() for state, future in running.items()}


def stock(found):
    """What was found of nnU-Net's own classes in one installation."""
    return {name: found[name] for name in STOCK_TRAINERS + STOCK_PLANNERS}


def test_the_stock_classes_that_are_looked_for_are_all_there_are():
    assert {"nnUNetTrainer", "nnUNetTrainerDA5", "nnUNetTrainer_250epochs"} < set(STOCK_TRAINERS)
    assert {"ExperimentPlanner", "ResEncUNetPlanner", "nnUNetPlannerResEncL"} < set(STOCK_PLANNERS)


def test_package_is_installed_with_its_command():
    (command,) = [e for e in metadata.entry_points(group="console_scripts") if e.name == "nnunetv2_diffusion"]
    assert command.value == "nnunetv2_diffusion.cli:main"
    assert callable(command.load())


@pytest.mark.parametrize("name", OUR_TRAINERS)
def test_trainer_is_found_without_any_variable(found, name):
    assert found["installed"][name] == f"nnunetv2.training.nnUNetTrainer.variants.diffusion.{name}"


@pytest.mark.parametrize("name", OUR_PLANNERS)
def test_planner_is_found_by_its_name(found, name):
    assert found["installed"][name] == f"nnunetv2.experiment_planning.experiment_planners.diffusion.{name}"


@pytest.mark.parametrize("name", OUR_TRAINERS)
def test_trainer_is_found_by_the_variable_in_an_nnunet_without_our_files(found, name):
    assert found["elsewhere"][name] == name  # the file itself, not a module of nnunetv2


def test_stock_classes_resolve_without_this_package(found):
    """The others are compared with these: all but a few, that need optional packages, must be found in a module."""
    unusable = {n: where for n, where in stock(found["elsewhere"]).items() if not where.startswith("nnunetv2.")}
    assert len(unusable) < len(STOCK_TRAINERS + STOCK_PLANNERS) / 10, unusable


@pytest.mark.parametrize("state", ["installed", "broken", "unsupported"])
def test_every_stock_class_resolves_as_without_this_package(found, state):
    assert stock(found[state]) == stock(found["elsewhere"])


@pytest.mark.parametrize("name", OUR_TRAINERS + OUR_PLANNERS)
def test_class_of_a_broken_package_says_why_it_cannot_be_used(found, name):
    assert found["broken"][name] == f"RuntimeError: {name} cannot be used: {REASON}"


@pytest.mark.parametrize("name", OUR_TRAINERS + OUR_PLANNERS)
def test_unsupported_nnunet_is_named_with_the_expected_version(found, name):
    assert found["unsupported"][name] == (
        f"RuntimeError: {name} cannot be used: nnunetv2_diffusion cannot run here: "
        "nnunetv2 is 2.7.0, expected 2.8.*: pip install 'nnunetv2>=2.8,<2.9'"
    )


def build(kind, tmp_path):
    """Names in the wheel that pip would install, built from a copy of the sources."""
    pytest.importorskip("setuptools")
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (sources / name).write_bytes((REPOSITORY / name).read_bytes())
    patterns = ("*/**/*.py", "plans/presets/*.json", "*/py.typed")
    for file in [file for pattern in patterns for file in REPOSITORY.glob(pattern)]:
        if file.relative_to(REPOSITORY).parts[0] in ("nnunetv2_diffusion", "trainers", "plans"):
            target = sources / file.relative_to(REPOSITORY)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    code = f"from setuptools import build_meta; print(build_meta.{kind}({str(tmp_path)!r}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=sources, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return zipfile.ZipFile(tmp_path / result.stdout.splitlines()[-1])


def test_wheel_holds_every_module_of_the_sources(tmp_path):
    moved = {
        "trainers": "nnunetv2/training/nnUNetTrainer/variants/diffusion",
        "plans": "nnunetv2/experiment_planning/experiment_planners/diffusion",
    }
    expected = set()
    for folder in ("nnunetv2_diffusion", "trainers", "plans"):
        for file in (REPOSITORY / folder).rglob("*.py"):
            expected.add(str(Path(moved.get(folder, folder)) / file.relative_to(REPOSITORY / folder)))
    names = build("build_wheel", tmp_path).namelist()
    assert {Path(name).as_posix() for name in expected} == {name for name in names if name.endswith(".py")}
    presets = {f"nnunetv2_diffusion/presets/{file.name}" for file in (REPOSITORY / "plans" / "presets").glob("*.json")}
    assert presets
    assert presets <= set(names)
    assert "nnunetv2_diffusion/py.typed" in names  # else type checkers ignore the annotations


def test_editable_install_claims_nothing_of_nnunet(tmp_path):
    """Else Python would import it as nnunetv2, in place of an nnunetv2 that is an editable install too."""
    with build("build_editable", tmp_path) as wheel:
        assert not [name for name in wheel.namelist() if name.startswith("nnunetv2/")]
        code = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith((".py", ".pth"))]
    assert any("nnunetv2_diffusion" in text for text in code)
    assert not any("nnunetv2.training" in text or "'nnunetv2'" in text for text in code)
