"""A tiny data set, planned once, and nnU-Net's real commands as subprocesses."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from nnunetv2_diffusion.planning.derive import derive_plans, write_plans

SPACING = (1.0, 1.0, 2.0)


def make_case(seed: int, channels: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Image (channels, x, y, z) and labels: a box (1) with a brighter box (2) inside, in noise."""
    rng = np.random.default_rng(seed)
    shape = (26, 24, 18)
    labels = np.zeros(shape, np.uint8)
    x, y, z = rng.integers(4, 8, 3)
    labels[x : x + 14, y : y + 12, z : z + 8] = 1
    labels[x + 4 : x + 9, y + 3 : y + 8, z + 2 : z + 6] = 2
    image = rng.normal(size=(channels, *shape)).astype(np.float32)
    image[0] += 3 * (labels > 0)
    image[-1] += 3 * (labels == 2)
    return image, labels


def write_dataset(folder: Path, cases: int, channels: int = 2, dataset: dict | None = None, edit=None) -> None:
    """Raw data set with ``cases`` training and two unseen cases; ``edit(labels, index)`` changes labels."""
    for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / part).mkdir(parents=True)
    affine = np.diag([*SPACING, 1.0])
    for index in range(cases + 2):
        image, labels = make_case(index, channels)
        if edit is not None:
            labels = edit(labels, index)
        part = "Tr" if index < cases else "Ts"
        for channel in range(channels):
            file = folder / f"images{part}" / f"case_{index}_{channel:04d}.nii.gz"
            nib.save(nib.Nifti1Image(image[channel], affine), file)
        nib.save(nib.Nifti1Image(labels, affine), folder / f"labels{part}" / f"case_{index}.nii.gz")
    content = {
        "channel_names": {str(c): "MRI" for c in range(channels)},
        "labels": {"background": 0, "outer": 1, "inner": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps({**content, **(dataset or {})}))


@dataclass
class Project:
    """nnU-Net's three folders below one root, and the commands on them."""

    root: Path
    name: str
    number: str = field(init=False)

    def __post_init__(self):
        self.number = self.name[len("Dataset") :][:3]
        for folder in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (self.root / folder).mkdir(exist_ok=True)

    @property
    def raw(self) -> Path:
        return self.root / "nnUNet_raw" / self.name

    @property
    def preprocessed(self) -> Path:
        return self.root / "nnUNet_preprocessed" / self.name

    def model(self, trainer: str, configuration: str = "3d_fullres", plans: str = "tiny") -> Path:
        return self.root / "nnUNet_results" / self.name / f"{trainer}__{plans}__{configuration}"

    def environment(self, **extra: str) -> dict[str, str]:
        folders = {v: str(self.root / v) for v in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("nnUNet_")}
        # no worker processes for augmentation, one for export: they cost more than the work
        return {
            **inherited,
            "nnUNet_n_proc_DA": "0",
            "nnUNet_def_n_proc": "1",
            "OMP_NUM_THREADS": "1",
            **folders,
            **extra,
        }

    def run(self, *command: str, fails: bool = False, **environment: str) -> str:
        """Run one of nnU-Net's commands from this Python's environment; returns what it printed."""
        program = Path(sys.executable).with_name(command[0])
        result = subprocess.run(
            [str(program), *map(str, command[1:])],
            env=self.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.root,  # not the checkout: the installed package is tested
        )
        assert (result.returncode != 0) == fails, result.stdout[-3000:]
        return result.stdout

    def train(self, trainer: str, *options: str, configuration="3d_fullres", fold="0", plans="tiny", **kwargs) -> str:
        return self.run(
            "nnUNetv2_train", self.number, configuration, fold, "-tr", trainer, "-p", plans, "-device", "cpu",
            *options, **kwargs,
        )  # fmt: skip

    def predict(self, output: str, trainer: str, *options: str, configuration="3d_fullres", images=None, **kwargs):
        """Masks of unseen cases by name; ``output`` is a new folder below the root."""
        target = self.root / output
        self.run(
            "nnUNetv2_predict", "-d", self.number, "-c", configuration, "-f", "0", "-tr", trainer, "-p", "tiny",
            "-i", images or self.raw / "imagesTs", "-o", target, "-device", "cpu", *options, **kwargs,
        )  # fmt: skip
        return read_masks(target)


def read_masks(folder: Path) -> dict[str, np.ndarray]:
    return {f.name: np.asarray(nib.load(f).dataobj) for f in sorted(folder.glob("*.nii.gz"))}


def tiny_plans(project: Project, name: str = "tiny", base_features: int = 4, **settings) -> dict:
    """Derive and write plans with a tiny network from the stock ones."""
    stock = json.loads((project.preprocessed / "nnUNetPlans.json").read_text())
    lengths = {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "steps": 2}
    lengths["hidiff"] = {"refiner_width": 4, "steps": 2, "pretraining_epochs": 1}
    changes = {"base_features": base_features, "batch_size": 2}
    configurations = {c: changes for c in ("2d", "3d_fullres") if c in stock["configurations"]}
    plans = derive_plans(stock, name, configurations, {**lengths, **settings})
    if "2d" in configurations:
        plans["configurations"]["2d"]["diffusion"]["steps"] = 1  # many slices; the chain is tested in 3D
    write_plans(plans, project.preprocessed)
    return plans


def batch_for(trainer, seed=0):
    """A batch as nnU-Net's loader gives it: bright blobs on noise."""
    rng = torch.Generator().manual_seed(seed)
    patch, b = trainer.configuration_manager.patch_size, trainer.batch_size
    labels = torch.zeros(b, 1, *patch, dtype=torch.int16)
    middle = tuple(slice(n // 4, 3 * n // 4) for n in patch)
    labels[(slice(None), 0, *middle)] = 1
    inner = tuple(slice(2 * n // 5, 3 * n // 5) for n in patch)
    labels[(slice(None), 0, *inner)] = 2
    image = torch.randn(b, trainer.num_input_channels, *patch, generator=rng) + labels
    scales = trainer._get_deep_supervision_scales()
    if scales is None:
        return {"data": image, "target": labels, "keys": [f"case_{i}" for i in range(b)]}
    targets = [
        torch.nn.functional.interpolate(labels.float(), [round(n * s) for n, s in zip(patch, scale, strict=True)])
        for scale in scales
    ]
    return {"data": image, "target": [t.to(torch.int16) for t in targets], "keys": [f"case_{i}" for i in range(b)]}
