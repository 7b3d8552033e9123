"""Commands that write what the real ones would, at once; no network is trained."""

import csv
import json
import threading
from pathlib import Path

import numpy as np
import torch

from laboratory.commands import CommandError, Usage

DATASET = "Dataset501_Fake"
CASES = [f"phantom_{i:03d}" for i in range(6)]
SPLIT = {"train": CASES[:4], "val": CASES[3:4], "test": CASES[4:]}
TRAINERS = {"Stock": None, "Recycle": "gaussian", "Hi": "hidiff"}  # name: kind of chain
STUDY = {
    "name": "fake",
    "summary": "Nothing is trained.",
    "dataset": DATASET,
    "configuration": "3d_fullres",
    "split": "split.json",
    "device": "cpu",
    "network": {"base_features": 4},
    "settings": {"num_epochs": 2, "num_iterations_per_epoch": 3},
    "predictions": [{"steps": 1}, {"steps": 2, "sampler": "ddim", "samples": 3}],
    "cells": [
        {"name": "A", "trainer": "Stock", "runs": 2},
        {"name": "B", "trainer": "Recycle", "analyse": {"steps": 2, "samples": 2}},
        {"name": "C", "trainer": "Hi", "segmentor": "A"},
    ],
}
ARCHITECTURE = {
    "network_class_name": "some.PlainConvUNet",
    "arch_kwargs": {"n_stages": 2, "features_per_stage": [32, 64], "strides": [[1, 1, 1], [2, 2, 2]]},
}


def write_inputs(folder: Path, study: dict = STUDY, split: dict = SPLIT) -> tuple[Path, Path]:
    """Study file and raw data set."""
    folder.mkdir(exist_ok=True)
    (folder / "split.json").write_text(json.dumps(split))
    (folder / "study.json").write_text(json.dumps(study))
    raw = folder / DATASET
    for part, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        (raw / part).mkdir(parents=True, exist_ok=True)
        for case in CASES:
            (raw / part / f"{case}{ending}").write_text("an image")
    labels = {"background": 0, "organ": 1, "lesion": 2}
    dataset = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": 6, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(dataset))
    return folder / "study.json", raw


class FakeRunner:
    """Stands in for CommandRunner.

    Attributes:
        commands: (name, arguments, environment) of every call.
        fail: words; a command fails, after it wrote something, if all of them are in it. Emptied then.
    """

    def __init__(self):
        self.commands, self.fail, self.lock = [], None, threading.Lock()

    def run(self, command, log, environment, folder=None, keep_open=()):
        self.folder = folder
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("output")
        with self.lock:
            self.commands.append((command[0], list(command[1:]), dict(environment)))
            fails = self.fail is not None and all(word in " ".join(command) for word in self.fail)
            if fails:
                self.fail = None
        name = command[0] if command[0] != "nnunetv2_diffusion" else command[1].replace("-", "_")
        getattr(self, name)(command, environment, fails)
        if fails:
            raise CommandError(f"{command[0]} ended with status 1")
        return Usage(10.0, 2**30)

    def stop(self):
        pass

    def named(self, *words):
        """Commands that have all of the words."""
        return [c for c in self.commands if all(word in " ".join([c[0], *c[1]]) for word in words)]

    @staticmethod
    def nnUNetv2_plan_and_preprocess(command, environment, fails):  # noqa: N802
        folder = Path(environment["nnUNet_preprocessed"]) / DATASET
        folder.mkdir(parents=True, exist_ok=True)
        configuration = {
            "data_identifier": "data", "patch_size": [16, 16, 16], "batch_size": 2, "architecture": ARCHITECTURE
        }  # fmt: skip
        plans = {"plans_name": "nnUNetPlans", "dataset_name": DATASET, "configurations": {"3d_fullres": configuration}}
        (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
        dataset = json.loads((Path(environment["nnUNet_raw"]) / DATASET / "dataset.json").read_text())
        (folder / "dataset.json").write_text(json.dumps(dataset))

    @staticmethod
    def nnUNetv2_train(command, environment, fails):  # noqa: N802
        trainer, plans = command[command.index("-tr") + 1], command[command.index("-p") + 1]
        folder = Path(environment["nnUNet_results"]) / DATASET / f"{trainer}__{plans}__3d_fullres" / "fold_0"
        folder.mkdir(parents=True, exist_ok=True)
        if fails:
            if environment.get("FAKE_FAILS", "late") == "late":
                (folder / "checkpoint_latest.pth").write_text("some epochs")
            return
        log = {
            "mean_fg_dice": [np.float64(0.5), np.float64(0.75)], "dice_per_class_or_region": [[0.5, np.nan]] * 2,
            "train_losses": [1.0, 0.5], "val_losses": [1.0, 0.5], "epoch_start_timestamps": [100.0, 104.0],
            "epoch_end_timestamps": [103.0, 106.0],
        }  # fmt: skip
        torch.save({"network_weights": {}, "logging": log}, folder / "checkpoint_final.pth")
        for name in ("plans.json", "dataset.json"):
            (folder.parent / name).write_text("{}")

    def warm_start(self, command, environment, fails):
        assert (self.folder / command[command.index("--from") + 1]).is_file()
        file = Path(command[command.index("-o") + 1])
        assert not file.exists()  # the verb does not overwrite
        file.write_text("weights")

    @staticmethod
    def nnUNetv2_predict(command, environment, fails):  # noqa: N802
        folder = Path(command[command.index("-o") + 1])
        folder.mkdir()
        for case in SPLIT["test"]:
            (folder / f"{case}.nii.gz").write_text("a mask")
            if fails:
                return

    @staticmethod
    def evaluate(command, environment, fails):
        folder = Path(command[3])
        entries = [
            {"prediction_file": f"/somewhere/{case}.nii.gz", "metrics": {
                label: {"Dice": 0.5 + 0.1 * i, "HD95": float("nan"), "volume_error": 1.0, "volume_error_rel": 0.1}
                for label in ("1", "2")}}
            for i, case in enumerate(SPLIT["test"])
        ]  # fmt: skip
        (folder / "summary.json").write_text(json.dumps({"metric_per_case": entries}))

    @staticmethod
    def analyse(command, environment, fails):
        folder = Path(command[command.index("-o") + 1])
        folder.mkdir()
        steps = [
            {"case": case, "sample": n, "step": k, "label": label, "Dice": 0.5 + 0.1 * k + 0.01 * n}
            for case in SPLIT["test"] for n in range(2) for k in (1, 2) for label in ("organ", "lesion", "mean")
        ]  # fmt: skip
        samples = [{"case": c, "Dice": 0.7, "sample_dice": 0.69, "pairwise_dice": 0.9} for c in SPLIT["test"]]
        for name, rows in (("steps", steps), ("samples", samples)):
            with (folder / f"{name}.csv").open("w", newline="") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
