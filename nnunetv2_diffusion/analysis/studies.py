"""The studies: what is predicted, and the rows of numbers that come out of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from nnunetv2_diffusion.agreement import mean_over_found
from nnunetv2_diffusion.analysis.cases import LabelledCase, agreement, dice_scores, label_names, label_set
from nnunetv2_diffusion.analysis.quality import (
    can_measure_distances,
    distance_scores,
    error_correlation,
    length_unit,
    probability_scores,
)
from nnunetv2_diffusion.inference.cases import CaseResult, draw_case, final_mask, uncertainty_maps
from nnunetv2_diffusion.inference.maps import to_original_geometry
from nnunetv2_diffusion.inference.options import PredictionOptions
from nnunetv2_diffusion.inference.predictor import DiffusionPredictor

Row = dict[str, Any]
MODES: dict[str, dict[str, Any]] = {
    "one-step": {"tta": "full", "steps": 1},
    "full": {"tta": "full"},
    "interleaved": {"tta": "interleaved"},
    "none": {"tta": "none"},
}


@dataclass
class Findings:
    """Rows of all studies, and what the pictures show. HD95 is there if MONAI is installed; see ``quality``.

    Attributes:
        steps: case, sample, step, label, Dice, HD95: of every step of every sample.
        counts: case, K, label, Dice, HD95, ECE, soft_dice, passes_per_tile, seconds: predictions with K steps.
        modes: case, mode, and as counts: kinds of mirroring.
        samples: case, Dice (of the mean), pairwise_dice (agreement of the samples), sample_dice (mean of the samples'),
            error_correlation (of their variance with the errors of the mean).
        pictures: case -> slices (rows, columns): image, reference, mask, entropy, variance; number of the slice and of
            all slices.
        names: value of a label -> the classes or regions that it belongs to.
        unit: of HD95, "mm", or "px" for 2D images.
    """

    steps: list[Row] = field(default_factory=list)
    counts: list[Row] = field(default_factory=list)
    modes: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    pictures: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    unit: str = "mm"


class Laboratory:
    """Runs studies on one case after the other.

    Args:
        predictor: of the model.
        options: what all predictions share.
        chain_steps: K of the studies of steps, samples and modes.
        samples: N.
        counts: the K that are compared.
        modes: names of ``MODES`` that are compared.
    """

    def __init__(
        self,
        predictor: DiffusionPredictor,
        options: PredictionOptions,
        chain_steps: int | None,
        samples: int,
        counts: Sequence[int],
        modes: Sequence[str],
    ):
        self.predictor, self.options = predictor, options
        self.chain_steps, self.samples, self.counts, self.modes = chain_steps, samples, counts, modes
        self.distances = can_measure_distances()
        self.labels = label_set(predictor)
        self.findings = Findings(names=label_names(self.labels))

    def plan(self) -> list[PredictionOptions]:
        """Options of every prediction of a case; raises OptionError if the model cannot follow one."""
        one = replace(self.options, steps=self.chain_steps, samples=1)
        planned = [self._samples_plan(one)]
        planned += [replace(one, steps=k) for k in self.counts]
        planned += [replace(one, **MODES[mode]) for mode in self.modes]
        for options in planned:
            self.predictor.set_options(options)
        return planned

    def _samples_plan(self, one: PredictionOptions) -> PredictionOptions:
        """Samples with all of their steps; where every step is a draw of its own, a sample is one of them."""
        options = replace(one, samples=self.samples, save_steps=True)
        self.predictor.set_options(options)
        return replace(options, steps=1) if self.predictor.chain().independent else options

    def study(self, case: LabelledCase) -> None:
        """All studies on one case."""
        first, *others = self.plan()
        self.findings.unit = length_unit(case)
        self._study_samples(case, first)
        for k, options in zip(self.counts, others, strict=False):
            self._add(self.findings.counts, case, self._draw(case, options), K=k)
        for mode, options in zip(self.modes, others[len(self.counts) :], strict=True):
            self._add(self.findings.modes, case, self._draw(case, options), mode=mode)

    def _draw(self, case: LabelledCase, options: PredictionOptions, **kwargs: Any) -> CaseResult:
        self.predictor.set_options(options)
        return draw_case(self.predictor, case.data, case.name, **kwargs)

    def _mask(self, case: LabelledCase, p: Any) -> np.ndarray:
        return final_mask(self.predictor, p, case.properties)

    def _add(self, rows: list[Row], case: LabelledCase, result: CaseResult, **setting: Any) -> None:
        """A row for each label of a prediction."""
        passes = result.passes.per_tile * len(self.predictor.list_of_parameters)  # of all folds together
        cost = {"passes_per_tile": passes, "tiles": result.passes.tiles, "seconds": result.seconds}
        p = result.moments.mean()
        mask = self._mask(case, p)
        scores, further = self._scores(case, mask), probability_scores(self.labels, case, mask, self._original(case, p))
        rows += [{"case": case.name, **setting, "label": n, **v, **further[n], **cost} for n, v in scores.items()]

    def _scores(self, case: LabelledCase, mask: np.ndarray) -> dict[str, dict[str, float]]:
        """Label -> Dice, and HD95 if it can be measured."""
        scores = {name: {"Dice": v} for name, v in dice_scores(self.labels, case.reference, mask).items()}
        if self.distances:
            for name, values in distance_scores(self.labels, case, mask).items():
                scores[name] |= values
        return scores

    def _original(self, case: LabelledCase, p: Any) -> np.ndarray:
        """Probabilities of the classes or regions in the geometry of the image, (targets, z, y, x)."""
        heads = [target.head for target in self.labels.targets]
        managers = self.predictor.plans_manager, self.predictor.configuration_manager
        return to_original_geometry(p[heads], case.properties, *managers)

    def _study_samples(self, case: LabelledCase, options: PredictionOptions) -> None:
        """Every step of every sample, and how samples agree."""
        masks: list[np.ndarray] = []

        def keep(member: Any, number: int) -> None:
            for step, p in enumerate(member.steps, start=1):
                mask = self._mask(case, p)
                where = {"case": case.name, "sample": number, "step": step}
                self.findings.steps += [{**where, "label": n, **v} for n, v in self._scores(case, mask).items()]
            masks.append(mask)

        result = self._draw(case, options, keep=keep)
        mean = self._mask(case, result.moments.mean())
        singles = [dice_scores(self.labels, case.reference, mask)["mean"] for mask in masks]
        self.findings.samples.append(
            {
                "case": case.name,
                "Dice": dice_scores(self.labels, case.reference, mean)["mean"],
                "sample_dice": mean_over_found(singles),
                "pairwise_dice": agreement(self.labels, masks),
                "error_correlation": self._error_correlation(case, mean, result),
            }
        )
        self.findings.pictures[case.name] = self._picture(case, mean, result)

    def _error_correlation(self, case: LabelledCase, mask: np.ndarray, result: CaseResult) -> float:
        variance = result.moments.maps()["variance"][None]
        managers = self.predictor.plans_manager, self.predictor.configuration_manager
        return error_correlation(self.labels, case, mask, to_original_geometry(variance, case.properties, *managers)[0])

    def _picture(self, case: LabelledCase, mask: np.ndarray, result: CaseResult) -> dict[str, np.ndarray]:
        """The slice with most foreground, of the mask if the reference has none, of what a report shows."""
        maps = uncertainty_maps(self.predictor, result)
        kinds = ["entropy", "variance"]
        managers = self.predictor.plans_manager, self.predictor.configuration_manager
        shown = to_original_geometry(np.stack([maps[k] for k in kinds]), case.properties, *managers)
        foreground = case.reference if (case.reference > 0).any() else mask
        index = int(np.argmax((foreground > 0).sum((1, 2))))
        slices = {
            "image": case.image,
            "reference": case.reference,
            "mask": mask,
            **dict(zip(kinds, shown, strict=True)),
        }
        picture = {kind: np.array(values[index]) for kind, values in slices.items()}
        return {**picture, "slice": np.array(index), "slices": np.array(len(mask))}
