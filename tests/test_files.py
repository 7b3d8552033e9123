"""Files written whole, and JSON that every parser reads."""

import ast
import errno
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest

from nnunetv2_diffusion import files
from nnunetv2_diffusion.files import check_target, read_json, read_json_if_any, write_all, write_json, written_whole

# ---- files


def test_files_are_written_in_utf8(tmp_path):
    write_all({tmp_path / "a.txt": "±\n", tmp_path / "b.txt": "b"})
    assert (tmp_path / "a.txt").read_bytes() == "±\n".encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt"]


def test_nothing_is_overwritten_and_nothing_written_beside_it(tmp_path):
    (tmp_path / "b.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"b\.txt exists; it is not overwritten"):
        write_all({tmp_path / "a.txt": "a", tmp_path / "b.txt": "b"})
    assert [path.name for path in tmp_path.iterdir()] == ["b.txt"]
    assert (tmp_path / "b.txt").read_text() == "mine"


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing is no folder"):
        write_all({tmp_path / "missing" / "a.txt": "a"})


@pytest.mark.parametrize("step", ["write", "replace"])
def test_failure_half_way_leaves_nothing(tmp_path, monkeypatch, step):
    owner, name = (Path, "write_bytes") if step == "write" else (os, "replace")
    real, calls = getattr(owner, name), []

    def fail_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            if step == "write":
                real(arguments[0], b"half")
            raise OSError(errno.ENOSPC, "disk full")
        return real(*arguments)

    monkeypatch.setattr(owner, name, fail_second)
    with pytest.raises(OSError, match=rf"cannot be written: disk full: .*{'b' if step == 'write' else 'a'}\.txt"):
        write_all({tmp_path / "a.txt": "a", tmp_path / "b.txt": "b"})
    assert list(tmp_path.iterdir()) == []


def test_files_that_may_be_replaced_are_and_stay_if_that_fails(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("old")
    write_all({file: "new"}, replace=True)
    assert file.read_text() == "new"
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        write_all({file: "newer", tmp_path / "b.txt": "b"}, replace=True)
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {"a.txt": "new"}


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: done.append("fsync") or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda *names: done.append("replace") or replace(*names))
    write_json(tmp_path / "deep" / "a.json", {"a": 1})
    assert done == ["fsync", "replace"]
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["a.json"]


@pytest.mark.parametrize("ending", ["", ".nii.gz"])
def test_a_name_as_long_as_file_systems_allow_can_be_written(tmp_path, ending):
    file = tmp_path / ("x" * (255 - len(ending)) + ending)
    with written_whole(file, ending) as part:
        assert part.name.endswith(ending)
        part.write_text("content")
    assert file.read_text() == "content"


def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="file is no folder"):
        check_target(tmp_path / "file" / "a.txt")
    check_target(tmp_path / "file", replace=True)
    with pytest.raises(FileExistsError, match="exists; it is not overwritten; try"):
        check_target(tmp_path, replace=True, hint="; try")


# ---- JSON


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no such file, expected a JSON file"),
        ("{", "not JSON (Expecting property name"),
        ("[" * 100_000, "not JSON ("),
        ("\xff".encode("latin-1"), "not JSON ("),
        ("[1]", "holds list, expected a mapping"),
    ],
)
def test_what_is_no_json_mapping_is_named(tmp_path, text, reason):
    file = tmp_path / "a.json"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(f"{file}: {reason}")):
        read_json(file)
    with pytest.raises(KeyError, match=r"expected .*plans"):
        read_json(file, KeyError, "plans")
    assert read_json_if_any(file) is None


def test_a_folder_is_no_json_file(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_json(tmp_path)


def strict(text):
    """As every JSON parser reads it: NaN and Infinity are none of JSON's words."""

    def refuse(word):
        raise AssertionError(f"{word} in JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_is_null(tmp_path):
    content = {"a": math.nan, "b": [math.inf, np.float32("nan")], "c": {"d": np.array([1.0, -math.inf])}}
    write_json(tmp_path / "a.json", content)
    found = strict((tmp_path / "a.json").read_text())
    assert found == {"a": None, "b": [None, None], "c": {"d": [1.0, None]}}


def test_no_module_but_this_one_writes_json_by_itself():
    """What is hashed, printed or compared is no file; whatever else is dumped refuses NaN."""
    package = Path(files.__file__).parent
    laboratory = {"benchmarking", "datasets", "demo", "study"}
    texts = {"presets.py": 1, "reference.py": 1, "plan.py": 1, "memory.py": 1, "planner.py": 1, "runs.py": 1}
    found = {}
    for file in package.rglob("*.py"):
        if file.name == "files.py" or laboratory & set(file.relative_to(package).parts):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            dumps = isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps", "save_json")
            if dumps and not any(keyword.arg == "allow_nan" for keyword in node.keywords):
                found[file.name] = found.get(file.name, 0) + 1
    assert found == texts
