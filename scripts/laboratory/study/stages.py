"""One training of a cell and what follows it: stages that are done once, and not again."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import copy, rmtree
from typing import Any

from laboratory.study import StudyError
from laboratory.study.definition import Analysis, Cell, Prediction
from laboratory.study.workplace import Workplace, fresh_log, locked, say
from nnunetv2_diffusion.files import read_json
from nnunetv2_diffusion.pages import write_whole
from nnunetv2_diffusion.settings import ENVIRONMENT_PREFIX


@dataclass
class Training:
    """One run of a cell, counted from 0, with what is predicted and analysed.

    Without a chain there is one step and one sample.
    """

    place: Workplace
    cell: Cell
    run: int
    predictions: tuple[Prediction, ...]
    analysis: Analysis | None
    has_chain: bool

    @property
    def title(self) -> str:
        """Cell and number of the run, as messages name it."""
        return f"{self.cell.name} run {self.run}"

    @property
    def folder(self) -> Path:
        """The folder that everything of this run is written to."""
        return self.place.run_folder(self.cell, self.run)

    @property
    def _model(self) -> list[str]:
        plans = self.place.plans_name(self.cell, self.run)
        return ["-tr", self.cell.trainer, "-p", plans, "-device", self.place.device]

    @property
    def _folds(self) -> list[str]:
        """Of the model: an ensemble has one for each member."""
        return [str(n) for n in range(len(self.place.sources(self.cell, self.run)))] if self.cell.ensemble else ["0"]

    def work(self, trained: Callable[[], None]) -> None:
        """All stages, but for those that are finished; ``trained`` is called when the model is there.

        CommandError or StudyError if one fails; the others are kept.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder) as descriptors:
            self._descriptors = descriptors
            self.place.write_plans(self.cell, self.run)
            self.train()
            trained()
            for prediction in self.predictions:
                self.predict(prediction)
            if self.analysis is not None:
                self.analyse(self.analysis)

    @property
    def started(self) -> bool:
        """Whether there is a checkpoint, of the end or to continue from."""
        return any((self.place.model_folder(self.cell, self.run) / "fold_0").glob("checkpoint_*.pth"))

    def train(self) -> None:
        """Fold 0 with nnU-Net's command, from its last checkpoint if it was interrupted; members are put together.

        nnU-Net's closing validation takes one step: the unseen cases are what counts.
        """
        if self.cell.ensemble is not None:
            self._assemble()
            return
        # without a checkpoint nnU-Net would continue from nothing, and without the weights of a warm start
        command = ["nnUNetv2_train", self.place.number, self.place.study.configuration, "0", *self._model]
        if self.started:
            command.append("--c")
        elif self.cell.warm_start is not None:
            command += ["-pretrained_weights", str(self._warm_start())]
        self._stage("train", command, steps="1")

    def _assemble(self) -> None:
        """A model whose folds are the runs of another cell; costs are theirs together."""
        if self._record("train").exists():
            return
        sources = self.place.sources(self.cell, self.run)
        target = self.place.model_folder(self.cell, self.run)
        rmtree(target, ignore_errors=True)  # of an attempt that was interrupted
        for fold, (cell, number) in enumerate(sources):
            file = self.place.checkpoint(self.cell, self.run, fold)
            file.parent.mkdir(parents=True)
            copy(self.place.checkpoint(cell, number), file)
        for name in ("plans.json", "dataset.json"):
            copy(self.place.model_folder(*sources[0]) / name, target / name)
        usages = [read_json(self.place.run_folder(*s) / "stages" / "train.json", StudyError) for s in sources]
        record = {key: sum(usage[key] for usage in usages) for key in ("seconds", "attempts")}
        peaks = [usage["peak_memory_bytes"] for usage in usages if usage["peak_memory_bytes"] is not None]
        self._keep("train", {**record, "peak_memory_bytes": max(peaks, default=None)})

    def _warm_start(self) -> Path:
        """The weights to start from, made with the verb ``warm-start``."""
        file = self.folder / "warm_start.pth"
        if not self._record("warm_start").exists():
            file.unlink(missing_ok=True)  # of an attempt that was interrupted
        command = [
            "nnunetv2_diffusion", "warm-start", "--from", self.place.source_checkpoint(self.cell, self.run),
            "-d", self.place.number, "-c", self.place.study.configuration, "-tr", self.cell.trainer,
            "-p", self.place.plans_name(self.cell, self.run), "-o", str(file),
        ]  # fmt: skip
        self._stage("warm_start", command)
        return file

    def predict(self, prediction: Prediction) -> None:
        """The test cases with nnU-Net's command, and Dice, distances and volumes with the verb ``evaluate``.

        An interrupted prediction starts again, so that its time is right.
        """
        target = self.folder / "predictions" / prediction.name
        workers = str(self.place.workers(3, least=0))  # without a core for them, cases come one after the other
        command = [
            "nnUNetv2_predict", "-d", self.place.number, "-c", self.place.study.configuration, "-f", *self._folds,
            *self._model, "-i", str(self.place.raw / "imagesTs"), "-npp", workers, "-nps", workers,
            "--disable_progress_bar", *([] if prediction.mirroring else ["--disable_tta"]),
        ]  # fmt: skip
        asked = () if prediction.steps is None else ("steps", "sampler", "samples")
        variables = {key: str(getattr(prediction, key)) for key in asked}
        self._folder_stage(f"predict_{prediction.name}", command, target, **variables)
        command = ["nnunetv2_diffusion", "evaluate", str(self.place.raw / "labelsTs"), str(target)]
        command += ["-np", str(self.place.workers(8)), "--overwrite", "--disable_progress_bar"]
        self._stage(f"evaluate_{prediction.name}", command)

    def analyse(self, own: Analysis) -> None:
        """Steps and samples with the verb ``analyse``."""
        command = [
            "nnunetv2_diffusion", "analyse", "-m", str(self.place.model_folder(self.cell, self.run)), "-f",
            *self._folds, "-device", self.place.device, "-i", str(self.place.raw / "imagesTs"),
            "-l", str(self.place.raw / "labelsTs"), "--tta", "none", "--disable_progress_bar",
        ]  # fmt: skip
        options: dict[str, Any] = {"cases": own.cases, "modes": own.modes.split(), "samples": 1}
        if self.has_chain:
            options |= {key: getattr(own, key) for key in ("steps", "sampler", "step_spacing", "samples")}
        for key, value in options.items():
            if value:
                command += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        self._folder_stage("analyse", command, self.folder / "analysis")

    def usage(self, stage: str) -> dict[str, Any]:
        """Seconds, peak memory and attempts of a finished stage."""
        return read_json(self._record(stage), StudyError)

    def _record(self, stage: str) -> Path:
        return self.folder / "stages" / f"{stage}.json"

    def _keep(self, stage: str, record: dict[str, Any]) -> None:
        """Cost of a stage; from now on it is finished."""
        write_whole(self._record(stage), json.dumps(record, indent=1))

    def _folder_stage(self, stage: str, command: list[str], target: Path, **variables: str) -> None:
        """A stage that writes a folder, which is there whole or not at all."""
        if self._record(stage).exists() and target.exists():
            return
        part = target.with_name(f".{target.name}.part")
        for left in (part, target):
            rmtree(left, ignore_errors=True)  # of an attempt that was interrupted
        self._record(stage).unlink(missing_ok=True)
        part.parent.mkdir(exist_ok=True)
        self._stage(stage, [*command, "-o", str(part)], **variables)
        os.replace(part, target)

    def _stage(self, stage: str, command: list[str], **variables: str) -> None:
        """Run a command unless it was finished before; ``variables`` set the sampling."""
        if self._record(stage).exists():
            return
        log, attempt = fresh_log(self.folder / "logs", stage)
        environment = self.place.environment(self.folder / "nnUNet_results")
        environment |= {ENVIRONMENT_PREFIX + key: value for key, value in variables.items()}
        say(f"{self.title}: {stage} ... (log: {log})")
        usage = self.place.runner.run(command, log, environment, self.place.root, self._descriptors)
        self._keep(stage, {**asdict(usage), "attempts": attempt})
        say(f"{self.title}: {stage} took {usage.seconds:.0f} s")
