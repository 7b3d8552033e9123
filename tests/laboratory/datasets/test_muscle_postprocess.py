"""Marzola's post-processing."""

import miniatures
import numpy as np
import pytest
from PIL import Image

from laboratory.datasets import muscle_postprocess
from laboratory.datasets.muscle import keep_component, matlab_disk, postprocess


def boxes(*corners, shape=(20, 30)):
    """A mask of rectangles: first row, first column, rows, columns of each."""
    mask = np.zeros(shape, bool)
    for row, column, rows, columns in corners:
        mask[row : row + rows, column : column + columns] = True
    return mask


@pytest.mark.parametrize(
    ("radius", "widths"),
    [
        (3, [5] * 5),
        (5, [5, 7, 9, 9, 9, 9, 9, 7, 5]),
        (10, [11, 13, 15, 17, *[19] * 11, 17, 15, 13, 11]),
    ],
)
def test_disks_are_those_of_matlab(radius, widths):
    disk = matlab_disk(radius)
    assert disk.sum(1).tolist() == widths
    assert (disk == disk.T).all()
    assert (disk == disk[::-1]).all()


def test_small_disks_have_no_approximation():
    with pytest.raises(ValueError, match="at least 3"):
        matlab_disk(2)


@pytest.mark.parametrize("rule", ["superficial", "leftmost"])
def test_a_much_smaller_component_is_dropped_wherever_it_is(rule):
    large, small = (10, 10, 5, 8), (0, 0, 5, 5)
    assert (keep_component(boxes(large, small), rule) == boxes(large)).all()


@pytest.mark.parametrize(("rule", "kept"), [("superficial", 0), ("leftmost", 1)])
def test_of_two_similar_components_the_rule_decides(rule, kept):
    components = [(0, 20, 5, 8), (12, 2, 6, 8)]  # higher, and larger but lower and further left
    assert (keep_component(boxes(*components), rule) == boxes(components[kept])).all()


@pytest.mark.parametrize(("rule", "kept"), [("superficial", 1), ("leftmost", 0)])
def test_three_quarters_count_as_similar_in_the_paper_but_not_in_the_code(rule, kept):
    components = [(10, 10, 4, 5), (0, 0, 3, 5)]  # 20 and 15 pixels
    assert (keep_component(boxes(*components), rule) == boxes(components[kept])).all()


def test_a_third_component_is_dropped_even_if_it_is_the_highest():
    components = [(2, 0, 4, 6), (10, 0, 4, 5), (0, 20, 3, 5)]
    assert (keep_component(boxes(*components)) == boxes(components[0])).all()


def test_components_that_touch_at_a_corner_are_one():
    mask = boxes((0, 0, 4, 4), (4, 4, 4, 4))
    assert (keep_component(mask) == mask).all()


def test_similar_components_of_the_same_height_leave_the_largest():
    components = [(3, 0, 5, 6), (3, 15, 5, 7)]
    assert (keep_component(boxes(*components)) == boxes(components[1])).all()


def test_holes_are_filled_and_specks_and_threads_removed():
    body = boxes((20, 20, 60, 80), shape=(100, 120))
    mask = body.copy()
    mask[40:50, 50:60] = False
    mask[50, 100:119] = True  # a thread
    mask[5:8, 5:8] = True  # a speck
    result = postprocess(mask)
    assert result[40:50, 50:60].all()
    assert not result[:15].any()
    assert not result[:, 106:].any()
    difference = result ^ body  # at the border: dilated by more than eroded, corners rounded
    assert difference.sum() < 0.15 * body.sum()


def test_a_large_body_grows_by_the_difference_of_the_disks():
    result = postprocess(boxes((30, 30, 60, 60), shape=(120, 120)))
    assert np.nonzero(result.any(1))[0][[0, -1]].tolist() == [28, 91]  # eroded by 2, dilated by 4 pixels


def test_the_border_of_the_image_erodes_nothing():
    assert postprocess(np.ones((60, 60), bool)).all()


def test_nothing_stays_nothing():
    assert not postprocess(np.zeros((60, 60), bool)).any()


@pytest.fixture
def predictions(tmp_path):
    folder = tmp_path / "predictions"
    folder.mkdir()
    for number in range(2):
        mask = boxes((30, 30 + number, 60, 60), shape=(120, 120))
        Image.fromarray(mask.astype(np.uint8)).save(folder / f"BB_{number}.png")
    (folder / "dataset.json").write_text("{}")
    return folder


def run(source, target, *options):
    return muscle_postprocess.main(["-i", str(source), "-o", str(target), *options])


def test_the_command_writes_masks_of_the_same_names_with_nnunets_files(predictions, tmp_path):
    assert run(predictions, tmp_path / "new") == 0
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["BB_0.png", "BB_1.png", "dataset.json"]
    written = np.asarray(Image.open(tmp_path / "new" / "BB_1.png"))
    expected = postprocess(boxes((30, 31, 60, 60), shape=(120, 120)))
    assert written.dtype == np.uint8
    assert (written == expected).all()


def test_the_command_hands_the_rule_on(predictions, tmp_path):
    two = boxes((10, 120, 40, 40), (90, 10, 42, 42), shape=(160, 180))
    Image.fromarray(two.astype(np.uint8)).save(predictions / "BB_0.png")
    for rule, rows in (("superficial", slice(0, 70)), ("leftmost", slice(70, None))):
        assert run(predictions, tmp_path / rule, "--component", rule) == 0
        written = np.asarray(Image.open(tmp_path / rule / "BB_0.png"))
        assert written[rows].sum() == written.sum() > 0


def test_the_command_overwrites_nothing(predictions, tmp_path, capsys):
    (tmp_path / "new").mkdir()
    assert run(predictions, tmp_path / "new") == 1
    assert "not overwritten" in capsys.readouterr().err
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(("name", "content"), [("BB_1.png", b"no picture"), ("BB_1.png", None)])
def test_the_command_names_what_is_no_mask_and_leaves_nothing(name, content, predictions, tmp_path, capsys):
    if content is None:
        miniatures.mask(predictions / name)  # 0 and 255
    else:
        (predictions / name).write_bytes(content)
    assert run(predictions, tmp_path / "new") == 1
    assert name in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.name not in ("predictions", "host")]


def test_the_command_needs_predictions(tmp_path, capsys):
    assert run(tmp_path / "missing", tmp_path / "new") == 1
    assert "missing: found no PNG files" in capsys.readouterr().err
