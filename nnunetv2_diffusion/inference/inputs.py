"""Looks at input and output folders before anything is predicted."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import SimpleITK as sitk  # noqa: N813, its usual name
from nnunetv2.utilities.utils import get_identifiers_from_splitted_dataset_folder

GEOMETRY_TOLERANCE = 1e-3  # mm, and of the entries of the direction matrix
WITH_HEADER = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")  # read by SimpleITK without the voxels


class InputError(ValueError):
    """Input or output cannot be used."""


class CaseError(InputError):
    """One case cannot be predicted; the others can."""


def list_cases(folder: Path, dataset_json: Mapping[str, Any]) -> dict[str, list[Path]]:
    """Case -> one file a channel, in nnU-Net's naming ``<case>_0000<ending>``.

    Raises:
        InputError: naming the folder without images, or the channel that a case lacks or has too many.
    """
    ending = dataset_json["file_ending"]
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected images <case>_0000{ending}")
    channels = len(dataset_json.get("channel_names", dataset_json.get("modality", ())))
    names = [str(n) for n in get_identifiers_from_splitted_dataset_folder(str(folder), ending)]
    if not names:
        raise InputError(f"{folder}: no file ends in {ending}, expected images <case>_0000{ending}")
    cases = {name: [folder / f"{name}_{c:04d}{ending}" for c in range(channels)] for name in names}
    for name, files in cases.items():
        for file in files:
            if not file.is_file():
                raise InputError(f"{file}: missing; the model was trained with {channels} channels a case")
        if (folder / f"{name}_{channels:04d}{ending}").exists():
            raise InputError(f"{folder / f'{name}_{channels:04d}{ending}'}: the model has {channels} channels only")
    return cases


def check_headers(cases: Mapping[str, Sequence[Path]], ending: str) -> None:
    """Look at every header: it can be read, and the channels of a case lie in the same place.

    Raises:
        InputError: naming the file, what was found and what was expected.
    """
    if ending.lower() not in WITH_HEADER:
        return
    for files in cases.values():
        first = _header(files[0])
        for file in files[1:]:
            for kind, value in _header(file).items():
                if len(value) != len(first[kind]) or any(
                    abs(a - b) > GEOMETRY_TOLERANCE for a, b in zip(value, first[kind], strict=True)
                ):
                    raise InputError(f"{file}: {kind} is {value}, expected {first[kind]} as in {files[0].name}")


def _header(file: Path) -> dict[str, tuple]:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputError(f"{file}: cannot be read as an image ({str(error).strip().splitlines()[-1]})") from error
    return {
        "size": reader.GetSize(),
        "spacing": reader.GetSpacing(),
        "origin": reader.GetOrigin(),
        "direction": reader.GetDirection(),
    }


def prepare_output(out: Path, inputs: Path) -> None:
    """Make the output folder and see that it can be written to.

    Raises:
        InputError: if it cannot, or is the input folder.
    """
    if out.resolve() == inputs.resolve():
        raise InputError(f"{out}: output and input are the same folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".writable_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{out}: cannot be written to ({error.strerror})") from error
