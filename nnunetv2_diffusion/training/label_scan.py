"""Which labels the cases of a data set hold: looked at once, and remembered beside the preprocessed data."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunetv2_diffusion.files import read_json_if_any, write_json

FILE = "label_scan.json"  # in the data set's folder: nnU-Net allows no other ending among the cases
ENDINGS = ("_seg.b2nd", "_seg.npy", ".npz")  # where nnU-Net's data sets look for a segmentation, in this order


def scan_labels(datasets: Iterable[Any], show_progress: bool, cache: Path | None = None) -> dict[str, set[int]]:
    """Distinct labels of every case.

    Args:
        datasets: nnU-Net's preprocessed data sets.
        show_progress: show a progress bar.
        cache: a file that remembers labels by name, time and size of the file that holds them; None, or a folder
            that cannot be written to, for none.

    Returns:
        case -> labels; -1 marks voxels outside of the cropped image.

    Raises:
        ValueError: a segmentation has colours, naming the case.
    """
    known = _read(cache)
    found, fresh = {}, {}
    cases = [(dataset, case) for dataset in datasets for case in dataset.identifiers]
    for dataset, case in tqdm(cases, desc="checking labels", disable=not show_progress, leave=False):
        key, stamp = _stamp(dataset, case)
        remembered = known.get(key) if key else None
        if remembered and remembered[:2] == stamp:
            found[case] = set(remembered[2])
            continue
        segmentation = dataset.load_case(case)[1]
        if len(segmentation) != 1:
            raise ValueError(
                f"case {case}: the segmentation has {len(segmentation)} channels, expected one, of labels. nnU-Net "
                "reads masks with a palette (PNG of mode P) as colours: save labelsTr as grey values "
                "(docs/start/install.md) and preprocess again."
            )
        found[case] = _label_values(segmentation)
        if key:
            fresh[key] = [*stamp, sorted(found[case])]
    if cache is not None and fresh:
        with suppress(OSError):  # a folder that is read only: the next start looks again
            write_json(cache, {**known, **fresh})
    return found


def _stamp(dataset: Any, case: str) -> tuple[str | None, list[int]]:
    """Name of the file that holds a segmentation, below the data set's folder, with its time and size."""
    folder = getattr(dataset, "source_folder", None)
    for file in () if folder is None else (Path(folder) / f"{case}{ending}" for ending in ENDINGS):
        if file.is_file():
            status = file.stat()
            return f"{file.parent.name}/{file.name}", [status.st_mtime_ns, status.st_size]
    return None, []


def _label_values(segmentation: Any) -> set[int]:
    """Distinct labels of a (1, *spatial) array that may lie on disk, slice by slice."""
    found: set[int] = set()
    for index in range(segmentation.shape[1]):
        values = np.asarray(segmentation[0, index]).astype(np.int64).ravel()
        low = int(values.min())
        found.update(int(v) + low for v in np.flatnonzero(np.bincount(values - low)))
    return found


def _read(cache: Path | None) -> dict[str, list]:
    """What is remembered; entries that cannot be are left out, and looked at again."""
    content = read_json_if_any(cache) if cache else None
    return {key: entry for key, entry in (content or {}).items() if _is_entry(entry)}


def _is_entry(entry: Any) -> bool:
    """[time, size, [labels]], all integers."""
    return (
        isinstance(entry, list)
        and len(entry) == 3
        and isinstance(entry[2], list)
        and all(type(n) is int for n in (*entry[:2], *entry[2]))
    )
