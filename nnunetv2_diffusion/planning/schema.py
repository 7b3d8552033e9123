"""Dataclasses of settings: types, ranges and choices in one line each, and errors that name what was expected."""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, field, fields
from typing import Any, TypeVar

S = TypeVar("S", bound="Settings")


class SettingsError(ValueError):
    """A setting is unknown or has a value that cannot be used."""


def setting(default: Any, doc: str, *, choices: tuple = (), low: Any = None, high: Any = None) -> Any:
    """A field with its default, its meaning, and the values that it may have; numbers have both a low and a high."""
    if isinstance(default, int | float) and not isinstance(default, bool) and None in (low, high):
        raise TypeError(f"a number without bounds: {doc}")
    return field(default=default, metadata={"doc": doc, "choices": choices, "low": low, "high": high})


class Settings:
    """Base of frozen dataclasses of settings; every field is checked when an object is made."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if "choices" in f.metadata:  # others are settings themselves
                _check_value(f.name, getattr(self, f.name), f.type, f.metadata)

    def to_dict(self) -> dict[str, Any]:
        """As stored in plans."""
        return asdict(self)


def _check_value(name: str, value: Any, annotation: Any, meta: Mapping[str, Any]) -> None:
    """Raise SettingsError unless value has the field's type and lies in its range."""
    optional = "None" in str(annotation)
    if value is None and optional:
        return
    kind = next(k for k in (bool, int, float, str) if k.__name__ in str(annotation))
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not fits or (isinstance(value, bool) and kind is not bool):
        wanted = f"{kind.__name__}{' or null' if optional else ''}"
        raise SettingsError(f"{name} is {_short(value)}, expected {wanted}")
    if meta["choices"] and value not in meta["choices"]:
        raise SettingsError(f"{name} is {_short(value)}, expected one of {', '.join(meta['choices'])}")
    low, high = meta["low"], meta["high"]
    if low is not None and not low <= value <= high:  # neither is NaN
        raise SettingsError(f"{name} is {_short(value)}, expected a value in [{low}, {high}]")


def _short(value: Any) -> str:
    """A value for a message, shortened if it is long; Python does not print integers of thousands of digits."""
    if isinstance(value, int) and abs(value) > 10**50:
        return "an integer of more than 50 digits"
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def parse(cls: type[S], section: Mapping[str, Any] | None, where: str, path: str) -> S:
    """Validate a mapping of settings.

    Args:
        cls: dataclass of settings.
        section: the mapping found; None for all defaults.
        where: file or configuration, for errors.
        path: name of the section, for errors.

    Raises:
        SettingsError: for an unknown key (naming the nearest known one) or a value that cannot be used.
    """
    section = {} if section is None else section
    if not isinstance(section, Mapping):
        raise SettingsError(f"{where}: {path} is {_short(section)}, expected a mapping of settings")
    known = [f.name for f in fields(cls)]
    for key in section:
        if key not in known:
            near = difflib.get_close_matches(str(key)[:100], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise SettingsError(f"{where}: unknown setting {_short(key)} in {path}; {hint}")
    try:
        return cls(**section)
    except SettingsError as error:
        raise SettingsError(f"{where}: in {path}, {error}") from None
