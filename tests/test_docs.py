"""Pages of the site that are made, and the changes that the site makes to pages."""

import argparse
import re
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from laboratory import docs_site
from nnunetv2_diffusion import cli

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {file.parent.name for file in (ROOT / "nnunetv2_diffusion").glob("*/__init__.py")}


def test_the_page_of_commands_has_every_option_of_every_verb():
    page = docs_site.commands_page()
    assert re.findall(r"^## (\S+)$", page, re.MULTILINE) == list(cli.VERBS)
    for verb in cli.VERBS:
        own = page.split(f"\n## {verb}\n")[1].split("\n## ")[0]
        for action in docs_site.verb_parser(verb)._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            (line,) = re.findall(
                rf"^`[^`]*{re.escape((action.option_strings or [action.metavar])[0])}\b.*`$", own, re.M
            )
            assert line, action.dest
        assert own.count("\n:   ") == len(docs_site.verb_parser(verb)._actions) - 1


def test_long_examples_are_wrapped_and_can_still_be_typed():
    line = "nnunetv2_diffusion predict -m MODEL_FOLDER -i imagesTs -o masks --samples 8 --save_uncertainty -device cpu"
    block = docs_site.code([line])
    assert max(len(row) for row in block.splitlines()) <= 82
    assert " ".join(block.replace("\\\n", "").split()[1:-1]) == line


def test_equations_become_mathml():
    pytest.importorskip("latex2mathml")
    made = docs_site.equations("before\n\n```math\nx_t = \\sqrt{2} x_0\n```\n\nafter")
    assert re.fullmatch(r'before\n\n<div class="math"><math .*<msqrt>.*</math></div>\n\nafter', made)


def test_a_block_with_the_name_of_a_file_shows_the_file(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    assert docs_site.with_files("```python\n# a.py\n```\n", tmp_path) == "```python\nx = 1\n```\n"
    assert docs_site.with_files("```python\n# a.py\ny\n```\n", tmp_path) == "```python\n# a.py\ny\n```\n"
    with pytest.raises(FileNotFoundError):
        docs_site.with_files("```python\n# b.py\n```\n", tmp_path)


def test_links_out_of_the_site_are_text(tmp_path):
    (tmp_path / "folder").mkdir()
    text = "[a](../a.json) [b](../other.md) [c](b.md#c) [d](https://e.f) [e](../folder) ![f](../../f.png)"
    kept = "a [b](../other.md) [c](b.md#c) [d](https://e.f) e ![f](../../f.png)"
    assert docs_site.linked_within(text.replace("../a.json", "../../a.json"), "start/page.md", tmp_path) == kept


def test_pre_commit_runs_the_ruff_that_setup_cfg_allows():
    rev = re.search(r"rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text())[1]
    bound = re.search(r"^    ruff(\S+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)[1]
    assert SpecifierSet(bound).contains(rev), (rev, bound)


def test_forms_and_workflow_are_yaml_and_the_workflow_runs_the_tests():
    yaml = pytest.importorskip("yaml")
    files = {file.name: yaml.safe_load(file.read_text()) for file in (ROOT / ".github").rglob("*.yml")}
    assert [step["run"] for step in files["test.yml"]["jobs"]["test"]["steps"] if "run" in step] == ["scripts/test"]
    for name in ("bug.yml", "question.yml"):
        assert {"name", "description", "body"} <= set(files[name])
        assert all(part["type"] in ("markdown", "textarea") for part in files[name]["body"])


def test_every_room_is_on_the_page_of_rooms_from_top_to_bottom():
    page = (ROOT / "docs" / "how-it-works" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", page.split("## Around")[0], re.MULTILINE)
    assert set(listed) == ROOMS
    order = re.search(r"ROOMS = \((.*?)\)", (ROOT / "tests" / "test_rooms.py").read_text(), re.DOTALL)[1]
    floors = [room for room in re.findall(r'"(\w+)"', order) if room in ROOMS]
    assert listed == floors[::-1]
