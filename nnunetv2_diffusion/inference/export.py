"""Files of one case: everything is made in a folder of its own and moved when it is whole, the mask last."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_diffusion.files import to_disk, write_json
from nnunetv2_diffusion.inference.maps import (
    check_map_writer,
    check_whole,
    map_limit,
    to_original_geometry,
    within_limit,
    write_map,
)
from nnunetv2_diffusion.inference.runs import SIDE_FOLDERS, UNFINISHED, RunRecord, short_name
from nnunetv2_diffusion.inference.sample_statistics import (
    SCALES_DEFINITION,
    add_mask_volumes,
    foreground_labels,
    mask_volumes,
)

MIN_PROBABILITY = 1e-6
UNCERTAINTY, SAMPLES, STEPS = SIDE_FOLDERS


@torch.inference_mode()  # which p may come from
def bounded_logits(p: torch.Tensor, regions: bool, given_away: bool = False) -> np.ndarray:
    """Logits whose softmax, or sigmoid for regions, is p (K, *spatial), float32: what nnU-Net's export expects.

    Args:
        p: probabilities.
        regions: heads are independent (sigmoid), not classes (softmax).
        given_away: the caller needs p no more: it is overwritten, which spares a copy of all heads.
    """
    logits = p.to(torch.float32, copy=not given_away)
    if regions:
        logits.logit_(eps=MIN_PROBABILITY)
    else:
        logits.clamp_(min=MIN_PROBABILITY).log_()
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
        properties: of nnU-Net's preprocessing.
        logits: of the mean over samples, (K, *spatial), preprocessed geometry.
        run: that the case is of.
        inputs: files that it was made of.
        maps: kind -> (*spatial) for ``uncertainty/<kind>/``; None without.
        summary: for ``uncertainty/<case>.json``; None without.
        save_probabilities: write nnU-Net's npz and pkl.
    """

    name: str
    properties: dict[str, Any]
    logits: np.ndarray
    run: RunRecord
    inputs: tuple[Path, ...] = ()
    maps: dict[str, np.ndarray] | None = None
    summary: dict[str, Any] | None = None
    save_probabilities: bool = False

    @property
    def out(self) -> Path:
        """The output folder."""
        return self.run.out

    @property
    def work(self) -> Path:
        """Where files of this case are made."""
        return work_folder(self.out, self.name)


def work_folder(out: Path, name: str) -> Path:
    """Folder in which the files of a case are made. Nobody takes it for a result: nnU-Net looks at files only."""
    return out / f"{UNFINISHED}{short_name(name)}"


@contextmanager
def cleared_on_error(work: Path) -> Iterator[None]:
    """Remove the files of a case that could not be finished."""
    try:
        yield
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def at_image_spacing(logits: np.ndarray, properties: dict[str, Any], model: ModelFiles) -> np.ndarray:
    """Logits (K, *spatial) at the spacing of the image, cropped; as nnU-Net's export resamples them.

    One head after the other: nnU-Net's functions make a copy in float64 of everything that they are given. Plans may
    name a function that is not nnU-Net's and wants all heads together.
    """
    configuration, shape = model.configuration_manager, properties["shape_after_cropping_and_before_resampling"]
    spacing = [properties["spacing"][axis] for axis in model.plans_manager.transpose_forward]
    own = list(configuration.spacing)
    own = own if len(own) == len(shape) else [spacing[0], *own]  # a 2D network's slices stay as they are
    resample = configuration.resampling_fn_probabilities
    if tuple(logits.shape[1:]) == tuple(shape) or not resample.func.__module__.startswith("nnunetv2."):
        return np.asarray(resample(logits, shape, own, spacing))
    result = np.empty((len(logits), *shape), logits.dtype)
    for head, values in zip(result, logits, strict=True):
        head[...] = np.asarray(resample(values[None], shape, own, spacing)[0])
    return result


def label_map(logits: np.ndarray, properties: dict[str, Any], model: ModelFiles) -> np.ndarray:
    """Labels in the geometry of the image: what nnU-Net's export makes of logits (K, *spatial), in less memory.

    Labels are chosen slice by slice, as nnU-Net's label manager copies everything that it is given.
    """
    labels = model.plans_manager.get_label_manager(model.dataset_json)
    logits = at_image_spacing(logits, properties, model)
    cropped = np.empty(logits.shape[1:], np.uint8 if len(labels.foreground_labels) < 255 else np.uint16)
    for index in range(len(cropped)):
        cropped[index] = labels.convert_logits_to_segmentation(logits[:, index : index + 1])[0]
    whole = np.zeros(properties["shape_before_cropping"], cropped.dtype)
    whole = insert_crop_into_image(whole, cropped, properties["bbox_used_for_cropping"])
    return whole.transpose(model.plans_manager.transpose_backward)


def write_mask(logits: np.ndarray, target: Path, properties: dict[str, Any], model: ModelFiles, npz: bool) -> None:
    """Write ``<target><ending>``, and nnU-Net's npz and pkl if asked for; a missing folder is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if npz:
            export_prediction_from_logits(
                logits, properties, model.configuration_manager, model.plans_manager, model.dataset_json, str(target),
                npz, num_threads_torch=1,
            )  # fmt: skip
        else:
            writer = model.plans_manager.image_reader_writer_class()
            writer.write_seg(label_map(logits, properties, model), f"{target}{model.ending}", properties)
    except RuntimeError as error:  # SimpleITK has no other kind
        raise OSError(f"{target.name}{model.ending}: cannot be written ({' '.join(str(error).split())})") from error
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
    write_json(case.work / UNCERTAINTY / f"{case.name}.json", case.summary)


def export_case(case: CaseExport, model: ModelFiles) -> None:
    """Write all files of a case, then move them into the output folder, the mask last."""
    with cleared_on_error(case.work):
        case.work.mkdir(parents=True, exist_ok=True)
        scales, notes = write_maps(case, model) if case.maps is not None else ({}, [])
        write_mask(case.logits, case.work / case.name, case.properties, model, case.save_probabilities)
        if case.summary is not None:
            write_summary(case, model, scales, notes)
        case.run.write(case.name, case.work, case.inputs)  # before any of them is in its place
        publish(case.work, case.out, case.name + model.ending)


def publish(work: Path, out: Path, last: str) -> None:
    """Move every file of a work folder to the same place in the output folder, ``last`` at the end."""
    files = sorted((f for f in work.rglob("*") if f.is_file()), key=lambda f: (f == work / last, f))
    for file in files:
        target = out / file.relative_to(work)
        target.parent.mkdir(parents=True, exist_ok=True)
        to_disk(file)
        os.replace(file, target)
    shutil.rmtree(work)
