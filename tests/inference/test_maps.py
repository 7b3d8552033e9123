"""Maps come back to the axes, the place and the kind of file of the image that nnU-Net read."""

import errno
import math
import os

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import tifffile
import torch
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from skimage import io

from nnunetv2_diffusion.inference import maps as module
from nnunetv2_diffusion.inference.maps import (
    MapWriterError,
    check_map_writer,
    check_whole,
    map_names,
    to_original_geometry,
    within_limit,
    write_map,
    written_whole,
)

SHAPE = (9, 14, 17)
BOX = (slice(2, 8), slice(3, 13), slice(1, 15))
SPACING = (2.0, 1.1, 0.7)
TORCH = {"is_seg": False, "force_separate_z": False, "memefficient_seg_resampling": False}


def plans_for(spacing, transpose=(0, 1, 2), order=1, order_z=0, torch_resampling=False):
    """Plans with one configuration that changes nothing but the spacing."""
    name = "resample_torch_fornnunet" if torch_resampling else "resample_data_or_seg_to_shape"
    kwargs = (
        TORCH if torch_resampling else {"is_seg": False, "order": order, "order_z": order_z, "force_separate_z": None}
    )
    resampling = {f"resampling_fn_{k}": name for k in ("data", "seg", "probabilities")}
    configuration = {
        "architecture": {},
        "spacing": list(spacing),
        "normalization_schemes": ["NoNormalization"],
        "use_mask_for_norm": [False],
        **resampling,
        **{f"{fn}_kwargs": {**kwargs, "is_seg": "seg" in fn} for fn in resampling},
    }
    plans = PlansManager(
        {
            "plans_name": "tiny",
            "transpose_forward": list(transpose),
            "transpose_backward": np.argsort(transpose).tolist(),
            "foreground_intensity_properties_per_channel": {"0": {}},
            "configurations": {"only": configuration},
        }
    )
    return plans, plans.get_configuration("only")


def ramp(shape=SHAPE):
    """A linear function of the position, which linear interpolation keeps; zero outside of BOX."""
    z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    image = np.zeros(shape, np.float32)
    image[BOX] = (100 + 5 * z - 3 * y + 2 * x)[BOX]
    return image


def preprocess(plans, configuration, image, spacing=SPACING):
    """The network's view of an image, (1, x, y, z), and the properties of the case."""
    data, _, properties = DefaultPreprocessor(verbose=False).run_case_npy(
        image[None], None, {"spacing": list(spacing)}, plans, configuration, {}
    )
    return data, properties


def oblique(size=(7, 6, 5), angle=0.4, permuted=True):
    """An anisotropic ITK image whose axes are neither aligned with the patient nor in the usual order."""
    values = np.random.default_rng(0).random(size[::-1], np.float32)
    image = sitk.GetImageFromArray(values)
    c, s = math.cos(angle), math.sin(angle)
    direction = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    if permuted:
        direction = direction @ np.array([[0, 0, -1], [1, 0, 0], [0, -1, 0]])
    image.SetDirection(direction.ravel().tolist())
    image.SetOrigin((-31.25, 12.5, 77.125))
    image.SetSpacing((0.7, 0.9, 3.3))
    return image


# names and ranges of maps


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"left part": (1,), "b": (2,)}, ["left_part", "b"]),
        ({"lesion (T1)": (1,), "lesion [T1]": (2,), "other": (3,)}, ["lesion_T1__1", "lesion_T1__2", "other"]),
        ({"<5 mm": (1,), ">5 mm": (2,)}, ["_5_mm_1", "_5_mm_2"]),
        ({"GTV": (1,), "gtv": (2,)}, ["GTV_1", "gtv_2"]),
        ({"a?": (1, 2), "a!": (2,)}, ["a__1-2", "a__2"]),
        ({"a?": (1,), "a!": (1,)}, ["a__1_1", "a__1_2"]),
        ({"a?": (1,), "a!": (2,), "a__1": (3,)}, ["a__1_1", "a__2", "a__1_3"]),
    ],
)
def test_every_label_has_a_name_of_its_own(labels, expected):
    names = map_names(labels)
    assert list(names) == list(labels)
    assert list(names.values()) == expected


def test_rounding_beyond_the_scale_is_clipped_and_a_real_excess_is_noted():
    values = np.array([[-1e-7, 0.5, 1 + 1e-6]], np.float32)
    clipped, note = within_limit(values, 1.0, "probability_a")
    assert note is None
    np.testing.assert_array_equal(clipped, np.clip(values, 0, 1))
    for wrong in (values + 0.1, values - 0.1):
        clipped, note = within_limit(wrong, 1.0, "entropy")
        assert note.startswith("entropy: values from ")
        assert clipped.min() >= 0
        assert clipped.max() <= 1
    with pytest.raises(ValueError, match=r"variance: .* not finite"):
        within_limit(np.array([np.nan]), 1.0, "variance")


# geometry of the arrays


@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("torch_resampling", [False, True])
def test_a_ramp_returns_to_its_place_inside_the_crop_and_the_fill_is_outside(transpose, torch_resampling):
    plans, configuration = plans_for((0.9, 0.8, 0.75), transpose, torch_resampling=torch_resampling)
    image = ramp()
    data, properties = preprocess(plans, configuration, image)
    assert data.shape[1:] != tuple(properties["shape_after_cropping_and_before_resampling"])
    back = to_original_geometry(np.concatenate([data, -data]), properties, plans, configuration, fill=(-7, 3))
    assert back.shape == (2, *SHAPE)
    assert back.dtype == np.float32
    inner = tuple(slice(b.start + 2, b.stop - 2) for b in BOX)  # interpolation clamps at the borders
    np.testing.assert_allclose(back[0][inner], image[inner], rtol=1e-5)
    np.testing.assert_allclose(back[1][inner], -image[inner], rtol=1e-5)
    outside = image == 0
    assert (back[0][outside] == -7).all()
    assert (back[1][outside] == 3).all()
    assert (back[0][BOX] > 0).all()


@pytest.mark.parametrize(
    ("spacing", "image_spacing"),
    [
        ((0.9, 0.8, 0.75), SPACING),
        ((0.5, 0.5), SPACING),
        ((8.0, 0.8, 0.75), SPACING),
        ((1.9, 0.8, 0.75), (4.0, 1.1, 0.7)),
    ],
    ids=["3d", "2d", "anisotropic_plans", "anisotropic_image"],
)
@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1)])
def test_maps_lie_where_nnunets_own_export_puts_probabilities(spacing, image_spacing, transpose):
    plans, configuration = plans_for(spacing, transpose)
    data, properties = preprocess(plans, configuration, ramp(), image_spacing)
    probabilities = np.random.default_rng(1).random((2, *data.shape[1:]), np.float32)
    labels = LabelManager({"background": 0, "a": [1, 2], "b": 2}, [1, 2], inference_nonlin=lambda p: p)
    _, expected = convert_predicted_logits_to_segmentation_with_correct_shape(
        probabilities, plans, configuration, labels, properties, return_probabilities=True, num_threads_torch=1
    )
    np.testing.assert_array_equal(to_original_geometry(probabilities, properties, plans, configuration), expected)


def test_a_2d_configuration_keeps_the_slices_of_a_3d_image():
    plans, configuration = plans_for((0.5, 0.5))
    data, properties = preprocess(plans, configuration, ramp())
    slices = np.arange(data.shape[1], dtype=np.float32)
    maps = np.broadcast_to(slices[None, :, None, None], data.shape)
    back = to_original_geometry(maps, properties, plans, configuration, fill=-1)[0]
    np.testing.assert_array_equal(back[BOX], np.broadcast_to(slices[:, None, None], back[BOX].shape))


@pytest.mark.parametrize("order", [1, 3])
def test_a_constant_map_stays_constant_bit_for_bit(order):
    plans, configuration = plans_for((0.9, 0.8, 0.75), order=order)
    data, properties = preprocess(plans, configuration, ramp())
    third = np.float32(1 / 3)
    back = to_original_geometry(np.full_like(data, third), properties, plans, configuration, fill=third)
    assert (back == third).all()


def test_interpolation_of_higher_order_does_not_leave_the_range_of_each_map():
    """Between slices nnU-Net's function does not clip by itself."""
    plans, configuration = plans_for((8.0, 0.8, 0.75), order=3, order_z=3)
    data, properties = preprocess(plans, configuration, ramp(), spacing=(6.0, 1.1, 0.7))
    assert data.shape[1] != properties["shape_after_cropping_and_before_resampling"][0]
    edges = (np.random.default_rng(0).random((2, *data.shape[1:])) > 0.5).astype(np.float32)
    edges[1] = 2 + edges[1]
    back = to_original_geometry(edges, properties, plans, configuration)[(slice(None), *BOX)]
    assert (back[0].min(), back[0].max()) == (0, 1)
    assert (back[1].min(), back[1].max()) == (2, 3)


def test_tensors_of_half_precision_are_taken_and_inputs_are_not_changed():
    plans, configuration = plans_for((0.9, 0.8, 0.75))
    data, properties = preprocess(plans, configuration, ramp())
    half = torch.rand(data.shape).half()
    before = half.clone()
    back = to_original_geometry(half, properties, plans, configuration)
    np.testing.assert_array_equal(back, to_original_geometry(half.float().numpy(), properties, plans, configuration))
    assert torch.equal(half, before)


@pytest.mark.parametrize(("shape", "fill", "words"), [((4, 4, 4), 0, "expected"), ((2, 4, 4, 4), (1, 2, 3), "fill")])
def test_maps_and_fill_values_that_do_not_fit_are_refused(shape, fill, words):
    plans, configuration = plans_for((1, 1, 1))
    _, properties = preprocess(plans, configuration, ramp())
    with pytest.raises(ValueError, match=words):
        to_original_geometry(np.zeros(shape, np.float32), properties, plans, configuration, fill)


# files


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("reader", [SimpleITKIO, SimpleITKIOWithReorient])
def test_itk_files_have_the_geometry_of_an_oblique_anisotropic_input(tmp_path, ending, reader):
    image = oblique()
    sitk.WriteImage(image, str(tmp_path / f"in{ending}"))
    array, properties = reader().read_images([str(tmp_path / f"in{ending}")])
    out = tmp_path / "maps" / f"case{ending}"
    assert write_map(array[0], out, properties, reader) is None
    original, written = sitk.ReadImage(str(tmp_path / f"in{ending}")), sitk.ReadImage(str(out))
    for part in ("GetSize", "GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(written, part)(), getattr(original, part)(), atol=1e-6)
    assert written.GetPixelID() == sitk.sitkFloat32
    np.testing.assert_array_equal(sitk.GetArrayFromImage(written), sitk.GetArrayFromImage(image))
    assert os.listdir(out.parent) == [out.name]


@pytest.mark.parametrize("reader", [NibabelIO, NibabelIOWithReorient])
def test_nibabel_files_have_the_affine_and_the_axes_of_the_input(tmp_path, reader):
    sitk.WriteImage(oblique(), str(tmp_path / "in.nii.gz"))
    array, properties = reader().read_images([str(tmp_path / "in.nii.gz")])
    write_map(array[0], tmp_path / "out.nii.gz", properties, reader)
    original, written = nib.load(tmp_path / "in.nii.gz"), nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(written.affine, original.affine, atol=1e-6)
    assert written.get_data_dtype() == np.float32
    np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(original.dataobj))


def test_maps_and_masks_of_nnunet_have_the_same_header_geometry(tmp_path):
    sitk.WriteImage(oblique(), str(tmp_path / "in.nii.gz"))
    for reader in (SimpleITKIO, SimpleITKIOWithReorient, NibabelIO, NibabelIOWithReorient):
        array, properties = reader().read_images([str(tmp_path / "in.nii.gz")])
        reader().write_seg((array[0] > 0.5).astype(np.uint8), str(tmp_path / "mask.nii.gz"), properties)
        write_map(array[0], tmp_path / "map.nii.gz", properties, reader)
        mask, written = nib.load(tmp_path / "mask.nii.gz"), nib.load(tmp_path / "map.nii.gz")
        np.testing.assert_array_equal(written.affine, mask.affine)
        for field in ("sform_code", "qform_code", "xyzt_units"):
            assert written.header[field] == mask.header[field]
        np.testing.assert_array_equal(np.asarray(written.dataobj) > 0.5, np.asarray(mask.dataobj) == 1)


def test_a_2d_itk_image_gets_a_2d_map(tmp_path):
    image = sitk.GetImageFromArray(np.random.default_rng(0).random((5, 7), np.float32))
    image.SetSpacing((0.5, 2.0))
    image.SetOrigin((3.0, -4.0))
    sitk.WriteImage(image, str(tmp_path / "in.nrrd"))
    array, properties = SimpleITKIO().read_images([str(tmp_path / "in.nrrd")])
    write_map(array[0], tmp_path / "out.nrrd", properties, SimpleITKIO)
    written = sitk.ReadImage(str(tmp_path / "out.nrrd"))
    assert (written.GetSize(), written.GetSpacing(), written.GetOrigin()) == ((7, 5), (0.5, 2.0), (3.0, -4.0))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(written), sitk.GetArrayFromImage(image))
    with pytest.raises(ValueError, match=r"out\.nrrd.*2D"):
        write_map(np.zeros((2, 5, 7)), tmp_path / "out.nrrd", properties, SimpleITKIO)


@pytest.mark.parametrize("scale", [None, 2.0])
def test_png_holds_16_bit_grey_values_by_a_scale(tmp_path, scale):
    values = np.random.default_rng(0).random((1, 6, 9), np.float32)
    used = write_map(values, tmp_path / "case.png", {"spacing": (999, 1, 1)}, NaturalImage2DIO, scale)
    assert used == (scale or values.max())
    stored = io.imread(tmp_path / "case.png")
    assert stored.dtype == np.uint16
    np.testing.assert_array_equal(stored, np.rint(values[0].astype(float) / used * 65535))
    np.testing.assert_allclose(stored / 65535 * used, values[0], atol=used / 65535 / 2 * 1.001)


def test_an_empty_png_map_has_the_scale_1(tmp_path):
    assert write_map(np.zeros((1, 3, 3)), tmp_path / "case.png", {}, NaturalImage2DIO) == 1
    assert not io.imread(tmp_path / "case.png").any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 1.1])
def test_values_that_a_png_cannot_hold_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match=r"case\.png"):
        write_map(np.full((1, 3, 3), value), tmp_path / "case.png", {}, NaturalImage2DIO, scale=1.0)
    assert not list(tmp_path.iterdir())


def test_rounding_outside_of_the_scale_of_a_png_is_cut_off(tmp_path):
    scale = math.log(3)
    values = scale * np.array([[[-9e-6, 1 + 9e-6, 0.5]]])
    write_map(values, tmp_path / "a.png", {}, NaturalImage2DIO, scale)
    assert io.imread(tmp_path / "a.png").tolist() == [[0, 65535, 32768]]


def test_a_2d_tif_holds_the_values_themselves(tmp_path):
    values = np.random.default_rng(0).random((1, 6, 3), np.float32)
    assert write_map(values, tmp_path / "case.tif", {}, NaturalImage2DIO) is None
    stored = tifffile.imread(tmp_path / "case.tif")
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, values[0])


@pytest.mark.parametrize("shape", [(4, 5, 6), (5, 6, 3), (1, 5, 6)])
def test_a_3d_tif_is_read_back_by_nnunet_with_its_spacing(tmp_path, shape):
    values = np.random.default_rng(0).random(shape, np.float32)
    write_map(values, tmp_path / "case.tif", {"spacing": list(SPACING)}, Tiff3DIO)
    array, properties = Tiff3DIO().read_seg(str(tmp_path / "case.tif"))
    np.testing.assert_array_equal(array[0], values)
    assert properties["spacing"] == list(SPACING)
    assert sorted(os.listdir(tmp_path)) == ["case.json", "case.tif"]


def test_a_map_goes_from_the_network_to_the_file_of_a_cropped_transposed_image(tmp_path):
    """Reader, preprocessor, back and file: the map lies on the image in space."""
    image = oblique((17, 14, 9), permuted=False)
    header = sitk.GetImageFromArray(ramp())
    header.CopyInformation(image)
    sitk.WriteImage(header, str(tmp_path / "in.nii.gz"))
    plans, configuration = plans_for((0.6, 0.6, 2.0), (1, 2, 0))
    data, _, properties = DefaultPreprocessor(verbose=False).run_case_npy(
        *SimpleITKIO().read_images([str(tmp_path / "in.nii.gz")])[:1],
        None,
        SimpleITKIO().read_images([str(tmp_path / "in.nii.gz")])[1],
        plans,
        configuration,
        {},
    )
    (back,) = to_original_geometry(data, properties, plans, configuration)
    write_map(back, tmp_path / "out.nii.gz", properties, SimpleITKIO)
    written = sitk.ReadImage(str(tmp_path / "out.nii.gz"))
    for index in ((8, 7, 4), (5, 6, 5)):
        point = header.TransformIndexToPhysicalPoint(index)
        assert written[written.TransformPhysicalPointToIndex(point)] == pytest.approx(header[index], rel=1e-4)


# what cannot be written


class SiteIO(SimpleITKIO):
    def read_images(self, image_fnames):
        return super().read_images(image_fnames)[::-1]


class RenamedIO(SimpleITKIO):
    """Adds nothing to what it inherits."""


def test_a_reader_of_a_sites_own_is_refused_by_name_before_anything_is_written(tmp_path):
    with pytest.raises(MapWriterError, match="SiteIO"):
        check_map_writer(SiteIO, ".nii.gz")
    with pytest.raises(MapWriterError, match="SiteIO"):
        write_map(np.zeros((2, 3, 4)), tmp_path / "maps" / "case.nii.gz", {}, SiteIO)
    assert not list(tmp_path.iterdir())
    assert check_map_writer(RenamedIO, ".nii.gz") == ".nii.gz"


@pytest.mark.parametrize(
    ("reader", "ending"),
    [(NaturalImage2DIO, ".jpg"), (NibabelIO, ".nrrd"), (SimpleITKIO, ".bmp"), (Tiff3DIO, ".png")],
)
def test_an_ending_that_a_class_cannot_write_is_refused_by_name(tmp_path, reader, ending):
    with pytest.raises(MapWriterError, match=rf"{ending}.*{reader.__name__}"):
        check_map_writer(reader, ending)
    with pytest.raises(MapWriterError, match=rf"case{ending}.*{reader.__name__}"):
        write_map(np.zeros((1, 3, 4)), tmp_path / f"case{ending}", {}, reader)


def test_maps_of_bmp_images_are_png():
    assert check_map_writer(NaturalImage2DIO, ".bmp") == ".png"
    assert check_map_writer(NaturalImage2DIO, ".png") == ".png"
    assert check_map_writer(NaturalImage2DIO, ".tif") == ".tif"


KINDS = {
    "itk": (SimpleITKIO, "case.nii.gz", "sitk.WriteImage"),
    "nibabel": (NibabelIO, "case.nii.gz", "nibabel.save"),
    "png": (NaturalImage2DIO, "case.png", "io.imsave"),
    "tif": (Tiff3DIO, "case.tif", "tifffile.imwrite"),
    "tif_spacing": (Tiff3DIO, "case.tif", "Path.write_bytes"),
}
PROPERTIES = {
    "spacing": (999, 1, 1),
    "sitk_stuff": {"spacing": (1, 1, 1), "origin": (0, 0, 0), "direction": np.eye(3).ravel().tolist()},
    "nibabel_stuff": {"original_affine": np.eye(4)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_leaves_no_new_file_and_the_old_one_as_it_was(tmp_path, monkeypatch, kind):
    reader, name, function = KINDS[kind]
    write_map(np.ones((1, 6, 7)), tmp_path / name, PROPERTIES, reader)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(first, second, *args, **kwargs):
        target = next(a for a in (second, first) if isinstance(a, str | os.PathLike))
        with open(target, "wb") as file:
            file.write(b"part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"{module.__name__}.{function}", full)
    with pytest.raises(OSError, match="case.json" if kind == "tif_spacing" else name) as caught:
        write_map(np.zeros((1, 6, 7)), tmp_path / name, PROPERTIES, reader)
    assert caught.value.errno == errno.ENOSPC
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.fixture
def files_of_4000_bytes():
    """No file of this process can become larger."""
    resource = pytest.importorskip("resource", reason="needs POSIX limits")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Pillow's file, when it is deleted
@pytest.mark.usefixtures("files_of_4000_bytes")
@pytest.mark.parametrize(
    ("reader", "ending"),
    [
        *((SimpleITKIO, ending) for ending in (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl")),
        (NibabelIO, ".nii.gz"),
        (NaturalImage2DIO, ".png"),
        (Tiff3DIO, ".tif"),
    ],
)
def test_a_real_writer_that_runs_out_of_space_is_noticed(tmp_path, reader, ending):
    """ITK reports success where it wrote a part of a NIfTI file."""
    array = np.random.default_rng(0).random((1, 60, 70))
    array[0, 40:] = 0  # missing zeros must not pass for zeros
    with pytest.raises(OSError, match=f"case{ending}"):
        write_map(array, tmp_path / f"case{ending}", PROPERTIES, reader)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".gipl"])
def test_a_mask_that_lacks_its_last_byte_is_not_whole(tmp_path, ending):
    path = tmp_path / f"case{ending}"
    SimpleITKIO().write_seg(np.ones((1, 6, 7), np.uint8), str(path), PROPERTIES)
    check_whole(path, 6 * 7)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match=f"case{ending} is not whole"):
        check_whole(path, 6 * 7)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_nothing_and_passes_on(tmp_path, kind):
    def interrupted():
        with written_whole(tmp_path / "case.nii.gz", ".nii.gz") as part:
            part.write_text("half")
            assert part.name.endswith(".nii.gz")
            raise kind

    with pytest.raises(kind):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "maps").write_text("a file")
    with pytest.raises(OSError, match=r"maps.case\.png"):
        write_map(np.zeros((1, 3, 3)), tmp_path / "maps" / "case.png", {}, NaturalImage2DIO)
    assert (tmp_path / "maps").read_text() == "a file"


def test_a_map_replaces_an_older_one_and_can_be_read_as_other_new_files(tmp_path):
    for value in (0.25, 0.5):
        write_map(np.full((1, 3, 3), value), tmp_path / "case.tif", {}, NaturalImage2DIO)
    (tmp_path / "plain").touch()
    assert (tifffile.imread(tmp_path / "case.tif") == 0.5).all()
    assert (tmp_path / "case.tif").stat().st_mode == (tmp_path / "plain").stat().st_mode
