"""The folder that a study works in: data shared by all cells, and a folder for each training.

::

    WORKDIR/nnUNet_raw/DatasetXXX_Name/            links: the training part, and the test part as imagesTs, labelsTs
            nnUNet_preprocessed/DatasetXXX_Name/   nnU-Net's data and plans, and one plans file for each training
            runs/STUDY/CELL/run_0/                 nnUNet_results, predictions, analysis, logs, stages of one training
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

from laboratory.commands import CommandRunner
from laboratory.raw_data import check_cases, link_parts
from laboratory.study import StudyError
from laboratory.study.definition import Cell, Study
from nnunetv2_diffusion.files import read_json
from nnunetv2_diffusion.pages import write_whole
from nnunetv2_diffusion.planning.derive import PlansError, derive_plans, write_plans
from nnunetv2_diffusion.settings import ENVIRONMENT_PREFIX, HIDIFF, SettingsError, merge_settings


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


@dataclass
class Workplace:
    """Paths, environment and plans of a study in a folder (absolute); ``jobs`` trainings at once share the cores."""

    root: Path
    study: Study
    device: str
    runner: CommandRunner
    jobs: int = 1

    @property
    def raw(self) -> Path:
        """The raw data set."""
        return self.root / "nnUNet_raw" / self.study.dataset

    @property
    def preprocessed(self) -> Path:
        """The preprocessed data set."""
        return self.root / "nnUNet_preprocessed" / self.study.dataset

    @property
    def number(self) -> str:
        """Of the data set, as commands take it."""
        return self.study.dataset[len("Dataset") :][:3]

    def run_folder(self, cell: Cell, run: int) -> Path:
        """Folder of one training."""
        return self.root / "runs" / self.study.name / cell.name / f"run_{run}"

    def plans_name(self, cell: Cell, run: int) -> str:
        """Of one training's plans."""
        return f"{self.study.name}-{cell.name}-{run}"

    def model_folder(self, cell: Cell, run: int) -> Path:
        """Where nnU-Net keeps the trained model."""
        name = f"{cell.trainer}__{self.plans_name(cell, run)}__{self.study.configuration}"
        return self.run_folder(cell, run) / "nnUNet_results" / self.study.dataset / name

    def checkpoint(self, cell: Cell, run: int, fold: int = 0) -> Path:
        """Of a training that is finished; folds other than 0 are members of an ensemble."""
        return self.model_folder(cell, run) / f"fold_{fold}" / "checkpoint_final.pth"

    def workers(self, most: int, least: int = 1) -> int:
        """Processes that one command may start beside itself, ``least`` to ``most``."""
        return max(least, min(most, (os.cpu_count() or 1) // self.jobs - 1))

    def environment(self, results: Path | None = None) -> dict[str, str]:
        """This process's variables with nnU-Net's folders, and without settings of the sampling.

        On a CPU nnU-Net takes a thread for each core, whatever else runs there. Threads that wait actively then take
        the core from those that they wait for, and a step can cost ten times as much.
        """
        prefix = ENVIRONMENT_PREFIX.lower()
        inherited = {k: v for k, v in os.environ.items() if not k.lower().startswith(prefix)}
        workers = {"nnUNet_n_proc_DA": str(self.workers(12)), "nnUNet_def_n_proc": str(self.workers(8))}
        folders = {name: str(self.root / name) for name in ("nnUNet_raw", "nnUNet_preprocessed")}
        folders["nnUNet_results"] = str(results or self.root / "nnUNet_results")
        return {**workers, "OMP_WAIT_POLICY": "PASSIVE", **inherited, **folders}

    def find_raw(self, given: Path) -> Path:
        """The raw data set, given itself or by the folder that it is in.

        StudyError or RawDataError if it is another one, or cases of the split are missing.
        """
        source = given.resolve()
        if source.name != self.study.dataset:
            source = source / self.study.dataset
        if not source.is_dir():
            raise StudyError(f"--raw is {given}, expected {self.study.dataset} or the folder that it is in")
        check_cases(source, {*self.study.split.train, *self.study.split.test})
        return source

    def prepare(self, source: Path) -> None:
        """Link the cases of ``find_raw``, plan and preprocess, write fold 0; what is there already is kept.

        StudyError if the folder holds another split, CommandError if nnU-Net cannot preprocess.
        """
        with locked(self.root):
            self._link(source)
            done = self.root / f"prepared_{self.study.configuration}.json"
            if not done.exists():
                workers = str(self.workers(8))
                command = ["nnUNetv2_plan_and_preprocess", "-d", self.number, "-c", self.study.configuration]
                command += ["-np", workers, "-npfp", workers, "--verify_dataset_integrity"]
                log, _ = fresh_log(self.root / "logs", f"prepare_{self.study.configuration}")
                # planning takes it for a number of threads, and 0 (no workers in training) is none
                environment = self.environment() | {"nnUNet_n_proc_DA": workers}
                usage = self.runner.run(command, log, environment, self.root)
                write_whole(done, json.dumps({"seconds": usage.seconds}))
            write_whole(self.preprocessed / "splits_final.json", json.dumps(self.study.split.fold(), indent=2))

    def _link(self, source: Path) -> None:
        split, done = self.study.split, self.root / "split.json"
        record = {"split": split.digest(), "dataset": self.study.dataset}
        if done.exists():
            found = read_json(done, StudyError)
            if found != record:
                raise StudyError(
                    f"{self.root} holds another data set or split (split.json is {json.dumps(found)}, the study has "
                    f"{json.dumps(record)}); choose another --out"
                )
            return
        if self.raw.exists():
            rmtree(self.raw)  # links of a run that was interrupted while it made them
        link_parts(source, self.raw, {"Tr": sorted(split.train), "Ts": sorted(split.test)})
        write_whole(done, json.dumps(record))

    def write_plans(self, cell: Cell, run: int) -> None:
        """Derive one training's plans from nnU-Net's; StudyError if that cannot be done, or others are there."""
        stock = read_json(self.preprocessed / "nnUNetPlans.json", StudyError)
        settings = cell.settings
        if cell.segmentor is not None:
            settings = merge_settings(settings, {HIDIFF: {"segmentor": self.source_checkpoint(cell, run)}})
        try:
            plans = derive_plans(stock, self.plans_name(cell, run), {self.study.configuration: cell.network}, settings)
            write_plans(plans, self.preprocessed)
        except (PlansError, SettingsError) as error:
            raise StudyError(f"cell {cell.name}: {error}") from None

    def sources(self, cell: Cell, run: int) -> list[tuple[Cell, int]]:
        """Trainings whose checkpoints a run needs: an ensemble's members, or the source's same run, or one of fewer."""
        if cell.source is None:
            return []
        other = self.study.cell(cell.source)
        return [(other, n) for n in range(other.runs)] if cell.ensemble else [(other, run % other.runs)]

    def source_checkpoint(self, cell: Cell, run: int) -> str:
        """Its checkpoint as commands find it: they run in the root, so no path of this machine is in the plans."""
        ((other, number),) = self.sources(cell, run)
        return self.checkpoint(other, number).relative_to(self.root).as_posix()


@contextmanager
def locked(folder: Path) -> Iterator[Sequence[int]]:
    """Hold a folder for this process and for commands that inherit the descriptors; StudyError if another holds it."""
    with (folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudyError(
                f"{folder} is in use: by another run of the study, or by a command that outlived one"
            ) from None
        yield (stream.fileno(),)


def fresh_log(folder: Path, title: str) -> tuple[Path, int]:
    """A file that does not exist, ``title.txt`` or ``title_2.txt`` ..., and the number of the attempt."""
    file, attempt = folder / f"{title}.txt", 1
    while file.exists():
        attempt += 1
        file = folder / f"{title}_{attempt}.txt"
    return file, attempt
