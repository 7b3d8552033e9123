"""Which way the imports point: the plug-in knows no laboratory, and lower rooms know no higher ones."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "nnunetv2_diffusion"
PLUGIN = [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "trainers").glob("*.py"), *(ROOT / "plans").glob("*.py")]
# ground floor first, also rooms that are still to come: a room may import those before it, and itself
ROOMS = (
    "settings", "diffusion", "sampling", "networks", "training", "methods", "host", "inference", "planning",
    "evaluation", "analysis",
)  # fmt: skip
# goal: none. Settings, and what reads plans, belong to the ground floor
EXCEPTIONS = {
    ("inference", "planning.schema"),
    ("inference", "planning.settings"),
    ("methods", "planning.continuing"),
    ("methods", "planning.settings"),
    ("settings", "planning.schema"),
    ("training", "planning.continuing"),
    ("training", "planning.schema"),
    ("training", "planning.settings"),
    ("training", "planning.transfer"),
}


def imported(file):
    """Dotted names of all modules that a file imports, wherever it does so."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", PLUGIN, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_plugin_imports_no_laboratory(file):
    assert [name for name in imported(file) if name.split(".")[0] in ("laboratory", "scripts", "tests")] == []


def test_imports_point_down_but_for_the_exceptions():
    upward = set()
    for floor, room in enumerate(ROOMS):
        for file in (ROOT / PACKAGE / room).rglob("*.py"):
            for name in imported(file):
                parts = name.split(".")
                if parts[0] == PACKAGE and len(parts) > 2 and parts[1] in ROOMS[floor + 1 :]:
                    upward.add((room, ".".join(parts[1:3])))
    assert upward - EXCEPTIONS == set(), "a room imports one above it"
    assert EXCEPTIONS - upward == set(), "these point down now: remove them from EXCEPTIONS"
