"""Writes finished cases, here or in worker processes; what one of them fails at costs no other case."""

import multiprocessing
import shutil
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait

import numpy as np

from nnunetv2_diffusion.inference.export import CaseExport, ModelFiles, export_case
from nnunetv2_diffusion.inference.failures import reason_of
from nnunetv2_diffusion.inference.prepared import FailedCase
from nnunetv2_diffusion.workers import end_with_parent, receive_array, send_array

NONE = np.empty(0, np.float32)  # in place of logits that follow by themselves
PATIENCE = 5.0  # seconds that a worker has to end


class Exporter:
    """Writes cases here, or in worker processes as nnU-Net does.

    Args:
        model: of the predictor.
        processes: 0 for none.

    Attributes:
        finished: names of the cases that are written.
        failed: those that could not be.
    """

    def __init__(self, model: ModelFiles, processes: int):
        self.model, self.processes = model, processes
        self.finished: list[str] = []
        self.failed: list[FailedCase] = []
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Exporter":
        self._workers = [_Worker(self.model) for _ in range(self.processes)]
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None or issubclass(kind, Exception):  # not where a person wants it to end
                while any(worker.case for worker in self._workers):
                    self._collect()
        finally:
            for worker in self._workers:
                worker.end()

    def __call__(self, case: CaseExport) -> None:
        """Write a case, or hand it to a worker; waits while all of them are busy. Errors go to ``failed``."""
        if not self._workers:
            self._settle(case.name, attempt(case, self.model))
            return
        while not (idle := [worker for worker in self._workers if worker.case is None]):
            self._collect()
        idle[0].give(case)

    def _collect(self) -> None:
        """Wait until a worker is done with its case, or dead; the latter is replaced."""
        ready = wait([worker.pipe for worker in self._workers if worker.case])  # a dead one's end of the pipe is closed
        for index, worker in enumerate(self._workers):
            if worker.pipe not in ready:
                continue
            case, (lives, reason) = worker.case, worker.result()
            if not lives:
                case.clear()
                self._workers[index] = _Worker(self.model)
            self._settle(case.name, reason)

    def _settle(self, name: str, reason: str | None) -> None:
        if reason is None:
            self.finished.append(name)
        else:
            self.failed.append(FailedCase(name, reason))


def attempt(case: CaseExport, model: ModelFiles) -> str | None:
    """Write a case; why it could not be, or None."""
    try:
        export_case(case, model)
    except Exception as error:
        return reason_of(error, case.work)
    return None


class _Place:
    """Where a case is made that a worker has; its arrays are the worker's alone."""

    def __init__(self, case: CaseExport):
        self.name, self.work = case.name, case.work

    def clear(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)


class _Worker:
    """A process that writes one case after the other, and knows which one it has."""

    def __init__(self, model: ModelFiles):
        context = multiprocessing.get_context("spawn")
        self.case: _Place | None = None
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, model), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, case: CaseExport) -> None:
        self.case = _Place(case)
        with suppress(BrokenPipeError, ConnectionResetError):  # it is dead, as its end of the pipe will tell
            self.pipe.send(replace(case, logits=NONE))
            send_array(self.pipe, case.logits)

    def result(self) -> tuple[bool, str | None]:
        """Whether the worker lives, and why its case could not be written."""
        self.case = None
        try:
            return True, self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(PATIENCE)
        code = self.process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
        return False, f"the process that wrote it {how}, probably for want of memory; a smaller -nps needs less"

    def end(self) -> None:
        self.process.terminate()
        self.process.join(PATIENCE)
        self.pipe.close()
        if self.case is not None:
            self.case.clear()


def _serve(pipe: Connection, model: ModelFiles) -> None:
    """Write what comes through the pipe, and answer with the reason if it could not be written."""
    end_with_parent()
    while True:
        try:
            case = pipe.recv()
            case.logits = receive_array(pipe)
        except EOFError:
            return
        pipe.send(attempt(case, model))
