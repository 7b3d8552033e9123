"""One image in, one result out."""

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813, its usual name

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
        ("nowhere.nii.gz", None, "nowhere.nii.gz: no such file"),
    ],
)
def test_images_that_do_not_fit_are_refused(model, image, spacing, words):
    with pytest.raises(InputError, match=words):
        predict_image(model, image, spacing)


def test_options_are_checked(model, images):
    with pytest.raises(TypeError, match="no option stepz; known are steps"):
        predict_image(model, images / "case_0_0000.nii.gz", stepz=3)
    with pytest.raises(OptionError, match="--samples is 0"):
        predict_image(model, images / "case_0_0000.nii.gz", samples=0)


def test_the_package_names_what_it_does_not_have():
    with pytest.raises(AttributeError, match="no attribute 'predict_images'"):
        _ = nnunetv2_diffusion.predict_images
