"""Random command lines of all verbs: they work, or end with a status and a message."""

import argparse
import random
import shutil
from types import SimpleNamespace

import pytest
import SimpleITK as sitk  # noqa: N813, its usual name
from harness import batches, check_command
from tiny_model import make_model, write_images

from nnunetv2_diffusion import cli
from nnunetv2_diffusion.cli import VERBS, build_parser
from nnunetv2_diffusion.packing import pack_checkpoint

JUNK = [
    "", "x", "0", "1", "2", "-1", "3.5", "1e9", "1000000000", "99999999999999999999", "nan", "inf", "-inf", "None",
    "Dataset903_Random", "903", "Dataset", "²", "../..", "/", "/dev/null", "/dev/zero", "a" * 300, "ä", "a b", "all",
    "checkpoint_final.pth", "3d_fullres", "only", "tiny", "steps=5", "steps", "=", "hidiff.steps=1e9", "a=b=c",
    "nnUNetTrainerRecycleXT", "nnUNetTrainer", "os.system",
]  # fmt: skip
PROCESSES = ("-npp", "-nps", "-np")  # each would import torch
PROCESS_VALUES = ["0", "-1", "x", "1000000000", "nan"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders and files that options may name."""
    root = tmp_path_factory.mktemp("world")
    hidiff = make_model(root / "hidiff", "nnUNetTrainerHiDiff", patch=(8, 8), spacing=(1.0, 1.0))
    model = make_model(root / "model", patch=(8, 8), spacing=(1.0, 1.0))
    images = write_images(root / "images", cases=1, shape=(2, 9, 9))
    references = root / "references"
    references.mkdir()
    image = sitk.ReadImage(str(images / "case_0_0000.nii.gz"))
    sitk.WriteImage(sitk.Cast(image > 0, sitk.sitkUInt8), str(references / "case_0.nii.gz"))
    shutil.copytree(references, root / "predictions")
    shutil.copy(model / "dataset.json", root / "predictions")
    assert cli.main(["evaluate", str(references), str(root / "predictions"), "-np", "1", "--no-surface"]) == 0
    pack_checkpoint(hidiff / "fold_0/checkpoint_final.pth", root / "packed")
    (root / "empty").mkdir()
    (root / "file.json").write_text("{broken")
    preprocessed = root / "preprocessed/Dataset903_Random"
    preprocessed.mkdir(parents=True)
    shutil.copy(model / "plans.json", preprocessed / "tiny.json")
    shutil.copy(model / "dataset.json", preprocessed)
    paths = [model, hidiff, images, references, root / "packed", root / "empty", root / "file.json", root / "none"]
    paths.append(root / "predictions")
    paths += [hidiff / "fold_0/checkpoint_final.pth", model / "fold_0/checkpoint_final.pth", model / "plans.json"]
    return SimpleNamespace(root=root, model=model, images=images, references=references, paths=list(map(str, paths)))


def base(verb, world, out):
    """Arguments with which a verb works, or nearly; random ones follow and replace them."""
    fixed = ["-m", world.model, "-i", world.images, "-o", out / "out", "-device", "cpu", "--disable_progress_bar"]
    checkpoint = world.model.parent / "hidiff/fold_0/checkpoint_final.pth"
    known = {
        "predict": [*fixed, "-npp", 0, "-nps", 0],
        "analyse": [*fixed, "-l", world.references, "--samples", 1],
        "pack": ["-i", checkpoint, "-o", out / "out"],
        "unpack": ["-i", world.root / "packed", "-o", out / "out"],
        "warm-start": ["--from", checkpoint, "-d", "Dataset903_Random", "-c", "only", "-p", "tiny", "-o", out / "out"],
        "plan": ["-d", "Dataset903_Random", "-p", "tiny", "-o", "other"],
        "evaluate": [world.references, world.root / "predictions", "-np", 1, "--no-surface", "-o", out / "o.json"],
        "compare": [world.root / "predictions", world.root / "predictions", "--names", "a", "b", "--bootstrap", 100],
    }
    return list(map(str, known.get(verb, [])))


def random_options(rng, verb, world):
    """Some options of a verb, each with as many values as it takes or another number."""
    parser = build_parser(verb)
    verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    actions = [a for a in verbs.choices[verb]._actions if a.option_strings and a.dest not in ("help", "o", "output")]
    words = []
    for action in rng.sample(actions, min(len(actions), rng.choice((1, 1, 2, 3)))):
        name = rng.choice(action.option_strings)
        words.append(name)
        takes = {0: 0, None: 1}.get(action.nargs, 2)
        for _ in range(takes if rng.random() < 0.9 else rng.choice((0, 1, 2))):
            pool = PROCESS_VALUES if name in PROCESSES else rng.choice((JUNK, world.paths, action.choices or JUNK))
            words.append(str(rng.choice(list(pool))))
    return words


@pytest.mark.parametrize("seed", batches(6, quick=2))
def test_a_random_command_line_ends_with_a_status_and_a_message(world, tmp_path, monkeypatch, capsys, seed):
    """6 x 20 command lines."""
    monkeypatch.chdir(tmp_path)
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    rng, statuses = random.Random(seed), []
    verbs = [verb for verb in VERBS if verb != "doctor"]
    for number in range(20):
        shutil.copytree(world.root / "preprocessed", tmp_path / "preprocessed")  # plan writes into it
        verb = rng.choice(verbs) if number else "doctor"
        out = tmp_path / str(number)
        out.mkdir()
        statuses.append(check_command([verb, *base(verb, world, out), *random_options(rng, verb, world)], capsys))
        shutil.rmtree(tmp_path / "preprocessed")
    assert {1, 2} & set(statuses)
