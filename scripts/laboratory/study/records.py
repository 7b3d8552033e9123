"""One JSON for each training: settings, versions, hardware, commit, time, memory, scores of every case, curves.

``schema`` (another number when a key goes or changes its meaning), ``kind`` ("cell"), ``request`` (what the study asks
for; a result with another request is never taken for it), ``settings`` and ``network`` as resolved, ``labels``,
``hardware``, ``versions``, ``code`` (at the start; ``code_changed`` since), ``training`` (seconds of the last attempt,
attempts, peak_memory_bytes, seconds and nnU-Net's log of every epoch, what importance sampling of time has learned),
``predictions`` (seconds, scores: case -> label -> metric) and ``analysis`` (columns of the CSVs of the verb
``analyse``). Undefined scores are null. Nothing in it names the machine or its folders.
"""

import csv
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

import torch

import nnunetv2_diffusion
from laboratory.benchmarking.report import describe_hardware, describe_versions
from laboratory.study import StudyError
from laboratory.study.definition import Cell, Prediction, Study, read_json
from laboratory.study.stages import Training
from laboratory.study.workplace import Workplace
from nnunetv2_diffusion.checkpoints import load_checkpoint_file
from nnunetv2_diffusion.evaluation.labels import read_labels
from nnunetv2_diffusion.evaluation.summaries import class_key, read_summary
from nnunetv2_diffusion.pages import write_whole
from nnunetv2_diffusion.planning.derive import resolve_configurations
from nnunetv2_diffusion.planning.settings import HIDIFF, parse_settings
from nnunetv2_diffusion.training.host import PEAK_GPU_MEMORY
from nnunetv2_diffusion.training.trainer import TIME_SAMPLER_KEY

SCHEMA = 1
PACKAGE = nnunetv2_diffusion.__name__
CELL, STUDY = "cell", "study"  # kinds of files in a folder of results
METRICS = ("Dice", "HD95", "volume_error", "volume_error_rel")
LOGGED = ("mean_fg_dice", "dice_per_class_or_region", "train_losses", "val_losses")
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

    Args:
        study: with the cell.
        cell: what is trained.
        run: number of the training.
        predictions: what is predicted.
        kind: of the trainer's chain.
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
    """Whether a training's results are there.

    Raises:
        StudyError: if the file holds something else, or the results of another request.
    """
    if not file.exists():
        return False
    found = read_record(file)["request"]
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
    """Read one JSON of a training.

    Raises:
        StudyError: if it is none.
    """
    record = read_json(file)
    if record.get("kind") != CELL or record.get("schema") != SCHEMA:
        raise StudyError(
            f"{file}: kind {record.get('kind')!r}, schema {record.get('schema')!r}; expected {CELL!r} and {SCHEMA}, a "
            "file of scripts/study run"
        )
    return record


def collect(training: Training, request: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about a training that is finished.

    Raises:
        StudyError, CheckpointError, EvaluationError, OSError: if a file is missing or cannot be used.
    """
    place, cell = training.place, training.cell
    plans = read_json(place.preprocessed / f"{place.plans_name(cell, training.run)}.json")
    configuration = resolve_configurations(plans)[place.study.configuration]
    settings = parse_settings(configuration.get("diffusion")).to_dict()
    settings[HIDIFF]["segmentor_checkpoint"] = None  # ``request`` has the cell and the run that it is of
    return {
        "schema": SCHEMA,
        "kind": CELL,
        "request": request,
        "split": place.study.split.counts(),
        "labels": _labels(place, plans),
        "network": _network(configuration),
        "settings": settings,
        "hardware": describe_hardware(torch.device(place.device)),
        "jobs": place.jobs,
        "environment": _environment(place),
        "versions": describe_versions(),
        **_code(training),
        "training": _training(training),
        "predictions": [_prediction(training, prediction) for prediction in training.predictions],
        "analysis": _analysis(training),
    }


def describe_code(study_file: Path, folder: Path) -> dict[str, Any]:
    """Commit, whether files were changed since, and a digest of the package that commands use.

    Args:
        study_file: whose checkout is looked at if this package is not run from one.
        folder: that commands run in; it must exist.

    Returns:
        ``commit``, ``dirty`` and ``same_package`` (as the checkout's) are None outside of a checkout.
    """
    package = _package_of_commands(folder)
    digest = _digest(package) if package else None
    described = {"commit": None, "dirty": None, "same_package": None, "package_sha256": digest}
    for start in (Path(nnunetv2_diffusion.__file__).parent, study_file.resolve().parent):
        top = _git(start, "rev-parse", "--show-toplevel")
        if top and (Path(top) / PACKAGE / "__init__.py").is_file():
            status = _git(Path(top), "status", "--porcelain", "--", PACKAGE, "trainers", "plans", "setup.cfg")
            described["commit"] = _git(Path(top), "rev-parse", "HEAD")
            described["dirty"] = status is None or bool(status)
            described["same_package"] = _digest(Path(top) / PACKAGE) == digest
            break
    return described


def to_text(value: Any, indent: int = 0) -> str:
    """JSON, with what holds no further lists or objects on one line."""
    if isinstance(value, Mapping | list | tuple) and value:
        children = list(value.values()) if isinstance(value, Mapping) else list(value)
        if any(isinstance(child, Mapping | list | tuple) and child for child in children):
            pad = " " * (indent + 1)
            if isinstance(value, Mapping):
                lines = [f"{pad}{json.dumps(str(k))}: {to_text(v, indent + 1)}" for k, v in value.items()]
            else:
                lines = [pad + to_text(v, indent + 1) for v in value]
            opening, closing = "{}" if isinstance(value, Mapping) else "[]"
            return f"{opening}\n" + ",\n".join(lines) + f"\n{' ' * indent}{closing}"
    return json.dumps(value, allow_nan=False)


def plain(value: Any) -> Any:
    """Plain data with rounded numbers; null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    number = float(value)
    return float(f"{number:.{DIGITS}g}") if isfinite(number) else None


def note_code(training: Training) -> None:
    """Keep the code that a training starts with: collected at its end, another commit may be checked out.

    What an attempt had that ended before its first checkpoint does not count.
    """
    file = training.folder / "code.json"
    if not (file.exists() and training.started):
        training.folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(describe_code(training.place.study.file, training.place.root)))


def _code(training: Training) -> dict[str, Any]:
    """The code at the start, and whether commands had another one at the end."""
    start = read_json(training.folder / "code.json")
    end = describe_code(training.place.study.file, training.place.root)
    return {"code": start, "code_changed": start["package_sha256"] != end["package_sha256"]}


def _labels(place: Workplace, plans: Mapping[str, Any]) -> dict[str, str]:
    """Key of a class or region in the scores -> its name."""
    dataset = read_json(place.preprocessed / "dataset.json")
    return {class_key(target.key): target.name for target in read_labels(dataset, plans, "dataset.json").targets}


def _network(configuration: Mapping[str, Any]) -> dict[str, Any]:
    architecture = configuration["architecture"]
    return {
        "class": architecture["network_class_name"].rsplit(".", 1)[-1],
        "patch_size": configuration["patch_size"],
        "batch_size": configuration["batch_size"],
        "features_per_stage": architecture["arch_kwargs"]["features_per_stage"],
    }


def _environment(place: Workplace) -> dict[str, str]:
    """Variables that change speed, of the commands."""
    kept = ("nnUNet_n_proc_DA", "nnUNet_def_n_proc", "nnUNet_compile", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
    environment = place.environment()
    return {name: environment[name] for name in kept if name in environment}


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
    checkpoints = [load_checkpoint_file(place.checkpoint(*source)) for source in sources]
    logs = [checkpoint["logging"] for checkpoint in checkpoints]
    seconds = [
        end - start
        for log in logs
        for start, end in zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=False)
    ]
    log = {} if cell.ensemble else logs[0]
    usage = _usage(training, "train")
    history = None if cell.ensemble else time_history(checkpoints[0])
    if history is not None:
        usage["time_sampling"] = history
    peak = _logged_peak(training)
    if peak is not None:
        usage |= {"peak_memory_bytes": peak, "peak_memory_note": "tensors on the GPU, told by the trainer's log"}
    return {
        **usage,
        "epoch_seconds": plain(seconds),
        "curve": {key: plain(log[key]) for key in LOGGED if key in log},
    }


def time_history(checkpoint: Mapping[str, Any]) -> dict[str, list] | None:
    """What importance sampling of time has learned: loss (root mean square) and visits of every t; None without it."""
    state = checkpoint.get("optimizer_state") or {}
    history = state.get(TIME_SAMPLER_KEY)
    if not history:
        return None
    return {"loss": plain(history["loss_sq"].sqrt().tolist()), "visits": history["count"].tolist()}


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
    folder = training.folder / "analysis"
    if not training.analyses:
        return None
    return {file.stem: _columns(file) for file in sorted(folder.glob("*.csv"))}


def _columns(file: Path) -> dict[str, list]:
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {name: [_number(row[name]) for row in rows] for name in rows[0]} if rows else {}


def _number(text: str) -> Any:
    """A number where a text is one, null for nothing."""
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return plain(float(text))
    except ValueError:
        return text


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def _package_of_commands(folder: Path) -> Path | None:
    """Where a command finds this package: not always where this process has it from."""
    code = f"import importlib.util; print(importlib.util.find_spec({PACKAGE!r}).submodule_search_locations[0])"
    try:
        result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return Path(result.stdout.strip())


def _digest(package: Path) -> str:
    """Of all Python files of a package."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py"), key=lambda f: f.relative_to(package).as_posix()):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
