"""Looks at input and output folders before anything is predicted."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES
from tqdm import tqdm

LONGEST_NAME = 255  # bytes of a file's name on every usual file system
NIFTI = (".nii", ".nii.gz")
MOST_NAMED = 5  # in a message


class InputError(ValueError):
    """Input or output cannot be used."""


class CaseError(InputError):
    """One case cannot be predicted; the others can."""


@dataclass
class FailedCase:
    """A case that cannot be predicted; the others go on.

    Attributes:
        name: of the case.
        reason: what was found and what was expected, one sentence that names the file.
    """

    name: str
    reason: str


def list_cases(folder: Path, dataset_json: Mapping[str, Any]) -> tuple[dict[str, list[Path]], list[FailedCase]]:
    """Cases of a folder as nnU-Net lists them, and what looks like a case and is none.

    Files are not opened: how many channels they hold is known when they are read.

    Args:
        folder: of images ``<case>_0000<ending>``, or one such image, which stands for its case.
        dataset_json: of the model.

    Returns:
        case -> files in the order of their numbers; and links to nowhere, folders, other names and other endings.

    Raises:
        InputError: no such folder, nothing in it that could be a case, or a single file with another name.
    """
    ending, only = dataset_json["file_ending"], None
    if folder.is_file():
        folder, only = folder.parent, _case_of(folder, ending)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected images <case>_0000{ending}")
    cases = list_images(folder, ending)
    failed = {n: r for n in cases if (r := _bad_name(n, ending))}
    for file in cases.pop("", []):
        failed[file.name] = f"{file}: expected a name in front of the number, <case>_0000{ending}"
    failed |= _left_out(folder, ending, cases, quiet=only is not None)
    if only is not None:
        cases, failed = ({n: v for n, v in found.items() if n == only} for found in (cases, failed))
    if not cases and not failed:
        raise InputError(f"{folder}: no file ends in {ending}, expected images <case>_0000{ending}")
    good = {name: files for name, files in cases.items() if name not in failed}
    return good, [FailedCase(name, reason) for name, reason in sorted(failed.items())]


def list_images(folder: Path, ending: str) -> dict[str, list[Path]]:
    """Case -> images ``<case>_0000<ending>`` in the order of their numbers, as nnU-Net lists them.

    The result is that of ``create_lists_from_splitted_dataset_folder``, which one link loop or one other name stops.
    """
    naming, cases = _naming(ending), {}
    for file in sorted(folder.iterdir()):
        found = naming.fullmatch(file.name)
        if found and file.is_file():
            cases.setdefault(found[1], []).append(file)
    return dict(sorted(cases.items()))


def _naming(ending: str) -> re.Pattern:
    return re.compile(r"(.*)_\d{4}" + re.escape(ending), re.DOTALL)


def _case_of(file: Path, ending: str) -> str:
    """Name of the case that a single image stands for."""
    found = _naming(ending).fullmatch(file.name)
    if found is None or not found[1]:
        stem = file.name.removesuffix(ending).split(".")[0]
        raise InputError(
            f"{file}: expected a folder, or an image named <case>_0000{ending}; rename it to {stem}_0000{ending}, "
            f"one file for each channel"
        )
    return found[1]


def _left_out(folder: Path, ending: str, cases: Mapping[str, Sequence[Path]], quiet: bool) -> dict[str, str]:
    """Name -> why it is no case, of everything in the folder that a person may take for one; the rest is told."""
    used, found, rest = {f.name for files in cases.values() for f in files}, {}, []
    endings = sorted({e for reader in LIST_OF_IO_CLASSES for e in reader.supported_file_endings}, key=len, reverse=True)
    others = re.compile(rf"(.+)_\d{{4}}(?:{'|'.join(map(re.escape, endings))})", re.IGNORECASE)
    for file in sorted(folder.iterdir()):
        if file.name in used or (file.is_file() and re.fullmatch(r"_\d{4}" + re.escape(ending), file.name)):
            continue
        if not file.name.endswith(ending):
            other = others.fullmatch(file.name)
            if other and other[1] not in cases:
                found.setdefault(other[1], f"{file}: the model reads files that end in {ending}")
            elif not file.name.startswith(".") and file.name.removesuffix(".json") not in cases:
                rest.append(file.name)
        elif file.is_file() and file.name[: -len(ending) - 5] in cases:
            rest.append(file.name)
        else:
            stem = file.name.removesuffix(ending)
            found.setdefault(re.sub(r"_\d{4}$", "", stem) or file.name, f"{file}: {_what_it_is(file, ending)}")
    if rest and not quiet:
        more = f" and {len(rest) - MOST_NAMED} more" if len(rest) > MOST_NAMED else ""
        tqdm.write(f"{folder}: not used, not named <case>_0000{ending}: {', '.join(rest[:MOST_NAMED])}{more}")
    return found


def _what_it_is(file: Path, ending: str) -> str:
    if file.is_file():
        return f"expected a name <case>_0000{ending}"
    if file.is_dir():
        return "a folder, expected an image"
    if file.is_symlink():
        return f"a link to {os.readlink(file)}, where no file is"
    return "no ordinary file, expected an image"


def _bad_name(name: str, ending: str) -> str | None:
    """Why results of a case could not be written, however good its images are."""
    size = len(f"{name}{ending}".encode())
    if size > LONGEST_NAME:
        return f"{name[:40]}...{ending}: the name of its mask has {size} bytes, a file's may have {LONGEST_NAME}"
    if ending in NIFTI and name.endswith(NIFTI):  # ITK would write x.nii.gz.nii.gz to x.nii.gz
        return f"{name}: the name of a case cannot end in {' or '.join(NIFTI)}; rename {name}_0000{ending}"
    return None


def prepare_output(out: Path, inputs: Path) -> None:
    """Make the output folder and see that it can be written to.

    Args:
        out: the folder.
        inputs: folder of images, or one image.

    Raises:
        InputError: if it cannot, or is the input folder.
    """
    if out.resolve() == (inputs.parent if inputs.is_file() else inputs).resolve():
        raise InputError(f"{out}: output and input are the same folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".writable_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{out}: cannot be written to ({error.strerror})") from error
