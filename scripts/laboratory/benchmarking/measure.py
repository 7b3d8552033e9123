"""Seconds and peak memory of subjects that take turns: training steps, and ``network(image)`` as nnU-Net calls it."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from laboratory.benchmarking.host import build_network, create_trainer, make_batches, make_images
from laboratory.benchmarking.options import REFERENCE
from laboratory.benchmarking.problem import BenchmarkError, Problem
from nnunetv2_diffusion.networks import DiffusionUNet, HiDiffNetwork
from nnunetv2_diffusion.sampling import SamplingConfig

DIFFERENT_INPUTS = 4


@dataclass(frozen=True)
class Subject:
    """Something that is timed: its work, by number of the input, and what it keeps on the device between runs.

    ``pass_seconds`` gives those of each network pass of the last run, None if not known; called after synchronising.
    """

    name: str
    run: Callable[[int], None]
    tensors: Callable[[], Iterable[torch.Tensor]]
    pass_seconds: Callable[[], list[float] | None] = lambda: None


@dataclass(frozen=True)
class Measurement:
    """Seconds of one run, of each of its passes if known, and the most bytes on a GPU that this subject alone needs."""

    seconds: float
    pass_seconds: list[float] | None = None
    peak_bytes: int | None = None


class Stopwatch:
    """Marks points in time on a device; clock "cpu" is processor time of this process, for a CPU that others use."""

    def __init__(self, device: torch.device, clock: str = "wall"):
        self.cuda = device.type == "cuda"
        self._now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]

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


@dataclass(frozen=True)
class Turns:
    """How subjects take turns, A B C A B C, so that a change of the machine's speed meets all of them.

    ``rounds`` turns of each are measured, after ``warmup`` turns that are not counted.
    """

    device: torch.device
    stopwatch: Stopwatch
    rounds: int
    warmup: int

    def measure(self, subjects: list[Subject], description: str) -> dict[str, list[Measurement]]:
        """For every subject's name the measurements of its rounds; progress is shown on stderr."""
        measurements: dict[str, list[Measurement]] = {subject.name: [] for subject in subjects}
        with tqdm(total=(self.warmup + self.rounds) * len(subjects), desc=description, unit="run") as progress:
            for index in range(-self.warmup, self.rounds):
                for subject in subjects:
                    progress.set_postfix_str(("" if index >= 0 else "warm-up, ") + subject.name, refresh=False)
                    result = measure(subject, index, self.stopwatch)
                    if index >= 0:
                        measurements[subject.name].append(result)
                    progress.update()
        return measurements


def summary(values: list[float]) -> dict[str, float]:
    """Median, mean, smallest and largest value."""
    of = {"median": statistics.median, "mean": statistics.fmean, "min": min, "max": max}
    return {name: function(values) for name, function in of.items()}


def ratio(seconds: list[float], reference: list[Measurement]) -> dict[str, float]:
    """Summary of seconds as a multiple of the reference's in the same round."""
    return summary([own / r.seconds for own, r in zip(seconds, reference, strict=True)])


def costs(measured: list[Measurement], reference: list[Measurement]) -> dict[str, Any]:
    """What is reported of everything: seconds, ratio to the reference, peak memory (None where it is not known)."""
    seconds = [m.seconds for m in measured]
    peak, reference_peak = (
        max(m.peak_bytes for m in found) if all(m.peak_bytes is not None for m in found) else None
        for found in (measured, reference)
    )
    return {
        "seconds": {**summary(seconds), "rounds": seconds},
        "ratio": ratio(seconds, reference),
        "peak_memory_bytes": peak,
        "peak_memory_ratio": peak / reference_peak if peak else None,
    }


def module_tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Weights, their gradients, and buffers."""
    yield from module.buffers()
    for parameter in module.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad


def trainer_tensors(trainer: Any) -> Iterator[torch.Tensor]:
    """Of the network, and the optimisers' state; HiDiff has two optimisers."""
    yield from module_tensors(trainer.network)
    for optimizer in filter(None, (trainer.optimizer, getattr(trainer, "segmentor_optimizer", None))):
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def train_steps(problem: Problem, trainers: list[str], turns: Turns) -> list[dict[str, Any]]:
    """One result for each trainer, the reference among them, as in the JSON; within ``temporary_folders``."""
    made = {name: create_trainer(name, problem, turns.device) for name in trainers}

    def subject(name: str) -> Subject:
        trainer, batches = made[name], make_batches(made[name], DIFFERENT_INPUTS)
        return Subject(
            name, lambda index: trainer.train_step(batches[index % len(batches)]), lambda: trainer_tensors(trainer)
        )

    with _enough_compiled_graphs(turns.device):
        measured = turns.measure([subject(name) for name in trainers], "train-step")
    results = []
    for name, trainer in made.items():
        own, stock = (sum(p.numel() for p in t.network.parameters()) for t in (trainer, made[REFERENCE]))
        overhead = {"parameters": own, "parameter_overhead": own / stock - 1}
        results.append({"trainer": name, **costs(measured[name], measured[REFERENCE]), **overhead})
    return results


@contextmanager
def _enough_compiled_graphs(device: torch.device) -> Iterator[None]:
    """Lift torch's limit of compiled graphs for one function: it is meant for one network, here are several."""
    if device.type != "cuda":
        yield
        return
    import torch._dynamo  # takes seconds, and nnU-Net compiles on CUDA only

    with torch._dynamo.config.patch(recompile_limit=64):
        yield


def forward(name: str, module: torch.nn.Module, inputs: list[tuple]) -> Subject:
    """``module(*inputs)`` in inference mode, under autocast on CUDA; inputs are used in turn."""

    @torch.inference_mode()
    def run(index: int) -> None:
        chosen = inputs[index % len(inputs)]
        with torch.autocast("cuda", enabled=chosen[0].is_cuda):
            module(*chosen)

    return Subject(name, run, lambda: module_tensors(module))


def time_passes(network: torch.nn.Module, stopwatch: Stopwatch) -> Callable[[], list[float]]:
    """Wrap the function that a ``DiffusionUNet``'s loop calls; gives the seconds of each pass since the last call."""
    marks: list[tuple[Any, Any]] = []
    inner = network._run

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = stopwatch.mark()
        result = inner(*args, **kwargs)
        marks.append((start, stopwatch.mark()))
        return result

    def take() -> list[float]:
        seconds = [stopwatch.between(*pair) for pair in marks]
        marks.clear()
        return seconds

    network._run = timed
    return take


def predictions(
    problem: Problem, trainers: list[str], configs: list[SamplingConfig], turns: Turns
) -> list[dict[str, Any]]:
    """One result for each network and sampling, as in the JSON; networks without a loop are measured once.

    Raises:
        BenchmarkError: if a network's schedule has fewer steps than a config asks for.
    """
    inputs = [(image,) for image in make_images(problem, turns.device, DIFFERENT_INPUTS)]
    subjects: dict[tuple[str, int | None], Subject] = {}
    for trainer in trainers:
        network = build_network(trainer, problem, turns.device)
        subjects |= _ways_to_predict(trainer, network, inputs, configs, turns.stopwatch)
    measured = turns.measure(list(subjects.values()), "predict")
    reference = measured[REFERENCE]
    return [
        {
            "trainer": trainer,
            "steps": steps,
            **costs(measured[subject.name], reference),
            **_passes(measured[subject.name], reference),
        }
        for (trainer, steps), subject in subjects.items()
    ]


def _ways_to_predict(
    trainer: str, network: Any, inputs: list[tuple], configs: list[SamplingConfig], stopwatch: Stopwatch
) -> dict[tuple[str, int | None], Subject]:
    """A subject for each sampling, or a single one for a network without a loop, by trainer and steps."""
    if not isinstance(network, (DiffusionUNet, HiDiffNetwork)) or network.process is None:
        return {(trainer, None): forward(trainer, network, inputs)}
    longest = network.process.num_timesteps
    for config in configs:
        if config.steps > longest:
            raise BenchmarkError(f"--steps is {config.steps}, expected 1 .. {longest}, the schedule of {trainer}")
    # of HiDiff's, the segmentor is no pass of the loop; ``scripts/benchmark refiner`` times the parts
    passes = time_passes(network, stopwatch) if isinstance(network, DiffusionUNet) else lambda: None

    def subject(config: SamplingConfig) -> Subject:
        plain = forward(f"{trainer}, K = {config.steps}", network, inputs)

        def run(index: int) -> None:
            network.sampling = config
            plain.run(index)

        return Subject(plain.name, run, plain.tensors, passes)

    return {(trainer, config.steps): subject(config) for config in configs}


def _passes(measured: list[Measurement], reference: list[Measurement]) -> dict[str, Any]:
    """Cost of one pass and share of time outside of the passes; nulls for a network without a loop."""
    if measured[0].pass_seconds is None:
        return {"passes": 1, "pass_ratio": None, "outside_share": None}
    return {
        "passes": len(measured[0].pass_seconds),
        "pass_ratio": ratio([statistics.fmean(m.pass_seconds) for m in measured], reference),
        "outside_share": summary([1 - sum(m.pass_seconds) / m.seconds for m in measured]),
    }
