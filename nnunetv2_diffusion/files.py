"""Files that commands read and write: JSON with reasons, and everything whole or not at all."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

NAMED = 50  # characters of a file's name in that of its temporary file: both together must fit a file system


def read_json(file: Path, error: type[Exception] = ValueError, expected: str = "a JSON file") -> dict[str, Any]:
    """Content of a JSON file that holds a mapping.

    Args:
        file: to be read.
        error: that is raised.
        expected: what the file should be, for the message.

    Raises:
        error: naming the file, if it is missing, cannot be read, is no JSON or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{file}: no such file, expected {expected}") from None
    except OSError as reason:
        raise error(f"{file}: cannot be read ({reason.strerror}), expected {expected}") from None
    except (ValueError, RecursionError) as reason:
        raise error(f"{file}: not JSON ({str(reason).splitlines()[0]}), expected {expected}") from None
    if not isinstance(content, dict):
        raise error(f"{file}: holds {type(content).__name__}, expected a mapping: {expected}")
    return content


def read_json_if_any(file: Path) -> dict[str, Any] | None:
    """Content of a JSON file; None if it is missing or no mapping."""
    with suppress(ValueError):
        return read_json(file)
    return None


def json_ready(value: Any) -> Any:
    """The value with plain Python's types only: numbers and arrays of numpy and torch, paths and tuples converted.

    NaN and infinities, which JSON does not know, become None.
    """
    if isinstance(value, Mapping):
        return {str(key): json_ready(content) for key, content in value.items()}
    if hasattr(value, "tolist"):
        return json_ready(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [json_ready(content) for content in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def to_json(content: Any, indent: int = 2, sort_keys: bool = False) -> str:
    """JSON as its standard has it, of what ``json_ready`` makes of the content."""
    return json.dumps(json_ready(content), indent=indent, sort_keys=sort_keys, allow_nan=False)


def to_disk(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk: a power cut may else leave an empty file."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_target(file: Path, replace: bool = False, hint: str = "") -> None:
    """Look whether a file can be written, before the work for it is done.

    Args:
        file: to be written.
        replace: it may exist.
        hint: ends the message if it must not.

    Raises:
        FileExistsError: it exists.
        OSError: its folder is missing or cannot be written to.
    """
    if file.is_dir() or (file.exists() and not replace):
        raise FileExistsError(f"{file} exists; it is not overwritten{hint}")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file.parent} is no folder; make it, or name another file than {file.name}")
    try:
        part = _part(file)
        part.touch()
        part.unlink()
    except OSError as error:
        raise _named(error, file) from error


@contextmanager
def written_whole(file: Path, ending: str = "", alone: bool = False) -> Iterator[Path]:
    """A temporary name beside a file that becomes the file, once its content is on the disk, if the block succeeds.

    The folder is made if it is missing. If the block fails, the temporary file goes away and the file stays as it was.

    Args:
        file: to be written or replaced.
        ending: of both names, for writers that go by it.
        alone: no other process writes this file: what one left that was killed is replaced.

    Raises:
        OSError: of the same kind as one in the block, naming the file.
    """
    part = file.with_name(f"{file.name}.part") if alone else _part(file, ending)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield part
        to_disk(part)
        os.replace(part, file)
    except OSError as error:
        if "cannot be written" in str(error):  # of another file in the block
            raise
        raise _named(error, file) from error
    finally:
        with suppress(OSError):
            part.unlink()


def _part(file: Path, ending: str = "") -> Path:
    """A hidden name beside a file; not made by mkstemp, whose files others may not read."""
    return file.with_name(f".{file.name[:NAMED]}.{os.getpid()}.part{ending}")


def _named(error: OSError, file: Path) -> OSError:
    """An error with the file that was to be written."""
    if error.errno is None:
        return OSError(f"{file} cannot be written: {error}")
    return OSError(error.errno, f"cannot be written: {error.strerror}", str(file))


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file, text in UTF-8, whole or not at all; one that exists is replaced.

    Raises:
        OSError: it cannot be written; what was there is unchanged.
    """
    with written_whole(file) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(file: Path, content: Any) -> None:
    """Write ``to_json`` of a content as ``write_whole`` does."""
    write_whole(file, to_json(content))


def write_all(contents: Mapping[Path, str | bytes], replace: bool = False, hint: str = "") -> None:
    """Write several files: all of them, each whole, or none; those that are to be replaced may be one by one.

    Args:
        contents: file -> what it shall hold.
        replace: files may exist.
        hint: see ``check_target``.

    Raises:
        OSError: as ``check_target`` and ``write_whole``.
    """
    for file in contents:
        check_target(file, replace, hint)
    new = [file for file in contents if not file.exists()]
    try:
        with ExitStack() as stack:
            for file, content in contents.items():
                part = stack.enter_context(written_whole(file))
                part.write_bytes(content.encode() if isinstance(content, str) else content)
    except BaseException:
        for file in new:
            file.unlink(missing_ok=True)
        raise
