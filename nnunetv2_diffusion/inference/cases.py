"""From a preprocessed case to its files: samples are drawn, summed up and exported."""

import multiprocessing
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

from nnunetv2_diffusion.inference.export import (
    SAMPLES,
    STEPS,
    CaseExport,
    ModelFiles,
    bounded_logits,
    cleared_on_error,
    export_case,
    work_folder,
    write_mask,
)
from nnunetv2_diffusion.inference.maps import map_names
from nnunetv2_diffusion.inference.predictor import DiffusionPredictor, Member, PassCount
from nnunetv2_diffusion.inference.running import RunningMoments
from nnunetv2_diffusion.inference.sample_statistics import (
    SampleCounts,
    SampleMasks,
    case_summary,
    foreground_labels,
    json_ready,
    rounded,
)


@dataclass
class CaseResult:
    """What all samples of a case say together, probabilities in the geometry of the network.

    Attributes:
        moments: of the probabilities.
        counts: of the masks, on the grid of the image; None if they were not asked for.
        steps: mean probabilities (K, *spatial) after each step; only the result if steps were not asked for.
        passes: of the network.
        seconds: that the network took, sampling, blending and the masks of samples included.
    """

    moments: RunningMoments
    counts: SampleCounts | None
    steps: list[torch.Tensor] = field(default_factory=list)
    passes: PassCount = field(default_factory=PassCount)
    seconds: float = 0.0


class CasePredictor:
    """Predicts cases and writes their files.

    Args:
        predictor: prepared.
        out: output folder.
        export: called with a finished case; may return before it is written.
    """

    def __init__(self, predictor: DiffusionPredictor, out: Path, export: Callable[[CaseExport], None]):
        self.predictor, self.out, self.export = predictor, out, export
        self.options = predictor.options
        self.model = model_files(predictor)
        self.regions = predictor.label_manager.has_regions

    def __call__(self, name: str, data: torch.Tensor, properties: dict[str, Any]) -> CaseResult:
        """Predict one case and hand it to export."""
        work = work_folder(self.out, name)
        shutil.rmtree(work, ignore_errors=True)  # of a run that was interrupted
        with cleared_on_error(work):
            work.mkdir(parents=True)

            def keep(member: Member, number: int) -> None:
                target = work / SAMPLES / f"{number:03d}" / name
                self._write(member.steps[-1], target, properties)

            keeper = keep if self.options.save_samples else None
            folder = work if self.options.save_uncertainty else None
            result = draw_case(
                self.predictor, data, name, folder, keeper, lambda p: final_mask(self.predictor, p, properties)
            )
            if self.options.save_steps:
                for number, p in enumerate(result.steps, start=1):
                    self._write(p, work / STEPS / f"{number:02d}" / name, properties)
            self.export(self._finished(name, properties, result))
        return result

    def _write(self, p: torch.Tensor, target: Path, properties: dict[str, Any]) -> None:
        write_mask(bounded_logits(p, self.regions), target, properties, self.model, npz=False)

    def _finished(self, name: str, properties: dict[str, Any], result: CaseResult) -> CaseExport:
        logits = bounded_logits(result.moments.mean(), self.regions)
        case = CaseExport(name, self.out, properties, logits, save_probabilities=self.options.save_probabilities)
        if self.options.save_uncertainty:
            case.maps = uncertainty_maps(self.predictor, result)
            case.summary = describe(self.predictor, name, properties, result)
        return case


def model_files(predictor: DiffusionPredictor) -> ModelFiles:
    """What export needs of a predictor's model."""
    return ModelFiles(predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json)


def final_mask(predictor: DiffusionPredictor, p: torch.Tensor, properties: dict[str, Any]) -> np.ndarray:
    """Labels in the geometry of the image, as nnU-Net's export makes them from probabilities (K, *spatial)."""
    mask = convert_predicted_logits_to_segmentation_with_correct_shape(
        bounded_logits(p, predictor.label_manager.has_regions), predictor.plans_manager,
        predictor.configuration_manager, predictor.label_manager, properties, num_threads_torch=1,
    )  # fmt: skip
    return np.asarray(mask)


def uncertainty_maps(predictor: DiffusionPredictor, result: CaseResult) -> dict[str, np.ndarray]:
    """Kind of map -> (*spatial): mean probability of each foreground label or region, entropy and what is derived.

    Every label has a map of its own, ``probability_<name>`` with the names of ``map_names``.
    """
    names = map_names(foreground_labels(predictor.dataset_json)).values()
    first = 0 if predictor.label_manager.has_regions else 1
    mean = result.moments.mean()
    maps = {f"probability_{name}": mean[first + i] for i, name in enumerate(names)}
    return {kind: values.cpu().numpy() for kind, values in {**maps, **result.moments.maps()}.items()}


def describe(
    predictor: DiffusionPredictor,
    name: str,
    properties: dict[str, Any],
    result: CaseResult,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The JSON of a case, but for the volumes of its mask: see ``add_mask_volumes``."""
    shape = [properties["shape_before_cropping"][axis] for axis in predictor.plans_manager.transpose_backward]
    settings = {
        **{k: v for k, v in asdict(predictor.options).items() if not k.startswith("save_")},
        "sampling": asdict(predictor.sampling) if predictor.sampling else None,
        "folds": len(predictor.list_of_parameters),
        "trainer": predictor.trainer_name,
    }
    summary = case_summary(name, result.counts, shape, properties["spacing"], settings, notes)
    passes = {
        "tiles": result.passes.tiles,
        "passes_per_tile": rounded(result.passes.per_tile),
        "seconds": rounded(result.seconds),
    }
    return {**summary, **json_ready(passes)}


@torch.inference_mode()
def draw_case(
    predictor: DiffusionPredictor,
    data: torch.Tensor,
    name: str = "",
    folder: Path | None = None,
    keep: Callable[[Member, int], None] | None = None,
    to_mask: Callable[[torch.Tensor], np.ndarray] | None = None,
) -> CaseResult:
    """Draw all samples of a case; memory does not grow with their number.

    Args:
        predictor: prepared.
        data: preprocessed, (C, *spatial).
        name: for the progress bar.
        folder: where the masks of samples are kept for their statistics, which are left out without it.
        keep: called with every member and its number.
        to_mask: makes of a sample's probabilities (K, *spatial) the label map that is counted, see ``final_mask``;
            needed with ``folder``.
    """
    regions = predictor.label_manager.has_regions
    start, steps = time.monotonic(), []
    result = CaseResult(RunningMoments(regions), None)
    with ExitStack() as stack:
        masks = None
        if folder is not None:
            labels = foreground_labels(predictor.dataset_json)
            masks = stack.enter_context(SampleMasks(folder, labels))
        for number, member in enumerate(predictor.members(data, name, result.passes)):
            result.moments.add(member.steps[-1])
            steps = _running_mean(steps, member.steps[:-1], number)
            if masks is not None:
                masks.add(to_mask(member.steps[-1]))
            if keep is not None:
                keep(member, number)
        result.counts = masks.counts() if masks is not None else None
    result.steps = [*steps, result.moments.mean()]
    result.seconds = time.monotonic() - start
    return result


def _running_mean(means: list[torch.Tensor], new: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    """Means over count + 1 members, in place."""
    if not means:
        return [p.clone() for p in new]
    for mean, p in zip(means, new, strict=True):
        mean += (p - mean) / (count + 1)
    return means


class Exporter:
    """Writes cases here, or in worker processes as nnU-Net does.

    Args:
        model: of the predictor.
        processes: 0 for none.
    """

    def __init__(self, model: ModelFiles, processes: int):
        self.model, self.processes = model, processes
        self._pool: Any = None
        self._pending: list[tuple[str, Any]] = []

    def __enter__(self) -> "Exporter":
        if self.processes:
            self._pool = multiprocessing.get_context("spawn").Pool(self.processes)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._pool is None:
            return
        try:
            if kind is None:
                self._wait(0)
        finally:
            self._pool.terminate()
            self._pool.join()

    def __call__(self, case: CaseExport) -> None:
        """Write a case, or queue it; waits while more cases wait than there are processes and two."""
        if self._pool is None:
            export_case(case, self.model)
            return
        self._wait(self.processes + 1)
        self._pending.append((case.name, self._pool.apply_async(export_case, (case, self.model))))

    def _wait(self, allowed: int) -> None:
        """Until at most so many cases are pending; an error of a worker is raised here.

        Raises:
            RuntimeError: if a worker was killed.
        """
        workers = list(self._pool._pool)
        while True:
            for _, job in [p for p in self._pending if p[1].ready()]:
                job.get()
            self._pending = [p for p in self._pending if not p[1].ready()]
            if len(self._pending) <= allowed:
                return
            if not all(w.is_alive() for w in workers):
                names = ", ".join(name for name, _ in self._pending)
                raise RuntimeError(f"an export process was killed, probably for want of memory; not written: {names}")
            time.sleep(0.05)
