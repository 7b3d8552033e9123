"""The predictor for programs: one image in, one result out."""

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunetv2_diffusion.architecture import short
from nnunetv2_diffusion.inference.cases import (
    CaseResult,
    describe,
    draw_case,
    final_mask,
    model_files,
    uncertainty_maps,
)
from nnunetv2_diffusion.inference.inputs import InputError
from nnunetv2_diffusion.inference.loading import load_predictor
from nnunetv2_diffusion.inference.maps import map_limit, to_original_geometry, within_limit
from nnunetv2_diffusion.inference.options import PredictionOptions
from nnunetv2_diffusion.inference.predictor import DiffusionPredictor
from nnunetv2_diffusion.inference.prepared import notes_on_intensities, notes_on_shape, preprocess
from nnunetv2_diffusion.inference.reading import channel_names, check_image, read_case
from nnunetv2_diffusion.inference.sample_statistics import add_mask_volumes, foreground_labels, mask_volumes
from nnunetv2_diffusion.removed import removed_option

Image = np.ndarray | str | Path | Sequence[str | Path]


@dataclass
class Prediction:
    """What is known of one image. Arrays have the shape of the image, axes as nnU-Net's reader gives them (z, y, x).

    Attributes:
        mask: labels, integer.
        maps: float32 maps by kind: ``probability_<label>`` (see ``maps.map_names``), ``entropy`` and
            ``mutual_information`` in nats, ``variance``.
        samples: the mask of every sample, if asked for.
        spacing: mm along the axes of the arrays.
        summary: volumes, agreement of samples, settings, passes and seconds; see ``sample_statistics.case_summary``.
    """

    mask: np.ndarray
    maps: dict[str, np.ndarray]
    samples: list[np.ndarray]
    spacing: tuple[float, ...]
    summary: dict[str, Any]

    @property
    def agreement(self) -> float | None:
        """Mean pairwise Dice of the samples over the labels that were found, in [0, 1]; no confidence.

        It tells how the samples of this model differ, which says little about errors until a model is calibrated. None
        for a single sample, or if nothing was found.
        """
        return self.summary["agreement"]

    @property
    def confidence(self) -> float | None:
        """Deprecated: ``agreement``, which is no confidence."""
        warnings.warn(
            "Prediction.confidence is the agreement of samples and no confidence; use Prediction.agreement, the next "
            "version leaves confidence out",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.agreement


def load_model(
    folder: str | Path,
    folds: Sequence[int | str] | None = None,
    checkpoint: str = "checkpoint_final.pth",
    device: str = "cpu",
    progress: bool = False,
) -> DiffusionPredictor:
    """Load a trained model for ``predict_image``.

    Args:
        folder: nnU-Net's ``nnUNet_results/DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION``.
        folds: to be averaged; None for all that were trained.
        checkpoint: name of the file in each fold.
        device: "cpu", "cuda" or "mps".
        progress: show a progress bar of network passes.

    Raises:
        CheckpointError: a file is missing, damaged, or of another network.
    """
    return load_predictor(Path(folder), folds, checkpoint, device, progress=progress)


def predict_image(
    model: DiffusionPredictor,
    image: Image,
    spacing: Sequence[float] | None = None,
    keep_samples: bool = False,
    **options: Any,
) -> Prediction:
    """Predict one image.

    Args:
        model: of ``load_model``; for one thread at a time, as it is told the options.
        image: a file, one file a channel, or an array (z, y, x), (C, z, y, x) or for 2D models (y, x) or (C, y, x).
        spacing: of an array, mm along its spatial axes.
        keep_samples: return the mask of every sample.
        **options: of ``PredictionOptions``: steps, sampler, step_spacing, samples, seed, tta.

    Raises:
        InputError: the image does not fit the model.
        OptionError: the model cannot do what is asked for.
    """
    _set_options(model, options)
    data, properties, notes = _preprocess(model, image, spacing)
    kept: list[np.ndarray] = []

    def to_mask(p: torch.Tensor) -> np.ndarray:
        mask = final_mask(model, p, properties)
        if keep_samples:
            kept.append(mask)
        return mask

    with tempfile.TemporaryDirectory() as folder:
        result = draw_case(model, data, "image", Path(folder), to_mask=to_mask)
    maps, map_notes = _maps(model, result, properties)
    mask = final_mask(model, result.moments.mean(), properties)
    spacing = tuple(float(s) for s in properties["spacing"])
    summary = describe(model, "image", properties, result, [*notes, *map_notes])
    add_mask_volumes(summary, mask_volumes(mask, foreground_labels(model.dataset_json), spacing))
    return Prediction(mask, maps, kept, spacing, summary)


def _maps(
    model: DiffusionPredictor, result: CaseResult, properties: dict[str, Any]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Maps on the grid of the image, and notes on what is wrong with them."""
    maps = uncertainty_maps(model, result)
    managers = model.plans_manager, model.configuration_manager
    heads, regions = len(result.moments.mean()), model.label_manager.has_regions
    found, notes = {}, []
    stacked = to_original_geometry(np.stack(list(maps.values())), properties, *managers)
    for kind, values in zip(maps, stacked, strict=True):
        found[kind], note = within_limit(values, map_limit(kind, heads, regions), kind)
        notes += [note] if note else []
    return found, notes


def _set_options(model: DiffusionPredictor, options: dict[str, Any]) -> None:
    known = [n for n in PredictionOptions.__dataclass_fields__ if not n.startswith("save_")]
    unknown = sorted(set(options) - set(known))
    if unknown:
        gone = removed_option(f"--{unknown[0]}")
        raise TypeError(gone or f"predict_image has no option {unknown[0]}; known are {', '.join(known)}")
    model.set_options(PredictionOptions(**options))


def _preprocess(
    model: DiffusionPredictor, image: Image, spacing: Sequence[float] | None
) -> tuple[torch.Tensor, dict[str, Any], list[str]]:
    """nnU-Net's preprocessing of a file or an array, its properties, and notes on the image."""
    if model.configuration_manager.previous_stage_name is not None:
        raise InputError("the model is the second stage of a cascade; use the command nnunetv2_diffusion predict")
    channels = channel_names(model.dataset_json)
    if isinstance(image, np.ndarray):
        array, properties = _as_read(image, spacing, len(model.configuration_manager.patch_size), len(channels))
        source, notes = "the image", check_image(array, properties, channels)
    else:
        images = _files(image)
        source = str(images[0])
        array, properties, notes = read_case(model.plans_manager.image_reader_writer_class(), images, channels)
    files = model_files(model)
    data, properties = preprocess(files, array, properties, source)
    notes += notes_on_shape(files, array, source) + notes_on_intensities(data, len(array), source)
    return data, properties, notes


def _files(image: str | Path | Sequence[str | Path]) -> list[Path]:
    files = [image] if isinstance(image, str | Path) else list(image)
    if not files or not all(isinstance(file, str | Path) for file in files):
        raise InputError(f"the image is {type(image).__name__}, expected a file, a list of files or a numpy array")
    return [Path(file) for file in files]


def _as_read(
    image: np.ndarray, spacing: Sequence[float] | None, dims: int, channels: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """An array and its spacing as a reader of nnU-Net would give them, for a model of 2 or 3 dimensions."""
    axes, number = "(y, x)" if dims == 2 else "(z, y, x)", f"expected ({channels} channels, z, y, x)"
    if isinstance(image, np.ma.MaskedArray):
        raise InputError(
            "the image is a masked array, expected one without a mask: give the masked voxels a value, "
            "image.filled(value)"
        )
    if image.dtype.kind not in "biuf":
        raise InputError(f"the image has values of type {image.dtype}, expected real numbers")
    if image.ndim > 2 and image.shape[-1] == channels > 1 and image.shape[0] != channels:
        raise InputError(
            f"the image has shape {image.shape} and the model {channels} channels: move the channels to the front, "
            "np.moveaxis(image, -1, 0)"
        )
    spacing = None if spacing is None else _numbers(spacing, axes)
    if dims == 3 and (image.ndim == 2 or (spacing is not None and len(spacing) == 2)):
        raise InputError(
            f"the image has shape {image.shape}, and the model is 3D: give a volume {axes}, {number}, and its spacing "
            "along each spatial axis; image[None] makes a single slice one"
        )
    if spacing is None:
        raise InputError(f"spacing is missing: expected mm along each spatial axis of the array, {axes}")
    positive = all(np.isfinite(s) and s > 0 for s in spacing)
    if len(spacing) not in (2, 3) or not positive or image.ndim not in (len(spacing), len(spacing) + 1):
        raise InputError(
            f"the image has shape {image.shape} and spacing {spacing}, expected 2 or 3 positive numbers, one for each "
            "spatial axis, and at most one more axis for channels"
        )
    array = image if image.ndim == len(spacing) + 1 else image[None]
    if len(array) != channels:
        raise InputError(f"the image has shape {image.shape}, {number}{_colours_last(image)}")
    if len(spacing) == 2:  # nnU-Net's readers give a 2D image one slice, very thick
        array, spacing = array[:, None], [999 * max(spacing), *spacing]
    with np.errstate(over="ignore"):  # what is too large is found as a value that is not finite
        return array.astype(np.float32), {"spacing": spacing}


def _numbers(spacing: Sequence[float], axes: str) -> list[float]:
    """The spacing as a list of floats; a text or complex numbers are none."""
    try:
        values = np.asarray(spacing)
    except (TypeError, ValueError):  # lists within of other lengths
        values = np.empty(0, object)
    if values.ndim != 1 or values.dtype.kind not in "iuf":
        raise InputError(f"spacing is {short(spacing)}, expected mm along each spatial axis of the array, {axes}")
    return [float(s) for s in values]


def _colours_last(image: np.ndarray) -> str:
    if image.shape[-1] not in (3, 4):
        return ""
    return f"; if the last axis holds {image.shape[-1]} colours, take one of them or move them to the front"
