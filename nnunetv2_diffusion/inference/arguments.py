"""Options of ``predict``, and those that other verbs share with it."""

import argparse
import os
from pathlib import Path

from nnunetv2.utilities.file_path_utilities import get_output_folder

from nnunetv2_diffusion.diffusion import SAMPLERS, SPACINGS
from nnunetv2_diffusion.inference.export import SAMPLES, STEPS, UNCERTAINTY
from nnunetv2_diffusion.inference.inputs import InputError
from nnunetv2_diffusion.inference.options import OptionError, PredictionOptions
from nnunetv2_diffusion.inference.runs import FAILED
from nnunetv2_diffusion.sampling.views import TTA

EXAMPLES = """
nnunetv2_diffusion predict -d 501 -c 3d_fullres -f 0 -i imagesTs -o masks
nnunetv2_diffusion predict -m MODEL_FOLDER -i imagesTs -o masks --samples 8 --save_uncertainty -device cpu
nnunetv2_diffusion predict -m MODEL_FOLDER -i imagesTs -o masks --samples 8 --save_uncertainty --continue_prediction
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """nnU-Net's own options, and ours."""
    add_model_options(parser.add_argument_group("model, as in nnUNetv2_predict"))
    _add_file_options(parser.add_argument_group("files"))
    _add_sampling_options(parser.add_argument_group("diffusion; defaults are the settings of the model's plans"))
    _add_machine_options(parser.add_argument_group("machine, as in nnUNetv2_predict"))


def add_model_options(parser: argparse._ActionsContainer) -> None:
    """Which trained model, in nnU-Net's words; see ``model_folder``."""
    add = parser.add_argument
    add("-d", metavar="DATASET", help="Name or number of the data set that the model was trained on.")
    add("-c", metavar="CONFIGURATION", help="Configuration that was trained: 2d, 3d_fullres, ...")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="Plans that were trained with.")
    add("-tr", default="nnUNetTrainerRecycleXT", metavar="TRAINER", help="Trainer that was trained with.")
    add("-m", type=Path, metavar="DIR", help="Folder of a trained model, instead of -d -c -p -tr.")
    add("-f", nargs="+", metavar="FOLD", help="Folds to average. Default: all that were trained.")
    add("-chk", default="checkpoint_final.pth", metavar="FILE", help="Name of the checkpoint in the folder of a fold.")


def _add_file_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("-i", required=True, type=Path, metavar="IN", help="Folder of images <case>_0000<ending>, or one of them.")
    add("-o", required=True, type=Path, metavar="DIR", help="Folder for the masks.")
    add(
        "--save_uncertainty",
        action="store_true",
        help=f"Write {UNCERTAINTY}/: maps, and a JSON for each case with volumes, spread and agreement of samples.",
    )
    add("--save_samples", action="store_true", help=f"Write the mask of every sample to {SAMPLES}/000/, ...")
    add("--save_steps", action="store_true", help=f"Write the mask after every step to {STEPS}/01/, ...")
    add("--save_probabilities", action="store_true", help="Write npz and pkl, as nnU-Net's, for ensembles.")
    add(
        "--continue_prediction",
        action="store_true",
        help="Go on with an interrupted call: keep cases that are whole, make the others; failed ones are left out.",
    )
    add("--retry_failed", action="store_true", help=f"With --continue_prediction: try the cases of {FAILED} again.")
    add(
        "--overwrite",
        action="store_true",
        help="Make the cases of this call again; other cases stay. What a run with another model or other options "
        "wrote to the output folder is all removed first. Foreign files are replaced only by those of the same name.",
    )
    add("-prev_stage_predictions", type=Path, metavar="DIR", help="Masks of the first stage, for a cascade.")


def _add_sampling_options(group: argparse._ArgumentGroup) -> None:
    defaults = PredictionOptions()
    add = group.add_argument
    add(
        "--samples",
        type=int,
        metavar="N",
        help="Masks to draw for each case. The result is the mean of their probabilities; maps show where they differ.",
    )
    add(
        "--steps",
        type=int,
        metavar="K",
        help="Reverse steps of a mask. HiDiff: 0 gives the segmentor's own mask, 1 the best one, samples that differ "
        "need more; a refiner that made masks worse in training is used only if this is given.",
    )
    add("--seed", type=int, help="Seed of the noise: the same seed gives the same masks.")
    add(
        "--tta",
        choices=TTA,
        default=defaults.tta,
        help="Mirroring. full: a chain for each mirrored view, slow; interleaved: one chain whose steps see different "
        "views; none: faster, but less accurate.",
    )
    add("--disable_tta", action="store_true", help="The same as --tta none.")
    add("--sampler", choices=SAMPLERS, help="How a step is taken.")
    add(
        "--step_spacing",
        choices=SPACINGS,
        help="Where the steps lie. trailing: from T to T / K; linspace: from T to 0, as in the recycling paper.",
    )


def _add_machine_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="Where to compute.")
    add(
        "-step_size",
        type=float,
        default=0.5,
        metavar="X",
        help="Step of the sliding window, in parts of the patch: larger is faster, and less accurate.",
    )
    add("-npp", type=int, default=_processes("nnUNet_npp"), metavar="N", help="Processes for preprocessing; 0: none.")
    add("-nps", type=int, default=_processes("nnUNet_nps"), metavar="N", help="Processes for export; 0: none.")
    add(
        "-num_parts",
        type=int,
        default=1,
        metavar="N",
        help="How many calls share the cases, on several GPUs.",
    )
    add("-part_id", type=int, default=0, metavar="I", help="Which of these calls this is, from 0.")
    add("--not_on_device", action="store_true", help="Keep results of a GPU in main memory: slower, for large images.")
    add("--disable_progress_bar", action="store_true", help="Show no progress bar.")
    add("--verbose", action="store_true", help="Print what nnU-Net prints, and the traceback of a failure.")


def _processes(variable: str) -> int:
    """nnU-Net's default for -npp and -nps."""
    return int(os.environ.get(variable) or 3)


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
    except (RuntimeError, TypeError, ValueError) as error:  # nnU-Net: unknown data set, or no folder variable
        reason = str(error).split(". ")[0]  # the rest names folders and documentation
        if isinstance(error, ValueError):
            reason = "expected a number, or a name as Dataset001_NAME"
        raise InputError(f"-d {arguments.d}: {reason}; are nnUNet_raw and nnUNet_results set?") from error
