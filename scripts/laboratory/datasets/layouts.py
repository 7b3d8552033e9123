"""Cases in folders of files."""

import re
from collections.abc import Mapping
from pathlib import Path

from laboratory.datasets.sources import JUNK, Sources, listing


def matching(sources: Sources, folder: Path, pattern: str, unused: str | None = None) -> dict[str, Path]:
    """Files of a folder by the part of their name that the pattern's group matches, sorted by it.

    Args:
        sources: told of every other file.
        folder: not searched any deeper.
        pattern: regular expression for whole names, with one group.
        unused: regular expression for whole names of files that are expected but not needed.
    """
    found, unexpected = {}, []
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or file.name in JUNK:
            continue
        match = re.fullmatch(pattern, file.name)
        if match and file.is_file():
            found[match.group(1)] = file
        elif not (unused and re.fullmatch(unused, file.name)):
            unexpected.append(file.name)
    if unexpected:
        sources.problem(f"{folder}: unexpected {listing(unexpected)}")
    return found


def pairs(
    sources: Sources, images: Mapping[str, Path], labels: Mapping[str, Path], where: object, strict: bool = True
) -> dict[str, tuple[Path, Path]]:
    """Images and labels of the same key.

    Args:
        sources: told of those without a partner.
        images: by key.
        labels: by key.
        where: names the place in messages.
        strict: whether a missing partner is a problem; else it is only noted.
    """
    tell = sources.problem if strict else sources.notes.append
    for message, lonely in {
        "images without labels": [file.name for key, file in images.items() if key not in labels],
        "labels without images": [file.name for key, file in labels.items() if key not in images],
    }.items():
        if lonely:
            tell(f"{where}: {message}: {listing(lonely)}")
    return {key: (image, labels[key]) for key, image in images.items() if key in labels}
