"""Commands as subprocesses: output, time, memory, and an end with all that they started."""

import os
import resource
import sys
import threading
import time

import pytest

from laboratory.commands import CommandError, CommandRunner

PYTHON = [sys.executable, "-c"]
WITH_WORKER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False).wait()
"""


def run(runner, log, code, **options):
    return runner.run([*PYTHON, code], log, dict(os.environ), **options)


def test_output_goes_to_the_log_and_cost_is_measured(tmp_path):
    usage = run(CommandRunner(), tmp_path / "logs" / "a.txt", "import time; time.sleep(0.2); print('said')")
    assert (tmp_path / "logs" / "a.txt").read_text() == "said\n"
    assert 0.2 <= usage.seconds < 60
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert 2**20 < usage.peak_memory_bytes < max(2**31, 1.1 * own)


def test_a_failure_tells_status_and_end_of_the_output(tmp_path):
    code = "print('first'); [print(i) for i in range(40)]; print('the reason'); raise SystemExit(3)"
    with pytest.raises(CommandError, match=r"(?s)ended with status 3; the end of .*a\.txt:.*the reason") as failure:
        run(CommandRunner(), tmp_path / "a.txt", code)
    assert "first" not in str(failure.value)


def test_a_command_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(CommandError, match="nnUNetv2_no_such_command cannot be started"):
        CommandRunner().run(["nnUNetv2_no_such_command"], tmp_path / "a.txt", dict(os.environ))


def test_commands_run_in_the_folder_with_just_the_environment(tmp_path):
    CommandRunner().run(
        [*PYTHON, "import os; print(os.getcwd(), os.environ['OWN'], 'HOME' in os.environ)"],
        tmp_path / "a.txt",
        {"OWN": "set"},
        tmp_path,
    )
    assert (tmp_path / "a.txt").read_text().split() == [str(tmp_path.resolve()), "set", "False"]


def test_stop_ends_a_command_with_its_workers_and_starts_no_other(tmp_path):
    runner, failures = CommandRunner(), []
    inside, outside = os.pipe()  # every process of the command holds its writing end

    def work():
        try:
            run(runner, tmp_path / "a.txt", WITH_WORKER, keep_open=[outside])
        except CommandError as error:
            failures.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 30
    while not runner._running and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    runner.stop()
    thread.join(30)
    os.close(outside)
    assert not thread.is_alive()
    assert "status -15" in failures[0]
    os.set_blocking(inside, False)
    end = time.monotonic() + 10
    while True:  # the pipe ends when the last process that holds it does
        try:
            assert os.read(inside, 1) == b""
            break
        except BlockingIOError:
            assert time.monotonic() < end, "a worker is still there"
            time.sleep(0.05)
    os.close(inside)
    with pytest.raises(CommandError, match="not started"):
        run(runner, tmp_path / "b.txt", "print(1)")
