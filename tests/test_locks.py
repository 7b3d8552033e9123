"""The lock of a folder, between processes and within one."""

import errno
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from nnunetv2_diffusion import locks
from nnunetv2_diffusion.locks import LockedError, holder, locked

pytest.importorskip("fcntl")

HOLD = """
import sys, time
from pathlib import Path
from nnunetv2_diffusion.locks import locked
with locked(Path(sys.argv[1]), "a test"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    environment = {**os.environ, "PYTHONPATH": str(Path(locks.__file__).parents[1])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_by_the_first_ones_number_until_that_is_killed(tmp_path, other):
    file = tmp_path / ".lock"
    assert holder(file) == other.pid
    with (
        pytest.raises(LockedError, match=rf"a test works here already \(process {other.pid}\)"),
        locked(file, "a test"),
    ):
        pass
    assert holder(file) == other.pid, "the refused one has not taken it"
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert file.is_file(), "what was killed cleans nothing"
    assert holder(file) is None
    with locked(file, "a test"):
        assert holder(file) == os.getpid()
    assert not file.exists()


def test_one_process_cannot_lock_twice_and_waits_if_asked_to(tmp_path):
    file = tmp_path / ".lock"
    with locked(file, "a test"):
        for wait in (0, 0.2):
            with pytest.raises(LockedError, match=f"process {os.getpid()}"), locked(file, "a test", wait):
                pass
    with locked(file, "a test"), locked(tmp_path / ".other", "a test"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_error_frees_the_lock(tmp_path):
    file = tmp_path / ".lock"
    with pytest.raises(KeyError), locked(file, "a test"):
        raise KeyError
    with locked(file, "a test"):
        pass


def test_a_worker_does_not_inherit_the_lock(tmp_path):
    """A worker that outlives its parent must not keep the next command out."""
    file = tmp_path / ".lock"
    with locked(file, "a test"):
        pid = os.fork()
        if pid == 0:
            code = "from pathlib import Path; from nnunetv2_diffusion.locks import holder; import sys; "
            code += f"sys.exit(holder(Path({str(file)!r})) != {os.getppid()})"
            os.execv(sys.executable, [sys.executable, "-c", code])
        assert os.waitpid(pid, 0)[1] == 0


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    with pytest.raises(LockedError, match=r"none: cannot be locked, .lock cannot be made \(No such file"):
        locked(tmp_path / "none" / ".lock", "a test").__enter__()

    def refuse(path, *arguments):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # the mode of a folder does not stop root
    with pytest.raises(LockedError, match=r"cannot be made \(Read-only file system\)"):
        locked(tmp_path / ".lock", "a test").__enter__()


def test_a_file_system_without_locks_gives_a_warning_and_goes_on(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match=r"no locks \(No locks available\)"), locked(tmp_path / ".lock", "a test"):
        pass
    assert not (tmp_path / ".lock").exists()


def test_without_fcntl_nothing_is_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with locked(tmp_path / ".lock", "a test"):
            assert holder(tmp_path / ".lock") == os.getpid()
