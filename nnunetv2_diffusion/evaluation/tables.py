"""One model of a table, written as text, Markdown, LaTeX or CSV."""

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nnunetv2_diffusion.files import write_all as write_new  # noqa: F401, the name that scripts import

MISSING = "n/a"
ENDINGS = {"text": ".txt", "markdown": ".md", "latex": ".tex", "csv": ".csv"}


def number(value: float | None, digits: int, sign: bool = False) -> str:
    """A number; what is undefined is said so."""
    if value is None or not np.isfinite(value):
        return MISSING
    return f"{value + 0.0:{'+' if sign else ''}.{digits}f}"  # no minus in front of zero


def p_value(p: float) -> str:
    """A p-value in four digits."""
    return "<0.0001" if p < 0.0001 else number(p, 4)


def mean_sd(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean ± standard deviation (n - 1) of the values that are numbers, and how many are if not all."""
    found = known(values)
    if not len(found):
        return MISSING
    sd = found.std(ddof=1) if len(found) > 1 else None
    text = f"{number(found.mean(), digits)} ± {number(sd, digits)}"
    return text if len(found) == len(values) else f"{text} ({len(found)} of {len(values)})"


def known(values: Iterable[float | None]) -> np.ndarray:
    """The values that are numbers, float64, (n,)."""
    found = np.array(list(values), np.float64)  # None becomes NaN
    return found[np.isfinite(found)]


@dataclass(frozen=True)
class Cell:
    """Text of a cell, and whether it is the best of its kind."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: one line.
        columns: their heads.
        rows: of as many cells; a str is a cell that is not marked.
        notes: sentences below the table.
        left: number of leading columns that are words, set left; the others are numbers, set right.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    notes: Sequence[str] = ()
    left: int = 1

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"row {number} has {len(row)} cells, expected {len(self.columns)}")

    def cells(self) -> list[list[Cell]]:
        """Rows of cells, their text on one line."""
        return [
            [Cell(_one_line(c.text), c.best) if isinstance(c, Cell) else Cell(_one_line(c)) for c in row]
            for row in self.rows
        ]


def to_text(table: Table) -> str:
    """Aligned columns; the best are followed by an asterisk."""
    cells = table.cells()
    marked = [any(row[index].best for row in cells) for index in range(len(table.columns))]
    rows = [
        [cell.text + (" *" if cell.best else "  ") * mark for cell, mark in zip(row, marked, strict=True)]
        for row in cells
    ]
    head = [name + "  " * mark for name, mark in zip(table.columns, marked, strict=True)]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [_aligned(row, widths, table.left) for row in (head, ["-" * width for width in widths], *rows)]
    return "\n".join([table.title, "", *lines, *(["", *table.notes] if table.notes else [])]) + "\n"


def to_markdown(table: Table) -> str:
    """A table of GitHub's Markdown; the best are bold."""
    rule = [":---" if index < table.left else "---:" for index in range(len(table.columns))]
    rows = [[_bold(_escape_markdown(cell.text), "**{}**", cell.best) for cell in row] for row in table.cells()]
    lines = [f"| {' | '.join(row)} |" for row in (list(map(_escape_markdown, table.columns)), rule, *rows)]
    notes = [f"- {_escape_markdown(note)}" for note in table.notes]
    return "\n".join([f"**{_escape_markdown(table.title)}**", "", *lines, *(["", *notes] if notes else [])]) + "\n"


def to_latex(table: Table) -> str:
    """A table environment for the package booktabs; the best are bold, notes are below."""
    rows = [[_bold(escape_latex(cell.text), r"\textbf{{{}}}", cell.best) for cell in row] for row in table.cells()]
    head, *body = [" & ".join(row) + r" \\" for row in (list(map(escape_latex, table.columns)), *rows)]
    notes = [r"\par\smallskip\footnotesize", *map(escape_latex, table.notes)] if table.notes else []
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_latex(table.title)}}}",
        rf"\begin{{tabular}}{{{'l' * table.left + 'r' * (len(table.columns) - table.left)}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        *notes,
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def to_csv(table: Table) -> str:
    """Heads and rows only: no title, marks or notes."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([list(table.columns), *([cell.text for cell in row] for row in table.cells())])
    return buffer.getvalue()


RENDERERS: Mapping[str, Callable[[Table], str]] = {
    "text": to_text,
    "markdown": to_markdown,
    "latex": to_latex,
    "csv": to_csv,
}

_LATEX = {
    **{character: "\\" + character for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # after \\, a bracket would be its argument
    "±": r"$\pm$",
    "†": r"$^{\dagger}$",
}


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it is; a minus in front of a number becomes the sign."""
    escaped = "".join(_LATEX.get(character, character) for character in text)
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", escaped)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _aligned(row: Sequence[str], widths: Sequence[int], left: int) -> str:
    cells = [
        text.ljust(width) if index < left else text.rjust(width)
        for index, (text, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _bold(text: str, pattern: str, best: bool) -> str:
    return pattern.format(text) if best else text


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|~#])", r"\\\1", text)
