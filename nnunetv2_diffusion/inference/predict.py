"""Verb ``predict``: nnU-Net's prediction with samples, uncertainty and control of steps and mirrors."""

import argparse
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nnunetv2_diffusion.checkpoints import CheckpointError
from nnunetv2_diffusion.compat import package_versions
from nnunetv2_diffusion.files import write_json
from nnunetv2_diffusion.inference.arguments import EXAMPLES, add_arguments, model_folder
from nnunetv2_diffusion.inference.cases import CasePredictor, CaseResult, model_files
from nnunetv2_diffusion.inference.export import work_folder
from nnunetv2_diffusion.inference.exporter import Exporter
from nnunetv2_diffusion.inference.failures import concerns_one_case, reason_of
from nnunetv2_diffusion.inference.inputs import InputError, list_cases, prepare_output
from nnunetv2_diffusion.inference.loading import find_folds, load_predictor
from nnunetv2_diffusion.inference.maps import MapWriterError, check_map_writer
from nnunetv2_diffusion.inference.options import OptionError, PredictionOptions, check_number
from nnunetv2_diffusion.inference.predictor import DiffusionPredictor
from nnunetv2_diffusion.inference.prepared import FailedCase, PreparedCase, prepare_cases
from nnunetv2_diffusion.inference.runs import (
    ARGUMENTS,
    FAILED,
    Request,
    RunError,
    RunRecord,
    check_place,
    describe_run,
    open_run,
    write_failures,
)
from nnunetv2_diffusion.locks import LockedError
from nnunetv2_diffusion.networks import UnsupportedArchitectureError
from nnunetv2_diffusion.out_of_memory import is_out_of_memory
from nnunetv2_diffusion.settings import SettingsError

MOST_PROCESSES = 1024
SMALLEST_STEP = 0.01  # of the window, in parts of the patch: tiles grow with its inverse to the third power


class StoppedError(RuntimeError):
    """What a case failed at concerns all cases."""


__all__ = ["EXAMPLES", "add_arguments", "run"]  # what the command asks a verb for
EXPECTED = (
    CheckpointError,
    InputError,
    LockedError,
    MapWriterError,
    OptionError,
    OSError,
    RunError,
    SettingsError,
    StoppedError,
    UnsupportedArchitectureError,
)


def run(arguments: argparse.Namespace) -> int:
    """Predict a folder; 1 with a message if it, or a case of it, cannot be done."""
    try:
        outcome = predict_folder(arguments)
    except KeyboardInterrupt:
        print("nnunetv2_diffusion predict: interrupted; --continue_prediction goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if not isinstance(error, EXPECTED) and not is_out_of_memory(error):
            raise
        said = str(error) if isinstance(error, EXPECTED) else reason_of(error)
        print(f"nnunetv2_diffusion predict: {said}", file=sys.stderr)
        return 1
    return _summarise(outcome, arguments.o)


def read_options(arguments: argparse.Namespace) -> PredictionOptions:
    """Options of the command line.

    Raises:
        OptionError: for a value out of range, or options that exclude each other.
    """
    check_number("-num_parts", arguments.num_parts, 1, 1_000_000)
    if not 0 <= arguments.part_id < arguments.num_parts:
        raise OptionError(f"-part_id is {arguments.part_id}, expected 0 .. {arguments.num_parts - 1} (-num_parts - 1)")
    for name in ("npp", "nps"):
        check_number(f"-{name}", getattr(arguments, name), 0, MOST_PROCESSES)
    if not SMALLEST_STEP <= arguments.step_size <= 1:
        raise OptionError(f"-step_size is {arguments.step_size}, expected a part of the patch in [{SMALLEST_STEP}, 1]")
    if arguments.overwrite and arguments.continue_prediction:
        raise OptionError("--continue_prediction keeps what is there and --overwrite makes it again: choose one")
    if arguments.retry_failed and not arguments.continue_prediction:
        raise OptionError("--retry_failed goes with --continue_prediction, which keeps the other cases")
    names = PredictionOptions.__dataclass_fields__
    given = {name: getattr(arguments, name) for name in names}
    if arguments.disable_tta:
        given["tta"] = "none"
    return PredictionOptions(**given)


@dataclass
class Outcome:
    """What became of the cases of a call.

    Attributes:
        found: how many there are.
        finished: how many were whole before.
        predicted: those that were written.
        failed: case -> reason, also of earlier calls if they were not tried again.
        seconds: that it took.
    """

    found: int = 0
    finished: int = 0
    predicted: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def predict_folder(arguments: argparse.Namespace) -> Outcome:
    """All of the verb; every check comes before the first network pass."""
    start = time.monotonic()
    options = read_options(arguments)
    model = model_folder(arguments)
    check_place(arguments.o, arguments.i, model, arguments.prev_stage_predictions)
    checkpoints = find_folds(model, arguments.f, arguments.chk)
    _tell_of_fold_all(checkpoints)
    predictor = load_predictor(
        model, arguments.f, arguments.chk, arguments.device, options, arguments.step_size,
        not arguments.not_on_device, not arguments.disable_progress_bar, arguments.verbose,
    )  # fmt: skip
    if options.save_uncertainty:
        check_map_writer(predictor.plans_manager.image_reader_writer_class, predictor.dataset_json["file_ending"])
    previous = _previous_stage(arguments, predictor)
    cases, failed = _find_cases(arguments, predictor, previous)
    prepare_output(arguments.o, arguments.i)
    request = Request(
        describe_run(predictor, checkpoints, arguments.step_size), [*cases, *failed],
        predictor.dataset_json["file_ending"], arguments.part_id, arguments.num_parts,
        arguments.continue_prediction, arguments.overwrite,
    )  # fmt: skip
    with open_run(arguments.o, request) as run:
        _write_records(arguments, predictor, run)
        outcome = Outcome(len(cases) + len(failed))
        work = Work(predictor, run, cases, previous, arguments.npp, arguments.nps, arguments.overwrite)
        if arguments.continue_prediction:
            _leave_out(work, arguments.retry_failed, outcome)
        _predict_cases(work, failed, outcome, arguments.disable_progress_bar)
    outcome.seconds = time.monotonic() - start
    return outcome


@dataclass
class Work:
    """What is to be predicted.

    Attributes:
        predictor: prepared.
        run: the record of the output folder.
        cases: name -> images.
        previous: folder of the previous stage's masks, of a cascade.
        preparing: processes for preprocessing.
        exporting: processes for export.
        replacing: cases that were made before (--overwrite).
    """

    predictor: DiffusionPredictor
    run: RunRecord
    cases: dict[str, list[Path]]
    previous: Path | None
    preparing: int
    exporting: int
    replacing: bool = False

    def sources(self, name: str) -> list[Path]:
        """All files that a case is made of."""
        ending = self.predictor.dataset_json["file_ending"]
        masks = [] if self.previous is None else [self.previous / f"{name}{ending}"]
        return [*self.cases.get(name, ()), *masks]


def _find_cases(
    arguments: argparse.Namespace, predictor: DiffusionPredictor, previous: Path | None
) -> tuple[dict[str, list[Path]], dict[str, str]]:
    """Case -> images, and case -> why it cannot be predicted, of this call's part."""
    ending = predictor.dataset_json["file_ending"]
    cases, unreadable = list_cases(arguments.i, predictor.dataset_json)
    failed = {case.name: case.reason for case in unreadable}
    for name in list(cases) if previous is not None else ():
        if not (previous / f"{name}{ending}").is_file():
            failed[name] = f"{previous / f'{name}{ending}'}: missing, expected the mask of the previous stage"
            del cases[name]
    mine = set(sorted({*cases, *failed})[arguments.part_id :: arguments.num_parts])
    return {n: f for n, f in cases.items() if n in mine}, {n: r for n, r in failed.items() if n in mine}


def _previous_stage(arguments: argparse.Namespace, predictor: DiffusionPredictor) -> Path | None:
    """Folder of the previous stage's masks; None if the model needs none."""
    stage, folder = predictor.configuration_manager.previous_stage_name, arguments.prev_stage_predictions
    if stage is None:
        if folder is not None:
            print(f"-prev_stage_predictions {folder} is ignored: this model is no second stage of a cascade")
        return None
    if folder is None:
        raise OptionError(f"-prev_stage_predictions missing: this cascade needs the masks of {stage}")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected the masks of {stage}")
    return folder


def _leave_out(work: Work, retry_failed: bool, outcome: Outcome) -> None:
    """Leave out what an interrupted call has finished, and what it has failed at unless that is to be tried again."""
    for name in list(work.cases):
        record = work.run.read(name) or {}
        if "failed" in record and not retry_failed:
            outcome.failed[name] = f"{record['failed']} (before; --retry_failed tries again)"
            del work.cases[name]
            continue
        fault = work.run.fault(name, work.sources(name))
        if fault is None:
            outcome.finished += 1
            del work.cases[name]
        elif record and "failed" not in record:
            print(f"{name}: {fault}; it is made again")
    print(f"{outcome.finished} of {outcome.found} cases are finished")


def _predict_cases(work: Work, failed: Mapping[str, str], outcome: Outcome, quiet: bool) -> None:
    """Predict and export; what a case fails at is kept in the record of the run, and the others go on.

    Raises:
        StoppedError: a failure that concerns all cases; what was finished is kept.
    """
    single = len(work.cases) == 1
    work.predictor.allow_tqdm = work.predictor.allow_tqdm and single  # one bar: of cases, or of the passes of one
    new, seen = dict(failed), set()
    export = Exporter(model_files(work.predictor), min(work.exporting, len(work.cases)))
    try:
        with export:
            predict_case = CasePredictor(work.predictor, work.run, export)
            cases = prepare_cases(work.predictor, work.cases, work.previous, work.preparing)
            for case in _with_bar(cases, len(work.cases), quiet or len(work.cases) < 2):
                seen.add(case.name)
                reason = _attempt(predict_case, case, work.sources(case.name))
                if reason is not None:
                    new[case.name] = reason
            lost = set(work.cases) - seen
            new |= dict.fromkeys(sorted(lost), "preprocessing returned nothing")
    finally:
        new |= {case.name: case.reason for case in export.failed}
        outcome.predicted = export.finished
        outcome.failed |= new
        _keep_failures(work.run, new, work.replacing)


def _with_bar(
    cases: Iterable[PreparedCase | FailedCase], total: int, hidden: bool
) -> Iterable[PreparedCase | FailedCase]:
    """The cases, with a bar that counts them and tells the time left."""
    with tqdm(total=total, unit="case", disable=hidden) as bar:
        for number, case in enumerate(cases, start=1):
            bar.set_description(f"case {number} of {total}, {case.name}")
            yield case
            bar.update()


def _attempt(predict_case: CasePredictor, case: PreparedCase | FailedCase, inputs: Sequence[Path]) -> str | None:
    """Why a case could not be predicted; None if it could.

    Raises:
        StoppedError: a failure that concerns all cases.
    """
    if isinstance(case, FailedCase):
        return case.reason
    for note in case.notes:
        tqdm.write(f"{case.name}: {note}")
    try:
        _report(case.name, predict_case(case, inputs))
        return None
    except Exception as error:
        if not concerns_one_case(error):
            if predict_case.predictor.verbose:
                traceback.print_exc()
            raise StoppedError(
                f"{case.name}: {reason_of(error)}; taken for a fault of the model or of the machine, so no other case "
                "was tried. --continue_prediction goes on, --verbose shows where it was"
            ) from error
        reason = reason_of(error, work_folder(predict_case.run.out, case.name))
    if predict_case.predictor.device.type == "cuda":
        torch.cuda.empty_cache()
    return reason


def _keep_failures(run: RunRecord, failed: Mapping[str, str], replacing: bool) -> None:
    """Write down what failed; a full disk may keep this from being written, and it is printed anyhow."""
    with suppress(OSError, LockedError):
        for name, reason in failed.items():
            if run.fail(name, reason, keep=replacing):
                print(f"{name}: could not be made again; its earlier files stay, marked as failed in {FAILED}")
        write_failures(run.out)


def _report(name: str, result: CaseResult) -> None:
    passes = result.passes
    masks = "1 mask" if passes.members == 1 else f"mean of {passes.members} masks"
    tqdm.write(
        f"{name}: {result.seconds:.1f} s, {masks}, {_count(passes.tiles, 'tile')}, "
        f"{_count(passes.passes, 'pass')} of the network"
    )


def _summarise(outcome: Outcome, out: Path) -> int:
    """Tell what became of the cases; the exit status."""
    if outcome.failed or outcome.finished:
        print(
            f"{_count(outcome.found, 'case')} found: {len(outcome.predicted)} predicted, {outcome.finished} finished "
            f"before, {len(outcome.failed)} failed"
        )
    for name, reason in sorted(outcome.failed.items()):
        print(f"nnunetv2_diffusion predict: {name} failed: {reason}", file=sys.stderr)
    if outcome.failed:
        print(f"nnunetv2_diffusion predict: failed cases and reasons are in {out / FAILED}", file=sys.stderr)
    print(f"{_count(len(outcome.predicted), 'case')} in {outcome.seconds:.0f} s, written to {out}")
    return 1 if outcome.failed else 0


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 'es' if what.endswith('s') else 's'}"


def _tell_of_fold_all(checkpoints: Sequence[Path]) -> None:
    folds = [file.parent.name.removeprefix("fold_") for file in checkpoints]
    if "all" in folds and len(folds) > 1:
        print(f"-f {' '.join(folds)}: fold all was trained on every case; it counts as one of {len(folds)} members")


def _write_records(arguments: argparse.Namespace, predictor: DiffusionPredictor, run: RunRecord) -> None:
    """plans.json, dataset.json and the arguments, as nnU-Net leaves them beside the masks."""
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k not in ("run", "verb")}
    records: dict[str, Any] = {
        "plans.json": predictor.plans_manager.plans,
        "dataset.json": predictor.dataset_json,
        ARGUMENTS: {"run_id": run.id, "versions": package_versions(), **given},
    }
    for name, content in records.items():
        write_json(arguments.o / name, content)
