"""Files of one case: everything is made in a folder of its own and moved when it is whole, the mask last."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_diffusion.inference.maps import (
    check_map_writer,
    check_whole,
    map_limit,
    to_original_geometry,
    within_limit,
    write_map,
)
from nnunetv2_diffusion.inference.sample_statistics import (
    SCALES_DEFINITION,
    add_mask_volumes,
    foreground_labels,
    mask_volumes,
)

MIN_PROBABILITY = 1e-6
UNCERTAINTY = "uncertainty"
SAMPLES = "samples"
STEPS = "steps"


def bounded_logits(p: torch.Tensor, regions: bool) -> np.ndarray:
    """Logits whose softmax, or sigmoid for regions, is p (K, *spatial): what nnU-Net's export expects."""
    p = p.float()
    logits = torch.logit(p, eps=MIN_PROBABILITY) if regions else p.clamp(min=MIN_PROBABILITY).log()
    return logits.cpu().numpy()


@dataclass
class ModelFiles:
    """What export needs to know of a model; it travels to worker processes."""

    plans_manager: PlansManager
    configuration_manager: ConfigurationManager
    dataset_json: dict

    @property
    def ending(self) -> str:
        """Of the model's files, ".nii.gz" for example."""
        return self.dataset_json["file_ending"]


@dataclass
class CaseExport:
    """One finished case on its way to files.

    Attributes:
        name: of the case.
        out: the output folder.
        properties: of nnU-Net's preprocessing.
        logits: of the mean over samples, (K, *spatial), preprocessed geometry.
        maps: kind -> (*spatial) for ``uncertainty/<kind>/``; None without.
        summary: for ``uncertainty/<case>.json``; None without.
        save_probabilities: write nnU-Net's npz and pkl.
    """

    name: str
    out: Path
    properties: dict[str, Any]
    logits: np.ndarray
    maps: dict[str, np.ndarray] | None = None
    summary: dict[str, Any] | None = None
    save_probabilities: bool = False

    @property
    def work(self) -> Path:
        """Where files of this case are made."""
        return work_folder(self.out, self.name)


def work_folder(out: Path, name: str) -> Path:
    """Folder in which the files of a case are made. Nobody takes it for a result: nnU-Net looks at files only."""
    return out / f".unfinished_{name}"


@contextmanager
def cleared_on_error(work: Path) -> Iterator[None]:
    """Remove the files of a case that could not be finished.

    Raises:
        OSError: naming the folder, if it was one.
    """
    try:
        yield
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(
                error.errno, f"{error.strerror or error}; nothing of this case was kept", str(work)
            ) from error
        raise


def write_mask(logits: np.ndarray, target: Path, properties: dict[str, Any], model: ModelFiles, npz: bool) -> None:
    """Write ``<target><ending>`` by nnU-Net's export; a missing folder is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    export_prediction_from_logits(
        logits, properties, model.configuration_manager, model.plans_manager, model.dataset_json, str(target), npz,
        num_threads_torch=1,
    )  # fmt: skip
    # on a full disk, SimpleITK writes a part of the file and reports success
    check_whole(Path(f"{target}{model.ending}"), int(np.prod(properties["shape_before_cropping"])))


def write_maps(case: CaseExport, model: ModelFiles) -> tuple[dict[str, float], list[str]]:
    """Write all maps of a case; returns the scales of those in 16-bit images, and notes on what is wrong with maps."""
    reader = model.plans_manager.image_reader_writer_class
    ending = check_map_writer(reader, model.ending)
    heads, regions = len(case.logits), model.plans_manager.get_label_manager(model.dataset_json).has_regions
    scales, notes = {}, []
    for kind, values in case.maps.items():
        (values,) = to_original_geometry(
            values[None], case.properties, model.plans_manager, model.configuration_manager
        )
        path = case.work / UNCERTAINTY / kind / f"{case.name}{ending}"
        limit = map_limit(kind, heads, regions)
        try:  # the mask is made: no map may cost it
            values, note = within_limit(values, limit, kind)
            scale = write_map(values, path, case.properties, reader, limit)
        except ValueError as error:
            notes.append(f"map not written: {error}")
            continue
        notes += [note] if note else []
        if scale is not None:
            scales[kind] = scale
    return scales, notes


def write_summary(case: CaseExport, model: ModelFiles, scales: dict[str, float], notes: list[str]) -> None:
    """Write the JSON of a case whose mask is written: its volumes are those of that file."""
    mask = model.plans_manager.image_reader_writer_class().read_seg(str(case.work / (case.name + model.ending)))[0][0]
    volumes = mask_volumes(mask, foreground_labels(model.dataset_json), case.properties["spacing"])
    add_mask_volumes(case.summary, volumes)
    case.summary["notes"] = [*case.summary["notes"], *notes]
    if scales:
        case.summary["map_scales"] = scales
        case.summary["definitions"] = {**case.summary["definitions"], **SCALES_DEFINITION}
    file = case.work / UNCERTAINTY / f"{case.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(case.summary, indent=2))


def export_case(case: CaseExport, model: ModelFiles) -> None:
    """Write all files of a case, then move them into the output folder, the mask last."""
    with cleared_on_error(case.work):
        case.work.mkdir(parents=True, exist_ok=True)
        scales, notes = write_maps(case, model) if case.maps is not None else ({}, [])
        write_mask(case.logits, case.work / case.name, case.properties, model, case.save_probabilities)
        if case.summary is not None:
            write_summary(case, model, scales, notes)
        publish(case.work, case.out, case.name + model.ending)


def publish(work: Path, out: Path, last: str) -> None:
    """Move every file of a work folder to the same place in the output folder, ``last`` at the end."""
    files = sorted((f for f in work.rglob("*") if f.is_file()), key=lambda f: (f == work / last, f))
    for file in files:
        target = out / file.relative_to(work)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    shutil.rmtree(work)
