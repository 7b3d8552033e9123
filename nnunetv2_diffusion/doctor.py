"""``nnunetv2_diffusion doctor``: is this installation in order, and if not, what to type.

Nothing is imported at the top that could be broken: a host that cannot be imported is a line of the report.
"""

import argparse
import importlib
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

from nnunetv2_diffusion import __version__, compat, installation, shell
from nnunetv2_diffusion.installation import DISTRIBUTION, PACKAGE_FOLDER, PLANNERS, TRAINERS
from nnunetv2_diffusion.settings import (
    ALLOW,
    ENVIRONMENT_PREFIX,
    SUBSECTIONS,
    DiffusionSettings,
    SettingsError,
    apply_environment,
    environment_overrides,
)

OK, WARN, FAIL = "OK", "WARN", "FAIL"
EXTERNAL = "nnUNet_extTrainer"
COMPILE = "nnUNet_compile"


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        level: OK, WARN (works, with a limit) or FAIL (something does not work).
        text: what was looked at, and what was found.
        remedy: lines to type or read where level is not OK.
    """

    level: str
    text: str
    remedy: tuple[str, ...] = ()


EXAMPLES = """
nnunetv2_diffusion doctor
nnunetv2_diffusion doctor --quiet
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("--quiet", action="store_true", help="Print only what is not OK.")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; 1 if any check failed, else 0."""
    counts = {OK: 0, WARN: 0, FAIL: 0}
    printed = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the imports; the report says what matters
        for check in all_checks():
            counts[check.level] += 1
            if arguments.quiet and check.level == OK:
                continue
            print(f"{check.level:<5} {check.text}", flush=True)
            for line in check.remedy:
                if line not in printed:  # one remedy often serves several checks
                    print(f"      {line}", flush=True)
                    printed.add(line)
    if not arguments.quiet:
        print(f"\n{counts[OK]} ok, {counts[WARN]} to know, {counts[FAIL]} wrong")
    return int(counts[FAIL] > 0)


def all_checks() -> Iterator[Check]:
    """All checks, in the order of the report; one that raises becomes a failed one."""
    groups = (
        check_versions,
        check_imports,
        check_trainers,
        check_planners,
        check_device,
        check_compile,
        check_folders,
        check_variables,
    )
    for group in groups:
        try:
            yield from group()
        except Exception as error:
            name = group.__name__.removeprefix("check_")
            yield Check(FAIL, f"{name}: this check stopped with {_reason(error)}")


def _reason(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# ---- versions -------------------------------------------------------------------------------------------------------


def check_versions() -> Iterator[Check]:
    """Versions of Python, torch, nnunetv2 and this package, and whether they are supported."""
    nnunetv2, torch = compat.installed("nnunetv2"), compat.installed("torch")
    found = {"python": platform.python_version(), "torch": torch, "nnunetv2": nnunetv2}
    problems = compat.version_problems(nnunetv2, torch)
    for name, version in found.items():
        bad = [p for p in problems if p.lower().startswith(name)]
        yield Check(FAIL, bad[0]) if bad else Check(OK, f"{name} {version}")
    if compat.unsafe_torch(torch) and not any(p.startswith("torch") for p in problems):
        safe = ".".join(map(str, compat.SAFE_TORCH))
        yield Check(
            WARN,
            f"torch {torch}: a hostile checkpoint can corrupt memory while it is read; {safe} and later do not let it",
            (f"use only models that you trust, or install torch {safe} or later",),
        )
    text = f"nnunetv2_diffusion {__version__} in {PACKAGE_FOLDER}"
    installed = compat.installed(DISTRIBUTION)
    if installed not in (None, __version__):
        yield Check(WARN, f"{text}, but pip has installed {installed}", (f"type: {installation.pip_line()}",))
    else:
        yield Check(OK, text if installed else f"{text}, not installed with pip")


def check_imports() -> Iterator[Check]:
    """Whether torch and nnunetv2 can be imported, and nnunetv2 is the whole of it."""
    for name in ("torch", "nnunetv2"):
        error = _import_error(name)
        if error is not None:
            yield Check(FAIL, f"{name} cannot be imported: {_reason(error)}")
        elif name == "nnunetv2" and _hidden_host() is not None:
            yield _hidden_host()


def _import_error(name: str) -> BaseException | None:
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:
        return error
    return None


def _hidden_host() -> Check | None:
    """A failed check if a folder without nnU-Net's own files is imported in place of nnunetv2.

    Python takes it for a namespace package. An editable nnunetv2 is found only after all folders of sys.path, so the
    files that this package installs for nnU-Net, or the empty folders that uninstalling leaves, come first.
    """
    spec = find_spec("nnunetv2")
    if spec is None or spec.origin is not None:
        return None
    if compat.installed("nnunetv2") is None:
        return Check(
            FAIL, "nnunetv2: only files of this package are there", ("type: pip install 'nnunetv2>=2.8,<2.9'",)
        )
    folders = [f for f in spec.submodule_search_locations or [] if os.path.isdir(f)]
    sources = installation.sources() or Path("<sources of nnunetv2_diffusion>")
    lines = [
        "nnunetv2 is an editable install, this package must be one as well, and be found by a variable.",
        f"type: pip uninstall -y {DISTRIBUTION}",
        *(f"type: {shell.remove_empty_line(f)}" for f in folders),
        f"type: pip install --no-deps -e {shell.quote(str(sources))}",
        f"type: {shell.prepend_line(EXTERNAL, str(sources / 'trainers'))}",
    ]
    where = ", ".join(folders) or "an entry of sys.path without its files"
    return Check(FAIL, f"nnunetv2 is hidden by {where}: nnU-Net does not find its own classes", tuple(lines))


# ---- trainers and planners ------------------------------------------------------------------------------------------


def check_trainers() -> Iterator[Check]:
    """Whether nnU-Net finds each trainer of this package by its name."""
    folder = installation.class_folder("trainers", TRAINERS)
    yield from _check_missing_folders()
    if not _host_usable():
        yield Check(FAIL, "trainers: not looked for, because nnunetv2 cannot be used")
        return
    finder = importlib.import_module("nnunetv2.utilities.find_objects").recursive_find_trainer_class_by_name
    if installation.host_in_site_packages() and not installation.is_editable():
        remedy = f"type: {installation.pip_line()}"
    else:
        remedy = f"type: {shell.prepend_line(EXTERNAL, str(folder))}"
    for name in installation.class_names(folder):
        yield _find("trainer", name, finder, FAIL, remedy)


def check_planners() -> Iterator[Check]:
    """Whether nnU-Net finds each planner of this package by its name."""
    folder = installation.class_folder("plans", PLANNERS)
    if not _host_usable():
        yield Check(FAIL, "planners: not looked for, because nnunetv2 cannot be used")
        return
    find_class = importlib.import_module("nnunetv2.utilities.find_class_by_name").recursive_find_python_class
    host = Path(importlib.import_module("nnunetv2").__path__[0])

    def finder(name: str) -> type | None:
        return find_class(str(host / "experiment_planning"), name, "nnunetv2.experiment_planning")

    in_place = installation.host_in_site_packages() and not installation.is_editable()
    target = host / "experiment_planning" / "experiment_planners"
    for name in installation.class_names(folder):
        if in_place:
            yield _find("planner", name, finder, FAIL, f"type: {installation.pip_line()}")
            continue
        remedy = (
            "nnU-Net has no variable for planners. All trainers work with the plans of nnU-Net's own planners; "
            f"to have this one as well, type: {shell.copy_line(str(folder / f'{name}.py'), str(target))}"
        )
        yield _find("planner", name, finder, WARN, remedy)


def _find(kind: str, name: str, finder: Callable[[str], type | None], level: str, remedy: str) -> Check:
    """Look one class up as nnU-Net does; its own prints while it searches are dropped."""
    try:
        with redirect_stdout(StringIO()):
            found = finder(name)
    except (Exception, SystemExit) as error:
        # a class that is found but cannot be used raises from the reason; one that is not found has no cause
        if error.__cause__ is not None or "could not find" not in str(error).lower():
            return Check(FAIL, f"{kind} {name}: {_reason(error)}")
        found = None
    if found is None:
        return Check(level, f"{kind} {name}: nnU-Net does not find it", (remedy,))
    return Check(OK, f"{kind} {name} ({found.__module__})")


def _check_missing_folders() -> Iterator[Check]:
    """nnU-Net says nothing about folders of nnUNet_extTrainer that do not exist."""
    for folder in os.environ.get(EXTERNAL, "").split(os.pathsep):
        if folder.strip() and not os.path.isdir(folder):
            yield Check(WARN, f"{EXTERNAL} names {folder}, which is no folder")


def _host_usable() -> bool:
    return _import_error("nnunetv2") is None and _hidden_host() is None


# ---- device ---------------------------------------------------------------------------------------------------------


def check_device() -> Iterator[Check]:
    """What torch can compute on."""
    if _import_error("torch") is not None:
        yield Check(FAIL, "device: unknown, because torch cannot be imported")
        return
    torch = importlib.import_module("torch")
    threads = f"{torch.get_num_threads()} CPU threads"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            yield Check(OK, f"device cuda:{i}: {device.name}, {device.total_memory / 2**30:.1f} GiB; {threads}")
        return
    if torch.backends.mps.is_available():
        yield Check(OK, f"device mps: {platform.processor()}; {threads}")
        return
    if shutil.which("nvidia-smi"):
        text = f"device cpu: there is an NVIDIA driver, but torch {torch.__version__} cannot use it"
        yield Check(WARN, text, ("see https://pytorch.org/get-started for the torch that fits the driver",))
        return
    yield Check(WARN, f"device cpu: {threads}, no GPU", ("add to nnU-Net's commands: -device cpu",))


def check_compile() -> Iterator[Check]:
    """Whether nnU-Net will use torch.compile, and whether it can."""
    if _import_error("torch") is not None:
        yield Check(FAIL, "torch.compile: unknown, because torch cannot be imported")
        return
    torch = importlib.import_module("torch")
    variable = os.environ.get(COMPILE)
    if not torch.cuda.is_available():
        yield Check(OK, "torch.compile: not used, nnU-Net compiles for CUDA only")
    elif os.name == "nt":
        yield Check(OK, "torch.compile: not used, nnU-Net does not compile on Windows")
    elif variable is not None and variable.lower() not in ("true", "1", "t"):
        yield Check(OK, f"torch.compile: switched off by {COMPILE}={variable}")
    else:
        lacking = [] if find_spec("triton") else ["the package triton"]
        if not any(shutil.which(c) for c in (os.environ.get("CC", ""), "gcc", "clang", "cc") if c):
            lacking.append("a C compiler (gcc or clang)")
        if lacking:
            text = f"torch.compile: will fail, it needs {' and '.join(lacking)}"
            yield Check(WARN, text, (f"install it, or type: {shell.set_line(COMPILE, 'f')}",))
        else:
            yield Check(OK, f"torch.compile: used in training; switch it off with {COMPILE}=f")


# ---- folders and variables ------------------------------------------------------------------------------------------


def check_folders() -> Iterator[Check]:
    """nnU-Net's three folders: set, there, and writable."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        folder = os.environ.get(name, "")
        if not folder:
            example = str(Path.home() / "nnUNet" / name)
            lines = (
                f"type: {shell.make_line(example)}",
                f"type: {shell.set_line(name, example)}  # or any other folder",
            )
            yield Check(FAIL, f"{name} is not set", lines)
        elif not os.path.isdir(folder):
            yield Check(FAIL, f"{name} is {folder}, which is no folder", (f"type: {shell.make_line(folder)}",))
        else:
            problem = _write_problem(folder)
            # raw data is only read by nnU-Net's main commands
            level = OK if problem is None else WARN if name == "nnUNet_raw" else FAIL
            yield Check(level, f"{name} {folder}" + (f": cannot be written to, {problem}" if problem else ""))


def _write_problem(folder: str) -> str | None:
    """Why nothing can be written into a folder; None if it can be."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return _reason(error)


def _check_overrides(environ: Mapping[str, str]) -> None:
    """Raise SettingsError if no method could sample with the variables; which one will be used is not known here."""
    errors = []
    for section in SUBSECTIONS:
        try:
            apply_environment(DiffusionSettings(), section, environ)
        except SettingsError as error:
            errors.append(error)
    if len(errors) == len(SUBSECTIONS):
        raise errors[0]


def check_variables(environ: Mapping[str, str] = os.environ) -> Iterator[Check]:
    """Variables of this package that are set now."""
    if environ.get("nnUNet_n_proc_DA", "").strip() == "0":
        text = "nnUNet_n_proc_DA=0: a training makes its batches itself, between its steps, and is many times slower"
        yield Check(WARN, text, (f"unless this is meant, type: {shell.set_line('nnUNet_n_proc_DA', '4')}",))
    if environ.get(ALLOW, "").strip():
        yield Check(WARN, f"{ALLOW}={environ[ALLOW]}: plans may import and run these names as well")
    for variable in environ:
        if variable.lower().startswith(ENVIRONMENT_PREFIX.lower()) and not variable.startswith(ENVIRONMENT_PREFIX):
            yield Check(WARN, f"{variable} has no effect, variables start with {ENVIRONMENT_PREFIX}")
    try:
        overrides = environment_overrides(environ)
        _check_overrides(environ)
    except SettingsError as error:
        yield Check(FAIL, _reason(error))
        return
    for key, value in overrides.items():
        yield Check(OK, f"{ENVIRONMENT_PREFIX}{key}={value}: replaces the plans' setting in predictions")
    if not overrides:
        yield Check(OK, f"no variable {ENVIRONMENT_PREFIX}* is set: predictions use the plans' settings")
