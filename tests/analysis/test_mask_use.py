"""Laws of the study of given masks, with networks that copy or ignore them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
from tiny_model import make_model

from nnunetv2_diffusion.analysis.cases import LabelledCase
from nnunetv2_diffusion.analysis.mask_use import GIVEN, estimate_from, given_masks, mask_use, true_x_start
from nnunetv2_diffusion.analysis.studies import Findings
from nnunetv2_diffusion.analysis.tables import mask_use_table
from nnunetv2_diffusion.inference.loading import load_predictor
from nnunetv2_diffusion.inference.options import OptionError, PredictionOptions

SHAPE = (10, 15, 9)
PROPERTIES = {
    "spacing": [1.0, 1.0, 1.0], "shape_before_cropping": SHAPE, "bbox_used_for_cropping": [[0, n] for n in SHAPE],
    "shape_after_cropping_and_before_resampling": SHAPE,
}  # fmt: skip


def labels():
    y = np.zeros(SHAPE, np.int16)
    y[3:8, 4:9, 2:6], y[3:8, 9:12, 2:6] = 1, 2
    return y


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {r: make_model(root / f"regions_{r}", regions=r) for r in (False, True)}


@pytest.fixture
def predictor(folders):
    return load_predictor(folders[False], options=PredictionOptions(tta="none"), progress=False)


@pytest.fixture
def case():
    y = labels()
    image = torch.from_numpy(y).float()[None]  # the image tells the truth
    return LabelledCase("one", image, PROPERTIES, y, y, torch.from_numpy(y).long()[None])


def replace_pass(predictor, answer):
    """Let every pass answer with logits of (image, x_t)."""
    asked = []

    def forward(image, x_t=None, t=None, estimate=None, full_resolution_only=False):
        assert len(t) == len(image)
        asked.extend(t.tolist())
        return answer(image, x_t)

    predictor.network.forward = forward
    return asked


def of_image(image, x_t):
    return torch.cat([-40.0 * (image - k).abs() for k in range(3)], 1)


def means(rows, given, level):
    (row,) = (r for r in rows if (r["given"], r["level"], r["label"]) == (given, level, "mean"))
    return row["Dice"]


def test_a_network_that_ignores_the_mask_has_one_dice(predictor, case):
    asked = replace_pass(predictor, of_image)
    rows = mask_use(predictor, case)
    assert {(r["given"], r["level"]) for r in rows} == {(g, level) for g in GIVEN for level in (0.0, 0.5)}
    assert all(r["Dice"] == 1 for r in rows)
    assert set(asked) == {0, 500}


def test_a_network_that_copies_the_mask_has_the_masks_dice(predictor, case):
    replace_pass(predictor, lambda image, x_t: 40 * x_t)
    rows = mask_use(predictor, case)
    assert means(rows, "true", 0.0) == 1
    assert means(rows, "shifted", 0.0) < 0.5
    assert all(means(rows, kind, 0.0) < 1 for kind in ("dilate", "drop", "swap"))
    assert means(rows, "true", 0.5) < 1, "drowned in noise"


def test_what_is_given_is_the_mask_noised(predictor, case):
    seen = []
    replace_pass(predictor, lambda image, x_t: seen.append(x_t) or x_t)
    canvas = predictor.canvas(case.data)
    x_start = true_x_start(predictor, case.truth)
    estimate_from(predictor, canvas, x_start, 0.0)
    tile = canvas.tiles[0]
    noise = seen[0][0] - x_start[0][tile.index]
    assert float(noise.abs().max()) < 0.06, "t = 0: a standard deviation of 0.01"


def test_masks_are_repeatable_and_leave_the_random_state_alone(predictor, case):
    x_start, before = true_x_start(predictor, case.truth), torch.get_rng_state()
    first, second = given_masks(predictor, x_start), given_masks(predictor, x_start)
    assert torch.equal(torch.get_rng_state(), before)
    assert set(first) == set(GIVEN)
    assert all(torch.equal(first[k], second[k]) for k in GIVEN)
    moved = first["shifted"][..., 5:, 6:, 4:]  # by 6 voxels, or half an axis that is shorter than 12
    assert torch.equal(moved, x_start[..., :5, :9, :5])


def test_regions_are_encoded_as_in_training(folders, case):
    predictor = load_predictor(folders[True], options=PredictionOptions(tta="none"), progress=False)
    x = true_x_start(predictor, case.truth)[0] > 0
    assert torch.equal(x[0], case.truth[0] > 0)
    assert torch.equal(x[1], case.truth[0] == 2)


def test_a_model_without_a_mask_is_refused(tmp_path, case):
    folder = make_model(tmp_path / "m", "nnUNetTrainerNoDiff")
    with pytest.raises(OptionError, match=r"--mask_use: .*no noisy mask"):
        mask_use(load_predictor(folder, progress=False), case)


def test_the_table_has_a_row_for_every_mask_and_a_column_for_every_level():
    rows = [
        {"case": c, "given": g, "level": level, "label": "mean", "Dice": d}
        for c, d in (("a", 0.5), ("b", 0.7)) for g in ("true", "drop") for level in (0.0, 0.5)
    ]  # fmt: skip
    table = mask_use_table(Findings(mask_use=rows))
    assert table.columns == ["given mask", "t = 0 T", "t = 0.5 T"]
    assert table.rows == [[g, "0.600 ± 0.141", "0.600 ± 0.141"] for g in ("true", "drop")]
