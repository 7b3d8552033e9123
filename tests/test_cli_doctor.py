"""The command, and what its doctor says about installations in order and out of order."""

import os
import subprocess
import sys
from types import SimpleNamespace

import nnunetv2
import pytest
import torch
from hosts import OUR_PLANNERS, OUR_TRAINERS, broken_package, copy_host, run_python

from nnunetv2_diffusion import __version__, cli, compat, doctor, installation, shell
from nnunetv2_diffusion.doctor import FAIL, OK, WARN

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
posix_only = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """nnU-Net's three folders, and no other variable that doctor looks at."""
    for variable in list(os.environ):
        if variable.lower().startswith("nnunet"):
            monkeypatch.delenv(variable)
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """nnU-Net searches a copy of itself that lacks our files, as a checkout would be."""
    host = copy_host(tmp_path / "host") / "nnunetv2"
    monkeypatch.setattr(nnunetv2, "__path__", [str(host)])
    return host


@pytest.fixture
def report(capsys):
    """Run doctor: its arguments -> exit status and lines."""

    def run(*arguments):
        status = cli.main(["doctor", *arguments])
        return status, capsys.readouterr().out.splitlines()

    return run


def bad(lines):
    return [line for line in lines if line.startswith(FAIL)]


def typed(lines, start):
    """What doctor says to type, of all lines the one that starts so."""
    (line,) = {line.split("type: ", 1)[1] for line in lines if f"type: {start}" in line}
    return line


def in_shell(line, **variables):
    """Run a line, then print the variable that it sets."""
    name = line.split()[1].split("=")[0]
    script = f'{line}; printf %s "${name}"'
    result = subprocess.run(["sh", "-c", script], env={**os.environ, **variables}, capture_output=True, text=True)
    assert result.stderr == ""
    return result.stdout


# ---- the command


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Where neither torch nor nnU-Net can be imported."""
    folder = tmp_path_factory.mktemp("broken")
    broken_package(folder, "torch", "libtorch.so: no such file")
    return broken_package(folder, "nnunetv2", "half\n installed")


@pytest.mark.parametrize(("option", "expected"), [("--help", "doctor"), ("--version", __version__)])
def test_command_explains_itself_where_nothing_can_be_imported(broken, option, expected):
    result = run_python("-m", "nnunetv2_diffusion.cli", option, path=(broken,))
    assert (result.returncode, result.stderr) == (0, "")
    assert expected in result.stdout


@pytest.mark.parametrize("verb", cli.VERBS)
def test_verb_has_its_help(verb, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([verb, "--help"])
    assert f"nnunetv2_diffusion {verb}" in capsys.readouterr().out


def test_verb_that_cannot_be_imported_says_why(monkeypatch, capsys):
    monkeypatch.setitem(cli.VERBS, "predict", ("nnunetv2_diffusion.missing", "predict masks"))
    assert cli.main(["predict", "-i", "IN"]) == 1
    assert "No module named 'nnunetv2_diffusion.missing'" in capsys.readouterr().err


def test_broken_verb_does_not_touch_the_others(monkeypatch, capsys):
    monkeypatch.setitem(cli.VERBS, "predict", ("nnunetv2_diffusion.missing", "predict masks"))
    with pytest.raises(SystemExit, match="0"):
        cli.main(["doctor", "--help"])
    assert "--quiet" in capsys.readouterr().out


# ---- the report as a whole


def test_installation_in_order_has_status_0_and_lists_every_class(report):
    status, lines = report()
    assert (status, bad(lines)) == (0, [])
    for kind, names in (("trainer", OUR_TRAINERS), ("planner", OUR_PLANNERS)):
        for name in names:
            assert any(line.startswith(f"{OK:<5} {kind} {name} (nnunetv2.") for line in lines), name


def test_quiet_report_has_only_what_is_not_ok(report, monkeypatch):
    monkeypatch.delenv("nnUNet_raw")
    _, everything = report()
    status, lines = report("--quiet")
    assert status == 1
    assert lines == [line for line in everything if line.startswith((FAIL, WARN, "     "))]
    assert any(line.startswith("FAIL  nnUNet_raw") for line in lines)


def test_broken_imports_are_lines_of_the_report(broken):
    result = run_python("-m", "nnunetv2_diffusion.cli", "doctor", path=(broken,))
    assert result.returncode == 1
    lines = bad(result.stdout.splitlines())
    assert "FAIL  torch cannot be imported: ImportError: libtorch.so: no such file" in lines
    assert "FAIL  nnunetv2 cannot be imported: ImportError: half installed" in lines
    assert "FAIL  trainers: not looked for, because nnunetv2 cannot be used" in lines
    assert "Traceback" not in result.stdout + result.stderr


def test_check_that_raises_is_a_line_of_the_report(report, monkeypatch):
    def check_device():
        raise OSError("driver gone")

    monkeypatch.setattr(doctor, "check_device", check_device)
    status, lines = report()
    assert status == 1
    assert bad(lines) == ["FAIL  device: this check stopped with OSError: driver gone"]
    assert any("torch.compile" in line for line in lines)  # and the report goes on


# ---- versions


@pytest.mark.parametrize(("package", "version"), [("nnunetv2", "2.7.1"), ("nnunetv2", None), ("torch", "2.9.1")])
def test_unsupported_version_fails_with_what_was_found(package, version, monkeypatch):
    real = compat.installed
    monkeypatch.setattr(compat, "installed", lambda name: version if name == package else real(name))
    levels = {check.text.split()[0]: check for check in doctor.check_versions()}
    assert levels[package].level == FAIL
    assert (version or "not installed") in levels[package].text
    assert {check.level for name, check in levels.items() if name != package} == {OK}


@pytest.mark.parametrize(
    ("version", "warned"), [("2.8.1+cu128", True), ("2.6.0", True), ("2.10.0", False), ("3.0", False)]
)
def test_a_torch_that_reads_hostile_files_less_safely_is_a_warning(version, warned, monkeypatch):
    real = compat.installed
    monkeypatch.setattr(compat, "installed", lambda name: version if name == "torch" else real(name))
    found = [check for check in doctor.check_versions() if check.level == WARN]
    assert [f"torch {version}: a hostile checkpoint" in check.text for check in found] == [True] * warned


def test_files_of_another_version_than_pip_installed_are_reported(monkeypatch):
    monkeypatch.setattr(doctor, "__version__", "99.0")
    check = list(doctor.check_versions())[-1]
    assert check.level == WARN
    assert f"99.0 in {installation.PACKAGE_FOLDER}, but pip has installed {__version__}" in check.text


# ---- trainers and planners


@posix_only
@pytest.mark.parametrize("already", ["", "/some/other/folder"])
def test_line_to_type_makes_trainers_found_in_an_nnunet_elsewhere(elsewhere, report, monkeypatch, already):
    status, lines = report()
    assert status == 1
    for name in OUR_TRAINERS:
        assert f"FAIL  trainer {name}: nnU-Net does not find it" in lines
    value = in_shell(typed(lines, "export nnUNet_extTrainer"), nnUNet_extTrainer=already)
    assert value.split(os.pathsep)[1:] == ([already] if already else [])
    monkeypatch.setenv("nnUNet_extTrainer", value)
    status, lines = report()
    assert (status, bad(lines)) == (0, [])
    assert f"OK    trainer {OUR_TRAINERS[0]} ({OUR_TRAINERS[0]})" in lines


@posix_only
def test_line_to_type_copies_a_planner_to_an_nnunet_elsewhere(elsewhere):
    checks = list(doctor.check_planners())
    assert [check.level for check in checks] == [WARN] * len(OUR_PLANNERS)  # trainers work without it
    for name, check in zip(OUR_PLANNERS, checks, strict=True):
        subprocess.run(typed(check.remedy, "cp "), shell=True, check=True)
        assert (elsewhere / "experiment_planning" / "experiment_planners" / f"{name}.py").is_file()


def test_class_missing_from_a_normal_install_is_installed_again(elsewhere, report, monkeypatch):
    monkeypatch.setattr(installation, "host_in_site_packages", lambda: True)
    monkeypatch.setattr(installation, "is_editable", lambda: False)
    status, lines = report()
    assert status == 1
    assert len(bad(lines)) == len(OUR_TRAINERS + OUR_PLANNERS)
    assert typed(lines, "pip").startswith("pip install --force-reinstall --no-deps ")


def test_trainer_that_is_found_but_broken_fails_with_the_reason(monkeypatch):
    def finder(name):
        raise RuntimeError(f"{name} cannot be used: no torch") from ImportError("no torch")

    module = SimpleNamespace(recursive_find_trainer_class_by_name=finder)
    monkeypatch.setitem(sys.modules, "nnunetv2.utilities.find_objects", module)
    checks = list(doctor.check_trainers())
    assert [check.text for check in checks] == [
        f"trainer {name}: RuntimeError: {name} cannot be used: no torch" for name in OUR_TRAINERS
    ]
    assert {(check.level, check.remedy) for check in checks} == {(FAIL, ())}


def test_folder_of_the_variable_that_does_not_exist_is_reported(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(["/missing/trainers", os.getcwd(), ""]))
    warnings = [check.text for check in doctor.check_trainers() if check.level == WARN]
    assert warnings == ["nnUNet_extTrainer names /missing/trainers, which is no folder"]


# an editable nnunetv2 is found after all folders of sys.path: one with only our files in it wins
HIDDEN = """
import sys
from importlib.machinery import PathFinder
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [sys.argv[1]]) if name == "nnunetv2" else None
sys.meta_path.insert(0, Finder)
from nnunetv2_diffusion.cli import main
sys.exit(main(["doctor"]))
"""


def test_nnunet_hidden_by_our_own_files_is_explained(tmp_path):
    portion = tmp_path / "site" / "nnunetv2"
    (portion / "training").mkdir(parents=True)
    broken_package(tmp_path, "torch", "not needed")
    result = run_python("-c", HIDDEN, str(portion.parent), path=(tmp_path,))
    assert result.returncode == 1, result.stderr
    lines = result.stdout.splitlines()
    assert f"FAIL  nnunetv2 is hidden by {portion}: nnU-Net does not find its own classes" in lines
    assert "FAIL  trainers: not looked for, because nnunetv2 cannot be used" in lines
    steps = [line.split("type: ")[1].split()[:3] for line in lines if "type: " in line][:4]
    assert steps[0] == ["pip", "uninstall", "-y"]
    assert str(portion) in steps[1]
    assert steps[2] == ["pip", "install", "--no-deps"]
    assert "nnUNet_extTrainer" in " ".join(steps[3])


# ---- device and compile


@pytest.fixture
def cuda(monkeypatch):
    """A machine with one CUDA device, and all that torch.compile needs."""
    properties = SimpleNamespace(name="Some GPU", total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    monkeypatch.setattr(doctor, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)


def test_cuda_device_has_name_and_memory(cuda):
    (check,) = doctor.check_device()
    assert check.level == OK
    assert check.text.startswith("device cuda:0: Some GPU, 24.0 GiB; ")


def test_without_a_gpu_the_option_that_nnunet_needs_is_named(no_cuda):
    (check,) = doctor.check_device()
    assert check.level == WARN
    assert f"{torch.get_num_threads()} CPU threads" in check.text
    assert check.remedy == ("add to nnU-Net's commands: -device cpu",)


def test_driver_that_torch_cannot_use_is_reported(no_cuda, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    (check,) = doctor.check_device()
    assert check.level == WARN
    assert "there is an NVIDIA driver" in check.text


def test_compile_is_not_used_without_cuda(no_cuda):
    (check,) = doctor.check_compile()
    assert (check.level, check.text) == (OK, "torch.compile: not used, nnU-Net compiles for CUDA only")


@posix_only
@pytest.mark.parametrize(("value", "used"), [(None, True), ("T", True), ("true", True), ("f", False), ("0", False)])
def test_compile_follows_the_variable_as_nnunet_does(cuda, monkeypatch, value, used):
    if value is not None:
        monkeypatch.setenv("nnUNet_compile", value)
    (check,) = doctor.check_compile()
    assert check.level == OK
    assert ("used in training" in check.text) == used
    assert (f"switched off by nnUNet_compile={value}" in check.text) != used


@posix_only
@pytest.mark.parametrize(
    ("attribute", "lacking"), [("find_spec", "the package triton"), ("which", "a C compiler (gcc or clang)")]
)
def test_compile_names_what_it_lacks(cuda, monkeypatch, attribute, lacking):
    owner = doctor if attribute == "find_spec" else doctor.shutil
    monkeypatch.setattr(owner, attribute, lambda name: None)
    (check,) = doctor.check_compile()
    assert (check.level, check.text) == (WARN, f"torch.compile: will fail, it needs {lacking}")
    assert "export nnUNet_compile=f" in check.remedy[0]


# ---- folders and variables


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("value", [None, ""])
def test_folder_that_is_not_set_fails_with_the_lines_to_type(name, value, monkeypatch):
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    checks = {check.text: check for check in doctor.check_folders()}
    assert [check.level for check in checks.values()].count(FAIL) == 1
    check = checks[f"{name} is not set"]
    assert check.level == FAIL
    assert any(name in line and ("export" in line or "$env:" in line) for line in check.remedy)


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_folder_that_is_none_fails(kind, folders, monkeypatch):
    path = folders / "not here"
    if kind == "a file":
        path.write_text("")
    monkeypatch.setenv("nnUNet_results", str(path))
    check = list(doctor.check_folders())[-1]
    assert (check.level, check.text) == (FAIL, f"nnUNet_results is {path}, which is no folder")


def test_folder_that_cannot_be_written_to_fails_where_nnunet_writes(monkeypatch):
    def refuse(**options):
        raise PermissionError(f"denied: {options['dir']}")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    checks = list(doctor.check_folders())
    assert [check.level for check in checks] == [WARN, FAIL, FAIL]
    for name, check in zip(FOLDERS, checks, strict=True):
        assert f"cannot be written to, PermissionError: denied: {os.environ[name]}" in check.text


def test_looking_at_folders_leaves_nothing_behind(folders):
    assert {check.level for check in doctor.check_folders()} == {OK}
    assert [list((folders / name).iterdir()) for name in FOLDERS] == [[], [], []]


def test_variables_in_use_are_listed():
    environment = {"nnUNet_diffusion_steps": "3", "nnUNet_diffusion_sampler": "ddim", "HOME": "/"}
    checks = list(doctor.check_variables(environment))
    assert {check.level for check in checks} == {OK}
    assert {check.text.split(":")[0] for check in checks} == {
        "nnUNet_diffusion_steps=3",
        "nnUNet_diffusion_sampler=ddim",
    }


@pytest.mark.parametrize(
    ("variable", "value"), [("steps", "-1"), ("steps", "many"), ("sampler", "euler"), ("samples", "-1"), ("step", "5")]
)
def test_variable_that_cannot_be_used_fails(variable, value, report, monkeypatch):
    monkeypatch.setenv(f"nnUNet_diffusion_{variable}", value)
    status, lines = report("--quiet")
    assert status == 1
    (line,) = bad(lines)
    assert f"nnUNet_diffusion_{variable}" in line


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("nnUNet_n_proc_DA", "0", "nnUNet_n_proc_DA=0: a training makes its batches itself"),
        ("nnUNet_diffusion_allow", "a.B", "nnUNet_diffusion_allow=a.B: plans may import"),
    ],
)
def test_a_variable_that_is_a_risk_is_a_warning(variable, value, words):
    assert [c.text.startswith(words) for c in doctor.check_variables({variable: value}) if c.level == WARN] == [True]
    assert not [c for c in doctor.check_variables({variable: ""}) if c.level == WARN]


def test_variable_in_other_case_is_reported_as_without_effect():
    checks = list(doctor.check_variables({"NNUNET_DIFFUSION_STEPS": "3"}))
    assert [check.level for check in checks] == [WARN, OK]
    assert checks[0].text.startswith("NNUNET_DIFFUSION_STEPS has no effect")


# ---- lines to type

NAMES = ["/data/trainers", "/my data/it's", '/a"b', "/cost$HOME", "/back\\slash`tick`"]


@posix_only
@pytest.mark.parametrize("folder", NAMES)
def test_lines_set_a_variable_to_any_folder(folder):
    assert in_shell(shell.set_line("X", folder, windows=False)) == folder
    line = shell.prepend_line("X", folder, windows=False)
    assert in_shell(line, X="") == folder
    assert in_shell(line, X="/before") == f"{folder}:/before"


def test_lines_for_powershell():
    assert shell.set_line("X", "C:\\it's", windows=True) == "$env:X = 'C:\\it''s'"
    line = shell.prepend_line("X", "C:\\a b", windows=True)
    assert line == "$env:X = 'C:\\a b' + $(if ($env:X) { \";$env:X\" })"


@posix_only
@pytest.mark.parametrize("holds_file", [True, False])
def test_line_that_removes_folders_removes_no_file(tmp_path, holds_file):
    folder = tmp_path / "my data"
    (folder / "a" / "b").mkdir(parents=True)
    if holds_file:
        (folder / "a" / "kept").write_text("")
    subprocess.run(shell.remove_empty_line(str(folder), windows=False), shell=True, check=True)
    assert (folder / "a" / "kept").exists() == folder.exists() == holds_file
    assert not (folder / "a" / "b").exists()
