"""Verb ``predict``: nnU-Net's prediction with samples, uncertainty and control of steps and mirrors."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from nnunetv2.utilities.file_path_utilities import get_output_folder
from tqdm import tqdm

from nnunetv2_diffusion.checkpoints import CheckpointError
from nnunetv2_diffusion.diffusion import SAMPLERS, SPACINGS
from nnunetv2_diffusion.inference.cases import CasePredictor, CaseResult, Exporter, model_files
from nnunetv2_diffusion.inference.export import SAMPLES, STEPS, UNCERTAINTY
from nnunetv2_diffusion.inference.inputs import (
    CaseError,
    InputError,
    check_headers,
    is_finished,
    list_cases,
    prepare_output,
)
from nnunetv2_diffusion.inference.loading import load_predictor
from nnunetv2_diffusion.inference.maps import MapWriterError, check_map_writer
from nnunetv2_diffusion.inference.options import AGGREGATION, OptionError, PredictionOptions
from nnunetv2_diffusion.inference.predictor import DiffusionPredictor
from nnunetv2_diffusion.inference.prepared import FailedCase, prepare_cases
from nnunetv2_diffusion.inference.sliding_window import COMBINATIONS
from nnunetv2_diffusion.inference.views import TTA
from nnunetv2_diffusion.networks import UnsupportedArchitectureError
from nnunetv2_diffusion.planning.schema import SettingsError

EXPECTED = (
    CheckpointError,
    InputError,
    MapWriterError,
    OptionError,
    OSError,
    SettingsError,
    UnsupportedArchitectureError,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """nnU-Net's own options, and ours."""
    _add_host_options(parser)
    _add_own_options(parser)


def add_model_options(parser: argparse._ActionsContainer) -> None:
    """Which trained model, in nnU-Net's words; see ``model_folder``."""
    add = parser.add_argument
    add("-d", metavar="DATASET", help="name or id")
    add("-c", metavar="CONFIGURATION", help="2d, 3d_fullres, ...")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="plans; default nnUNetPlans")
    add("-tr", default="nnUNetTrainerRecycleXT", metavar="TRAINER", help="default nnUNetTrainerRecycleXT")
    add("-m", type=Path, metavar="DIR", help="folder of a trained model, instead of -d -c -p -tr")
    add("-f", nargs="+", metavar="FOLD", help="folds to average; default: all that were trained")
    add("-chk", default="checkpoint_final.pth", metavar="FILE", help="name of the checkpoint")


def _processes(variable: str) -> int:
    """nnU-Net's default for -npp and -nps."""
    return int(os.environ.get(variable) or 3)


def _add_host_options(parser: argparse.ArgumentParser) -> None:
    host = parser.add_argument_group("as in nnUNetv2_predict")
    add_model_options(host)
    add = host.add_argument
    add("-i", required=True, type=Path, metavar="DIR", help="images, <case>_0000<ending>")
    add("-o", required=True, type=Path, metavar="DIR", help="output folder")
    add("-step_size", type=float, default=0.5, help="of the sliding window, in parts of the patch")
    add("-device", default="cuda", choices=("cuda", "cpu", "mps"))
    add("-npp", type=int, default=_processes("nnUNet_npp"), help="processes for preprocessing, 0 for none")
    add("-nps", type=int, default=_processes("nnUNet_nps"), help="processes for export, 0 for none")
    add("-num_parts", type=int, default=1, help="how many calls share the work")
    add("-part_id", type=int, default=0, help="which of them this is, from 0")
    add("-prev_stage_predictions", type=Path, metavar="DIR", help="of a cascade")
    add("--disable_tta", action="store_true", help="the same as --tta none")
    add("--save_probabilities", action="store_true", help="npz and pkl, as nnU-Net's")
    add("--continue_prediction", action="store_true", help="leave out cases that are finished")
    add("--disable_progress_bar", action="store_true")
    add("--not_on_device", action="store_true", help="keep results of a GPU in main memory")
    add("--verbose", action="store_true")


def _add_own_options(parser: argparse.ArgumentParser) -> None:
    defaults = PredictionOptions()
    ours = parser.add_argument_group("diffusion; defaults are the settings of the model's plans")
    add = ours.add_argument
    add(
        "--steps",
        type=int,
        metavar="K",
        help="reverse steps; 0: the segmentor's own mask of a HiDiff model, 1: its best mask; samples of it whose "
        "masks differ need more. A refiner that made masks worse in training is used only if steps are asked for",
    )
    add("--sampler", choices=SAMPLERS)
    add("--step_spacing", choices=SPACINGS, help="of the steps; trailing leaves out the last one, t = 0")
    add("--samples", type=int, metavar="N", help="masks to draw; the result is their mean")
    add("--seed", type=int)
    add("--tta", choices=TTA, default=defaults.tta, help="mirroring: a chain a view, one chain through all, or none")
    add("--early_exit", action="store_true", help="end a tile's chain when a step leaves its labels unchanged")
    add(
        "--aggregate",
        choices=AGGREGATION,
        default=defaults.aggregate,
        help="blend tiles at the end, or after every step",
    )
    add(
        "--combine",
        choices=COMBINATIONS,
        default=defaults.combine,
        help="what a chain goes on from and returns: the mean of its views, its last step, or the mean of its steps",
    )
    add("--save_uncertainty", action="store_true", help=f"maps and a JSON for each case in {UNCERTAINTY}/")
    add("--save_samples", action="store_true", help=f"every sample's mask in {SAMPLES}/000/ ...")
    add("--save_steps", action="store_true", help=f"the mask after every step in {STEPS}/01/ ...")


def run(arguments: argparse.Namespace) -> int:
    """Predict a folder; 1 with a message if it cannot be done."""
    try:
        predict_folder(arguments)
    except EXPECTED as error:
        print(f"nnunetv2_diffusion predict: {error}", file=sys.stderr)
        return 1
    return 0


def read_options(arguments: argparse.Namespace) -> PredictionOptions:
    """Options of the command line.

    Raises:
        OptionError: for a value out of range, or options that exclude each other.
    """
    if not 0 <= arguments.part_id < arguments.num_parts:
        raise OptionError(f"-part_id is {arguments.part_id}, expected 0 .. {arguments.num_parts - 1} (-num_parts - 1)")
    for name in ("npp", "nps"):
        if getattr(arguments, name) < 0:
            raise OptionError(f"-{name} is {getattr(arguments, name)}, expected at least 0")
    if not 0 < arguments.step_size <= 1:
        raise OptionError(f"-step_size is {arguments.step_size}, expected more than 0 and at most 1")
    names = PredictionOptions.__dataclass_fields__
    given = {name: getattr(arguments, name) for name in names}
    if arguments.disable_tta:
        given["tta"] = "none"
    return PredictionOptions(**given)


def model_folder(arguments: argparse.Namespace) -> Path:
    """Of -m, or of -d -c -p -tr.

    Raises:
        OptionError: if neither is given.
        InputError: for a data set that nnU-Net does not know.
    """
    if arguments.m is not None:
        return arguments.m
    missing = [f"-{name}" for name in ("d", "c") if getattr(arguments, name) is None]
    if missing:
        raise OptionError(f"{' and '.join(missing)} missing: give -d and -c, or -m with the folder of a trained model")
    try:
        return Path(get_output_folder(arguments.d, arguments.tr, arguments.p, arguments.c))
    except (RuntimeError, TypeError) as error:  # nnU-Net: unknown data set, or no folder variable
        raise InputError(f"-d {arguments.d}: {error}; are nnUNet_raw and nnUNet_results set?") from error


def predict_folder(arguments: argparse.Namespace) -> None:
    """All of the verb; every check comes before the first network pass."""
    options = read_options(arguments)
    predictor = load_predictor(
        model_folder(arguments), arguments.f, arguments.chk, arguments.device, options, arguments.step_size,
        not arguments.not_on_device, not arguments.disable_progress_bar, arguments.verbose,
    )  # fmt: skip
    if options.save_uncertainty:
        check_map_writer(predictor.plans_manager.image_reader_writer_class, predictor.dataset_json["file_ending"])
    cases = list_cases(arguments.i, predictor.dataset_json)
    check_headers(cases, predictor.dataset_json["file_ending"])
    previous = _previous_stage(arguments, predictor, cases)
    prepare_output(arguments.o, arguments.i)
    mine = dict(list(cases.items())[arguments.part_id :: arguments.num_parts])
    if arguments.continue_prediction:
        done = [name for name in mine if _finished(arguments.o, name, predictor)]
        mine = {name: files for name, files in mine.items() if name not in done}
        print(f"{len(done)} of {len(done) + len(mine)} cases are finished")
    _write_records(arguments, predictor)
    with Exporter(model_files(predictor), arguments.nps) as export:
        predict_case = CasePredictor(predictor, arguments.o, export)
        for case in prepare_cases(predictor, mine, previous, arguments.npp):
            if isinstance(case, FailedCase):
                raise CaseError(f"{case.name}: {case.reason}")
            _report(case.name, predict_case(case.name, case.data, case.properties))


def _report(name: str, result: CaseResult) -> None:
    passes = result.passes
    tqdm.write(
        f"{name}: {result.seconds:.1f} s, {passes.tiles} tiles, {passes.members} members, "
        f"{passes.per_tile:.2f} network passes a tile"
    )


def _finished(out: Path, name: str, predictor: DiffusionPredictor) -> bool:
    """Whether everything that is asked for is there."""
    options, ending = predictor.options, predictor.dataset_json["file_ending"]
    members = predictor.samples * len(predictor.list_of_parameters)
    wanted = [f"{UNCERTAINTY}/{name}.json"] if options.save_uncertainty else []
    wanted += [f"{name}.npz"] if options.save_probabilities else []
    wanted += [f"{SAMPLES}/{i:03d}/{name}{ending}" for i in range(members if options.save_samples else 0)]
    wanted += [
        f"{STEPS}/{i + 1:02d}/{name}{ending}" for i in range(predictor.chain().steps if options.save_steps else 0)
    ]
    return is_finished(out, name, ending, wanted)


def _previous_stage(
    arguments: argparse.Namespace, predictor: DiffusionPredictor, cases: dict[str, list[Path]]
) -> Path | None:
    """Folder of the previous stage's masks, checked."""
    stage, folder = predictor.configuration_manager.previous_stage_name, arguments.prev_stage_predictions
    if stage is None:
        return None
    if folder is None:
        raise OptionError(f"-prev_stage_predictions missing: this cascade needs the masks of {stage}")
    for name in cases:
        file = folder / (name + predictor.dataset_json["file_ending"])
        if not file.is_file():
            raise InputError(f"{file}: missing, expected the mask of {stage}")
    return folder


def _write_records(arguments: argparse.Namespace, predictor: DiffusionPredictor) -> None:
    """plans.json, dataset.json and the arguments, as nnU-Net leaves them beside the masks."""
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k not in ("run", "verb")}
    records: dict[str, Any] = {
        "plans.json": predictor.plans_manager.plans,
        "dataset.json": predictor.dataset_json,
        "predict_from_raw_data_args.json": given,
    }
    for name, content in records.items():
        part = arguments.o / f".{name}.{os.getpid()}"  # several parts may write at the same time
        part.write_text(json.dumps(content, indent=4))
        os.replace(part, arguments.o / name)
