"""The page of all measurements: tables from the JSONs alone, the same for the same files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from laboratory.benchmarking import report
from laboratory.benchmarking.memory import MEMORY_COLUMNS
from laboratory.benchmarking.problem import BenchmarkError, read_json
from laboratory.benchmarking.report import Columns, Target
from laboratory.benchmarking.startup import STARTUP_COLUMNS
from nnunetv2_diffusion.evaluation.tables import Table, to_markdown
from nnunetv2_diffusion.pages import check_page, write_whole

MARK = "<!-- made by scripts/benchmark page from the JSONs; do not edit -->"
EXPECTED = "expected a JSON of scripts/benchmark or scripts/memory_table"
KEYS = ("schema", "settings", "hardware", "versions", "results")
CLOCKS = {"wall": "wall", "cpu": "processor time of the process", None: "nothing is timed"}
MEMORY = "memory"
Rows = tuple[Sequence[str], list[list[str]]]


@dataclass(frozen=True)
class Kind:
    """A subcommand, or ``scripts/memory_table``.

    Attributes:
        title: of its section.
        measured: one sentence.
        command: that makes its JSONs.
        rows: makes heads and rows of the table from results.
    """

    title: str
    measured: str
    command: str
    rows: Callable[[list[dict]], Rows]


@dataclass(frozen=True)
class Run:
    """A JSON.

    Attributes:
        file: its name.
        kind: key of ``KINDS``.
        content: as read.
    """

    file: str
    kind: str
    content: dict[str, Any]


def _by(columns: Columns) -> Callable[[list[dict]], Rows]:
    return lambda results: ([name for name, _ in columns], report.cells(columns, results))


def _variant_rows(results: list[dict]) -> Rows:
    from laboratory.benchmarking.variants import variant_rows  # imports nnU-Net, which takes seconds

    return variant_rows(results)


COUNT_COLUMNS: Columns = [
    ("parameters", lambda r: f"{r['parameters']:,}"),
    ("binary", lambda r: f"{r['binary_parameters']:,}"),
    ("GMAC, real", lambda r: f"{r['macs'] / 1e9:.2f}"),
    ("binary", lambda r: f"{r['binary_macs'] / 1e9:.2f}"),
    ("MiB in float32", lambda r: f"{r['storage_bytes'] / 2**20:.1f}"),
    ("with 1-bit weights", lambda r: f"{r['packed_bytes'] / 2**20:.1f}"),
    ("peak memory", report.memory_cell),
]

KINDS = {
    "train-step": Kind(
        "Training step",
        "One call of nnU-Net's `train_step`, loss and update included, on the same batches for all trainers.",
        "scripts/benchmark train-step",
        _by(report.TRAIN_COLUMNS),
    ),
    "predict": Kind(
        "Prediction",
        "One call `network(image)` as nnU-Net's predictor makes it, with K denoising steps.",
        "scripts/benchmark predict",
        _by(report.PREDICT_COLUMNS),
    ),
    "refiner": Kind(
        "Refiner",
        "One pass of HiDiff's segmentor, and one refinement step, real-valued and binarised; operations and sizes are "
        "counts.",
        "scripts/benchmark refiner",
        _by([*report.REFINER_COLUMNS, *COUNT_COLUMNS]),
    ),
    "classes": Kind(
        "Classes",
        "A training step with more and more classes, for every mask encoding.",
        "scripts/benchmark classes",
        _by(report.CLASS_COLUMNS),
    ),
    MEMORY: Kind(
        "Memory",
        "What the planners estimate for a training step beside what it takes: bytes saved for the backward pass, and "
        "the most that is allocated at a time.",
        "scripts/memory_table",
        _by(MEMORY_COLUMNS),
    ),
    "startup": Kind(
        "Start",
        "Whole processes, from their start to their end, with nnU-Net as installed and with the files of this package "
        "in its folders.",
        "scripts/benchmark startup",
        _by(STARTUP_COLUMNS),
    ),
    "variants": Kind(
        "Steps taken",
        "A training step with one thing changed: what was expected before, what was measured, what was decided.",
        "scripts/benchmark variants",
        _variant_rows,
    ),
}


def read_runs(folder: Path) -> list[Run]:
    """All JSONs of a folder, by name.

    Raises:
        BenchmarkError: if there are none, or one is not of the benchmark; the message names it.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise BenchmarkError(f"{folder}: found no file *.json, {EXPECTED}")
    return [_read_run(file) for file in files]


def _read_run(file: Path) -> Run:
    content = read_json(file, ())
    for key in KEYS:
        if not isinstance(content, dict) or key not in content:
            raise BenchmarkError(f"{file}: no key {key!r}, {EXPECTED}")
    if content["schema"] != report.SCHEMA:
        raise BenchmarkError(f"{file}: schema is {content['schema']!r}, expected {report.SCHEMA}")
    results = content["results"]
    if not isinstance(results, list) or not results or not all(isinstance(result, dict) for result in results):
        raise BenchmarkError(f"{file}: no list of results, {EXPECTED}")
    command = content.get("command")
    kind = MEMORY if command is None and "saved_estimate" in results[0] else _subcommand(command)
    if kind is None:
        raise BenchmarkError(f"{file}: command is {command!r}, {EXPECTED}")
    return Run(file.name, kind, content)


def _subcommand(command: Any) -> str | None:
    """Key of ``KINDS``, None for another command."""
    words = command.split() if isinstance(command, str) else []
    kind = words[1] if len(words) > 1 and words[0] == "scripts/benchmark" else None
    return kind if kind in KINDS and kind != MEMORY else None


def build_page(runs: list[Run], folder: str) -> str:
    """The page in Markdown.

    Args:
        runs: see ``read_runs``.
        folder: of the JSONs, as seen from the page.

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
        targets = [Target(t["name"], t["limit"], t["value"]) for t in run.content.get("targets", [])]
        lines = [*_table(*KINDS[run.kind].rows(run.content["results"])), ""]
        if targets:
            rows = [[t.name, f"{t.limit:g}", _value(t), t.verdict] for t in targets]
            lines += [*_table(["target", "at most", "measured", "verdict"], rows), ""]
        return [*lines, *_facts(run), f"- JSON: [{run.file}]({folder}/{run.file})"]
    except KeyError as error:
        raise BenchmarkError(f"{run.file}: no key {error}, expected what {KINDS[run.kind].command} writes") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise BenchmarkError(f"{run.file}: {error}, expected what {KINDS[run.kind].command} writes") from error


def _value(target: Target) -> str:
    return "-" if target.value is None else f"{target.value:.3f}"


def _table(heads: Sequence[str], rows: list[list[str]]) -> list[str]:
    """Lines of Markdown, without a title."""
    return to_markdown(Table("", heads, rows)).splitlines()[2:]


def _facts(run: Run) -> list[str]:
    """What was run, where, with which versions."""
    settings, hardware = run.content["settings"], run.content["hardware"]
    clock = CLOCKS[settings.get("clock")]
    if run.kind == "startup" and settings["clock"] == "cpu":
        clock = "processor time of the processes"
    network = [f"- Network: {report.describe_network(settings['problem'])}."] if "problem" in settings else []
    versions = ", ".join(f"{name} {version}" for name, version in run.content["versions"].items())
    return [
        f"- Command: `{run.content.get('command') or _memory_command(settings)}`",
        *network,
        f"- Hardware: {_hardware(hardware)}.",
        f"- Clock: {clock}.",
        f"- Versions: {versions}.",
    ]


def _hardware(hardware: dict[str, Any]) -> str:
    gpu = hardware["gpu"] or "no GPU"
    return f"{gpu}, {hardware['cpus']} cores of {hardware['cpu']}, {hardware['threads']} threads ({hardware['device']})"


def _memory_command(settings: dict[str, Any]) -> str:
    """The command of ``scripts/memory_table``, whose JSON has the settings only."""
    words = [KINDS[MEMORY].command]
    for name, value in settings.items():
        if name != "compiled":  # by nnU-Net's variable, not by an option
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return " ".join(words)


def write_page(file: Path, page: str) -> None:
    """Write a page that is new, or was made here before; whole or not at all.

    Raises:
        BenchmarkError: if another file is there, or it cannot be written.
    """
    try:
        check_page(file, MARK, "scripts/benchmark page")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, page)
    except FileExistsError as error:
        raise BenchmarkError(str(error)) from error
    except OSError as error:
        raise BenchmarkError(f"{file}: cannot be written ({error}), expected a page in Markdown") from error
