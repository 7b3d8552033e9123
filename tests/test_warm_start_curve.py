"""The curve of a warm start is nnU-Net's own log, averaged and compared epoch by epoch."""

import numpy as np
import pytest
import torch

from nnunetv2_diffusion.benchmarking.warm_start import SOURCE, curve_table, draw_curves, main, mean_curve, read_curve


def test_the_curve_is_the_pseudo_dice_of_nnunets_log(tmp_path):
    log = {"mean_fg_dice": [np.float64(0.25), np.float64(0.5)], "ema_fg_dice": [0.1, 0.2]}
    torch.save({"network_weights": {}, "logging": log}, tmp_path / "checkpoint_final.pth")
    assert read_curve(tmp_path / "checkpoint_final.pth") == [0.25, 0.5]


def test_the_mean_is_taken_over_trainings_epoch_by_epoch():
    assert mean_curve([[0.0, 0.5], [1.0, 0.75]]) == [0.5, 0.625]


def test_the_table_has_warm_minus_scratch_in_points():
    lines = curve_table({"scratch": [[0.1, 0.5], [0.3, 0.5]], "warm": [[0.6, 0.4], [0.6, 0.4]]}).splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["1", "0.2000", "0.6000", "+40.00"],
        ["2", "0.5000", "0.4000", "-10.00"],
    ]


def test_the_picture_is_a_png(tmp_path):
    file = tmp_path / "curve.png"
    draw_curves(file, {"scratch": [[0.1, 0.5], [0.3, 0.5]], "warm": [[0.6, 0.4]], SOURCE: [[0.2, 0.3]]}, "title")
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "stepz=3"], "stepz"),
        (["--set", "num_val_iterations_per_epoch=0"], "num_val_iterations_per_epoch"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--raw", "nowhere"], "nowhere"),
    ],
)
def test_bad_options_are_named_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        main(["--out", str(tmp_path / "new"), *options])
    assert not (tmp_path / "new").exists()


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(SystemExit, match="not written into"):
        main(["--out", str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
