"""Worker processes that do not outlive the process that started them, and arrays on their way to and from them."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection, wait

import numpy as np

PIECE = 2**26  # bytes of an array that go through a pipe at once, so that it is not there twice


def end_with_parent() -> None:
    """Called in a worker: it ends when its parent does, also when that is killed; Ctrl-C is left to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_watch, args=(parent.sentinel,), daemon=True).start()


def _watch(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)  # whatever the worker is doing: nobody waits for it, and the next command may work in its folder


def send_array(pipe: Connection, array: np.ndarray) -> None:
    """Send an array without a copy of it; of plain numbers."""
    shape, array = array.shape, np.ascontiguousarray(array)
    pipe.send((shape, array.dtype.str))
    view = memoryview(array.reshape(-1)).cast("B") if array.size else memoryview(b"")
    for start in range(0, len(view), PIECE):
        pipe.send_bytes(view[start : start + PIECE])


def receive_array(pipe: Connection) -> np.ndarray:
    """An array of ``send_array``.

    Raises:
        EOFError: the sender is gone.
    """
    shape, kind = pipe.recv()
    array = np.empty(shape, np.dtype(kind))
    view = memoryview(array.reshape(-1)).cast("B") if array.size else memoryview(b"")
    start = 0
    while start < len(view):
        start += pipe.recv_bytes_into(view[start:])
    return array
