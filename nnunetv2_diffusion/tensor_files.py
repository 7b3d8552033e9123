"""Reading PyTorch's files without running code from them, with reasons of our own: PyTorch's advise to run it."""

import re
import threading
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunetv2_diffusion.out_of_memory import is_out_of_memory

_ALLOWING = threading.Lock()  # PyTorch's list of allowed types is one for all threads, and each would empty it
DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.bool,
)  # fmt: skip


class TensorFileError(ValueError):
    """A file is damaged, or holds more than tensors and plain data."""


def read_tensor_file(path: str | Path, mmap: bool = False) -> Any:
    """Content of a file of ``torch.save``, if it is tensors and plain data alone.

    Args:
        path: the file.
        mmap: tensors stay on disk until they are used; not for files of PyTorch before 1.6.

    Raises:
        TensorFileError: naming the file and why it was not loaded, or the checkpoint that lies within a folder.
        OSError: if it cannot be opened.
    """
    if Path(path).is_dir():
        inside = sorted(file.relative_to(path).as_posix() for file in Path(path).glob("**/*.pth"))
        hint = f"; {inside[0]} lies within it" if inside else ""
        raise TensorFileError(f"{path}: a folder, expected the file of a checkpoint{hint}")
    with Path(path).open("rb") as file:  # PyTorch's own message of a closed file is of its reader
        start = file.read(2)
    try:
        with nnunet_types(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that are refused below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file can end in nearly any error of the unpickler
        # without its cause: a traceback would show PyTorch's advice
        raise TensorFileError(f"{path}: {_reason(error, Path(path), start)}") from None


@contextmanager
def nnunet_types() -> Iterator[None]:
    """Let ``torch.load(weights_only=True)`` read what nnU-Net stores beyond tensors and plain types."""
    with _ALLOWING, torch.serialization.safe_globals(_safe_types()):
        yield


def _safe_types() -> list:
    """What nnU-Net stores in a checkpoint beyond tensors and plain types: numpy scalars of its log."""
    scalar = type(np.float64(0)).__reduce__(np.float64(0))[0]  # numpy's reconstructor, whose module moved in numpy 2
    names = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar")
    dtypes = [type(np.dtype(t)) for t in (np.float16, np.float32, np.float64, np.int32, np.int64, bool)]
    return [*[(scalar, name) for name in names], np.dtype, *dtypes]


def _reason(error: Exception, path: Path, start: bytes) -> str:
    """Why a file was not loaded, in words of our own; nothing is quoted but the name of a class."""
    if is_out_of_memory(error):
        return "too little memory to read it; the file itself may be in order"
    foreign = re.search(r"(?:GLOBAL|Unsupported class|[Uu]nsupported type) ([A-Za-z_][\w.]{0,100})", str(error))
    if foreign:
        return f"it holds {foreign[1]}, which is no tensor or plain data; it was not loaded"
    if start == b"PK" and not zipfile.is_zipfile(path):
        return "damaged, the file is cut off; it was not loaded"
    return "damaged, or no file of PyTorch's; it was not loaded"


def check_tensor(name: str, value: Any) -> str | None:
    """What is wrong with a weight of a file: None if it is a dense tensor of finite numbers, all of them stored.

    A view can claim any size on top of a single number: it is refused before memory is asked for.
    """
    if not isinstance(value, torch.Tensor):
        return f"{name} is {type(value).__name__}, expected a tensor"
    if value.layout != torch.strided or value.device.type != "cpu" or value.dtype not in DTYPES:
        return f"{name} is not a dense tensor of a known kind of numbers"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"{name} has shape {tuple(value.shape)}, but fewer numbers are stored"
    if value.is_floating_point() and not torch.isfinite(value).all():
        return f"{name} holds NaN or infinite numbers"
    return None
