"""Metrics of predictions, and their comparison."""

from collections.abc import Iterable

LISTED = 10  # names in a message


class EvaluationError(ValueError):
    """Files or options cannot be evaluated; the message names what was found and what was expected."""


def listed(names: Iterable[str]) -> str:
    """The first names of a list, and how many there are if not all of them are shown."""
    names = sorted(names)
    if not names:
        return "nothing"
    return ", ".join(names[:LISTED]) + (f", ... ({len(names)} in all)" if len(names) > LISTED else "")
