"""Model files from elsewhere, through every command that reads them: refused by name, in a line, and nothing is run."""

import contextlib
import copy
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "inference"))
from tiny_model import make_model, write_images

from nnunetv2_diffusion import checkpoints, cli, tensor_files
from nnunetv2_diffusion.checkpoints import CheckpointError, load_checkpoint_file
from nnunetv2_diffusion.inference.loading import load_predictor
from nnunetv2_diffusion.methods.hidiff import HiDiffTrainer
from nnunetv2_diffusion.networks import UnsupportedArchitectureError
from nnunetv2_diffusion.out_of_memory import is_out_of_memory
from nnunetv2_diffusion.packing import pack_checkpoint, unpack_checkpoint
from nnunetv2_diffusion.settings import ALLOW
from nnunetv2_diffusion.training.checks import check_plans
from nnunetv2_diffusion.training.pretrained import load_segmentor

FORBIDDEN = ("weights_only", "arbitrary code", "add_safe_globals", "Traceback", "\x1b")
FILE = "checkpoint_final.pth"


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Model folders, images, references and a packed file; not to be changed."""
    root = tmp_path_factory.mktemp("source")
    hidiff = make_model(root / "hidiff", "nnUNetTrainerHiDiff")
    pack_checkpoint(hidiff / "fold_0" / FILE, root / "packed.pth")
    return SimpleNamespace(
        hidiff=hidiff,
        recycle=make_model(root / "recycle"),
        stock=make_model(root / "stock", "nnUNetTrainer"),
        images=write_images(root / "images", cases=1),
        packed=root / "packed.pth",
    )


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A module that leaves a file when it is imported or called; the file that must not be there."""
    left = tmp_path / "code_ran"
    folder = tmp_path / "evil"
    folder.mkdir()
    text = f"from pathlib import Path\nPath({str(left)!r}).touch()\n"
    text += f"def run(*a, **k):\n    Path({str(left)!r}).touch()\nPlainConvUNet = run\n"
    (folder / "evilmod.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv(ALLOW, raising=False)
    yield left
    sys.modules.pop("evilmod", None)


@pytest.fixture
def model(source, tmp_path):
    """A copy of a model that may be changed."""
    return Path(shutil.copytree(source.hidiff, tmp_path / "model"))


def change_checkpoint(file, change):
    content = torch.load(file, weights_only=True, mmap=False)
    change(content)
    torch.save(content, file)


def change_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def verbs(model, source, out):
    """Command lines of all verbs that read a model, by name; nothing of them may be written."""
    fixed = ["-m", model, "-i", source.images, "-o", out / "out", "-device", "cpu", "--disable_progress_bar"]
    weights = model / "fold_0" / FILE
    return {
        "predict": ["predict", *fixed, "-npp", 0, "-nps", 0],
        "analyse": ["analyse", *fixed, "-l", source.images],
        "pack": ["pack", "-i", weights, "-o", out / "out"],
        "unpack": ["unpack", "-i", weights, "-o", out / "out"],
        "warm-start": [
            "warm-start", "--from", weights, "-d", "Dataset903_Random", "-c", "only", "-p", "tiny", "-o", out / "out"
        ],
    }  # fmt: skip


@pytest.fixture
def refused(source, tmp_path, capsys, monkeypatch):
    """Run a verb on a model; its message, a single line, nothing written and nothing of what PyTorch says."""
    preprocessed = tmp_path / "preprocessed" / "Dataset903_Random"
    preprocessed.mkdir(parents=True)
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed.parent))
    shutil.copy(source.recycle / "plans.json", preprocessed / "tiny.json")
    shutil.copy(source.recycle / "dataset.json", preprocessed)

    def run(verb, model):
        assert cli.main(list(map(str, verbs(model, source, tmp_path)[verb]))) == 1
        message = capsys.readouterr().err
        assert message.startswith(f"nnunetv2_diffusion {verb}: ")
        assert not [words for words in FORBIDDEN if words in message]
        assert not (tmp_path / "out").exists()
        return message

    return run


def one_line(message):
    assert message.count("\n") == 1, message
    assert len(message) < 700, message
    return message


# --- names in plans are code -----------------------------------------------------------------------------------------

ATTACKS = {
    "network": lambda a: a.update(network_class_name="evilmod.PlainConvUNet"),
    "nonlin": lambda a: a["arch_kwargs"].update(nonlin="evilmod.run", nonlin_kwargs={}),
    "conv_bias": lambda a: (
        a["arch_kwargs"].update(conv_bias="evilmod.run"),
        a["_kw_requires_import"].append("conv_bias"),
    ),
}


def attack(plans, name):
    ATTACKS[name](plans["configurations"]["only"]["architecture"])


@pytest.mark.parametrize("name", ATTACKS)
def test_the_attacks_are_attacks(marker, source, name):
    """nnU-Net itself runs the module: without this the tests below would show nothing."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    plans = json.loads((source.stock / "plans.json").read_text())
    attack(plans, name)
    a = plans["configurations"]["only"]["architecture"]
    with contextlib.suppress(Exception):
        get_network_from_plans(a["network_class_name"], a["arch_kwargs"], a["_kw_requires_import"], 1, 2)
    assert marker.exists()


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("verb", ["predict", "analyse"])
@pytest.mark.parametrize("where", ["plans.json", "checkpoint"])
def test_a_model_that_names_code_is_refused(marker, model, refused, verb, name, where):
    if where == "plans.json":
        change_json(model / "plans.json", lambda plans: attack(plans, name))
    else:
        change_checkpoint(model / "fold_0" / FILE, lambda c: attack(c["init_args"]["plans"], name))
    message = one_line(refused(verb, model))
    assert "evilmod" in message or "conv_bias" in message
    assert not marker.exists()


@pytest.mark.parametrize("name", ATTACKS)
def test_a_checkpoint_that_names_code_is_not_packed(marker, model, refused, name):
    change_checkpoint(model / "fold_0" / FILE, lambda c: attack(c["init_args"]["plans"], name))
    one_line(refused("pack", model))
    assert not marker.exists()


@pytest.mark.parametrize("name", ATTACKS)
def test_a_packed_file_that_names_code_is_not_unpacked(marker, model, source, refused, name):
    file = model / "fold_0" / FILE
    shutil.copy(source.packed, file)
    change_checkpoint(file, lambda c: attack(c["init_args"]["plans"], name))
    one_line(refused("unpack", model))
    assert not marker.exists()


@pytest.mark.parametrize("name", ATTACKS)
def test_plans_that_name_code_are_no_target_of_a_warm_start(marker, source, tmp_path, refused, name):
    change_json(tmp_path / "preprocessed" / "Dataset903_Random" / "tiny.json", lambda plans: attack(plans, name))
    one_line(refused("warm-start", source.stock))
    assert not marker.exists()


@pytest.mark.parametrize("name", ATTACKS)
def test_a_checkpoint_that_names_code_runs_none_in_a_warm_start(marker, source, tmp_path, refused, name):
    model = Path(shutil.copytree(source.stock, tmp_path / "stock"))
    change_checkpoint(model / "fold_0" / FILE, lambda c: attack(c["init_args"]["plans"], name))
    if name == "network":  # the last part of its name is that of the network; the weights are what is used
        assert cli.main(list(map(str, verbs(model, source, tmp_path)["warm-start"]))) == 0
    else:
        refused("warm-start", model)
    assert not marker.exists()


@pytest.mark.parametrize("name", ATTACKS)
def test_a_training_with_plans_that_name_code_does_not_begin(marker, source, name):
    plans = json.loads((source.recycle / "plans.json").read_text())
    attack(plans, name)
    with pytest.raises(UnsupportedArchitectureError):
        check_plans(plans, "only", json.loads((source.recycle / "dataset.json").read_text()))
    assert not marker.exists()


@pytest.mark.parametrize("trainer", ["nnUNetTrainer", "nnUNetTrainerRecycleXT", "nnUNetTrainerHiDiff"])
def test_no_trainer_builds_a_network_that_plans_name(marker, source, tmp_path, trainer):
    """Stock trainers too; and ours also in nnUNetv2_predict, which calls the last method alone."""
    plans = json.loads((source.recycle / "plans.json").read_text())
    attack(plans, "nonlin")
    manager = checkpoints.PlansManager(plans)
    dataset = json.loads((source.recycle / "dataset.json").read_text())
    with pytest.raises(UnsupportedArchitectureError, match="evilmod"):
        checkpoints.build_network(trainer, manager, manager.get_configuration("only"), dataset)
    if trainer != "nnUNetTrainer":
        cls = checkpoints.find_trainer(trainer)
        with pytest.raises(UnsupportedArchitectureError, match="evilmod"):
            cls.build_network_architecture(manager, manager.get_configuration("only"), 1, 3, False)
    assert not marker.exists()


def test_a_model_from_a_zip_that_names_code_is_refused(marker, source, tmp_path, monkeypatch, refused):
    from nnunetv2.model_sharing.model_import import install_model_from_zip_file

    name = "Dataset903_Random/nnUNetTrainerHiDiff__tiny__only"
    model = Path(shutil.copytree(source.hidiff, tmp_path / "zipped" / name))
    change_json(model / "plans.json", lambda plans: attack(plans, "nonlin"))
    archive = shutil.make_archive(str(tmp_path / "model"), "zip", tmp_path / "zipped")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    install_model_from_zip_file(archive)
    assert "evilmod" in one_line(refused("predict", tmp_path / "results" / name))
    assert not marker.exists()


NAMES = {
    "preprocessor_name": (True, ["evilmod", "join", "os", "../x", "", None, 3, "nnUNetTrainer"]),
    "resampling_fn_data": (True, ["evilmod", "os", "np", "partial", "map_coordinates", None]),
    "resampling_fn_probabilities": (True, ["no_such_function"]),
    "normalization_schemes": (True, [["evilmod"], ["np"], ["os"], ["ABC"], [], None, "ZScoreNormalization"]),
    "image_reader_writer": (False, ["evilmod", "np", "os", "Image", None, 4]),
    "label_manager": (False, ["evilmod", "np", "join"]),
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, (_, values) in NAMES.items() for v in values])
def test_other_names_are_nnunets_own_or_refused(marker, source, model, refused, key, value):
    def change(plans):
        (plans["configurations"]["only"] if NAMES[key][0] else plans)[key] = value

    change_json(model / "plans.json", change)
    assert key in one_line(refused("predict", model))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["evilmod", "join", "torch", "../evil", "", "nnUNetTrainerNone", 3, None])
def test_a_trainer_that_is_none_is_refused(marker, model, refused, name):
    change_checkpoint(model / "fold_0" / FILE, lambda c: c.update(trainer_name=name))
    message = refused("predict", model)
    assert repr(name) in message or str(name) in message
    assert not marker.exists()


# --- pickles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["predict", "analyse", "pack", "unpack", "warm-start"])
@pytest.mark.parametrize("kind", ["code", "class", "legacy", "cut off", "text"])
def test_a_refusal_says_why_and_never_how_to_load_it_all_the_same(source, model, tmp_path, refused, verb, kind):
    file, ran = model / "fold_0" / FILE, tmp_path / "code_ran"
    if verb == "unpack":
        shutil.copy(source.packed, file)
    if kind in ("code", "legacy"):
        content = {**torch.load(file, weights_only=True), "x": Evil(ran)}
        torch.save(content, file, _use_new_zipfile_serialization=kind == "code")
    elif kind == "class":
        change_checkpoint(file, lambda c: c.update(x=torch.nn.Linear(1, 1)))
    else:
        file.write_bytes(file.read_bytes()[:-200] if kind == "cut off" else b"some text")
    message = one_line(refused(verb, model))
    assert str(file) in message
    assert {"class": "it holds torch.nn.", "cut off": "the file is cut off"}.get(kind, "not loaded") in message
    assert not ran.exists()


def test_trainers_refuse_as_well(source, model, tmp_path):
    """--c and --val, and a segmentor to start from."""
    file, ran = model / "fold_0" / FILE, tmp_path / "code_ran"
    change_checkpoint(file, lambda c: c.update(x=Evil(ran)))
    trainer = object.__new__(HiDiffTrainer)
    trainer.label_manager = SimpleNamespace(num_segmentation_heads=3)
    for read in (lambda: trainer.load_checkpoint(str(file)), lambda: load_segmentor(torch.nn.Identity(), file)):
        with pytest.raises(CheckpointError) as error:
            read()
        assert not [words for words in FORBIDDEN if words in str(error.value)]
        assert error.value.__cause__ is None  # a traceback would show PyTorch's text
    assert not ran.exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("unable to mmap 4096 bytes from file: Cannot allocate memory (12)"),
    ],
)
def test_too_little_memory_is_not_a_damaged_file(source, monkeypatch, error):
    def load(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(CheckpointError, match="too little memory") as found:
        load_checkpoint_file(source.hidiff / "fold_0" / FILE)
    assert "damaged" not in str(found.value)


def test_other_errors_are_not_of_memory():
    assert not is_out_of_memory(RuntimeError("shape"))
    assert not is_out_of_memory(None)
    error = ImportError("x")
    error.__cause__ = MemoryError()
    assert is_out_of_memory(error)


@pytest.mark.parametrize("stage", ["start", "run"])
def test_a_command_without_memory_says_so(monkeypatch, capsys, stage):
    def fail(*_):
        raise ImportError("operator torchvision::nms does not exist") from MemoryError()

    if stage == "start":
        monkeypatch.setattr(cli, "build_parser", fail)
    else:
        monkeypatch.setattr(
            cli, "build_parser", lambda _: SimpleNamespace(parse_args=lambda _: SimpleNamespace(run=fail))
        )
    assert cli.main(["predict"]) == 1
    assert "too little memory" in one_line(capsys.readouterr().err)


# --- broken model files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
@pytest.mark.parametrize("text", ["", "[]", "{broken", "null", "3", "{}", '"text"', "[" * 100_000, "\udcff"])
@pytest.mark.parametrize("verb", ["predict", "analyse"])
def test_a_broken_json_is_named(model, refused, name, text, verb):
    (model / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert str(model) in one_line(refused(verb, model))


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_a_missing_json_is_named(model, refused, name):
    (model / name).unlink()
    assert str(model / name) in one_line(refused("predict", model))


DATASET = [
    ("labels", None), ("labels", {}), ("labels", {"background": 0}), ("labels", {"a": 1, "b": 2}), ("labels", [0, 1]),
    ("labels", {"background": 0, "a": "x"}), ("labels", {"background": 0, "a": math.nan}),
    ("labels", {"background": 0, "a": -1}), ("labels", {"background": 0, "a": [1, 2]}),
    ("labels", {"background": 1, "a": 0}), ("labels", {"background": 0, "a": 1, "b": 1}),
    ("labels", {"background": 0, "a": 1, "b": [1]}),
    ("labels", {"background": 0, "a": 10**9}), ("channel_names", {}), ("channel_names", None), ("channel_names", 3),
    ("file_ending", None), ("file_ending", "../../x.nii.gz"), ("file_ending", ""), ("file_ending", 3),
    ("channel_names", {"0": "MR", "1": "MR"}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), DATASET)
def test_a_dataset_json_that_cannot_be_used_is_named(model, refused, key, value):
    change_json(model / "dataset.json", lambda d: d.update({key: value}))
    message = one_line(refused("predict", model))
    assert key in message or "channels" in message or "label" in message


PLANS = [
    (("configurations",), None), (("configurations",), []), (("configurations", "only"), None),
    (("configurations", "only", "inherits_from"), "only"), (("configurations", "only", "inherits_from"), "none"),
    (("configurations", "only", "architecture", "arch_kwargs", "n_stages"), 7),
    (("configurations", "only", "patch_size"), [0, 8, 8]), (("configurations", "only", "patch_size"), [10**6] * 3),
    (("configurations", "only", "spacing"), [0.0, 1.0, 1.0]), (("configurations", "only", "spacing"), [math.nan] * 3),
    (("configurations", "only", "batch_size"), 0), (("configurations", "only", "resampling_fn_data_kwargs"), None),
    (("configurations", "only", "resampling_fn_seg_kwargs", "order"), 99),
    (("configurations", "only", "resampling_fn_seg_kwargs", "no_such_argument"), 1),
    (("configurations", "only", "use_mask_for_norm"), None), (("transpose_forward",), [0, 0, 1]),
    (("transpose_backward",), None), (("transpose_forward",), [0, 1, 99]), (("plans_name",), 3),
    (("transpose_backward",), [1, 2, 0]), (("transpose_forward",), [2, 1, 0]),
    (("transpose_forward",), ["0", "1", "2"]), (("transpose_backward",), [0, 1]),
    (("transpose_backward",), [0, 1, 2, 2]),
    (("dataset_name",), None),
    (("foreground_intensity_properties_per_channel",), None),
    (("foreground_intensity_properties_per_channel", "0"), {"mean": math.nan}),
    (("configurations", "only", "diffusion"), [1]), (("configurations", "only", "diffusion", "steps"), 1e9),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), PLANS, ids=str)
def test_plans_that_cannot_be_used_are_named(model, refused, path, value):
    def change(plans):
        *outer, key = path
        place = plans
        for name in outer:
            place = place[name]
        place[key] = value

    change_json(model / "plans.json", change)
    message = one_line(refused("predict", model))
    assert path[-1] in message or path[-2] in message or "diffusion" in message


CHECKPOINT = [
    ("trainer_name", None), ("init_args", None), ("init_args", []), ("init_args", {}), ("network_weights", []),
    ("network_weights", {1: torch.zeros(1)}), ("network_weights", {}), ("network_weights", {"a": 3}),
    ("inference_allowed_mirroring_axes", [7]), ("inference_allowed_mirroring_axes", "0"),
    ("inference_allowed_mirroring_axes", [0, 0]), ("inference_allowed_mirroring_axes", [-1]),
    ("inference_allowed_mirroring_axes", 3), ("inference_allowed_mirroring_axes", ["0"]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), CHECKPOINT, ids=str)
@pytest.mark.parametrize("verb", ["predict", "pack"])
def test_a_checkpoint_without_what_it_needs_is_named(model, refused, key, value, verb):
    change_checkpoint(model / "fold_0" / FILE, lambda c: c.update({key: value}))
    message = one_line(refused(verb, model))
    assert str(model / "fold_0" / FILE) in message


@pytest.mark.parametrize("key", ["configuration", "plans", "dataset_json"])
@pytest.mark.parametrize("verb", ["predict", "pack", "analyse"])
def test_a_checkpoint_without_its_arguments_is_named(model, refused, key, verb):
    change_checkpoint(model / "fold_0" / FILE, lambda c: c["init_args"].pop(key))
    assert f"init_args.{key} is missing" in one_line(refused(verb, model))


@pytest.mark.parametrize("key", ["plans", "dataset_json"])
def test_a_broken_source_of_a_warm_start_is_named(source, tmp_path, refused, key):
    model = Path(shutil.copytree(source.stock, tmp_path / "stock"))
    change_checkpoint(model / "fold_0" / FILE, lambda c: c["init_args"].update({key: [1]}))
    assert "init_args" in one_line(refused("warm-start", model))


def view(shape):
    return torch.zeros(1).expand(shape)


BAD_WEIGHTS = {
    "NaN": lambda w: w.view(-1).__setitem__(0, math.nan) or w,
    "infinite": lambda w: w.view(-1).__setitem__(0, math.inf) or w,
    "fewer numbers": lambda w: view(w.shape) if w.numel() > 1 else view((10**12,)),
    "expected a tensor": lambda w: "text",
    "dense": lambda w: w.to_sparse(),
    "shape": lambda w: w[:1].repeat(w.shape[0] + 1, *[1] * (w.ndim - 1)),
}


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
@pytest.mark.parametrize("verb", ["predict", "pack", "warm-start"])
def test_weights_that_cannot_be_used_are_named(source, tmp_path, refused, kind, verb):
    model = Path(shutil.copytree(source.stock if verb == "warm-start" else source.hidiff, tmp_path / "model"))
    changed = []

    def change(content):
        weights = content["network_weights"]
        changed.append(next(k for k, w in weights.items() if w.is_floating_point() and w.ndim > 3))
        weights[changed[0]] = BAD_WEIGHTS[kind](weights[changed[0]].clone())

    change_checkpoint(model / "fold_0" / FILE, change)
    message = refused(verb, model)
    assert changed[0] in message
    assert kind in message or "shape" in message or "expected (" in message


def test_the_first_weight_that_is_not_finite_is_named_by_load_model(model):
    from nnunetv2_diffusion.inference.api import load_model

    name = "segmentor.encoder.stages.0.0.convs.0.conv.bias"
    change_checkpoint(model / "fold_0" / FILE, lambda c: c["network_weights"][name].fill_(math.nan))
    with pytest.raises(CheckpointError, match=f"{name} holds NaN"):
        load_model(model)


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_model_is_explained(source, tmp_path, refused):
    archive = Path(shutil.make_archive(str(tmp_path / "export"), "zip", source.hidiff))
    (tmp_path / "empty").mkdir()
    for folder, words in (
        (archive, "nnUNetv2_install_pretrained_model_from_zip"),
        (tmp_path / "empty", "no fold in it"),
        (source.hidiff.parent, f"as {source.hidiff}"),
        (source.hidiff.parent / "other", "no such folder, expected a trained model"),
        (source.hidiff / "fold_0", "a single fold"),
        (source.packed, "a file, expected the folder"),
    ):
        assert words in one_line(refused("predict", folder))


# --- packed files ----------------------------------------------------------------------------------------------------


def first(packed):
    return next(iter(packed["binary"].values()))


def change_first(**changes):
    return lambda packed: first(packed).update(changes)


PACKED = {
    "no real": lambda p: p.pop("real"),
    "no binary": lambda p: p.pop("binary"),
    "no init_args": lambda p: p.pop("init_args"),
    "no trainer": lambda p: p.pop("trainer_name"),
    "real is a list": lambda p: p.update(real=[1]),
    "no scale": lambda p: first(p).pop("scale"),
    "parts are a list": lambda p: p["binary"].update({next(iter(p["binary"])): [1]}),
    "shape is absurd": change_first(shape=[10**9, 10**9]),
    "shape is negative": change_first(shape=[-1, 4, 3, 3, 3]),
    "shape is text": change_first(shape="4433"),
    "shape is another": lambda p: first(p).update(shape=first(p)["shape"][::-1]),
    "float signs": lambda p: first(p).update(signs=first(p)["signs"].float()),
    "few signs": lambda p: first(p).update(signs=first(p)["signs"][:-1]),
    "a view as signs": lambda p: first(p).update(signs=torch.zeros(1, dtype=torch.uint8).expand(10**9)),
    "scale too long": lambda p: first(p).update(scale=torch.ones(999)),
    "scale negative": lambda p: first(p).update(scale=-first(p)["scale"] - 1),
    "scale NaN": lambda p: first(p).update(scale=first(p)["scale"] * math.nan),
    "scale integer": lambda p: first(p).update(scale=first(p)["scale"].int()),
    "real NaN": lambda p: p["real"].update({next(iter(p["real"])): torch.tensor([math.nan])}),
    "one name twice": lambda p: p["real"].update({next(iter(p["binary"])): torch.zeros(1)}),
    "another format": lambda p: p.update(format="x"),
    "another configuration": lambda p: p["init_args"].update(configuration="3d_none"),
}


@pytest.mark.parametrize("name", PACKED)
def test_a_damaged_packed_file_is_named_and_nothing_is_written(source, model, refused, name):
    file = model / "fold_0" / FILE
    shutil.copy(source.packed, file)
    change_checkpoint(file, PACKED[name])
    assert str(file) in refused("unpack", model)


def test_a_packed_file_in_order_is_unpacked_and_predicts(source, tmp_path):
    model = Path(shutil.copytree(source.hidiff, tmp_path / "model"))
    (model / "fold_0" / FILE).unlink()
    unpack_checkpoint(source.packed, model / "fold_0" / FILE)
    load_predictor(model, progress=False)


def test_content_of_the_host_is_read(tmp_path):
    """numpy's scalars, which nnU-Net's log holds."""
    torch.save({"network_weights": {}, "log": [np.float64(0.5)]}, tmp_path / "x.pth")
    assert copy.copy(tensor_files.read_tensor_file(tmp_path / "x.pth", mmap=True))["log"] == [0.5]


def test_a_folder_in_place_of_a_checkpoint_is_named_with_what_lies_in_it(tmp_path, capsys):
    fold = tmp_path / "model" / "fold_0"
    fold.mkdir(parents=True)
    (fold / "checkpoint_final.pth").write_bytes(b"x")
    for verb in ("pack", "unpack"):
        assert cli.main([verb, "-i", str(fold.parent), "-o", str(tmp_path / "out.pth")]) == 1
        message = capsys.readouterr().err
        assert f"{fold.parent}: a folder, expected the file of a checkpoint" in message
        assert "fold_0/checkpoint_final.pth lies within it" in message
