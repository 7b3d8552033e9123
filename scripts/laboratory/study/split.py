"""Draw a fixed split of a data set's cases."""

import argparse
import json
import sys

import numpy as np

from laboratory.raw_data import RawDataError, read_raw
from laboratory.study import StudyError
from nnunetv2_diffusion.evaluation.tables import write_new


def run(arguments: argparse.Namespace) -> int:
    """Write a split; 1 with a message if it cannot be done."""
    try:
        _, cases = read_raw(arguments.raw.resolve())
        split = draw_split(cases, arguments.test, arguments.val, arguments.seed)
        write_new({arguments.o: json.dumps(split, indent=1) + "\n"})
    except (RawDataError, StudyError, OSError) as error:
        print(f"scripts/study split: {error}", file=sys.stderr)
        return 1
    print(arguments.o)
    return 0


def draw_split(cases: list[str], test: int, val: int, seed: int) -> dict[str, list[str]]:
    """Parts of a split, sorted; the same for the same names and seed.

    Raises:
        StudyError: if there are too few cases.
    """
    if test < 1 or val < 1 or test + val >= len(cases):
        raise StudyError(f"{test} test and {val} validation cases of {len(cases)}, expected one at least of each part")
    order = [sorted(cases)[i] for i in np.random.default_rng(seed).permutation(len(cases))]
    parts = {"train": order[test:], "val": order[test : test + val], "test": order[:test]}
    return {name: sorted(part) for name, part in parts.items()}
