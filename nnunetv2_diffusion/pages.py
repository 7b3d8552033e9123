"""Pages that commands make again."""

from pathlib import Path

from nnunetv2_diffusion.files import to_disk, write_whole

__all__ = ["check_page", "to_disk", "write_whole"]


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
