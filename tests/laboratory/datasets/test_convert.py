"""What the converter does with archives, with what is missing or unexpected, and with what exists."""

import json
import os
import tarfile
import zipfile
from pathlib import Path

import miniatures
import numpy as np
import pytest
from PIL import Image

from laboratory.datasets import convert, papers, raw
from laboratory.datasets.raw import Case

REPOSITORY = Path(__file__).resolve().parents[3]
SMALL = ("--id", "510", "--incomplete")


@pytest.fixture
def files(tmp_path):
    return tmp_path / "files"


@pytest.fixture
def untouched(host):
    """Check at the end that nothing is left in nnU-Net's folders."""
    yield
    assert sorted(miniatures.snapshot(host)) == ["nnUNet_preprocessed", "nnUNet_raw", "nnUNet_results"]


@pytest.mark.parametrize("archive", ["a.zip", "a.tar", "a.tar.gz"])
def test_archives_and_folders_give_the_same(archive, converted, files, tmp_path, host):
    miniatures.kvasir(files, 10)
    before = miniatures.snapshot(files)
    folder = converted("kvasir-seg", files, options=("--incomplete",))
    assert miniatures.snapshot(files) == before  # the user's files stay
    expected = miniatures.snapshot(folder)
    miniatures.remove(folder)
    miniatures.remove(host / "nnUNet_preprocessed" / folder.name)
    folder = converted("kvasir-seg", miniatures.pack(files, tmp_path / archive), options=("--incomplete",))
    assert miniatures.snapshot(folder) == expected


def test_files_that_systems_add_are_ignored(converted, files, tmp_path):
    root = miniatures.kvasir(files, 10)
    miniatures.empty(root / "images", [".DS_Store", "Thumbs.db", "._cju00abc.jpg"])
    miniatures.empty(files / "__MACOSX" / "Kvasir-SEG" / "images", ["._cju00abc.jpg"])
    miniatures.empty(files / "__MACOSX" / "Kvasir-SEG" / "masks", ["._cju00abc.jpg"])
    folder = converted("kvasir-seg", miniatures.pack(files, tmp_path / "a.zip"), options=("--incomplete",))
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 9


@pytest.mark.parametrize("member", ["../escaped.jpg", "/escaped.jpg", "a/../../escaped.jpg", "C:/escaped.jpg"])
def test_members_that_leave_the_archives_folder_are_refused(member, run, tmp_path, untouched):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(member, b"x")
    status, said = run("kvasir-seg", tmp_path / "a.zip")
    assert status == 1
    assert member in said
    assert not list(tmp_path.rglob("escaped.jpg"))


def test_links_in_archives_are_not_followed(run, files, tmp_path, untouched):
    root = miniatures.kvasir(files, 10)
    secret = tmp_path / "secret.jpg"
    (root / "images" / "cju00abc.jpg").rename(secret)
    miniatures.pack(files, tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        link = tarfile.TarInfo("Kvasir-SEG/images/cju00abc.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(link)
    status, said = run("kvasir-seg", tmp_path / "a.tar")
    assert status == 1
    assert "labels without images: cju00abc.jpg" in said


@pytest.mark.parametrize("archive", ["a.zip", "a.tar.gz"])
def test_a_damaged_archive_is_named(archive, run, files, tmp_path, untouched):
    miniatures.kvasir(files, 10)
    whole = miniatures.pack(files, tmp_path / archive).read_bytes()
    cut = whole[: len(whole) // 2] if archive.endswith("gz") else whole.replace(b"JFIF", b"JUNK")
    (tmp_path / archive).write_bytes(cut)
    status, said = run("kvasir-seg", tmp_path / archive)
    assert status == 1
    assert f"{archive} is damaged" in said


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path.write_bytes(b"Rar!\x1a\x07"), "expected a folder, a .zip or a .tar"),
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "found no folder with images and masks"),
    ],
)
def test_other_sources_are_named(make, expected, run, tmp_path, untouched):
    source = tmp_path / "Kvasir.rar"
    make(source)
    status, said = run("kvasir-seg", source)
    assert status == 1
    assert str(source) in said
    assert expected in said


def test_two_folders_that_fit_are_both_named(run, files, untouched):
    miniatures.kvasir(files, 10).rename(files / "one")
    miniatures.kvasir(files, 10).rename(files / "two")
    status, said = run("kvasir-seg", files)
    assert status == 1
    assert str(files / "one") in said
    assert str(files / "two") in said


def test_a_missing_partner_is_an_error_that_names_it(run, files, untouched):
    root = miniatures.kvasir(files, 10)
    miniatures.remove(root / "masks" / "cju04abc.jpg")
    status, said = run("kvasir-seg", files)
    assert status == 1
    assert "images without labels: cju04abc.jpg" in said


def test_an_unexpected_file_is_an_error_that_names_it(run, files, tmp_path, untouched):
    root = miniatures.chase(files)
    miniatures.rgb(root / "Image_15X.jpg", 1)
    status, said = run("chase-db1", miniatures.pack(files, tmp_path / "CHASEDB1.zip"))
    assert status == 1
    assert "CHASEDB1.zip: unexpected Image_15X.jpg" in said


@pytest.mark.parametrize("kind", ["t1ce", "seg"])
def test_a_missing_brats_file_is_an_error_that_names_it(kind, run, files, untouched):
    miniatures.brats(files)
    miniatures.remove(files / "BraTS2021_00004" / f"BraTS2021_00004_{kind}.nii.gz")
    status, said = run("brats2021-classes", files)
    assert status == 1
    assert f"no BraTS2021_00004_{kind}.nii.gz" in said


def test_a_file_that_amos_lists_but_lacks_is_an_error_that_names_it(run, files, untouched):
    root = miniatures.amos(files)
    miniatures.remove(root / "labelsVa" / "amos_0013.nii.gz")
    status, said = run("amos-ct", files)
    assert status == 1
    assert "./labelsVa/amos_0013.nii.gz" in said


def test_a_case_that_the_institutions_lack_is_an_error_that_names_it(run, files, untouched):
    miniatures.male_pelvic(files)
    table = files / "institution.txt"
    table.write_text(table.read_text().replace("000893 1\n", "000777 1\n"))
    status, said = run("male-pelvic-mr", files)
    assert status == 1
    assert "000777" in said
    table.write_text("000900\n")
    assert "line 1 is '000900'" in run("male-pelvic-mr", files)[1]


def test_other_numbers_of_cases_than_the_papers_are_an_error(run, files, untouched):
    miniatures.kvasir(files, 10)
    status, said = run("kvasir-seg", files)
    assert status == 1
    assert "found 8 to train, 1 to validate, 1 to test" in said
    assert "800 to train, 100 to validate, 100 to test" in said


def test_incomplete_sources_are_converted_if_told_so_and_what_is_missing_is_named(run, files, host):
    root = miniatures.kvasir(files, 10)
    miniatures.remove(root / "masks" / "cju04abc.jpg")
    status, said = run("kvasir-seg", files, options=SMALL)
    assert status == 0
    assert "cju04abc.jpg" in said
    assert "the paper's split is 800 to train" in said
    folder = host / "nnUNet_raw" / "Dataset510_KvasirSEG"
    assert len(list((folder / "imagesTr").iterdir())) + len(list((folder / "imagesTs").iterdir())) == 9


def break_mask_size(root):
    miniatures.mask(root / "masks" / "cju09abc.jpg", shape=(5, 16))
    return "(16, 5), expected (16, 8)"


def break_mask_values(root):
    file = root / "masks" / "cju09abc.jpg"
    Image.fromarray(np.ones((8, 16), np.uint8)).save(file, quality=100)
    return "brightest pixel is 1, expected a mask of 0 and 255"


def break_mask_file(root):
    (root / "masks" / "cju09abc.jpg").write_bytes(b"no picture")
    return "cannot be read"


def break_image_file(root):
    file = root / "images" / "cju09abc.jpg"
    file.write_bytes(file.read_bytes()[:300])
    return "cannot be read"


@pytest.mark.parametrize("damage", [break_mask_size, break_mask_values, break_mask_file, break_image_file])
def test_a_picture_that_cannot_be_used_is_named_and_nothing_is_left(damage, run, files, tmp_path, untouched):
    root = miniatures.kvasir(files, 10)
    expected = damage(root)
    status, said = run("kvasir-seg", miniatures.pack(files, tmp_path / "a.zip"), options=SMALL)
    assert status == 1
    assert "a.zip/Kvasir-SEG/" in said
    assert "unpacked" not in said
    assert "cju09abc.jpg" in said
    assert expected in said


@pytest.mark.parametrize(
    ("values", "shape", "expected"),
    [
        ((0, 1, 14), miniatures.VOLUME, "found the labels [14.0]"),
        ((0, 0.5), miniatures.VOLUME, "found the labels [0.5]"),
        ((0, 1), (5, 6, 8), "its shape is (5, 6, 8), expected (5, 6, 7)"),
    ],
)
def test_a_label_map_that_cannot_be_used_is_named_and_nothing_is_left(values, shape, expected, run, files, untouched):
    root = miniatures.synapse(files)
    miniatures.label_map(root / "label" / "label0040.nii.gz", values, np.float32, shape)
    status, said = run("synapse", files)
    assert status == 1
    assert "label0040.nii.gz" in said
    assert expected in said


def test_a_damaged_volume_is_named(run, files, untouched):
    root = miniatures.synapse(files)
    file = root / "label" / "label0001.nii.gz"
    file.write_bytes(file.read_bytes()[:-40])
    status, said = run("synapse", files)
    assert status == 1
    assert "label0001.nii.gz cannot be read" in said


def test_nothing_is_left_if_it_is_interrupted(files, monkeypatch, untouched):
    miniatures.kvasir(files, 10)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(raw, "write_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert.main(["kvasir-seg", "--from", str(files), *SMALL])


@pytest.mark.parametrize(
    "existing",
    ["nnUNet_raw/Dataset510_KvasirSEG", "nnUNet_raw/Dataset510_Other", "nnUNet_preprocessed/Dataset510_KvasirSEG"],
)
def test_nothing_that_exists_is_overwritten(existing, run, files, host):
    miniatures.kvasir(files, 10)
    (host / existing).mkdir()
    (host / existing / "mine.txt").write_text("mine")
    before = miniatures.snapshot(host)
    status, said = run("kvasir-seg", files, options=SMALL)
    assert status == 1
    assert str(host / existing) in said
    assert miniatures.snapshot(host) == before


def test_the_split_is_written_where_nnunet_looks_for_it(run, files, host):
    miniatures.kvasir(files, 10)
    status, said = run("kvasir-seg", files, options=SMALL)
    place = host / "nnUNet_preprocessed" / "Dataset510_KvasirSEG" / "splits_final.json"
    assert status == 0
    assert f"{place}: written" in said
    assert place.read_text() == (host / "nnUNet_raw" / "Dataset510_KvasirSEG" / "splits_final.json").read_text()


def test_the_split_is_to_be_copied_if_the_output_is_elsewhere(run, files, host, tmp_path):
    miniatures.kvasir(files, 10)
    (tmp_path / "out").mkdir()
    status, said = run("kvasir-seg", files, options=(*SMALL, "--out", str(tmp_path / "out")))
    assert status == 0
    assert f"copy {tmp_path / 'out' / 'Dataset510_KvasirSEG' / 'splits_final.json'}" in said
    assert not list((host / "nnUNet_preprocessed").iterdir())


def test_without_a_folder_for_the_output_it_says_so(run, files, monkeypatch, tmp_path):
    monkeypatch.delenv("nnUNet_raw")
    assert "nnUNet_raw is not set" in run("kvasir-seg", files)[1]
    missing = tmp_path / "missing"
    assert f"{missing}: no such folder" in run("kvasir-seg", files, options=("--id", "510", "--out", str(missing)))[1]


def test_data_sets_without_validation_cases_get_no_split(run, files, host):
    miniatures.chase(files)
    status, said = run("chase-db1", files)
    assert status == 0
    assert "nnUNetv2_train 510 CONFIGURATION all" in said
    assert not list((host / "nnUNet_preprocessed").iterdir())


def drawn(collect, count, seed):
    cases = [Case(f"{i:04d}", (), None) for i in range(count)]
    return {part: [case.name for case in found] for part, found in raw.draw(cases, collect, seed).items()}


def test_drawn_parts_depend_on_the_seed_only():
    counts = papers.KVASIR_COUNTS
    first = drawn(counts, 1000, 0)
    assert first == drawn(counts, 1000, 0)
    assert first != drawn(counts, 1000, 1)
    assert [len(first[part]) for part in raw.PARTS] == [800, 100, 100]
    assert sorted(name for part in first.values() for name in part) == [f"{i:04d}" for i in range(1000)]
    assert first["test"] != [f"{i:04d}" for i in range(900, 1000)]


def test_parts_of_other_numbers_are_in_proportion():
    parts = raw.cut(list(range(50)), (80, 10, 10))
    assert [len(part) for part in parts.values()] == [40, 5, 5]
    assert [*parts["train"], *parts["val"], *parts["test"]] == list(range(50))


def test_the_seed_of_a_drawn_split_is_used_and_recorded(converted, files):
    miniatures.kvasir(files, 20)
    folder = converted("kvasir-seg", files, options=("--incomplete", "--seed", "3"))
    assert "drawn with seed 3" in json.loads((folder / "dataset.json").read_text())["description"]
    order = np.random.default_rng(3).permutation(20)
    test = sorted(f"cju{i:02d}abc_0000.png" for i in order[18:])
    assert sorted(file.name for file in (folder / "imagesTs").iterdir()) == test


def test_a_seed_for_a_split_that_is_not_drawn_is_an_error(run, files, untouched):
    miniatures.chase(files)
    status, said = run("chase-db1", files, options=("--id", "510", "--seed", "1"))
    assert status == 1
    assert "not drawn" in said


def test_a_listed_split_replaces_the_papers(converted, files, tmp_path):
    miniatures.kvasir(files, 10)
    names = [f"cju{i:02d}abc" for i in range(10)]
    listed = {"train": names[4:], "val": names[:1], "test": names[1:4]}
    (tmp_path / "parts.json").write_text(json.dumps(listed))
    folder = converted("kvasir-seg", files, options=("--incomplete", "--splits", str(tmp_path / "parts.json")))
    assert json.loads((folder / "splits_final.json").read_text()) == [{"train": names[4:], "val": names[:1]}]
    assert sorted(file.name[:8] for file in (folder / "labelsTs").iterdir()) == names[1:4]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda parts: parts["train"].append("cju77abc"), "lists cases that are not there: cju77abc"),
        (lambda parts: parts["train"].remove("cju05abc"), "does not list: cju05abc"),
        (lambda parts: parts["val"].append("cju05abc"), "lists more than once: cju05abc"),
        (lambda parts: parts.pop("test"), "expected lists of cases"),
    ],
)
def test_a_listed_split_must_name_every_case_once(change, expected, run, files, tmp_path, untouched):
    miniatures.kvasir(files, 10)
    names = [f"cju{i:02d}abc" for i in range(10)]
    listed = {"train": names[4:], "val": names[:1], "test": names[1:4]}
    change(listed)
    (tmp_path / "parts.json").write_text(json.dumps(listed))
    status, said = run("kvasir-seg", files, options=(*SMALL, "--splits", str(tmp_path / "parts.json")))
    assert status == 1
    assert "parts.json" in said
    assert expected in said


def test_the_decathlon_is_left_to_nnunet(capsys):
    assert convert.main(["msd"]) == 1
    assert "nnUNetv2_convert_MSD_dataset" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--id", "0"], ["--id", "1000"], []])
def test_a_number_that_nnunet_cannot_have_is_refused(options, tmp_path, capsys):
    with pytest.raises(SystemExit):
        convert.parse_arguments(["drive", "--from", str(tmp_path), *options])
    assert "--id" in capsys.readouterr().err


def test_help_names_every_data_set_and_its_owner(capsys):
    with pytest.raises(SystemExit):
        convert.parse_arguments(["--help"])
    said = capsys.readouterr().out
    for name, dataset in convert.DATASETS.items():
        assert name in said
        assert dataset.reference in said


def test_the_documentation_describes_every_data_set():
    text = (REPOSITORY / "docs" / "datasets.md").read_text(encoding="utf-8")
    for name, dataset in convert.DATASETS.items():
        assert f"`{name}`" in text
        assert dataset.reference in text
        assert " / ".join(map(str, dataset.counts)) in text


@pytest.mark.skipif(os.name == "nt", reason="POSIX scripts")
def test_the_script_can_be_run():
    assert os.access(REPOSITORY / "scripts" / "datasets" / "convert", os.X_OK)
