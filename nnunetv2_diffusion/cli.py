"""The command ``nnunetv2_diffusion <verb>``."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from nnunetv2_diffusion import __version__
from nnunetv2_diffusion.out_of_memory import is_memory_short, is_out_of_memory
from nnunetv2_diffusion.removed import removed_argument

# verb: (module, what it does). A module has add_arguments(parser) and run(arguments) -> exit status. It is imported
# only when its verb is called, so that --help and doctor work where torch or nnU-Net cannot be imported.
VERBS = {
    "doctor": ("nnunetv2_diffusion.doctor", "check this installation, and say what to type where something is wrong"),
    "plan": ("nnunetv2_diffusion.planning.plan", "derive plans from existing ones, by preset and settings"),
    "warm-start": (
        "nnunetv2_diffusion.planning.warm_start",
        "make weights for nnUNetv2_train -pretrained_weights from a checkpoint of nnU-Net's trainers or of one here",
    ),
    "predict": ("nnunetv2_diffusion.inference.predict", "predict as nnU-Net does, with samples and uncertainty"),
    "evaluate": ("nnunetv2_diffusion.evaluation.evaluate", "score predictions, with surface distances and calibration"),
    "compare": ("nnunetv2_diffusion.evaluation.compare", "compare predictions of the same cases, with paired tests"),
    "analyse": ("nnunetv2_diffusion.analysis.analyse", "study steps, samples and mirrors of a trained model"),
    "pack": ("nnunetv2_diffusion.packing", "store a binarised HiDiff checkpoint with 1-bit weights"),
    "unpack": ("nnunetv2_diffusion.packing", "make a checkpoint for nnU-Net's predictor from a packed one"),
}


LIBRARIES = ("monai", "torch", "torchvision")  # whose FutureWarnings say nothing that a user could act on


def hush_libraries() -> None:
    """Leave out the FutureWarnings of other packages; those of this one and of nnU-Net are shown."""
    for name in LIBRARIES:
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{name}\.")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Every default behind its option, and examples as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = "Default:" in (action.help or "")
        without = action.default is None or action.default is False or action.default in (argparse.SUPPRESS, [], ())
        if told or without:
            return action.help
        return f"{action.help} (default: %(default)s)"


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The parser of the whole command; of all verbs, only the given one gets its arguments (and its import)."""
    parser = argparse.ArgumentParser(
        prog="nnunetv2_diffusion", description="Diffusion-based segmentation with a stock nnU-Net v2."
    )
    parser.add_argument("--version", action="version", version=f"nnunetv2_diffusion {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (module_name, summary) in VERBS.items():
        description = summary[0].upper() + summary[1:] + "."
        verb_parser = verbs.add_parser(name, help=summary, description=description, formatter_class=HelpFormatter)
        if name == verb:
            module = import_module(module_name)
            module.add_arguments(verb_parser)
            verb_parser.set_defaults(run=module.run)
            examples = getattr(module, "EXAMPLES", "").strip().splitlines()
            verb_parser.epilog = "\n  ".join(["examples:", *examples]) if examples else None
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        arguments: those of the command line by default.

    Returns:
        Exit status: 0, 1 if the verb failed or cannot be imported, 2 for an option that was removed.
    """
    hush_libraries()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    verb = next((word for word in arguments if not word.startswith("-")), None)  # no option before it takes a value
    try:
        parser = build_parser(verb)
    except Exception as error:
        if is_out_of_memory(error) or is_memory_short():
            return _out_of_memory(verb)
        print(f"nnunetv2_diffusion {verb} cannot start: {type(error).__name__}: {error}", file=sys.stderr)
        print("Type: nnunetv2_diffusion doctor", file=sys.stderr)
        return 1
    gone = removed_argument(arguments) if verb in ("predict", "analyse") else None
    if gone:
        print(f"nnunetv2_diffusion {verb}: {gone}", file=sys.stderr)
        return 2
    parsed = parser.parse_args(arguments)
    try:
        return parsed.run(parsed)
    except (MemoryError, RuntimeError, OSError, ImportError) as error:
        if not is_out_of_memory(error) and not (isinstance(error, ImportError | OSError) and is_memory_short()):
            raise
        return _out_of_memory(verb)


def _out_of_memory(verb: str | None) -> int:
    text = "too little memory: the system, or a limit (ulimit -v), gives no more; no file was found to be damaged"
    print(f"nnunetv2_diffusion {verb}: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
