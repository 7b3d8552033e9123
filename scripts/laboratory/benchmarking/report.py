"""Targets, tables and the JSON of a run.

The JSON holds ``schema`` (another number when a key goes or changes its meaning), ``command`` with all defaults
spelled out, ``settings``, ``hardware``, ``versions``, ``results`` and ``targets``. A result has ``seconds`` (median,
mean, min, max and each of the ``rounds``), ``ratio`` to nnUNetTrainer in the same round, ``peak_memory_bytes`` and
``peak_memory_ratio`` (null on a CPU); for train-step ``parameters`` and ``parameter_overhead``; for predict ``steps``,
``passes``, ``pass_ratio`` (mean pass to a stock prediction) and ``outside_share`` (of the time, outside of passes).
"""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from laboratory.benchmarking.options import REFERENCE
from nnunetv2_diffusion.compat import package_versions
from nnunetv2_diffusion.evaluation.tables import Table, to_text

SCHEMA = 1
NOT_MEASURED = "not measured"
Columns = Sequence[tuple[str, Callable[[dict], str]]]
"""Heads of a table, and what makes a cell of a result."""


def target(name: str, limit: float, value: float | None) -> dict[str, Any]:
    """What has to stay within a limit, and what was measured (None if it was not), as in the JSON."""
    return {"name": name, "limit": limit, "value": value, "met": None if value is None else value <= limit}


def target_row(found: dict[str, Any]) -> list[str]:
    """Name, limit, value and verdict."""
    value = "-" if found["value"] is None else f"{found['value']:.3f}"
    verdict = {None: NOT_MEASURED, True: "met", False: "NOT met"}[found["met"]]
    return [found["name"], f"{found['limit']:g}", value, verdict]


def train_targets(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Goals for training steps, for the trainers that were run; recycling has stricter ones on a GPU."""
    steps, memory, parameters = [], [], []
    for result in results:
        name = result["trainer"]
        if name == REFERENCE or "HiDiff" in name:
            continue  # two networks: what they cost is reported, the goals are those of one
        on_gpu, recycles = result["peak_memory_ratio"] is not None, name == "nnUNetTrainerRecycleXT"
        limit = (1.33 if on_gpu else 1.45) if recycles else 1.25 if "SelfCond" in name else None
        if limit is not None:
            steps.append(target(f"{name}: seconds per step / {REFERENCE}'s", limit, result["ratio"]["median"]))
        if on_gpu:
            most = 1.05 if recycles else 1.10
            memory.append(target(f"{name}: peak memory / {REFERENCE}'s", most, result["peak_memory_ratio"]))
        parameters.append(target(f"{name}: parameters / {REFERENCE}'s", 1.10, 1 + result["parameter_overhead"]))
    return [*steps, *(memory or [target(f"peak memory on a GPU / {REFERENCE}'s", 1.10, None)]), *parameters]


def predict_targets(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Goals for prediction: what is not a pass, and on a GPU K steps against K passes of the reference."""
    targets = []
    for r in (r for r in results if r["outside_share"] is not None):
        name = f"{r['trainer']}, K = {r['steps']}"
        targets.append(target(f"{name}: share of time outside of the passes", 0.03, r["outside_share"]["median"]))
        if r["peak_memory_ratio"] is not None:
            targets.append(target(f"{name}: seconds / K of {REFERENCE}'s", 1.03, r["ratio"]["median"] / r["steps"]))
    return targets


def cells(columns: Columns, results: list[dict]) -> list[list[str]]:
    """A row of texts for each result."""
    return [[cell(result) for _, cell in columns] for result in results]


def text_table(columns: Columns, results: list[dict]) -> str:
    """Results as aligned text."""
    return to_text(Table("", [name for name, _ in columns], cells(columns, results))).split("\n", 2)[2].rstrip("\n")


def spread(values: dict[str, float] | None, scale: float = 1, digits: int = 2) -> str:
    """Median and range of scaled values, "-" for None."""
    if values is None:
        return "-"
    median, low, high = (f"{scale * values[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low}-{high})"


def memory_cell(row: dict) -> str:
    """Peak memory and its ratio to the reference's."""
    if row["peak_memory_ratio"] is None:
        return NOT_MEASURED
    return f"{row['peak_memory_bytes'] / 2**30:.2f} GiB ({row['peak_memory_ratio']:.3f}x)"


def _mebibytes(value: int | None) -> str:
    return NOT_MEASURED if value is None else f"{value / 2**20:.2f}"


def _of(key: str, form: str = "", scale: float = 1) -> Callable[[dict], str]:
    """What writes a value of a result, scaled, in a format."""
    return lambda r: format(r[key] if scale == 1 else r[key] * scale, form)


_SECONDS, _RATIO = (lambda r: f"{r['seconds']['median']:.4f}"), (lambda r: spread(r["ratio"]))
TRAIN_COLUMNS: Columns = [
    ("trainer", _of("trainer")), ("s / step", _SECONDS), ("ratio, median (min-max)", _RATIO),
    ("mean", lambda r: f"{r['ratio']['mean']:.2f}"), ("parameters", _of("parameters", ",")),
    ("overhead", lambda r: f"{100 * r['parameter_overhead']:.2f} %"), ("peak memory", memory_cell),
]  # fmt: skip
PREDICT_COLUMNS: Columns = [
    ("network", _of("trainer")), ("K", lambda r: "-" if r["steps"] is None else str(r["steps"])),
    ("s / image", _SECONDS), ("ratio, median (min-max)", _RATIO),
    ("one pass / stock's", lambda r: spread(r["pass_ratio"])),
    ("outside of passes, %", lambda r: spread(r["outside_share"], scale=100)), ("peak memory", memory_cell),
]  # fmt: skip
MEMORY_COLUMNS: Columns = [
    ("plans", _of("plans")), ("classes", _of("classes")), ("subject", _of("subject")),
    ("saved, estimate MiB", lambda r: _mebibytes(r["saved_estimate"])),
    ("measured", lambda r: _mebibytes(r["saved_measured"])),
    ("ratio", lambda r: "-" if r["saved_measured"] is None else f"{r['saved_estimate'] / r['saved_measured']:.4f}"),
    ("allocated, estimate MiB", lambda r: _mebibytes(r["estimate"])),
    ("measured", lambda r: _mebibytes(r["measured"])), ("ratio", _of("ratio", ".3f")),
]  # fmt: skip
REFINER_COLUMNS: Columns = [
    ("part", _of("part")), ("s / pass", _SECONDS), ("ratio to the segmentor, median (min-max)", _RATIO)
]  # fmt: skip
COUNT_COLUMNS: Columns = [
    ("parameters", _of("parameters", ",")), ("binary", _of("binary_parameters", ",")),
    ("GMAC, real", _of("macs", ".2f", 1e-9)), ("binary", _of("binary_macs", ".2f", 1e-9)),
    ("MiB in float32", _of("storage_bytes", ".1f", 2**-20)),
    ("with 1-bit weights", _of("packed_bytes", ".1f", 2**-20)), ("peak memory", memory_cell),
]  # fmt: skip


def spelled(command: str, settings: Mapping[str, Any]) -> str:
    """A command with its settings as options; sizes of a tuple are joined by x."""
    words = [command]
    for name, value in settings.items():
        if value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, tuple):
            words.append("x".join(map(str, value)))
        elif value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return " ".join(words)


def describe_network(problem: dict[str, Any]) -> str:
    """Network and size of its input, from what ``host.describe_problem`` made."""
    features = problem["features"]
    return (
        f"{problem['network']} {problem['configuration']}, patch {'x'.join(map(str, problem['patch']))}, "
        f"batch {problem['batch']}, features {features[0]}..{features[-1]} in {len(features)} stages"
    )


def header(kind: str, clock: str, problem: dict | None, hardware: dict[str, Any], versions: dict[str, str]) -> str:
    """What was measured, and where; problem is None where no network is."""
    network = "" if problem is None else f": {describe_network(problem)}, {problem['outputs']} outputs"
    return f"{kind}{network}\non {hardware['name']}, {hardware['threads']} threads, {clock} time; " + ", ".join(
        f"{name} {version}" for name, version in versions.items()
    )


def content(
    command: str, settings: dict[str, Any], device: torch.device, results: list[dict], targets: Sequence[dict] = ()
) -> dict[str, Any]:
    """What goes into the JSON of a run."""
    return {
        "schema": SCHEMA,
        "command": command,
        "settings": settings,
        "hardware": describe_hardware(device),
        "versions": describe_versions(),
        "results": results,
        "targets": list(targets),
    }


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """Device, processor and threads; nothing that names the machine."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    return {
        "device": device.type,
        "name": gpu or cpu,
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory if gpu else None,
    }


def describe_versions() -> dict[str, str]:
    """Versions of what the result depends on; torch with its build."""
    return {**package_versions(), "torch": torch.__version__}
