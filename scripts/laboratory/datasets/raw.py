"""A data set in nnU-Net's raw layout: what is written, and how.

Libraries are imported where they are used: the converters' help answers before anything is installed.
"""

import gzip
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from laboratory.datasets.sources import LayoutError, Sources, listing

if TYPE_CHECKING:
    from PIL import Image

PARTS = ("train", "val", "test")
HALF = 128  # masks of 8 bits: white is foreground; lossy files and drawn masks have values in between


@dataclass(frozen=True)
class Case:
    """One case: its name in nnU-Net, an image for each channel, and its label map unless that is not published."""

    name: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class Collection:
    """The cases by their part, a sentence that says where the parts come from, and whether the seed decides them."""

    train: Sequence[Case]
    val: Sequence[Case]
    test: Sequence[Case]
    split: str
    drawn: bool = False


@dataclass(frozen=True)
class DataSet:
    """How a data set is converted; nnU-Net's name of it is DatasetNNN_title.

    Attributes:
        reference: address of the data's owner.
        labels: name -> value, or values of a region.
        counts: cases to train on, to validate on and to test on, in the paper.
        collect: finds the cases and splits them, given sources and seed.
        channels: of volumes, names in dataset.json, which choose nnU-Net's normalisation.
        picture: Pillow's mode of pictures, "L" (grey) or "RGB"; None for volumes.
        values: of a volume's label map, expected value -> new value; by default the labels' own.
        wanted: regular expression of an archive's members that are needed.
        inner: regular expression of archives in the archive.
        regions_class_order: as in dataset.json, with regions.
        reader: nnU-Net's reader if not the default.
    """

    title: str
    summary: str
    reference: str
    labels: Mapping[str, int | tuple[int, ...]]
    counts: tuple[int, int, int]
    collect: Callable[[Sources, int], Collection]
    channels: tuple[str, ...] = ()
    picture: str | None = None
    values: Mapping[int, int] | None = None
    wanted: str = ""
    inner: str | None = None
    regions_class_order: tuple[int, ...] | None = None
    reader: str | None = None

    @property
    def file_ending(self) -> str:
        """Ending of the files of images and labels."""
        return ".png" if self.picture else ".nii.gz"


def cut(cases: Sequence, counts: tuple[int, int, int]) -> dict[str, Sequence]:
    """Cases in their order: the first to train, the last to test on; in proportion if there are more or fewer."""
    total = sum(counts)
    if len(cases) != total:
        val, test = (max(bool(count), round(len(cases) * count / total)) for count in counts[1:])
        counts = (max(0, len(cases) - val - test), val, test)
    ends = (0, *accumulate(counts))
    return {part: cases[ends[i] : ends[i + 1]] for i, part in enumerate(PARTS)}


def draw(cases: Sequence[Case], counts: tuple[int, int, int], seed: int) -> dict[str, Sequence[Case]]:
    """Cases drawn into parts by the seed, each in the order of the cases; counts as in ``cut``."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(cases)).tolist()
    return {part: [cases[i] for i in sorted(indices)] for part, indices in cut(order, counts).items()}


def split_as_listed(collection: Collection, file: Path) -> Collection:
    """The same cases in the parts that a JSON lists: names by "train", "test" and possibly "val", every case once."""
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LayoutError(f"{file} cannot be read: {error}") from error
    if not isinstance(listed, Mapping) or not {"train", "test"} <= set(listed) <= set(PARTS):
        raise LayoutError(f"{file}: expected lists of cases by 'train', 'test' and possibly 'val'")
    cases = {case.name: case for part in PARTS for case in getattr(collection, part)}
    names = [str(name) for part in listed.values() for name in part]
    for what, wrong in {
        "lists cases that are not there": sorted(set(names) - set(cases)),
        "does not list": sorted(set(cases) - set(names)),
        "lists more than once": sorted({name for name in names if names.count(name) > 1}),
    }.items():
        if wrong:
            raise LayoutError(f"{file} {what}: {listing(wrong)}")
    parts = {part: [cases[str(name)] for name in listed.get(part, [])] for part in PARTS}
    return Collection(**parts, split=f"as listed in {file.name}")


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A temporary folder beside target, which is removed at the end with all that was not moved out of it."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_collection(dataset: DataSet, collection: Collection, sources: Sources) -> None:
    """LayoutError for two cases of one name, a part without cases, or other numbers than the paper's.

    The last is only noted if the sources may be incomplete.
    """
    parts = {"train": collection.train, "validate": collection.val, "test": collection.test}
    names = [case.name for cases in parts.values() for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise LayoutError(f"more than one case is named {listing(twice)}")
    unlabelled = [case.name for case in (*collection.train, *collection.val) if case.label is None]
    if unlabelled:
        raise LayoutError(f"cases to train or validate on have no labels: {listing(unlabelled)}")
    counts = tuple(map(len, parts.values()))
    found, expected = (
        ", ".join(f"{count} to {part}" for part, count in zip(parts, numbers, strict=True))
        for numbers in (counts, dataset.counts)
    )
    if counts != dataset.counts:
        sources.problem(f"found {found}; the paper's split is {expected}")
    if not collection.train or not collection.test:
        raise LayoutError(f"found {found}: too few cases")


def write_raw(dataset: DataSet, collection: Collection, folder: Path, sources: Sources) -> None:
    """Write imagesTr, labelsTr, imagesTs, labelsTs, dataset.json and, with cases to validate on, splits_final.json.

    The folder is new; unpacked images are moved. LayoutError names a file that cannot be read or used.
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
            write_label(dataset, case, folder / f"labels{part}" / f"{case.name}{dataset.file_ending}")
        for channel, image in enumerate(case.images):
            name = f"{case.name}_{channel:04d}{dataset.file_ending}"
            write_image(dataset, sources, image, folder / f"images{part}" / name)
    _write_description(dataset, collection, folder)
    if collection.val:
        (folder / "splits_final.json").write_text(splits_text(collection), encoding="utf-8")


def splits_text(collection: Collection) -> str:
    """Content of nnU-Net's splits_final.json: one fold."""
    fold = {"train": [case.name for case in collection.train], "val": [case.name for case in collection.val]}
    return json.dumps([fold], indent=4)


def _write_description(dataset: DataSet, collection: Collection, folder: Path) -> None:
    from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json

    # nnU-Net divides pictures by 255, as the papers do
    channels = dataset.channels or ("rgb_to_0_1",) * len(dataset.picture)
    extra = {"overwrite_image_reader_writer": dataset.reader} if dataset.reader else {}
    generate_dataset_json(
        str(folder), channel_names={str(index): name for index, name in enumerate(channels)},
        labels=dict(dataset.labels), num_training_cases=len(collection.train) + len(collection.val),
        file_ending=dataset.file_ending, regions_class_order=dataset.regions_class_order, dataset_name=dataset.title,
        reference=dataset.reference, license="see reference",
        converted_by="nnunetv2_diffusion scripts/datasets/convert",
        description=f"{dataset.summary} Split: {collection.split}", **extra,
    )  # fmt: skip


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    from nibabel.filebasedimages import ImageFileError

    try:
        yield
    except (OSError, EOFError, zlib.error, ImageFileError) as error:
        raise LayoutError(f"{file} cannot be read: {error}") from error


def _read_picture(file: Path, mode: str) -> "Image.Image":
    """A picture of 8 bits, in Pillow's mode."""
    from PIL import Image

    with _reading(file), Image.open(file) as image:
        if image.mode[0] in "IF":
            raise LayoutError(f"{file}: its pixels are of Pillow's mode {image.mode}, expected 8 bits")
        return image.convert(mode)


def write_image(dataset: DataSet, sources: Sources, source: Path, target: Path) -> None:
    """A picture as PNG; a .nii.gz file as it is, or a .nii file compressed."""
    if dataset.picture:
        _read_picture(source, dataset.picture).save(target)
    elif source.name.endswith(".nii.gz"):
        sources.take(source, target)
    else:
        with source.open("rb") as stream, gzip.open(target, "wb", compresslevel=6) as compressed:
            shutil.copyfileobj(stream, compressed, 2**20)


def write_label(dataset: DataSet, case: Case, target: Path) -> None:
    """A black and white picture as PNG of zeros and ones, or a label map with the data set's values."""
    if dataset.picture:
        _write_mask(case.label, case.images[0], target)
    else:
        values = dataset.values or {value: value for value in dataset.labels.values()}
        _write_volume(case.label, case.images[0], target, values)


def _write_mask(source: Path, image: Path, target: Path) -> None:
    import numpy as np
    from PIL import Image

    mask = _read_picture(source, "L")
    with _reading(image), Image.open(image) as opened:
        size = opened.size
    if mask.size != size:
        raise LayoutError(f"{source}: its size is {mask.size}, expected {size} as that of {image.name}")
    values = np.asarray(mask)
    if 0 < values.max() < HALF:  # dark but not black: numbers of classes?
        raise LayoutError(f"{source}: its brightest pixel is {values.max()}, expected a mask of 0 and 255")
    Image.fromarray((values >= HALF).astype(np.uint8)).save(target)


def _write_volume(source: Path, image: Path, target: Path, values: Mapping[int, int]) -> None:
    import nibabel as nib
    import numpy as np

    with _reading(source):
        labels = nib.load(source)
        array = np.asanyarray(labels.dataobj)
    with _reading(image):
        shape = nib.load(image).shape
    if array.shape != shape:
        raise LayoutError(f"{source}: its shape is {array.shape}, expected {shape} as that of {image.name}")
    present = np.unique(array)
    unexpected = [value.item() for value in present if value.item() not in values]
    if unexpected:
        raise LayoutError(f"{source}: found the labels {unexpected[:8]}, expected {sorted(values)}")
    changed = np.zeros(shape, np.uint8)
    for value in present:
        changed[array == value] = values[value.item()]
    header = labels.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    nib.save(nib.Nifti1Image(changed, labels.affine, header), target)
