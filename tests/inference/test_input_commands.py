"""The verb predict on inputs of all kinds: what nnU-Net takes is predicted, and a bad case costs no other."""

import shutil

import nibabel
import numpy as np
import pytest
from odd_inputs import cut_off, layout_folder, volume, write_nifti
from skimage import io

from nnunetv2_diffusion import cli


def predict(model, images, out, *options):
    """Exit status of the verb, without processes of its own."""
    fixed = ["-m", model, "-i", images, "-o", out, "-device", "cpu", "-npp", 0, "-nps", 0, "--disable_progress_bar"]
    return cli.main(["predict", *map(str, fixed), "--tta", "none", "--steps", "1", *map(str, options)])


@pytest.mark.parametrize(("layout", "channels"), [("one_file", 3), ("four_in_one", 4), ("many_files", 3)])
def test_colours_in_one_file_or_in_many_are_predicted(models, tmp_path, layout, channels):
    model = models(patch=(12, 8), spacing=(1.0, 1.0), ending=".png", reader="NaturalImage2DIO", channels=channels)
    folder, _ = layout_folder(tmp_path / "in", "NaturalImage2DIO", layout)
    assert predict(model, folder, tmp_path / "out") == 0
    assert {f.name for f in (tmp_path / "out").glob("*.png")} == {"a.png", "b.png"}
    assert io.imread(tmp_path / "out" / "a.png").shape == (9, 8)


def test_channels_a_little_apart_are_predicted_with_a_word(models, tmp_path, capsys):
    folder, _ = layout_folder(tmp_path / "in", "SimpleITKIO", "moved")
    assert predict(models(channels=2), folder, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "a: " in printed
    assert "lies up to 0.01 mm from a_0000.nii.gz" in printed
    assert (tmp_path / "out" / "a.nii.gz").is_file()


def test_nibabel_headers_that_itk_cannot_read_are_predicted(models, tmp_path):
    affine = np.eye(4)
    affine[0, 1] = 0.3
    (tmp_path / "in").mkdir()
    write_nifti(tmp_path / "in" / "a_0000.nii.gz", volume(), affine)
    assert predict(models(reader="NibabelIO"), tmp_path / "in", tmp_path / "out") == 0
    np.testing.assert_allclose(nibabel.load(tmp_path / "out" / "a.nii.gz").affine, affine, atol=1e-6)


def test_bad_cases_are_named_and_the_others_are_made(models, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in "adg":
        write_nifti(folder / f"{name}_0000.nii.gz", volume(), np.diag([1, 1, 2, 1]))
    write_nifti(folder / "b_0000.nii.gz", volume(0, (1, 7, 6)), np.diag([1, 1, 0.5, 1]))
    shutil.copy(folder / "a_0000.nii.gz", folder / "c_0000.nii.gz")
    cut_off(folder / "c_0000.nii.gz", 0.5)
    (folder / "e_0000.nii.gz").symlink_to("nowhere")
    (folder / "f_0000.nii.gz").mkdir()
    array = volume()
    array[0, 0, 0] = np.nan
    write_nifti(folder / "h_0000.nii.gz", array, np.eye(4))
    model = models(spacing=(2.0, 1.0, 1.0), reader="NibabelIO")
    assert predict(model, folder, out) == 1
    assert {f.name for f in out.glob("*.nii.gz")} == {"a.nii.gz", "d.nii.gz", "g.nii.gz"}
    found = capsys.readouterr().err
    assert "Traceback" not in found
    for name in "bcefh":
        assert f"{name} failed: {folder / name}_0000.nii.gz: " in found


def test_a_single_image_and_a_long_name_are_predicted(models, tmp_path):
    long = "n" * 240
    for name in ("a", long):
        (tmp_path / "in").mkdir(exist_ok=True)
        write_nifti(tmp_path / "in" / f"{name}_0000.nii.gz", volume(), np.eye(4))
    image = tmp_path / "in" / f"{long}_0000.nii.gz"
    options = ("--save_uncertainty", "--save_samples", "--save_steps", "--save_probabilities", "--samples", 2)
    assert predict(models(), image, tmp_path / "out", *options) == 0
    names = {f.name for f in (tmp_path / "out").rglob("*.nii.gz")}
    assert names == {f"{long}.nii.gz"}


def test_a_single_image_of_another_name_is_told_what_to_type(models, tmp_path, capsys):
    file = write_nifti(tmp_path / "brain.nii.gz", volume(), np.eye(4))
    assert predict(models(), file, tmp_path / "out") == 1
    assert "rename it to brain_0000.nii.gz" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
