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
from nnunetv2_diffusion.planning.schema import Settings, SettingsError, parse, setting
from nnunetv2_diffusion.planning.settings import (
    MOST_SAMPLES,
    SAMPLERS,
    SPACINGS,
    DiffusionSettings,
    merge_settings,
    parse_settings,
)

NAME = r"[A-Za-z0-9]+([-_][A-Za-z0-9]+)*"  # no "__", at which nnU-Net splits the names of folders
STUDY_KEYS = (
    "name", "summary", "dataset", "configuration", "split", "network", "settings", "device", "cells", "predictions",
    "analyse", "reference", "questions", "removed",
)  # fmt: skip
STUDY_REQUIRED = ("name", "dataset", "configuration", "split", "cells", "predictions")
CELL_KEYS = (
    "name", "trainer", "runs", "settings", "network", "predictions", "segmentor", "warm_start", "ensemble", "analyse"
)  # fmt: skip
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
    modes: str = setting("", "kinds of mirroring and blending that are compared, with spaces between")
    mask_use: bool = setting(False, "give the network true and wrong masks: does it copy or ignore them")
    step_spacing: str | None = setting(None, "of the steps; null: the model's", choices=(*SPACINGS, None))

    def asked(self) -> dict[str, Any]:
        """As in a request: what was added to this class later is left out unless it is used."""
        return {k: v for k, v in asdict(self).items() if v or k not in ("modes", "mask_use", "step_spacing")}


@dataclass(frozen=True)
class Split:
    """Names of cases.

    Attributes:
        train: of the training part, those of nnU-Net's validation included.
        val: part of ``train`` that is nnU-Net's validation in fold 0: it makes the pseudo Dice, and is not trained on.
        test: what is predicted and scored.
    """

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    def fold(self) -> list[dict[str, list[str]]]:
        """Content of nnU-Net's splits_final.json, with fold 0 only."""
        return [{"train": sorted(set(self.train) - set(self.val)), "val": sorted(self.val)}]

    def digest(self) -> str:
        """Of all names in their parts."""
        text = json.dumps([sorted(part) for part in (self.train, self.val, self.test)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def counts(self) -> dict[str, int]:
        """Cases that are trained on, that nnU-Net validates, and that are scored."""
        return {"train": len(self.train) - len(self.val), "val": len(self.val), "test": len(self.test)}


@dataclass(frozen=True)
class Cell:
    """One trainer with its settings.

    Attributes:
        name: of the cell.
        trainer: class for nnU-Net's ``-tr``.
        runs: trainings of it.
        settings: diffusion settings, those of the study included; not completed by defaults.
        network: changes of the planned network, as for ``derive_plans``, those of the study included.
        predictions: as asked for; what a trainer without a chain takes of them see ``predictions_of``.
        segmentor: cell whose checkpoint HiDiff starts from; None for none.
        warm_start: cell of nnU-Net's own trainer whose weights the training starts from; None for none.
        ensemble: cell whose runs are the folds of this one's model, for which nothing is trained; None for none.
        analyse: None for no analysis.
        analyse_one_pass: also for a trainer without a chain: the cell itself asks for its analysis.
    """

    name: str
    trainer: str
    runs: int
    settings: dict[str, Any]
    network: dict[str, Any]
    predictions: tuple[Prediction, ...]
    segmentor: str | None
    warm_start: str | None
    ensemble: str | None
    analyse: Analysis | None
    analyse_one_pass: bool = False

    def analysis_of(self, kind: str | None) -> Analysis | None:
        """What is analysed; kind as for ``predictions_of``. The study's own entry is for trainers with a chain."""
        return self.analyse if kind is not None or self.analyse_one_pass else None

    @property
    def source(self) -> str | None:
        """Cell that has to be trained before."""
        return self.segmentor or self.warm_start or self.ensemble


@dataclass(frozen=True)
class Study:
    """A study as its file describes it.

    Attributes:
        file: that it was read from.
        content: of the file.
        name: of the study.
        dataset: folder, DatasetXXX_Name.
        configuration: nnU-Net's, "3d_fullres" for example.
        split: of the cases.
        device: as nnU-Net's -device.
        cells: in the order of the file.
        removed: names of cells that can no longer be run, because what they tried was removed; results are kept.
    """

    file: Path
    content: dict[str, Any] = field(repr=False)
    name: str
    dataset: str
    configuration: str
    split: Split
    device: str
    cells: tuple[Cell, ...]
    removed: tuple[str, ...] = ()

    def cell(self, name: str) -> Cell:
        """By name.

        Raises:
            StudyError: if there is none.
        """
        for cell in self.cells:
            if cell.name == name:
                return cell
        raise StudyError(f"{self.file}: no cell {name!r}, expected one of {', '.join(c.name for c in self.cells)}")


def read_study(file: Path) -> Study:
    """Read and validate a study and its split.

    Raises:
        StudyError: naming the file and the key.
    """
    content = read_json(file)
    check_keys(content, STUDY_KEYS, STUDY_REQUIRED, str(file))
    name = _name(content["name"], f"{file}: name")
    _text(content["dataset"], r"Dataset\d{3}_\w+", f"{file}: dataset", "a folder's name, DatasetXXX_Name")
    _text(content["configuration"], r"\w+", f"{file}: configuration", "a configuration of nnU-Net, 3d_fullres for one")
    device = content.get("device", "cuda")
    if device not in ("cpu", "cuda", "mps"):
        raise StudyError(f"{file}: device is {device!r}, expected one of cpu, cuda, mps")
    if not isinstance(content["split"], str):
        raise StudyError(f"{file}: split is {content['split']!r}, expected the name of a file beside the study's")
    split = read_split(file.parent / content["split"])
    cells = _cells(content, file)
    removed = _removed(content.get("removed", []), cells, f"{file}: removed")
    study = Study(file, content, name, content["dataset"], content["configuration"], split, device, cells, removed)
    _check_references(study)
    return study


def read_split(file: Path) -> Split:
    """Read and validate a split.

    Raises:
        StudyError: naming the file and what is wrong.
    """
    content = read_json(file)
    check_keys(content, SPLIT_KEYS, SPLIT_KEYS, str(file))
    for part, cases in content.items():
        if not isinstance(cases, list) or not cases or not all(isinstance(case, str) for case in cases):
            raise StudyError(f"{file}: {part} is {cases!r}, expected a list of names of cases, one at least")
        if len(set(cases)) < len(cases):
            raise StudyError(
                f"{file}: {part} has cases twice: {', '.join(sorted({c for c in cases if cases.count(c) > 1}))}"
            )
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


def read_json(file: Path) -> dict[str, Any]:
    """Content of a JSON file that holds an object.

    Raises:
        StudyError: naming the file.
    """
    if not file.is_file():
        raise StudyError(f"{file}: no such file")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StudyError(f"{file}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise StudyError(f"{file}: holds a {type(content).__name__}, expected an object")
    return content


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
    """What is predicted: all that is asked for, or once for each kind of mirroring without a chain.

    Args:
        cell: whose predictions.
        kind: "gaussian", "hybrid" (HiDiff), or None for a trainer without a chain.

    Raises:
        StudyError: for a number of steps that the chain cannot have.
    """
    if kind is None:
        return tuple(dict.fromkeys(Prediction(mirroring=p.mirroring) for p in cell.predictions))
    settings = parse_settings(cell.settings, f"cell {cell.name}")
    low, high = (0, settings.hidiff.timesteps) if kind == "hybrid" else (1, settings.chain_length)
    for prediction in cell.predictions:
        if prediction.steps is None or not low <= prediction.steps <= high:
            raise StudyError(
                f"cell {cell.name}: steps of a prediction is {json.dumps(prediction.steps)}, expected {low} .. {high}"
            )
    return cell.predictions


def _cells(content: Mapping[str, Any], file: Path) -> tuple[Cell, ...]:
    common = {key: content.get(key, {}) for key in ("network", "settings")}
    for key, value in common.items():
        if not isinstance(value, dict):
            raise StudyError(f"{file}: {key} is {value!r}, expected an object")
    _parse(DiffusionSettings, common["settings"], f"{file}: settings")
    predictions = _predictions(content["predictions"], f"{file}: predictions")
    analysis = _analysis(content.get("analyse"), f"{file}: analyse")
    if not isinstance(content["cells"], list) or not content["cells"]:
        raise StudyError(f"{file}: cells is {content['cells']!r}, expected a list of cells, one at least")
    default = Cell("", "", 1, common["settings"], common["network"], predictions, None, None, None, analysis)
    cells = tuple(_cell(entry, default, f"{file}: cells[{i}]") for i, entry in enumerate(content["cells"]))
    cells = tuple(_like_members(cell, cells) for cell in cells)
    names = [cell.name.lower() for cell in cells]  # folders: some file systems take a and A for the same
    twice = [cell.name for cell in cells if names.count(cell.name.lower()) > 1]
    if twice:
        raise StudyError(f"{file}: more than one cell has the name {', '.join(dict.fromkeys(twice))}")
    return cells


def _removed(entries: Any, cells: Sequence[Cell], where: str) -> tuple[str, ...]:
    if not isinstance(entries, list):
        raise StudyError(f"{where} is {entries!r}, expected a list of names of cells")
    names = tuple(_name(entry, where) for entry in entries)
    both = sorted({cell.name for cell in cells} & set(names))
    if both:
        raise StudyError(f"{where} has {', '.join(both)}, which is one of the cells")
    return names


def _cell(entry: Any, default: Cell, where: str) -> Cell:
    """A cell, with what the study says for all."""
    if not isinstance(entry, dict):
        raise StudyError(f"{where} is {entry!r}, expected an object")
    check_keys(entry, CELL_KEYS, ("name", "trainer"), where)
    where = f"{where} ({entry['name']})"
    runs = entry.get("runs", 1)
    if isinstance(runs, bool) or not isinstance(runs, int) or runs < 1:
        raise StudyError(f"{where}: runs is {runs!r}, expected an integer of at least 1")
    settings, network = (entry.get(key, {}) for key in ("settings", "network"))
    if not isinstance(settings, dict) or not isinstance(network, dict):
        raise StudyError(f"{where}: settings and network are {settings!r} and {network!r}, expected objects")
    merged = merge_settings(default.settings, settings)
    _parse(DiffusionSettings, merged, f"{where}: settings")
    changes: dict[str, Any] = {}
    if "predictions" in entry:
        changes["predictions"] = _predictions(entry["predictions"], f"{where}: predictions")
    if "analyse" in entry:
        changes["analyse"] = _analysis(entry["analyse"], f"{where}: analyse")
        changes["analyse_one_pass"] = True
    return replace(
        default, name=_name(entry["name"], f"{where}: name"), trainer=_name(entry["trainer"], f"{where}: trainer"),
        runs=runs, settings=merged, network={**default.network, **network}, segmentor=entry.get("segmentor"),
        warm_start=entry.get("warm_start"), ensemble=entry.get("ensemble"), **changes,
    )  # fmt: skip


def _like_members(cell: Cell, cells: Sequence[Cell]) -> Cell:
    """An ensemble has the settings and the network of the cell that its members are runs of."""
    members = next((other for other in cells if other.name == cell.ensemble), cell)
    return replace(cell, settings=members.settings, network=members.network)


def _predictions(entries: Any, where: str) -> tuple[Prediction, ...]:
    if not isinstance(entries, list) or not entries:
        raise StudyError(f"{where} is {entries!r}, expected a list of objects, one at least")
    found = tuple(_parse(Prediction, entry, f"{where}[{index}]") for index, entry in enumerate(entries))
    names = [prediction.name for prediction in found]
    if len(set(names)) < len(names):
        raise StudyError(f"{where} has {', '.join(sorted({n for n in names if names.count(n) > 1}))} twice")
    return found


def _analysis(entry: Any, where: str) -> Analysis | None:
    return None if entry is None else _parse(Analysis, entry, where)


def _parse(cls: type[Settings], section: Any, where: str) -> Any:
    try:
        if cls is DiffusionSettings:
            return parse_settings(section, where)
        return parse(cls, section, where, "this section")
    except SettingsError as error:
        raise StudyError(str(error)) from None


def _check_references(study: Study) -> None:
    """Cells that are named must be there."""
    for cell in study.cells:
        if cell.source is None:
            continue
        keys = [key for key in ("segmentor", "warm_start", "ensemble") if getattr(cell, key)]
        key = keys[0]
        if len(keys) > 1:
            raise StudyError(f"{study.file}: cell {cell.name} has a {' and a '.join(keys)}, expected one of them")
        if study.cell(cell.source).source is not None:
            raise StudyError(f"{study.file}: cell {cell.name}: {key} {cell.source} starts from another cell itself")
        if cell.ensemble:
            _check_ensemble(study, cell)
    if "reference" in study.content:
        study.cell(study.content["reference"])
    questions = study.content.get("questions", [])
    if not isinstance(questions, list):
        raise StudyError(f"{study.file}: questions is {questions!r}, expected a list of objects")
    for index, question in enumerate(questions):
        where = f"{study.file}: questions[{index}]"
        if not isinstance(question, dict):
            raise StudyError(f"{where} is {question!r}, expected an object")
        check_keys(question, QUESTION_KEYS, QUESTION_KEYS, where)
        if not isinstance(question["cells"], list) or len(question["cells"]) < 2:
            raise StudyError(f"{where}: cells is {question['cells']!r}, expected two names of cells at least")
        for name in question["cells"]:
            if name not in study.removed:
                study.cell(name)


def _check_ensemble(study: Study, cell: Cell) -> None:
    """Its members are runs of the same trainer, and it is neither trained nor trained again."""
    where, members = f"{study.file}: cell {cell.name}", study.cell(cell.ensemble)
    (entry,) = (entry for entry in study.content["cells"] if entry["name"] == cell.name)
    own = [key for key in ("runs", "settings", "network") if key in entry]
    if own:
        raise StudyError(f"{where} has {own[0]}, but an ensemble has those of its members, {members.name}")
    if cell.trainer != members.trainer:
        raise StudyError(f"{where}: trainer is {cell.trainer}, expected that of its members, {members.trainer}")
    if members.runs < 2:
        raise StudyError(f"{where}: ensemble of {members.runs} run of {members.name}, expected runs of at least 2")


def _name(text: Any, where: str) -> str:
    return _text(text, NAME, where, "letters, digits, and single '-' or '_' between them")


def _text(text: Any, pattern: str, where: str, expected: str) -> str:
    if not isinstance(text, str) or not re.fullmatch(pattern, text):
        raise StudyError(f"{where} is {text!r}, expected {expected}")
    return text
