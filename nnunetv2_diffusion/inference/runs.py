"""The record of a prediction in its output folder: which model, which options, and the files of every case.

::

    OUT/.run/run.json          id, model and options, versions
    OUT/.run/cases/CASE.json   the files of a case with their hashes, or why it failed

A case's record is written before its files are moved to their places. So whatever is killed at whatever moment, a file
of this command has a record, and a case is finished if all of its files are what the record says.
"""

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_diffusion.compat import package_versions
from nnunetv2_diffusion.files import read_json_if_any, write_json
from nnunetv2_diffusion.locks import LockedError, holder, locked

if TYPE_CHECKING:
    from nnunetv2_diffusion.inference.predictor import DiffusionPredictor

FOLDER = ".run"
ARGUMENTS = "predict_from_raw_data_args.json"
FAILED = "failed.json"
SIDE_FOLDERS = ("uncertainty", "samples", "steps")
UNFINISHED = ".unfinished_"
SAMPLING = ("steps", "sampler", "step_spacing", "samples", "seed", "eta")
START_WAIT = 60.0  # seconds that one part waits for another one to start
LONGEST_NAME = 120  # characters of a case in names of our own; file systems allow 255 bytes
LISTED = 3  # names in a message
HASH = "sha256:"
TEMPORARY = re.compile(r"\.(.+\.json\.\d+|.+\.\d+\.part|writable_\d+|lock(_\d+_of_\d+)?)")


class RunError(ValueError):
    """Results of two runs would be mixed, or files lost; the message says what to type."""


# ---- one run --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunRecord:
    """What a run has written.

    Attributes:
        out: the output folder.
        id: of the run, in every JSON of it.
    """

    out: Path
    id: str

    def read(self, name: str) -> dict[str, Any] | None:
        """The record of a case: ``run_id``, ``case``, ``inputs`` and ``files``, or ``failed``; None without one."""
        return read_json_if_any(self._file(name))

    def write(self, name: str, work: Path, inputs: Iterable[Path]) -> None:
        """Record the files of a finished case that lie in a work folder and are about to be moved.

        What an earlier call wrote of the case is removed first, not before: until then it is all that there is.

        Args:
            name: of the case.
            work: where its files are, at the same places as later in the output folder.
            inputs: images that it was made of.
        """
        files = {str(f.relative_to(work)): fingerprint(f) for f in sorted(work.rglob("*")) if f.is_file()}
        self._remove_files(self.read(name) or {})
        self._write(name, inputs=_inputs(inputs), files=files)

    def fail(self, name: str, reason: str, keep: bool = False) -> bool:
        """Record that a case could not be made, and remove what this run wrote of it.

        Args:
            name: of the case.
            reason: why.
            keep: leave the files of an earlier call, if replacing them has not begun.

        Returns:
            whether files of an earlier call were left.
        """
        record = self.read(name) or {}
        files = record.get("files", {})
        keep = keep or "failed" in record  # whose files, if any, were left before
        kept = keep and bool(files) and all((self.out / file).is_file() for file in files)
        self._write(name, failed=reason, files=files if kept else self._remove_files(record))
        return kept

    def forget(self, name: str) -> None:
        """Remove the files of a case and its record; a file of another content than was written stays."""
        self._remove_files(self.read(name) or {})
        self._file(name).unlink(missing_ok=True)

    def fault(self, name: str, inputs: Iterable[Path]) -> str | None:
        """Why a case has to be made (again); None if it is whole."""
        record = self.read(name)
        if record is None or "failed" in record or record.get("run_id") != self.id:
            return "not finished"
        if record["inputs"] != _inputs(inputs):
            return "made of other images"
        for file, expected in record["files"].items():
            if not (self.out / file).is_file():
                return f"{file} is missing"
            if fingerprint(self.out / file, expected["bytes"]) != expected:
                return f"{file} is not what was written"
        return None

    def _file(self, name: str) -> Path:
        return self.out / FOLDER / "cases" / f"{short_name(name)}.json"

    def _write(self, name: str, **content: Any) -> None:
        self._file(name).parent.mkdir(parents=True, exist_ok=True)
        write_json(self._file(name), {"run_id": self.id, "case": name, **content})

    def _remove_files(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Remove what is as it was written; returns the others that are there."""
        others = {}
        for name, expected in record.get("files", {}).items():
            file = self.out / name
            if not file.is_file():
                continue
            if fingerprint(file, expected["bytes"]) != expected:
                others[name] = expected
                continue
            file.unlink()
            for folder in list(Path(name).parents)[:-1]:
                with suppress(OSError):  # not empty
                    (self.out / folder).rmdir()
        return others


def short_name(case: str) -> str:
    """A case in names of folders and records: long names are cut and get a hash."""
    if len(case) <= LONGEST_NAME:
        return case
    return f"{case[:LONGEST_NAME]}_{hashlib.sha256(case.encode()).hexdigest()[:16]}"


def fingerprint(file: Path, expected_bytes: int | None = None) -> dict[str, Any]:
    """Size and hash of a file; a size other than expected is enough."""
    size = file.stat().st_size
    return {"bytes": size, "hash": file_hash(file) if expected_bytes in (None, size) else None}


def file_hash(file: Path) -> str:
    """SHA-256 of a file's content."""
    total = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            total.update(block)
    return HASH + total.hexdigest()


def _inputs(files: Iterable[Path]) -> dict[str, str | None]:
    """Hashes of images; None for one that is gone."""
    return {str(f.name): file_hash(f) if f.is_file() else None for f in files}


def describe_run(predictor: "DiffusionPredictor", checkpoints: Sequence[Path], step_size: float) -> dict[str, Any]:
    """All that decides about the bytes of results, by the names that a user knows them by.

    Args:
        predictor: prepared.
        checkpoints: files of the folds.
        step_size: of the sliding window.
    """
    sampling = asdict(predictor.sampling) if predictor.sampling else {}
    options = {name: value for name, value in asdict(predictor.options).items() if name not in SAMPLING}
    return {
        "-tr": predictor.trainer_name,
        "plans.json": _content_hash(predictor.plans_manager.plans),
        "dataset.json": _content_hash(predictor.dataset_json),
        "configuration": _content_hash(predictor.configuration_manager.configuration),
        **{f"weights of {file.parent.name}": file_hash(file) for file in checkpoints},
        "-step_size": step_size,
        **{f"--{name}": sampling.get(name) for name in SAMPLING},
        **{f"--{name}": value for name, value in options.items()},
    }


def _content_hash(content: Any) -> str:
    return HASH + hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


# ---- the folder -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What a call wants of its output folder.

    Attributes:
        about: of ``describe_run``.
        names: cases of this call.
        ending: of masks.
        part: its number, from 0.
        parts: how many calls share the work.
        keep: go on with the run that is there (--continue_prediction).
        overwrite: make its cases again, and remove another run (--overwrite).
    """

    about: Mapping[str, Any]
    names: Sequence[str]
    ending: str
    part: int = 0
    parts: int = 1
    keep: bool = False
    overwrite: bool = False


@contextmanager
def open_run(out: Path, request: Request) -> Iterator[RunRecord]:
    """Begin a run in a folder, or go on with the one that is there, and hold the folder for this process.

    Raises:
        LockedError: another process predicts into it.
        RunError: the folder has what this run would replace, or what is of another run.
    """
    _check_links(out)
    with ExitStack() as stack:
        with locked(out / ".lock", "a prediction that starts", START_WAIT):
            others = _take_part(stack, out, request)
            run = _join(out, request, others)
            if not others:
                clear_leftovers(out)
        yield run


def check_place(out: Path, images: Path, model: Path, previous: Path | None) -> None:
    """Refuse an output folder that is one of the inputs, or lies within the model.

    Raises:
        RunError: naming it.
    """
    place, images = out.resolve(), images.parent if images.is_file() else images
    for folder, what in ((images, "the images of -i"), (previous, "the masks of -prev_stage_predictions")):
        if folder is not None and place == folder.resolve():
            raise RunError(f"{out}: the same folder as {what}; give another one with -o")
    if place == model.resolve() or model.resolve() in place.parents:
        raise RunError(f"{out}: lies within the folder of the model, {model}; give another one with -o")


def _check_links(out: Path) -> None:
    """Refuse folders that lead out of the output folder."""
    for top in (FOLDER, *SIDE_FOLDERS):
        folder = out / top
        within = folder.iterdir() if folder.is_dir() and top != FOLDER else ()
        for path in (folder, *within):
            if path.is_symlink() and out.resolve() not in path.resolve().parents:
                raise RunError(f"{path}: is a link out of {out}, expected a folder; remove the link")


def _take_part(stack: ExitStack, out: Path, request: Request) -> list[str]:
    """Hold this call's part of the folder; the other parts that work in it, in words."""
    mine, others = f".lock_{request.part}_of_{request.parts}", []
    for file in sorted(out.glob(".lock_*_of_*")):
        pid = holder(file)
        if pid is None or file.name == mine:
            continue
        if not file.name.endswith(f"_of_{request.parts}"):
            raise LockedError(f"{out}: a prediction with another -num_parts works here already (process {pid})")
        others.append(f"-part_id {file.name.split('_')[1]} (process {pid or 'unknown'})")
    try:
        stack.enter_context(locked(out / mine, "a prediction"))
    except LockedError as error:
        raise LockedError(f"{error}; choose another folder, or share the work with -num_parts and -part_id") from None
    return others


def _join(out: Path, request: Request, others: Sequence[str]) -> RunRecord:
    """The run to go on with; another one's files are gone if they are to be replaced."""
    present = _results(out, request)  # before the records: a part that works now writes those first
    found, records = read_json_if_any(out / FOLDER / "run.json"), read_records(out)
    differences = None if found is None else _differences(found.get("about", {}), request.about)
    same = differences == []
    if others and not same:
        raise LockedError(
            f"{out}: a run with other options works here, {_listed(others)}: "
            f"{'; '.join(differences or ['its record is gone'])}. Choose another folder, or wait for its end"
        )
    holds = [name for name, record in records.items() if _has_files(out, record)]
    recorded = {file for record in records.values() for file in record.get("files", {})}
    unknown = sorted(present - recorded if found is not None else present)
    if request.overwrite and same:  # files stay until each case of this call is replaced
        _tell_of_others(out, unknown)
        return _welcome(out, found)
    if request.overwrite:
        return _replaced(out, request, records, holds)
    if unknown:
        raise RunError(
            f"{out} holds {_count(unknown, 'file')} that no recorded run wrote: {_listed(unknown)}. Choose a new "
            "folder, or type --overwrite, which replaces those of the same name"
        )
    if same:
        mine = [name for name in holds if name in request.names]
        if mine and not request.keep:
            raise RunError(
                f"{out} holds {_count(mine, 'case')} of this model and these options: {_listed(mine)}. Type "
                "--continue_prediction to keep them, --overwrite to make them again, or choose a new folder"
            )
        return _welcome(out, found)
    if found is not None and holds:
        raise RunError(
            f"{out} holds {_count(holds, 'case')} of another run: {'; '.join(differences)}. Choose a new folder, or "
            f"type --overwrite, which removes {_count(holds, 'case')} of that run"
        )
    return _begin(out, request)


def _replaced(out: Path, request: Request, records: Mapping[str, Any], holds: Sequence[str]) -> RunRecord:
    """A new run in the place of another one, of which nothing may stay: runs would be mixed."""
    for name in records:
        RunRecord(out, "").forget(name)
    removed = [name for name in holds if not _has_files(out, records[name])]
    if removed:
        print(f"{out}: removed {_count(removed, 'case')} of another run: {_listed(removed)}")
    run = _begin(out, request)
    _tell_of_others(out, sorted(_results(out, request)))
    return run


def _tell_of_others(out: Path, left: Sequence[str]) -> None:
    """Name the files that --overwrite leaves, as no recorded run wrote them as they are."""
    if left:
        count = _count(left, "file")
        print(f"{out}: {count} of no recorded run, replaced only by those of the same name: {_listed(left)}")


def _has_files(out: Path, record: Mapping[str, Any]) -> bool:
    """Whether any recorded file of a case is there."""
    return any((out / file).is_file() for file in record.get("files", {}))


def _begin(out: Path, request: Request) -> RunRecord:
    """A new run; records of an older one, which has no files any more, are removed."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)
    (out / FAILED).unlink(missing_ok=True)
    (out / FOLDER).mkdir()
    run = RunRecord(out, str(uuid.uuid4()))
    write_json(
        out / FOLDER / "run.json", {"run_id": run.id, "about": dict(request.about), "versions": package_versions()}
    )
    return run


def _welcome(out: Path, found: Mapping[str, Any]) -> RunRecord:
    """A run to go on with; other versions are told of."""
    now, then = package_versions(), found.get("versions", {})
    changed = [f"{name} was {then.get(name)} and is {now[name]}" for name in now if then.get(name) != now[name]]
    if changed:
        print(f"{out}: begun with other versions, results may differ a little: {'; '.join(changed)}")
    return RunRecord(out, found["run_id"])


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What was asked for then and now, one phrase for each difference."""
    return [_difference(name, then, now) for name in {**then, **now} if then.get(name) != now.get(name)]


def _difference(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if not str(then.get(name, now.get(name))).startswith(HASH):
        return f"{name} was {then.get(name)} and is {now.get(name)}"
    if name in then and name in now:
        return f"{name} differ{'' if name.startswith('weights') else 's'}"
    return f"{name} were used and are not now" if name in then else f"{name} were not used and are now"


def _results(out: Path, request: Request) -> set[str]:
    """Files of the folder that look like results, relative names."""
    top = {f.name for f in out.iterdir() if not f.is_dir() and not f.name.startswith(".")}
    exports = {name + ending for name in request.names for ending in (".npz", ".pkl")}
    found = {name for name in top if name.endswith(request.ending)} | (top & exports)
    if not (out / FOLDER / "run.json").is_file():
        found |= top & {"plans.json", "dataset.json", ARGUMENTS, FAILED}
    for folder in SIDE_FOLDERS:
        found |= {f.relative_to(out).as_posix() for f in (out / folder).rglob("*") if not f.is_dir()}
    return found


def read_records(out: Path) -> dict[str, dict[str, Any]]:
    """Case -> its record, of all that a folder has."""
    records = [read_json_if_any(file) for file in sorted((out / FOLDER / "cases").glob("*.json"))]
    return {record["case"]: record for record in records if record is not None and "case" in record}


def clear_leftovers(out: Path) -> None:
    """Remove what processes that were killed have left half done; nobody else may work in the folder."""
    for path in [*out.glob(".*"), *(out / FOLDER).rglob(".*")]:
        if path.name.startswith(UNFINISHED) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif TEMPORARY.fullmatch(path.name) and path.is_file() and holder(path) is None:
            path.unlink(missing_ok=True)


def write_failures(out: Path) -> dict[str, str]:
    """Write failed.json, case -> reason, of all parts; it is removed if nothing failed. Returns its content."""
    with locked(out / ".lock", "a prediction that starts", START_WAIT):
        failed = {name: record["failed"] for name, record in read_records(out).items() if "failed" in record}
        if failed:
            write_json(out / FAILED, failed)
        else:
            (out / FAILED).unlink(missing_ok=True)
    return failed


def _count(things: Sequence[str], what: str) -> str:
    return f"{len(things)} {what}{'' if len(things) == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
