"""Which versions of the host this package is made for."""

import platform
import re
import sys
from importlib import metadata

from nnunetv2_diffusion import __version__

SUPPORTED_NNUNET = "2.8"
MINIMUM_PYTHON = (3, 10)
MINIMUM_TORCH = (2, 6)
SAFE_TORCH = (2, 10)  # before it, torch.load(weights_only=True) of a hostile file could corrupt memory
# what results depend on; batchgeneratorsv2 0.3.6 changed augmentation at borders
PACKAGES = (
    "torch",
    "nnunetv2",
    "dynamic_network_architectures",
    "batchgenerators",
    "batchgeneratorsv2",
    "acvl_utils",
    "numpy",
    "scipy",
)


class UnsupportedVersionError(RuntimeError):
    """The installed nnU-Net, torch or Python is outside the supported range."""


def _release(version: str) -> tuple[int, ...]:
    """Numbers of a version, without what follows them: 2.9.0rc1+cpu -> (2, 9, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(n) for n in numbers[0].split(".")) if numbers else (0,)


def version_problems(
    nnunetv2: str | None, torch: str | None, python: tuple[int, ...] = sys.version_info[:3]
) -> list[str]:
    """What is wrong with a set of versions, one sentence each; empty if they are supported.

    Args:
        nnunetv2: version of nnunetv2, None if it is not installed.
        torch: version of torch, None if it is not installed.
        python: version of Python.
    """
    problems = []
    if python < MINIMUM_PYTHON:
        problems.append(f"Python is {'.'.join(map(str, python))}, expected 3.10 or newer")
    if nnunetv2 is None:
        problems.append(f"nnunetv2 is not installed, expected {SUPPORTED_NNUNET}.*")
    elif _release(nnunetv2)[:2] != (2, 8):
        problems.append(f"nnunetv2 is {nnunetv2}, expected {SUPPORTED_NNUNET}.*: pip install 'nnunetv2>=2.8,<2.9'")
    if torch is None:
        problems.append("torch is not installed")
    elif _release(torch)[:2] == (2, 9):
        problems.append(f"torch is {torch}; 2.9 has slow and partly wrong 3D convolutions, use another version")
    elif _release(torch) < MINIMUM_TORCH:
        problems.append(f"torch is {torch}, expected {'.'.join(map(str, MINIMUM_TORCH))} or newer, but not 2.9")
    return problems


def installed(name: str) -> str | None:
    """Version of an installed distribution, None if there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def package_versions() -> dict[str, str]:
    """Versions of what a result depends on, as all files of results name them."""
    found = {name: installed(name) or "not installed" for name in PACKAGES}
    return {"python": platform.python_version(), **found, "nnunetv2_diffusion": __version__}


def unsafe_torch(version: str | None) -> bool:
    """Whether this torch reads hostile files less safely than later ones."""
    return version is not None and _release(version) < SAFE_TORCH


def check_versions() -> None:
    """Raise UnsupportedVersionError, naming what was found and expected, unless all versions are supported."""
    problems = version_problems(installed("nnunetv2"), installed("torch"))
    if problems:
        raise UnsupportedVersionError("nnunetv2_diffusion cannot run here: " + "; ".join(problems))
