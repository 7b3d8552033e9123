"""What it costs to start nnU-Net with the plug-in installed: whole processes, with and without its files.

pip puts the trainers and planners into nnU-Net's own folders, so two copies of the installed nnU-Net are made in a
temporary folder, one without these files and one with them, and every process imports one of the copies. All else is
the same for both: interpreter, environment, bytecode that is compiled before.
"""

import compileall
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

from laboratory.benchmarking.problem import BenchmarkError
from laboratory.benchmarking.report import Columns, spread
from laboratory.benchmarking.timing import Stopwatch, alternate, ratio, summary
from nnunetv2_diffusion.installation import DISTRIBUTION, PLANNERS, TRAINERS, checkout, pip_line

HOST = "nnunetv2"
EXTERNAL = "nnUNet_extTrainer"  # more folders with trainers, which both copies would find
TRAINER = "nnUNetTrainerRecycleXT"
LATE_TRAINER = "nnUNetTrainer_250epochs"  # in variants/training_length, the folder that is searched last
TRAIN_HELP = (
    "import sys; from nnunetv2.run.run_training import run_training_entry; "
    "sys.argv[:] = ['nnUNetv2_train', '-h']; run_training_entry()"
)
FIND = "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find; find({!r})"
CHECK = f"""
import contextlib, inspect, json, nnunetv2, sys
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
with contextlib.suppress(SystemExit):
    {TRAIN_HELP}
modules = sorted(name for name in sys.modules if name.split(".")[0] == "nnunetv2_diffusion")
try:
    trainer, reason = inspect.getfile(find({TRAINER!r})), None
except RuntimeError as error:
    trainer, reason = None, str(error)
print(json.dumps({{"host": nnunetv2.__path__[0], "modules": modules, "trainer": trainer, "reason": reason}}))
"""
"""What a process of a copy imports for the help of nnUNetv2_train, and where it finds a trainer of ours."""


@dataclass(frozen=True)
class Start:
    """Something that a process is started for.

    Attributes:
        name: of the row.
        code: of Python.
        plugin: whether to run it without the plug-in (False), with it (True), or both in turn.
    """

    name: str
    code: str
    plugin: tuple[bool, ...] = (False, True)


HELP = Start("nnUNetv2_train -h", TRAIN_HELP)
STARTS = (
    HELP,
    Start("find nnUNetTrainer", FIND.format("nnUNetTrainer")),
    Start(f"find {LATE_TRAINER}", FIND.format(LATE_TRAINER)),
    Start(f"find {TRAINER}", FIND.format(TRAINER), (True,)),
    Start("import nnunetv2_diffusion", "import nnunetv2_diffusion", (True,)),
    Start("import torch", "import torch", (False,)),
)

STARTUP_COLUMNS: Columns = [
    ("process", lambda r: r["name"]),
    ("plug-in", lambda r: "with" if r["plugin"] else "without"),
    ("s", lambda r: f"{r['seconds']['median']:.3f}"),
    ("ratio to without, median (min-max)", lambda r: spread(r["ratio"], digits=3)),
    ("modules of nnunetv2_diffusion", lambda r: "-" if r["modules"] is None else str(len(r["modules"]))),
]


@dataclass(frozen=True)
class Process:
    """A process that is started, and waited for.

    Attributes:
        name: used as key.
        code: of Python.
        environment: all of its variables.
        folder: that it runs in, an empty one: Python looks there for modules first.
    """

    name: str
    code: str
    environment: Mapping[str, str]
    folder: Path

    def run(self, index: int = 0) -> str:
        """Its standard output.

        Raises:
            BenchmarkError: if it fails; with the last line that it printed.
        """
        command = [sys.executable, "-c", self.code]
        done = subprocess.run(command, env=dict(self.environment), cwd=self.folder, capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
            raise BenchmarkError(f"{self.name}: the process ended with status {done.returncode}: {last[0]}")
        return done.stdout

    def pass_seconds(self) -> None:
        """There are no passes."""

    def tensors(self) -> Sequence[torch.Tensor]:
        """None."""
        return ()


def startup_times(rounds: int, warmup: int, clock: str, starts: Sequence[Start] = STARTS) -> list[dict[str, Any]]:
    """Time processes.

    Args:
        rounds: measured turns of each.
        warmup: turns before that are not counted.
        clock: "wall", or "cpu" for the processor time of the processes.
        starts: what they are started for.

    Returns:
        one result for each start, and each of with and without, as in the JSON.

    Raises:
        BenchmarkError: if nnU-Net or the plug-in's files are not there, the copies are not what the processes
            import, a process fails, or the system cannot tell the time of the clock.
    """
    if clock == "cpu" and util.find_spec("resource") is None:
        raise BenchmarkError("--clock is cpu, but this system does not tell the time of other processes; expected wall")
    with host_copies() as copies:
        modules = {plugin: check_copy(copy, plugin) for plugin, copy in copies.items()}
        turns = [(start, plugin) for start in starts for plugin in start.plugin]
        processes = {turn: _process(*turn, copies) for turn in turns}
        stopwatch = Stopwatch(torch.device("cpu"), clock, children=True)
        measured = alternate(list(processes.values()), rounds, warmup, stopwatch, "startup")
    results = []
    for start, plugin in turns:
        seconds = [m.seconds for m in measured[processes[start, plugin].name]]
        stock = measured[processes[start, False].name] if start.plugin == (False, True) else None
        results.append({
            "name": start.name,
            "plugin": plugin,
            "seconds": {**summary(seconds), "rounds": seconds},
            "ratio": None if stock is None else ratio(seconds, stock),
            "modules": modules[plugin] if start is HELP else None,
        })  # fmt: skip
    return results


def _process(start: Start, plugin: bool, copies: Mapping[bool, Path]) -> Process:
    copy = copies[plugin]
    return Process(f"{start.name}, {'with' if plugin else 'without'}", start.code, environment(copy), _empty(copy))


def _empty(copy: Path) -> Path:
    """The folder beside the copies that processes run in."""
    return copy.parent / "work"


@contextmanager
def host_copies() -> Iterator[dict[bool, Path]]:
    """Folders with a package nnunetv2 each: without the plug-in's files (False) and with them (True); then removed.

    Raises:
        BenchmarkError: if nnU-Net or the files are not there.
    """
    spec = util.find_spec(HOST)
    if spec is None or not spec.submodule_search_locations:
        raise BenchmarkError(f"{HOST} is not installed, expected a version that the doctor accepts")
    files = plugin_files()
    with tempfile.TemporaryDirectory(prefix="nnunetv2_diffusion_benchmark_") as folder:
        root = Path(folder).resolve()
        _empty(root / "any").mkdir()
        copies = {False: root / "without", True: root / "with"}
        for plugin, copy in copies.items():
            shutil.copytree(spec.submodule_search_locations[0], copy / HOST, ignore=_not_python)
            (_put if plugin else _remove)(files, copy)
            compileall.compile_dir(copy, quiet=2)
        yield copies


def _put(files: Mapping[str, Path], copy: Path) -> None:
    for name, file in files.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy / name)


def _remove(files: Mapping[str, Path], copy: Path) -> None:
    """Remove files and the folders that were made for them: Python takes an empty one for a package."""
    for name in files:
        (copy / name).unlink(missing_ok=True)
    for folder in {(copy / name).parent for name in files}:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _not_python(folder: str, names: list[str]) -> list[str]:
    """What is not copied."""
    return [n for n in names if n == "__pycache__" or not (n.endswith(".py") or (Path(folder) / n).is_dir())]


def plugin_files() -> dict[str, Path]:
    """This package's files in nnU-Net's folders, by their path there, which starts with nnunetv2.

    They are those that pip recorded, or the checkout's where pip put none there.

    Raises:
        BenchmarkError: if there are neither.
    """
    for distribution in metadata.distributions(name=DISTRIBUTION):
        recorded = [f for f in distribution.files or () if f.parts[0] == HOST and f.suffix == ".py"]
        files = {f.as_posix(): Path(distribution.locate_file(f)) for f in recorded}
        if files and all(file.is_file() for file in files.values()):
            return files
    root = checkout()
    if root is None:
        raise BenchmarkError(f"no trainers of {DISTRIBUTION} are recorded as installed. Type: {pip_line()}")
    sources = {TRAINERS: root / "trainers", PLANNERS: root / "plans"}
    return {f"{path}/{file.name}": file for path, folder in sources.items() for file in sorted(folder.glob("*.py"))}


def environment(copy: Path) -> dict[str, str]:
    """Variables of a process that imports nnU-Net from a copy, and this package from where it is imported here."""
    root = checkout()
    paths = [str(copy), *([str(root)] if root else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    folders = {f"nnUNet_{kind}": str(_empty(copy)) for kind in ("raw", "preprocessed", "results")}
    kept = {name: value for name, value in os.environ.items() if name != EXTERNAL}
    return {**kept, **folders, "PYTHONPATH": os.pathsep.join(paths)}


def check_copy(copy: Path, plugin: bool) -> list[str]:
    """Modules of nnunetv2_diffusion that the help of nnUNetv2_train imports with a copy.

    Raises:
        BenchmarkError: if a process imports another nnU-Net, or finds our trainer without the plug-in, or not with it.
    """
    name = f"check of the copy {'with' if plugin else 'without'} the plug-in"
    printed = Process(name, CHECK, environment(copy), _empty(copy)).run()
    found = json.loads(printed.splitlines()[-1])
    if Path(found["host"]).resolve() != copy / HOST:
        raise BenchmarkError(f"{name}: {HOST} was imported from {found['host']}, expected {copy / HOST}")
    if plugin and (found["trainer"] is None or copy not in Path(found["trainer"]).resolve().parents):
        where = found["reason"] or f"it is in {found['trainer']}"
        raise BenchmarkError(f"{name}: expected {TRAINER} in {copy}, but {where}")
    if not plugin and (found["trainer"] is not None or "Could not find" not in found["reason"]):
        raise BenchmarkError(f"{name}: expected no {TRAINER}, found {found['trainer'] or found['reason']}")
    return found["modules"]
