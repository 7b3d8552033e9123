"""The verb analyse: on tiny models with random weights, and its tables on rows made by hand."""

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813, its usual name

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
from odd_inputs import cut_off
from tiny_model import make_model, write_images

from nnunetv2_diffusion import cli
from nnunetv2_diffusion.analysis.analyse import set_patch_size
from nnunetv2_diffusion.analysis.cases import agreement, dice_scores, label_names
from nnunetv2_diffusion.analysis.figures import all_figures, shown_cases
from nnunetv2_diffusion.analysis.report import html_report
from nnunetv2_diffusion.analysis.studies import MODES, Findings
from nnunetv2_diffusion.analysis.tables import (
    all_tables,
    cost_table,
    gain_table,
    gains,
    rows_to_csv,
    sample_table,
    step_table,
    summary,
)
from nnunetv2_diffusion.evaluation.labels import read_labels
from nnunetv2_diffusion.inference.loading import load_predictor
from nnunetv2_diffusion.inference.options import OptionError

LABELS = read_labels({"labels": {"background": 0, "left": 1, "right": 2}}, None, "here")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Model, images and references of two cases."""
    root = tmp_path_factory.mktemp("analyse")
    model, images = make_model(root / "model"), write_images(root / "images")
    labels = root / "labels"
    labels.mkdir()
    for file in images.iterdir():
        image = sitk.ReadImage(str(file))
        values = sitk.GetArrayFromImage(image)
        mask = sitk.GetImageFromArray((values > 0).astype(np.uint8) + (values > 1).astype(np.uint8))
        mask.CopyInformation(image)
        sitk.WriteImage(mask, str(labels / file.name.replace("_0000", "")))
    return model, images, labels


def analyse(setting, out, *options):
    model, images, labels = setting
    fixed = ["-m", model, "-i", images, "-l", labels, "-o", out, "-device", "cpu", "--disable_progress_bar"]
    return cli.main(["analyse", *map(str, fixed), *map(str, options)])


@pytest.fixture(scope="module")
def results(setting, tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "out"
    assert analyse(setting, out, "--steps", 3, "--samples", 2, "--counts", 1, 2, "--modes", "all") == 0
    return out


def test_bad_cases_are_named_before_any_is_studied(setting, tmp_path, capsys):
    model, images, labels = setting
    images, labels = shutil.copytree(images, tmp_path / "images"), shutil.copytree(labels, tmp_path / "labels")
    for name in ("cut", "seg", "far"):
        shutil.copy(images / "case_0_0000.nii.gz", images / f"{name}_0000.nii.gz")
        shutil.copy(labels / "case_0.nii.gz", labels / f"{name}.nii.gz")
    cut_off(images / "cut_0000.nii.gz", 0.5)
    cut_off(labels / "seg.nii.gz", 0.5)
    turned = sitk.GetImageFromArray(np.zeros((9, 15, 10), np.uint8))  # as many voxels, another shape
    sitk.WriteImage(turned, str(labels / "far.nii.gz"))
    (images / "gone_0000.nii.gz").symlink_to("nowhere")
    assert analyse((model, images, labels), tmp_path / "out", "--steps", 2, "--samples", 1, "--counts", 1) == 1
    found = capsys.readouterr().err
    for words in (
        f"{images / 'cut_0000.nii.gz'}: damaged or cut off",
        f"{labels / 'seg.nii.gz'}: damaged or cut off",
        f"{labels / 'far.nii.gz'}: shape (9, 15, 10), expected (10, 15, 9)",
        f"{images / 'gone_0000.nii.gz'}: a link to nowhere",
    ):
        assert words in found
    assert not (tmp_path / "out").exists()


def rows(file):
    with file.open() as stream:
        return list(csv.DictReader(stream))


def test_there_are_rows_for_everything_that_was_studied(results):
    steps = rows(results / "steps.csv")
    assert len(steps) == 2 * 2 * 3 * 3, "cases, samples, steps, labels and their mean"
    assert {r["label"] for r in steps} == {"left part", "right part", "mean"}
    assert {r["mode"] for r in rows(results / "modes.csv")} == set(MODES)
    assert {r["K"] for r in rows(results / "counts.csv")} == {"1", "2"}
    for table in ("modes", "counts"):
        of_mean = [r for r in rows(results / f"{table}.csv") if r["label"] == "mean"]
        assert all(0 <= float(r["ECE"]) <= 1 and 0 <= float(r["soft_dice"]) <= 1 for r in of_mean)
        assert all("HD95" in r for r in of_mean)
    assert any(r["HD95"] for r in steps)
    agreements = [float(r["pairwise_dice"]) for r in rows(results / "samples.csv")]
    assert all(np.isnan(a) or 0 <= a <= 1 for a in agreements)
    assert not np.isnan(agreements).all()


def test_passes_are_those_of_each_mode(results):
    passes = {r["mode"]: float(r["passes_per_tile"]) for r in rows(results / "modes.csv")}
    assert passes["none"] == 3
    assert passes["full"] == 24
    assert passes["one-step"] == 8
    assert passes["interleaved"] == 8


def test_samples_of_a_model_of_draws_are_single_draws(setting, tmp_path):
    model = make_model(tmp_path / "model", "nnUNetTrainerRecycleScore")
    options = ("--samples", 3, "--cases", 1, "--steps", 4, "--modes", "all")
    assert analyse((model, *setting[1:]), tmp_path / "out", *options) == 0
    steps = [r for r in rows(tmp_path / "out" / "steps.csv") if r["label"] == "mean"]
    assert [(r["sample"], r["step"]) for r in steps] == [("0", "1"), ("1", "1"), ("2", "1")]
    passes = {r["mode"]: float(r["passes_per_tile"]) for r in rows(tmp_path / "out" / "modes.csv")}
    assert set(passes) == set(MODES)
    assert (passes["none"], passes["interleaved"], passes["one-step"]) == (4, 8, 8)


def test_the_report_is_one_file_that_needs_no_other(results):
    page = (results / "report.html").read_text()
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 6
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "http" not in page.replace("http-equiv", "")
    for title in (
        "Dice by reverse step",
        "HD95 (mm) by reverse step",
        "no confidence",
        "Number of steps",
        "Mirroring",
        "Settings and versions",
    ):
        assert title in page
    assert json.loads((results / "settings.json").read_text())["sampling"]["steps"] == 3
    assert {f.name for f in results.glob("*.png")} == {
        "cases.png", "steps.png", "gain.png", "agreement.png", "counts.png", "modes.png"
    }  # fmt: skip


def test_a_model_without_a_chain_has_one_step(setting, tmp_path):
    model = make_model(tmp_path / "model", "nnUNetTrainerNoDiff")
    assert analyse((model, *setting[1:]), tmp_path / "out", "--samples", 1) == 0
    assert {r["step"] for r in rows(tmp_path / "out" / "steps.csv")} == {"1"}
    assert analyse((model, *setting[1:]), tmp_path / "all", "--samples", 1, "--cases", 1, "--modes", "all") == 0
    found = {r["mode"] for r in rows(tmp_path / "all" / "modes.csv")}
    assert found == set(MODES), "what a single pass can follow"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--samples", 0), "--samples is 0"),
        (("--counts", 1, 9999), "9999"),
        (("--cases", 0), "--cases is 0"),
        (("--patch_size", 8, 12), "--patch_size is [8, 12], expected 3 multiples of [4, 4, 4]"),
        (("--patch_size", 8, 12, 6), "expected 3 multiples"),
        (("--patch_size", 8_000_000, 8, 2048), "at most 1,073,741,824 voxels"),
        (("--samples", 10**9), "--samples is 1000000000, expected a value in"),
    ],
)
def test_bad_options_are_named_and_nothing_is_written(setting, tmp_path, capsys, options, words):
    assert analyse(setting, tmp_path / "out", *options) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_reference_and_an_existing_output_are_named(setting, results, tmp_path, capsys):
    model, images, _ = setting
    assert analyse((model, images, tmp_path), tmp_path / "out") == 1
    assert f"{tmp_path / 'case_0.nii.gz'}: missing" in capsys.readouterr().err
    assert analyse(setting, results) == 1
    assert f"{results} exists" in capsys.readouterr().err


def test_tiles_may_have_another_size(setting):
    predictor = load_predictor(setting[0], progress=False)
    set_patch_size(predictor, [8, 8, 8])
    import torch

    few, many = (len(predictor.canvas(torch.zeros(1, n, n, n)).tiles) for n in (8, 16))
    assert (few, many) == (1, 27)
    with pytest.raises(OptionError, match="multiples"):
        set_patch_size(predictor, [0, 8, 8])


# --- numbers by hand -------------------------------------------------------------------------------------------------


def test_dice_by_hand():
    reference, mask = np.array([[[0, 1, 1, 2]]]), np.array([[[0, 1, 2, 0]]])
    scores = dice_scores(LABELS, reference, mask)
    assert scores == {"left": pytest.approx(2 / 3), "right": 0.0, "mean": pytest.approx(1 / 3)}
    assert np.isnan(dice_scores(LABELS, 0 * reference, 0 * mask)["mean"])
    # left: 2/3, 2/3, 1; right: 0, 0, 1
    assert agreement(LABELS, [reference, mask, mask]) == pytest.approx((7 / 9 + 1 / 3) / 2)
    left = [np.where(m == 1, 1, 0) for m in (reference, mask)]
    assert agreement(LABELS, left) == pytest.approx(2 / 3), "of what was found"
    assert np.isnan(agreement(LABELS, [0 * mask, 0 * mask])), "two empty masks are no agreement"


def test_labels_have_the_names_of_the_classes_or_regions_that_they_belong_to():
    assert label_names(LABELS) == {1: "left", 2: "right"}
    regions = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    assert label_names(read_labels(regions, None, "here")) == {1: "whole", 2: "whole + core"}


def made(case, sample, values, distances=None):
    return [
        {"case": case, "sample": sample, "step": i, "label": "mean", "Dice": v, "HD95": d}
        for i, (v, d) in enumerate(zip(values, distances or [np.nan] * len(values), strict=True), 1)
    ]


def unequal():
    """A case that gains, one without foreground, one that loses; distances are known of the first only."""
    steps = made("a", 0, [0.5, 0.7], [6.0, 4.0]) + made("none", 0, [np.nan] * 2) + made("b", 0, [0.9, 0.8])
    samples = [
        {"case": c, "Dice": d, "sample_dice": d, "pairwise_dice": a, "error_correlation": np.nan}
        for c, d, a in (("a", 0.7, 0.99), ("none", np.nan, np.nan), ("b", 0.8, 0.97))
    ]
    pictures = {
        c: {k: np.eye(6) for k in ("image", "reference", "mask", "entropy", "variance")}
        | {"slice": np.array(2), "slices": np.array(5)}
        for c in ("a", "none", "b")
    }
    return Findings(steps=steps, samples=samples, pictures=pictures, names={1: "left"}, unit="px")


@pytest.mark.parametrize("order", [1, -1])
def test_a_case_without_foreground_is_neither_best_nor_worst(order):
    findings = unequal()
    findings.steps = (
        findings.steps[::order] if order == 1 else sorted(findings.steps, key=lambda r: r["case"] != "none")
    )
    (dice, distance) = gain_table(findings).rows
    assert dice == ["Dice", "0.0500 ± 0.2121 (2 of 3)", "-0.1000 (b)", "+0.2000 (a)", "1 of 2"]
    assert distance == ["HD95 (px)", "-2.000 ± n/a (1 of 3)", "-2.000 (a)", "-2.000 (a)", "1 of 1"]
    for metric in ("Dice", "HD95"):
        assert not any("nan" in cell for row in step_table(findings, metric).rows for cell in row)
    assert [row["case"] for row in shown_cases(findings)] == ["a", "b"]
    findings.samples = findings.samples[1:2]
    assert [row["case"] for row in shown_cases(findings)] == ["none"], "there is no other"


@pytest.mark.parametrize("only", [None, "none"])
def test_figures_and_tables_of_undefined_cases_can_be_made(only):
    findings = unequal()
    if only is not None:
        findings.steps = [r for r in findings.steps if r["case"] == only]
        findings.samples = [r for r in findings.samples if r["case"] == only]
    shared = {"label": "mean", "passes_per_tile": 2.0, "seconds": 1.0, "ECE": np.nan}
    of_cases = [{**shared, **r, "K": k, "mode": "m", "soft_dice": 0.5} for k in (1, 2) for r in findings.samples]
    findings.counts = findings.modes = [{**row, "HD95": np.nan} for row in of_cases]
    assert not any("nan" in str(cell) for table in all_tables(findings) for row in table.rows for cell in row)
    assert not any("nan" in sentence for sentence in summary(findings))
    for _, figure in all_figures(findings).values():
        plt.close(figure)
    assert all_tables(Findings()) == []
    assert all_figures(Findings()) == {}


def test_figures_show_both_metrics_whole_numbers_and_the_names_of_cases_and_labels():
    findings = unequal()
    findings.counts = [
        {"case": "a", "label": "mean", "K": k, "Dice": 0.5, "HD95": 3.0, "passes_per_tile": 1.0} for k in (1, 2)
    ]
    figures = {name: figure for name, (_, figure) in all_figures(findings).items()}
    for name in ("steps", "gain", "counts"):
        first, second = figures[name].axes
        assert "Dice" in first.get_ylabel()
        assert "HD95 (px)" in second.get_ylabel()
    assert [t.get_text() for t in figures["gain"].axes[0].get_xticklabels()] == ["b", "a"]
    for name in ("steps", "counts"):
        figures[name].canvas.draw()
        assert all(float(tick).is_integer() for tick in figures[name].axes[0].get_xticks())
    (legend,) = figures["cases"].legends
    assert [text.get_text() for text in legend.get_texts()] == ["left"]
    images = [axes.images[-1] for axes in figures["cases"].axes if axes.get_title() in ("entropy", "variance")]
    assert {image.get_clim() for image in images} == {(0, 1)}, "one scale for all rows"
    for figure in figures.values():
        plt.close(figure)


def test_settings_are_a_list_of_names_and_values():
    page = html_report("t", [], [], {"sampling": {"steps": 3, "eta": None}, "patch size": [8, 12]}, ["In <words>."])
    assert "<dt>sampling.steps</dt><dd>3</dd>" in page
    assert "<dt>patch size</dt><dd>8 12</dd>" in page
    assert "sampling.eta" not in page
    assert "<p>In &lt;words&gt;.</p>" in page


def test_gains_and_ranges_by_hand():
    findings = Findings(steps=made("a", 0, [0.5, 0.7]) + made("a", 1, [0.6, 0.6]) + made("b", 0, [0.9, 0.8]) * 2)
    assert gains(findings) == {"a": pytest.approx(0.1), "b": pytest.approx(-0.1)}
    table = step_table(findings)
    assert [row[0] for row in table.rows] == ["1", "2"]
    assert table.rows[0][1].startswith("0.725"), "mean of a (0.55) and b (0.9)"
    assert table.rows[0][2].startswith("0.0500"), "range of a (0.1) and b (0)"


def test_agreement_that_ranks_errors_has_no_excess_risk():
    found = [(0.5, 0.1), (0.7, np.nan), (0.9, 0.3)]
    samples = [{"Dice": d, "sample_dice": d, "pairwise_dice": d / 2 + 0.5, "error_correlation": c} for d, c in found]
    table = sample_table(Findings(samples=samples))
    (row,) = table.rows
    by_name = dict(zip(table.columns, row, strict=True))
    assert by_name["excess AURC"] == "0.000"
    assert not any("leaves out" in note for note in table.notes)
    lost = {"Dice": 0.0, "sample_dice": 0.0, "pairwise_dice": np.nan, "error_correlation": np.nan}
    table_with_a_loss = sample_table(Findings(samples=[*samples, lost]))
    assert any("leaves out 1 of 4 cases" in note for note in table_with_a_loss.notes)
    assert by_name["variance and errors"] == "0.200 ± 0.141 (2 of 3)"


def test_costs_are_means_over_cases():
    shared = {"label": "mean", "K": 2, "passes_per_tile": 2.0, "soft_dice": 0.5}
    rows = [{**shared, "case": "a", "Dice": 0.5, "seconds": 1.0}, {**shared, "case": "b", "Dice": 0.7, "seconds": 3.0}]
    (row,) = cost_table(rows, "K", "t").rows
    assert list(row) == ["2", "0.600 ± 0.141", "0.400", "2.00", "2.0"], "equally sure: AURC is the mean risk"
    assert rows_to_csv(rows).splitlines()[0] == "label,K,passes_per_tile,soft_dice,case,Dice,seconds"
    measured = [{**row, "HD95": h, "ECE": 0.1} for row, h in zip(rows, (2.0, np.nan), strict=True)]
    table = cost_table(measured, "K", "t")
    by_name = dict(zip(table.columns, table.rows[0], strict=True))
    assert (by_name["HD95 (mm)"], by_name["ECE"]) == ("2.00 ± n/a (1 of 2)", "0.100 ± 0.000")
