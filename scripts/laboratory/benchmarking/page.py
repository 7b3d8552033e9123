"""The page of all measurements: tables from the JSONs alone, the same for the same files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from laboratory.benchmarking import report
from laboratory.benchmarking.problem import BenchmarkError
from laboratory.benchmarking.report import Columns
from laboratory.files import read_keys
from nnunetv2_diffusion.evaluation.tables import Table, to_markdown

MARK = "<!-- made by scripts/benchmark page from the JSONs; do not edit -->"
EXPECTED = "a JSON of scripts/benchmark or scripts/memory_table"
KEYS = ("schema", "settings", "hardware", "versions", "results")
CLOCKS = {"wall": "wall", "cpu": "processor time of the process", None: "nothing is timed"}
MEMORY = "memory"


@dataclass(frozen=True)
class Kind:
    """Title of a section, a sentence on what is measured, the command that makes its JSONs, and its columns."""

    title: str
    measured: str
    command: str
    columns: Columns


@dataclass(frozen=True)
class Run:
    """A JSON: name of its file, key of ``KINDS``, and its content."""

    file: str
    kind: str
    content: dict[str, Any]


KINDS = {
    "train-step": Kind(
        "Training step",
        "One call of nnU-Net's `train_step`, loss and update included, on the same batches for all trainers.",
        "scripts/benchmark train-step", report.TRAIN_COLUMNS,
    ),
    "predict": Kind(
        "Prediction", "One call `network(image)` as nnU-Net's predictor makes it, with K denoising steps.",
        "scripts/benchmark predict", report.PREDICT_COLUMNS,
    ),
    "refiner": Kind(
        "Refiner",
        "One pass of HiDiff's segmentor, and one refinement step, real-valued and binarised; operations and sizes are "
        "counts.", "scripts/benchmark refiner", [*report.REFINER_COLUMNS, *report.COUNT_COLUMNS],
    ),
    MEMORY: Kind(
        "Memory",
        "What the planners estimate for a training step beside what it takes: bytes saved for the backward pass, and "
        "the most that is allocated at a time.", "scripts/memory_table", report.MEMORY_COLUMNS,
    ),
}  # fmt: skip


def read_runs(folder: Path) -> list[Run]:
    """All JSONs of a folder, by name; BenchmarkError if there are none, or names one that is not of the benchmark."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise BenchmarkError(f"{folder}: found no file *.json, expected {EXPECTED}")
    return [_read_run(file) for file in files]


def _read_run(file: Path) -> Run:
    content = read_keys(file, BenchmarkError, KEYS, EXPECTED)
    if content["schema"] != report.SCHEMA:
        raise BenchmarkError(f"{file}: schema is {content['schema']!r}, expected {report.SCHEMA}")
    results = content["results"]
    if not isinstance(results, list) or not results or not all(isinstance(result, dict) for result in results):
        raise BenchmarkError(f"{file}: no list of results, expected {EXPECTED}")
    command = content.get("command")
    kind = next((name for name, kind in KINDS.items() if f"{command} ".startswith(f"{kind.command} ")), None)
    kind = MEMORY if command is None and "saved_estimate" in results[0] else kind
    if kind is None:
        raise BenchmarkError(f"{file}: command is {command!r}, expected {EXPECTED}")
    return Run(file.name, kind, content)


def build_page(runs: list[Run], folder: str) -> str:
    """The page in Markdown; ``folder`` is that of the JSONs, as seen from the page.

    Raises:
        BenchmarkError: if a JSON lacks something; the message names it.
    """
    lines = [MARK, "# Performance", ""]
    lines += ["All numbers come from the JSONs that `scripts/benchmark` and `scripts/memory_table` write. What is"]
    lines += ["compared takes turns, and a ratio is that of the same turn: median, smallest and largest.", ""]
    lines += [f"- [{kind.title}](#{kind.title.lower().replace(' ', '-')})" for kind in KINDS.values()]
    for name, kind in KINDS.items():
        lines += ["", f"## {kind.title}", "", kind.measured]
        of_kind = [run for run in runs if run.kind == name]
        if not of_kind:
            lines += ["", f"Not measured yet: `{kind.command} --json FILE`."]
        for run in of_kind:
            lines += ["", f"### {PurePath(run.file).stem}", "", *_subsection(run, PurePath(folder).as_posix())]
    return "\n".join(lines) + "\n"


def _subsection(run: Run, folder: str) -> list[str]:
    """Table, targets, and how and where it was measured."""
    try:
        targets = [report.target_row(target) for target in run.content.get("targets", [])]
        columns = KINDS[run.kind].columns
        heads, rows = [name for name, _ in columns], report.cells(columns, run.content["results"])
        lines = [*_table(heads, rows), ""]
        if targets:
            lines += [*_table(["target", "at most", "measured", "verdict"], targets), ""]
        return [*lines, *_facts(run), f"- JSON: [{run.file}]({folder}/{run.file})"]
    except KeyError as error:
        raise BenchmarkError(f"{run.file}: no key {error}, expected what {KINDS[run.kind].command} writes") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise BenchmarkError(f"{run.file}: {error}, expected what {KINDS[run.kind].command} writes") from error


def _table(heads: Sequence[str], rows: list[list[str]]) -> list[str]:
    """Lines of Markdown, without a title."""
    return to_markdown(Table("", heads, rows)).splitlines()[2:]


def _facts(run: Run) -> list[str]:
    """What was run, where, with which versions."""
    settings, place = run.content["settings"], run.content["hardware"]
    # an older JSON of scripts/memory_table has the settings only; compiling is no option of it
    options = {k: v for k, v in settings.items() if k != "compiled"}
    command = run.content.get("command") or report.spelled(KINDS[MEMORY].command, options)
    cores = f"{place['cpus']} cores of {place['cpu']}, {place['threads']} threads ({place['device']})"
    versions = ", ".join(f"{name} {version}" for name, version in run.content["versions"].items())
    return [
        f"- Command: `{command}`",
        *([f"- Network: {report.describe_network(settings['problem'])}."] if "problem" in settings else []),
        f"- Hardware: {place['gpu'] or 'no GPU'}, {cores}.",
        f"- Clock: {CLOCKS[settings.get('clock')]}.",
        f"- Versions: {versions}.",
    ]
