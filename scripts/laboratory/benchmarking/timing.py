"""Seconds and peak memory of several subjects that take turns."""

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tqdm import tqdm


class Subject(Protocol):
    """Something that is timed."""

    name: str

    def run(self, index: int) -> None:
        """The work; index selects the input, which is the same for all subjects of a round."""

    def pass_seconds(self) -> list[float] | None:
        """Seconds of each network pass of the last run, None if not known; called after synchronising."""

    def tensors(self) -> Iterable[torch.Tensor]:
        """What the subject keeps on the device between runs."""


@dataclass(frozen=True)
class Measurement:
    """One run of one subject.

    Attributes:
        seconds: of the whole run.
        pass_seconds: of each of its network passes, if known.
        peak_bytes: most memory on the GPU that this subject alone needs, None on a CPU.
    """

    seconds: float
    pass_seconds: list[float] | None = None
    peak_bytes: int | None = None


class Stopwatch:
    """Times work on a device: a clock on a CPU, events in the stream on CUDA.

    Events add no synchronisation within a run, so that timing parts of it does not slow it down.

    Args:
        device: "cpu" or "cuda".
        clock: "wall", or "cpu" for the processor time of this process, all its threads together: what a CPU that is
            busy with other work can still tell. Threads that wait for each other count as well, so use one.
        children: the work is done in processes that are started and waited for: "cpu" is their time, not this one's.
    """

    def __init__(self, device: torch.device, clock: str = "wall", children: bool = False):
        self.cuda = device.type == "cuda"
        self._now = {"wall": time.perf_counter, "cpu": children_time if children else time.process_time}[clock]

    def mark(self) -> Any:
        """A point in time."""
        if not self.cuda:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        if self.cuda:
            torch.cuda.synchronize()

    def between(self, start: Any, end: Any) -> float:
        """Seconds between two marks; on CUDA after ``synchronize``."""
        return start.elapsed_time(end) / 1000 if self.cuda else end - start


def children_time() -> float:
    """Seconds of processor time of all processes that this one has started and waited for, theirs included."""
    import resource  # not on Windows

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(subject: Subject, index: int, stopwatch: Stopwatch) -> Measurement:
    """Run a subject once and return what it took."""
    stopwatch.synchronize()
    kept = before = 0
    if stopwatch.cuda:
        kept, before = total_bytes(subject.tensors()), torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    start = stopwatch.mark()
    subject.run(index)
    end = stopwatch.mark()
    stopwatch.synchronize()
    # all subjects live on the same GPU: what the others keep is taken off
    peak = torch.cuda.max_memory_allocated() - before + kept if stopwatch.cuda else None
    return Measurement(stopwatch.between(start, end), subject.pass_seconds(), peak)


def total_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Memory of some tensors; storage that is shared counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def alternate(
    subjects: list[Subject], rounds: int, warmup: int, stopwatch: Stopwatch, description: str
) -> dict[str, list[Measurement]]:
    """Let subjects take turns, A B C A B C, so that a change of the machine's speed meets all of them.

    Args:
        subjects: in the order of their turns.
        rounds: measured turns of each.
        warmup: turns before that are not recorded.
        stopwatch: for the device the subjects work on.
        description: shown with the progress, on stderr.

    Returns:
        for every subject's name the measurements of its rounds.
    """
    measurements: dict[str, list[Measurement]] = {subject.name: [] for subject in subjects}
    with tqdm(total=(warmup + rounds) * len(subjects), desc=description, unit="run") as progress:
        for index in range(-warmup, rounds):
            for subject in subjects:
                progress.set_postfix_str(subject.name if index >= 0 else f"warm-up, {subject.name}", refresh=False)
                result = measure(subject, index, stopwatch)
                if index >= 0:
                    measurements[subject.name].append(result)
                progress.update()
    return measurements


def summary(values: list[float]) -> dict[str, float]:
    """Median, mean, smallest and largest value."""
    return {
        "median": statistics.median(values),
        "mean": statistics.fmean(values),
        "min": min(values),
        "max": max(values),
    }


def ratio(measured: list[float], reference: list[Measurement]) -> dict[str, float]:
    """Summary of seconds as a multiple of the reference's in the same round."""
    return summary([seconds / r.seconds for seconds, r in zip(measured, reference, strict=True)])


def peak_bytes(measured: list[Measurement]) -> int | None:
    """Largest peak over the rounds, None where memory was not measured."""
    peaks = [m.peak_bytes for m in measured if m.peak_bytes is not None]
    return max(peaks) if peaks else None
