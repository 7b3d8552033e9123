"""The page of the measurements has the numbers of the JSONs, and the same JSONs make the same page."""

import json
import shutil
from pathlib import Path

import pytest

from laboratory.benchmarking import page
from laboratory.benchmarking.cli import main
from laboratory.benchmarking.problem import BenchmarkError

DOCS = Path(__file__).resolve().parents[3] / "docs"
JSONS = DOCS / "benchmarks"
SPREAD = {"median": 1.25, "mean": 1.3, "min": 1.125, "max": 1.5}
SECONDS = {**SPREAD, "rounds": [1.125, 1.25, 1.5]}


def steps(**changes):
    """A JSON of two trainers, one without memory, and targets of every verdict."""
    rows = [
        {"trainer": name, "seconds": SECONDS, "ratio": SPREAD, "parameters": 1500, "parameter_overhead": 0.5,
         "peak_memory_bytes": memory, "peak_memory_ratio": memory and 1.0}
        for name, memory in (("some_trainer", None), ("other_trainer", 2**30))
    ]  # fmt: skip
    hardware = {"device": "cpu", "name": "Some CPU", "cpu": "Some CPU", "cpus": 3, "threads": 1, "gpu": None,
                "gpu_memory_bytes": None}  # fmt: skip
    targets = [{"name": f"goal_{value}", "limit": 1.3, "value": value, "met": met}
               for value, met in ((1.25, True), (1.35, False), (None, None))]  # fmt: skip
    return {
        "schema": 1, "command": "scripts/benchmark train-step --rounds 3", "settings": {"rounds": 3, "clock": "cpu"},
        "hardware": hardware, "versions": {"python": "3.11", "torch": "2.6"}, "results": rows, "targets": targets,
        **changes,
    }  # fmt: skip


def write(folder, name, content):
    (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))


def built(folder):
    return page.build_page(page.read_runs(folder), "benchmarks")


def section(text, title):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_page_in_the_docs_is_what_its_jsons_make():
    made = page.build_page(page.read_runs(JSONS), JSONS.name)
    written = (DOCS / "performance.md").read_text(encoding="utf-8")
    assert written == made, "run: scripts/benchmark page docs/benchmarks"


def test_every_json_of_the_docs_has_its_part_in_the_section_of_its_kind():
    text = built(JSONS)
    for run in page.read_runs(JSONS):
        below = section(text, page.KINDS[run.kind].title).split(f"### {run.file[: -len('.json')]}\n")[1]
        part = below.split("\n### ")[0]
        assert f"(benchmarks/{run.file})" in part
        plain = part.replace("\\", "")  # Markdown's escapes
        assert all(target["name"] in plain for target in run.content.get("targets", []))


def test_a_row_a_result_with_place_and_verdicts(tmp_path):
    write(tmp_path, "some", steps())
    part = section(built(tmp_path), "Training step")
    assert "| some\\_trainer | 1.2500 | 1.25 (1.12-1.50) | 1.30 | 1,500 | 50.00 % | not measured |" in part
    assert "| other\\_trainer | 1.2500 | 1.25 (1.12-1.50) | 1.30 | 1,500 | 50.00 % | 1.00 GiB (1.000x) |" in part
    assert "| goal\\_1.25 | 1.3 | 1.250 | met |" in part
    assert "| goal\\_1.35 | 1.3 | 1.350 | NOT met |" in part
    assert "| goal\\_None | 1.3 | - | not measured |" in part
    assert "- Command: `scripts/benchmark train-step --rounds 3`" in part
    assert "no GPU, 3 cores of Some CPU, 1 threads (cpu)" in part
    assert "Clock: processor time of the process" in part
    assert "python 3.11, torch 2.6" in part


def test_files_of_the_same_kind_stand_below_each_other_by_name(tmp_path):
    for name in ("second", "first"):
        write(tmp_path, name, steps())
    part = section(built(tmp_path), "Training step")
    assert [line for line in part.splitlines() if line.startswith("### ")] == ["### first", "### second"]


def test_what_was_not_measured_is_told_with_its_command(tmp_path):
    write(tmp_path, "some", steps())
    text = built(tmp_path)
    for kind in page.KINDS.values():
        assert ("Not measured yet" in section(text, kind.title)) == (kind.title != "Training step")
    assert "`scripts/memory_table --json FILE`" in section(text, "Memory")


def test_memory_is_told_with_the_command_that_its_settings_make():
    part = section(built(JSONS), "Memory")
    assert "`scripts/memory_table --dims 2 3 --networks plain resenc --classes 2 3 16 104 " in part
    assert "--patch-2d 48 " in part
    assert "compiled" not in part
    row = json.loads((JSONS / "cpu_memory.json").read_text())["results"][0]
    assert f"| {row['plans']} | {row['classes']} | {row['subject']} | {row['saved_estimate'] / 2**20:.2f} |" in part


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "holds list, expected a mapping: a JSON of scripts/benchmark"),
        ("{}", "no key 'schema', expected a JSON of scripts/benchmark or scripts/memory_table"),
        ('{"schema": 1}', "no key 'settings', expected a JSON of"),
        (steps(schema=2), "schema is 2, expected 1"),
        (steps(results=[]), "no list of results"),
        (steps(command="scripts/study run"), "command is 'scripts/study run', expected a JSON of"),
        (steps(command="scripts/benchmark memory"), "command is 'scripts/benchmark memory'"),
        (steps(command=None), "command is None, expected a JSON of"),
        (steps(command="scripts/benchmark refiner"), "no key 'part', expected what scripts/benchmark refiner"),
        (steps(command="scripts/benchmark startup"), "command is 'scripts/benchmark startup', expected a JSON of"),
        (steps(results=[{**steps()["results"][0], "seconds": 3}]), "expected what scripts/benchmark train-step"),
    ],
)
def test_a_file_that_is_not_of_the_benchmark_is_named(tmp_path, capsys, content, message):
    folder = tmp_path / "jsons"
    folder.mkdir()
    write(folder, "a_good", steps())
    write(folder, "strange", content)
    with pytest.raises(SystemExit) as stopped:
        main(["page", str(folder), "-o", str(tmp_path / "page.md")])
    assert stopped.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "strange.json" in error
    assert message in error
    assert not (tmp_path / "page.md").exists()


def test_a_folder_without_files_is_refused(tmp_path):
    with pytest.raises(BenchmarkError, match="found no file"):
        page.read_runs(tmp_path / "nowhere")


def test_the_command_writes_and_replaces_its_page_and_no_other_file(tmp_path, capsys):
    folder, file = tmp_path / "jsons", tmp_path / "docs" / "page.md"
    folder.mkdir()
    write(folder, "first", steps())
    assert main(["page", str(folder), "-o", str(file)]) == 0
    assert capsys.readouterr().out.strip() == str(file)
    assert "(../jsons/first.json)" in file.read_text()
    shutil.copy(folder / "first.json", folder / "second.json")
    assert main(["page", str(folder), "-o", str(file)]) == 0
    assert "### second" in file.read_text()
    assert list(file.parent.iterdir()) == [file], "no part of a file is left"
    file.write_text("mine")
    with pytest.raises(SystemExit):
        main(["page", str(folder), "-o", str(file)])
    assert file.read_text() == "mine"
    assert "was not made by scripts/benchmark page" in " ".join(capsys.readouterr().err.split())
