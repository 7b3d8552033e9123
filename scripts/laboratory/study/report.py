"""The page of all studies: tables and figures from the JSONs alone, the same for the same files."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laboratory.study import StudyError
from laboratory.study.figures import training_curves
from laboratory.study.results import CellResults, StudyResults, load_results
from laboratory.study.tables import all_tables, test_table
from nnunetv2_diffusion.analysis.figures import to_png
from nnunetv2_diffusion.evaluation.tables import Table, to_markdown
from nnunetv2_diffusion.pages import check_page, write_whole

CURVES = "nnU-Net's pseudo Dice on validation patches by epoch, mean over runs."
MARK = "<!-- made by scripts/study report from the JSONs; do not edit -->"


def run(arguments: argparse.Namespace) -> int:
    """Write the page and its figures; 1 with a message if it cannot be done."""
    try:
        studies = load_results(arguments.results)
        file = arguments.o or arguments.results.resolve().parent / "report.md"
        page, figures = build(studies, file.stem)
        write_page(file, page, figures)
    except (StudyError, OSError) as error:
        print(f"scripts/study report: {error}", file=sys.stderr)
        return 1
    print(file)
    return 0


def build(studies: list[StudyResults], stem: str) -> tuple[str, dict[str, bytes]]:
    """The page in Markdown, and its figures: PNGs by their path from the page, below a folder named as its ``stem``."""
    figures: dict[str, bytes] = {}
    parts = [MARK, "# Results", ""]
    parts += ["All numbers and figures come from the JSONs that `scripts/study run` writes, one for each training."]
    parts += ["", *[f"- [{study.name}](#{study.name.lower()})" for study in studies], ""]
    for study in studies:
        parts += _section(study, f"{stem}/figures/{study.name}", figures)
    return "\n".join(parts).rstrip() + "\n", figures


def write_page(file: Path, page: str, figures: Mapping[str, bytes]) -> None:
    """Write a page that is new, or was made here before; FileExistsError if another file is there."""
    check_page(file, MARK, "scripts/study report")
    for name, content in figures.items():
        write_whole(file.parent / name, content)
    write_whole(file, page)


def _markdown(table: Table) -> str:
    """Without its title, which is a heading or is not wanted."""
    return "\n".join(to_markdown(table).splitlines()[2:]) + "\n"


def _section(study: StudyResults, folder: str, figures: dict[str, bytes]) -> list[str]:
    """One study."""

    def curves(name: str, cells: list[CellResults]) -> list[str]:
        path = f"{folder}_{name}.png"
        figures[path] = to_png(training_curves(cells))
        return [f"![{CURVES}]({path})", "", f"*{CURVES}*", ""]

    lines = [f"## {study.name}", "", *_facts(study), ""]
    for table in all_tables(study):
        lines += [f"### {table.title}", "", _markdown(table)]
    lines += ["### Trainings", "", *curves("curves", study.cells)]
    for index, question in enumerate(study.content.get("questions", []), start=1):
        first, *others = [study.cell(name) for name in question["cells"]]
        present = [cell for cell in others if cell is not None]
        lines += [f"### {question['title']}", ""]
        if first is None or not present:
            lines += ["Not answered yet: the cells have no results.", ""]
            continue
        lines.append(_markdown(test_table(first, present, "Dice")))
        lines += curves(f"question_{index}_curves", [first, *present])
    return lines


def _facts(study: StudyResults) -> list[str]:
    """What was run, where, with which code."""
    records = study.records
    request, split = records[0]["request"], records[0]["split"]
    lines = [study.content["summary"], ""] if study.content.get("summary") else []
    lines += [
        f"- Data: {request['dataset']}, {request['configuration']}; {split['train']} cases trained on, {split['val']} "
        f"for nnU-Net's validation, {split['test']} test cases that no training saw.",
        f"- Hardware: {_different(records, _hardware)}.",
        f"- Versions: {_different(records, _versions)}.",
        f"- Code: {_different(records, _code)}.",
        "- nnU-Net seeds nothing: runs of the same cell differ by chance, and so do these numbers when all is run "
        "again.",
    ]
    unfinished = [name for name in study.content["cells"] if study.cell(name) is None]
    if unfinished:
        lines.append(f"- Without results so far: {', '.join(unfinished)}.")
    # an ensemble's attempts are those of its members, which are counted themselves
    trained = [record for record in records if not record["request"].get("ensemble")]
    again = sum(record["training"]["attempts"] > 1 for record in trained)
    if again:
        lines.append(f"- {again} of {len(trained)} trainings were interrupted and continued from nnU-Net's checkpoint.")
    return lines


def _different(records: list[dict[str, Any]], describe: Any) -> str:
    """All that records say, each once, with its number of trainings if there are several."""
    texts = [describe(record) for record in records]
    once = list(dict.fromkeys(texts))
    return once[0] if len(once) == 1 else "; ".join(f"{text} ({texts.count(text)} trainings)" for text in once)


def _hardware(record: dict[str, Any]) -> str:
    place = record["hardware"]
    cores = f"{place['cpus']} cores of {place['cpu']}"
    return f"{place['gpu']}, {cores}" if place["gpu"] else f"no GPU, {cores} ({place['device']})"


def _versions(record: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in record["versions"].items())


def _code(record: dict[str, Any]) -> str:
    code = record["code"]
    if code["commit"] is None:
        return f"no commit known, package {code['package_sha256']}"
    text = f"commit {code['commit'][:12]}"
    if code["dirty"]:
        text += " with changes that were not committed"
    return text + (", changed while it ran" if record.get("code_changed") else "")
