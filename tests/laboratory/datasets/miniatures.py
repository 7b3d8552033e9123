"""Archives of the data sets' layouts with tiny images; pixels tell which file they come from."""

import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

SHAPE = (6, 10)  # rows, columns
VOLUME = (5, 6, 7)
AFFINE = np.array([[-0.8, 0, 0, 3], [0, 0.9, 0, -2], [0, 0, 2.5, 1], [0, 0, 0, 1.0]])


def rgb(file: Path, value: int, shape=SHAPE) -> None:
    """A picture of one colour: red is the value."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*shape, 3), (value, 20, 30), np.uint8)).save(file)


def grey(file: Path, value: int, shape=SHAPE) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, value, np.uint8)).save(file)


def mask(file: Path, rows: int = 2, shape=SHAPE, white: int = 255, black: int = 0) -> None:
    """White in the first rows."""
    values = np.full(shape, black, np.uint8)
    values[:rows] = white
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    image.save(file, quality=100) if file.suffix == ".jpg" else image.save(file)


def volume(file: Path, value: float, shape=VOLUME) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.full(shape, value, np.float32), AFFINE), file)


def label_map(file: Path, values, dtype=np.int16, shape=VOLUME) -> None:
    """The given values in the first voxels, 0 elsewhere."""
    array = np.zeros(shape, dtype)
    array.reshape(-1)[: len(values)] = values
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, AFFINE), file)


def pack(folder: Path, archive: Path) -> Path:
    """All files of a folder in a .zip, .tar or .tar.gz, names relative to it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as content:
            for file in files:
                content.write(file, file.relative_to(folder).as_posix())
    else:
        with tarfile.open(archive, "w:gz" if archive.suffix == ".gz" else "w") as content:
            for file in files:
                content.add(file, file.relative_to(folder).as_posix())
    return archive


def muscle_us(root: Path, train: int = 4, val: int = 2, test: int = 3) -> Path:
    folder = root / "Polito-Radboud-DeepLearningUS" / "Segmentation_models" / "data" / "MuscleCNN"
    number = 0
    for part, count in {"train": train, "val": val, "test": test}.items():
        for _ in range(count):
            grey(folder / part / f"BB_anon_{number}_1.png", 100 + number)
            mask(folder / f"{part}annot" / f"BB_anon_{number}_1.png", rows=1 + number % 4)
            number += 1
    return folder


def amos(root: Path, train=(1, 4, 410, 507), val=(*range(8, 28), 583)) -> Path:
    """Cases by number; those from 501 on are MR."""
    folder = root / "amos22"
    listed = {"labels": {}, "training": [], "validation": [], "test": []}
    for part, key, numbers in (("Tr", "training", train), ("Va", "validation", val)):
        for number in numbers:
            volume(folder / f"images{part}" / f"amos_{number:04d}.nii.gz", number)
            label_map(folder / f"labels{part}" / f"amos_{number:04d}.nii.gz", range(16), np.uint8)
            names = [f"./{kind}{part}/amos_{number:04d}.nii.gz" for kind in ("images", "labels")]
            listed[key].append(dict(zip(("image", "label"), names, strict=True)))
    volume(folder / "imagesTs" / "amos_0002.nii.gz", 2)
    (folder / "dataset.json").write_text(json.dumps(listed))
    return folder


def male_pelvic(root: Path, institutions=None) -> Path:
    """Cases by institution; the first digits are the case's place in institution.txt, to be told from its name."""
    institutions = institutions or {"1": 12, "2": 8}
    number, lines = 900, []
    for institution, count in institutions.items():
        for _ in range(count):
            volume(root / "data" / f"{number:06d}_img.nii", number)
            label_map(root / "data" / f"{number:06d}_mask.nii", range(9), np.float32)
            lines.append(f"{number:06d} {institution}")
            number -= 1
    (root / "institution.txt").write_text("\n".join(lines) + "\n")
    return root


def brats(root: Path, numbers=range(0, 24, 2)) -> Path:
    for number in numbers:
        name = f"BraTS2021_{number:05d}"
        for channel, kind in enumerate(("t1", "t1ce", "t2", "flair")):
            volume(root / name / f"{name}_{kind}.nii.gz", 10 * number + channel)
        label_map(root / name / f"{name}_seg.nii.gz", (0, 1, 2, 4), np.uint8)
    return root


def synapse(root: Path) -> Path:
    folder = root / "RawData" / "Training"
    for number in (*range(1, 11), *range(21, 41)):
        volume(folder / "img" / f"img{number:04d}.nii.gz", number)
        label_map(folder / "label" / f"label{number:04d}.nii.gz", range(14), np.float64)
    volume(root / "RawData" / "Testing" / "img" / "img0061.nii.gz", 61)
    return folder


def kvasir(root: Path, count: int = 20) -> Path:
    folder = root / "Kvasir-SEG"
    for number in range(count):
        rgb(folder / "images" / f"cju{number:02d}abc.jpg", 5 * number, (8, 16))
        mask(folder / "masks" / f"cju{number:02d}abc.jpg", rows=4, shape=(8, 16))
    (folder / "kavsir_bboxes.json").write_text("{}")
    return folder


def cvc(root: Path, count: int = 12) -> Path:
    folder = root / "CVC-ClinicDB"
    for number in range(1, count + 1):
        rgb(folder / "Original" / f"{number}.tif", number)
        mask(folder / "Ground Truth" / f"{number}.tif")
    return folder


def drive(root: Path, test_labels: bool = True) -> Path:
    folder = root / "DRIVE"
    for part, numbers in {"training": range(21, 41), "test": range(1, 21)}.items():
        for number in numbers:
            rgb(folder / part / "images" / f"{number:02d}_{part}.tif", number)
            mask(folder / part / "mask" / f"{number:02d}_{part}_mask.gif", rows=5)
            if part == "training" or test_labels:
                mask(folder / part / "1st_manual" / f"{number:02d}_manual1.gif", rows=2)
    return folder


def chase(root: Path) -> Path:
    for child in range(1, 15):
        for eye in "LR":
            rgb(root / f"Image_{child:02d}{eye}.jpg", child)
            mask(root / f"Image_{child:02d}{eye}_1stHO.png", rows=1)
            mask(root / f"Image_{child:02d}{eye}_2ndHO.png", rows=4)
    return root


def empty(folder: Path, names) -> None:
    """Files without content, for what only looks at names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def snapshot(folder: Path) -> dict[str, bytes]:
    """Contents of all files of a folder by name, and of its empty folders."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
