"""One JSON for each training: settings, versions, hardware, commit, time, memory, scores of every case, curves.

``schema`` (another number when a key goes or changes its meaning), ``kind`` ("cell"), ``request`` (what the study asks
for; a result with another request is never taken for it), ``settings`` and ``network`` as resolved, ``labels``,
``hardware``, ``versions``, ``code`` (at the start; ``code_changed`` since), ``training`` (seconds of the last attempt,
attempts, peak_memory_bytes, seconds and nnU-Net's log of every epoch), ``predictions`` (seconds, scores: case -> label
-> metric) and ``analysis`` (columns of the CSVs of the verb ``analyse``). Undefined scores are null. Nothing in it
names the machine or its folders.
"""

import hashlib
import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import nnunetv2_diffusion
from laboratory.benchmarking.report import describe_hardware, describe_versions
from laboratory.study import StudyError
from laboratory.study.definition import Cell, Prediction, Study
from laboratory.study.stages import Training
from nnunetv2_diffusion.checkpoints import load_checkpoint_file
from nnunetv2_diffusion.evaluation.labels import read_labels
from nnunetv2_diffusion.evaluation.summaries import class_key, read_summary
from nnunetv2_diffusion.files import read_json, to_json
from nnunetv2_diffusion.pages import write_whole
from nnunetv2_diffusion.planning.derive import resolve_configurations
from nnunetv2_diffusion.settings import HIDIFF, merge_settings, parse_settings
from nnunetv2_diffusion.training.host import PEAK_GPU_MEMORY

SCHEMA = 1
PACKAGE = nnunetv2_diffusion.__name__
CELL, STUDY = "cell", "study"  # kinds of files in a folder of results
METRICS = ("Dice", "HD95", "volume_error", "volume_error_rel")
LOGGED = ("mean_fg_dice", "dice_per_class_or_region", "train_losses", "val_losses")
CHANGE_SPEED = ("nnUNet_n_proc_DA", "nnUNet_def_n_proc", "nnUNet_compile", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
DIGITS = 6
NO_GPU_MEMORY = "nnU-Net's commands do not tell a GPU's; scripts/benchmark measures it"
LOGGED_MEMORY = re.compile(rf"{PEAK_GPU_MEMORY}: (\d+) bytes")


def record_file(results: Path, study: Study, cell: Cell, run: int) -> Path:
    """The JSON of one training."""
    return results / study.name / f"{cell.name}_run{run}.json"


def request_of(
    study: Study, cell: Cell, run: int, predictions: tuple[Prediction, ...], kind: str | None
) -> dict[str, Any]:
    """What is asked for, without defaults: settings that are added to this package later do not change it.

    ``kind`` is that of the trainer's chain.
    """
    analysis = cell.analysis_of(kind)

    def source(name: str | None) -> dict[str, Any] | None:
        return None if name is None else {"cell": name, "run": run % study.cell(name).runs}

    return {
        "study": study.name,
        "cell": cell.name,
        "run": run,
        "trainer": cell.trainer,
        "dataset": study.dataset,
        "configuration": study.configuration,
        "split": study.split.digest(),
        "settings": cell.settings,
        "network": cell.network,
        "predictions": [asdict(prediction) for prediction in predictions],
        "segmentor": source(cell.segmentor),
        "warm_start": source(cell.warm_start),
        "ensemble": None if cell.ensemble is None else {"cell": cell.ensemble, "runs": study.cell(cell.ensemble).runs},
        "analyse": analysis.asked() if analysis else None,
    }


def is_finished(file: Path, request: Mapping[str, Any]) -> bool:
    """Whether a training's results are there; StudyError if the file holds others, or those of another request."""
    if not file.exists():
        return False
    found, request = _in_new_places(read_record(file)["request"]), _in_new_places(request)
    different = [key for key in {**found, **request} if found.get(key) != request.get(key)]
    if different:
        lines = [
            f"{key} is {json.dumps(found.get(key))}, asked for {json.dumps(request.get(key))}" for key in different
        ]
        raise StudyError(
            f"{file} has results of another request: {'; '.join(lines)}. It is not overwritten: move it, or name the "
            "cell otherwise"
        )
    return True


def read_record(file: Path) -> dict[str, Any]:
    """Read one JSON of a training; StudyError if it is none."""
    record = read_json(file, StudyError)
    if record.get("kind") != CELL or record.get("schema") != SCHEMA:
        raise StudyError(
            f"{file}: kind {record.get('kind')!r}, schema {record.get('schema')!r}; expected {CELL!r} and {SCHEMA}, a "
            "file of scripts/study run"
        )
    return record


def _in_new_places(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request with its settings as this version names them: results of version 0.1 are results of this one."""
    return {**request, "settings": merge_settings({}, request.get("settings", {}))}


def collect(training: Training, request: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about a training that is finished.

    Raises:
        StudyError, CheckpointError, EvaluationError, OSError: if a file is missing or cannot be used.
    """
    place, cell = training.place, training.cell
    plans = read_json(place.preprocessed / f"{place.plans_name(cell, training.run)}.json", StudyError)
    dataset = read_json(place.preprocessed / "dataset.json", StudyError)
    configuration = resolve_configurations(plans)[place.study.configuration]
    architecture = configuration["architecture"]
    settings = parse_settings(configuration.get("diffusion")).to_dict()
    settings[HIDIFF]["segmentor"] = None  # ``request`` has the cell and the run that it is of
    code, environment = read_json(training.folder / "code.json", StudyError), place.environment()
    return {
        "schema": SCHEMA,
        "kind": CELL,
        "request": request,
        "split": place.study.split.counts(),
        "labels": {class_key(t.key): t.name for t in read_labels(dataset, plans, "dataset.json").targets},
        "network": {
            "class": architecture["network_class_name"].rsplit(".", 1)[-1],
            "patch_size": configuration["patch_size"],
            "batch_size": configuration["batch_size"],
            "features_per_stage": architecture["arch_kwargs"]["features_per_stage"],
        },
        "settings": settings,
        "hardware": describe_hardware(torch.device(place.device)),
        "jobs": place.jobs,
        "environment": {name: environment[name] for name in CHANGE_SPEED if name in environment},
        "versions": describe_versions(),
        "code": code,
        "code_changed": code["package_sha256"] != describe_code()["package_sha256"],
        "training": _training(training),
        "predictions": [_prediction(training, prediction) for prediction in training.predictions],
        "analysis": _analysis(training),
    }


def describe_code() -> dict[str, Any]:
    """Commit of the checkout, whether its files were changed since, and a digest of the package.

    The commands use the checkout's package: ``scripts/study`` puts it in front of an installed one.
    """
    top = Path(nnunetv2_diffusion.__file__).parents[1]
    status = _git(top, "status", "--porcelain", "--", PACKAGE, "trainers", "plans", "setup.cfg")
    digest = hashlib.sha256()
    for file in sorted((top / PACKAGE).rglob("*.py")):
        digest.update(file.relative_to(top).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return {
        "commit": _git(top, "rev-parse", "HEAD"),
        "dirty": status is None or bool(status),
        "package_sha256": digest.hexdigest()[:16],
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def to_text(value: Any, indent: int = 0) -> str:
    """JSON, with what holds no further lists or objects on one line."""
    nested = isinstance(value, Mapping | list | tuple)
    items = list(value.items()) if isinstance(value, Mapping) else [(None, v) for v in value] if nested else []
    if not any(isinstance(child, Mapping | list | tuple) and child for _, child in items):
        return json.dumps(value, allow_nan=False)
    keys = [f"{json.dumps(str(key))}: " if isinstance(value, Mapping) else "" for key, _ in items]
    lines = [" " * (indent + 1) + key + to_text(v, indent + 1) for key, (_, v) in zip(keys, items, strict=True)]
    opening, closing = "{}" if isinstance(value, Mapping) else "[]"
    return f"{opening}\n" + ",\n".join(lines) + f"\n{' ' * indent}{closing}"


def plain(value: Any) -> Any:
    """Plain data with rounded numbers; null for what is not finite."""
    return json.loads(to_json(value), parse_float=lambda text: float(f"{float(text):.{DIGITS}g}"))


def note_code(training: Training) -> None:
    """Keep the code that a training starts with: collected at its end, another commit may be checked out.

    What an attempt had that ended before its first checkpoint does not count.
    """
    file = training.folder / "code.json"
    if not (file.exists() and training.started):
        write_whole(file, json.dumps(describe_code()))


def _usage(training: Training, stage: str) -> dict[str, Any]:
    """Cost of a stage; a GPU's memory is not measured."""
    usage = {key: training.usage(stage)[key] for key in ("seconds", "attempts", "peak_memory_bytes")}
    if training.place.device != "cpu":
        usage |= {"peak_memory_bytes": None, "peak_memory_note": NO_GPU_MEMORY}
    return plain(usage)


def _training(training: Training) -> dict[str, Any]:
    """Cost, and nnU-Net's log of every epoch, read without running code from the checkpoint.

    Of an ensemble the epochs of all members, and no curve: it was never trained as one.
    """
    place, cell = training.place, training.cell
    sources = place.sources(cell, training.run) if cell.ensemble else [(cell, training.run)]
    logs = [load_checkpoint_file(place.checkpoint(*source))["logging"] for source in sources]
    seconds = [
        end - start
        for log in logs
        for start, end in zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=False)
    ]
    log = {} if cell.ensemble else logs[0]
    usage = _usage(training, "train")
    peak = _logged_peak(training)
    if peak is not None:
        usage |= {"peak_memory_bytes": peak, "peak_memory_note": "tensors on the GPU, told by the trainer's log"}
    return {**usage, "epoch_seconds": plain(seconds), "curve": {key: plain(log[key]) for key in LOGGED if key in log}}


def _logged_peak(training: Training) -> int | None:
    """Most bytes of tensors on a GPU that the logs of a training tell, None if they tell none."""
    folder = training.place.checkpoint(training.cell, training.run).parent
    texts = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("training_log_*.txt"))]
    return max((int(found) for text in texts for found in LOGGED_MEMORY.findall(text)), default=None)


def _prediction(training: Training, prediction: Prediction) -> dict[str, Any]:
    """Cost and scores of every case."""
    summary = read_summary(training.folder / "predictions" / prediction.name, prediction.name)
    scores = {
        case: {label: {m: plain(values.get(m)) for m in METRICS} for label, values in classes.items()}
        for case, classes in summary.cases.items()
    }
    return {
        "name": prediction.name,
        **asdict(prediction),
        **_usage(training, f"predict_{prediction.name}"),
        "scores": scores,
    }


def _analysis(training: Training) -> dict[str, Any] | None:
    """Columns of the CSVs of the verb ``analyse``."""
    if training.analysis is None:
        return None
    files = sorted((training.folder / "analysis").glob("*.csv"))
    words = dict.fromkeys(("case", "label", "mode"), str)  # never taken for numbers
    read = {file.stem: pd.read_csv(file, dtype=words, keep_default_na=False, na_values=[""]) for file in files}
    return {name: plain(table.to_dict("list")) for name, table in read.items()}
