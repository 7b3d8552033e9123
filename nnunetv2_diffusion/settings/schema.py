"""Dataclasses of settings: types, ranges and choices in one line each, and errors that name what was expected."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar, get_args

S = TypeVar("S", bound="Settings")


class SettingsError(ValueError):
    """A setting is unknown or has a value that cannot be used."""


def setting(
    default: Any, doc: str, *, choices: tuple = (), low: Any = None, high: Any = None, earlier: bool = False
) -> Any:
    """A field with its default, its meaning, and the values that it may have; numbers have both a low and a high.

    Args:
        default: a tuple stands for a list of as many numbers, each within the bounds.
        doc: a sentence or less.
        choices: all values, if they are few.
        low: least number.
        high: largest number.
        earlier: plans of version 0.1 may set it, and it acts, but it is in no table and written only where it is set.
    """
    number = default[0] if isinstance(default, tuple) else default
    if isinstance(number, int | float) and not isinstance(number, bool) and None in (low, high):
        raise TypeError(f"a number without bounds: {doc}")
    return field(
        default=default, metadata={"doc": doc, "choices": choices, "low": low, "high": high, "earlier": earlier}
    )


def section(doc: str) -> dict[str, Any]:
    """What is known of a field that holds settings itself: whom they are for."""
    return {"doc": doc, "section": True}


@dataclass(frozen=True)
class Settings:
    """Base of frozen dataclasses of settings; every field is checked when an object is made."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if "section" not in f.metadata:
                _check_value(f.name, getattr(self, f.name), f.type, f.metadata)
                if isinstance(f.default, tuple):  # JSON has lists
                    object.__setattr__(self, f.name, tuple(getattr(self, f.name)))

    def to_dict(self, everything: bool = False) -> dict[str, Any]:
        """As stored in plans; with ``everything`` also what version 0.1 had, where it is at its default."""
        found: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Settings):
                found[f.name] = value.to_dict(everything)
            elif everything or not f.metadata["earlier"] or value != f.default:
                found[f.name] = list(value) if isinstance(value, tuple) else value
        return found


def documented(cls: type[Settings]) -> list[Field]:
    """Fields that a user is told of, sections excepted."""
    return [f for f in fields(cls) if "section" not in f.metadata and not f.metadata["earlier"]]


def _check_value(name: str, value: Any, annotation: Any, meta: Mapping[str, Any]) -> None:
    """Raise SettingsError unless value has the field's type and lies in its range."""
    parts = get_args(annotation) if str(annotation).startswith("tuple") else ()
    if parts:
        if not isinstance(value, list | tuple) or len(value) != len(parts):
            raise SettingsError(f"{name} is {_short(value)}, expected a list of {len(parts)} numbers")
        for entry, kind in zip(value, parts, strict=True):
            _check_value(f"one of {name} = {_short(list(value))}", entry, kind, meta)
        return
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
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_short, value[:5]))}{', ...' if len(value) > 5 else ''}]"
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def parse(cls: type[S], content: Mapping[str, Any] | None, where: str, path: str, others: Sequence[str] = ()) -> S:
    """Validate a mapping of settings.

    Args:
        cls: dataclass of settings.
        content: the mapping found; None for all defaults.
        where: file or configuration, for errors.
        path: name of the section, for errors.
        others: names of settings in other places, with their sections, that an unknown key may have meant.

    Raises:
        SettingsError: for an unknown key (naming the nearest known one) or a value that cannot be used.
    """
    content = {} if content is None else content
    if not isinstance(content, Mapping):
        raise SettingsError(f"{where}: {path} is {_short(content)}, expected a mapping of settings")
    known = {f.name: not f.metadata.get("earlier") for f in fields(cls)}
    for key in content:
        if key not in known:
            told = [name for name, shown in known.items() if shown]
            near = _nearest(str(key)[:100], told, others)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known are {', '.join(told)}"
            raise SettingsError(f"{where}: unknown setting {_short(key)} in {path}; {hint}")
    try:
        return cls(**content)
    except SettingsError as error:
        raise SettingsError(f"{where}: in {path}, {error}") from None


def _nearest(key: str, own: Sequence[str], others: Sequence[str]) -> list[str]:
    """Names whose last part is most like a key's; one in its own section goes before those in others."""
    ends = sorted({name.rpartition(".")[2] for name in (*own, *others)})
    near = difflib.get_close_matches(key, ends, n=1)
    if not near or near[0] in own:
        return near
    return [name for name in others if name.rpartition(".")[2] == near[0]]
