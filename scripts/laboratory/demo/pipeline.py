"""Plan, train, predict and score with stock nnU-Net commands."""

import argparse
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_file_ending

from laboratory.commands import CommandError, CommandRunner
from laboratory.demo.options import PRESET
from nnunetv2_diffusion.inference.export import UNCERTAINTY
from nnunetv2_diffusion.inference.loading import load_predictor
from nnunetv2_diffusion.inference.options import OptionError, PredictionOptions
from nnunetv2_diffusion.inference.sample_statistics import foreground_labels, mask_volumes
from nnunetv2_diffusion.planning.derive import derive_plans, write_plans
from nnunetv2_diffusion.planning.presets import load_preset
from nnunetv2_diffusion.settings import HIDIFF, merge_settings

PLANS = "demoPlans"
VALIDATED = 4  # cases of nnU-Net's validation: the unseen cases are what is scored


@dataclass
class Job:
    """One data set and one length of training, in a folder ``out`` of everything that is written.

    ``options`` are the demo's, ``settings`` those of ``--set``; ``seconds`` is filled with the time of every command.
    """

    out: Path
    dataset: str
    options: argparse.Namespace
    settings: dict = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def raw(self) -> Path:
        """The raw data set."""
        return self.out / "nnUNet_raw" / self.dataset

    @property
    def preprocessed(self) -> Path:
        """The preprocessed data set."""
        return self.out / "nnUNet_preprocessed" / self.dataset

    @property
    def number(self) -> str:
        """Of the data set, as commands take it."""
        return self.dataset[len("Dataset") :][:3]

    @property
    def ending(self) -> str:
        """Ending of the files of images and labels."""
        return json.loads((self.raw / "dataset.json").read_text())["file_ending"]

    def model_folder(self, trainer: str) -> Path:
        """Where nnU-Net keeps a trained model."""
        return self.out / "nnUNet_results" / self.dataset / f"{trainer}__{PLANS}__{self.options.configuration}"

    def run(self, title: str, *command: str, **variables: str) -> None:
        """Run a stock command, with variables set; its output goes to ``<out>/logs/<title>.txt``.

        Raises:
            SystemExit: with the end of the output, if it fails.
        """
        print("$", *[f"{k}={v}" for k, v in variables.items()], *command, flush=True)
        folders = {v: str(self.out / v) for v in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        workers = {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "2"}  # the demo is for small machines
        environment = {**workers, **os.environ, **folders, **variables}
        try:
            usage = CommandRunner().run(command, self.out / "logs" / f"{title}.txt", environment)
        except CommandError as error:
            raise SystemExit(str(error)) from error
        self.seconds[title] = usage.seconds
        print(f"  {usage.seconds:.0f} s", flush=True)

    def predict(
        self, title: str, *program: str, trainer: str, target: Path, more: tuple = (), **variables: str
    ) -> None:
        """Predict the unseen cases with a command of nnU-Net's options."""
        self.run(
            title, *program, "-d", self.number, "-c", self.options.configuration, "-f", "0", "-tr", trainer,
            "-p", PLANS, "-device", self.options.device, "-i", str(self.raw / "imagesTs"), "-o", str(target),
            "-npp", "1", "-nps", "1", *more, **variables,
        )  # fmt: skip


def plan(job: Job) -> None:
    """Plan and preprocess, then derive plans with a small network and a short training from nnU-Net's."""
    job.run(
        "plan", "nnUNetv2_plan_and_preprocess", "-d", job.number, "-c", job.options.configuration,
        "-np", "2", "-npfp", "2", "--verify_dataset_integrity",
    )  # fmt: skip
    stock = json.loads((job.preprocessed / "nnUNetPlans.json").read_text())
    network = {"base_features": job.options.base_features, "batch_size": job.options.batch_size}
    if job.options.patch_size is not None:
        network["patch_size"] = job.options.patch_size
    settings = {
        "recipe": job.options.recipe,
        "num_epochs": job.options.epochs,
        "num_iterations_per_epoch": job.options.iterations,
        "num_val_iterations_per_epoch": max(5, job.options.iterations // 10),
        HIDIFF: load_preset(PRESET).diffusion["all"][HIDIFF],
    }
    settings = merge_settings(settings, job.settings)
    write_plans(derive_plans(stock, PLANS, {job.options.configuration: network}, settings), job.preprocessed)
    cases = sorted(p.name.removesuffix(job.ending) for p in (job.raw / "labelsTr").glob(f"*{job.ending}"))
    validation = cases[:: max(1, len(cases) // VALIDATED)][:VALIDATED]
    split = [{"train": [c for c in cases if c not in validation], "val": validation}]
    (job.preprocessed / "splits_final.json").write_text(json.dumps(split, indent=2))


def train(job: Job, trainer: str) -> None:
    """Train fold 0 with nnU-Net's command; its closing validation takes one step, the unseen cases are what counts."""
    model = ["-tr", trainer, "-p", PLANS, "-device", job.options.device]
    command = ["nnUNetv2_train", job.number, job.options.configuration, "0", *model]
    job.run(f"train_{trainer}", *command, nnUNet_diffusion_steps="1")


def predict_and_score(job: Job, trainer: str, steps: int | None = None) -> dict[str, np.ndarray]:
    """Predict the unseen cases and score them with nnU-Net's commands; ``steps`` None is the plans' setting.

    Returns:
        Dice of every case by label, in [0, 1], NaN where a label is in neither mask.
    """
    name = trainer if steps is None else f"{trainer}_K{steps}"
    variables = {} if steps is None else {"nnUNet_diffusion_steps": str(steps)}
    folder = job.out / f"predictions_{name}"
    job.predict(f"predict_{name}", "nnUNetv2_predict", trainer=trainer, target=folder, **variables)
    job.run(
        f"evaluate_{name}", "nnUNetv2_evaluate_folder", str(job.raw / "labelsTs"), str(folder),
        "-djfile", str(folder / "dataset.json"), "-pfile", str(folder / "plans.json"),
    )  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    cases = [case["metrics"] for case in summary["metric_per_case"]]
    return {label: np.array([case[label]["Dice"] for case in cases], dtype=float) for label in summary["mean"]}


def draw_samples(job: Job, trainer: str, samples: int) -> Path | None:
    """Draw samples of the unseen cases with the verb ``predict``; its folder, None for a model that has no samples."""
    try:
        load_predictor(job.model_folder(trainer), options=PredictionOptions(samples=samples), progress=False)
    except OptionError:
        return None
    folder, more = job.out / f"samples_{trainer}", ("--samples", str(samples), "--tta", "none", "--save_uncertainty")
    program = ("nnunetv2_diffusion", "predict")
    job.predict(f"samples_{trainer}", *program, trainer=trainer, target=folder, more=more)
    return folder


def ranges_that_hold(predictions: Path, truths: Path) -> tuple[int, int]:
    """Of the 5 to 95 % ranges of volumes of samples, one a case and label: those that hold the true one, and all."""
    dataset = json.loads((predictions / "dataset.json").read_text())
    held = []
    for file in sorted((predictions / UNCERTAINTY).glob("*.json")):
        truth = str(truths / (file.stem + dataset["file_ending"]))
        reader = determine_reader_writer_from_file_ending(dataset["file_ending"], truth, verbose=False)()
        labels, properties = reader.read_seg(truth)
        volumes = mask_volumes(labels[0], foreground_labels(dataset), properties["spacing"])
        for name, found in json.loads(file.read_text())["volumes"].items():
            low, high = (found["spread"][f"percentile_{p}"] for p in (5, 95))
            held.append(low <= volumes[name] <= high)
    return sum(held), len(held)
