"""One image in, one result out."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813, its usual name
from odd_inputs import cut_off

import nnunetv2_diffusion
from nnunetv2_diffusion import cli, load_model, predict_image
from nnunetv2_diffusion.inference.inputs import InputError
from nnunetv2_diffusion.inference.options import OptionError


@pytest.fixture(scope="module")
def model(models):
    return load_model(models())


def test_a_file_gives_what_the_command_gives(models, images, model, tmp_path):
    call = ["-m", models(), "-i", images, "-o", tmp_path / "out", "-device", "cpu", "-npp", 0, "-nps", 0]
    assert cli.main(["predict", *map(str, call), "--samples", "2", "--disable_progress_bar"]) == 0
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "case_0.nii.gz")))
    found = predict_image(model, images / "case_0_0000.nii.gz", samples=2, keep_samples=True)
    np.testing.assert_array_equal(found.mask, mask)
    assert found.mask.shape == (10, 15, 9)
    assert len(found.samples) == 2
    assert 0 <= found.agreement <= 1
    with pytest.warns(DeprecationWarning, match=r"use Prediction\.agreement"):
        assert found.confidence == found.agreement
    assert set(found.maps) >= {"probability_left_part", "entropy", "mutual_information", "variance"}
    assert all(values.shape == mask.shape for values in found.maps.values())


def test_an_array_gives_what_its_file_gives(images, model):
    file = images / "case_1_0000.nii.gz"
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    by_file, by_array = predict_image(model, file), predict_image(model, array, spacing=(1, 1, 1))
    np.testing.assert_array_equal(by_file.mask, by_array.mask)
    np.testing.assert_array_equal(by_file.maps["entropy"], by_array.maps["entropy"])
    assert by_array.spacing == (1.0, 1.0, 1.0)
    assert by_array.agreement is None


def test_the_image_is_not_changed_and_channels_may_be_given(model):
    image = np.random.default_rng(0).normal(size=(9, 13, 8)).astype(np.float32)
    before = image.copy()
    a = predict_image(model, image, spacing=(1, 1, 1), tta="none")
    b = predict_image(model, image[None], spacing=(1, 1, 1), tta="none")
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(a.mask, b.mask)


def test_a_2d_image(models):
    model = load_model(models(patch=(12, 8), spacing=(1.0, 1.0)))
    found = predict_image(model, np.random.default_rng(0).normal(size=(20, 13)), spacing=(1, 1), tta="none")
    assert found.mask.shape == (1, 20, 13)
    assert found.summary["volume_unit"] == "px"


@pytest.mark.parametrize(
    ("image", "spacing", "words"),
    [
        (np.zeros((9, 13, 8)), None, "spacing is missing"),
        (np.zeros((9, 13, 8)), (1, 1), "expected \\(1 channels"),
        (np.zeros((9, 13)), (1, 1, 1), "spatial axis"),
        (np.zeros((9, 13, 8)), (1, 1, 0), "positive"),
        (np.zeros((2, 9, 13, 8)), (1, 1, 1), "expected \\(1 channels"),
        (np.zeros((9, 13)), (1, 1), "model is 3D: give a volume \\(z, y, x\\)"),
        (np.zeros((9, 13, 8, 3)), (1, 1, 1), "last axis holds 3 colours"),
        (np.zeros((0, 13, 8)), (1, 1, 1), "at least one voxel"),
        (np.full((9, 13, 8), 1e308), (1, 1, 1), "the image: channel 0 \\(MR\\) has 936 of 936 voxels that are not fin"),
        (np.full((9, 13, 8), np.nan), (1, 1, 1), "936 of 936 voxels that are not finite"),
        (np.zeros((9, 13, 8)), (1, 1, np.nan), "positive"),
        (np.zeros((9, 13, 8)), (0.001, 1, 1), "expected at least one voxel along each axis"),
        (np.zeros((9, 13, 8), complex), (1, 1, 1), "expected real numbers"),
        (np.zeros((9, 13, 8)), "abc", "spacing is 'abc', expected mm along each spatial axis"),
        (np.zeros((9, 13, 8)), "123", "spacing is '123', expected mm"),
        (np.zeros((9, 13, 8)), ("1", "1", "1"), "spacing is .*, expected mm"),
        (np.zeros((9, 13, 8)), (1 + 1j, 1, 1), "spacing is .*, expected mm"),
        (np.zeros((9, 13, 8)), (1, None, 1), "spacing is .*, expected mm"),
        (np.zeros((9, 13, 8)), (1, [1, 1], 1), "spacing is .*, expected mm"),
        (np.zeros((9, 13, 8)), 1, "spacing is 1, expected mm"),
        (np.zeros((9, 13, 8)), (), "expected 2 or 3 positive numbers"),
        (np.ma.masked_less(np.ones((9, 13, 8)), 0), (1, 1, 1), "is a masked array, expected one without a mask"),
        ([np.zeros((9, 13, 8))], None, "the image is list, expected a file"),
        ("nowhere.nii.gz", None, "nowhere.nii.gz: no such file"),
    ],
)
def test_images_that_do_not_fit_are_refused(model, image, spacing, words):
    with pytest.raises(InputError, match=words):
        predict_image(model, image, spacing)


def test_colours_come_first(models):
    model = load_model(models(patch=(12, 8), spacing=(1.0, 1.0), ending=".png", reader="NaturalImage2DIO", channels=3))
    image = np.random.default_rng(0).uniform(size=(20, 13, 3))
    with pytest.raises(InputError, match=r"move the channels to the front, np.moveaxis\(image, -1, 0\)"):
        predict_image(model, image, (1, 1))
    with pytest.raises(InputError, match="expected \\(3 channels"):
        predict_image(model, image[..., 0], (1, 1))
    assert predict_image(model, np.moveaxis(image, -1, 0), (1, 1), tta="none").mask.shape == (1, 20, 13)


def test_files_are_checked_as_by_the_command(model, images, tmp_path):
    cut_off(Path(shutil.copy(images / "case_0_0000.nii.gz", tmp_path)), 0.5)
    with pytest.raises(InputError, match=r"case_0_0000\.nii\.gz: damaged or cut off"):
        predict_image(model, tmp_path / "case_0_0000.nii.gz")
    with pytest.raises(InputError, match="2 channels, expected 1 as the model was trained with: MR"):
        predict_image(model, [images / "case_0_0000.nii.gz"] * 2)


def test_notes_on_the_image_are_in_the_summary(model):
    found = predict_image(model, np.full((9, 13, 8), 7.0), (1, 1, 1), tta="none")
    assert found.summary["notes"][0] == "the image: channel 0 (MR) has the value 7 in every voxel"


def test_options_are_checked(model, images):
    with pytest.raises(TypeError, match="no option stepz; known are steps"):
        predict_image(model, images / "case_0_0000.nii.gz", stepz=3)
    with pytest.raises(OptionError, match="--samples is 0"):
        predict_image(model, images / "case_0_0000.nii.gz", samples=0)


def test_the_package_names_what_it_does_not_have():
    with pytest.raises(AttributeError, match="no attribute 'predict_images'"):
        _ = nnunetv2_diffusion.predict_images
