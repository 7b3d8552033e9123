"""Commands as subprocesses: the one beside this Python, its output in a log, its time and memory."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

SHOWN = 15  # lines of a log in a message
PATIENCE = 10  # seconds that a command has to end by itself


class CommandError(RuntimeError):
    """A command failed; the message has the end of its output."""


@dataclass(frozen=True)
class Usage:
    """What a command took: seconds, and the largest resident set of any one of its processes.

    Linux counts from before the command replaced a copy of this process: it is never less than what this one has.
    """

    seconds: float
    peak_memory_bytes: int


class CommandRunner:
    """Runs commands, from several threads if need be, and stops them all when asked to."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(
        self,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        folder: Path | None = None,
        keep_open: Sequence[int] = (),
    ) -> Usage:
        """Run a command to its end; its program is the one beside this Python, else that of PATH.

        ``environment`` is all of its variables, ``folder`` where it runs (by default this process's), and ``keep_open``
        are file descriptors that it inherits. CommandError with the end of the log if it fails or was stopped.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(sys.executable).parent / command[0]
        program = [str(beside) if beside.exists() else command[0], *command[1:]]
        start = time.monotonic()
        with log.open("w") as stream:
            process = self._start(program, stream, dict(environment), folder, keep_open)
            try:
                code, peak = _wait(process)
            except BaseException:
                _end(process)
                raise
            finally:
                with self._lock:
                    self._running.discard(process)
        if code:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN:])
            raise CommandError(f"{command[0]} ended with status {code}; the end of {log}:\n{tail}")
        return Usage(time.monotonic() - start, peak)

    def stop(self) -> None:
        """End all commands that run, with their workers, and start no others."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for process in running:
            _signal(process, signal.SIGTERM)

    def _start(
        self, program: list[str], stream: IO, environment: dict, folder: Path | None, keep_open: Sequence[int]
    ) -> subprocess.Popen:
        with self._lock:
            if self._stopped:
                raise CommandError(f"{Path(program[0]).name} was not started: the run is being stopped")
            try:
                process = subprocess.Popen(  # in a process group of its own, to be stopped with its workers
                    program, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=stream,
                    stderr=subprocess.STDOUT, start_new_session=True, pass_fds=tuple(keep_open),
                )  # fmt: skip
            except OSError as error:
                raise CommandError(f"{program[0]} cannot be started: {error}") from error
            self._running.add(process)
        return process


def _wait(process: subprocess.Popen) -> tuple[int, int]:
    """Exit status and peak memory in bytes."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _signal(process: subprocess.Popen, number: int) -> None:
    """To a command and the workers that it started: they are in a process group of their own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _end(process: subprocess.Popen) -> None:
    """Stop a command, by force if it does not follow."""
    _signal(process, signal.SIGTERM)
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGKILL)
        process.wait()
