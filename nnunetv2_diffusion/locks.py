"""One process at a time: a lock that ends with the process that holds it, however that ends."""

import errno
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: two processes at once are not noticed there
    fcntl = None

HELD = (errno.EACCES, errno.EAGAIN)
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
PATIENCE = 0.1  # seconds between two tries

_own: set[Path] = set()  # POSIX does not keep a process from locking a file twice


class LockedError(RuntimeError):
    """Another process holds the lock, or the lock cannot be made."""


@contextmanager
def locked(file: Path, what: str, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock file, which is removed at the end. Worker processes do not inherit the lock.

    The kernel frees the lock of a process that was killed, so what such a process left is taken over. On a file system
    without locks (and on Windows) there is a warning, and nothing is locked.

    Args:
        file: of the lock; its folder exists.
        what: that works here, "a prediction" for example, for the message.
        wait: seconds until another process's lock is an error.

    Raises:
        LockedError: naming the process that holds the lock, or why the file cannot be made.
    """
    key = file.parent.resolve() / file.name
    end = time.monotonic() + wait
    while (stream := _try_lock(file, key)) is None:
        if time.monotonic() >= end:
            pid = os.getpid() if key in _own else _pid(file)
            raise LockedError(f"{file.parent}: {what} works here already (process {pid or 'unknown'})")
        time.sleep(PATIENCE)
    _own.add(key)
    try:
        yield
    finally:
        _own.discard(key)
        with suppress(OSError):
            file.unlink()  # before it is freed: who waits for this file finds that it is gone and makes another
        stream.close()


def holder(file: Path) -> int | None:
    """Process that holds a lock file; None if nobody does, 0 if it is not known which one."""
    key = file.parent.resolve() / file.name
    if key in _own:
        return os.getpid()
    if fcntl is None or not file.is_file():
        return None
    try:
        with file.open("r+") as stream:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return _pid(file) or 0 if error.errno in HELD else None
    return None


def _pid(file: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(file.read_text())
    return None


def _try_lock(file: Path, key: Path) -> IO | None:
    """The open file, locked; None if somebody else has it."""
    if key in _own:
        return None
    try:
        stream = file.open("a+")
    except OSError as error:
        raise LockedError(f"{file.parent}: cannot be locked, {file.name} cannot be made ({error.strerror})") from error
    if not _lock(stream, file):
        stream.close()
        return None
    try:
        gone = not os.path.samestat(os.fstat(stream.fileno()), file.stat())
    except FileNotFoundError:
        gone = True
    if gone:  # removed by the process that held it before
        stream.close()
        return _try_lock(file, key)
    stream.truncate(0)
    stream.write(f"{os.getpid()}\n")
    stream.flush()
    return stream


def _lock(stream: IO, file: Path) -> bool:
    """Whether the lock could be taken; True where there are no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        if error.errno not in WITHOUT_LOCKS:
            raise LockedError(f"{file}: cannot be locked ({error.strerror})") from error
        warnings.warn(
            f"{file.parent}: this file system has no locks ({error.strerror}); do not start two commands in it at once",
            stacklevel=4,
        )
    return True
