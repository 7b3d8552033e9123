"""Checkpoints as files: written whole or not at all, told from half-written ones, and read without running code."""

import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nnunetv2_diffusion.checkpoints import CheckpointError, load_checkpoint_file
from nnunetv2_diffusion.files import to_disk, written_whole
from nnunetv2_diffusion.tensor_files import nnunet_types

NAMES = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")  # nnU-Net's
FORCE, FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # PyTorch's switches


def write_whole(file: str | Path, write: Callable[[str], None]) -> None:
    """Write a file beside its place, to the disk, then move it there: whoever is interrupted leaves the old one whole.

    Args:
        file: to be written or replaced.
        write: given a name in the same folder.

    Raises:
        CheckpointError: if it cannot be written, for example because the disk is full; what was there is unchanged.
    """
    file = Path(file)
    before = "the one from before is unchanged" if file.exists() else "no part of it was kept"
    try:
        with written_whole(file, alone=True) as part:
            write(str(part))
        if os.name == "posix":  # elsewhere folders cannot be opened
            to_disk(file.parent)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter when a disk is full
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{file}: could not be written, {before} ({reason}). Make room on that disk and continue with --c"
        ) from error


def is_whole(file: str | Path) -> bool:
    """The file was written to its end: checkpoints are zip archives, whose list of contents comes last.

    A file that is not there is not whole.
    """
    try:
        with zipfile.ZipFile(file):
            return True
    except (zipfile.BadZipFile, FileNotFoundError, IsADirectoryError):
        return False


def newest_whole(folder: str | Path, names: tuple[str, ...] = NAMES) -> tuple[Path, int] | None:
    """The whole checkpoint of a fold that is trained longest, and its number of finished epochs; None if none is."""
    found = []
    for file in (Path(folder) / name for name in names):
        if is_whole(file):
            try:
                found.append((int(load_checkpoint_file(file)["current_epoch"]), file))
            except (CheckpointError, KeyError, TypeError, ValueError):
                continue  # whole, but not nnU-Net's
    epoch, file = max(found, default=(0, None), key=lambda pair: pair[0])
    return None if file is None else (file, epoch)


def whole_neighbour(file: str | Path) -> Path | None:
    """The newest whole checkpoint beside one that was cut off; None if this one is whole, or none is."""
    file = Path(file)
    if is_whole(file):
        return None
    found = newest_whole(file.parent, tuple(name for name in NAMES if name != file.name))
    return found[0] if found else None


@contextmanager
def weights_only() -> Iterator[None]:
    """Let every ``torch.load`` in here read tensors and plain data only, also one that says ``weights_only=False``."""
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORBID)}
    os.environ[FORCE] = "1"
    try:
        with nnunet_types():
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
