"""What all trainers share: settings that they read, threads, one process a fold, settings of a continued training."""

import copy
import os
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
from tiny_model import make_plans

from nnunetv2_diffusion.checkpoints import CheckpointError
from nnunetv2_diffusion.locks import LockedError, locked
from nnunetv2_diffusion.settings import SUBSECTIONS, DiffusionSettings
from nnunetv2_diffusion.training.continuing import FIXED, dataset_changes, flat
from nnunetv2_diffusion.training.host import LOCK, CommonTrainer

TRAINERS = [
    *("DiffSeg", "SelfCondXt", "SelfCondXtPlus1", "RecycleXT", "RecycleXtPlus1"),
    *("RecycleScore", "NoDiff", "HiDiff", "Baseline"),
]
SMALL = {"refiner_width": 4, "steps": 3, "pretraining_epochs": 0}
# another valid value of settings that no rule gives one
OTHER = {
    "gaussian.training_steps": 50,
    "gaussian.betas": [2e-4, 0.03],
    "hidiff.refiner_width": 8,
    "hidiff.prior_residual": False,
    "hidiff.calibrated": False,
    "hidiff.pretraining_learning_rate": 1e-3,
}


def trainer_class(name: str) -> type[CommonTrainer]:
    return recursive_find_trainer_class_by_name(f"nnUNetTrainer{name}")


def other_value(name: str, field) -> object:
    """A valid value that is not the default."""
    if name in OTHER:
        return OTHER[name]
    default, meta = field.default, field.metadata
    if meta["choices"]:
        return next(choice for choice in meta["choices"] if choice != default)
    if isinstance(default, bool):
        return not default
    if "str" in str(field.type):
        return "other"
    if isinstance(default, float):
        return default / 2 if default else 0.5
    return (meta["low"] or 0) + 1 if default is None else default + 1 if default < 1000 else default // 2


def other_values(names) -> dict:
    """A section in which all of these settings have another value."""
    section: dict = {}
    for cls, prefix in ((DiffusionSettings, ""), *((c, f"{n}.") for n, c in SUBSECTIONS.items())):
        for field in fields(cls):
            name = prefix + field.name
            if name in names and "section" not in field.metadata:
                place = section.setdefault(prefix[:-1], {}) if prefix else section
                place[field.name] = other_value(name, field)
    return section


def log_of(trainer) -> str:
    return Path(trainer.log_file).read_text()


def make_batch(trainer) -> dict:
    patch = trainer.configuration_manager.patch_size
    generator = torch.Generator().manual_seed(1)
    labels = torch.zeros(2, 1, *patch, dtype=torch.int16)
    labels[..., 2:6, 3:9, 2:6], labels[..., 3:5, 4:7, 3:5] = 1, 2
    batch = {"data": torch.randn(2, 1, *patch, generator=generator) + labels, "keys": ["a", "b"]}
    scales = trainer._get_deep_supervision_scales() or [[1] * len(patch)]
    sizes = [[round(n * s) for n, s in zip(patch, scale, strict=True)] for scale in scales]
    targets = [torch.nn.functional.interpolate(labels.float(), size).to(torch.int16) for size in sizes]
    return {**batch, "target": targets if trainer.enable_deep_supervision else targets[0]}


# --- settings that are read ------------------------------------------------------------------------------------------


def result(trainer) -> dict[str, torch.Tensor]:
    """Weights after two steps, and a prediction."""
    torch.manual_seed(4)
    trainer.on_train_epoch_start()
    for _ in range(2):
        trainer.train_step(make_batch(trainer))
    weights = {k: v for k, v in trainer.network.state_dict().items() if isinstance(v, torch.Tensor)}
    trainer.network.eval()
    trainer.set_deep_supervision_enabled(False)
    with torch.inference_mode():
        return {**weights, "prediction": trainer.network(make_batch(trainer)["data"][:1])}


@pytest.mark.parametrize("recipe", ["nnunet", "paper"])
@pytest.mark.parametrize("name", TRAINERS)
def test_settings_that_a_trainer_does_not_read_change_nothing(make, name, recipe):
    cls = trainer_class(name)
    assert cls.reads() <= set(flat(DiffusionSettings()))
    section = other_values(set(flat(DiffusionSettings())) - cls.reads())
    assert section
    own = {"recipe": recipe} if "recipe" in cls.reads() else {}
    hidiff = {**section.pop("hidiff", {}), **SMALL} if name == "HiDiff" else section.pop("hidiff", SMALL)
    plain = result(make(cls, hidiff=SMALL if name == "HiDiff" else {}, **own))
    changed = result(make(cls, hidiff=hidiff, **section, **own))
    assert plain.keys() == changed.keys()
    for key, value in plain.items():
        assert torch.equal(value, changed[key]), key


@pytest.mark.parametrize("name", TRAINERS)
def test_settings_without_effect_are_named_in_the_log(make, name):
    trainer = make(trainer_class(name), hidiff=SMALL, gaussian={"steps": 5}, score={"weight": 0.25})
    said = f"{type(trainer).__name__} does not read these settings of the plans, they have no effect: "
    told = next((line.split(said)[1] for line in log_of(trainer).splitlines() if said in line), "")
    expected = [
        "gaussian.steps=5" if "gaussian.steps" not in trainer.reads() else None,
        "score.weight=0.25" if name != "RecycleScore" else None,
        "hidiff.refiner_width=4" if name != "HiDiff" else None,
    ]
    for text in filter(None, expected):
        assert text in told
    assert ("gaussian.steps=5 (it reads hidiff.steps)" in told) == (name == "HiDiff")
    assert ("score.weight" in told) == (name != "RecycleScore")
    assert ("refiner_width" in told) == (name != "HiDiff")


def test_settings_of_an_earlier_version_are_named_in_the_log(make):
    trainer = make(trainer_class("RecycleXT"), step_spacing="low", mixture={"recycle_share": 0.25})
    log = log_of(trainer)
    assert "Setting step_spacing = 'low' does nothing since version 0.2" in log
    assert "Setting mixture = {'recycle_share': 0.25} does nothing since version 0.2" in log
    assert trainer.settings.gaussian.step_spacing == "trailing"
    assert "Settings of version 0.1 have new names: step_spacing -> gaussian.*" in log


def test_default_plans_say_nothing_of_settings(make):
    trainer = make(trainer_class("RecycleXT"), transformer_heads=2, hidiff={})
    assert "does not read" not in log_of(trainer)


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "expected"), [("3", 3), (" 2 ", 2), ("2,4", 2), ("", 7), ("0", 7), ("many", 7), (None, 7)]
)
@pytest.mark.parametrize("name", ["RecycleXT", "HiDiff", "Baseline"])
def test_the_limit_of_threads_is_honoured_on_a_cpu(make, monkeypatch, name, variable, expected):
    """nnUNetv2_train sets as many as there are processors before it makes the trainer."""
    if variable is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        trainer = make(trainer_class(name))
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
    assert (f"CPU threads: {expected}, as OMP_NUM_THREADS says" in log_of(trainer)) == (expected != 7)


# --- one process a fold ----------------------------------------------------------------------------------------------


def test_a_fold_is_trained_by_one_process(make, monkeypatch):
    trainer, ran = make(trainer_class("RecycleXT")), []
    lock = Path(trainer.output_folder) / LOCK
    monkeypatch.setattr(nnUNetTrainer, "run_training", lambda self: ran.append(lock.exists()))
    with locked(lock, "a training"), pytest.raises(LockedError, match=rf"fold_all: a training .*{os.getpid()}"):
        trainer.run_training()
    assert ran == []
    lock.write_text("999999999\n")  # left by a process that was killed
    trainer.run_training()
    assert ran == [True]
    assert not lock.exists()


def test_a_lock_is_freed_by_a_training_that_fails(make, monkeypatch):
    trainer = make(trainer_class("Baseline"))
    monkeypatch.setattr(nnUNetTrainer, "run_training", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.run_training()
    assert not (Path(trainer.output_folder) / LOCK).exists()


def test_other_processes_of_one_training_and_validations_are_not_locked_out(make, monkeypatch):
    trainer, ran = make(trainer_class("RecycleXT")), []
    monkeypatch.setattr(nnUNetTrainer, "run_training", lambda self: ran.append(1))
    file = Path(trainer.output_folder) / "checkpoint_final.pth"
    trainer.save_checkpoint(str(file))
    with locked(Path(trainer.output_folder) / LOCK, "a training"):
        make(trainer_class("RecycleXT")).load_checkpoint(str(file))  # --val
        trainer.local_rank = 1
        trainer.run_training()
    assert ran == [1]


# --- settings of a continued training --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "before", "after", "told"),
    [
        ("RecycleXT", {}, {"gaussian": {"timesteps": 500}}, "gaussian.timesteps 1001 -> 500"),
        ("RecycleXT", {}, {"beta_end": 0.03}, r"gaussian.betas \[0.0001, 0.02\] -> \[0.0001, 0.03\]"),
        ("RecycleXT", {}, {"gaussian": {"training_steps": 5}}, "gaussian.training_steps None -> 5"),
        ("RecycleXT", {}, {"recipe": "nnunet"}, "recipe paper -> nnunet"),
        ("RecycleXT", {"time_sampling": "importance"}, {}, "gaussian.time_sampling importance -> uniform"),
        ("RecycleXT", {}, {"transformer_layers": 0}, "transformer_layers 1 -> 0"),
        ("RecycleXT", {}, {"mask_encoding": "analog-bits"}, "mask_encoding one-hot -> analog-bits"),
        ("HiDiff", {"hidiff": SMALL}, {"hidiff": {**SMALL, "timesteps": 20}}, "hidiff.timesteps 10 -> 20"),
        ("HiDiff", {"hidiff": SMALL}, {"hidiff": {**SMALL, "binarized": False}}, "hidiff.binarized True -> False"),
        ("RecycleScore", {}, {"score": {"latent_channels": 4}}, "score.latent_channels 8 -> 4"),
    ],
)
@pytest.mark.parametrize("continue_training", [True, False], ids=["--c", "--val"])
def test_another_process_is_refused_by_name(make, tmp_path, name, before, after, told, continue_training):
    cls, file = trainer_class(name), tmp_path / "checkpoint_latest.pth"
    make(cls, **before).save_checkpoint(str(file))
    trainer = make(cls, continue_training=continue_training, **after)
    weights = {k: v.clone() for k, v in trainer.network.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=f"checkpoint_latest.pth: the plans have changed .*: {told}.* set them back"
    ):
        trainer.load_checkpoint(str(file))
    assert all(torch.equal(value, weights[key]) for key, value in trainer.network.state_dict().items())


def saved_with(make, file, dataset=None, configuration=None, plans=None, cls=None):
    """A checkpoint with other values of dataset.json, of the configuration or of the plans than ``make`` has now."""
    trainer = make(cls or trainer_class("RecycleXT"))
    arguments = copy.deepcopy({k: v for k, v in trainer.my_init_kwargs.items() if k != "device"})
    for place, values in (
        (arguments["dataset_json"], dataset),
        (arguments["plans"]["configurations"]["only"], configuration),
        (arguments["plans"], plans),
    ):
        for key, value in (values or {}).items():
            place.pop(key, None)
            if value is not None:
                place[key] = value
    trainer.my_init_kwargs = {**trainer.my_init_kwargs, **arguments}
    trainer.save_checkpoint(str(file))
    return str(file)


LABELS = [
    ({"background": 0, "left part": 2, "right part": 1}, "label 'left part' 2 -> 1, label 'right part' 1 -> 2"),
    ({"background": 0, "liver": 1, "right part": 2}, "label 'liver' 1 -> None, label 'left part' None -> 1"),
    ({"background": 0, "left part": 1, "right part": 3}, "label 'right part' 3 -> 2"),
    ({"background": 0, "left part": 1, "right part": 2, "ignore": 3}, "label 'ignore' 3 -> None"),
    ({"background": 0, "left part": [1, 2], "right part": 2}, r"label 'left part' \[1, 2\] -> 1"),
]


@pytest.mark.parametrize("name", ["RecycleXT", "HiDiff", "Baseline"])
@pytest.mark.parametrize(("labels", "told"), LABELS)
def test_other_labels_are_refused_by_name(make, tmp_path, name, labels, told):
    cls = trainer_class(name)
    file = saved_with(make, tmp_path / "checkpoint_latest.pth", {"labels": labels}, cls=cls)
    trainer = make(cls, continue_training=True)
    weights = {k: v.clone() for k, v in trainer.network.state_dict().items()}
    said = rf"latest.pth: dataset.json has changed .*: {told}\. .* Dataset903_Random, or train anew .*warm-start"
    with pytest.raises(CheckpointError, match=said):
        trainer.load_checkpoint(file)
    assert all(torch.equal(value, weights[key]) for key, value in trainer.network.state_dict().items())


@pytest.mark.parametrize("key", ["channel_names", "modality"])
def test_other_channels_are_refused_by_name(make, tmp_path, key):
    file = saved_with(make, tmp_path / "checkpoint_latest.pth", {"channel_names": None, key: {"0": "CT"}})
    with pytest.raises(CheckpointError, match=r"dataset.json has changed .*: channel '0' 'CT' -> 'MR'"):
        make(trainer_class("RecycleXT"), continue_training=True).load_checkpoint(file)


@pytest.mark.parametrize(
    "dataset",
    [
        {"labels": {"right part": 2, "background": 0, "left part": 1}},
        {"labels": {"background": 0, "left part": "1", "right part": [2]}},
        {"labels": None}, {"channel_names": None}, {"labels": None, "channel_names": None, "file_ending": None},
        {"regions_class_order": [2, 1]}, {"numTraining": 99},
    ],
)  # fmt: skip
def test_the_order_of_labels_and_what_is_not_there_are_no_difference(make, tmp_path, dataset):
    file = saved_with(make, tmp_path / "checkpoint_latest.pth", dataset)
    trainer = make(trainer_class("RecycleXT"), continue_training=True)
    trainer.load_checkpoint(file)
    assert "changed since" not in log_of(trainer)


REGIONS = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}


@pytest.mark.parametrize(
    ("new", "told"),
    [
        ({}, []),
        ({"labels": {"whole": (2, 1), "core": [2], "background": 0}, "regions_class_order": (1, 2)}, []),
        ({"labels": {"background": 0, "core": 2, "whole": [1, 2]}}, ["order of the regions"]),
        ({"regions_class_order": [2, 1]}, ["regions_class_order [1, 2] -> [2, 1]"]),
        ({"labels": {"background": 0, "whole": [1, 2, 3], "core": 2}}, ["label 'whole' [1, 2] -> [1, 2, 3]"]),
    ],
)
def test_the_order_of_regions_is_that_of_the_outputs(new, told):
    found = dataset_changes(REGIONS, {**REGIONS, **new})
    assert len(found) == len(told)
    assert all(text.startswith(start) for text, start in zip(found, told, strict=True))


ARCHITECTURE = make_plans((8, 12, 8), [1.0] * 3)["configurations"]["only"]["architecture"]
RELU = {**ARCHITECTURE, "arch_kwargs": {**ARCHITECTURE["arch_kwargs"], "nonlin": "torch.nn.ReLU"}}
CUBIC = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("spacing", [2.0, 1.0, 1.0], r"spacing \[2.0, 1.0, 1.0\] -> \[1.0, 1.0, 1.0\]"),
        ("normalization_schemes", ["CTNormalization"], r"schemes \['CTNormalization'\] -> \['ZScoreNormalization'\]"),
        ("use_mask_for_norm", [True], r"use_mask_for_norm \[True\] -> \[False\]"),
        ("preprocessor_name", "Other", "preprocessor_name 'Other' -> 'DefaultPreprocessor'"),
        ("resampling_fn_data", "other", "resampling_fn_data 'other' -> 'resample"),
        ("resampling_fn_seg_kwargs", CUBIC, "resampling_fn_seg_kwargs.is_seg False -> True, .*order 3 -> 1"),
        ("architecture", RELU, "architecture.arch_kwargs.nonlin 'torch.nn.ReLU' -> 'torch.nn.LeakyReLU'"),
    ],
)
def test_other_inputs_or_another_network_are_refused_by_name(make, tmp_path, key, value, told):
    file = saved_with(make, tmp_path / "checkpoint_latest.pth", configuration={key: value})
    with pytest.raises(CheckpointError, match=f"the plans have changed .*: .*{told}.* set them back in tiny"):
        make(trainer_class("RecycleXT"), continue_training=True).load_checkpoint(file)


def test_other_axes_are_refused_by_name(make, tmp_path):
    file = saved_with(make, tmp_path / "checkpoint_latest.pth", plans={"transpose_forward": [2, 1, 0]})
    with pytest.raises(CheckpointError, match=r"transpose_forward \[2, 1, 0\] -> \[0, 1, 2\]"):
        make(trainer_class("RecycleXT"), continue_training=True).load_checkpoint(file)


def test_other_sizes_are_told(make, tmp_path):
    sizes = {"patch_size": [16, 12, 8], "batch_size": 3, "batch_dice": True}
    file = saved_with(make, tmp_path / "checkpoint_latest.pth", configuration=sizes)
    trainer = make(trainer_class("RecycleXT"), continue_training=True, num_epochs=7)
    trainer.load_checkpoint(file)
    told = next(line for line in log_of(trainer).splitlines() if "settings changed since the checkpoint" in line)
    for text in ("num_epochs", "patch_size [16, 12, 8] -> [8, 12, 8]", "batch_size 3 -> 2", "batch_dice True -> False"):
        assert text in told


@pytest.mark.parametrize("key", ["normalization_schemes", "preprocessor_name", "resampling_fn_data", "patch_size"])
def test_what_a_checkpoint_lacks_is_not_compared(make, tmp_path, key):
    file = saved_with(make, tmp_path / "checkpoint_latest.pth", configuration={key: None})
    trainer = make(trainer_class("RecycleXT"), continue_training=True)
    trainer.load_checkpoint(file)
    assert "changed since" not in log_of(trainer)


def test_other_changes_are_told_and_kept(make, tmp_path):
    cls, file = trainer_class("RecycleXT"), tmp_path / "checkpoint_latest.pth"
    make(cls, num_epochs=4).save_checkpoint(str(file))
    trainer = make(cls, continue_training=True, num_epochs=2, samples=3, hidiff={"timesteps": 7, "steps": 1})
    trainer.load_checkpoint(str(file))
    told = next(line for line in log_of(trainer).splitlines() if "settings changed since the checkpoint" in line)
    assert "num_epochs 4 -> 2" in told
    assert "samples 1 -> 3" in told
    assert "hidiff" not in told, "it is not read"
    trainer.save_checkpoint(str(file))
    plans = torch.load(file, weights_only=False)["init_args"]["plans"]
    assert plans["configurations"]["only"]["diffusion"]["samples"] == 3


def test_without_changes_nothing_is_told(make, tmp_path):
    cls, file = trainer_class("RecycleXT"), tmp_path / "checkpoint_latest.pth"
    make(cls).save_checkpoint(str(file))
    trainer = make(cls, continue_training=True)
    trainer.load_checkpoint(str(file))
    assert "settings changed" not in log_of(trainer)


def test_settings_that_cannot_be_read_are_told(make, tmp_path):
    """Of a version with other settings; the network decides then, as ever."""
    cls, file = trainer_class("RecycleXT"), tmp_path / "checkpoint_latest.pth"
    trainer = make(cls)
    trainer.my_init_kwargs["plans"]["configurations"]["only"]["diffusion"]["of_the_future"] = 1
    trainer.save_checkpoint(str(file))
    trainer = make(cls, continue_training=True)
    trainer.load_checkpoint(str(file))
    assert "its settings cannot be read" in log_of(trainer)
    assert "of_the_future" in log_of(trainer)


@pytest.mark.parametrize("name", TRAINERS)
def test_what_shapes_the_weights_is_fixed(make, name):
    """A network with other values of all settings that may change has weights of the same shapes."""
    cls = trainer_class(name)
    section = other_values(cls.reads() - FIXED - {"hidiff.segmentor", "hidiff.collaborative"})
    section.setdefault("hidiff", {}).update(SMALL)
    plain, changed = make(cls, hidiff=SMALL), make(cls, **section)
    shapes = [{k: v.shape for k, v in t.network.state_dict().items()} for t in (plain, changed)]
    assert shapes[0] == shapes[1]


# --- the end of a training -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["RecycleXT", "HiDiff", "Baseline"])
@pytest.mark.parametrize(
    ("dice", "said"),
    [
        ([[0.5, 0.0]] * 3, "Never found in the validation patches of the last 3 epochs: right part. Was the training"),
        ([[0.0, float("nan")]], "of the last 1 epochs: left part, right part."),
        ([[0.5, 0.0]] * 6 + [[0.5, 0.01]], None),
        ([[0.5, 0.2]] * 4 + [[0.5, 0.0]] * 5, "of the last 5 epochs: right part."),
    ],
)
def test_the_end_names_classes_that_are_never_found(make, name, dice, said):
    trainer = make(trainer_class(name), hidiff=SMALL)
    trainer.dataloader_train = trainer.dataloader_val = None
    for epoch, values in enumerate(dice):
        trainer.logger.log("dice_per_class_or_region", values, epoch)
        if name == "HiDiff":
            for kept in trainer.pseudo_dice.values():
                kept.append(values)
    trainer.on_train_end()
    log = log_of(trainer)
    assert ("Never found" in log) == (said is not None)
    if said:
        assert said in log.split("Training done.")[1]


# --- labels ----------------------------------------------------------------------------------------------------------


class Cases:
    def __init__(self, cases: dict[str, set[int]]):
        self.identifiers, self.cases = list(cases), cases

    def load_case(self, case):
        return None, np.array(sorted(self.cases[case]), np.int8).reshape(1, 1, 1, -1), None, {}


@pytest.mark.parametrize("name", ["RecycleXT", "HiDiff"])
def test_labels_of_the_training_cases_are_looked_at_when_it_starts(make, monkeypatch, name):
    trainer = make(trainer_class(name), hidiff=SMALL)
    split = [Cases({"a": {0, 1}, "b": {0}}), Cases({"c": {0, 1, 2}})]
    monkeypatch.setattr(nnUNetTrainer, "get_tr_and_val_datasets", lambda self: tuple(split))
    trainer.get_tr_and_val_datasets()
    assert "WARNING: none of the 2 training cases has right part: it cannot be learnt" in log_of(trainer)
    split[0] = Cases({"a": {-1, 0}})
    with pytest.raises(ValueError, match=r"no training case in .* has any foreground"):
        trainer.get_tr_and_val_datasets()
    split[0], split[1] = Cases({"a": {0, 1}}), Cases({"c": {0, 7}})
    with pytest.raises(ValueError, match=r"case c .* label 7"):
        trainer.get_tr_and_val_datasets()
    trainer.local_rank = 1  # the first process looks
    trainer.get_tr_and_val_datasets()


def test_merit_reads_its_own_settings():
    reads = trainer_class("HiDiffMERIT").reads()
    assert reads <= set(flat(DiffusionSettings()))
    assert trainer_class("HiDiff").reads() ^ reads == {
        "hidiff.merit",
        "hidiff.merit_weights",
    }
