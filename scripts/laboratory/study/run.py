"""Run a study: cells that are finished are skipped, interrupted ones are continued, several trainings at once."""

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laboratory.commands import CommandError, CommandRunner
from laboratory.raw_data import RawDataError
from laboratory.study import StudyError, records
from laboratory.study.definition import SOURCES, Cell, Study, predictions_of, read_study
from laboratory.study.stages import Training
from laboratory.study.workplace import Workplace, say
from nnunetv2_diffusion.checkpoints import CheckpointError, find_trainer
from nnunetv2_diffusion.evaluation import EvaluationError
from nnunetv2_diffusion.pages import write_whole
from nnunetv2_diffusion.settings import merge_settings

EXPECTED = (StudyError, RawDataError, CommandError, CheckpointError, EvaluationError, OSError)
INTERRUPTED = 130


@dataclass
class Unit:
    """One training, what is asked for, the file of its results; ``trained``: its model is there, or will not be."""

    training: Training
    request: dict[str, Any]
    file: Path
    trained: threading.Event = field(default_factory=threading.Event)


def run(arguments: argparse.Namespace) -> int:
    """Run; 1 if something failed, 130 if it was interrupted."""
    old = signal.signal(signal.SIGTERM, signal.default_int_handler)  # commands are ended then, too
    try:
        place, units = open_study(arguments)
        return work(place, units)
    except EXPECTED as error:
        print(f"scripts/study run: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, old)


def open_study(arguments: argparse.Namespace) -> tuple[Workplace, list[Unit]]:
    """Check everything, then prepare the data; units that are not finished.

    Raises:
        StudyError, RawDataError, CommandError, OSError: naming what cannot be used.
    """
    study = read_study(arguments.study)
    if arguments.jobs < 1:
        raise StudyError(f"--jobs is {arguments.jobs}, expected at least 1")
    cells = [study.cell(name) for name in dict.fromkeys(arguments.cells or [c.name for c in study.cells])]
    device = arguments.device or study.content.get("device", "cuda")
    place = Workplace(arguments.out.resolve(), study, device, CommandRunner(), arguments.jobs)
    raw = place.find_raw(arguments.raw)
    results = arguments.results or arguments.out / "results"
    units = open_units(place, cells, results)
    if not units:
        say("all cells are finished")
        return place, units
    place.root.mkdir(parents=True, exist_ok=True)
    _copy_study(study, results)
    code = records.describe_code()
    if code["commit"] is None or code["dirty"]:
        why = "no git checkout of this package found" if code["commit"] is None else "changes are not committed"
        print(f"warning: {why}; results will not name the code that made them", file=sys.stderr)
    place.prepare(raw)
    return place, units


def open_units(place: Workplace, cells: Sequence[Cell], results: Path) -> list[Unit]:
    """Trainings that are not finished, those that others wait for first.

    Raises:
        StudyError: for a prediction or result that cannot be used.
        CheckpointError: for a trainer that nnU-Net does not find.
    """
    units = []
    for cell in sorted(cells, key=lambda c: c.source is not None):
        kind = chain_of(cell.trainer)
        _check(cell, kind)
        predictions = predictions_of(cell, kind)
        for number in range(cell.runs):
            request = records.request_of(place.study, cell, number, predictions, kind)
            file = records.record_file(results, place.study, cell, number)
            if records.is_finished(file, request):
                say(f"{cell.name} run {number}: finished, {file}")
            else:
                training = Training(place, cell, number, predictions, cell.analysis_of(kind), kind is not None)
                units.append(Unit(training, request, file))
    return units


def _check(cell: Cell, kind: str | None) -> None:
    """Raises StudyError for what a trainer cannot have, before anything is trained."""
    from nnunetv2_diffusion.analysis.studies import MODES

    where = f"cell {cell.name}"
    if cell.segmentor is not None and kind != "hidiff":
        raise StudyError(f"{where}: it has a segmentor, expected a HiDiff trainer and not {cell.trainer}")
    if cell.warm_start is not None and kind is None:
        raise StudyError(f"{where}: it has a warm_start, expected a diffusion trainer and not {cell.trainer}")
    if cell.analysis_of(kind) is not None:
        unknown = [mode for mode in cell.analyse.modes.split() if mode not in MODES]
        if unknown:
            raise StudyError(f"{where}: analyse has the mode {unknown[0]!r}, expected some of {', '.join(MODES)}")


def chain_of(trainer: str) -> str | None:
    """Kind of a trainer's chain: "gaussian", "hidiff" (HiDiff), "draws" (its steps are draws), or None.

    Raises:
        CheckpointError: if nnU-Net does not find the trainer.
    """
    from nnunetv2_diffusion.methods.hidiff import HiDiffTrainer
    from nnunetv2_diffusion.methods.recycle_score import RecycleScoreTrainer
    from nnunetv2_diffusion.training import DiffusionTrainer

    found = find_trainer(trainer)
    if issubclass(found, HiDiffTrainer):
        return "hidiff"
    if issubclass(found, RecycleScoreTrainer):
        return "draws"
    return "gaussian" if issubclass(found, DiffusionTrainer) and found.uses_mask else None


def work(place: Workplace, units: Sequence[Unit]) -> int:
    """Run units, as many at once as there are jobs; what fails does not stop the others, and makes the status 1."""
    by_name = {(u.training.cell.name, u.training.run): u for u in units}
    status = 0
    executor = ThreadPoolExecutor(place.jobs)
    try:
        futures: dict[Future, Unit] = {executor.submit(_finish, unit, by_name): unit for unit in units}
        for count, future in enumerate(as_completed(futures), start=1):
            unit, error = futures[future], future.exception()
            if error is not None and not isinstance(error, EXPECTED):
                raise error
            say(f"[{count}/{len(units)}] {unit.training.title}: {'FAILED' if error else unit.file}")
            if error is not None:
                status = 1
                print(f"scripts/study run: {unit.training.title}: {error}", file=sys.stderr, flush=True)
    except BaseException:
        place.runner.stop()
        executor.shutdown(wait=False, cancel_futures=True)
        for unit in units:
            unit.trained.set()  # nothing waits for a training that will not come
        raise
    finally:
        executor.shutdown()
    return status


def _finish(unit: Unit, units: dict[tuple[str, int], Unit]) -> None:
    """All stages of a unit, and its results."""
    training = unit.training
    try:
        _wait_for_sources(training, units)
        records.note_code(training)
        training.work(unit.trained.set)
    finally:
        unit.trained.set()
    text = records.to_text(records.collect(training, unit.request)) + "\n"
    if unit.file.exists():
        raise StudyError(f"{unit.file} was written by another run in the meantime; it is not overwritten")
    write_whole(unit.file, text)


def _wait_for_sources(training: Training, units: dict[tuple[str, int], Unit]) -> None:
    """Raises StudyError if a checkpoint that a training needs is not there in the end."""
    for cell, number in training.place.sources(training.cell, training.run):
        if (cell.name, number) in units:
            units[cell.name, number].trained.wait()
        file = training.place.checkpoint(cell, number)
        if not file.is_file():
            key = next(key for key in SOURCES if getattr(training.cell, key))
            raise StudyError(f"it needs {cell.name} run {number} ({key}), which is not trained: no {file}")


def _copy_study(study: Study, results: Path) -> None:
    """What the page needs of the study beside the results: order of cells, reference, questions."""
    kept = {k: study.content[k] for k in ("name", "summary", "reference", "questions") if k in study.content}
    cells, settings = [cell.name for cell in study.cells], merge_settings({}, study.content.get("settings", {}))
    record = {"schema": records.SCHEMA, "kind": records.STUDY, **kept, "cells": cells, "settings": settings}
    write_whole(results / study.name / "study.json", records.to_text(record) + "\n")
