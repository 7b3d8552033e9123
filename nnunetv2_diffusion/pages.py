"""Files that commands write whole, and pages that they make again."""

import os
from pathlib import Path


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; one that exists is replaced."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, file)


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
