"""One table in four formats."""

import csv
import io
import shutil
import subprocess

import pytest

from nnunetv2_diffusion.evaluation.tables import RENDERERS, Cell, Table, escape_latex, to_csv

NASTY = 'a_b & 50% of $x #1 {y} ~ ^ \\ <z> | "q", *s* [t]'


@pytest.fixture
def table():
    rows = [["one", Cell("0.9 ± 0.1", best=True)], ["another", "-0.25"], [NASTY, ""]]
    return Table("Scores", ["method", "Dice"], rows, ["A note."])


def test_text_is_aligned_and_marks_the_best():
    table = Table("Scores", ["method", "Dice", "n"], [["one", Cell("0.9", best=True), "5"], ["longer", "0.85", "12"]])
    assert RENDERERS["text"](table).splitlines() == [
        "Scores",
        "",
        "method  Dice     n",
        "------  ------  --",
        "one      0.9 *   5",
        "longer  0.85    12",
    ]


def test_markdown_has_a_rule_bold_cells_and_notes(table):
    lines = RENDERERS["markdown"](table).splitlines()
    assert lines[:5] == ["**Scores**", "", "| method | Dice |", "| :--- | ---: |", "| one | **0.9 ± 0.1** |"]
    assert lines[-2:] == ["", "- A note."]


def test_markdown_cells_keep_to_their_columns(table):
    row = next(line for line in RENDERERS["markdown"](table).splitlines() if "50%" in line)
    assert row.replace("\\|", "").count("|") == 3
    assert "a\\_b" in row
    assert "\\*s\\*" in row


def test_latex_has_rules_bold_cells_and_notes(table):
    lines = RENDERERS["latex"](table).splitlines()
    assert r"\begin{tabular}{lr}" in lines
    assert r"one & \textbf{0.9 $\pm$ 0.1} \\" in lines
    assert r"another & $-$0.25 \\" in lines
    assert lines[-2:] == ["A note.", r"\end{table}"]
    assert sum(line.endswith(r"\\") for line in lines) == 4


def test_latex_escapes_all_special_characters():
    assert escape_latex("a_b & 50% $ # {y}") == r"a\_b \& 50\% \$ \# \{y\}"
    assert escape_latex("~^\\") == r"\textasciitilde{}\textasciicircum{}\textbackslash{}"
    assert escape_latex("p <0.1 † [-1, 2-3]") == r"p \textless{}0.1 $^{\dagger}$ {[}$-$1, 2-3]"


def test_latex_compiles(table, tmp_path):
    compiler = shutil.which("pdflatex")
    if compiler is None:
        pytest.skip("needs pdflatex")
    document = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n"
    (tmp_path / "t.tex").write_text(document + RENDERERS["latex"](table) + "\\end{document}\n", encoding="utf-8")
    subprocess.run([compiler, "-interaction=nonstopmode", "-halt-on-error", "t.tex"], cwd=tmp_path, check=True)


def test_csv_comes_back_as_it_was(table):
    assert list(csv.reader(io.StringIO(to_csv(table)))) == [
        ["method", "Dice"],
        ["one", "0.9 ± 0.1"],
        ["another", "-0.25"],
        [NASTY, ""],
    ]


@pytest.mark.parametrize("name", RENDERERS)
def test_cell_with_line_breaks_stays_in_its_row(name):
    def lines(text):
        return len(RENDERERS[name](Table("T", ["a"], [[text], ["last"]])).splitlines())

    assert lines("two\n\nlines\r") == lines("two lines")


@pytest.mark.parametrize("name", RENDERERS)
def test_table_without_rows_and_notes_has_its_head(name):
    assert "method" in RENDERERS[name](Table("T", ["method", "Dice"], []))


def test_row_of_other_length_is_refused():
    with pytest.raises(ValueError, match="row 1 has 1 cells, expected 2"):
        Table("T", ["a", "b"], [["1", "2"], ["3"]])
