"""The start of processes is timed with two copies of nnU-Net that differ in the plug-in's files alone."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from laboratory.benchmarking import cli, startup
from laboratory.benchmarking.cli import main
from laboratory.benchmarking.problem import BenchmarkError
from laboratory.benchmarking.startup import Process, Start
from laboratory.benchmarking.timing import Stopwatch, measure
from nnunetv2_diffusion.installation import PLANNERS, TRAINERS, class_names

ROOT = Path(__file__).resolve().parents[3]
OURS = {f"{TRAINERS}/{name}.py" for name in class_names(ROOT / "trainers")} | {
    f"{PLANNERS}/{name}.py" for name in class_names(ROOT / "plans")
}
STARTED = [Start("a", "pass"), Start("b", "print('b')", (True,))]


@pytest.fixture(scope="module")
def copies():
    with startup.host_copies() as made:
        yield made


def files_of(folder):
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_the_copies_differ_in_the_files_of_the_plugin_alone(copies):
    without, with_plugin = ({n for n in files_of(copies[plugin]) if n.endswith(".py")} for plugin in (False, True))
    assert without < with_plugin
    assert with_plugin - without == set(startup.plugin_files())
    assert with_plugin - without >= OURS
    assert "nnunetv2/training/nnUNetTrainer/variants/training_length/nnUNetTrainer_Xepochs.py" in without
    for name in without:
        assert (copies[False] / name).read_bytes() == (copies[True] / name).read_bytes()


def test_all_of_a_copy_is_compiled_and_from_no_other_place(copies):
    for copy in copies.values():
        files = files_of(copy)
        compiled = {n for n in files if n.endswith(".pyc")}
        assert len(compiled) == len(files) - len(compiled) > 100
        assert not any((copy / n).is_symlink() for n in files)


@pytest.mark.parametrize("plugin", [False, True])
def test_a_process_imports_its_copy_and_has_our_trainer_only_with_the_plugin(copies, plugin):
    module = f"{TRAINERS.replace('/', '.')}.{startup.TRAINER}"
    package, search = module.rsplit(".", 1)[0], "importlib.util.find_spec"
    code = (
        f"import importlib.util, nnunetv2; print(nnunetv2.__path__[0]); found = {search}({package!r});"
        f"print(found and {search}({module!r}).origin)"
    )
    copy = copies[plugin]
    process = Process("look", code, startup.environment(copy), startup._empty(copy))
    host, trainer = process.run().splitlines()
    assert Path(host) == copy / "nnunetv2"
    assert trainer == (str(copy / TRAINERS / f"{startup.TRAINER}.py") if plugin else "None")


def test_a_checkout_without_installed_files_gives_its_own(monkeypatch):
    monkeypatch.setattr(startup.metadata, "distributions", lambda name: [])
    if startup.checkout() is None:
        monkeypatch.setattr(startup, "checkout", lambda: ROOT)
    files = startup.plugin_files()
    assert set(files) >= OURS
    assert files[f"{TRAINERS}/{startup.TRAINER}.py"] == ROOT / "trainers" / f"{startup.TRAINER}.py"
    monkeypatch.setattr(startup, "checkout", lambda: None)
    with pytest.raises(BenchmarkError, match=r"no trainers of nnunetv2-diffusion are recorded.*pip install"):
        startup.plugin_files()


def test_both_copies_get_the_same_environment_but_for_the_path(copies, monkeypatch):
    monkeypatch.setenv(startup.EXTERNAL, "trainers")
    monkeypatch.setenv("PYTHONPATH", "before")
    without, with_plugin = (startup.environment(copies[plugin]) for plugin in (False, True))
    assert startup.EXTERNAL not in without
    first, *others = without.pop("PYTHONPATH").split(startup.os.pathsep)
    assert first == str(copies[False])
    assert [str(copies[True]), *others] == with_plugin.pop("PYTHONPATH").split(startup.os.pathsep)
    assert others[-1] == "before"
    assert without == with_plugin


@pytest.fixture
def quick(copies, monkeypatch):
    """The same copies for all tests, and no process that imports nnU-Net."""
    monkeypatch.setattr(startup, "host_copies", lambda: contextlib.nullcontext(copies))
    monkeypatch.setattr(startup, "check_copy", lambda copy, plugin: ["nnunetv2_diffusion"] * plugin)


def test_a_row_for_each_start_and_its_ratio_in_the_same_round(quick):
    help_start = startup.HELP
    rows = startup.startup_times(2, 0, "wall", [*STARTED, Start(help_start.name, "pass")])
    assert [(row["name"], row["plugin"]) for row in rows] == [
        ("a", False), ("a", True), ("b", True), (help_start.name, False), (help_start.name, True),
    ]  # fmt: skip
    stock, ours, alone = rows[:3]
    pairs = zip(ours["seconds"]["rounds"], stock["seconds"]["rounds"], strict=True)
    assert ours["ratio"]["max"] == pytest.approx(max(a / b for a, b in pairs))
    assert stock["ratio"]["max"] == 1
    assert alone["ratio"] is None
    assert all(row["modules"] is None for row in rows), "none of these is the process that was looked at"


def test_modules_are_told_for_the_help_of_training(quick, monkeypatch):
    monkeypatch.setattr(startup, "HELP", Start("help", "pass"))
    rows = startup.startup_times(1, 0, "wall", [startup.HELP, *STARTED[1:]])
    assert [row["modules"] for row in rows] == [[], ["nnunetv2_diffusion"], None]


def test_a_process_that_fails_is_named_with_its_last_line(quick):
    with pytest.raises(BenchmarkError, match="a, without: the process ended with status 1: ValueError: no"):
        startup.startup_times(1, 0, "wall", [Start("a", "raise ValueError('no')")])


SOME = {"host": "/c/nnunetv2", "modules": ["m"], "trainer": None, "reason": "Could not find requested"}


@pytest.mark.parametrize(
    ("plugin", "found", "message"),
    [
        (False, {"host": "/other/nnunetv2"}, "imported from /other/nnunetv2, expected /c/nnunetv2"),
        (False, {"trainer": "/c/nnunetv2/t.py", "reason": None}, "without the plug-in: expected no .* found /c/"),
        (False, {"reason": "nnUNetTrainerRecycleXT cannot be used"}, "expected no .* found .* cannot be used"),
        (True, {}, "with the plug-in: expected nnUNetTrainerRecycleXT in /c, but Could not find"),
        (True, {"trainer": "/other/t.py", "reason": None}, "but it is in /other/t.py"),
    ],
)
def test_a_copy_that_is_not_what_it_should_be_is_refused(monkeypatch, plugin, found, message):
    monkeypatch.setattr(Process, "run", lambda self: f"usage\n{json.dumps({**SOME, **found})}\n")
    with pytest.raises(BenchmarkError, match=message):
        startup.check_copy(Path("/c"), plugin)


def test_a_copy_that_is_as_it_should_be_gives_the_modules(monkeypatch):
    found = {**SOME, "trainer": "/c/nnunetv2/t.py", "reason": None}
    monkeypatch.setattr(Process, "run", lambda self: json.dumps(found))
    assert startup.check_copy(Path("/c"), True) == ["m"]
    monkeypatch.setattr(Process, "run", lambda self: json.dumps(SOME))
    assert startup.check_copy(Path("/c"), False) == ["m"]


@pytest.mark.skipif(sys.platform == "win32", reason="the system does not tell")
def test_processor_time_is_that_of_the_started_process(tmp_path):
    class Starts:
        name = "starts"

        def __init__(self, code):
            self.code = code

        def run(self, index):
            end = time.process_time() + 0.3
            while time.process_time() < end:
                pass
            subprocess.run([sys.executable, "-S", "-c", self.code], check=True)

        def pass_seconds(self):
            return None

        def tensors(self):
            return []

    busy = "import time\nwhile time.process_time() < 0.6: pass"
    stopwatch = Stopwatch(torch.device("cpu"), "cpu", children=True)
    assert measure(Starts(busy), 0, stopwatch).seconds >= 0.6
    assert measure(Starts("import time; time.sleep(0.6)"), 0, stopwatch).seconds < 0.3


def test_the_clock_of_processes_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(startup.util, "find_spec", lambda name: None)
    with pytest.raises(BenchmarkError, match=r"--clock is cpu, but .* expected wall"):
        startup.startup_times(1, 0, "cpu", STARTED)


def test_the_command_needs_no_plans_and_writes_what_the_others_write(quick, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(startup.startup_times, "__defaults__", (STARTED,))
    file = tmp_path / "startup.json"
    assert main(["startup", "--rounds", "2", "--warmup", "0", "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    assert set(content) == {"schema", "command", "settings", "hardware", "versions", "results", "targets"}
    assert content["command"] == "scripts/benchmark startup --rounds 2 --warmup 0 --clock wall"
    assert content["settings"] == {"rounds": 2, "warmup": 0, "clock": "wall"}
    assert [len(row["seconds"]["rounds"]) for row in content["results"]] == [2, 2, 2]
    assert str(tmp_path) not in file.read_text()
    text = capsys.readouterr().out
    assert all(f"{start.name} " in text for start in STARTED)
    assert "without" in text


def test_defaults_are_seven_rounds_and_one_before(capsys):
    args = cli.build_parser().parse_args(["startup"])
    assert (args.rounds, args.warmup, args.clock) == (7, 1, "wall")
    with pytest.raises(SystemExit):
        main(["startup", "--warmup", "-1"])
    assert "--warmup is -1, expected 0 or more" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_of_nnunet_are_timed_and_their_copies_checked(tmp_path):
    file = tmp_path / "startup.json"
    assert main(["startup", "--rounds", "1", "--warmup", "0", "--clock", "cpu", "--json", str(file)]) == 0
    rows = {(row["name"], row["plugin"]): row for row in json.loads(file.read_text())["results"]}
    assert set(rows) == {(start.name, plugin) for start in startup.STARTS for plugin in start.plugin}
    assert rows["nnUNetv2_train -h", False]["modules"] == []
    assert isinstance(rows["nnUNetv2_train -h", True]["modules"], list)
    assert all(row["seconds"]["min"] > 0 for row in rows.values())
    assert rows["import torch", False]["ratio"] is None
