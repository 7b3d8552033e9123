"""What a study is: a JSON file with cells (trainer, settings, runs), predictions and a fixed split of the cases."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from laboratory.study import StudyError
from nnunetv2_diffusion.files import read_json
from nnunetv2_diffusion.settings import (
    MOST_SAMPLES,
    SAMPLERS,
    SPACINGS,
    Settings,
    SettingsError,
    merge_settings,
    parse,
    parse_settings,
    setting,
)

NAME = r"[A-Za-z0-9]+([-_][A-Za-z0-9]+)*"  # no "__", at which nnU-Net splits the names of folders
STUDY_KEYS = (
    "name", "summary", "dataset", "configuration", "split", "network", "settings", "device", "cells", "predictions",
    "analyse", "reference", "questions",
)  # fmt: skip
STUDY_REQUIRED = ("name", "dataset", "configuration", "split", "cells", "predictions")
SOURCES = ("segmentor", "warm_start", "ensemble")
CELL_KEYS = ("name", "trainer", "runs", "settings", "network", "predictions", *SOURCES, "analyse")
QUESTION_KEYS = ("title", "cells")
MOST_STEPS = 100_000  # as long as a schedule may be
SPLIT_KEYS = ("train", "val", "test")


@dataclass(frozen=True)
class Prediction(Settings):
    """One way to predict the test cases."""

    steps: int | None = setting(None, "K, reverse steps; null for a trainer without a chain", low=0, high=MOST_STEPS)
    sampler: str = setting("ddpm", "reverse step", choices=SAMPLERS)
    samples: int = setting(1, "masks that are drawn; their probabilities are averaged", low=1, high=MOST_SAMPLES)
    mirroring: bool = setting(False, "average over nnU-Net's mirrored views")

    @property
    def name(self) -> str:
        """Short and usable as a folder."""
        chain = "one_pass" if self.steps is None else f"K{self.steps}_{self.sampler}"
        return chain + (f"_N{self.samples}" if self.samples > 1 else "") + ("_mirrored" if self.mirroring else "")


@dataclass(frozen=True)
class Analysis(Settings):
    """Options of the verb ``analyse``: Dice by step, and how samples differ."""

    steps: int = setting(5, "K", low=1, high=MOST_STEPS)
    sampler: str = setting("ddpm", "reverse step", choices=SAMPLERS)
    samples: int = setting(3, "chains with other noise for each case", low=1, high=MOST_SAMPLES)
    cases: int | None = setting(None, "only the first so many test cases; null: all", low=1, high=1_000_000)
    modes: str = setting("", "kinds of mirroring that are compared, with spaces between")
    step_spacing: str | None = setting(None, "of the steps; null: the model's", choices=(*SPACINGS, None))

    def asked(self) -> dict[str, Any]:
        """As in a request: what was added to this class later is left out unless it is used."""
        return {k: v for k, v in asdict(self).items() if v or k not in ("modes", "step_spacing")}


@dataclass(frozen=True)
class Split:
    """Names of cases: ``train``, its part ``val`` that makes the pseudo Dice in fold 0, and ``test``."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    def fold(self) -> list[dict[str, list[str]]]:
        """Content of nnU-Net's splits_final.json, with fold 0 only."""
        return [{"train": sorted(set(self.train) - set(self.val)), "val": sorted(self.val)}]

    def digest(self) -> str:
        """Hash of the names of all cases, part by part."""
        text = json.dumps([sorted(part) for part in (self.train, self.val, self.test)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def counts(self) -> dict[str, int]:
        """Cases that are trained on, that nnU-Net validates, and that are scored."""
        return {"train": len(self.train) - len(self.val), "val": len(self.val), "test": len(self.test)}


@dataclass(frozen=True)
class Cell:
    """One trainer with its settings and network, those of the study included; keys as in docs/study.md.

    ``own_analysis`` tells whether the cell itself asks for its analysis, and not the study for all cells with a chain.
    """

    name: str
    trainer: str
    runs: int
    settings: dict[str, Any]
    network: dict[str, Any]
    predictions: tuple[Prediction, ...]
    analyse: Analysis | None
    segmentor: str | None = None
    warm_start: str | None = None
    ensemble: str | None = None
    own_analysis: bool = False

    def analysis_of(self, kind: str | None) -> Analysis | None:
        """What is analysed; kind as for ``predictions_of``."""
        return self.analyse if kind is not None or self.own_analysis else None

    @property
    def source(self) -> str | None:
        """Cell that has to be trained before."""
        return self.segmentor or self.warm_start or self.ensemble


@dataclass(frozen=True)
class Study:
    """A study: its file with the content, and what was read from that."""

    file: Path
    content: dict[str, Any] = field(repr=False)
    split: Split
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        """Name of the study."""
        return self.content["name"]

    @property
    def dataset(self) -> str:
        """Folder, DatasetXXX_Name."""
        return self.content["dataset"]

    @property
    def configuration(self) -> str:
        """nnU-Net's, "3d_fullres" for example."""
        return self.content["configuration"]

    def cell(self, name: str) -> Cell:
        """By name; StudyError if there is none."""
        for cell in self.cells:
            if cell.name == name:
                return cell
        raise StudyError(f"{self.file}: no cell {name!r}, expected one of {', '.join(c.name for c in self.cells)}")


def read_study(file: Path) -> Study:
    """Read and validate a study and its split; StudyError names the file and the key."""
    content = read_json(file, StudyError)
    check_keys(content, STUDY_KEYS, STUDY_REQUIRED, str(file))
    _name(content["name"], f"{file}: name")
    _text(content["dataset"], r"Dataset\d{3}_\w+", f"{file}: dataset", "a folder's name, DatasetXXX_Name")
    _text(content["configuration"], r"\w+", f"{file}: configuration", "a configuration of nnU-Net, 3d_fullres for one")
    if content.get("device", "cuda") not in ("cpu", "cuda", "mps"):
        raise StudyError(f"{file}: device is {content['device']!r}, expected one of cpu, cuda, mps")
    _text(content["split"], r"(?s).+", f"{file}: split", "the name of a file beside the study's")
    study = Study(file, content, read_split(file.parent / content["split"]), _cells(content, file))
    for cell in study.cells:
        _check_source(study, cell)
    if "reference" in content:
        study.cell(content["reference"])
    for index, question in enumerate(_typed(content.get("questions", []), list, f"{file}: questions")):
        where = f"{file}: questions[{index}]"
        check_keys(_typed(question, dict, where), QUESTION_KEYS, QUESTION_KEYS, where)
        if not isinstance(question["cells"], list) or len(question["cells"]) < 2:
            raise StudyError(f"{where}: cells is {question['cells']!r}, expected two names of cells at least")
        for name in question["cells"]:
            study.cell(name)
    return study


def read_split(file: Path) -> Split:
    """Read and validate a split; StudyError names the file and what is wrong."""
    content = read_json(file, StudyError)
    check_keys(content, SPLIT_KEYS, SPLIT_KEYS, str(file))
    for part, cases in content.items():
        if not isinstance(cases, list) or not cases or not all(isinstance(case, str) for case in cases):
            raise StudyError(f"{file}: {part} is {cases!r}, expected a list of names of cases, one at least")
        twice = sorted({c for c in cases if cases.count(c) > 1})
        if twice:
            raise StudyError(f"{file}: {part} has cases twice: {', '.join(twice)}")
    split = Split(**{part: tuple(content[part]) for part in SPLIT_KEYS})
    both = sorted(set(split.test) & {*split.train, *split.val})
    if both:
        raise StudyError(f"{file}: {len(both)} cases are in test and in train or val: {', '.join(both[:10])}")
    outside = sorted(set(split.val) - set(split.train))
    if outside:
        raise StudyError(f"{file}: val has {', '.join(outside[:10])}, expected cases of train only")
    if len(split.val) == len(split.train):
        raise StudyError(f"{file}: all cases of train are in val, expected some that are trained on")
    return split


def check_keys(content: Mapping[str, Any], known: Sequence[str], required: Iterable[str], where: str) -> None:
    """Raise StudyError for unknown and for missing keys, with the expected ones."""
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise StudyError(f"{where}: unknown key {key!r}; {hint}expected keys are {', '.join(known)}")
    missing = [key for key in required if key not in content]
    if missing:
        raise StudyError(f"{where}: no key {', '.join(map(repr, missing))}, expected {', '.join(known)}")


def predictions_of(cell: Cell, kind: str | None) -> tuple[Prediction, ...]:
    """What is predicted: all that is asked for, or once for each kind of mirroring without a chain (kind None).

    StudyError for a number of steps that the chain, "gaussian", "draws" or "hidiff", cannot have.
    """
    if kind is None:
        return tuple(dict.fromkeys(Prediction(mirroring=p.mirroring) for p in cell.predictions))
    settings = parse_settings(cell.settings, f"cell {cell.name}")
    low, high = (0, settings.hidiff.timesteps) if kind == "hidiff" else (1, settings.gaussian.chain_length)
    for prediction in cell.predictions:
        if prediction.steps is None or not low <= prediction.steps <= high:
            raise StudyError(
                f"cell {cell.name}: steps of a prediction is {json.dumps(prediction.steps)}, expected {low} .. {high}"
            )
    return cell.predictions


def _cells(content: Mapping[str, Any], file: Path) -> tuple[Cell, ...]:
    network, settings = (_typed(content.get(key, {}), dict, f"{file}: {key}") for key in ("network", "settings"))
    _parse(parse_settings, settings, f"{file}: settings")
    analysis = _analysis(content.get("analyse"), f"{file}: analyse")
    default = Cell("", "", 1, settings, network, _predictions(content["predictions"], f"{file}: predictions"), analysis)
    entries = _typed(content["cells"], list, f"{file}: cells")
    cells = {cell.name: cell for cell in (_cell(e, default, f"{file}: cells[{i}]") for i, e in enumerate(entries))}
    names = [entry["name"] for entry in entries]
    lower = [name.lower() for name in names]  # folders: some file systems take a and A for the same
    twice = [name for name in names if lower.count(name.lower()) > 1]
    if twice or not names:
        found = f"more than one cell has the name {', '.join(dict.fromkeys(twice))}" if twice else "cells is empty"
        raise StudyError(f"{file}: {found}")
    # an ensemble has the settings and the network of the cell that its members are runs of
    members = {name: cells.get(cell.ensemble, cell) for name, cell in cells.items()}
    return tuple(replace(c, settings=members[n].settings, network=members[n].network) for n, c in cells.items())


def _cell(entry: Any, default: Cell, where: str) -> Cell:
    """A cell, with what the study says for all."""
    check_keys(_typed(entry, dict, where), CELL_KEYS, ("name", "trainer"), where)
    where = f"{where} ({entry['name']})"
    runs = entry.get("runs", 1)
    if isinstance(runs, bool) or not isinstance(runs, int) or runs < 1:
        raise StudyError(f"{where}: runs is {runs!r}, expected an integer of at least 1")
    settings, network = (_typed(entry.get(key, {}), dict, f"{where}: {key}") for key in ("settings", "network"))
    merged = merge_settings(default.settings, settings)
    _parse(parse_settings, merged, f"{where}: settings")
    changes: dict[str, Any] = {key: entry.get(key) for key in SOURCES}
    if "predictions" in entry:
        changes["predictions"] = _predictions(entry["predictions"], f"{where}: predictions")
    if "analyse" in entry:
        changes |= {"analyse": _analysis(entry["analyse"], f"{where}: analyse"), "own_analysis": True}
    return replace(
        default, name=_name(entry["name"], f"{where}: name"), trainer=_name(entry["trainer"], f"{where}: trainer"),
        runs=runs, settings=merged, network={**default.network, **network}, **changes,
    )  # fmt: skip


def _predictions(entries: Any, where: str) -> tuple[Prediction, ...]:
    if not isinstance(entries, list) or not entries:
        raise StudyError(f"{where} is {entries!r}, expected a list of objects, one at least")
    found = tuple(_section(Prediction, entry, f"{where}[{index}]") for index, entry in enumerate(entries))
    names = [prediction.name for prediction in found]
    if len(set(names)) < len(names):
        raise StudyError(f"{where} has {', '.join(sorted({n for n in names if names.count(n) > 1}))} twice")
    return found


def _analysis(entry: Any, where: str) -> Analysis | None:
    return None if entry is None else _section(Analysis, entry, where)


def _section(cls: type[Settings], entry: Any, where: str) -> Any:
    return _parse(lambda section, place: parse(cls, section, place, "this section"), entry, where)


def _parse(reader: Any, section: Any, where: str) -> Any:
    try:
        return reader(section, where)
    except SettingsError as error:
        raise StudyError(str(error)) from None


def _check_source(study: Study, cell: Cell) -> None:
    """The cell that another one starts from must be there, and be trained from nothing itself."""
    keys, where = [key for key in SOURCES if getattr(cell, key)], f"{study.file}: cell {cell.name}"
    if not keys:
        return
    if len(keys) > 1:
        raise StudyError(f"{where} has a {' and a '.join(keys)}, expected one of them")
    source = study.cell(cell.source)
    if source.source is not None:
        raise StudyError(f"{where}: {keys[0]} {cell.source} starts from another cell itself")
    if not cell.ensemble:
        return
    (entry,) = (entry for entry in study.content["cells"] if entry["name"] == cell.name)
    own = [key for key in ("runs", "settings", "network") if key in entry]
    if own:
        raise StudyError(f"{where} has {own[0]}, but an ensemble has those of its members, {source.name}")
    if cell.trainer != source.trainer:
        raise StudyError(f"{where}: trainer is {cell.trainer}, expected that of its members, {source.trainer}")
    if source.runs < 2:
        raise StudyError(f"{where}: ensemble of {source.runs} run of {source.name}, expected runs of at least 2")


def _name(text: Any, where: str) -> str:
    return _text(text, NAME, where, "letters, digits, and single '-' or '_' between them")


def _text(text: Any, pattern: str, where: str, expected: str) -> str:
    if not isinstance(text, str) or not re.fullmatch(pattern, text):
        raise StudyError(f"{where} is {text!r}, expected {expected}")
    return text


def _typed(value: Any, kind: type, where: str) -> Any:
    """The value; StudyError unless it is a list, or an object (dict)."""
    if not isinstance(value, kind):
        raise StudyError(f"{where} is {value!r}, expected {'an object' if kind is dict else 'a list'}")
    return value
