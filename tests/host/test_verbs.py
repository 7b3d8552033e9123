"""The verbs as commands, one after the other, on a model that nnU-Net's own command trained."""

import csv
import json

import nibabel as nib
import numpy as np

TRAINER = "nnUNetTrainerRecycleXT"


def test_predict_evaluate_compare_and_analyse(recycled):
    root, raw = recycled.root, recycled.raw
    model = ("-d", recycled.number, "-c", "3d_fullres", "-f", "0", "-tr", TRAINER, "-p", "tiny", "-device", "cpu")
    quiet = "--disable_progress_bar"

    def run(*arguments):
        return recycled.run("nnunetv2_diffusion", *map(str, arguments))

    common = ("predict", *model, "-i", raw / "imagesTs", "-npp", 0, "-nps", 0, quiet)
    printed = run(*common, "-o", root / "verbs", "--samples", 2, "--save_uncertainty", "--save_samples")
    assert "case_6: " in printed
    assert "mean of 2 masks, " in printed
    run(*common, "-o", root / "verbs_plain", "--tta", "none")
    for case in ("case_6", "case_7"):
        truth = nib.load(raw / "labelsTs" / f"{case}.nii.gz")
        for file in [root / "verbs" / f"{case}.nii.gz", *(root / "verbs").glob(f"uncertainty/*/{case}.nii.gz")]:
            found = nib.load(file)
            assert found.shape == truth.shape
            np.testing.assert_allclose(found.affine, truth.affine)

    for folder in ("verbs", "verbs_plain"):
        run("evaluate", raw / "labelsTs", root / folder, "--no-surface", "-np", 1, quiet)
    summary = json.loads((root / "verbs" / "summary.json").read_text())
    assert {"Dice", "GED2", "PairwiseDice"} <= set(summary["mean"]["1"])
    assert 0 <= summary["foreground_mean"]["Dice"] <= 1

    printed = run("compare", root / "verbs", root / "verbs_plain", "--format", "text")
    assert "verbs_plain" in printed
    assert "Wilcoxon" in printed

    run(
        "analyse", *model, "-i", raw / "imagesTs", "-l", raw / "labelsTs", "-o", root / "report", "--samples", 2,
        "--modes", "none", "--cases", 1, quiet,
    )  # fmt: skip
    assert "data:image/png" in (root / "report" / "report.html").read_text()
    with (root / "report" / "steps.csv").open() as stream:
        assert {row["step"] for row in csv.DictReader(stream)} == {"1", "2"}
