"""A small synthetic 3D data set in nnU-Net's raw layout."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter

SPACING = (1.0, 1.0, 1.5)  # mm
LABELS = {"background": 0, "organ": 1, "lesion": 2}


def make_phantom(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One image with an ellipsoid organ and a sphere inside it.

    Two vessels as bright as the organ, a bias field and noise keep thresholds from solving it.

    Returns:
        image, float32, arbitrary units; labels, uint8, 0 background, 1 organ, 2 lesion; about 40 voxels an axis.
    """
    shape = rng.integers((34, 34, 26), (43, 43, 33))
    grid = np.stack(np.meshgrid(*[np.arange(n, dtype=np.float32) for n in shape], indexing="ij"))
    centre = shape / 2 + rng.uniform(-4, 4, 3)
    radii = np.array([11, 9, 8]) * rng.uniform(0.8, 1.2, 3)
    # a smooth deformation, so that no two organs have the same surface
    warp = np.stack([gaussian_filter(rng.normal(size=shape), 4) for _ in range(3)]) * 60
    moved = grid + warp - centre[:, None, None, None]
    organ = ((moved / radii[:, None, None, None]) ** 2).sum(0) < 1
    lesion_centre = rng.uniform(-0.3, 0.3, 3) * radii
    distance = np.sqrt(((moved - lesion_centre[:, None, None, None]) ** 2).sum(0))
    lesion = organ & (distance < rng.uniform(4.5, 6))
    vessels = np.zeros(shape, dtype=bool)
    for _ in range(2):
        axis = rng.integers(0, 2)
        line = rng.uniform(4, shape - 4)
        offset = np.delete(grid - line[:, None, None, None], axis, axis=0)
        vessels |= (offset**2).sum(0) < rng.uniform(1.5, 2.5) ** 2
    image = 100 + 60 * (organ | vessels) - 45 * lesion
    image = gaussian_filter(image.astype(np.float32), 0.7)
    image *= 1 + 0.5 * gaussian_filter(rng.normal(size=shape), 10) * 30
    image += rng.normal(scale=12, size=shape)
    labels = organ.astype(np.uint8)
    labels[lesion] = LABELS["lesion"]
    return image.astype(np.float32), labels


def _save(array: np.ndarray, file: Path) -> None:
    nib.save(nib.Nifti1Image(array, np.diag([*SPACING, 1.0])), file)


def write_phantoms(folder: Path, train_cases: int, test_cases: int, seed: int) -> None:
    """Write a raw data set with imagesTr, labelsTr, imagesTs, labelsTs and dataset.json into a new folder.

    The same seed writes the same voxels. FileExistsError if the folder exists.
    """
    folder.mkdir(parents=True)
    parts = {"Tr": train_cases, "Ts": test_cases}
    for part in parts:
        (folder / f"images{part}").mkdir()
        (folder / f"labels{part}").mkdir()
    index = 0
    for part, count in parts.items():
        for _ in range(count):
            image, labels = make_phantom(np.random.default_rng((seed, index)))
            _save(image, folder / f"images{part}" / f"phantom_{index:03d}_0000.nii.gz")
            _save(labels, folder / f"labels{part}" / f"phantom_{index:03d}.nii.gz")
            index += 1
    dataset = {"channel_names": {"0": "MRI"}, "labels": LABELS, "numTraining": train_cases, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(dataset, indent=2))
