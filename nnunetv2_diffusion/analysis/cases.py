"""Labelled cases, and the score of a mask."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunetv2_diffusion.agreement import mean_over_found
from nnunetv2_diffusion.evaluation import EvaluationError
from nnunetv2_diffusion.evaluation.diversity import mean_pairwise_dice
from nnunetv2_diffusion.evaluation.files import read_segmentation
from nnunetv2_diffusion.evaluation.labels import LabelSet, read_labels
from nnunetv2_diffusion.evaluation.metrics import EMPTY_RULES, count, overlap_scores
from nnunetv2_diffusion.inference.cases import model_files
from nnunetv2_diffusion.inference.inputs import CaseError, InputError, list_cases
from nnunetv2_diffusion.inference.predictor import DiffusionPredictor
from nnunetv2_diffusion.inference.prepared import preprocess
from nnunetv2_diffusion.inference.reading import channel_names, check_file, read_case

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
    """

    name: str
    data: torch.Tensor
    properties: dict[str, Any]
    image: np.ndarray
    reference: np.ndarray


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

    Everything is read and preprocessed once, which takes little beside the studies: none of them is lost to a bad file.

    Raises:
        InputError: naming every image or reference that is missing or cannot be used.
    """
    ending = predictor.dataset_json["file_ending"]
    cases, failed = list_cases(images, predictor.dataset_json)
    faults = [case.reason for case in failed]
    found = {name: (files, labels / f"{name}{ending}") for name, files in list(cases.items())[:limit]}
    for name, (files, reference) in found.items():
        if not reference.is_file():
            faults.append(f"{reference}: missing, expected the reference of a case in {images}")
            continue
        try:
            _read(predictor, name, files, reference)
        except (InputError, EvaluationError) as error:
            faults.append(str(error))
    if faults:
        raise InputError("\n".join(faults))
    return found


def read_cases(predictor: DiffusionPredictor, files: dict[str, tuple[list[Path], Path]]) -> Iterator[LabelledCase]:
    """Read and preprocess one case after the other.

    Raises:
        EvaluationError: a reference cannot be read or has an unknown label.
        CaseError: an image cannot be used, or it and its reference differ in shape.
    """
    for name, (channels, reference) in files.items():
        yield _read(predictor, name, channels, reference)


def _read(predictor: DiffusionPredictor, name: str, files: list[Path], reference: Path) -> LabelledCase:
    model, reader = model_files(predictor), predictor.plans_manager.image_reader_writer_class()
    image, properties, _ = read_case(reader, files, channel_names(predictor.dataset_json))
    check_file(reference)
    values = read_segmentation(reader, reference, label_set(predictor), ignore=True).values
    if values.shape not in (image.shape[1:], image.shape[2:]) or values.size != image[0].size:
        raise CaseError(f"{reference}: shape {values.shape}, expected {image.shape[1:]} as of {files[0]}")
    values = values.reshape(image.shape[1:])
    data, properties = preprocess(model, image, properties, str(files[0]))
    return LabelledCase(name, data, properties, image[0], values)


def dice_scores(labels: LabelSet, reference: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Dice of every class or region by name, and their mean; NaN where both masks are empty."""
    valid = labels.valid(reference)
    scores = {
        target.name: overlap_scores(
            count(labels.mask(reference, target), labels.mask(mask, target), valid), EMPTY_RULES["nnunet"]
        )["Dice"]
        for target in labels.targets
    }
    return {**scores, MEAN: mean_over_found(list(scores.values()))}


def agreement(labels: LabelSet, masks: list[np.ndarray]) -> float:
    """Agreement of masks: mean pairwise Dice, over the classes or regions that were found; see ``agreement``."""
    return mean_over_found([mean_pairwise_dice([labels.mask(mask, t) for mask in masks]) for t in labels.targets])
