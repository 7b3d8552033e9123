"""Command line of studies; see scripts/study."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

VERBS = {
    "run": "train, predict and score every cell that is not finished",
    "report": "make the page of results from the JSONs",
    "split": "draw a fixed split of a data set's cases, once",
}
ABOUT = """\
A study is a JSON file (studies/): cells of trainer, settings and runs, ways to predict, and a fixed split of the
cases. Everything runs through nnU-Net's own commands, each cell in a results folder of its own.

nnU-Net seeds nothing: several runs of a cell are the same training again, and differ by chance. There is no seed to
set; "runs" is how often a cell is trained.

An interrupted study continues with the same command: trainings from nnU-Net's last checkpoint (one is kept at the best
epoch, and every 50), predictions from their start. Results that exist are never overwritten.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="scripts/study", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, summary in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if arguments[:1] == [name]:  # only its module is imported: torch takes seconds
            module = import_module(f"nnunetv2_diffusion.study.{name}")
            module.add_arguments(verb)
            verb.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)


if __name__ == "__main__":
    sys.exit(main())
