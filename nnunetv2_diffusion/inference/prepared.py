"""Cases on their way from files to the network: nnU-Net's preprocessing, in worker processes or here."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

from nnunetv2_diffusion.inference.predictor import DiffusionPredictor


@dataclass
class PreparedCase:
    """A preprocessed case.

    Attributes:
        name: of the case.
        data: for the network, float32, (C, *spatial); finite.
        properties: of nnU-Net's preprocessing.
        notes: what a reader of the result should know of the input, one sentence each.
    """

    name: str
    data: torch.Tensor
    properties: dict[str, Any]
    notes: list[str] = field(default_factory=list)


@dataclass
class FailedCase:
    """A case that cannot be predicted; the others go on.

    Attributes:
        name: of the case.
        reason: what was found and what was expected, one sentence that names the file.
    """

    name: str
    reason: str


def prepare_cases(
    predictor: DiffusionPredictor, cases: dict[str, list[Path]], previous: Path | None, processes: int
) -> Iterator[PreparedCase | FailedCase]:
    """Preprocess every case, in worker processes or here (0)."""
    if not cases:
        return
    ending = predictor.dataset_json["file_ending"]
    files = [[str(f) for f in channels] for channels in cases.values()]
    stage = [str(previous / (name + ending)) if previous else None for name in cases]
    names = list(cases)
    if processes:
        items = predictor._internal_get_data_iterator_from_lists_of_filenames(files, stage, names, processes)
        for item in items:
            yield PreparedCase(Path(item["ofile"]).name, item["data"], item["data_properties"])
        return
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=predictor.verbose_preprocessing)
    for channels, mask, name in zip(files, stage, names, strict=True):
        data, seg, properties = preprocessor.run_case(
            channels, mask, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
        )
        if mask is not None:
            one_hot = convert_labelmap_to_one_hot(seg[0], predictor.label_manager.foreground_labels, data.dtype)
            data = np.vstack((data, one_hot))
        yield PreparedCase(name, torch.from_numpy(data).float(), properties)
