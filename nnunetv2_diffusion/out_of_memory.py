"""Whether an error comes from too little memory; libraries say it in many ways, or not at all."""

import errno
import mmap

WORDS = ("allocate memory", "unable to mmap", "not enough memory", "out of memory", "failed to map segment")
PROBE = 256 * 2**20  # bytes; the largest libraries that are loaded are of this size


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that memory is short."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if isinstance(error, RuntimeError | ImportError | OSError) and any(w in str(error).lower() for w in WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_memory_short() -> bool:
    """Whether this process cannot get as much memory as a library takes, for example because of a limit (ulimit -v).

    A library that cannot be loaded for this reason often only lacks names later.
    """
    try:
        mmap.mmap(-1, PROBE).close()
    except (OSError, MemoryError):
        return True
    return False
