"""From a preprocessed case to its files: samples are drawn, summed up and exported."""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunetv2_diffusion.inference.export import (
    SAMPLES,
    STEPS,
    CaseExport,
    ModelFiles,
    bounded_logits,
    cleared_on_error,
    label_map,
    work_folder,
    write_mask,
)
from nnunetv2_diffusion.inference.inputs import CaseError
from nnunetv2_diffusion.inference.maps import map_names
from nnunetv2_diffusion.inference.predictor import DiffusionPredictor, Member, PassCount
from nnunetv2_diffusion.inference.prepared import PreparedCase
from nnunetv2_diffusion.inference.running import RunningMoments
from nnunetv2_diffusion.inference.runs import RunRecord
from nnunetv2_diffusion.inference.sample_statistics import (
    SampleCounts,
    SampleMasks,
    case_summary,
    foreground_labels,
    json_ready,
    rounded,
)
from nnunetv2_diffusion.networks.heads import is_finite


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

    def take_mean(self) -> torch.Tensor:
        """Mean probabilities (K, *spatial), for the caller to keep and change; moments and steps are empty then."""
        self.steps = []
        return self.moments.take_mean()


class CasePredictor:
    """Predicts cases and writes their files.

    Args:
        predictor: prepared.
        run: the record of this run in the output folder.
        export: called with a finished case; may return before it is written.
    """

    def __init__(self, predictor: DiffusionPredictor, run: RunRecord, export: Callable[[CaseExport], None]):
        self.predictor, self.run, self.export = predictor, run, export
        self.options = predictor.options
        self.model = model_files(predictor)
        self.regions = predictor.label_manager.has_regions

    def __call__(self, case: PreparedCase, inputs: Sequence[Path]) -> CaseResult:
        """Predict one case and hand it to export, which learns of the files that it was made of."""
        work = work_folder(self.run.out, case.name)
        shutil.rmtree(work, ignore_errors=True)  # of a run that was interrupted
        with cleared_on_error(work):
            work.mkdir(parents=True)

            def keep(member: Member, number: int) -> None:
                target = work / SAMPLES / f"{number:03d}" / case.name
                self._write(member.steps[-1], target, case.properties)

            keeper = keep if self.options.save_samples else None
            folder = work if self.options.save_uncertainty else None
            result = draw_case(
                self.predictor, case.data, case.name, folder, keeper,
                lambda p: final_mask(self.predictor, p, case.properties),
            )  # fmt: skip
            if self.options.save_steps:
                for number, p in enumerate(result.steps, start=1):
                    self._write(p, work / STEPS / f"{number:02d}" / case.name, case.properties)
            self.export(self._finished(case, inputs, result))
        return result

    def _write(self, p: torch.Tensor, target: Path, properties: dict[str, Any]) -> None:
        write_mask(bounded_logits(p, self.regions), target, properties, self.model, npz=False)

    def _finished(self, case: PreparedCase, inputs: Sequence[Path], result: CaseResult) -> CaseExport:
        maps = self.options.save_uncertainty  # which are made of the mean as well
        mean = result.moments.mean() if maps else result.take_mean()
        logits = bounded_logits(mean, self.regions, given_away=not maps)
        finished = CaseExport(
            case.name,
            case.properties,
            logits,
            self.run,
            tuple(inputs),
            save_probabilities=self.options.save_probabilities,
        )
        if self.options.save_uncertainty:
            finished.maps = uncertainty_maps(self.predictor, result)
            summary = describe(self.predictor, case.name, case.properties, result, case.notes)
            finished.summary = {**summary, "run_id": self.run.id}
        return finished


def model_files(predictor: DiffusionPredictor) -> ModelFiles:
    """What export needs of a predictor's model."""
    return ModelFiles(predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json)


def final_mask(predictor: DiffusionPredictor, p: torch.Tensor, properties: dict[str, Any]) -> np.ndarray:
    """Labels in the geometry of the image, as nnU-Net's export makes them from probabilities (K, *spatial)."""
    return label_map(bounded_logits(p, predictor.label_manager.has_regions), properties, model_files(predictor))


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
    sampling = asdict(predictor.sampling) if predictor.sampling else {}
    used = {
        **asdict(predictor.options),
        **sampling,
    }  # what was not asked for is as in the plans
    settings = {
        **{k: v for k, v in used.items() if v is not None and not k.startswith("save_")},
        "tiles_at_once": predictor.tiles_at_once,
        "sampling": sampling or None,
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
        keep: called with every member and its number, when it has been checked.
        to_mask: makes of a sample's probabilities (K, *spatial) the label map that is counted, see ``final_mask``;
            needed with ``folder``.

    Raises:
        CaseError: the network's answer is not finite; see ``check_finite``.
    """
    regions = predictor.label_manager.has_regions
    start, steps = time.monotonic(), []
    result = CaseResult(RunningMoments(regions), None)
    alone = predictor.samples * len(predictor.list_of_parameters) == 1  # then nothing is summed, nor copied
    number = 0  # enumerate() would hold a member until the next one is drawn
    with ExitStack() as stack:
        masks = None
        if folder is not None:
            labels = foreground_labels(predictor.dataset_json)
            masks = stack.enter_context(SampleMasks(folder, labels))
        for member in predictor.members(data, name, result.passes):
            for p in member.steps:
                check_finite(p, predictor, f"{name}: sample {number}")
            result.moments.add(member.steps[-1], given_away=alone)
            steps = member.steps[:-1] if alone else _running_mean(steps, member.steps[:-1], number)
            if masks is not None:
                masks.add(to_mask(member.steps[-1]))
            if keep is not None:
                keep(member, number)
            number += 1
            del member, p
        result.counts = masks.counts() if masks is not None else None
    result.steps = [*steps, result.moments.mean()]
    result.seconds = time.monotonic() - start
    return result


def check_finite(p: torch.Tensor, predictor: DiffusionPredictor, what: str) -> None:
    """See that probabilities (K, *spatial) are numbers before anything is made of them.

    The check reads them once and makes nothing of their size: a sum is finite if all of its terms are.

    Raises:
        CaseError: naming what they are of, the classes or regions, and how many of their voxels are not finite.
    """
    if is_finite(p):
        return
    names = list(foreground_labels(predictor.dataset_json))
    names = names if predictor.label_manager.has_regions else ["background", *names]
    counts = {name: int((~torch.isfinite(head)).sum()) for name, head in zip(names, p, strict=True)}
    found = [f"{name!r} at {count} of {p[0].numel()} voxels" for name, count in counts.items() if count]
    shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    raise CaseError(f"{what}: probabilities that are not finite, of {shown}; are the model's weights damaged?")


def _running_mean(means: list[torch.Tensor], new: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    """Means over count + 1 members, in place."""
    if not means:
        return [p.clone() for p in new]
    for mean, p in zip(means, new, strict=True):
        mean += (p - mean) / (count + 1)
    return means
