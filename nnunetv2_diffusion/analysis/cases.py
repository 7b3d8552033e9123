"""Labelled cases, and the score of a mask."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunetv2_diffusion.agreement import mean_over_found
from nnunetv2_diffusion.evaluation.diversity import mean_pairwise_dice
from nnunetv2_diffusion.evaluation.files import read_segmentation
from nnunetv2_diffusion.evaluation.labels import LabelSet, read_labels
from nnunetv2_diffusion.evaluation.metrics import EMPTY_RULES, count, overlap_scores
from nnunetv2_diffusion.inference.inputs import InputError, check_headers, list_cases
from nnunetv2_diffusion.inference.predictor import DiffusionPredictor

MEAN = "mean"  # name of the mean over classes or regions


@dataclass
class LabelledCase:
    """A preprocessed image with its reference.

    Attributes:
        name: of the case.
        data: for the network, (C, *spatial).
        properties: of nnU-Net's preprocessing.
        image: first channel as it is in the file, (z, y, x).
        reference: labels, (z, y, x).
        truth: the reference as preprocessed for the network, (1, *spatial), if it was asked for.
    """

    name: str
    data: torch.Tensor
    properties: dict[str, Any]
    image: np.ndarray
    reference: np.ndarray
    truth: torch.Tensor | None = None


def label_set(predictor: DiffusionPredictor) -> LabelSet:
    """Classes or regions of a model."""
    return read_labels(predictor.dataset_json, predictor.plans_manager.plans, "dataset.json of the model")


def label_names(labels: LabelSet) -> dict[int, str]:
    """Value of a label in a mask -> the class, or the regions, that it belongs to; without the background."""
    found = {value: [t.name for t in labels.targets if value in t.labels] for value in sorted(labels.known)}
    return {value: " + ".join(names) for value, names in found.items() if value and names}


def find_cases(
    predictor: DiffusionPredictor, images: Path, labels: Path, limit: int | None
) -> dict[str, tuple[list[Path], Path]]:
    """Name -> image files and reference of the first ``limit`` cases; all for None.

    Raises:
        InputError: if an image or its reference is missing or cannot be read.
    """
    ending = predictor.dataset_json["file_ending"]
    cases = dict(list(list_cases(images, predictor.dataset_json).items())[:limit])
    check_headers(cases, ending)
    found = {name: (files, labels / f"{name}{ending}") for name, files in cases.items()}
    for _, reference in found.values():
        if not reference.is_file():
            raise InputError(f"{reference}: missing, expected the reference of a case in {images}")
    return found


def read_cases(
    predictor: DiffusionPredictor, files: dict[str, tuple[list[Path], Path]], with_truth: bool = False
) -> Iterator[LabelledCase]:
    """Read and preprocess one case after the other; with_truth, the reference as well.

    Raises:
        EvaluationError: a reference cannot be read or has an unknown label.
        InputError: image and reference differ in shape.
    """
    reader = predictor.plans_manager.image_reader_writer_class()
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    managers = predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    labels = label_set(predictor)
    for name, (channels, file) in files.items():
        image, properties = reader.read_images([str(f) for f in channels])
        reference = read_segmentation(reader, file, labels, ignore=True).values.reshape(image.shape[1:])
        truth = None
        if with_truth:  # apart from the image, which must not depend on it
            given = reference[None].astype(np.int16)  # it marks what lies outside of the image by -1
            labelled = preprocessor.run_case_npy(image.copy(), given, dict(properties), *managers)[1]
            truth = torch.from_numpy(labelled).long()
        data, _, properties = preprocessor.run_case_npy(image.copy(), None, properties, *managers)
        yield LabelledCase(name, torch.from_numpy(data).float(), properties, image[0], reference, truth)


def dice_scores(labels: LabelSet, reference: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Dice of every class or region by name, and their mean; NaN where both masks are empty."""
    valid = labels.valid(reference)
    scores = {
        target.name: overlap_scores(
            count(labels.mask(reference, target), labels.mask(mask, target), valid), EMPTY_RULES["nnunet"]
        )["Dice"]
        for target in labels.targets
    }
    known = [v for v in scores.values() if not np.isnan(v)]
    return {**scores, MEAN: float(np.mean(known)) if known else float("nan")}


def agreement(labels: LabelSet, masks: list[np.ndarray]) -> float:
    """Agreement of masks: mean pairwise Dice, over the classes or regions that were found; see ``agreement``."""
    return mean_over_found([mean_pairwise_dice([labels.mask(mask, t) for mask in masks]) for t in labels.targets])
