"""Other installations of nnU-Net to test against, each used by a Python process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nnunetv2

REPOSITORY = Path(__file__).resolve().parents[1]
OUR_TRAINERS = sorted(file.stem for file in (REPOSITORY / "trainers").glob("nnUNet*.py"))
OUR_PLANNERS = sorted(file.stem for file in (REPOSITORY / "plans").glob("nnUNet*.py"))
HOST_FOLDER = Path(nnunetv2.__path__[0])


def copy_host(folder: Path) -> Path:
    """A copy of nnunetv2 without our files, as a checkout of nnU-Net would be; to be put on PYTHONPATH."""
    ours = shutil.ignore_patterns("diffusion", "__pycache__")
    shutil.copytree(HOST_FOLDER, folder / "nnunetv2", ignore=ours)
    return folder


def broken_package(folder: Path, name: str, reason: str) -> Path:
    """A package that cannot be imported; to be put on PYTHONPATH."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(f"raise ImportError({reason!r})\n")
    return folder


def run_python(*arguments: str, path: tuple[Path, ...] = (), **variables: str) -> subprocess.CompletedProcess:
    """Run Python outside of the repository; of nnU-Net's variables, only those given are set."""
    environment = {k: v for k, v in os.environ.items() if not k.lower().startswith("nnunet") and k != "PYTHONPATH"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=Path.home().anchor,  # it comes first in sys.path, and must hold no package
        capture_output=True,
        text=True,
        timeout=300,
    )
