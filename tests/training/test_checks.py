"""Behaviour of the looks at plans, labels, images and checkpoints."""

import copy
import json
import os
import pickle
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import nn

from nnunetv2_diffusion.checkpoints import CheckpointError, check_checkpoint, load_checkpoint_file
from nnunetv2_diffusion.networks import UnsupportedArchitectureError
from nnunetv2_diffusion.plans_content import PlansContentError, foreground_labels
from nnunetv2_diffusion.settings import SettingsError
from nnunetv2_diffusion.training.checks import (
    absent_classes,
    check_images,
    check_label_numbers,
    check_labels,
    check_plans,
    never_found,
)
from nnunetv2_diffusion.training.label_scan import scan_labels

# --- plans -----------------------------------------------------------------------------------------------------------


CLASSES_JSON = {"labels": {"background": 0, "a": 1, "b": 2}}
REGIONS_JSON = {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}


def make_plans(architecture: str = "PlainConvUNet", diffusion: dict | None = None) -> dict:
    blocks = "n_conv_per_stage" if architecture == "PlainConvUNet" else "n_blocks_per_stage"
    arguments = {"n_stages": 2, "features_per_stage": [4, 8], "conv_op": "torch.nn.modules.conv.Conv2d"}
    arguments |= {"norm_op": "torch.nn.InstanceNorm2d", "norm_op_kwargs": {"affine": True}}
    arguments |= {"kernel_sizes": [[3, 3]] * 2, "strides": [[1, 1], [2, 2]], blocks: [1, 1]}
    configuration = {
        "patch_size": [8, 8],
        "batch_size": 2,
        "spacing": [1.0, 1.0],
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{architecture}",
            "arch_kwargs": {**arguments, "n_conv_per_stage_decoder": [1]},
            "_kw_requires_import": ["conv_op", "norm_op"],
        },
    }
    if diffusion is not None:
        configuration["diffusion"] = diffusion
    return {
        "plans_name": "somePlans",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"2d": configuration, "child": {"inherits_from": "2d"}},
    }


@pytest.mark.parametrize(
    ("forward", "backward", "fits"),
    [
        ([2, 0, 1], [1, 2, 0], True), ([2, 1, 0], [2, 1, 0], True), ([2, 0, 1], [2, 0, 1], False),
        ([2, 1, 0], [0, 1, 2], False), ([0, 0, 1], [0, 1, 2], False), ([0, 1, 2], None, False),
    ],
)  # fmt: skip
def test_axes_that_are_not_brought_back_are_refused(forward, backward, fits):
    plans = {**make_plans(), "transpose_forward": forward, "transpose_backward": backward}
    with nullcontext() if fits else pytest.raises(PlansContentError, match=r"somePlans: transpose_\w+ of the plans"):
        check_plans(plans, "2d", CLASSES_JSON)


@pytest.mark.parametrize("architecture", ["PlainConvUNet", "ResidualEncoderUNet"])
@pytest.mark.parametrize("diffusion", [None, {}, {"steps": 3, "recipe": "paper"}])
@pytest.mark.parametrize("configuration", ["2d", "child"])
def test_plans_of_nnunet_pass(architecture, diffusion, configuration):
    check_plans(make_plans(architecture, diffusion), configuration, CLASSES_JSON)


@pytest.mark.parametrize("configuration", ["2d", "child"])
def test_a_typo_in_the_settings_is_named_with_its_place(configuration):
    with pytest.raises(SettingsError, match=rf"configuration {configuration} of somePlans.*'step'.*'gaussian\.steps'"):
        check_plans(make_plans(diffusion={"step": 3}), configuration, CLASSES_JSON)


def test_an_unsupported_architecture_is_named_with_its_place():
    with pytest.raises(UnsupportedArchitectureError, match=r"configuration 2d of somePlans: .*\.ResUNetX, .*PlainConv"):
        check_plans(make_plans("ResUNetX"), "2d", CLASSES_JSON)


@pytest.mark.parametrize("configuration", ["2d", "child"])
def test_bits_of_class_numbers_are_refused_for_regions(configuration):
    plans = make_plans(diffusion={"mask_encoding": "analog-bits"})
    check_plans(plans, configuration, CLASSES_JSON)
    with pytest.raises(SettingsError, match=rf"configuration {configuration} of somePlans: mask_encoding.*'one-hot'"):
        check_plans(plans, configuration, REGIONS_JSON)


def test_plans_are_left_alone():
    plans = make_plans(diffusion={"steps": 3})
    copied = copy.deepcopy(plans)
    check_plans(plans, "child", CLASSES_JSON)
    assert plans == copied


# --- labels ----------------------------------------------------------------------------------------------------------

CLASSES = LabelManager({"background": 0, "organ": 1, "lesion": 2}, None)
SPARSE = LabelManager({"background": 0, "organ": 1, "lesion": 2, "ignore": 3}, None)
REGIONS = LabelManager({"background": 0, "whole": (1, 2), "core": 2, "ignore": 3}, [1, 2])


class Dataset:
    """What the check needs of nnU-Net's preprocessed data set."""

    def __init__(self, segmentations: dict[str, np.ndarray]):
        self.identifiers = list(segmentations)
        self.segmentations = segmentations

    def load_case(self, identifier):
        segmentation = self.segmentations[identifier]
        return np.zeros_like(segmentation, dtype=np.float32), segmentation, None, {}


def make_dataset(*odd: int, dtype: type = np.int8, at: tuple = (0, -1, -1, -1)) -> Dataset:
    """Cases a, b, ... of labels -1 .. 2, each with one odd voxel."""
    cases = {}
    for name, label in zip("abcdef", odd, strict=False):
        cases[name] = np.random.default_rng(0).integers(-1, 3, (1, 4, 5, 6)).astype(dtype)
        cases[name][at] = label
    return Dataset(cases)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.float32])
@pytest.mark.parametrize("labels", [CLASSES, SPARSE, REGIONS], ids=["classes", "ignore", "regions"])
def test_known_labels_pass(labels, dtype):
    check_labels([make_dataset(-1, 0, dtype=dtype), make_dataset(1, 2, dtype=dtype)], labels, "folder", False)


@pytest.mark.parametrize("labels", [SPARSE, REGIONS], ids=["classes", "regions"])
def test_the_ignore_label_is_known_where_there_is_one(labels):
    check_labels([make_dataset(3)], labels, "folder", False)
    with pytest.raises(ValueError, match="case a in folder: the segmentation holds label 3"):
        check_labels([make_dataset(3)], CLASSES, "folder", False)


@pytest.mark.parametrize("at", [(0, 0, 0, 0), (0, 2, 3, 4), (0, -1, -1, -1)])
@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.float32])
@pytest.mark.parametrize("label", [5, 100, -2])
def test_an_unknown_label_is_named_with_its_case(label, dtype, at):
    datasets = [make_dataset(1, 2), make_dataset(0, 1, label, dtype=dtype, at=at)]
    with pytest.raises(ValueError, match=rf"case c in some/folder: the segmentation holds label {label}, "):
        check_labels(datasets, SPARSE, "some/folder", False)


def test_the_error_lists_the_expected_labels():
    with pytest.raises(ValueError, match=r"expected \[0, 1, 2, 3\]"):
        check_labels([make_dataset(5)], SPARSE, "folder", False)


def test_labels_of_2d_cases_are_seen():
    dataset = Dataset({"a": np.zeros((1, 1, 8, 9), np.int8)})
    check_labels([dataset], CLASSES, "folder", False)
    dataset.segmentations["a"][0, 0, 7, 8] = 9
    with pytest.raises(ValueError, match="label 9"):
        check_labels([dataset], CLASSES, "folder", False)


def test_colours_of_a_palette_are_named_before_training():
    """What nnU-Net's preprocessing makes of a PNG of mode P; the first channel alone may look like labels."""
    colours = Dataset({"us_1": np.zeros((3, 1, 8, 9), np.int8)})
    with pytest.raises(ValueError, match=r"case us_1: the segmentation has 3 channels.*PNG of mode P"):
        check_labels([colours], CLASSES, "folder", False)


def test_labels_of_every_case_are_returned():
    found = check_labels([make_dataset(1), Dataset({"z": np.zeros((1, 2, 3, 4), np.int8)})], CLASSES, "folder", False)
    assert found == {"a": {-1, 0, 1, 2}, "z": {0}}


@pytest.mark.parametrize(
    ("labels", "wrong"),
    [
        ({"background": 0, "a": 1, "b": 3}, r"\[3\]"),
        ({"background": 0, "a": 2}, r"\[2\]"),
        ({"background": 0, "a": 1, "b": 4, "c": 5, "d": 9}, r"\[4, 9\]"),
        ({"background": 0, "mask": 255}, r"\[255\]"),
    ],
)
def test_labels_with_a_hole_are_refused_before_anything_is_written(labels, wrong):
    expected = (
        rf"^Labels must be in consecutive order \(0, 1, 2, \.\.\.\)\. The labels {wrong} do not satisfy this rest"
    )
    with pytest.raises(ValueError, match=expected):
        check_plans(make_plans(), "2d", {"labels": labels})


def test_they_are_refused_in_nnunets_words(tmp_path):
    """What stands before the first colon is what its own check of a data set says."""
    from nnunetv2.experiment_planning import verify_dataset_integrity

    source = Path(verify_dataset_integrity.__file__).read_text()
    with pytest.raises(ValueError, match="consecutive") as refusal:
        check_label_numbers(LabelManager({"background": 0, "a": 2}, None))
    before, after = str(refusal.value).split(" [2] ")
    assert before in source
    assert after.split(".")[0] in source


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "a": 1},
        {"b": 2, "background": 0, "a": 1},
        {"background": 0, "a": 1, "ignore": 2},
        {"background": 0, "a": [1], "b": [2]},
    ],
)
def test_consecutive_labels_pass_in_any_order(labels):
    check_plans(make_plans(), "2d", {"labels": labels})


def test_regions_of_labels_with_a_hole_pass():
    """nnU-Net trains on them: regions have no number of their own."""
    regions = {"labels": {"background": 0, "whole": [1, 4], "core": [4]}, "regions_class_order": [1, 4]}
    check_plans(make_plans(), "2d", regions)


def test_names_of_heads_are_in_the_order_of_the_network():
    assert list(foreground_labels({"labels": {"b": 2, "background": 0, "a": 1, "ignore": 3}})) == ["a", "b"]
    assert list(foreground_labels({"labels": {"background": 0, "a": [1], "b": 2}})) == ["a", "b"]
    assert list(foreground_labels({"labels": REGIONS.label_dict})) == ["whole", "core"]


@pytest.mark.parametrize(
    ("labels", "found", "absent"),
    [
        (CLASSES, [{0, 1}, {-1, 0, 2}], []),
        (CLASSES, [{0, 1}, {0}], ["lesion"]),
        (SPARSE, [{0, 2, 3}], ["organ"]),
        (REGIONS, [{0, 1}], ["core"]),
        (REGIONS, [{0}, {2}], []),
    ],
)
def test_classes_that_no_training_case_has_are_named(labels, found, absent):
    assert absent_classes(found, labels, "folder") == absent


@pytest.mark.parametrize("labels", [CLASSES, SPARSE, REGIONS], ids=["classes", "ignore", "regions"])
@pytest.mark.parametrize("found", [[{0}, {-1, 0}], [{0, 3}], []], ids=["background", "ignored", "no case"])
def test_no_foreground_at_all_is_an_error(labels, found):
    with pytest.raises(ValueError, match="no training case in some/folder has any foreground"):
        absent_classes(found, labels, "some/folder")


# --- what is remembered of labels ------------------------------------------------------------------------------------


class Stored(Dataset):
    """A data set whose segmentations lie in files; counts how often one is loaded."""

    def __init__(self, folder: Path, segmentations: dict[str, np.ndarray]):
        super().__init__(segmentations)
        self.source_folder, self.loaded = str(folder), []
        for case, segmentation in segmentations.items():
            np.savez(folder / f"{case}.npz", seg=segmentation)

    def load_case(self, identifier):
        self.loaded.append(identifier)
        return super().load_case(identifier)


@pytest.fixture
def stored(tmp_path) -> Stored:
    folder = tmp_path / "nnUNetPlans_2d"
    folder.mkdir()
    return Stored(folder, {"a": np.zeros((1, 1, 4, 5), np.int8), "b": np.ones((1, 1, 4, 5), np.int8)})


def test_every_file_is_looked_at_once(stored, tmp_path):
    cache = tmp_path / "label_scan.json"
    for expected in (["a", "b"], []):
        stored.loaded.clear()
        assert scan_labels([stored], False, cache) == {"a": {0}, "b": {1}}
        assert stored.loaded == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["label_scan.json", "nnUNetPlans_2d"]


def test_a_file_that_changed_is_looked_at_again(stored, tmp_path):
    cache, file = tmp_path / "label_scan.json", tmp_path / "nnUNetPlans_2d" / "b.npz"
    scan_labels([stored], False, cache)
    for change in (lambda: os.utime(file, ns=(1, 1)), lambda: file.write_bytes(b"longer" * 1000)):
        stored.segmentations["b"] = stored.segmentations["b"] + 1
        change()
        stored.loaded.clear()
        assert scan_labels([stored], False, cache)["b"] == {int(stored.segmentations["b"].max())}
        assert stored.loaded == ["b"]


def test_remembered_labels_are_checked_as_well(stored, tmp_path):
    """Against dataset.json as it is now."""
    cache = tmp_path / "label_scan.json"
    stored.segmentations["b"] += 1
    check_labels([stored], CLASSES, "folder", False, cache)
    with pytest.raises(ValueError, match="case b in folder: the segmentation holds label 2"):
        check_labels([stored], LabelManager({"background": 0, "a": 1}, None), "folder", False, cache)


def test_other_data_sets_of_the_same_cases_are_apart(stored, tmp_path):
    cache, other = tmp_path / "label_scan.json", tmp_path / "nnUNetPlans_3d"
    other.mkdir()
    second = Stored(other, {"a": np.full((1, 2, 4, 5), 2, np.int8)})
    for _ in range(2):
        assert scan_labels([stored], False, cache)["a"] == {0}
        assert scan_labels([second], False, cache)["a"] == {2}
    assert len(json.loads(cache.read_text())) == 3


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", '{"nnUNetPlans_2d/a.npz": 3}', '{"nnUNetPlans_2d/a.npz": [1, "x", [0]], "x": [1, 2, [3.5]]}'],
)
def test_a_damaged_memory_is_made_anew(stored, tmp_path, content):
    cache = tmp_path / "label_scan.json"
    cache.write_text(content)
    assert scan_labels([stored], False, cache) == {"a": {0}, "b": {1}}
    stored.loaded.clear()
    scan_labels([stored], False, cache)
    assert stored.loaded == []


def test_a_folder_that_cannot_be_written_to_is_looked_at_every_time(stored, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    for _ in range(2):
        stored.loaded.clear()
        assert scan_labels([stored], False, tmp_path / "label_scan.json") == {"a": {0}, "b": {1}}
        assert stored.loaded == ["a", "b"]
    assert not (tmp_path / "label_scan.json").exists()


def test_trainings_that_start_at_once_leave_a_whole_memory(stored, tmp_path):
    cache = tmp_path / "label_scan.json"
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: scan_labels([stored], False, cache), range(20)))
    assert all(labels == {"a": {0}, "b": {1}} for labels in found)
    assert len(json.loads(cache.read_text())) == 2


# --- classes that are never found ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dice", "lost"),
    [
        ([], []),
        ([[0.5, 0.1]], []),
        ([[0.5, 0.0]], ["b"]),
        ([[0.5, np.nan], [0.5, 0.0]], ["b"]),
        ([[0.0, np.nan], [0.0, 1e-3]], ["a"]),
        ([[np.nan, np.nan]], ["a", "b"]),
    ],
)
def test_a_class_is_lost_if_no_epoch_found_it(dice, lost):
    assert never_found(dice, ["a", "b"]) == lost


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 2, 8, 9), (3, 1, 4, 5, 6)], ids=["2D", "3D"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_images_that_are_not_finite_are_named(shape, bad):
    images = torch.randn(shape)
    batch = {"keys": np.array(["first", "second", "third"])}
    check_images(batch, images)
    images[(0, *[-1] * (len(shape) - 1))] = bad
    with pytest.raises(ValueError, match="image of case first holds"):
        check_images(batch, images)
    images[(2, *[0] * (len(shape) - 1))] = bad
    with pytest.raises(ValueError, match="image of case first, third holds"):
        check_images(batch, images)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint() -> dict:
    """What nnU-Net's trainer stores, with the types that it stores."""
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.99, nesterov=True)
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {
        "network_weights": {"decoder.seg_layers.0.weight": torch.randn(3, 8, 1, 1), **network.state_dict()},
        "optimizer_state": {**optimizer.state_dict(), "diffusion_time_sampler": {"count": torch.arange(5)}},
        "grad_scaler_state": torch.amp.GradScaler("cpu").state_dict(),
        "logging": {
            "mean_fg_dice": [np.float64(0.5), 0.25],
            "train_losses": [np.float32(-0.125), np.float32(np.nan)],
            "dice_per_class_or_region": [[np.float64(0.5), np.float64(0.25)], [np.float64(np.nan)]],
            "lrs": [0.01],
            "epoch_start_timestamps": [1.5e9],
        },
        "_best_ema": np.float64(0.75),
        "current_epoch": 3,
        "init_args": {
            "plans": {"configurations": {"2d": {"patch_size": [16, 20], "spacing": (1.0, 0.5), "flag": True}}},
            "configuration": "2d",
            "fold": 0,
            "dataset_json": {"labels": {"background": 0, "whole": (1, 2)}, "file_ending": ".nii.gz"},
            "device": torch.device("cpu"),
        },
        "trainer_name": "nnUNetTrainerDiffSeg",
        "inference_allowed_mirroring_axes": (0, 1),
    }


@pytest.fixture
def saved(checkpoint, tmp_path) -> Path:
    path = tmp_path / "checkpoint_final.pth"
    torch.save(checkpoint, path)
    return path


def assert_equal(found, expected) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_equal(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_equal(a, b)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected or (found != found and expected != expected)


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_checkpoint_of_nnunet_is_read_as_it_was_stored(saved, checkpoint, as_type):
    assert_equal(load_checkpoint_file(as_type(saved)), checkpoint)


def test_a_checkpoint_without_grad_scaler_is_read(checkpoint, tmp_path):
    """As written on a CPU, or before the first epoch."""
    checkpoint |= {"grad_scaler_state": None, "_best_ema": None, "inference_allowed_mirroring_axes": None}
    torch.save(checkpoint, tmp_path / "cpu.pth")
    assert_equal(load_checkpoint_file(tmp_path / "cpu.pth"), checkpoint)


def test_reading_leaves_the_file_alone(saved):
    before = saved.read_bytes()
    weights = load_checkpoint_file(saved)["network_weights"]
    weights["decoder.seg_layers.0.weight"].zero_()
    assert saved.read_bytes() == before


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", ["zip", "legacy", "bare pickle"])
@pytest.mark.parametrize("key", ["network_weights", "logging", "other"])
def test_a_pickle_with_code_is_refused_and_not_run(checkpoint, tmp_path, legacy, key):
    path, touched = tmp_path / "evil.pth", tmp_path / "touched"
    checkpoint[key] = {"x": Evil(touched)}
    if legacy == "bare pickle":
        path.write_bytes(pickle.dumps(checkpoint["logging"] | {"x": Evil(touched)}))
        pickle.loads(path.read_bytes())
    else:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=legacy == "zip")
        torch.load(path, weights_only=False)
    assert touched.exists()  # it is dangerous indeed
    touched.unlink()
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_checkpoint_file(path)
    assert not touched.exists()


def test_a_refusal_does_not_advise_to_load_the_file(checkpoint, tmp_path):
    checkpoint["x"] = Evil(tmp_path / "touched")
    torch.save(checkpoint, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError) as refusal:
        load_checkpoint_file(tmp_path / "evil.pth")
    assert "can still be loaded" not in str(refusal.value)
    assert "\x1b" not in str(refusal.value)


def test_allowing_numpy_scalars_lasts_only_for_the_call(saved):
    load_checkpoint_file(saved)
    with pytest.raises(pickle.UnpicklingError, match="scalar"):
        torch.load(saved, weights_only=True)


@pytest.mark.parametrize("share", [0, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_named(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=re.escape(str(saved))):
        load_checkpoint_file(saved)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", bytes(100), bytes(range(256))])
def test_another_file_is_named(tmp_path, content):
    path = tmp_path / "other.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_checkpoint_file(path)


# what is left of a pickle: operations of protocol 2 that do not fit together
BROKEN_PICKLES = {
    "unfinished": b"\x80\x02}",
    "calls what is not there": b"\x80\x02cnowhere\nnothing\n.",
    "reads a memo that was not written": b"\x80\x02h\x05.",
    "ends without a value": b"\x80\x02.",
}


@pytest.mark.parametrize("content", BROKEN_PICKLES.values(), ids=BROKEN_PICKLES.keys())
def test_a_zip_with_a_damaged_pickle_is_named(tmp_path, content):
    path = tmp_path / "damaged.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_checkpoint_file(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    found = {tmp_path / "missing.pth": "no such file", tmp_path: "a folder, expected the file of a checkpoint"}
    for path, what in found.items():
        with pytest.raises(CheckpointError, match=re.escape(f"{path}: {what}")):
            load_checkpoint_file(path)


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], torch.zeros(3)], ids=["dict", "list", "tensor"])
def test_plain_data_of_something_else_is_named(tmp_path, content):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: no 'network_weights' in it")):
        load_checkpoint_file(path)


def test_a_checkpoint_of_this_trainer_and_these_classes_passes(saved):
    check_checkpoint(saved, "nnUNetTrainerDiffSeg", 3)


def test_a_checkpoint_of_another_trainer_is_named(saved):
    expected = rf"{re.escape(str(saved))}: written by trainer nnUNetTrainerDiffSeg, expected nnUNetTrainerRecycleXT"
    with pytest.raises(CheckpointError, match=expected):
        check_checkpoint(saved, "nnUNetTrainerRecycleXT", 3)


def test_a_checkpoint_of_other_classes_is_named(saved):
    expected = rf"{re.escape(str(saved))}: .* 3 classes or regions, dataset.json defines 4"
    with pytest.raises(CheckpointError, match=expected):
        check_checkpoint(saved, "nnUNetTrainerDiffSeg", 4)


def test_a_checkpoint_without_trainer_name_is_named(checkpoint, tmp_path):
    del checkpoint["trainer_name"]
    torch.save(checkpoint, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="written by trainer None"):
        check_checkpoint(tmp_path / "x.pth", "nnUNetTrainerDiffSeg", 3)


def test_the_look_at_a_checkpoint_is_what_the_trainer_does_first(saved, monkeypatch):
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunetv2_diffusion.training import DiffusionTrainer

    trainer = object.__new__(DiffusionTrainer)
    trainer.label_manager = SimpleNamespace(num_segmentation_heads=3)
    loaded = []
    monkeypatch.setattr(nnUNetTrainer, "load_checkpoint", lambda self, name: loaded.append(name))
    with pytest.raises(CheckpointError, match="expected DiffusionTrainer"):
        trainer.load_checkpoint(str(saved))
    assert not loaded


def test_checkpoints_are_read_by_several_threads_at_once(tmp_path):
    file = tmp_path / "checkpoint_final.pth"
    torch.save({"network_weights": {}, "logging": {"mean_fg_dice": [np.float64(0.5)] * 50}}, file)
    with ThreadPoolExecutor(8) as pool:  # PyTorch's list of allowed types is one for all of them
        found = list(pool.map(load_checkpoint_file, [file] * 200))
    assert all(checkpoint["logging"]["mean_fg_dice"][0] == 0.5 for checkpoint in found)
