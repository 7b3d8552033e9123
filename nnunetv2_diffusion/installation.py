"""Where this package and nnU-Net are installed, and how; needs neither of them to work."""

import json
import sysconfig
from importlib import import_module, metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from nnunetv2_diffusion import shell

DISTRIBUTION = "nnunetv2-diffusion"
TRAINERS = "nnunetv2/training/nnUNetTrainer/variants/diffusion"
PLANNERS = "nnunetv2/experiment_planning/experiment_planners/diffusion"
PACKAGE_FOLDER = Path(__file__).resolve().parent


def _is_sources(folder: Path) -> bool:
    return (folder / "setup.cfg").is_file() and (folder / "trainers").is_dir()


def checkout() -> Path | None:
    """The folder of the sources if this package is imported from there, else None."""
    return PACKAGE_FOLDER.parent if _is_sources(PACKAGE_FOLDER.parent) else None


def sources() -> Path | None:
    """The folder of the sources, also if this package was copied from there by pip, else None."""
    url = urlsplit(_direct_url().get("url", ""))
    folder = Path(url2pathname(url.path))
    return checkout() or (folder if url.scheme == "file" and _is_sources(folder) else None)


def _direct_url() -> dict:
    """What pip noted about the folder that this package was installed from (PEP 610)."""
    try:
        return json.loads(metadata.distribution(DISTRIBUTION).read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        return {}


def is_editable() -> bool:
    """Whether this package was installed with ``pip install -e``."""
    return bool(_direct_url().get("dir_info", {}).get("editable"))


def pip_line() -> str:
    """What installs this package, the files in nnU-Net's folders included."""
    folder = sources()
    line = f"pip install --force-reinstall --no-deps {shell.quote(str(folder)) if folder else '.'}"
    return line if folder else f"{line}  # in the sources of nnunetv2_diffusion"


def class_folder(name: str, installed_path: str) -> Path:
    """Where this package's trainers or planners are: in the checkout, or where pip put them.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    root = checkout()
    if root is not None:
        return root / name
    folder = PACKAGE_FOLDER.parent / installed_path
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}, expected the {name} of this package. Type: {pip_line()}")
    return folder


def class_names(folder: Path) -> list[str]:
    """Names of the classes in a folder: one file a class, named as the class.

    Raises:
        FileNotFoundError: if there are none.
    """
    names = sorted(file.stem for file in folder.glob("nnUNet*.py"))
    if not names:
        raise FileNotFoundError(f"no file nnUNet*.py in {folder}. Type: {pip_line()}")
    return names


def host_in_site_packages() -> bool:
    """Whether nnunetv2 is a normal install, in the folder where pip would install this package."""
    host = Path(import_module("nnunetv2").__path__[0]).resolve().parent
    return host in {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}
