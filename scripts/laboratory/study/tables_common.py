"""What all tables of a study share: how numbers are written, and rows from columns."""

from typing import Any

import numpy as np

LEVEL = 0.95  # of intervals
NONE = "-"


def rows_of(columns: dict[str, list]) -> list[dict[str, Any]]:
    """Columns of equal length as rows."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def mean_sd(values: np.ndarray, digits: int) -> str:
    """Mean ± standard deviation, and how many values are undefined."""
    known = values[np.isfinite(values)]
    left_out = len(values) - len(known)
    if not len(known):
        return NONE
    sd = f" ± {known.std(ddof=1):.{digits}f}" if len(known) > 1 else ""
    return f"{known.mean():.{digits}f}{sd}" + (f" (-{left_out})" if left_out else "")


def number(value: float, digits: int, sign: bool = False) -> str:
    """A number, "-" for none."""
    return NONE if not np.isfinite(value) else f"{value:{'+' if sign else ''}.{digits}f}"


def p_value(p: float) -> str:
    """A p-value in three digits."""
    return NONE if np.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def as_float(value: float | None) -> float:
    """NaN for what is not known."""
    return np.nan if value is None else value
