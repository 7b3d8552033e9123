"""Results of studies, read from their JSONs alone."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from laboratory.study import StudyError
from laboratory.study.records import CELL, SCHEMA, STUDY, read_record
from nnunetv2_diffusion.files import read_json

MEAN = "mean"  # label of the mean over classes or regions


@dataclass(frozen=True)
class CellResults:
    """All runs of a cell, in order."""

    name: str
    records: list[dict[str, Any]]

    @property
    def request(self) -> dict[str, Any]:
        """What was asked for in the first run."""
        return self.records[0]["request"]

    @property
    def predictions(self) -> list[dict[str, Any]]:
        """Predictions of the first run."""
        return self.records[0]["predictions"]

    def prediction(self, run: int, name: str) -> dict[str, Any]:
        """One run's prediction; StudyError if it has none of this name."""
        for prediction in self.records[run]["predictions"]:
            if prediction["name"] == name:
                return prediction
        raise StudyError(f"cell {self.name}: run {run} has no prediction {name}, the first one has")

    def values(self, name: str, metric: str, label: str = MEAN) -> np.ndarray:
        """Scores of a prediction: (runs, cases), cases in the order of their names, NaN where undefined.

        ``label`` is the key of a class or region, or "mean": per case, over those that have a value.
        """
        rows = []
        for run in range(len(self.records)):
            scores = self.prediction(run, name)["scores"]
            rows.append([_score(scores[case], metric, label) for case in sorted(scores)])
        return np.array(rows, np.float64)

    def by_case(self, name: str, metric: str, label: str = MEAN) -> np.ndarray:
        """Mean over runs, (cases,)."""
        return nanmean(self.values(name, metric, label), 0)

    def analysis(self, table: str) -> pd.DataFrame:
        """One table of the analysis, of all runs (column ``run``) that have it; of classes and regions their mean.

        Numbers that are not known are NaN; the frame is empty if no run has the table.
        """
        found = [(record["analysis"] or {}).get(table) for record in self.records]
        frames = [pd.DataFrame(columns).assign(run=run) for run, columns in enumerate(found) if columns]
        frame = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
        if "label" in frame:
            frame = frame[frame["label"] == MEAN]
        words = ("case", "label", "mode")
        return frame.apply(lambda column: column if column.name in words else pd.to_numeric(column))


@dataclass(frozen=True)
class StudyResults:
    """The content of a study.json, and the cells that have results, in the order of the study."""

    content: dict[str, Any]
    cells: list[CellResults]

    @property
    def name(self) -> str:
        """Name of the study."""
        return self.content["name"]

    @property
    def records(self) -> list[dict[str, Any]]:
        """Records of all trainings."""
        return [record for cell in self.cells for record in cell.records]

    @property
    def reference(self) -> CellResults | None:
        """The cell that others are tested against: the study's, or its first one; None if it has no results."""
        return self.cell(self.content.get("reference", self.content["cells"][0]))

    @property
    def labels(self) -> dict[str, str]:
        """Key of a class or region -> its name."""
        return self.records[0]["labels"]

    def cell(self, name: str) -> CellResults | None:
        """By name; None if it has no results."""
        return next((cell for cell in self.cells if cell.name == name), None)


def load_results(folder: Path) -> list[StudyResults]:
    """All studies below a folder, by name.

    StudyError if there are none, a file is not of a study, or results do not belong together.
    """
    if not folder.is_dir():
        raise StudyError(f"{folder}: no such folder, expected results of scripts/study run")
    studies: dict[str, dict[str, Any]] = {}
    records: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.rglob("*.json")):
        content = read_json(file, StudyError)
        if content.get("kind") == STUDY and content.get("schema") == SCHEMA:
            studies[content["name"]] = content
        else:
            record = read_record(file)
            records.setdefault(record["request"]["study"], []).append(record)
    if not records:
        raise StudyError(f"{folder}: no results of scripts/study run in it (kind {CELL!r})")
    missing = sorted(set(records) - set(studies))
    if missing:
        raise StudyError(f"{folder}: results of study {missing[0]} without its study.json")
    return [_study(studies[name], records[name]) for name in sorted(records)]


def matching(reference: CellResults, prediction: dict[str, Any]) -> str | None:
    """The reference's prediction to compare with: of the same name, else the one that mirrors as it does."""
    alike = [other["name"] for other in reference.predictions if other["mirroring"] == prediction["mirroring"]]
    return prediction["name"] if prediction["name"] in alike else next(iter(alike), None)


def nanmean(values: Sequence | np.ndarray, axis: int | None = None) -> Any:
    """numpy's, silent about nothing but NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(np.asarray(values, np.float64), axis)


def _study(content: dict[str, Any], records: list[dict[str, Any]]) -> StudyResults:
    """Cells in the order of the study, whose results are of the same data and cases."""
    name = content["name"]
    unknown = sorted({record["request"]["cell"] for record in records} - set(content["cells"]))
    if unknown:
        raise StudyError(f"study {name}: results of cells that it does not have: {', '.join(unknown)}")
    for key in ("dataset", "configuration", "split"):
        found = sorted({record["request"][key] for record in records})
        if len(found) > 1:
            raise StudyError(f"study {name}: results have more than one {key}: {', '.join(found)}")
    if len({tuple(sorted(p["scores"])) for record in records for p in record["predictions"]}) > 1:
        raise StudyError(f"study {name}: not all predictions have the same cases")
    ordered = sorted(records, key=lambda record: record["request"]["run"])
    cells = [CellResults(cell, [r for r in ordered if r["request"]["cell"] == cell]) for cell in content["cells"]]
    return StudyResults(content, [cell for cell in cells if cell.records])


def _score(classes: dict[str, dict[str, float | None]], metric: str, label: str) -> float:
    """One value; the mean leaves undefined classes out."""
    chosen = classes.values() if label == MEAN else [classes[label]]
    known = [values[metric] for values in chosen if values[metric] is not None]
    return float(np.mean(known)) if known else np.nan
