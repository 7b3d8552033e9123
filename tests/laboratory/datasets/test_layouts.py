"""Every data set, from a miniature of its owner's archive to nnU-Net's raw layout."""

import json

import miniatures
import nibabel as nib
import numpy as np
import pytest
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from laboratory.datasets.convert import DATASETS
from laboratory.datasets.sources import Sources

SMALL = ("--incomplete",)


def cases(folder, part):
    ending = json.loads((folder / "dataset.json").read_text())["file_ending"]
    return sorted(file.name.removesuffix(ending) for file in (folder / f"labels{part}").iterdir())


def picture(folder, name, part="Tr"):
    """Image and mask of a case as nnU-Net reads them: (channels, 1, rows, columns)."""
    reader = NaturalImage2DIO()
    image, _ = reader.read_images([str(folder / f"images{part}" / f"{name}_0000.png")])
    return image, reader.read_seg(str(folder / f"labels{part}" / f"{name}.png"))[0]


def fold(folder):
    (only,) = json.loads((folder / "splits_final.json").read_text())
    return only["train"], only["val"]


def label_values(folder, name, part="Tr"):
    return np.asarray(nib.load(folder / f"labels{part}" / f"{name}.nii.gz").dataobj).reshape(-1)


def description(folder):
    return json.loads((folder / "dataset.json").read_text())


@pytest.fixture
def files(tmp_path):
    return tmp_path / "files"


def test_muscle_images_keep_their_owners_parts(converted, files, tmp_path):
    miniatures.muscle_us(files)
    folder = converted("muscle-us", miniatures.pack(files, tmp_path / "a.zip"), options=SMALL)
    assert folder.name == "Dataset510_MuscleUS"
    assert fold(folder) == ([f"BB_anon_{i}_1" for i in range(4)], ["BB_anon_4_1", "BB_anon_5_1"])
    assert cases(folder, "Tr") == [f"BB_anon_{i}_1" for i in range(6)]
    assert cases(folder, "Ts") == [f"BB_anon_{i}_1" for i in range(6, 9)]
    image, mask = picture(folder, "BB_anon_5_1")
    assert image.shape == mask.shape == (1, 1, *miniatures.SHAPE)
    assert (image == 105).all()
    assert (mask[0, 0, :2] == 1).all()
    assert mask.sum() == 2 * miniatures.SHAPE[1]


def test_muscle_images_without_masks_are_left_out_and_named(run, files, host):
    root = miniatures.muscle_us(files)
    miniatures.remove(root / "trainannot" / "BB_anon_2_1.png")
    status, said = run("muscle-us", files, options=("--id", "510", *SMALL))
    assert status == 0
    assert "BB_anon_2_1.png" in said
    assert cases(host / "nnUNet_raw" / "Dataset510_MuscleUS", "Tr") == [f"BB_anon_{i}_1" for i in (0, 1, 3, 4, 5)]


def test_muscle_images_are_taken_from_musclecnn_if_the_archive_has_another_network(converted, files):
    root = miniatures.muscle_us(files)
    other = root.with_name("OtherCNN")
    root.rename(other)
    miniatures.muscle_us(files, 3, 1, 2)
    assert len(cases(converted("muscle-us", files, options=SMALL), "Tr")) == 4


def test_amos_takes_ct_only_and_cuts_the_official_validation_set_in_listed_order(converted, files, tmp_path):
    shuffled = (27, *range(8, 27), 583)
    miniatures.amos(files, val=shuffled)
    folder = converted("amos-ct", miniatures.pack(files, tmp_path / "amos22.zip"), options=SMALL)
    assert fold(folder) == (["amos_0001", "amos_0004", "amos_0410"], ["amos_0027", "amos_0008"])
    assert cases(folder, "Ts") == [f"amos_{i:04d}" for i in range(9, 27)]
    assert label_values(folder, "amos_0001")[:16].tolist() == list(range(16))
    labels = description(folder)["labels"]
    assert labels["spleen"] == 1
    assert labels["prostate/uterus"] == 15
    assert description(folder)["overwrite_image_reader_writer"] == "NibabelIOWithReorient"


def test_pelvic_cases_are_split_in_each_institution_in_listed_order(converted, files, tmp_path):
    miniatures.male_pelvic(files, {"1": 12, "2": 8})
    table = files / "institution.txt"
    table.rename(tmp_path / "institution.txt")
    archive = miniatures.pack(files, tmp_path / "data.zip")
    folder = converted("male-pelvic-mr", archive, tmp_path / "institution.txt", options=SMALL)
    first, second = [f"pelvis_{900 - i:06d}" for i in range(12)], [f"pelvis_{888 - i:06d}" for i in range(8)]
    assert fold(folder) == (first[2:7] + second[2:4], first[:2] + second[:2])
    assert cases(folder, "Ts") == sorted(first[7:] + second[4:])
    assert label_values(folder, first[0])[:9].tolist() == list(range(9))
    image, properties = SimpleITKIO().read_images([str(folder / "imagesTr" / f"{first[0]}_0000.nii.gz")])
    assert (image == 900).all()
    np.testing.assert_allclose(properties["spacing"], (2.5, 0.9, 0.8), rtol=1e-6)


def test_pelvic_cases_may_lie_beside_their_table(converted, files):
    miniatures.male_pelvic(files)
    for file in (files / "data").iterdir():
        file.rename(files / file.name)
    (files / "data").rmdir()
    assert len(cases(converted("male-pelvic-mr", files, options=SMALL), "Tr")) == 11


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("brats2021-whole-tumour", [0, 1, 1, 1]),
        ("brats2021-classes", [0, 1, 2, 3]),
        ("brats2021-regions", [0, 1, 2, 3]),
    ],
)
def test_brats_has_four_channels_and_consecutive_labels(name, expected, converted, files, tmp_path):
    miniatures.brats(files)
    folder = converted(name, miniatures.pack(files, tmp_path / "BraTS2021_Training_Data.tar"), options=SMALL)
    case = cases(folder, "Tr")[3]
    assert label_values(folder, case)[:4].tolist() == expected
    for channel in range(4):
        image = nib.load(folder / "imagesTr" / f"{case}_{channel:04d}.nii.gz")
        assert (np.asarray(image.dataobj) == 10 * int(case[-5:]) + channel).all()
        np.testing.assert_allclose(image.affine, miniatures.AFFINE, rtol=1e-6)
    label = nib.load(folder / "labelsTr" / f"{case}.nii.gz")
    np.testing.assert_array_equal(label.affine, image.affine)
    assert label.get_data_dtype() == np.uint8
    assert list(description(folder)["channel_names"].values()) == ["T1", "T1ce", "T2", "FLAIR"]


def test_brats_inside_kaggles_zip_is_found_and_single_cases_beside_it_are_not_needed(converted, files, tmp_path):
    miniatures.brats(files)
    outer = tmp_path / "outer"
    outer.mkdir()
    miniatures.pack(files, outer / "BraTS2021_Training_Data.tar")
    miniatures.brats(tmp_path / "single", [495])
    miniatures.pack(tmp_path / "single", outer / "BraTS2021_00495.tar")
    archive = miniatures.pack(outer, tmp_path / "archive.zip")
    folder = converted("brats2021-whole-tumour", archive, options=SMALL)
    names = cases(folder, "Tr") + cases(folder, "Ts")
    assert names == [f"BraTS2021_{i:05d}" for i in range(0, 24, 2)]


def test_brats_cases_of_the_official_validation_set_are_left_out(converted, files):
    miniatures.brats(files / "RSNA_ASNR_MICCAI_BraTS2021_TrainingData")
    unlabelled = files / "RSNA_ASNR_MICCAI_BraTS2021_ValidationData"
    miniatures.brats(unlabelled, [1, 3])
    for file in unlabelled.rglob("*_seg.nii.gz"):
        file.unlink()
    folder = converted("brats2021-whole-tumour", files, options=SMALL)
    assert not {"BraTS2021_00001", "BraTS2021_00003"} & {*cases(folder, "Tr"), *cases(folder, "Ts")}


def test_brats_regions_convert_back_to_the_labels_they_were_made_of(converted, files):
    miniatures.brats(files)
    dataset = description(converted("brats2021-regions", files, options=SMALL))
    manager = LabelManager(dataset["labels"], dataset["regions_class_order"])
    labels = np.array([[[0, 1, 2, 3]]])
    regions = np.stack([np.isin(labels, region) for region in manager.foreground_regions]).astype(np.float32)
    assert [region.ravel().tolist() for region in regions] == [[0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]]
    np.testing.assert_array_equal(manager.convert_probabilities_to_segmentation(regions), labels)


def test_synapse_keeps_eight_organs_of_transunets_scans(converted, files, tmp_path):
    miniatures.synapse(files)
    folder = converted("synapse", miniatures.pack(files, tmp_path / "RawData.zip"))
    test = {1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38}
    train = sorted({*range(1, 11), *range(21, 41)} - test)
    assert cases(folder, "Ts") == [f"synapse_{i:04d}" for i in sorted(test)]
    assert cases(folder, "Tr") == [f"synapse_{i:04d}" for i in train]
    # spleen, right kidney, left kidney, gallbladder, oesophagus, liver, stomach, aorta, two veins, pancreas, adrenals
    assert label_values(folder, "synapse_0005")[:14].tolist() == [0, 7, 4, 3, 2, 0, 5, 8, 1, 0, 0, 6, 0, 0]
    labels = description(folder)["labels"]
    assert [labels[name] for name in ("aorta", "pancreas", "spleen", "stomach")] == [1, 6, 7, 8]
    assert not (folder / "splits_final.json").exists()


def test_kvasir_masks_are_binary_although_they_are_lossy(converted, files, tmp_path):
    root = miniatures.kvasir(files)
    miniatures.mask(root / "masks" / "cju03abc.jpg", rows=4, shape=(8, 16), white=250, black=6)
    folder = converted("kvasir-seg", miniatures.pack(files, tmp_path / "kvasir-seg.zip"), options=SMALL)
    part = "Tr" if "cju03abc" in cases(folder, "Tr") else "Ts"
    image, mask = picture(folder, "cju03abc", part)
    assert image.shape == (3, 1, 8, 16)
    assert abs(image[:, 0, 0, 0] - (15, 20, 30)).max() < 6
    assert (mask[0, 0, :4] == 1).all()
    assert (mask[0, 0, 4:] == 0).all()
    assert list(description(folder)["channel_names"].values()) == ["rgb_to_0_1"] * 3


@pytest.mark.parametrize("ending", [".tif", ".png"])
def test_cvc_pairs_images_and_masks_of_the_same_number(ending, converted, files):
    root = miniatures.cvc(files)
    for file in list(root.rglob("*.tif")):
        miniatures.Image.open(file).save(file.with_suffix(".new" + ending))
        file.unlink()
        file.with_suffix(".new" + ending).rename(file.with_suffix(ending))
    folder = converted("cvc-clinicdb", files, options=SMALL)
    names = {name: part for part in ("Tr", "Ts") for name in cases(folder, part)}
    assert sorted(names) == [f"cvc_{i:03d}" for i in range(1, 13)]
    for name, part in names.items():
        assert picture(folder, name, part)[0][0].max() == int(name[-3:])


def test_drive_takes_the_first_observer_from_two_archives(converted, files, tmp_path):
    root = miniatures.drive(files)
    for number in range(1, 21):
        miniatures.mask(root / "test" / "2nd_manual" / f"{number:02d}_manual2.gif", rows=6)
    archives = []
    for part in ("training", "test"):
        (tmp_path / part).mkdir()
        (root / part).rename(tmp_path / part / part)
        archives.append(miniatures.pack(tmp_path / part, tmp_path / f"{part}.zip"))
    folder = converted("drive", *archives)
    assert cases(folder, "Tr") == [f"drive_{i}" for i in range(21, 41)]
    assert cases(folder, "Ts") == [f"drive_{i:02d}" for i in range(1, 21)]
    image, mask = picture(folder, "drive_07", "Ts")
    assert (image[0] == 7).all()
    assert mask.sum() == 2 * miniatures.SHAPE[1]


def test_drive_without_test_annotations_has_no_test_labels(run, files, host):
    miniatures.drive(files, test_labels=False)
    status, said = run("drive", files)
    folder = host / "nnUNet_raw" / "Dataset510_DRIVE"
    assert status == 0
    assert "without labels" in said
    assert not (folder / "labelsTs").exists()
    assert len(list((folder / "imagesTs").iterdir())) == 20


def test_drive_without_training_annotations_is_an_error(run, files):
    root = miniatures.drive(files)
    miniatures.remove(root / "training" / "1st_manual")
    status, said = run("drive", files)
    assert status == 1
    assert "training/1st_manual" in said


def test_chase_takes_the_first_observer_and_splits_by_child(converted, files, tmp_path):
    miniatures.chase(files)
    folder = converted("chase-db1", miniatures.pack(files, tmp_path / "CHASEDB1.zip"))
    assert cases(folder, "Tr") == [f"chase_{i:02d}{eye}" for i in range(1, 11) for eye in "LR"]
    assert cases(folder, "Ts") == [f"chase_{i:02d}{eye}" for i in range(11, 15) for eye in "LR"]
    assert picture(folder, "chase_11L", "Ts")[1].sum() == miniatures.SHAPE[1]


def full_size(name, files):
    """Files without content of the whole data set."""
    if name == "muscle-us":
        for part, count in {"train": 2531, "val": 666, "test": 713}.items():
            for folder in (part, f"{part}annot"):
                miniatures.empty(files / folder, [f"{part}_{i}.png" for i in range(count)])
    elif name == "amos-ct":
        listed = {}
        for part, key, count in (("Tr", "training", 200), ("Va", "validation", 100)):
            names = [f"amos_{2 * i + (part == 'Va'):04d}.nii.gz" for i in range(count)]
            for kind in ("images", "labels"):
                miniatures.empty(files / f"{kind}{part}", names)
            listed[key] = [{"image": f"./images{part}/{n}", "label": f"./labels{part}/{n}"} for n in names]
        (files / "dataset.json").write_text(json.dumps(listed))
    elif name == "male-pelvic-mr":
        # any seven institutions of which 439 cases lie below three quarters, rounded down, give the paper's numbers
        institutions = [i for i, n in enumerate((201, 101, 85, 62, 60, 40, 40)) for _ in range(n)]
        names = [f"{number:06d}" for number in range(len(institutions))]
        miniatures.empty(files, [f"{n}_{kind}.nii" for n in names for kind in ("img", "mask")])
        lines = [f"{n} {i}" for n, i in zip(names, institutions, strict=True)]
        (files / "institution.txt").write_text("\n".join(lines))
    elif name.startswith("brats2021"):
        for case in (f"BraTS2021_{i:05d}" for i in range(1251)):
            miniatures.empty(files / case, [f"{case}_{k}.nii.gz" for k in ("t1", "t1ce", "t2", "flair", "seg")])
    elif name == "kvasir-seg":
        for folder in ("images", "masks"):
            miniatures.empty(files / folder, [f"c{i:04d}.jpg" for i in range(1000)])
    elif name == "cvc-clinicdb":
        for folder in ("Original", "Ground Truth"):
            miniatures.empty(files / folder, [f"{i}.tif" for i in range(1, 613)])
    elif name == "synapse":
        miniatures.synapse(files)
    elif name == "drive":
        miniatures.drive(files)
    else:
        miniatures.chase(files)


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "brats2021-regions"])  # as classes
def test_parts_of_the_whole_data_set_have_the_papers_numbers(name, files, tmp_path):
    full_size(name, files)
    dataset = DATASETS[name]
    collection = dataset.collect(Sources([files], tmp_path / "scratch"), 0)
    parts = (collection.train, collection.val, collection.test)
    assert tuple(map(len, parts)) == dataset.counts
    assert len({case.name for part in parts for case in part}) == sum(dataset.counts)
    files_of_a_case = 4 if name.startswith("brats") else 1  # nnU-Net reads the colours of a picture from one file
    assert all(len(case.images) == files_of_a_case for part in parts for case in part)


def test_whole_tumour_split_is_in_sorted_order(files, tmp_path):
    full_size("brats2021-whole-tumour", files)
    collection = DATASETS["brats2021-whole-tumour"].collect(Sources([files], tmp_path / "scratch"), 0)
    names = [case.name for part in (collection.train, collection.val, collection.test) for case in part]
    assert names == sorted(names)
