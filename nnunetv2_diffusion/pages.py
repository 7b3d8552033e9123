"""Files that commands write whole, and pages that they make again."""

import os
from pathlib import Path


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; one that exists is replaced."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, file)


def to_disk(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk: a power cut may else leave an empty file."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_page(file: Path, mark: str, command: str) -> None:
    """Refuse to replace what a command did not make.

    Args:
        file: to be written.
        mark: first characters of every page of the command.
        command: for the message.

    Raises:
        FileExistsError: if another file is there.
    """
    if file.exists() and not file.read_bytes().startswith(mark.encode()):
        raise FileExistsError(f"{file} exists and was not made by {command}; it is not overwritten")
