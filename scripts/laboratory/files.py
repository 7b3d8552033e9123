"""Reading JSON files with a message that names the file."""

import json
from pathlib import Path
from typing import Any


def read_json(file: Path, error: type[Exception] = ValueError, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    """Content of a JSON file that holds an object.

    Args:
        file: to read.
        error: raised with a message that names the file, what was found and what was expected.
        keys: that it must have.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{file}: no such file") from None
    except OSError as reason:
        raise error(f"{file}: cannot be read ({reason.strerror}), expected a JSON file") from None
    except ValueError as reason:
        raise error(f"{file}: not JSON ({reason})") from None
    if not isinstance(content, dict):
        raise error(f"{file}: holds a {type(content).__name__}, expected an object")
    missing = [key for key in keys if key not in content]
    if missing:
        raise error(f"{file}: no key {missing[0]!r}, expected {', '.join(keys)}")
    return content
