"""What is read, and what of it is refused: as nnU-Net does, but with the file and the reason named."""

import gzip
import os
import re
import shutil
from contextlib import redirect_stdout
from io import StringIO

import nibabel
import numpy as np
import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import (
    create_lists_from_splitted_dataset_folder,
    get_identifiers_from_splitted_dataset_folder,
)
from odd_inputs import (
    ENDING,
    SHAPE,
    affines,
    cut_off,
    edit_header,
    header_folder,
    layout_folder,
    layouts,
    volume,
    write_itk,
    write_nifti,
)
from skimage import io
from tiny_model import CLASSES, make_plans

from nnunetv2_diffusion.inference.export import ModelFiles
from nnunetv2_diffusion.inference.inputs import CaseError, FailedCase, InputError, list_cases, prepare_output
from nnunetv2_diffusion.inference.prepared import PreparedCase, check_resampled, prepare_case
from nnunetv2_diffusion.inference.reading import check_file

WITH_HEADERS = ("SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient")
# what nnU-Net itself cannot predict: the law would also hold if both failed for a reason of the test's own
REFUSED_LAYOUTS = {"mixed", "two_sizes", "two_spacings"}
REFUSED = {(reader, "sheared") for reader in WITH_HEADERS[:2]} | {(r, "one_file") for r in (*WITH_HEADERS, "Tiff3DIO")}
REFUSED |= {(reader, "flat") for reader in WITH_HEADERS[1:]}


def model_of(reader="SimpleITKIO", channels=1, ending=None, spacing=(1.0, 1.0, 1.0), **plans):
    """What reading and preprocessing need of a model; no network."""
    plans = {**make_plans((8,) * len(spacing), spacing, reader, channels), **plans}
    names = {str(number): f"c{number}" for number in range(channels)}
    dataset = {"channel_names": names, "labels": CLASSES, "file_ending": ending or ENDING[reader]}
    manager = PlansManager(plans)
    return ModelFiles(manager, manager.get_configuration("only"), dataset)


def as_nnunet(model, files, target):
    """Data, and the file of an empty mask, as nnU-Net makes them; None if it cannot."""
    managers = model.plans_manager, model.configuration_manager, model.dataset_json
    try:
        with redirect_stdout(StringIO()):
            preprocessor = model.configuration_manager.preprocessor_class(verbose=False)
            data, _, properties = preprocessor.run_case([str(f) for f in files], None, *managers)
            return data, empty_mask(model, properties, target)
    except Exception:
        return None


def empty_mask(model, properties, target):
    seg = np.zeros(properties["shape_before_cropping"], np.uint8)
    model.plans_manager.image_reader_writer_class().write_seg(seg, str(target), properties)
    return target


def compare_with_nnunet(model, folder, tmp_path):
    """Assert the law; returns names of the cases that are refused."""
    ending, refused = model.ending, set()
    names = [str(n) for n in get_identifiers_from_splitted_dataset_folder(str(folder), ending)]
    listed = create_lists_from_splitted_dataset_folder(str(folder), ending, names, 1)
    cases, failed = list_cases(folder, model.dataset_json)
    assert {n: [str(f) for f in files] for n, files in cases.items()} == dict(zip(names, listed, strict=True))
    assert not failed
    for name, files in cases.items():
        theirs = as_nnunet(model, files, tmp_path / f"theirs_{name}{ending}")
        ours = prepare_case(model, name, files)
        if theirs is None:
            assert isinstance(ours, FailedCase), "nnU-Net refuses it"
            assert str(folder) in ours.reason
            refused.add(name)
            continue
        assert isinstance(ours, PreparedCase), f"nnU-Net takes it: {ours}"
        np.testing.assert_array_equal(ours.data.numpy(), theirs[0])
        mask = empty_mask(model, ours.properties, tmp_path / f"ours_{name}{ending}")
        assert opened(mask) == opened(theirs[1])
    return refused


def opened(file):
    content = file.read_bytes()
    return gzip.decompress(content) if file.name.endswith(".gz") else content


@pytest.mark.parametrize(("reader", "layout"), [(r, layout) for r in ENDING for layout in layouts(r)])
def test_channels_in_files_are_taken_as_nnunet_takes_them(reader, layout, tmp_path):
    folder, channels = layout_folder(tmp_path / "in", reader, layout)
    spacing = (1.0, 1.0) if reader == "NaturalImage2DIO" or layout == "flat" else (1.0, 1.0, 1.0)
    refused = compare_with_nnunet(model_of(reader, channels, spacing=spacing), folder, tmp_path)
    if (reader, layout) in REFUSED:
        assert refused == {"a", "b"}
    else:
        assert refused == ({"a"} if layout in REFUSED_LAYOUTS else set())


@pytest.mark.parametrize(("reader", "header"), [(r, header) for r in WITH_HEADERS for header in affines()])
def test_headers_are_taken_as_nnunet_takes_them(reader, header, tmp_path):
    folder = header_folder(tmp_path / "in", header)
    refused = compare_with_nnunet(model_of(reader), folder, tmp_path)
    assert refused == ({"a"} if (reader, header) in REFUSED else set())


def failure(model, *files, name="a"):
    """Why a case cannot be used; the file is named."""
    case = prepare_case(model, name, list(files))
    assert isinstance(case, FailedCase), case
    assert "Traceback" not in case.reason
    return case.reason


def notes(model, *files):
    case = prepare_case(model, "a", list(files))
    assert isinstance(case, PreparedCase), case
    return " ".join(case.notes)


@pytest.mark.parametrize("reader", WITH_HEADERS)
def test_channels_that_lie_a_little_apart_are_noted_in_mm(reader, tmp_path):
    folder, _ = layout_folder(tmp_path / "in", reader, "moved")
    files = [folder / "a_0000.nii.gz", folder / "a_0001.nii.gz"]
    assert f"{files[1]}: lies up to 0.01 mm from a_0000.nii.gz" in notes(model_of(reader, 2), *files)
    assert not notes(model_of(reader, 2), folder / "b_0000.nii.gz", folder / "b_0001.nii.gz")


def test_a_tilt_is_noted_by_the_corner_that_it_moves_most(tmp_path):
    plain, tilted = np.eye(4), np.eye(4)
    angle = 0.01
    tilted[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    files = [write_nifti(tmp_path / f"a_000{i}.nii.gz", volume(), affine) for i, affine in enumerate((plain, tilted))]
    most = 2 * np.sin(angle / 2) * np.hypot(SHAPE[1] - 1, SHAPE[2] - 1)
    assert f"up to {most:.3g} mm" in notes(model_of("NibabelIO", 2), *files)


@pytest.mark.parametrize("layout", ["two_sizes", "two_spacings"])
@pytest.mark.parametrize("reader", WITH_HEADERS)
def test_channels_that_do_not_fit_are_named_with_both_values(reader, layout, tmp_path):
    folder, _ = layout_folder(tmp_path / "in", reader, layout)
    found = failure(model_of(reader, 2), folder / "a_0000.nii.gz", folder / "a_0001.nii.gz")
    value = r"shape \(1, 4, 7, 6\), expected \(1, 5, 7, 6\)" if layout == "two_sizes" else r"spacing \(3.0.*\(2.0"
    assert re.search(rf"a_0001.nii.gz: {value}.* as in a_0000.nii.gz", found)


@pytest.mark.parametrize("channels", [1, 3])
def test_another_number_of_channels_is_told_after_reading(channels, tmp_path):
    folder, _ = layout_folder(tmp_path / "in", "SimpleITKIO", "many_files")
    files = [folder / "a_0000.nii.gz", folder / "a_0001.nii.gz"]
    found = failure(model_of(channels=channels), *files)
    assert f"a_0000.nii.gz, a_0001.nii.gz: 2 channels, expected {channels} as the model" in found
    assert failure(model_of(channels=2), files[1]).endswith(
        "1 channels, expected 2 as the model was trained with: c0, c1"
    )


def test_a_gap_in_the_numbers_is_noted(tmp_path):
    file = write_nifti(tmp_path / "a_0001.nii.gz", volume(), np.eye(4))
    assert "files numbered 0001 are taken for the channels from 0 on" in notes(model_of(), file)


def test_a_single_slice_is_noted_for_a_model_of_volumes(tmp_path):
    file = write_nifti(tmp_path / "a_0000.nii.gz", volume(0, (1, 7, 6)), np.eye(4))
    assert f"{file}: a single slice, shape (1, 7, 6), and the model is 3D" in notes(model_of(), file)
    assert not notes(model_of(spacing=(1.0, 1.0)), file)


def test_axes_that_nnunet_cannot_write_are_told_before_anything_is_drawn(tmp_path):
    file = write_itk(tmp_path / "a_0000.nii.gz", np.stack([volume(0), volume(1)]))
    assert "4 axes in the file" in failure(model_of(channels=2), file)
    colours = write_itk(tmp_path / "b_0000.nii.gz", np.stack([volume(0), volume(1)], -1), colours=True)
    assert "2 spacings, expected" in failure(model_of(channels=2), colours)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e308])
def test_voxels_that_are_not_finite_are_counted_by_channel(value, tmp_path):
    array = volume().astype(np.float64)
    array[0, 0, :2] = value
    good = write_nifti(tmp_path / "a_0000.nii.gz", volume(), np.eye(4))
    bad = write_nifti(tmp_path / "a_0001.nii.gz", array, np.eye(4), np.float64)
    assert f"{bad}: channel 1 (c1) has 2 of 210 voxels that are not finite" in failure(
        model_of("NibabelIO", 2), good, bad
    )


def test_what_preprocessing_makes_not_finite_is_found(tmp_path):
    """CT normalisation by a standard deviation of NaN, as of broken plans."""
    file = write_nifti(tmp_path / "a_0000.nii.gz", volume(), np.eye(4))
    statistics = {"mean": 0.0, "std": float("nan"), "percentile_00_5": 0.0, "percentile_99_5": 1.0}
    model = model_of(foreground_intensity_properties_per_channel={"0": statistics})
    model.configuration_manager.configuration["normalization_schemes"] = ["CTNormalization"]
    assert "channel 0 has 210 of 210 voxels that are not finite after preprocessing" in failure(model, file)


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_a_constant_image_is_noted(value, tmp_path):
    file = write_nifti(tmp_path / "a_0000.nii.gz", np.full(SHAPE, value), np.eye(4))
    assert f"channel 0 (c0) has the value {value:g} in every voxel" in notes(model_of(), file)


DAMAGED = [
    *[(r, e, c) for r in WITH_HEADERS for e in (".nii", ".nii.gz") for c in (True, False)],
    *[("SimpleITKIO", e, c) for e in (".nrrd", ".mha", ".gipl") for c in (True, False)],
]  # fmt: skip


@pytest.mark.parametrize(("reader", "ending", "compressed"), DAMAGED)
@pytest.mark.parametrize("part", [0.3, 0.97])
def test_a_file_that_is_cut_off_is_found(reader, ending, compressed, part, tmp_path):
    file = write_itk(tmp_path / f"a_0000{ending}", volume(0, (12, 12, 12)), compressed=compressed)
    assert isinstance(prepare_case(model_of(reader, ending=ending), "a", [file]), PreparedCase)
    cut_off(file, part)
    assert str(file) in failure(model_of(reader, ending=ending), file)


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif"])
def test_a_picture_that_is_cut_off_is_found(ending, tmp_path):
    file = tmp_path / f"a_0000{ending}"
    io.imsave(file, volume(0, (40, 40)).astype(np.uint8), check_contrast=False)
    model = model_of("NaturalImage2DIO", ending=ending, spacing=(1.0, 1.0))
    assert isinstance(prepare_case(model, "a", [file]), PreparedCase)
    assert str(file) in failure(model, cut_off(file, 0.5))


def test_bytes_found_and_promised_are_told(tmp_path):
    file = write_nifti(tmp_path / "a_0000.nii", volume(), np.eye(4))
    size = file.stat().st_size
    with pytest.raises(CaseError, match=rf"cut off, {size - 1} bytes of the {size} that its header promises"):
        check_file(cut_off(file, (size - 0.5) / size))
    edit_header(write_nifti(file, volume(), np.eye(4)), 108, "<f", 1e9)  # vox_offset
    with pytest.raises(CaseError, match=f"{size} bytes of the 1000000840"):
        check_file(file)


def test_a_nifti_is_opened_by_its_content_as_itk_does(tmp_path):
    plain = write_nifti(tmp_path / "a.nii", volume(), np.eye(4)).rename(tmp_path / "a_0000.nii.gz")
    assert not notes(model_of(), plain)
    assert "cut off" in failure(model_of(), cut_off(plain, 0.9))


def test_what_follows_the_voxels_does_not_matter(tmp_path):
    """A longer file, another byte order, a wrong number of bits: ITK takes them."""
    whole = write_nifti(tmp_path / "b_0000.nii", volume(), np.eye(4)).read_bytes()
    packed, file = gzip.compress(whole), tmp_path / "a_0000.nii.gz"
    for content in (
        packed + b"garbage",
        packed[:-4],
        gzip.compress(whole[:500]) + gzip.compress(whole[500:] + b"more"),
    ):
        file.write_bytes(content)
        assert not notes(model_of(), file)
    swapped = nibabel.Nifti1Image(volume().T, np.eye(4), nibabel.Nifti1Header(endianness=">"))
    nibabel.save(swapped, file)
    assert gzip.decompress(file.read_bytes())[:4] == b"\0\0\x01\x5c"
    assert not notes(model_of(), file)
    assert "cut off" in failure(model_of(), cut_off(file, 0.9))
    odd = edit_header(tmp_path / "b_0000.nii", 72, "<h", 64)  # bitpix; the values have 32
    assert not notes(model_of(ending=".nii"), odd)


def test_a_changed_byte_of_a_compressed_file_is_found(tmp_path):
    content = bytearray(gzip.compress(write_nifti(tmp_path / "b.nii", volume(), np.eye(4)).read_bytes(), 0))
    content[len(content) // 2] ^= 1
    file = tmp_path / "a_0000.nii.gz"
    file.write_bytes(content)
    assert "damaged or cut off (CRC check failed" in failure(model_of(), file)


# without .mha: with some headers ITK itself crashes, which only a worker process survives
FUZZED = [("SimpleITKIO", e, 300) for e in (".nii", ".nrrd", ".gipl")]
FUZZED += [("NibabelIO", ".nii", 348), ("NaturalImage2DIO", ".png", 400), ("Tiff3DIO", ".tif", 900)]


@pytest.mark.parametrize(("reader", "ending", "size"), FUZZED)
def test_changed_bytes_of_a_header_never_end_in_a_traceback(reader, ending, size, tmp_path):
    """Sixty files of each kind; what is taken for an image is one that nnU-Net takes too."""
    file, rng = tmp_path / f"a_0000{ending}", np.random.default_rng(7)
    flat = reader == "NaturalImage2DIO"
    if flat or reader == "Tiff3DIO":
        array = volume(0, (9, 8)).astype(np.uint8) if flat else volume()
        io.imsave(file, array, check_contrast=False)
    else:
        write_itk(file, volume(), compressed=False)
    good, model = file.read_bytes(), model_of(reader, ending=ending, spacing=(1.0,) * (2 if flat else 3))
    for _ in range(60):
        content = bytearray(good)
        for place in rng.integers(0, min(size, len(good)), rng.integers(1, 8)):
            content[place] = rng.integers(0, 256)
        file.write_bytes(content)
        case = prepare_case(model, "a", [file])
        if isinstance(case, FailedCase):
            assert str(file) in case.reason
            assert "\n" not in case.reason
        else:
            assert torch.isfinite(case.data).all()


@pytest.mark.parametrize(("offset", "kind", "value"), [(70, "<h", 11), (108, "<f", -1e30), (108, "<f", np.nan)])
def test_a_header_that_makes_no_sense_is_left_to_the_reader(offset, kind, value, tmp_path):
    """Type of the values, and where they start."""
    file = edit_header(write_nifti(tmp_path / "a_0000.nii", volume(), np.eye(4)), offset, kind, value)
    for reader in WITH_HEADERS:
        case = prepare_case(model_of(reader, ending=".nii"), "a", [file])
        assert isinstance(case, PreparedCase) or str(file) in case.reason


CONTENT = {
    "empty": b"",
    "text": b"no image",
    "random": np.random.default_rng(0).bytes(2000),
    "zipped_text": gzip.compress(b"no image"),
    "zipped_random": gzip.compress(np.random.default_rng(0).bytes(2000)),
}


@pytest.mark.parametrize("reader", ENDING)
@pytest.mark.parametrize("what", CONTENT)
def test_a_file_that_is_no_image_is_named(reader, what, tmp_path):
    file = tmp_path / f"a_0000{ENDING[reader]}"
    file.write_bytes(CONTENT[what])
    found = failure(model_of(reader), file)
    assert found.startswith(f"{file}: ")
    assert "\n" not in found
    assert len(found) < 600


def test_a_header_without_voxels_is_named(tmp_path):
    content = gzip.decompress(write_nifti(tmp_path / "b.nii.gz", volume(), np.eye(4)).read_bytes())
    file = tmp_path / "a_0000.nii.gz"
    file.write_bytes(gzip.compress(content[:352]))
    for reader in WITH_HEADERS:
        assert "352 bytes of the 1192 that its header promises" in failure(model_of(reader), file)


@pytest.mark.parametrize("spacing", [0.0, -1.0, np.nan, np.inf])
def test_a_spacing_that_is_none_is_found_or_noted(spacing, tmp_path):
    file = write_nifti(tmp_path / "a_0000.nii", volume(), np.eye(4))
    edit_header(file, 80, "<f", spacing)  # pixdim[1]
    assert "the header gives a spacing of (" in notes(model_of(ending=".nii"), file)
    found = prepare_case(model_of("NibabelIO", ending=".nii"), "a", [file])
    if np.isfinite(spacing):
        assert "the header gives a spacing of (" in " ".join(found.notes)
    else:
        assert "mm, expected positive numbers" in found.reason


def test_a_slice_that_is_too_thin_for_the_model_is_named(tmp_path):
    file = write_nifti(tmp_path / "a_0000.nii.gz", volume(0, (1, 7, 6)), np.diag([1, 1, 0.5, 1]))
    model = model_of(spacing=(2.0, 1.0, 1.0))
    assert "shape (1, 7, 6) of (0.5, 1, 1) mm becomes (0, 7, 6) at the model's (2, 1, 1) mm" in failure(model, file)
    assert as_nnunet(model, [file], tmp_path / "out.nii.gz") is None


def test_what_cropping_makes_too_thin_is_named(tmp_path):
    array = np.zeros((9, 7, 6), np.float32)
    array[4] = volume(0, (7, 6))
    file = write_nifti(tmp_path / "a_0000.nii.gz", array, np.diag([1, 1, 0.5, 1]))
    assert "cropped to what is not zero: shape (1, 7, 6)" in failure(model_of(spacing=(2.0, 1.0, 1.0)), file)


def test_axes_are_those_of_the_plans():
    model = model_of(spacing=(1.0, 1.0, 2.0), transpose_forward=[2, 1, 0], transpose_backward=[2, 1, 0])
    array, properties = volume(0, (1, 7, 6))[None], {"spacing": [0.5, 1.0, 1.0]}
    from nnunetv2_diffusion.inference.prepared import preprocess

    with pytest.raises(CaseError, match=re.escape("shape (6, 7, 1) of (1, 1, 0.5) mm becomes (6, 7, 0)")):
        preprocess(model, array, properties, "the image")


def test_a_volume_that_no_machine_could_hold_is_refused_before_it_is_made():
    with pytest.raises(CaseError, match="more than this machine has; is its spacing right"):
        check_resampled(model_of(), (100, 100, 100), (500.0, 500.0, 500.0), "x")
    with pytest.raises(CaseError, match="expected about"):
        check_resampled(model_of(), (100, 100, 100), (1e308, 1.0, 1.0), "x")


def test_a_model_that_does_not_resample_takes_any_spacing():
    model = model_of(spacing=(2.0, 1.0, 1.0))
    model.configuration_manager.configuration["resampling_fn_data"] = "no_resampling_hack"
    check_resampled(model, (1, 7, 6), (0.5, 1.0, 1.0), "x")


def test_a_mask_of_the_previous_stage_is_checked_and_added(tmp_path):
    model, file = model_of(), write_nifti(tmp_path / "a_0000.nii.gz", volume(), np.eye(4))
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:3] = 2
    previous = write_nifti(tmp_path / "a.nii.gz", labels, np.eye(4), np.uint8)
    data = prepare_case(model, "a", [file], previous).data
    assert data.shape == (3, *SHAPE)
    np.testing.assert_array_equal(data[1:].numpy(), np.stack([labels == 1, labels == 2]))
    write_nifti(previous, labels[1:], np.eye(4), np.uint8)
    reason = prepare_case(model, "a", [file], previous).reason
    assert f"{previous}: shape (4, 7, 6), expected (5, 7, 6)" in reason
    previous.unlink()
    assert f"{previous}: no such file" in prepare_case(model, "a", [file], previous).reason


DATASET = {"file_ending": ".nii.gz", "channel_names": {"0": "c0"}}


def left_out(folder):
    """Name -> reason of what is listed as failed."""
    return {case.name: case.reason for case in list_cases(folder, DATASET)[1]}


def test_everything_that_a_person_may_take_for_a_case_is_listed_or_named(tmp_path):
    write_nifti(tmp_path / "good_0000.nii.gz", volume(), np.eye(4))
    (tmp_path / "gone_0000.nii.gz").symlink_to(tmp_path / "archive" / "x.nii.gz")
    (tmp_path / "loop_0000.nii.gz").symlink_to(tmp_path / "loop_0000.nii.gz")
    (tmp_path / "folder_0000.nii.gz").mkdir()
    (tmp_path / "linked_0000.nii.gz").symlink_to(tmp_path / "folder_0000.nii.gz")
    os.mkfifo(tmp_path / "pipe_0000.nii.gz")
    shutil.copy(tmp_path / "good_0000.nii.gz", tmp_path / "brain.nii.gz")
    shutil.copy(tmp_path / "good_0000.nii.gz", tmp_path / "other_0000.nii")
    shutil.copy(tmp_path / "good_0000.nii.gz", tmp_path / "upper_0000.NII.GZ")
    shutil.copy(tmp_path / "good_0000.nii.gz", tmp_path / "good_0000.nii")
    (tmp_path / "dataset.json").write_text("{}")
    cases, _ = list_cases(tmp_path, DATASET)
    found = left_out(tmp_path)
    assert set(cases) == {"good"}
    assert set(found) == {"gone", "loop", "folder", "linked", "pipe", "brain", "other", "upper"}
    for name, words in {
        "gone": f"gone_0000.nii.gz: a link to {tmp_path / 'archive' / 'x.nii.gz'}, where no file is",
        "loop": "loop_0000.nii.gz: a link to",
        "folder": "folder_0000.nii.gz: a folder",
        "linked": "a folder",
        "pipe": "no ordinary file",
        "brain": "brain.nii.gz: expected a name <case>_0000.nii.gz",
        "other": "other_0000.nii: the model reads files that end in .nii.gz",
        "upper": "the model reads files that end in .nii.gz",
    }.items():
        assert words in found[name]


def test_a_channel_that_is_no_file_costs_its_case(tmp_path):
    for name in ("a_0000.nii.gz", "b_0000.nii.gz"):
        write_nifti(tmp_path / name, volume(), np.eye(4))
    (tmp_path / "a_0001.nii.gz").symlink_to("nowhere")
    assert set(list_cases(tmp_path, DATASET)[0]) == {"b"}
    assert set(left_out(tmp_path)) == {"a"}


def test_a_file_that_nnunet_passes_over_is_told_and_costs_nothing(tmp_path, capsys):
    for name in ("a_0000.nii.gz", "a_mask.nii.gz"):
        write_nifti(tmp_path / name, volume(), np.eye(4))
    assert set(list_cases(tmp_path, DATASET)[0]) == {"a"}
    assert not left_out(tmp_path)
    said = "".join(capsys.readouterr())
    assert "not used, not named <case>_0000.nii.gz: " in said
    assert "a_mask.nii.gz" in said


def test_names_whose_masks_could_not_be_written_are_refused(tmp_path):
    (tmp_path / "x.nii.gz_0000.nii.gz").touch()
    (tmp_path / f"{'n' * 243}_0000.nii.gz").touch()
    assert "cannot end in .nii or .nii.gz; rename x.nii.gz_0000.nii.gz" in left_out(tmp_path)["x.nii.gz"]
    assert set(list_cases(tmp_path, DATASET)[0]) == {"n" * 243}


def test_a_single_image_stands_for_its_case(tmp_path):
    for name in ("a_0000.nii.gz", "a_0001.nii.gz", "ab_0000.nii.gz"):
        (tmp_path / name).touch()
    found, failed = list_cases(tmp_path / "a_0001.nii.gz", DATASET)
    assert found == {"a": [tmp_path / "a_0000.nii.gz", tmp_path / "a_0001.nii.gz"]}
    assert not failed
    (tmp_path / "brain.nii.gz").touch()
    with pytest.raises(InputError, match=r"brain.nii.gz: expected .* rename it to brain_0000.nii.gz"):
        list_cases(tmp_path / "brain.nii.gz", DATASET)
    with pytest.raises(InputError, match="output and input are the same folder"):
        prepare_output(tmp_path, tmp_path / "a_0000.nii.gz")


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no file ends in .nii.gz, expected images <case>_0000.nii.gz"):
        list_cases(tmp_path, DATASET)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        list_cases(tmp_path / "nowhere", DATASET)


def test_whatever_is_not_used_is_told_in_a_line(tmp_path, capsys):
    write_nifti(tmp_path / "a_0000.nii.gz", volume(), np.eye(4))
    for name in ("b.nii", "b_0000.nii.gz.part", "d_0000.dcm", "one.txt", "three.txt", "two.txt"):
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    assert set(list_cases(tmp_path, DATASET)[0]) == {"a"}
    (line,) = "".join(capsys.readouterr()).splitlines()
    assert line == (
        f"{tmp_path}: not used, not named <case>_0000.nii.gz: b.nii, b_0000.nii.gz.part, d_0000.dcm, one.txt, sub and "
        "2 more"
    )
    list_cases(tmp_path / "a_0000.nii.gz", DATASET)
    assert not "".join(capsys.readouterr())


def test_a_case_without_a_name_is_named_by_its_file(tmp_path):
    for name in ("_0000.nii.gz", "a_0000.nii.gz", "c.nii.gz"):
        write_nifti(tmp_path / name, volume(), np.eye(4))
    assert set(list_cases(tmp_path, DATASET)[0]) == {"a"}
    found = left_out(tmp_path)
    assert set(found) == {"_0000.nii.gz", "c"}
    assert "_0000.nii.gz: expected a name in front of the number" in found["_0000.nii.gz"]
    with pytest.raises(InputError, match="expected a folder, or an image named"):
        list_cases(tmp_path / "_0000.nii.gz", DATASET)


@pytest.mark.parametrize("factor", [1e-20, 1e20])
def test_an_image_that_normalisation_flattens_is_noted(factor, tmp_path):
    file = write_nifti(tmp_path / "a_0000.nii.gz", volume() * factor, np.eye(4))
    assert "channel 0 is nearly the same in every voxel after normalisation" in notes(model_of(), file)


def test_a_skewed_voxel_is_noted_where_volumes_are_counted_by_spacing(tmp_path):
    affine = np.eye(4)
    affine[0, 1] = 0.2
    file = write_nifti(tmp_path / "a_0000.nii.gz", volume(), affine)
    true = 1 / np.sqrt(1 + 0.2**2)
    assert f"true volumes are {true:.4g} times those that are written" in notes(model_of("NibabelIO"), file)


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_a_complex_image_is_refused(reader, tmp_path):
    file = write_nifti(tmp_path / "a_0000.nii.gz", volume() * (1 + 1j), np.eye(4), np.complex64)
    assert "cannot be read as an image" in failure(model_of(reader), file)
