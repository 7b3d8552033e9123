"""A raw data set in nnU-Net's layout, of which cases are linked into the parts of another one."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from PIL import Image

from laboratory.files import read_keys
from nnunetv2_diffusion.inference.inputs import list_images


class RawDataError(ValueError):
    """A folder is not a raw data set that can be used."""


def hold_out(source: Path, folder: Path, test_cases: int, seed: int) -> None:
    """Link a raw data set's training cases into a new folder, some that the seed chooses as unseen cases.

    Raises as ``link_parts``.
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
    """Link a raw data set's training cases into parts, "Tr" and "Ts", of a new one; masks with a palette as greyscale.

    RawDataError names what is missing in source; FileExistsError if folder exists.
    """
    dataset, cases = _read(source)
    check_cases(source, {case for part in parts.values() for case in part})
    folder.mkdir(parents=True)
    ending = dataset["file_ending"]
    for part, members in parts.items():
        for kind in ("images", "labels"):
            (folder / f"{kind}{part}").mkdir()
        for case in members:
            images, label = cases[case]
            _place_mask(label, folder / f"labels{part}" / f"{case}{ending}")
            for number, image in enumerate(images):
                _link(image, folder / f"images{part}" / f"{case}_{number:04d}{ending}")
            # nnU-Net's reader of 3D TIFF looks for a spacing beside images and labels
            _link_if_there(images[0].name[: -len(ending) - 5], images[0].parent, folder / f"images{part}", case)
            _link_if_there(label.name.removesuffix(ending), label.parent, folder / f"labels{part}", case)
    dataset.pop("dataset", None)  # the files are where nnU-Net looks without it
    dataset["numTraining"] = len(parts["Tr"])
    (folder / "dataset.json").write_text(json.dumps(dataset, indent=2))


def check_cases(source: Path, wanted: Iterable[str]) -> None:
    """Raise RawDataError unless a raw data set has all cases that are wanted."""
    _, cases = read_raw(source)
    missing = sorted(set(wanted) - set(cases))
    if missing:
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise RawDataError(f"{source}: {len(missing)} cases are missing: {shown}; it has {len(cases)} labelled cases")


def read_raw(source: Path) -> tuple[dict, list[str]]:
    """dataset.json and the sorted names of the labelled cases of a raw data set, as nnU-Net finds them.

    RawDataError names what is missing or of an unexpected form. How many channels files hold is checked by nnU-Net.
    """
    dataset, cases = _read(source)
    return dataset, sorted(cases)


def _read(source: Path) -> tuple[dict, dict[str, tuple[list[Path], Path]]]:
    """dataset.json, and the images and the label file of every labelled case."""
    if not re.fullmatch(r"Dataset\d{3}_.+", source.name):
        raise RawDataError(f"{source}: expected a folder named DatasetXXX_Name, as nnU-Net does")
    dataset = read_keys(source / "dataset.json", RawDataError, ("file_ending", "labels"))
    ending = dataset["file_ending"]
    for needed in ("imagesTr", "labelsTr") if "dataset" not in dataset else ():
        if not (source / needed).is_dir():
            raise RawDataError(f"{source}: no {needed}, expected nnU-Net's raw layout")
    if "dataset" in dataset:  # a copy: nnU-Net writes whole paths into it
        listed = get_filenames_of_train_images_and_targets(str(source), deepcopy(dataset))
        cases = {str(n): ([Path(f) for f in v["images"]], Path(v["label"])) for n, v in listed.items()}
    else:
        images = list_images(source / "imagesTr", ending)
        cases = {name: (files, source / "labelsTr" / f"{name}{ending}") for name, files in images.items()}
    cases = {name: (files, label) for name, (files, label) in cases.items() if label.is_file()}
    labelled = {p.name.removesuffix(ending) for p in (source / "labelsTr").glob(f"*{ending}")}
    for case in sorted({*cases, *(labelled if "dataset" not in dataset else ())}):
        images = cases[case][0] if case in cases else []
        if not images or not all(image.is_file() for image in images):
            raise RawDataError(
                f"{source}: case {case} has a label and no image, expected imagesTr/{case}_0000{ending} or what "
                "dataset.json names"
            )
    return dataset, cases


def check_masks(source: Path) -> int:
    """How many masks are PNG files with a palette, of which nnU-Net reads the colours and not the numbers.

    RawDataError names a mask whose numbers are not labels of dataset.json.
    """
    dataset, cases = _read(source)
    labels = {number for value in dataset["labels"].values() for number in np.atleast_1d(value).tolist()}
    coloured = [label for _, label in cases.values() if _has_palette(label)]
    for file in coloured:
        with Image.open(file) as image:
            found = sorted(set(np.unique(image).tolist()) - labels)
        if found:
            raise RawDataError(
                f"{file}: a PNG with a palette, as {len(coloured)} of the masks are; nnU-Net reads its colours, not "
                f"its numbers, and these hold {found[:8]}, which are no labels of dataset.json. Save masks as "
                "greyscale label numbers, as by PIL.Image.fromarray(numpy.array(mask)).save(file)"
            )
    return len(coloured)


def _has_palette(file: Path) -> bool:
    if file.suffix.lower() != ".png":
        return False
    with Image.open(file) as image:
        return image.mode == "P"


def _place_mask(file: Path, target: Path) -> None:
    """A link to a mask; of a picture with a palette a greyscale picture of its numbers."""
    if not _has_palette(file):
        return _link(file, target)
    with Image.open(file) as image:
        Image.fromarray(np.asarray(image)).save(target)


def _link_if_there(stem: str, source: Path, folder: Path, case: str) -> None:
    file = source / f"{stem}.json"
    if file.is_file():
        _link(file, folder / f"{case}.json")


def _link(file: Path, target: Path) -> None:
    """A link where the system allows one, else a copy."""
    try:
        os.symlink(file.resolve(), target)
    except OSError:
        shutil.copyfile(file, target)
