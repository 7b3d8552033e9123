"""Statistics of samples against brute force on all pairs, their memory, and what is written about them."""

import errno
import json
import math
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_diffusion.inference import sample_statistics as module
from nnunetv2_diffusion.inference.sample_statistics import (
    SampleMasks,
    add_mask_volumes,
    case_summary,
    foreground_labels,
    json_ready,
    mask_volumes,
    rounded,
    volume_unit,
)

LABELS = {"outer": 1, "whole": (1, 2), "absent": 7}
SHAPE = (5, 6, 7)
SPACING = (2.0, 0.5, 3.0)


def label_maps(count, shape=SHAPE, seed=0):
    """Maps that share most voxels, so that Dice is neither 0 nor 1."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 4, shape)
    return [np.where(rng.random(shape) < 0.2, rng.integers(0, 4, shape), base).astype(np.uint8) for _ in range(count)]


def region_masks(maps, labels=LABELS):
    return [np.stack([np.isin(m, values) for values in labels.values()]) for m in maps]


def counted(folder, samples, labels=LABELS, **kwargs):
    with SampleMasks(folder, labels, **kwargs) as masks:
        for sample in samples:
            masks.add(sample)
        return masks.counts()


def brute_force_dice(masks):
    """Mean over the pairs of bool masks that are not both empty."""
    values = []
    for i, a in enumerate(masks):
        for b in masks[:i]:
            size = a.sum() + b.sum()
            values += [2 * (a & b).sum() / size] if size else []
    return np.mean(values) if values else np.nan


@pytest.mark.parametrize("count", [2, 3, 9])
def test_pairwise_dice_and_volumes_equal_brute_force(tmp_path, count):
    maps = label_maps(count)
    counts = counted(tmp_path, maps)
    masks = np.stack(region_masks(maps))
    np.testing.assert_array_equal(counts.voxels, masks.sum((2, 3, 4)).T)
    expected = [brute_force_dice(masks[:, label]) for label in range(len(LABELS))]
    np.testing.assert_allclose(counts.pairwise_dice(), expected, rtol=1e-12)
    assert 0 < counts.pairwise_dice()[0] < 1
    assert np.isnan(counts.pairwise_dice()[2]), "no sample has it"


def test_one_empty_mask_of_two_has_dice_0_and_two_are_no_agreement(tmp_path):
    empty, full = np.zeros(SHAPE, np.uint8), np.ones(SHAPE, np.uint8)
    assert counted(tmp_path, [empty, full], {"a": 1}).pairwise_dice() == 0
    assert np.isnan(counted(tmp_path, [empty, empty], {"a": 1}).pairwise_dice())
    # pairs: empty-empty does not count, empty-full 0 twice
    assert counted(tmp_path, [empty, full, empty], {"a": 1}).pairwise_dice() == 0
    # full-full 1, empty-full 0 twice
    assert counted(tmp_path, [empty, full, full], {"a": 1}).pairwise_dice() == pytest.approx(1 / 3)


@pytest.mark.parametrize("chunk", [1, 2, 13, 210, 10**6])
def test_results_do_not_depend_on_the_size_of_chunks(tmp_path, chunk):
    maps = label_maps(5)
    result = counted(tmp_path, maps, chunk=chunk)
    np.testing.assert_array_equal(result.intersections, counted(tmp_path, maps).intersections)


@pytest.mark.parametrize("labels", [{"a": 300, "b": 65535}, {"a": 255}, {"a": np.int64(4)}])
def test_values_of_labels_may_need_more_than_a_byte(tmp_path, labels):
    values = list(labels.values())
    sample = np.zeros(SHAPE, np.int32)
    sample[0], sample[1:3] = values[0], values[-1]
    counts = counted(tmp_path, [sample, sample], labels)
    np.testing.assert_array_equal(counts.voxels[:, 0], [(sample == v).sum() for v in values])


def test_tensors_and_views_with_swapped_axes_are_taken(tmp_path):
    maps = label_maps(3)
    swapped = [np.ascontiguousarray(m.transpose(2, 0, 1)).transpose(1, 2, 0) for m in maps]
    expected = counted(tmp_path, maps).intersections
    np.testing.assert_array_equal(counted(tmp_path, swapped).intersections, expected)
    np.testing.assert_array_equal(counted(tmp_path, map(torch.from_numpy, maps)).intersections, expected)


def test_more_samples_may_follow_after_counting(tmp_path):
    maps = label_maps(4)
    with SampleMasks(tmp_path, LABELS) as masks:
        for sample in maps[:2]:
            masks.add(sample)
        early = masks.counts()
        for sample in maps[2:]:
            masks.add(sample)
        late = masks.counts()
    np.testing.assert_array_equal(late.intersections[:, :2, :2], early.intersections)
    np.testing.assert_array_equal(late.intersections, counted(tmp_path, maps).intersections)


def peak(folder, count, chunk):
    """Largest number of bytes that python and numpy held."""
    maps = [np.full((40, 50, 20), i % 2, np.uint8) for i in range(2)]
    tracemalloc.start()
    try:
        counted(folder, (maps[i % 2] for i in range(count)), {"a": 1}, chunk=chunk)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_peak_memory_is_the_same_for_2_and_64_samples(tmp_path):
    chunk, pairs = 2**14, 64 * 64 * 8
    peak(tmp_path, 2, chunk)  # what is imported late
    few, many = (peak(tmp_path, count, chunk) for count in (2, 64))
    assert many < 1.05 * few + 3 * pairs  # intersections: all, of a chunk, and in float32
    assert few < 14 * chunk
    assert many < 64 * 40 * 50 * 20 / 4  # far from all masks


def left_in(folder):
    return list(Path(folder).iterdir())


def test_the_file_goes_away_with_the_context_and_with_exceptions(tmp_path):
    def fails():
        with SampleMasks(tmp_path, LABELS) as masks:
            masks.add(label_maps(1)[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert not left_in(tmp_path)
    counted(tmp_path, label_maps(2))
    assert not left_in(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows removes the file when it is closed")
def test_the_file_has_no_name_that_a_killed_process_could_leave(tmp_path):
    with SampleMasks(tmp_path, LABELS) as masks:
        masks.add(label_maps(1)[0])
        assert not left_in(tmp_path)
        assert masks.counts().samples == 1


def test_a_full_disk_is_an_error_that_names_the_folder_and_the_sample_is_not_counted(tmp_path, monkeypatch):
    maps = label_maps(3)
    with SampleMasks(tmp_path, LABELS, chunk=50) as masks:
        masks.add(maps[0])
        write, calls = masks._write, []

        def full(codes):
            calls.append(len(codes))
            if len(calls) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(codes)

        monkeypatch.setattr(masks, "_write", full)
        with pytest.raises(OSError, match=tmp_path.name) as caught:
            masks.add(maps[1])
        assert caught.value.errno == errno.ENOSPC
        assert masks.count == 1
        masks.add(maps[2])  # there is space again: it takes the place of the part
        result = masks.counts()
    np.testing.assert_array_equal(result.intersections, counted(tmp_path, maps[::2]).intersections)
    assert not left_in(tmp_path)


def test_writes_and_reads_that_take_a_part_are_continued(tmp_path, monkeypatch):
    maps = label_maps(3)
    expected = counted(tmp_path, maps).intersections
    with SampleMasks(tmp_path, LABELS) as masks:
        whole = masks._file

        class Short:
            seek, close = whole.seek, whole.close

            def write(self, data):
                return whole.write(data[:7])

            def readinto(self, data):
                return whole.readinto(data[:5])

        masks._file = Short()
        monkeypatch.setattr(module.np, "empty", lambda shape, dtype: np.full(shape, 3, dtype))  # not what was there
        for sample in maps:
            masks.add(sample)
        np.testing.assert_array_equal(masks.counts().intersections, expected)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SampleMasks(tmp_path / "nowhere", LABELS)


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (np.zeros((5, 6, 8), np.uint8), "shape"),
        (np.full(SHAPE, -1), "-1"),
        (np.full(SHAPE, 256), "256"),
        (np.zeros(SHAPE), "float64"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(tmp_path, sample, words):
    with SampleMasks(tmp_path, LABELS) as masks:
        masks.add(label_maps(1)[0])
        with pytest.raises(ValueError, match=words):
            masks.add(sample)
        assert masks.count == 1


@pytest.mark.parametrize(("labels", "words"), [({}, "no foreground"), ({"a": -1}, "-1"), ({"a": 65536}, "65536")])
def test_labels_that_cannot_be_counted_are_refused(tmp_path, labels, words):
    with pytest.raises(ValueError, match=words):
        SampleMasks(tmp_path, labels)


def test_without_samples_there_is_nothing_to_count(tmp_path):
    with SampleMasks(tmp_path, LABELS) as masks, pytest.raises(ValueError, match="no sample"):
        masks.counts()


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        ({"background": 0, "tumour": 2, "organ": [1], "ignore": 3}, None),
        ({"background": 0, "inner": 2, "whole": [1, 2], "ignore": 3}, [2, 1]),
    ],
)
def test_foreground_labels_are_those_of_nnunet_in_the_order_of_its_heads(labels, order):
    manager = LabelManager(labels, order)
    heads = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    found = foreground_labels({"labels": labels})
    assert list(found.values()) == [tuple(np.atleast_1d(head).tolist()) for head in heads]
    assert all(tuple(np.atleast_1d(labels[name])) == values for name, values in found.items())


# what is written


def test_the_summary_has_volumes_in_ml_and_the_agreement_of_the_samples(tmp_path):
    maps = label_maps(9)
    counts = counted(tmp_path, maps)
    summary = case_summary("case_7", counts, SHAPE, SPACING, {"steps": 5, "seed": np.int64(3)}, ["a note"])
    volumes = np.array([(m == 1).sum() for m in maps]) * 3.0 / 1000
    spread = {
        "sd": volumes.std(ddof=1),
        "percentile_5": np.percentile(volumes, 5),
        "percentile_95": np.percentile(volumes, 95),
    }
    found = summary["volumes"]["outer"]
    assert found["mask"] is None
    assert found["mean"] == pytest.approx(volumes.mean(), rel=5e-6)
    assert found["spread"] == pytest.approx(spread, rel=5e-6)
    assert (summary["case"], summary["samples"], summary["volume_unit"]) == ("case_7", 9, "ml")
    dice = dict(zip(LABELS, counts.pairwise_dice(), strict=True))
    known = {name: value for name, value in dice.items() if name != "absent"}
    assert summary["pairwise_dice"].pop("absent") is None
    assert summary["pairwise_dice"] == pytest.approx(known, rel=5e-6)
    assert summary["agreement"] == pytest.approx(np.mean(list(known.values())), rel=5e-6), "over what was found"
    assert summary["settings"] == {"steps": 5, "seed": 3}
    assert summary["notes"] == ["a note", "absent: not found in any sample"]


def test_old_keys_are_kept_for_one_version_and_marked(tmp_path):
    summary = case_summary("a", counted(tmp_path, label_maps(3)), SHAPE, SPACING)
    assert summary["confidence"] == summary["mean_pairwise_dice"] == summary["agreement"]
    for found in summary["volumes"].values():
        assert {key: found[key] for key in ("sd", "percentile_5", "percentile_95")} == found["spread"]
    for key in ("confidence", "mean_pairwise_dice", "sd", "percentile_5", "percentile_95"):
        assert key in summary["definitions"]["deprecated"]
    assert "no confidence" in summary["definitions"]["caution"]


@pytest.mark.parametrize("count", [1, 4])
def test_what_no_sample_holds_has_no_agreement_and_a_note_names_it(tmp_path, count):
    summary = case_summary("a", counted(tmp_path, [np.zeros(SHAPE, np.uint8)] * count), SHAPE, SPACING)
    assert summary["agreement"] is None
    assert set(summary["pairwise_dice"].values()) == {None}
    assert [note for note in summary["notes"] if "not found" in note] == [
        f"{name}: not found in any sample" for name in LABELS
    ]
    assert all(found["mean"] == 0 for found in summary["volumes"].values())


@pytest.mark.parametrize(("flipped", "alike"), [(0, True), (1, True), (40, False)])
def test_samples_that_are_nearly_alike_are_noted(tmp_path, flipped, alike):
    base = np.zeros((10, 10, 10), np.uint8)
    base[2:8] = 1
    other = base.copy()
    other[2].flat[:flipped] = 0
    summary = case_summary("a", counted(tmp_path, [base, other], {"a": 1}), base.shape, SPACING)
    assert any("nearly alike" in note for note in summary["notes"]) is alike
    assert (summary["volumes"]["a"]["spread"]["sd"] == 0) is (flipped == 0)


def test_one_sample_has_no_agreement_and_a_note_says_so(tmp_path):
    summary = case_summary("a", counted(tmp_path, label_maps(1)), SHAPE, SPACING)
    assert summary["agreement"] is None
    assert set(summary["pairwise_dice"].values()) == {None}
    assert summary["volumes"]["outer"]["spread"]["sd"] is None
    assert summary["volumes"]["outer"]["mean"] > 0
    assert summary["notes"] == [module.ONE_SAMPLE, "absent: not found in any sample"]


def test_volumes_of_the_written_mask_are_filled_in(tmp_path):
    mask = label_maps(1)[0]
    summary = case_summary("a", counted(tmp_path, [mask] * 2), SHAPE, SPACING)
    add_mask_volumes(summary, mask_volumes(mask.astype(np.float32), LABELS, SPACING))
    for name, values in LABELS.items():
        expected = np.isin(mask, values).sum() * 3.0 / 1000
        assert summary["volumes"][name]["mask"] == pytest.approx(expected, rel=5e-6)
        assert summary["volumes"][name]["mask"] == summary["volumes"][name]["mean"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.9206666666666669, 0.920667), (1.2345678e-7, 1.23457e-7), (1234.56789, 1234.568), (123456789, 123456789),
        (12345678.0, 12345678.0), (0.0, 0.0), (-0.33333333, -0.333333),
    ],
)  # fmt: skip
def test_numbers_have_six_digits_and_no_count_loses_one(value, expected):
    assert rounded(value) == expected


@pytest.mark.parametrize(
    ("shape", "spacing", "expected"),
    [
        ((4, 5, 6), (5, 0.5, 0.8), (0.002, "ml")),
        ((1, 5, 6), (5, 0.5, 0.8), (0.002, "ml")),  # one slice of a volume
        ((1, 5, 6), (999, 1, 1), (1, "px")),
        ((1, 5, 6), (0.7 * 999, 0.3, 0.7), (1, "px")),
        ((5, 6), (1, 1), (1, "px")),
    ],
)
def test_volumes_are_in_ml_and_those_of_2d_images_in_pixels(shape, spacing, expected):
    size, unit = volume_unit(shape, spacing)
    assert (pytest.approx(size), unit) == expected


def test_the_summary_is_plain_json_with_definitions(tmp_path):
    for count in (1, 3):
        summary = case_summary("a", counted(tmp_path, label_maps(count)), SHAPE, np.array(SPACING))
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary
        assert set(summary["definitions"]) == {"volumes", "pairwise_dice", "agreement", "caution", "deprecated"}


def test_json_ready_converts_what_json_does_not_know():
    value = {
        "a": np.float32(0.5),
        1: (np.int64(2), np.nan, math.inf, None, True, np.bool_(False)),
        "t": torch.tensor([[1.0, math.nan]]),
        "p": Path("x"),
        "n": np.array([1, 2]),
        "z": np.array(3),
    }
    expected = {"a": 0.5, "1": [2, None, None, None, True, False], "t": [[1.0, None]], "n": [1, 2], "z": 3, "p": "x"}
    assert json.loads(json.dumps(json_ready(value), allow_nan=False)) == expected
