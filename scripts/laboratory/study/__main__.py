"""Command line of studies; see scripts/study."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

ABOUT = """\
A study is a JSON file (studies/): cells of trainer, settings and runs, ways to predict, and a fixed split of the
cases. Everything runs through nnU-Net's own commands, each cell in a results folder of its own.

nnU-Net seeds nothing: several runs of a cell are the same training again, and differ by chance. There is no seed to
set; "runs" is how often a cell is trained.

An interrupted study continues with the same command: trainings from nnU-Net's last checkpoint (one is kept at the best
epoch, and every 50), predictions from their start. Results that exist are never overwritten.
"""


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``scripts/study run``."""
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY.json", help="The study: see docs/study.md and studies/template.json.")
    add("--raw", required=True, type=Path, metavar="DIR", help="The raw data set, or the folder that it is in.")
    add("--out", required=True, type=Path, metavar="WORKDIR", help="Folder for data, models and masks, to continue in.")
    add("--results", type=Path, metavar="DIR", help="Folder for the JSONs. Default: WORKDIR/results.")
    add("--cells", nargs="+", metavar="NAME", help="Run these cells. Default: all.")
    add("--jobs", type=int, default=1, metavar="N", help="Trainings at once, on one device. Default: 1.")
    add("-device", "--device", choices=("cpu", "cuda", "mps"), help="Another device than the study's.")


def report_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``scripts/study report``."""
    parser.add_argument("results", type=Path, metavar="RESULTS_DIR", help="Folder of the JSONs of scripts/study run.")
    parser.add_argument("-o", type=Path, metavar="FILE.md", help="The page. Default: report.md beside RESULTS_DIR.")


def split_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``scripts/study split``."""
    add = parser.add_argument
    add("raw", type=Path, metavar="DIR", help="raw data set, DatasetXXX_Name")
    add("-o", required=True, type=Path, metavar="FILE.json", help="new file, beside the study's")
    add("--test", required=True, type=int, metavar="N", help="cases that are scored")
    add("--val", type=int, default=8, metavar="N", help="of the others, nnU-Net's validation in fold 0 (%(default)s)")
    add("--seed", type=int, default=0, help="of the draw (%(default)s)")


VERBS = {
    "run": ("train, predict and score every cell that is not finished", run_arguments),
    "report": ("make the page of results from the JSONs", report_arguments),
    "split": ("draw a fixed split of a data set's cases, once", split_arguments),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/study", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True, dest="verb")
    for name, (summary, add_arguments) in VERBS.items():
        add_arguments(verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + "."))
    parsed = parser.parse_args(arguments)
    # only now, and only its module is imported: torch takes seconds
    return import_module(f"laboratory.study.{parsed.verb}").run(parsed)


if __name__ == "__main__":
    sys.exit(main())
