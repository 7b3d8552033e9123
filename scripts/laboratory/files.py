"""JSON files that must have some keys."""

from pathlib import Path
from typing import Any

from nnunetv2_diffusion.files import read_json


def read_keys(file: Path, error: type[Exception], keys: tuple[str, ...], expected: str = "") -> dict[str, Any]:
    """Content of a JSON file that holds an object with these keys; else the error names file and key."""
    content = read_json(file, error, expected or "a JSON file")
    missing = [key for key in keys if key not in content]
    if missing:
        raise error(f"{file}: no key {missing[0]!r}, expected {expected or ', '.join(keys)}")
    return content
