"""Small images of every kind that nnU-Net's readers know, odd headers and damaged files; all made from a seed."""

import json
import math
import struct
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk  # noqa: N813, its usual name
import tifffile
from skimage import io

SHAPE = (5, 7, 6)  # z, y, x
ENDING = {
    "SimpleITKIO": ".nii.gz",
    "SimpleITKIOWithReorient": ".nii.gz",
    "NibabelIO": ".nii.gz",
    "NibabelIOWithReorient": ".nii.gz",
    "NaturalImage2DIO": ".png",
    "Tiff3DIO": ".tif",
}


def volume(seed=0, shape=SHAPE):
    """Smooth, without zeros: nothing is cropped."""
    return np.random.default_rng(seed).uniform(10, 200, shape).astype(np.float32)


def affines():
    """Headers by name, as (x, y, z) -> mm in NIfTI's convention."""
    c, s = math.cos(0.3), math.sin(0.3)
    turned = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    odd = {
        "plain": np.diag([1.0, 1.2, 2.0]),
        "oblique": turned @ np.diag([0.7, 0.8, 2.5]),
        "sheared": np.array([[1.0, 0.3, 0], [0, 1, 0], [0, 0, 1.5]]),
        "flipped": np.diag([-1.0, 1.1, -2.0]),
        "permuted": np.array([[0, 0, 2.0], [1.0, 0, 0], [0, 1.3, 0]]),
        "tiny": np.diag([0.9, 0.9, 0.9]),
        "one_slice": np.diag([1.0, 1.0, 5.0]),
    }
    return {name: nibabel.affines.from_matvec(matrix, (11.0, -7.5, 3.25)) for name, matrix in odd.items()}


def write_nifti(file, array, affine, dtype=np.float32):
    """An array (z, y, x) or (y, x)."""
    nibabel.save(nibabel.Nifti1Image(array.T.astype(dtype), affine), file)
    return file


def write_itk(file, array, colours=False, compressed=True):
    """An array (z, y, x), or (z, y, x, C) with colours."""
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=colours), str(file), compressed)
    return file


def header_folder(folder: Path, name: str) -> Path:
    """One case, one channel, with one of the headers of ``affines``."""
    folder.mkdir(parents=True)
    shape = {"tiny": (1, 2, 1), "one_slice": (1, 7, 6)}.get(name, SHAPE)
    write_nifti(folder / "a_0000.nii.gz", volume(0, shape), affines()[name])
    return folder


def layouts(reader: str) -> list[str]:
    """Names of the ways in which channels are spread over files."""
    if reader == "NaturalImage2DIO":
        return ["one_file", "four_in_one", "many_files", "mixed", "two_sizes"]
    if reader == "Tiff3DIO":
        return ["one_file", "many_files", "with_spacing", "mixed", "two_sizes"]
    return ["one_file", "many_files", "mixed", "two_sizes", "two_spacings", "moved", "flat"]


def layout_folder(folder: Path, reader: str, layout: str) -> tuple[Path, int]:
    """A case "a" of one file with many channels, of many files or of both, and an ordinary "b".

    Returns the folder and how many channels a model has that fits.
    """
    folder.mkdir(parents=True)
    write = {"NaturalImage2DIO": _natural, "Tiff3DIO": _tiff}.get(reader, _nifti)
    return folder, write(folder, layout)


def _natural(folder: Path, layout: str) -> int:
    def save(name, colours, size=(9, 8)):
        shape = (*size, colours) if colours > 1 else size
        pixels = np.random.default_rng(len(name)).integers(1, 255, shape).astype(np.uint8)
        io.imsave(folder / name, pixels, check_contrast=False)

    files = {
        "one_file": {"a_0000.png": 3, "b_0000.png": 3},
        "four_in_one": {"a_0000.png": 4, "b_0000.png": 4},
        "many_files": {f"{c}_000{i}.png": 1 for c in "ab" for i in range(3)},
        "mixed": {"a_0000.png": 3, "a_0001.png": 1, "b_0000.png": 3},
        "two_sizes": {"a_0000.png": 1, "a_0001.png": 1, "b_0000.png": 1, "b_0001.png": 1},
    }[layout]
    for name, colours in files.items():
        save(name, colours, (9, 7) if layout == "two_sizes" and name == "a_0001.png" else (9, 8))
    return {"four_in_one": 4, "two_sizes": 2}.get(layout, 3)


def _tiff(folder: Path, layout: str) -> int:
    channels = 1 if layout == "with_spacing" else 2
    for case in "ab":
        if layout == "one_file":
            tifffile.imwrite(folder / f"{case}_0000.tif", np.stack([volume(0), volume(1)]), photometric="minisblack")
            continue
        for channel in range(channels):
            odd = case == "a" and channel == 1
            array = volume(channel, (4, 7, 6) if odd and layout == "two_sizes" else SHAPE)
            array = np.stack([array, array]) if odd and layout == "mixed" else array
            tifffile.imwrite(folder / f"{case}_000{channel}.tif", array, photometric="minisblack")
        if layout == "with_spacing":
            (folder / f"{case}.json").write_text(json.dumps({"spacing": [2.0, 1.0, 1.0]}))
    return channels


def _nifti(folder: Path, layout: str) -> int:
    affine = affines()["plain"]
    for case in "ab":
        if layout == "flat":
            write_itk(folder / f"{case}_0000.nii.gz", volume(0, (7, 6)))
            continue
        if layout == "one_file":
            write_itk(folder / f"{case}_0000.nii.gz", np.stack([volume(0), volume(1)]))
            continue
        for channel in range(2):
            odd = case == "a" and channel == 1
            array, place = volume(channel, (4, 7, 6) if odd and layout == "two_sizes" else SHAPE), affine.copy()
            if odd and layout == "two_spacings":
                place[2, 2] = 3.0
            if odd and layout == "moved":
                place[0, 3] += 0.01
            file = write_nifti(folder / f"{case}_000{channel}.nii.gz", array, place)
            if odd and layout == "mixed":
                write_itk(file, np.stack([array, array]))
    return 1 if layout == "flat" else 2


def cut_off(file: Path, part: float) -> Path:
    """Keep a part of a file."""
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * part)])
    return file


def edit_header(file: Path, offset: int, kind: str, *values: float) -> Path:
    """Change a field of an uncompressed NIfTI file."""
    content = bytearray(file.read_bytes())
    content[offset : offset + struct.calcsize(kind)] = struct.pack(kind, *values)
    file.write_bytes(content)
    return file
