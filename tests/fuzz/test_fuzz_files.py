"""Files that are damaged at random: checkpoints, plans, dataset.json, packed files, images."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813, its usual name
from harness import batches, check_command
from tiny_model import make_model, write_images

from nnunetv2_diffusion.packing import pack_checkpoint

FILE = "fold_0/checkpoint_final.pth"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    model = make_model(root / "model", "nnUNetTrainerHiDiff", patch=(8, 8), spacing=(1.0, 1.0))
    pack_checkpoint(model / FILE, root / "packed")
    images = write_images(root / "images", cases=1, shape=(2, 9, 9))
    return SimpleNamespace(model=model, packed=root / "packed", images=images)


def damage(content: bytes, rng: random.Random) -> bytes:
    """Cut, overwrite, insert, repeat or exchange some bytes."""
    data, at = bytearray(content), rng.randrange(len(content))
    length = rng.choice((1, 2, 16, 300))
    kind = rng.choice(("cut", "zero", "random", "insert", "remove", "repeat", "digits", "empty"))
    if kind == "cut":
        return bytes(data[:at])
    if kind == "empty":
        return rng.choice((b"", b"\0" * 100, b"PK\x03\x04", b"{}", b"[]", b"\x1f\x8b\x08"))
    if kind == "digits":  # of JSON
        return bytes(rng.choice(b"0123456789-eN") if chr(b).isdigit() and rng.random() < 0.05 else b for b in data)
    piece = {"zero": bytes(length), "random": rng.randbytes(length), "repeat": bytes(data[at : at + length])}.get(kind)
    data[at : at + (0 if kind in ("insert", "repeat") else length)] = (
        rng.randbytes(length) if kind == "insert" else piece or b""
    )
    return bytes(data)


@pytest.mark.parametrize("seed", batches(6, quick=2))
def test_a_damaged_file_is_refused_with_a_message_or_harmless(world, tmp_path, capsys, seed):
    """6 x 10 files."""
    rng = random.Random(seed)
    for number in range(10):
        folder = tmp_path / str(number)
        model, images = (Path(shutil.copytree(f, folder / f.name)) for f in (world.model, world.images))
        packed = Path(shutil.copy(world.packed, folder / "packed"))
        kind = ("checkpoint", "plans", "dataset", "packed", "image")[number % 5]
        file = {
            "checkpoint": model / FILE, "plans": model / "plans.json", "dataset": model / "dataset.json",
            "packed": packed, "image": images / "case_0_0000.nii.gz",
        }[kind]  # fmt: skip
        file.write_bytes(damage(file.read_bytes(), rng))
        if kind == "packed":
            check_command(["unpack", "-i", str(packed), "-o", str(folder / "out")], capsys)
            continue
        if kind == "checkpoint" and rng.random() < 0.5:
            check_command(["pack", "-i", str(file), "-o", str(folder / "out")], capsys)
            continue
        fixed = ["-m", model, "-i", images, "-o", folder / "out", "-device", "cpu", "-npp", 0, "-nps", 0]
        check_command(["predict", *map(str, fixed), "--disable_progress_bar"], capsys)


VALUES = [None, 0, -1, 1e9, "x", "join", "os", [], {}, [1], {"a": 1}, True, float("nan"), "9" * 50]


def change_json(content: bytes, rng: random.Random) -> bytes:
    """Replace or remove any value in it, or damage its text."""
    if rng.random() < 0.4:
        return damage(content, rng)
    read, places = json.loads(content), []

    def walk(place: object) -> None:
        for key in place if isinstance(place, dict) else range(len(place)) if isinstance(place, list) else ():
            places.append((place, key))
            walk(place[key])

    walk(read)
    place, key = rng.choice(places)
    if rng.random() < 0.2:
        del place[key]
    else:
        place[key] = rng.choice(VALUES)
    return json.dumps(read).encode()


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A model of nnU-Net's own, and masks."""
    root = tmp_path_factory.mktemp("stock")
    for name in ("references", "predictions"):
        (root / name).mkdir()
        mask = (np.random.default_rng(0).random((3, 8, 8)) > 0.5).astype(np.uint8)
        sitk.WriteImage(sitk.GetImageFromArray(mask), str(root / name / "case.nii.gz"))
    make_model(root / "model", "nnUNetTrainer", patch=(8, 8), spacing=(1.0, 1.0))
    return root


@pytest.mark.parametrize("seed", batches(4, quick=1))
def test_a_changed_json_of_a_data_set_is_refused_with_a_message_or_harmless(stock, tmp_path, monkeypatch, capsys, seed):
    """4 x 20 files, for the verbs that read plans and dataset.json of a data set."""
    rng = random.Random(seed)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    for number in range(20):
        folder, out = tmp_path / "Dataset903_Random", tmp_path / str(number)
        shutil.rmtree(folder, ignore_errors=True)
        for path in (folder, out):
            path.mkdir()
        plans = Path(shutil.copy(stock / "model/plans.json", folder / "tiny.json"))
        dataset = Path(shutil.copy(stock / "model/dataset.json", folder))
        changed = rng.choice((plans, dataset))
        changed.write_bytes(change_json(changed.read_bytes(), rng))
        checkpoint, named = stock / "model" / FILE, ["-d", "Dataset903_Random"]
        masks = [stock / "references", stock / "predictions"]
        command = (
            ["plan", *named, "--base", "tiny", "-o", "other", "--preset", "fast"],
            ["plan", *named, "-p", "tiny", "--show"],
            ["warm-start", "--from", checkpoint, *named, "-c", "only", "-p", "tiny", "-o", out / "w"],
            ["evaluate", *masks, "-djfile", dataset, "-pfile", plans, "-np", 1, "--no-surface", "-o", out / "s.json"],
        )[number % 4]
        check_command(list(map(str, command)), capsys)
