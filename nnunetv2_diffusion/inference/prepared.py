"""Cases on their way from files to the network: nnU-Net's preprocessing, in worker processes or here."""

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

from nnunetv2_diffusion.inference.export import ModelFiles
from nnunetv2_diffusion.inference.inputs import CaseError, FailedCase
from nnunetv2_diffusion.inference.predictor import DiffusionPredictor
from nnunetv2_diffusion.inference.reading import channel_names, check_file, one_line, read_case
from nnunetv2_diffusion.workers import end_with_parent, receive_array, send_array

__all__ = [
    "FailedCase",
    "PreparedCase",
    "check_resampled",
    "notes_on_shape",
    "prepare_case",
    "prepare_cases",
    "preprocess",
]

WRITABLE_AXES = (2, 3)  # of images whose masks nnU-Net's ITK writers can write

FLAT = 1e-3  # normalised intensities have a standard deviation of about 1


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


def check_resampled(model: ModelFiles, shape: Sequence[int], spacing: Sequence[float], source: str) -> None:
    """See that an image keeps at least one voxel along each axis, and fits into memory, at the spacing of the model.

    Args:
        model: with the plans.
        shape: of the image, (z, y, x) in the order of the plans' axes.
        spacing: mm, in the same order.
        source: of the image, for the message.

    Raises:
        CaseError: if it does not.
    """
    configuration = model.configuration_manager
    if str(configuration.configuration["resampling_fn_data"]).startswith("no_resampling"):
        return
    target = list(configuration.spacing)
    target = [spacing[0]] * (len(shape) - len(target)) + target  # 2D: slices stay as they are
    try:
        new = tuple(int(n) for n in compute_new_shape(shape, spacing, target))
    except OverflowError:
        raise CaseError(f"{source}: spacing {_mm(spacing)} mm, expected about {_mm(target)} mm") from None
    change = f"{source}: shape {tuple(shape)} of {_mm(spacing)} mm becomes {new} at the model's {_mm(target)} mm"
    if min(new) < 1:
        raise CaseError(f"{change}, expected at least one voxel along each axis")
    needed = 4 * prod(new) * len(channel_names(model.dataset_json))
    if needed > _memory():
        raise CaseError(f"{change}, {needed / 2**30:.0f} GB, more than this machine has; is its spacing right?")


def _mm(spacing: Sequence[float]) -> str:
    return f"({', '.join(f'{s:g}' for s in spacing)})"


def _memory() -> float:
    """Bytes of this machine, as far as the system tells."""
    if not hasattr(os, "sysconf"):
        return float("inf")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def notes_on_shape(model: ModelFiles, image: np.ndarray, source: str) -> list[str]:
    """A note on a single slice (C, z, y, x) for a model of volumes: it sees zeros on both sides."""
    if len(model.configuration_manager.patch_size) < 3 or min(image.shape[1:]) > 1:
        return []
    return [f"{source}: a single slice, shape {image.shape[1:]}, and the model is 3D"]


def preprocess(
    model: ModelFiles,
    image: np.ndarray,
    properties: dict[str, Any],
    source: str,
    previous: np.ndarray | None = None,
    verbose: bool = False,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """nnU-Net's preprocessing of an image that was read.

    Args:
        model: with the plans.
        image: (C, z, y, x); not changed.
        properties: of the reader.
        source: of the image, for messages.
        previous: mask of the previous stage of a cascade, (1, z, y, x).
        verbose: let nnU-Net tell shapes.

    Returns:
        float32 and finite, (C, *spatial), for a cascade with one channel more for each label; and its properties.

    Raises:
        CaseError: naming the source, what was found and what was expected.
    """
    plans, configuration = model.plans_manager, model.configuration_manager
    properties, axes = dict(properties), plans.transpose_forward
    spacing = [float(properties["spacing"][axis]) for axis in axes]
    check_resampled(model, [image.shape[1 + axis] for axis in axes], spacing, source)
    try:
        data, seg, properties = configuration.preprocessor_class(verbose=verbose).run_case_npy(
            image, previous, properties, plans, configuration, model.dataset_json
        )
        if previous is not None:
            labels = plans.get_label_manager(model.dataset_json).foreground_labels
            data = np.vstack((data, convert_labelmap_to_one_hot(seg[0], labels, data.dtype)))
    except MemoryError as error:
        raise CaseError(f"{source}: not enough memory to preprocess it") from error
    except Exception as error:  # of a plug-in's preprocessing as well
        cropped = properties.get("shape_after_cropping_and_before_resampling")
        if cropped is not None:
            check_resampled(model, cropped, spacing, f"{source}, cropped to what is not zero")
        raise CaseError(f"{source}: cannot be preprocessed ({type(error).__name__}: {error})") from error
    data = torch.from_numpy(data).float()
    _check_prepared(data, source)
    return data, properties


def notes_on_intensities(data: torch.Tensor, channels: int, source: str) -> list[str]:
    """Notes on what normalisation made of the channels of an image: nnU-Net's divides by 1e-8 at least."""
    return [
        f"{source}: channel {number} is nearly the same in every voxel after normalisation: its intensities are "
        "constant, too small or too large. The mask does not depend on it"
        for number, channel in enumerate(data[:channels])
        if channel.max() - channel.min() < FLAT
    ]


def _check_prepared(data: torch.Tensor, source: str) -> None:
    """Raise CaseError unless preprocessed data has voxels, and all of them are finite."""
    if not data.numel():
        raise CaseError(f"{source}: shape {tuple(data.shape)} after preprocessing, expected at least one voxel")
    for number, channel in enumerate(data):
        bad = int((~torch.isfinite(channel)).sum())
        if bad:
            raise CaseError(
                f"{source}: channel {number} has {bad} of {channel.numel()} voxels that are not finite after "
                "preprocessing"
            )


def prepare_case(
    model: ModelFiles, name: str, files: Sequence[Path], previous: Path | None = None, verbose: bool = False
) -> PreparedCase | FailedCase:
    """Read and preprocess one case.

    Args:
        model: with the plans.
        name: of the case.
        files: its images.
        previous: file of the previous stage's mask, for a cascade.
        verbose: let nnU-Net tell shapes.
    """
    reader = model.plans_manager.image_reader_writer_class()
    try:
        image, properties, notes = read_case(reader, files, channel_names(model.dataset_json))
        notes += _gaps(files, model.ending) + notes_on_shape(model, image, str(files[0]))
        axes = len(properties.get("sitk_stuff", {}).get("spacing", WRITABLE_AXES))
        if axes not in WRITABLE_AXES:
            raise CaseError(f"{files[0]}: {axes} axes in the file; nnU-Net cannot write the mask of such an image")
        mask = None if previous is None else _read_previous(reader, previous, image.shape[1:])
        data, properties = preprocess(model, image, properties, str(files[0]), mask, verbose)
        notes += notes_on_intensities(data, len(image), str(files[0]))
    except CaseError as error:
        return FailedCase(name, str(error))
    return PreparedCase(name, data, properties, notes)


def _gaps(files: Sequence[Path], ending: str) -> list[str]:
    """A note if numbers of channels are left out: nnU-Net goes by the order of the files, not by their numbers."""
    numbers = [file.name.removesuffix(ending)[-4:] for file in files]
    if numbers == [f"{n:04d}" for n in range(len(files))]:
        return []
    return [
        f"{files[0].parent}: files numbered {', '.join(numbers)} are taken for the channels from 0 on, in this order"
    ]


def _read_previous(reader: Any, file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The mask of a cascade's previous stage, (1, z, y, x)."""
    check_file(file)
    try:
        mask = reader.read_seg(str(file))[0]
    except Exception as error:
        raise CaseError(f"{file}: cannot be read as the mask of the previous stage ({one_line(error)})") from error
    if mask.shape[1:] != shape:
        raise CaseError(f"{file}: shape {mask.shape[1:]}, expected {shape} as of the image")
    return mask


@dataclass
class _Job:
    """One case for ``prepare_case``."""

    name: str
    files: list[Path]
    previous: Path | None
    verbose: bool


def prepare_cases(
    predictor: DiffusionPredictor, cases: dict[str, list[Path]], previous: Path | None, processes: int
) -> Iterator[PreparedCase | FailedCase]:
    """Preprocess every case, in worker processes or here (0), in the order of the cases.

    A worker waits with the next case until its last one is taken, so no more than one for each process wait.

    Args:
        predictor: with a model.
        cases: name -> images.
        previous: folder of the previous stage's masks, for a cascade.
        processes: at most as many as there are cases are started.
    """
    model = ModelFiles(predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json)
    verbose = predictor.verbose_preprocessing
    jobs = [
        _Job(name, files, previous and previous / f"{name}{model.ending}", verbose) for name, files in cases.items()
    ]
    if processes:
        yield from _by_workers(model, jobs, min(processes, len(jobs)))
        return
    for job in jobs:
        yield prepare_case(model, job.name, job.files, job.previous, job.verbose)


def _by_workers(model: ModelFiles, jobs: list[_Job], count: int) -> Iterator[PreparedCase | FailedCase]:
    """Every worker has each ``count``-th case, as in nnU-Net; one that was killed is replaced for the cases left."""
    workers = [_Worker(model, jobs[first::count]) for first in range(count)]
    try:
        for number, job in enumerate(jobs):
            slot = number % count
            case = workers[slot].next_case()
            if case is None:
                case = FailedCase(job.name, f"{job.files[0]}: {workers[slot].why_ended()}")
                workers[slot].end()
                workers[slot] = _Worker(model, jobs[number + count :: count])
            yield case
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that prepares cases one after the other.

    Args:
        model: with the plans.
        jobs: its cases; no process is started for none.
    """

    def __init__(self, model: ModelFiles, jobs: list[_Job]):
        self._process: BaseProcess | None = None
        if not jobs:
            return
        context = multiprocessing.get_context("spawn")
        self._results, results = context.Pipe(duplex=False)
        self._process = context.Process(target=_serve, args=(model, jobs, results), daemon=True)
        self._process.start()
        results.close()  # else the end of the process would not end the pipe

    def next_case(self) -> PreparedCase | FailedCase | None:
        """Wait for the next case; None if the process ended before it was whole."""
        try:
            case = self._results.recv()
            if isinstance(case, FailedCase):
                return case
            name, properties, notes = case
            return PreparedCase(name, torch.from_numpy(receive_array(self._results)), properties, notes)
        except (EOFError, OSError):
            return None

    def why_ended(self) -> str:
        """Of a process that ended before its last case."""
        self._process.join()
        code = self._process.exitcode
        if code >= 0:
            return f"its process ended with status {code}"
        if code == -signal.SIGKILL:
            return "its process was killed (signal 9), probably for want of memory; -npp 0 needs less"
        return f"its process crashed (signal {-code}); a damaged file can do that to the library that reads it"

    def end(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.terminate()
            self._process.join()
            self._results.close()


def _serve(model: ModelFiles, jobs: list[_Job], results: Connection) -> None:
    """In a worker: prepare and send one case after the other."""
    end_with_parent()
    with suppress(BrokenPipeError):  # the parent was killed: nobody waits for a case, nor for a traceback
        for job in jobs:
            _send(results, prepare_case(model, job.name, job.files, job.previous, job.verbose))


def _send(results: Connection, case: PreparedCase | FailedCase) -> None:
    if isinstance(case, FailedCase):
        results.send(case)
        return
    results.send((case.name, case.properties, case.notes))
    send_array(results, case.data.numpy())
