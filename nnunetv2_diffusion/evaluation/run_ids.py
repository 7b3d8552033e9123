"""Whether all that is scored comes from one run of ``predict``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2_diffusion.evaluation import EvaluationError
from nnunetv2_diffusion.evaluation.files import CaseFiles
from nnunetv2_diffusion.files import read_json_if_any
from nnunetv2_diffusion.inference.runs import ARGUMENTS, FOLDER, fingerprint, read_records


def check_one_run(prediction: Path, cases: Sequence[CaseFiles]) -> str | None:
    """Id of the run that made a folder of predictions; None if it is not known, as of version 0.1 and of nnU-Net.

    Raises:
        EvaluationError: files of two runs are scored together, with the id and a file of each.
    """
    found: dict[str | None, Path] = {}
    for file in (prediction / ARGUMENTS, *(prediction / "uncertainty" / f"{case.name}.json" for case in cases)):
        content = read_json_if_any(file)
        if content is not None:
            found.setdefault(content.get("run_id"), file)
    if len(found) > 1:
        runs = [f"{file} is of {_named(name)}" for name, file in found.items()]
        raise EvaluationError(f"{runs[0]}, {runs[1]}: one folder holds two runs; predict again into a new one")
    run = next(iter(found), None)
    if read_json_if_any(prediction / FOLDER / "run.json") is not None:
        records = read_records(prediction)
        for case in cases:
            _check_case(case, prediction, records.get(case.name, {}), run)
    return run


def changed_masks(prediction: Path, cases: Sequence[CaseFiles]) -> list[str]:
    """Cases whose mask is not the one that the recorded run wrote: corrected by hand, or copied from elsewhere.

    Only the masks are read. Without a record, as of version 0.1 and of nnU-Net, there are none.
    """
    records, changed = read_records(prediction), []
    for case in cases:
        file = case.prediction
        name = file.relative_to(prediction).as_posix() if file.is_relative_to(prediction) else None
        expected = records.get(case.name, {}).get("files", {}).get(name)
        if expected is not None and fingerprint(file, expected.get("bytes")) != expected:
            changed.append(case.name)
    return changed


def check_summary(file: Path, content: dict[str, Any]) -> None:
    """Refuse scores of another run than the folder holds now.

    Args:
        file: the summary.
        content: of it.

    Raises:
        EvaluationError: naming both runs.
    """
    conventions, arguments = content.get("conventions"), read_json_if_any(file.parent / ARGUMENTS)
    if arguments is None or not isinstance(conventions, dict) or "run_id" not in conventions:
        return
    then, now = conventions["run_id"], arguments.get("run_id")
    if then != now:
        raise EvaluationError(
            f"{file} scores {_named(then)}, {file.parent} holds {_named(now)}: type nnunetv2_diffusion evaluate "
            f"GROUND_TRUTH {file.parent} --overwrite"
        )


def _check_case(case: CaseFiles, prediction: Path, record: dict[str, Any], run: str | None) -> None:
    """Every file of a case that lies in the folder must be one that the run has recorded."""
    if "failed" in record:
        raise EvaluationError(f"{case.prediction}: {_named(run)} failed at this case: {record['failed']}")
    if record.get("run_id") != run:
        raise EvaluationError(f"{case.prediction}: is of {_named(record.get('run_id'))}, the folder of {_named(run)}")
    for file in (case.prediction, case.probabilities, *case.samples):
        if file is None or not file.is_relative_to(prediction):
            continue
        if file.relative_to(prediction).as_posix() not in record.get("files", {}):
            raise EvaluationError(f"{file}: was not made by {_named(run)}, as the mask of this case was; remove it")


def _named(run: str | None) -> str:
    return "a run without id (of version 0.1, or of nnU-Net)" if run is None else f"run {run}"
