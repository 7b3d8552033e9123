"""Verb ``evaluate``: scores of a folder of predictions against a folder of references."""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from tqdm import tqdm

from nnunetv2_diffusion.compat import package_versions
from nnunetv2_diffusion.evaluation import LISTED, EvaluationError, listed, sampled, strata, surface
from nnunetv2_diffusion.evaluation.files import (
    UNITS,
    Case,
    CaseFiles,
    find_further,
    find_pairs,
    find_reader,
    load_case,
)
from nnunetv2_diffusion.evaluation.labels import LabelSet, read_labels
from nnunetv2_diffusion.evaluation.metrics import EMPTY_RULES, count, overlap_scores, volume_scores
from nnunetv2_diffusion.evaluation.results import (
    MEANS,
    CaseResult,
    summarise,
    to_csv,
    to_json,
)
from nnunetv2_diffusion.evaluation.run_ids import changed_masks, check_one_run
from nnunetv2_diffusion.evaluation.tables import Table, number, to_text
from nnunetv2_diffusion.files import check_target, read_json, write_all

OVERWRITE = "; use --overwrite, or -o for another file"
SHOWN = ("Dice", "IoU", "HD95", "ASSD", "NSD")  # columns of the table that is printed


@dataclass(frozen=True)
class EvaluationSettings:
    """How to score.

    Attributes:
        empty: rule for empty masks, a key of ``metrics.EMPTY_RULES``.
        surface: score distances of surfaces; needs MONAI.
        tolerances: of the NSD, in the unit of lengths.
        percentile: of HD95, a key of ``surface.PERCENTILES``.
        unit: of lengths: mm, px, or auto: mm for volumes, px for 2D images.
        strata: sizes, in voxels, that separate small objects from larger ones.
        lesion_overlap: share of a lesion that must be predicted to detect it, in [0, 1]; any voxel for 0.
        chill: leave out cases that are in one folder only.
        ignore_geometry: do not compare origins and directions.
        probabilities: read exported probabilities.

    Raises:
        EvaluationError: for values that cannot be used.
    """

    empty: str = "nnunet"
    surface: bool = True
    tolerances: tuple[float, ...] = (1.0, 2.0)
    percentile: str = "directed"
    unit: str = "auto"
    strata: tuple[int, ...] = strata.THRESHOLDS
    lesion_overlap: float = 0.0
    chill: bool = False
    ignore_geometry: bool = False
    probabilities: bool = False

    def __post_init__(self) -> None:
        for name, known in (("empty", EMPTY_RULES), ("percentile", surface.PERCENTILES), ("unit", UNITS)):
            if getattr(self, name) not in known:
                raise EvaluationError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if any(not isfinite(t) or t < 0 for t in self.tolerances):
            raise EvaluationError(f"tolerances are {list(self.tolerances)}, expected finite numbers of at least 0")
        if not 0 <= self.lesion_overlap <= 1:
            raise EvaluationError(f"lesion_overlap is {self.lesion_overlap}, expected a number in [0, 1]")
        strata.check_thresholds(self.strata)


CASES_A_PROCESS = 8  # at least


@dataclass(frozen=True)
class Job:
    """What a worker process needs to score one case."""

    files: CaseFiles
    labels: LabelSet
    reader: BaseReaderWriter
    settings: EvaluationSettings


@dataclass(frozen=True)
class Evaluation:
    """Scores of a folder.

    Attributes:
        summary: content of summary.json.
        results: of each case, by name.
        labels: classes or regions.
    """

    summary: dict[str, Any]
    results: list[CaseResult]
    labels: LabelSet


# ---- verb -----------------------------------------------------------------------------------------------------------


EXAMPLES = """
nnunetv2_diffusion evaluate labelsTs masks
nnunetv2_diffusion evaluate labelsTs masks --probabilities --empty hidiff -o scores.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb; those that nnUNetv2_evaluate_folder has are the same."""
    add = parser.add_argument
    add("reference", type=Path, metavar="GT", help="Folder of reference masks.")
    add("prediction", type=Path, metavar="PRED", help="Folder of predicted masks.")
    add("-o", type=Path, metavar="FILE", help="Result, .json; a .csv is written beside it. Default: PRED/summary.json.")
    add("-djfile", type=Path, metavar="FILE", help="dataset.json of the labels. Default: PRED/dataset.json.")
    add("-pfile", type=Path, metavar="FILE", help="plans.json. Default: PRED/plans.json if it exists.")
    workers = "Most processes; each gets 8 cases at least."
    add("-np", type=int, default=default_num_processes, metavar="N", help=workers)
    add("--chill", action="store_true", help="Leave out cases that are in one folder only.")
    add("--overwrite", action="store_true", help="Replace results that exist.")
    add("--disable_progress_bar", action="store_true", help="Show no progress bar.")
    _add_conventions(parser.add_argument_group("conventions, all written to the result"))
    add = parser.add_argument_group("further input").add_argument
    add("--probabilities", action="store_true", help="Also score PRED/CASE.npz of predict --save_probabilities.")
    add("--samples", type=Path, nargs="+", metavar="DIR", help="Folders of samples. Default: all of PRED/samples/.")
    add("--raters", type=Path, nargs="+", default=[], metavar="DIR", help="Folders of further raters' masks.")


def _add_conventions(group: argparse._ArgumentGroup) -> None:
    """Options that change numbers; the defaults are those of ``EvaluationSettings``."""
    rules = "; ".join(f"{name}: {rule.reason}" for name, rule in EMPTY_RULES.items())
    percentiles = "; ".join(f"{name}: {text}" for name, text in surface.PERCENTILES.items())
    units = "Unit of lengths. auto: mm for volumes, px for 2D images."
    of_lesion = "Share of a lesion that detects it."

    def add(name: str, *others: str, **options: Any) -> None:
        group.add_argument(name, *others, default=getattr(EvaluationSettings, name.lstrip("-"), None), **options)

    add("--empty", choices=EMPTY_RULES, help=f"How empty masks count. {rules}.")
    group.add_argument("--no-surface", "--no_surface", action="store_true", help="Leave out distances: they take time.")
    add("--tolerances", type=float, nargs="*", metavar="T", help="Tolerances of NSD, in the unit of lengths.")
    add("--percentile", choices=surface.PERCENTILES, help=f"HD95: {percentiles}.")
    add("--unit", choices=UNITS, help=units)
    add("--strata", type=int, nargs="+", metavar="SIZE", help="Sizes in voxels that small objects are below.")
    add("--lesion_overlap", type=float, metavar="X", help=of_lesion)
    add("--ignore_geometry", action="store_true", help="Do not compare origin and direction of the files.")


def run(arguments: argparse.Namespace) -> int:
    """Score two folders and write the results; 1 with a message if it cannot be done."""
    target = arguments.o or arguments.prediction / "summary.json"
    files = [target, target.with_suffix(".csv")]
    try:
        if target.suffix != ".json":
            raise EvaluationError(f"-o is {target}, expected a file that ends with .json")
        settings, note = _without_library(_settings(arguments))
        if not arguments.prediction.is_dir():
            raise EvaluationError(f"{arguments.prediction}: no such folder")
        for file in files:
            check_target(file, arguments.overwrite, OVERWRITE)
        if note:
            print(f"nnunetv2_diffusion evaluate: {note}; then evaluate again with --overwrite", file=sys.stderr)
        evaluation = evaluate_folders(
            arguments.reference,
            arguments.prediction,
            settings,
            dataset_json=arguments.djfile,
            plans=arguments.pfile,
            samples=arguments.samples,
            raters=arguments.raters,
            processes=arguments.np,
            progress=not arguments.disable_progress_bar,
        )
        if note:
            evaluation.summary["conventions"]["surface_distances"] = note
        texts = to_json(evaluation.summary), to_csv(evaluation.results, evaluation.labels)
        write_all(dict(zip(files, texts, strict=True)), arguments.overwrite, OVERWRITE)
    except (EvaluationError, OSError) as error:
        print(f"nnunetv2_diffusion evaluate: {error}", file=sys.stderr)
        return 1
    _warn_of_changed(evaluation, arguments.prediction)
    print(_table(evaluation))
    print(f"{files[0]}, {files[1]}")
    return 0


def _without_library(settings: EvaluationSettings) -> tuple[EvaluationSettings, str | None]:
    """The settings, without surface distances where MONAI is missing and nobody asked for them, and a note on that.

    Raises:
        EvaluationError: options of distances are given, and MONAI is missing.
    """
    missing, default = surface.missing_library() if settings.surface else None, EvaluationSettings()
    if missing is None:
        return settings, None
    if (settings.tolerances, settings.percentile) != (default.tolerances, default.percentile):
        surface.library_version()
    return replace(settings, surface=False), f"HD, HD95, ASSD and NSD are left out: {missing}"


def _warn_of_changed(evaluation: Evaluation, prediction: Path) -> None:
    """Masks that were corrected by hand are scored as any; those of another run would be too."""
    notes = evaluation.summary["conventions"]
    changed = notes["masks_changed_since_run"]
    if changed:
        print(
            f"nnunetv2_diffusion evaluate: warning: {len(changed)} of {len(evaluation.results)} masks in {prediction} "
            f"are not as run {notes['run_id']} wrote them: {listed(changed)}. They are scored as they are; right "
            "if they were corrected by hand, wrong if they are of another run",
            file=sys.stderr,
        )


def _settings(arguments: argparse.Namespace) -> EvaluationSettings:
    given = {f.name: getattr(arguments, f.name) for f in fields(EvaluationSettings) if f.name != "surface"}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return EvaluationSettings(surface=not arguments.no_surface, **given)


def _table(evaluation: Evaluation) -> str:
    """Means of the main scores, one line a class."""
    mean, over_all = evaluation.summary["mean"], evaluation.summary["foreground_mean"]
    columns = [metric for metric in over_all if metric.startswith(SHOWN)]
    found = {**{t.name: mean[t.key] for t in evaluation.labels.targets}, "foreground": over_all}
    rows = [[name, *(number(scores[metric], 4) for metric in columns)] for name, scores in found.items()]
    return to_text(Table(f"Means of {len(evaluation.results)} cases", ["class", *columns], rows))


# ---- Python API -----------------------------------------------------------------------------------------------------


def evaluate_folders(
    reference: Path,
    prediction: Path,
    settings: EvaluationSettings | None = None,
    *,
    dataset_json: Path | None = None,
    plans: Path | None = None,
    samples: Sequence[Path] | None = None,
    raters: Sequence[Path] = (),
    processes: int = 1,
    progress: bool = False,
) -> Evaluation:
    """Score all predictions of a folder; nothing is written.

    Args:
        reference, prediction: folders of masks of the same names.
        settings: how to score.
        dataset_json: of the data set; that in the prediction's folder by default.
        plans: of the model; those in the prediction's folder by default, if they are there.
        samples: folders of samples; all in the prediction's folder ``samples`` by default.
        raters: folders of further raters' masks.
        processes: that work at the same time; 1 works in this one.
        progress: show a bar.

    Raises:
        EvaluationError: naming the files that cannot be used.
    """
    settings = settings or EvaluationSettings()
    if settings.surface:
        surface.library_version()
    jobs = _jobs(Path(reference), Path(prediction), settings, dataset_json, plans, samples, raters)
    files = [job.files for job in jobs]
    run_id, changed = check_one_run(Path(prediction), files), changed_masks(Path(prediction), files)
    results = _run_jobs(jobs, processes, progress)
    if len({result.unit for result in results}) > 1:
        raise EvaluationError(f"{prediction}: holds volumes and 2D images, expected one kind; or use --unit px")
    labels = jobs[0].labels
    summary = summarise(results, labels, settings.strata)
    summary |= sampled.folder_scores(results)
    notes = conventions(settings, labels, results[0]) | {"run_id": run_id, "masks_changed_since_run": changed}
    return Evaluation({**summary, "conventions": notes}, results, labels)


def evaluate_case(case: Case, settings: EvaluationSettings) -> CaseResult:
    """All scores of one case; its masks are not changed.

    Raises:
        EvaluationError: if a file that a scorer needs cannot be used.
    """
    volume_unit = ("cm2" if case.reference.flat else "ml") if case.unit == "mm" else "px"
    files = str(case.files.reference), str(case.files.prediction)
    result = CaseResult(case.files.name, *files, case.unit, volume_unit)
    for target in case.labels.targets:
        masks = [case.labels.mask(mask.values, target) for mask in (case.reference, case.prediction)]
        if case.valid is not None:
            masks = [mask & case.valid for mask in masks]
        rule = EMPTY_RULES[settings.empty]
        counts = count(*masks, case.valid)
        scores = overlap_scores(counts, rule) | volume_scores(counts, case.reference.voxel_volume(case.unit))
        if settings.surface:
            scores |= surface.surface_scores(
                *masks, case.spacing, settings.tolerances, case.unit, rule, settings.percentile
            )
        result.lesions[target.key] = strata.lesion_scores(*masks, settings.lesion_overlap)
        result.slices[target.key] = strata.slice_scores(*masks) if masks[0].ndim == 3 else []
        result.metrics[target.key] = scores | result.lesions[target.key].scores()
    for key, scores in sampled.class_scores(case).items():
        result.metrics[key] |= scores
    return result


def conventions(settings: EvaluationSettings, labels: LabelSet, example: CaseResult) -> dict[str, Any]:
    """What the numbers mean, for the file of results."""
    rule = EMPTY_RULES[settings.empty]
    distances: dict[str, Any] | None = None
    if settings.surface:
        distances = surface.CONVENTIONS | {
            "library": f"{surface.LIBRARY} {surface.library_version()}",
            "nearest_library": f"scipy {version('scipy')}",
            "HD95": f"{settings.percentile}: {surface.PERCENTILES[settings.percentile]}",
            "NSD_tolerances": list(settings.tolerances),
        }
    return {
        "versions": package_versions(),
        "unit": example.unit,
        "volume_unit": example.volume_unit,
        "spacing": "of the file's header" if example.unit == "mm" else "1 along each axis",
        "empty_masks": f"{settings.empty}: {rule.text()}",
        "means": MEANS,
        "surface_distances": distances,
        "probabilities_and_samples": sampled.CONVENTIONS,
        "strata": strata.CONVENTIONS | {"thresholds": list(settings.strata), "lesion_overlap": settings.lesion_overlap},
        "ignore_label": labels.ignore,
        "names": {target.key: target.name for target in labels.targets},
    }


# ---- jobs -----------------------------------------------------------------------------------------------------------


def _jobs(
    reference: Path,
    prediction: Path,
    settings: EvaluationSettings,
    dataset_json: Path | None,
    plans: Path | None,
    samples: Sequence[Path] | None,
    raters: Sequence[Path],
) -> list[Job]:
    """One job a case, with all files that belong to it."""
    dataset_file = dataset_json or prediction / "dataset.json"
    if dataset_json is None and prediction.is_dir() and not dataset_file.is_file():
        raise EvaluationError(f"{dataset_file}: missing, expected dataset.json there; or name it with -djfile")
    dataset = read_json(dataset_file, EvaluationError, "dataset.json of nnU-Net")
    if not isinstance(dataset.get("file_ending"), str):
        raise EvaluationError(
            f"{dataset_file}: 'file_ending' is {dataset.get('file_ending')!r}, expected such as '.nii.gz'"
        )
    plans = plans or (prediction / "plans.json" if (prediction / "plans.json").is_file() else None)
    labels = read_labels(dataset, plans and read_json(plans, EvaluationError, "plans of nnU-Net"), str(dataset_file))
    ending = dataset["file_ending"]
    pairs = find_pairs(reference, prediction, ending, settings.chill)
    if samples is None:
        samples = sorted(folder for folder in (prediction / "samples").glob("*") if folder.is_dir())
    reader = find_reader(dataset, pairs[0].reference)
    further = partial(find_further, ending=ending, chill=settings.chill)
    return [
        Job(
            _with_further(pair, settings, further(samples, pair.name), further(raters, pair.name)),
            labels,
            reader,
            settings,
        )
        for pair in pairs
    ]


def _with_further(
    pair: CaseFiles, settings: EvaluationSettings, samples: tuple[Path, ...], raters: tuple[Path, ...]
) -> CaseFiles:
    file = pair.prediction.with_name(f"{pair.name}.npz") if settings.probabilities else None
    if file is not None and not file.is_file():
        raise EvaluationError(
            f"{file}: missing, expected the probabilities of each case, of predict --save_probabilities"
        )
    return replace(pair, probabilities=file, samples=samples, raters=raters)


def _run_jobs(jobs: Sequence[Job], processes: int, progress: bool) -> list[CaseResult]:
    """Score all cases; those that cannot be scored are named together at the end."""
    if processes < 1:
        raise EvaluationError(f"-np is {processes}, expected at least 1")
    # a process imports torch and MONAI, which takes longer than small cases do
    at_once = max(1, min(processes, os.cpu_count() or 1, len(jobs) // CASES_A_PROCESS))
    bar = tqdm(_outcomes(jobs, at_once), "cases", len(jobs), disable=not progress)
    outcomes = list(bar)
    errors = sorted(str(outcome) for outcome in outcomes if isinstance(outcome, EvaluationError))
    if errors:
        more = f" ({len(errors) - LISTED} more)" if len(errors) > LISTED else ""
        start = f"{len(errors)} of {len(jobs)} cases cannot be evaluated: " if len(errors) > 1 else ""
        raise EvaluationError(start + "; ".join(errors[:LISTED]) + more)
    return sorted(outcomes, key=lambda result: result.name)


def _outcomes(jobs: Sequence[Job], processes: int) -> Iterator[CaseResult | EvaluationError]:
    """A result or an error of each job, in any order."""
    if processes == 1:
        yield from map(_attempt, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(_attempt, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise EvaluationError("a worker process died, perhaps of lack of memory; use fewer with -np") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _attempt(job: Job) -> CaseResult | EvaluationError:
    """Score one case; an error is returned, so that all that is wrong can be said at once."""
    settings = job.settings
    try:
        case = load_case(job.files, job.labels, job.reader, settings.unit, settings.ignore_geometry)
        return evaluate_case(case, settings)
    except EvaluationError as error:
        return error
    except Exception as error:
        return EvaluationError(" ".join(f"{job.files.prediction}: {type(error).__name__}: {error}".split()))
