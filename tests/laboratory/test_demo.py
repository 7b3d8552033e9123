"""The demo's own parts; the whole of it is marked slow."""

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tifffile
from nnunetv2.experiment_planning.verify_dataset_integrity import check_cases
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.utilities.utils import (
    create_lists_from_splitted_dataset_folder,
    get_identifiers_from_splitted_dataset_folder,
)
from PIL import Image
from skimage import io

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
from tiny_model import make_model

from laboratory.demo import run as demo
from laboratory.demo.options import parse_arguments
from laboratory.demo.phantoms import LABELS, make_phantom, write_phantoms
from laboratory.demo.pipeline import Job, draw_samples, ranges_that_hold
from laboratory.raw_data import RawDataError, check_masks, hold_out
from nnunetv2_diffusion import cli


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "Dataset123_Some"
    write_phantoms(folder, train_cases=8, test_cases=1, seed=3)
    return folder


def test_the_same_seed_makes_the_same_phantom():
    first, again, other = (make_phantom(np.random.default_rng(s)) for s in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].shape != other[0].shape or not np.array_equal(first[0], other[0])


def test_phantoms_have_all_labels_and_no_threshold_solves_them():
    for seed in range(5):
        image, labels = make_phantom(np.random.default_rng(seed))
        assert set(np.unique(labels)) == set(LABELS.values())
        foreground = labels > 0
        best = max(
            2 * (foreground & (image > t)).sum() / (foreground.sum() + (image > t).sum()) for t in range(40, 200, 5)
        )
        assert best < 0.9


def test_everything_labelled_as_organ_is_far_below_the_bound():
    scores = []
    for seed in range(5):
        labels = make_phantom(np.random.default_rng(seed))[1]
        organ = 2 * (labels == 1).sum() / (labels.size + (labels == 1).sum())
        scores.append(organ / 2)  # the lesion's Dice is 0
    assert max(scores) < 0.2 < demo.BOUND


def test_held_out_cases_are_not_in_the_training_part(raw, tmp_path):
    target = tmp_path / "raw" / raw.name
    hold_out(raw, target, test_cases=3, seed=0)
    train, test = ({f.name for f in (target / f"labels{part}").iterdir()} for part in ("Tr", "Ts"))
    assert (len(train), len(test)) == (5, 3)
    assert not train & test
    assert train | test == {f.name for f in (raw / "labelsTr").iterdir()}
    for part, names in (("Tr", train), ("Ts", test)):
        images = {f.name.replace("_0000.nii.gz", ".nii.gz") for f in (target / f"images{part}").iterdir()}
        assert images == names
    assert json.loads((target / "dataset.json").read_text())["numTraining"] == 5


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "dataset.json").unlink(), "dataset.json: no such file"),
        (lambda f: (f / "dataset.json").write_text("{"), "not JSON"),
        (lambda f: next((f / "imagesTr").iterdir()).unlink(), "has a label and no image"),
    ],
)
def test_raw_data_in_another_layout_is_named(raw, tmp_path, damage, said):
    damage(raw)
    with pytest.raises(RawDataError, match=said):
        hold_out(raw, tmp_path / "out", 2, 0)
    assert not (tmp_path / "out").exists()


def pictures(folder, channels=3):
    """A data set in nnU-Net's format for natural images: all colours of a case in one PNG."""
    names = {str(number): "RGBA"[number] for number in range(channels)}
    write_dataset(folder, names, ".png")
    for case in range(6):
        rng = np.random.default_rng(case)
        colours = rng.integers(0, 255, (9, 8, channels), dtype=np.uint8)
        io.imsave(folder / "imagesTr" / f"p{case}_0000.png", colours, check_contrast=False)
        io.imsave(
            folder / "labelsTr" / f"p{case}.png", rng.integers(0, 2, (9, 8), dtype=np.uint8), check_contrast=False
        )


def write_dataset(folder, names, ending, **more):
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    labels = {"background": 0, "blob": 1}
    dataset = {"channel_names": names, "labels": labels, "numTraining": 6, "file_ending": ending, **more}
    (folder / "dataset.json").write_text(json.dumps(dataset))


def read_by_nnunet(folder):
    """Case -> names of its files; they are listed and checked as by nnU-Net's --verify_dataset_integrity."""
    dataset = json.loads((folder / "dataset.json").read_text())
    names = get_identifiers_from_splitted_dataset_folder(str(folder / "imagesTr"), dataset["file_ending"])
    images = create_lists_from_splitted_dataset_folder(str(folder / "imagesTr"), dataset["file_ending"], names, 1)
    reader = determine_reader_writer_from_dataset_json(dataset, images[0][0], verbose=False)
    for name, files in zip(names, images, strict=True):
        label = folder / "labelsTr" / f"{name}{dataset['file_ending']}"
        assert check_cases(files, str(label), len(dataset["channel_names"]), reader)
    return {str(name): [Path(f).name for f in files] for name, files in zip(names, images, strict=True)}


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_in_one_file_are_taken_as_nnunet_takes_them(tmp_path, channels):
    pictures(tmp_path / "Dataset311_Rgb-x", channels)
    hold_out(tmp_path / "Dataset311_Rgb-x", tmp_path / "raw" / "Dataset311_Rgb-x", 1, 0)
    found = read_by_nnunet(tmp_path / "raw" / "Dataset311_Rgb-x")
    assert len(found) == 5
    assert all(files == [f"{name}_0000.png"] for name, files in found.items())


def test_the_spacing_beside_a_3d_tiff_comes_along(tmp_path):
    source, target = tmp_path / "Dataset325_Tif", tmp_path / "raw" / "Dataset325_Tif"
    write_dataset(source, {"0": "em"}, ".tif", overwrite_image_reader_writer="Tiff3DIO")
    for case in range(6):
        for file in (f"imagesTr/v_{case}001_0000.tif", f"labelsTr/v_{case}001.tif"):
            tifffile.imwrite(source / file, np.zeros((4, 5, 6), np.uint8), photometric="minisblack")
        for part in ("imagesTr", "labelsTr"):
            (source / part / f"v_{case}001.json").write_text(json.dumps({"spacing": [2.0, 1.0, 1.0]}))
    hold_out(source, target, 1, 0)
    assert len(read_by_nnunet(target)) == 5
    for part in ("Tr", "Ts"):
        for file in (target / f"images{part}").glob("*.tif"):
            assert Tiff3DIO().read_images([str(file)])[1]["spacing"] == [2.0, 1.0, 1.0]
        for file in (target / f"labels{part}").glob("*.tif"):
            assert Tiff3DIO().read_seg(str(file))[1]["spacing"] == [2.0, 1.0, 1.0]


def test_files_that_dataset_json_names_are_linked(raw, tmp_path):
    """nnU-Net's other layout: images anywhere, under any name."""
    (tmp_path / "elsewhere").mkdir()
    listed = {}
    for label in sorted((raw / "labelsTr").iterdir()):
        case = label.name.removesuffix(".nii.gz")
        image = (raw / "imagesTr" / f"{case}_0000.nii.gz").rename(tmp_path / "elsewhere" / f"scan of {case}.nii.gz")
        listed[case] = {"images": [str(image)], "label": f"labelsTr/{label.name}"}
    (raw / "imagesTr").rmdir()
    dataset = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**dataset, "dataset": listed}))
    hold_out(raw, tmp_path / "raw" / raw.name, 2, 0)
    assert len(read_by_nnunet(tmp_path / "raw" / raw.name)) == 6


def test_too_few_cases_are_named(raw, tmp_path):
    with pytest.raises(RawDataError, match="8 labelled cases, cannot hold out 4"):
        hold_out(raw, tmp_path / "out", 4, 0)


def test_an_existing_folder_is_never_written_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo_output").mkdir()
    assert demo.free_folder("demo_output").name == "demo_output_2"
    with pytest.raises(SystemExit, match="new folder only"):
        demo.main(["--out", str(tmp_path)])
    assert list((tmp_path / "demo_output").iterdir()) == []


@pytest.mark.parametrize(
    ("means", "good"),
    [
        ({"a": 0.9}, True),
        ({"a": 0.5}, False),
        ({"a": 0.80, "b": 0.81}, True),
        ({"a": 0.80, "b": 0.82}, False),
    ],
)
def test_bounds_decide_the_exit_status(means, good, capsys):
    assert demo.judge(means, {}, demo.parse_arguments([])) is good
    assert ("NOT MET" in capsys.readouterr().out) is not good


@pytest.mark.parametrize(("refined", "good"), [(0.799, True), (0.797, False), (0.9, True)])
def test_a_refined_mask_may_not_be_worse_than_the_prior(refined, good, capsys):
    options = demo.parse_arguments(["--trainer", "nnUNetTrainerHiDiff"])
    assert demo.judge({"nnUNetTrainerHiDiff": refined}, {"K = 0": 0.8}, options) is good
    assert "refined - prior" in capsys.readouterr().out


def test_a_command_that_fails_ends_the_demo_with_its_output(tmp_path):
    job = Job(tmp_path, "Dataset501_Demo", parse_arguments([]))
    with pytest.raises(SystemExit, match=r"(?s)ended with status 3; the end of .*failed\.txt:.*the reason"):
        job.run("failed", sys.executable, "-c", "print('the reason'); raise SystemExit(3)")


def test_a_class_that_is_never_found_is_named(capsys):
    demo.print_scores({"some": {"1": np.array([0.5, 0.7]), "2": np.array([0.0, np.nan])}})
    printed = capsys.readouterr().out
    assert "class 1: 0.6000 ± 0.1000" in printed
    assert "class 2 is never found" in printed
    assert "class 1 is never found" not in printed


def test_ranges_that_hold_the_true_volume_are_counted(tmp_path):
    """Two cases of two labels; the truth is at the edge of a range, in it, below and above it."""
    truths, predictions = tmp_path / "labelsTs", tmp_path / "out"
    truths.mkdir()
    (predictions / "uncertainty").mkdir(parents=True)
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[:4], labels[4:6] = 1, 2  # 0.6 and 0.3 ml
    ranges = {"a": ((0.6, 0.7), (0.2, 0.31)), "b": ((0.61, 0.7), (0.1, 0.299999))}
    for case, of_labels in ranges.items():
        nib.save(nib.Nifti1Image(labels, np.diag((1.0, 1.0, 1.5, 1.0))), truths / f"{case}.nii.gz")
        volumes = {
            name: {"spread": {"percentile_5": low, "percentile_95": high}}
            for name, (low, high) in zip(("organ", "lesion"), of_labels, strict=True)
        }
        (predictions / "uncertainty" / f"{case}.json").write_text(json.dumps({"volumes": volumes}))
    (predictions / "dataset.json").write_text(json.dumps({"labels": LABELS, "file_ending": ".nii.gz"}))
    assert ranges_that_hold(predictions, truths) == (2, 4)


def test_what_the_spread_is_worth_is_printed(tmp_path, monkeypatch, capsys):
    job = Job(tmp_path, "Dataset501_Demo", parse_arguments([]))
    monkeypatch.setattr(demo, "draw_samples", lambda job, trainer, samples: tmp_path)
    monkeypatch.setattr(demo, "ranges_that_hold", lambda folder, truths: (3, 12))
    assert demo.spread_of_samples(job, "any") == {"samples": 4, "ranges": 12, "held": 3}
    printed = capsys.readouterr().out
    assert "3 of 12 hold the true volume" in printed
    assert "no interval with a guarantee" in printed
    monkeypatch.setattr(demo, "draw_samples", lambda job, trainer, samples: None)
    assert demo.spread_of_samples(job, "one without a chain") is None


def test_samples_are_drawn_of_models_that_have_them(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(Job, "run", lambda self, title, *command, **variables: commands.append(command))
    for trainer, drawn in (("nnUNetTrainerNoDiff", False), ("nnUNetTrainerRecycleXT", True)):
        job = Job(tmp_path, "Dataset501_Demo", parse_arguments([]))
        make_model(job.model_folder(trainer), trainer)
        assert (draw_samples(job, trainer, 4) is not None) is drawn
    (command,) = commands
    assert command[:2] == ("nnunetv2_diffusion", "predict")
    assert cli.build_parser("predict").parse_args(command[1:]).samples == 4


@pytest.mark.slow
def test_the_demo_meets_its_bound(tmp_path):
    out = tmp_path / "demo"
    assert demo.main(["--out", str(out), "--steps", "1"]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["mean_dice"]["nnUNetTrainerRecycleXT"] >= demo.BOUND
    assert result["spread_of_samples"]["ranges"] == 12
    assert (out / "demo.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trainer", "nnUNetTrainerRecycleXX"], "nnUNetTrainerRecycleXX"),
        (["--device", "mps"], "-device mps"),
        (["--test-cases", "0"], "--test-cases is 0, expected at least 1"),
        (["--epochs", "0"], "num_epochs is 0"),
    ],
)
def test_options_are_checked_before_anything_is_written(tmp_path, options, words):
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=words):
        demo.main(["--out", str(out), *options])
    assert not out.exists()


def with_palettes(folder, top):
    """Pictures whose masks have numbers 0 to top as a palette, but for the first, which is grey."""
    pictures(folder)
    for case in range(6):
        mask = Image.fromarray(np.random.default_rng(case).integers(0, top + 1, (9, 8), dtype=np.uint8))
        if case:
            mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        mask.save(folder / "labelsTr" / f"p{case}.png")


def test_masks_with_a_palette_become_greyscale(tmp_path, capsys):
    source, out = tmp_path / "Dataset503_Nerves", tmp_path / "out"
    with_palettes(source, top=1)
    before = {file: file.read_bytes() for file in source.rglob("*.png")}
    options = demo.parse_arguments(["--raw", str(source), "--test-cases", "1"])
    assert demo.make_data(options, out) == source.name
    assert "5 masks are PNGs with a palette" in capsys.readouterr().out
    made = out / "nnUNet_raw" / source.name
    assert len(read_by_nnunet(made)) == 5  # labels in dataset.json are checked
    for file in sorted(made.glob("labels*/*.png")):
        mask = Image.open(file)
        assert mask.mode == "L"
        assert np.array_equal(mask, Image.open(source / "labelsTr" / file.name))
    assert {file: file.read_bytes() for file in source.rglob("*.png")} == before


def test_a_palette_whose_numbers_are_no_labels_is_refused_by_name(tmp_path):
    folder = tmp_path / "Dataset503_Nerves"
    with_palettes(folder, top=2)
    with pytest.raises(RawDataError, match=r"p1\.png: a PNG with a palette, as 5 of the masks are.* hold \[2\]"):
        check_masks(folder)
