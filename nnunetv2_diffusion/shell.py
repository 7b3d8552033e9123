"""Lines that a user can copy into a shell: a POSIX one, or PowerShell on Windows."""

import os
import shlex

WINDOWS = os.name == "nt"


def quote(text: str, windows: bool = WINDOWS) -> str:
    """One word."""
    return "'" + text.replace("'", "''") + "'" if windows else shlex.quote(text)


def set_line(name: str, value: str, windows: bool = WINDOWS) -> str:
    """Set an environment variable."""
    if windows:
        return f"$env:{name} = {quote(value, windows)}"
    return f"export {name}={quote(value, windows)}"


def prepend_line(name: str, folder: str, windows: bool = WINDOWS) -> str:
    """Set a variable to a folder, before the ones that it names already."""
    if windows:
        return f'$env:{name} = {quote(folder, windows)} + $(if ($env:{name}) {{ ";$env:{name}" }})'
    escaped = "".join(f"\\{c}" if c in '\\"$`' else c for c in folder)
    return f'export {name}="{escaped}${{{name}:+:${name}}}"'


def make_line(folder: str, windows: bool = WINDOWS) -> str:
    """Make a folder and those above it."""
    return f"{'mkdir' if windows else 'mkdir -p'} {quote(folder, windows)}"


def remove_empty_line(folder: str, windows: bool = WINDOWS) -> str:
    """Remove a tree of empty folders, and nothing else (PowerShell asks)."""
    if windows:
        return f"Remove-Item -Recurse -Confirm {quote(folder, windows)}"
    return f"find {quote(folder, windows)} -type d -empty -delete"


def copy_line(file: str, folder: str, windows: bool = WINDOWS) -> str:
    """Copy a file into a folder."""
    return f"cp {quote(file, windows)} {quote(folder, windows)}"
