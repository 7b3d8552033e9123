"""What a data set is converted from: folders, zip and tar archives, single files."""

import fnmatch
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NoReturn

JUNK = {"__MACOSX", "Thumbs.db", "desktop.ini"}
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, RuntimeError)  # the last: encrypted


class LayoutError(ValueError):
    """Files are missing, unexpected or of an unexpected kind."""


def listing(names: Iterable[object], shown: int = 8) -> str:
    """Names for a message, the first ones if there are many."""
    names = [str(name) for name in names]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


class Sources:
    """Folders to convert from, or text files; archives (.zip, .tar, .tar.gz) are unpacked first.

    They go to ``scratch``, on the file system of the output, so that files can be moved there: members that ``wanted``
    finds (a regular expression), and those of archives that ``inner`` finds. With ``incomplete``, what is missing or
    unexpected is noted and no error. LayoutError names a path that is missing, of another kind, or damaged.
    """

    def __init__(
        self, paths: Sequence[Path], scratch: Path, wanted: str = "", inner: str | None = None, incomplete: bool = False
    ):
        self.notes: list[str] = []
        self._incomplete = incomplete
        self._scratch = scratch
        self._inner = inner
        self._wanted = wanted
        self._roots = [self._open(Path(path)) for path in paths]

    def problem(self, message: str) -> None:
        """Raise LayoutError, or note the message if the sources may be incomplete."""
        if not self._incomplete:
            raise LayoutError(message)
        self.notes.append(message)

    def nothing(self, expected: str) -> NoReturn:
        """Raise LayoutError: what is expected is nowhere in the sources."""
        raise LayoutError(f"{listing(self._roots)}: found no {expected}")

    def walk(self) -> Iterator[tuple[Path, set[str], set[str]]]:
        """Every folder with the names of its subfolders and of its files, in sorted order, without hidden ones."""
        for root in self._roots:
            for folder, subfolders, files in os.walk(root):
                subfolders[:] = sorted(name for name in subfolders if not _is_junk(name))
                yield Path(folder), set(subfolders), {name for name in files if not _is_junk(name)}

    def find_folder(self, *needed: str, prefer: str | None = None, named: str | None = None) -> Path:
        """The one folder, of this name if one is given, that has entries which fit each of some patterns.

        ``prefer`` is the name of the one to take if several fit. LayoutError if there is none, or more than one.
        """
        found = [
            folder
            for folder, subfolders, files in self.walk()
            if named in (None, folder.name) and all(fnmatch.filter(subfolders | files, name) for name in needed)
        ]
        found = [folder for folder in found if folder.name == prefer] or found
        expected = f"folder {f'{named} ' if named else ''}with {' and '.join(needed)}"
        if not found:
            self.nothing(expected)
        if len(found) > 1:
            raise LayoutError(f"found more than one {expected}, give one of them: {listing(found)}")
        return found[0]

    def find_file(self, name: str) -> Path:
        """The one file of this name; LayoutError if there is none, or more than one."""
        found = [root for root in self._roots if root.is_file() and root.name == name]
        found += [folder / name for folder, _, files in self.walk() if name in files]
        if len(found) != 1:
            raise LayoutError(f"{listing(self._roots)}: found {listing(found) or 'no ' + name}, expected one {name}")
        return found[0]

    def matching(self, folder: Path, pattern: str, unused: str = "") -> dict[str, Path]:
        """Files of a folder by the part of their name that the pattern's one group matches, sorted by it.

        Patterns are for whole names; ``unused`` is that of files that are not needed, others are a problem.
        """
        found, unexpected = {}, []
        for file in sorted(folder.iterdir()):
            if _is_junk(file.name):
                continue
            match = re.fullmatch(pattern, file.name)
            if match and file.is_file():
                found[match.group(1)] = file
            elif not re.fullmatch(unused, file.name):
                unexpected.append(file.name)
        if unexpected:
            self.problem(f"{folder}: unexpected {listing(unexpected)}")
        return found

    def pairs(
        self, images: Mapping[str, Path], labels: Mapping[str, Path], where: Path, strict: bool = True
    ) -> dict[str, tuple[Path, Path]]:
        """Images and labels of the same key; a missing partner is a problem if strict, else it is noted."""
        tell = self.problem if strict else self.notes.append
        for message, lonely in {
            "images without labels": [file.name for key, file in images.items() if key not in labels],
            "labels without images": [file.name for key, file in labels.items() if key not in images],
        }.items():
            if lonely:
                tell(f"{where}: {message}: {listing(lonely)}")
        return {key: (image, labels[key]) for key, image in images.items() if key in labels}

    def take(self, source: Path, target: Path) -> None:
        """Move an unpacked file, or copy one of the user's."""
        if self._scratch in source.parents:
            source.rename(target)
        else:
            shutil.copyfile(source, target)

    def _open(self, path: Path) -> Path:
        """The folder with a source's files, or the file if it is none that holds others."""
        if path.is_dir():
            return path
        if not path.is_file():
            raise LayoutError(f"{path}: no such file or folder")
        if zipfile.is_zipfile(path) or tarfile.is_tarfile(path):
            folder = self._scratch / path.name
            while folder.exists():
                folder = folder.with_name(folder.name + "_")
            self._unpack(path, folder)
            return folder
        if path.suffix == ".txt":
            return path
        raise LayoutError(f"{path}: expected a folder, a .zip or a .tar; unpack others and give the folder")

    def _unpack(self, archive: Path, folder: Path) -> None:
        """Write the wanted files of an archive, and of archives in it, into a new folder."""
        print(f"unpack {archive.name} ...", flush=True)
        try:
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as content:
                    content.extractall(folder, self._wanted_of(archive, content.namelist()))
            else:
                with tarfile.open(archive) as content:
                    content.extraction_filter = getattr(tarfile, "data_filter", None)  # of newer Pythons
                    files = {member.name: member for member in content if member.isreg()}  # neither links nor devices
                    content.extractall(folder, [files[name] for name in self._wanted_of(archive, files)])
        except DAMAGED as error:
            raise LayoutError(f"{archive} is damaged, or encrypted: {error}") from error
        for file in [f for f in folder.rglob("*") if self._inner and re.search(self._inner, f.name)]:
            self._unpack(file, file.with_name(file.name + ".unpacked"))
            file.unlink()

    def _wanted_of(self, archive: Path, names: Iterable[str]) -> list[str]:
        """Names that are needed; LayoutError for one that leaves the folder that it is unpacked into."""
        wanted = [name for name in names if not name.endswith("/") and self._is_wanted(name)]
        for name in wanted:
            path = PureWindowsPath(name)
            if path.drive or path.root or ".." in path.parts:
                raise LayoutError(
                    f"{archive}: found the member {name!r}, expected names that stay in the archive's folder"
                )
        return wanted

    def _is_wanted(self, name: str) -> bool:
        if any(_is_junk(part) for part in PurePosixPath(name).parts if part not in (".", "..")):
            return False
        return bool(re.search(self._wanted, name)) or bool(self._inner and re.search(self._inner, name))


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name in JUNK
