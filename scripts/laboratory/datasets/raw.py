"""A data set in nnU-Net's raw layout: what is written, and how."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from laboratory.datasets.sources import LayoutError, Sources, listing


@dataclass(frozen=True)
class Case:
    """One case: its name in nnU-Net, an image for each channel, and its label map unless that is not published."""

    name: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class Collection:
    """The cases of a data set by their part; ``split`` says in a sentence where the parts come from.

    ``drawn`` tells whether they depend on the seed.
    """

    train: Sequence[Case]
    val: Sequence[Case]
    test: Sequence[Case]
    split: str
    drawn: bool = False


@dataclass(frozen=True)
class DataSet:
    """How a data set is converted.

    Attributes:
        title: XXX_title is its name in nnU-Net.
        summary: one line.
        reference: address of the data's owner.
        channels: names in dataset.json, which choose nnU-Net's normalisation.
        labels: name -> value, or values of a region.
        counts: cases to train on, to validate on and to test on, in the paper.
        collect: finds the cases and splits them: (sources, seed) -> collection.
        write_image: (sources, image, target).
        write_label: (label, image, target); the image has the geometry that the label must have.
        file_ending: of images and labels.
        wanted: regular expression of an archive's members that are needed.
        inner: regular expression of archives in the archive.
        regions_class_order: as in dataset.json, with regions.
        reader: nnU-Net's reader if not the default.
    """

    title: str
    summary: str
    reference: str
    channels: tuple[str, ...]
    labels: Mapping[str, int | tuple[int, ...]]
    counts: tuple[int, int, int]
    collect: Callable[[Sources, int], Collection]
    write_image: Callable[[Sources, Path, Path], None]
    write_label: Callable[[Path, Path, Path], None]
    file_ending: str
    wanted: str = ""
    inner: str | None = None
    regions_class_order: tuple[int, ...] | None = None
    reader: str | None = None


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A temporary folder beside target, which is removed at the end with all that was not moved out of it."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_collection(dataset: DataSet, collection: Collection, sources: Sources) -> None:
    """Check names and numbers of cases.

    Raises:
        LayoutError: for two cases of one name, a part without cases, or other numbers than the paper's, unless the
            sources may be incomplete.
    """
    parts = {"train": collection.train, "validate": collection.val, "test": collection.test}
    names = [case.name for cases in parts.values() for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise LayoutError(f"more than one case is named {listing(twice)}")
    unlabelled = [case.name for case in (*collection.train, *collection.val) if case.label is None]
    if unlabelled:
        raise LayoutError(f"cases to train or validate on have no labels: {listing(unlabelled)}")
    counts = tuple(len(cases) for cases in parts.values())
    found = ", ".join(f"{count} to {part}" for part, count in zip(parts, counts, strict=True))
    if counts != dataset.counts:
        expected = ", ".join(f"{count} to {part}" for part, count in zip(parts, dataset.counts, strict=True))
        sources.problem(f"found {found}; the paper's split is {expected}")
    if not collection.train or not collection.test:
        raise LayoutError(f"found {found}: too few cases")


def write_raw(dataset: DataSet, collection: Collection, folder: Path, sources: Sources) -> None:
    """Write imagesTr, labelsTr, imagesTs, labelsTs, dataset.json and, with cases to validate on, splits_final.json.

    Args:
        dataset: what to write.
        collection: its cases.
        folder: new folder.
        sources: of the images; unpacked ones are moved.

    Raises:
        LayoutError: naming a file that cannot be read or used.
    """
    from tqdm import tqdm

    folder.mkdir()
    parts = {"Tr": (*collection.train, *collection.val), "Ts": collection.test}
    for part, cases in parts.items():
        (folder / f"images{part}").mkdir()
        if any(case.label for case in cases):
            (folder / f"labels{part}").mkdir()
    jobs = [(part, case) for part, cases in parts.items() for case in cases]
    for part, case in tqdm(jobs, desc=f"convert {dataset.title}", unit="case"):
        if case.label:  # before the image, which may be moved
            dataset.write_label(
                case.label, case.images[0], folder / f"labels{part}" / f"{case.name}{dataset.file_ending}"
            )
        for channel, image in enumerate(case.images):
            name = f"{case.name}_{channel:04d}{dataset.file_ending}"
            dataset.write_image(sources, image, folder / f"images{part}" / name)
    _write_description(dataset, collection, folder)
    if collection.val:
        (folder / "splits_final.json").write_text(splits_text(collection), encoding="utf-8")


def splits_text(collection: Collection) -> str:
    """Content of nnU-Net's splits_final.json: one fold."""
    fold = {"train": [case.name for case in collection.train], "val": [case.name for case in collection.val]}
    return json.dumps([fold], indent=4)


def _write_description(dataset: DataSet, collection: Collection, folder: Path) -> None:
    from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json

    extra = {"overwrite_image_reader_writer": dataset.reader} if dataset.reader else {}
    generate_dataset_json(
        str(folder),
        channel_names={str(index): name for index, name in enumerate(dataset.channels)},
        labels=dict(dataset.labels),
        num_training_cases=len(collection.train) + len(collection.val),
        file_ending=dataset.file_ending,
        regions_class_order=dataset.regions_class_order,
        dataset_name=dataset.title,
        reference=dataset.reference,
        license="see reference",
        converted_by="nnunetv2_diffusion scripts/datasets/convert",
        description=f"{dataset.summary} Split: {collection.split}",
        **extra,
    )
