"""The verb predict: folders in, folders out."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813, its usual name
import tifffile
from skimage import io
from tiny_model import make_model, write_images

from nnunetv2_diffusion import cli, load_model, predict_image
from nnunetv2_diffusion.inference import cases, export


def predict(model, images, out, *options):
    """Exit status of the verb, without processes of its own."""
    fixed = ["-m", model, "-i", images, "-o", out, "-device", "cpu", "-npp", 0, "-nps", 0, "--disable_progress_bar"]
    return cli.main(["predict", *map(str, fixed), *map(str, options)])


def contents(folder):
    """Relative name -> bytes of every file but the records of the call."""
    records = {"predict_from_raw_data_args.json"}
    files = {str(f.relative_to(folder)): f for f in folder.rglob("*") if f.is_file() and f.name not in records}
    return {name: file.read_bytes() for name, file in sorted(files.items()) if not name.endswith(".json")}


def geometry(file):
    image = sitk.ReadImage(str(file))
    return np.concatenate([image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection()])


EVERYTHING = (
    "--samples", "2", "--steps", "3", "--tta", "interleaved", "--seed", "5", "--sampler", "ddim",
    "--save_uncertainty", "--save_samples", "--save_steps", "--save_probabilities",
)  # fmt: skip


@pytest.fixture(scope="module")
def everything(models, images, tmp_path_factory):
    """Output of all options at once."""
    out = tmp_path_factory.mktemp("everything") / "out"
    assert predict(models(), images, out, *EVERYTHING) == 0
    return out


def check_volumes(out, case, summary, labels):
    """Volumes and agreement in the JSON are those of the files."""
    files = [out / f"{case}.nii.gz", *sorted(out.glob(f"samples/*/{case}.nii.gz"))]
    assert len(files) == 1 + summary["samples"]
    found = [sitk.ReadImage(str(f)) for f in files]
    ml = math.prod(found[0].GetSpacing()) / 1000
    agreements = []
    for name, values in labels.items():
        mask, *samples = (np.isin(sitk.GetArrayFromImage(image), values) for image in found)
        volumes = summary["volumes"][name]
        assert volumes["mask"] == pytest.approx(mask.sum() * ml, rel=6e-6)
        assert volumes["mean"] == pytest.approx(np.mean([m.sum() for m in samples]) * ml, rel=6e-6)
        high = np.percentile([m.sum() * ml for m in samples], 95)
        assert volumes["spread"]["percentile_95"] == pytest.approx(high, rel=6e-6)
        total = samples[0].sum() + samples[1].sum()
        dice = 2 * (samples[0] & samples[1]).sum() / total if total else None
        assert summary["pairwise_dice"][name] == (None if dice is None else pytest.approx(dice, rel=6e-6))
        agreements += [] if dice is None else [dice]
    assert agreements, "nothing was found: the test shows nothing"
    assert summary["agreement"] == pytest.approx(np.mean(agreements), rel=6e-6)


# spacing of the image (x, y, z), empty border, transposition, regions
GEOMETRIES = {
    "resampled": ((0.8, 1.3, 2.0), 0, (0, 1, 2), False),
    "cropped": ((1.0, 1.0, 1.0), 3, (0, 1, 2), False),
    "transposed": ((0.8, 1.3, 2.0), 2, (2, 0, 1), False),
    "regions": ((0.8, 1.3, 2.0), 2, (1, 2, 0), True),
}


@pytest.mark.parametrize("kind", GEOMETRIES)
def test_volumes_in_the_json_are_those_of_the_written_masks(models, tmp_path, kind):
    spacing, border, transpose, regions = GEOMETRIES[kind]
    model = tmp_path / "model"
    shutil.copytree(models("nnUNetTrainerHiDiff", regions=regions), model)
    plans = json.loads((model / "plans.json").read_text())
    plans |= {"transpose_forward": transpose, "transpose_backward": np.argsort(transpose).tolist()}
    (model / "plans.json").write_text(json.dumps(plans))
    images = write_images(tmp_path / "in", 1, (9, 12, 10), spacing)
    image = sitk.ReadImage(str(images / "case_0_0000.nii.gz"))
    sitk.WriteImage(sitk.ConstantPad(image, [border] * 3, [border] * 3), str(images / "case_0_0000.nii.gz"))
    out = tmp_path / "out"
    options = ("--tta", "none", "--samples", 2, "--save_uncertainty", "--save_samples")
    assert predict(model, images, out, *options) == 0
    summary = json.loads((out / "uncertainty" / "case_0.json").read_text())
    check_volumes(
        out, "case_0", summary, {"whole": [1, 2], "core": [2]} if regions else {"left part": [1], "right part": [2]}
    )
    found = predict_image(load_model(model), images / "case_0_0000.nii.gz", tta="none", samples=2)
    assert found.summary["volumes"] == summary["volumes"]
    assert found.agreement == summary["agreement"]


def test_labels_whose_names_differ_in_signs_have_maps_of_their_own(models, images, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(models(), model)
    dataset = json.loads((model / "dataset.json").read_text())
    dataset["labels"] = {"background": 0, "lesion (T1)": 1, "lesion [T1]": 2}
    (model / "dataset.json").write_text(json.dumps(dataset))
    assert predict(model, images, tmp_path / "out", "--tta", "none", "--save_uncertainty") == 0
    read = [
        sitk.GetArrayFromImage(sitk.ReadImage(str(f)))
        for f in sorted((tmp_path / "out" / "uncertainty").glob("probability_lesion*/case_0.nii.gz"))
    ]
    assert len(read) == 2
    assert not np.array_equal(*read)
    found = predict_image(load_model(model), images / "case_0_0000.nii.gz", tta="none")
    for name, values in zip(("probability_lesion_T1__1", "probability_lesion_T1__2"), read, strict=True):
        np.testing.assert_allclose(found.maps[name], values, atol=1e-6)


def test_a_map_out_of_its_scale_costs_no_mask(models, tmp_path, monkeypatch):
    model = models(patch=(12, 8), spacing=(1.0, 1.0), ending=".png", reader="NaturalImage2DIO")
    (tmp_path / "in").mkdir()
    image = np.random.default_rng(0).integers(0, 255, (20, 13), dtype=np.uint8)
    io.imsave(tmp_path / "in" / "case_0000.png", image, check_contrast=False)

    def wrong(predictor, result):
        maps = right(predictor, result)
        return {**maps, "entropy": maps["entropy"] + 3, "variance": np.full_like(maps["variance"], np.nan)}

    right = cases.uncertainty_maps
    monkeypatch.setattr(cases, "uncertainty_maps", wrong)
    assert predict(model, tmp_path / "in", tmp_path / "out", "--tta", "none", "--save_uncertainty") == 0
    assert (tmp_path / "out" / "case.png").is_file()
    notes = json.loads((tmp_path / "out" / "uncertainty" / "case.json").read_text())["notes"]
    assert any(
        note.startswith("entropy: values from 3") and "clipped to the scale, 0 to 1.09861" in note for note in notes
    )
    assert "map not written: variance: the map has values that are not finite" in notes
    assert io.imread(tmp_path / "out" / "uncertainty" / "entropy" / "case.png").min() == 65535
    assert not (tmp_path / "out" / "uncertainty" / "variance").exists()


def test_every_file_that_was_asked_for_is_there_and_nothing_else(everything):
    maps = ("probability_left_part", "probability_right_part", "entropy", "mutual_information", "variance")
    expected = {"dataset.json", "plans.json", "predict_from_raw_data_args.json"}
    for case in ("case_0", "case_1"):
        expected |= {f"{case}.nii.gz", f"{case}.npz", f"{case}.pkl", f"uncertainty/{case}.json"}
        expected |= {".run/run.json", f".run/cases/{case}.json"}
        expected |= {f"uncertainty/{kind}/{case}.nii.gz" for kind in maps}
        expected |= {f"samples/{i:03d}/{case}.nii.gz" for i in range(2)}
        expected |= {f"steps/{i:02d}/{case}.nii.gz" for i in (1, 2, 3)}
    assert {str(f.relative_to(everything)) for f in everything.rglob("*") if f.is_file()} == expected


def test_maps_agree_with_nnunets_probabilities_and_with_the_mask(everything):
    p = np.load(everything / "case_0.npz")["probabilities"]
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(everything / "case_0.nii.gz")))
    read = {
        f.parent.name: sitk.GetArrayFromImage(sitk.ReadImage(str(f)))
        for f in (everything / "uncertainty").glob("*/case_0.nii.gz")
    }
    np.testing.assert_array_equal(mask, p.argmax(0))
    np.testing.assert_allclose(read["probability_left_part"], p[1], atol=1e-5)
    np.testing.assert_allclose(read["entropy"], -(p * np.log(p)).sum(0), atol=1e-4)
    assert read["mutual_information"].min() >= 0
    assert read["mutual_information"].max() > 1e-4, "two samples differ somewhere"
    assert (read["mutual_information"] <= read["entropy"] + 1e-6).all()


def test_the_json_of_a_case_tells_of_its_samples(everything):
    for case in ("case_0", "case_1"):
        summary = json.loads((everything / "uncertainty" / f"{case}.json").read_text())
        check_volumes(everything, case, summary, {"left part": [1], "right part": [2]})
    assert summary["passes_per_tile"] == 8
    assert summary["settings"]["sampling"] == {
        "steps": 3, "sampler": "ddim", "eta": 0.0, "samples": 2, "seed": 5, "step_spacing": "trailing"
    }  # fmt: skip
    assert summary["settings"].items() >= summary["settings"]["sampling"].items()


def test_every_json_is_as_the_standard_has_it(everything):
    def refuse(word):
        raise AssertionError(word)

    found = list(everything.rglob("*.json"))
    assert len(found) >= 8
    for file in found:
        json.loads(file.read_text(), parse_constant=refuse)


def test_the_json_tells_what_was_used_and_not_what_was_not_asked_for(models, images, tmp_path):
    out = tmp_path / "out"
    assert predict(models(), images, out, "-device", "cpu", "-npp", 0, "-nps", 0, "--save_uncertainty") == 0
    settings = json.loads((out / "uncertainty" / "case_0.json").read_text())["settings"]
    assert None not in settings.values()
    assert settings.items() >= settings["sampling"].items()
    assert settings["steps"] >= 1


def test_the_last_step_is_the_mask(everything):
    for case in ("case_0", "case_1"):
        assert (everything / f"steps/03/{case}.nii.gz").read_bytes() == (everything / f"{case}.nii.gz").read_bytes()


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_and_processes_do_not_change_a_byte(models, images, everything, tmp_path, parts):
    out = tmp_path / "out"
    for part in range(parts):
        assert predict(models(), images, out, *EVERYTHING, "-num_parts", parts, "-part_id", part) == 0
    assert contents(out) == contents(everything)


def test_worker_processes_do_not_change_a_byte(models, images, everything, tmp_path):
    status = predict(models(), images, tmp_path / "out", *EVERYTHING, "-npp", 2, "-nps", 2)
    assert status == 0
    assert contents(tmp_path / "out") == contents(everything)


def test_continuing_makes_what_is_missing_and_leaves_the_rest(models, images, everything, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(everything, out)
    (out / "steps/02/case_1.nii.gz").unlink()
    before = (out / "case_0.nii.gz").stat().st_mtime_ns
    (out / ".unfinished_case_1").mkdir()
    (out / ".unfinished_case_1" / "case_1.nii.gz").write_bytes(b"half")
    assert predict(models(), images, out, *EVERYTHING, "--continue_prediction") == 0
    assert "1 of 2 cases are finished" in capsys.readouterr().out
    assert (out / "case_0.nii.gz").stat().st_mtime_ns == before
    assert contents(out) == contents(everything)


def test_an_oblique_anisotropic_volume_keeps_its_geometry(models, tmp_path):
    c, s = math.cos(0.3), math.sin(0.3)
    images = write_images(tmp_path / "in", 1, (8, 14, 11), (0.7, 0.8, 2.5), (c, -s, 0, s, c, 0, 0, 0, 1))
    assert predict(models(), images, tmp_path / "out", "--tta", "none", "--save_uncertainty", "--save_samples") == 0
    expected = geometry(images / "case_0_0000.nii.gz")
    found = list((tmp_path / "out").rglob("case_0.nii.gz"))
    assert len(found) == 7
    for file in found:
        np.testing.assert_allclose(geometry(file), expected, atol=1e-6, err_msg=str(file))


def test_a_png_gives_maps_in_16_bit_pngs(models, tmp_path):
    model = models(patch=(12, 8), spacing=(1.0, 1.0), ending=".png", reader="NaturalImage2DIO")
    (tmp_path / "in").mkdir()
    image = np.random.default_rng(0).integers(0, 255, (20, 13), dtype=np.uint8)
    io.imsave(tmp_path / "in" / "case_0000.png", image, check_contrast=False)
    assert predict(model, tmp_path / "in", tmp_path / "out", "--tta", "none", "--samples", 2, "--save_uncertainty") == 0
    assert io.imread(tmp_path / "out" / "case.png").shape == (20, 13)
    entropy = io.imread(tmp_path / "out" / "uncertainty" / "entropy" / "case.png")
    assert entropy.shape == (20, 13)
    assert entropy.dtype == np.uint16
    summary = json.loads((tmp_path / "out" / "uncertainty" / "case.json").read_text())
    assert summary["map_scales"]["entropy"] == pytest.approx(math.log(3))
    assert summary["volume_unit"] == "px"
    mask = io.imread(tmp_path / "out" / "case.png")
    assert mask.any()
    for value, name in enumerate(("left part", "right part"), start=1):
        assert summary["volumes"][name]["mask"] == (mask == value).sum()


@pytest.mark.parametrize("reader", ["Tiff3DIO", "NibabelIO", "NibabelIOWithReorient", "SimpleITKIOWithReorient"])
def test_volumes_are_right_with_every_reader(models, tmp_path, capfd, reader):
    spacing = (0.8, 1.3, 2.0)
    ending = ".tif" if reader == "Tiff3DIO" else ".nii.gz"
    model = models("nnUNetTrainerHiDiff", ending=ending, reader=reader)
    images = write_images(tmp_path / "in", 1, (9, 12, 10), spacing, (0, 1, 0, -1, 0, 0, 0, 0, 1))
    if reader == "Tiff3DIO":
        file = images / "case_0_0000.nii.gz"
        tifffile.imwrite(images / "case_0_0000.tif", sitk.GetArrayFromImage(sitk.ReadImage(str(file))))
        (images / "case_0.json").write_text(json.dumps({"spacing": spacing[::-1]}))
        file.unlink()
    assert predict(model, images, tmp_path / "out", "--tta", "none", "--samples", 2, "--save_uncertainty") == 0
    assert "no spacing file" not in capfd.readouterr().out
    written = tmp_path / "out" / f"case_0{ending}"
    mask = tifffile.imread(written) if ending == ".tif" else sitk.GetArrayFromImage(sitk.ReadImage(str(written)))
    volumes = json.loads((tmp_path / "out" / "uncertainty" / "case_0.json").read_text())["volumes"]
    assert mask.any()
    for value, name in enumerate(("left part", "right part"), start=1):
        assert volumes[name]["mask"] == pytest.approx((mask == value).sum() * math.prod(spacing) / 1000, rel=6e-6)


def test_regions_have_maps_by_their_names(models, images, tmp_path):
    model = models("nnUNetTrainerHiDiff", regions=True)
    assert predict(model, images, tmp_path / "out", "--tta", "none", "--samples", 2, "--save_uncertainty") == 0
    kinds = {f.name for f in (tmp_path / "out" / "uncertainty").iterdir() if f.is_dir()}
    assert {"probability_whole", "probability_core"} <= kinds
    summary = json.loads((tmp_path / "out" / "uncertainty" / "case_0.json").read_text())
    assert set(summary["volumes"]) == {"whole", "core"}


@pytest.mark.parametrize("trainer", ["nnUNetTrainer", "nnUNetTrainerNoDiff"])
def test_models_without_a_chain_give_masks_and_entropy(models, images, tmp_path, trainer):
    assert predict(models(trainer), images, tmp_path / "out", "--save_uncertainty") == 0
    summary = json.loads((tmp_path / "out" / "uncertainty" / "case_0.json").read_text())
    assert summary["agreement"] is None
    assert (tmp_path / "out" / "uncertainty" / "entropy" / "case_0.nii.gz").is_file()


def test_the_options_of_the_call_are_recorded(everything):
    record = json.loads((everything / "predict_from_raw_data_args.json").read_text())
    assert record["samples"] == 2
    assert record["tta"] == "interleaved"
    assert {"torch", "batchgeneratorsv2", "acvl_utils"} <= set(record["versions"])


# --- what cannot be done ---------------------------------------------------------------------------------------------


def refused(capsys, *arguments):
    """The message of a call that fails before it writes anything."""
    assert predict(*arguments) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--samples", 0), "--samples is 0, expected at least 1"),
        (("--steps", 2000), "2000"),
        (("-f", 3), "no checkpoint_final.pth for fold 3; there is checkpoint_final.pth in fold 0"),
        (("-chk", "checkpoint_best.pth"), "no fold has a checkpoint_best.pth"),
        (("-num_parts", 2, "-part_id", 2), "-part_id is 2, expected 0 .. 1"),
        (("-step_size", 0), "-step_size is 0"),
        (("-step_size", 1e-9), "-step_size is 1e-09, expected a part of the patch in [0.01, 1]"),
        (("-step_size", "nan"), "-step_size is nan"),
        (("--samples", 10**9), "--samples is 1000000000, expected a value in [1, 10000]"),
        (("--steps", 10**9), "--steps is 1000000000"),
        (("--seed", -1), "--seed is -1, expected at least 0"),
        (("--seed", 2**64), "--seed is 18446744073709551616"),
        (("-npp", 10**9), "-npp is 1000000000, expected a value in [0, 1024]"),
        (("-nps", 10**9), "-nps is 1000000000"),
        (("-num_parts", 0), "-num_parts is 0"),
        (("-chk", "../x.pth"), "-chk ../x.pth"),
    ],
)
def test_bad_options_are_named_and_nothing_is_written(models, images, tmp_path, capsys, options, words):
    message = refused(capsys, models(), images, tmp_path / "out", *options)
    assert words in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_must_be_named(images, tmp_path, capsys):
    assert cli.main(["predict", "-i", str(images), "-o", str(tmp_path / "out"), "-device", "cpu"]) == 1
    assert "-d and -c missing" in capsys.readouterr().err


def test_a_folder_without_a_model_is_named(images, tmp_path, capsys):
    assert str(tmp_path / "none") in refused(capsys, tmp_path / "none", images, tmp_path / "out")


def test_inputs_that_do_not_fit_are_named(models, images, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no file ends in .nii.gz" in refused(capsys, models(), empty, tmp_path / "out")
    assert "same folder" in refused(capsys, models(), images, images)
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_named(images, tmp_path, capsys):
    model = make_model(tmp_path / "model")
    (model / "fold_0" / "checkpoint_final.pth").write_bytes(b"damaged")
    message = refused(capsys, model, images, tmp_path / "out")
    assert "checkpoint_final.pth: damaged" in message


def test_a_read_only_output_is_named(models, images, tmp_path, capsys, monkeypatch):
    def refuse(path, *arguments, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refuse)  # the mode of a folder does not stop root
    assert f"{tmp_path / 'out'}: cannot be written to" in refused(capsys, models(), images, tmp_path / "out")


def test_an_output_that_is_a_file_is_named(models, images, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert f"{tmp_path / 'out'}: cannot be written to" in refused(capsys, models(), images, tmp_path / "out")


@pytest.mark.parametrize("what", ["write_map", "write_mask"])
def test_a_full_disk_leaves_nothing_half_written(models, images, tmp_path, capsys, monkeypatch, what):
    written = []

    def full(*arguments, **kwargs):
        written.append(arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, what, full)
    monkeypatch.setattr(cases, what, full, raising=False)
    message = refused(capsys, models(), images, tmp_path / "out", "--tta", "none", "--save_uncertainty")
    assert written
    assert "No space left on device" in message
    left = {f.name for f in (tmp_path / "out").glob("*")}
    assert left == {"dataset.json", "plans.json", "predict_from_raw_data_args.json", "failed.json", ".run"}
    assert set(json.loads((tmp_path / "out" / "failed.json").read_text())) == {"case_0", "case_1"}, "both were tried"


PEAK = """
import resource, sys
from nnunetv2_diffusion import cli
assert cli.main(sys.argv[1:]) == 0
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_samples(models, tmp_path):
    """Three maps of the volume take 2.4 MB: those of fourteen samples more would be 33 MB."""
    images = write_images(tmp_path / "in", 1, (48, 64, 64))
    peaks = {}
    for samples in (2, 16):
        command = [
            "predict", "-m", models(patch=(48, 64, 64), steps=1), "-i", images, "-o", tmp_path / f"out{samples}",
            "-device", "cpu", "-npp", 0, "-nps", 0, "--disable_progress_bar", "--tta", "none", "--samples", samples,
            "--save_uncertainty",
        ]  # fmt: skip
        run = subprocess.run(
            [sys.executable, "-c", PEAK, *map(str, command)], capture_output=True, text=True, check=True,
            # glibc gives large blocks back at once: what is measured is what is held, and not gaps in its heap
            env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        )  # fmt: skip
        peaks[samples] = int(run.stdout.rsplit("peak", 1)[1])
    assert peaks[16] <= 1.1 * peaks[2]
    assert peaks[16] <= peaks[2] + 12 * 1024, "kilobytes"


def test_libraries_say_nothing_before_our_own_output(models, images, tmp_path):
    command = [
        "predict", "-m", models(), "-i", images, "-o", tmp_path / "out", "-device", "cpu", "-npp", 0, "-nps", 0,
        "--disable_progress_bar", "--tta", "none",
    ]  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-W", "default", "-m", "nnunetv2_diffusion.cli", *map(str, command)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stderr == ""


def test_warnings_of_our_own_and_of_nnunet_are_shown():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        cli.hush_libraries()
        for module in ("torch.jit._script", "monai.utils", "nnunetv2.run", "nnunetv2_diffusion.cli", "torchio.data"):
            warnings.warn_explicit(module, FutureWarning, "file.py", 1, module=module)
        warnings.warn_explicit("torch tells", UserWarning, "file.py", 1, module="torch.nn")
    told = [str(warning.message) for warning in shown]
    assert told == ["nnunetv2.run", "nnunetv2_diffusion.cli", "torchio.data", "torch tells"]
