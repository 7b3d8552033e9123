"""Parts of a data set to train, to validate and to test on."""

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from laboratory.datasets.raw import Case, Collection
from laboratory.datasets.sources import LayoutError, listing

PARTS = ("train", "val", "test")


def cut(cases: Sequence[Case], counts: tuple[int, int, int]) -> dict[str, Sequence[Case]]:
    """Cases in their order: the first ones to train, the last ones to test on.

    Args:
        cases: all cases.
        counts: of the parts; in proportion if there are more or fewer cases.
    """
    total = sum(counts)
    if len(cases) != total:
        val, test = (max(bool(count), round(len(cases) * count / total)) for count in counts[1:])
        counts = (max(0, len(cases) - val - test), val, test)
    ends = list(accumulate(counts))
    return {"train": cases[: ends[0]], "val": cases[ends[0] : ends[1]], "test": cases[ends[1] :]}


def draw(cases: Sequence[Case], counts: tuple[int, int, int], seed: int) -> dict[str, Sequence[Case]]:
    """Cases drawn at random into parts, each in the order of the cases.

    Args:
        cases: all cases; their order matters.
        counts: as in ``cut``.
        seed: the same seed draws the same parts.
    """
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(cases)).tolist()
    return {part: [cases[i] for i in sorted(indices)] for part, indices in cut(order, counts).items()}


def split_as_listed(collection: Collection, file: Path) -> Collection:
    """The same cases in the parts that a file lists.

    Args:
        collection: all cases.
        file: JSON, lists of names of cases by "train", "test" and possibly "val".

    Raises:
        LayoutError: if the file is of another form, or names not every case once.
    """
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LayoutError(f"{file} cannot be read: {error}") from error
    if not isinstance(listed, Mapping) or not {"train", "test"} <= set(listed) <= set(PARTS):
        raise LayoutError(f"{file}: expected lists of cases by 'train', 'test' and possibly 'val'")
    cases = {case.name: case for part in PARTS for case in getattr(collection, part)}
    names = [str(name) for part in listed.values() for name in part]
    for what, wrong in {
        "lists cases that are not there": sorted(set(names) - set(cases)),
        "does not list": sorted(set(cases) - set(names)),
        "lists more than once": sorted({name for name in names if names.count(name) > 1}),
    }.items():
        if wrong:
            raise LayoutError(f"{file} {what}: {listing(wrong)}")
    parts = {part: [cases[str(name)] for name in listed.get(part, [])] for part in PARTS}
    return Collection(**parts, split=f"as listed in {file.name}")
