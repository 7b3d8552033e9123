"""Which way the imports point: the plug-in knows no laboratory, and lower rooms know no higher ones."""

import ast
import sys
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


def test_imports_point_down():
    upward = set()
    for floor, room in enumerate(ROOMS):
        for file in (ROOT / PACKAGE / room).rglob("*.py"):
            for name in imported(file):
                parts = name.split(".")
                if parts[0] == PACKAGE and len(parts) > 2 and parts[1] in ROOMS[floor + 1 :]:
                    upward.add((room, ".".join(parts[1:3])))
    assert upward == set(), "a room imports one above it"


@pytest.mark.parametrize("file", sorted((ROOT / PACKAGE / "settings").glob("*.py")), ids=lambda file: file.name)
def test_settings_import_the_standard_library_and_themselves_alone(file):
    own = f"{PACKAGE}.settings"
    foreign = [n for n in imported(file) if n.split(".")[0] not in sys.stdlib_module_names]
    assert [n for n in foreign if n != own and not n.startswith(f"{own}.")] == []
