"""A raw data set with a held-out part, from one in nnU-Net's layout."""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


class RawDataError(ValueError):
    """A folder is not a raw data set that the demo can use."""


def hold_out(source: Path, folder: Path, test_cases: int, seed: int) -> None:
    """Link a raw data set's training cases into another folder, some of them as unseen cases.

    Args:
        source: a raw data set with imagesTr, labelsTr and dataset.json; only read.
        folder: ``nnUNet_raw/DatasetXXX_Name``; created, must not exist.
        test_cases: cases that become imagesTs and labelsTs.
        seed: of the choice.

    Raises:
        RawDataError: naming what is missing in source.
        FileExistsError: if folder exists.
    """
    _, cases = read_raw(source)
    if not 0 < test_cases <= len(cases) - 5:
        raise RawDataError(
            f"{source}: {len(cases)} labelled cases, cannot hold out {test_cases} and train on at least 5"
        )
    order = np.random.default_rng(seed).permutation(len(cases))
    held_out = {cases[i] for i in order[:test_cases]}
    link_parts(source, folder, {"Tr": [c for c in cases if c not in held_out], "Ts": sorted(held_out)})


def link_parts(source: Path, folder: Path, parts: Mapping[str, Sequence[str]]) -> None:
    """Link a raw data set's training cases into the parts of another folder.

    Args:
        source: a raw data set with imagesTr, labelsTr and dataset.json; only read.
        folder: created, must not exist.
        parts: cases of "Tr" (imagesTr, labelsTr) and "Ts".

    Raises:
        RawDataError: naming what is missing in source.
        FileExistsError: if folder exists.
    """
    dataset, cases = read_raw(source)
    missing = sorted({case for part in parts.values() for case in part} - set(cases))
    if missing:
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise RawDataError(f"{source}: {len(missing)} cases are missing: {shown}; it has {len(cases)} labelled cases")
    folder.mkdir(parents=True)
    ending = dataset["file_ending"]
    for part, members in parts.items():
        for kind in ("images", "labels"):
            (folder / f"{kind}{part}").mkdir()
        for case in members:
            _link(source / "labelsTr" / (case + ending), folder / f"labels{part}")
            for image in _channels(source, case, ending):
                _link(image, folder / f"images{part}")
    dataset["numTraining"] = len(parts["Tr"])
    (folder / "dataset.json").write_text(json.dumps(dataset, indent=2))


def read_raw(source: Path) -> tuple[dict, list[str]]:
    """dataset.json and the sorted names of the labelled cases of a raw data set.

    Raises:
        RawDataError: naming what is missing or of an unexpected form.
    """
    if not re.fullmatch(r"Dataset\d{3}_\w+", source.name):
        raise RawDataError(f"{source}: expected a folder named DatasetXXX_Name, as nnU-Net does")
    for needed in ("dataset.json", "imagesTr", "labelsTr"):
        if not (source / needed).exists():
            raise RawDataError(f"{source}: no {needed}, expected nnU-Net's raw layout")
    try:
        dataset = json.loads((source / "dataset.json").read_text())
        ending, channels = dataset["file_ending"], len(dataset["channel_names"])
    except (ValueError, KeyError) as error:
        raise RawDataError(f"{source / 'dataset.json'}: {error}, expected nnU-Net's format") from error
    cases = sorted(p.name.removesuffix(ending) for p in (source / "labelsTr").glob(f"*{ending}"))
    for case in cases:
        found = len(_channels(source, case, ending))
        if found != channels:
            raise RawDataError(
                f"{source / 'imagesTr'}: case {case} has {found} images, dataset.json names {channels} channels"
            )
    return dataset, cases


def _channels(source: Path, case: str, ending: str) -> list[Path]:
    pattern = re.compile(re.escape(case) + r"_\d{4}" + re.escape(ending))
    return sorted(p for p in (source / "imagesTr").glob(f"{case}_*{ending}") if pattern.fullmatch(p.name))


def _link(file: Path, folder: Path) -> None:
    """A link where the system allows one, else a copy."""
    try:
        os.symlink(file.resolve(), folder / file.name)
    except OSError:
        shutil.copyfile(file, folder / file.name)
