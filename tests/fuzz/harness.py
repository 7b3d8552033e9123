"""One item of a fuzz test: what a call ends in, within a time limit; and the folders that calls are given."""

import contextlib
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))

from nnunetv2_diffusion import cli

LIMIT = 30  # seconds for an item; the longest ones take 2


class TooLongError(BaseException):
    """No error of the system, which commands expect and report."""


def batches(total: int, quick: int) -> list:
    """Seeds of a fuzz test: the first ones always, the others with --slow."""
    return [seed if seed < quick else pytest.param(seed, marks=pytest.mark.slow) for seed in range(total)]


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TooLongError in a block that takes longer."""

    def stop(*_: object) -> None:
        raise TooLongError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Outcome:
    """How a call ended: its value or exit status, its traceback if it raised."""

    status: object
    trace: str | None = None


def outcome(call: Callable[[], object], expected: tuple[type[Exception], ...] = ()) -> Outcome:
    """Run something; expected errors are its status."""
    try:
        with time_limit(LIMIT):
            return Outcome(call())
    except SystemExit as end:  # of argparse
        return Outcome(end.code)
    except expected as error:
        return Outcome(error)
    except BaseException:
        return Outcome(None, traceback.format_exc())


def check_command(arguments: list[str], capsys: pytest.CaptureFixture) -> int:
    """Run a command line in this process: status 0, or another with one message; returns the status."""
    result = outcome(lambda: cli.main(arguments))
    printed = capsys.readouterr()
    assert result.trace is None, f"{arguments}\n{result.trace}"
    assert result.status in (0, 1, 2), arguments
    assert "Traceback" not in printed.err, f"{arguments}\n{printed.err}"
    if result.status:
        message = printed.err[printed.err.find("nnunetv2_diffusion") :].strip() or printed.out.strip()
        assert message, arguments
        assert "arbitrary code" not in message, arguments
        assert "weights_only" not in message, arguments
    return result.status
