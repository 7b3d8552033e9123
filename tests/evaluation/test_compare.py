"""The verb compare: one table of all methods, and what it refuses to compare."""

import csv
import io
import json

import numpy as np
import pytest
from scipy import stats

from nnunetv2_diffusion import cli
from nnunetv2_diffusion.evaluation.comparison import Options, compare, direction
from nnunetv2_diffusion.evaluation.summaries import case_name, class_key

DICE = {
    "base": {"1": [0.80, 0.70, 0.90, 0.60, 0.85], "2": [0.50, 0.55, 0.40, 0.65, 0.45]},
    "ours": {"1": [0.84, 0.79, 0.91, 0.70, 0.87], "2": [0.52, 0.55, 0.49, 0.60, 0.51]},
}
ONE = ("--classes", "1", "--metrics", "Dice")
HD95 = {"base": [5.0, 7.0, 4.0, 9.0, 5.5], "ours": [4.5, 5.0, 4.0, 6.0, 5.0]}


@pytest.fixture(autouse=True)
def _verb(monkeypatch):
    monkeypatch.setitem(cli.VERBS, "compare", ("nnunetv2_diffusion.evaluation.compare", "compare"))


@pytest.fixture
def summary(tmp_path):
    """Write a summary as nnU-Net does: name, class -> metric -> values -> folder."""

    def write(name, classes, ending=".nii.gz", cases=None):
        count = len(next(iter(next(iter(classes.values())).values())))
        entries = []
        for index, case in enumerate(cases or [f"case_{i}" for i in range(count)]):
            metrics = {key: {metric: v[index] for metric, v in columns.items()} for key, columns in classes.items()}
            files = {"prediction_file": f"/{name}/{case}{ending}", "reference_file": f"/labels/{case}{ending}"}
            entries.append({"metrics": metrics, **files})
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "summary.json").write_text(json.dumps({"metric_per_case": entries}))
        return folder

    return write


@pytest.fixture
def folders(summary):
    """Two methods with Dice for two classes and HD95 for both."""
    return [
        summary(name, {key: {"Dice": dice, "HD95": HD95[name], "TP": [1] * 5} for key, dice in DICE[name].items()})
        for name in ("base", "ours")
    ]


@pytest.fixture
def command(capsys):
    """Run the verb: arguments -> status, output, errors."""

    def run(*arguments):
        status = cli.main(["compare", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def rows(command):
    """Rows of the CSV by class, metric and method."""

    def read(*arguments):
        status, out, err = command(*arguments, "--format", "csv")
        assert (status, err) == (0, "")
        return {(row["class"], row["metric"], row["method"]): row for row in csv.DictReader(io.StringIO(out))}

    return read


# ---- numbers


def test_means_and_tests_are_those_of_the_cases(folders, rows):
    found = rows(*folders)
    assert list(found) == [(k, m, n) for k in ("mean", "1", "2") for m in ("Dice", "HD95") for n in ("base", "ours")]
    ours, base = (np.array(DICE[name]["1"]) for name in ("ours", "base"))
    row = found["1", "Dice", "ours"]
    expected = {
        "mean": ours.mean(),
        "sd": ours.std(ddof=1),
        "difference": (ours - base).mean(),
        "p_t": stats.ttest_rel(ours, base).pvalue,
        "p_wilcoxon": stats.wilcoxon(ours, base).pvalue,
        "won": 1,
    }
    assert {name: float(row[name]) for name in expected} == pytest.approx(expected)
    assert (row["cases"], row["pairs"], row["reference"], row["better"]) == ("5", "5", "base", "higher")
    assert float(row["interval_low"]) < expected["difference"] < float(row["interval_high"])


def test_share_of_cases_won_knows_what_is_better_low_and_counts_ties_half(folders, rows):
    assert float(rows(*folders)["1", "HD95", "ours"]["won"]) == 4.5 / 5


def test_foreground_mean_is_per_case_over_the_classes_that_have_a_value(summary, rows):
    nan = float("nan")
    base = summary("base", {"0": {"Dice": [1.0] * 3}, "1": {"Dice": [0.8, 0.6, nan]}, "2": {"Dice": [0.4, nan, nan]}})
    ours = summary("ours", {"0": {"Dice": [1.0] * 3}, "1": {"Dice": [0.9, 0.6, nan]}, "2": {"Dice": [0.4, 0.2, 1.0]}})
    found = rows(base, ours)
    assert {key for key, _, _ in found} == {"mean", "1", "2"}  # no background
    row = found["mean", "Dice", "base"]
    assert (float(row["mean"]), row["cases"], row["left_out"]) == (pytest.approx((0.6 + 0.6) / 2), "2", "1")
    row = found["mean", "Dice", "ours"]
    assert float(row["mean"]) == pytest.approx((0.65 + 0.4 + 1.0) / 3)
    assert (row["pairs"], row["pairs_left_out"]) == ("2", "1")
    assert float(row["difference"]) == pytest.approx((0.05 - 0.2) / 2)


def test_undefined_is_null_nan_or_infinite_and_is_said_in_the_table(summary, command):
    nan, inf = float("nan"), float("inf")
    base = summary("base", {"1": {"HD95": [1.0, 2.0, None, inf]}})
    ours = summary("ours", {"1": {"HD95": [1.0, nan, 4.0, 5.0]}})
    status, out, _ = command(base, ours)
    assert status == 0
    assert "1.500 ± 0.707 (2 of 4)" in out
    assert "1 (-3)" in out


def test_order_and_folder_and_ending_of_cases_do_not_matter(summary, rows, folders):
    shuffled = [3, 0, 4, 2, 1]
    values = {key: {"Dice": [dice[i] for i in shuffled]} for key, dice in DICE["ours"].items()}
    other = summary("other", values, ending=".nrrd", cases=[f"case_{i}" for i in shuffled])
    first = rows(*folders, "--metrics", "Dice")["2", "Dice", "ours"]
    second = rows(folders[0], other, "--metrics", "Dice")["2", "Dice", "other"]
    assert {**first, "method": ""} == {**second, "method": ""}


@pytest.mark.parametrize(
    ("file", "case"),
    [("/a/b/case_1.nii.gz", "case_1"), ("C:\\a\\case.1.png", "case.1"), ("x.nrrd", "x"), ("plain", "plain")],
)
def test_case_is_the_name_without_folder_and_ending(file, case):
    assert case_name(file) == case


@pytest.mark.parametrize(
    ("text", "key"), [("1", "1"), ("(3,)", "3"), ("1,2", "(1, 2)"), ("(1, 2)", "(1, 2)"), ("liver 1", "liver 1")]
)
def test_class_has_one_spelling(text, key):
    assert class_key(text) == key


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        *((name, 1) for name in ("Dice", "IoU", "NSD_2mm", "Recall", "Precision", "Accuracy", "HungarianIoU")),
        *((name, -1) for name in ("HD95", "HD", "ASSD", "ECE", "Brier", "NLL", "GED2", "FP", "volume_error_abs")),
        *((name, 0) for name in ("volume_error", "n_pred", "TP", "PairwiseDice", "other")),
    ],
)
def test_direction_of_metrics(metric, expected):
    assert direction(metric) == expected
    assert direction(metric, higher=[metric]) == 1
    assert direction(metric, lower=[metric]) == -1


# ---- choices


def test_classes_metrics_names_and_reference_are_chosen(folders, rows):
    options = ("--classes", "2", "mean", "--metrics", "HD95", "--names", "A b", "C", "--reference", "C")
    found = rows(*folders, *options)
    assert list(found) == [(key, "HD95", name) for key in ("2", "mean") for name in ("A b", "C")]
    assert found["2", "HD95", "C"]["pairs"] == ""
    assert found["2", "HD95", "A b"]["reference"] == "C"
    assert float(found["2", "HD95", "A b"]["difference"]) > 0


def test_regions_are_chosen_in_any_spelling(summary, rows):
    folders = [summary(name, {"1": {"Dice": [0.5, 0.6]}, "(1, 2)": {"Dice": [0.7, 0.9]}}) for name in ("a", "b")]
    found = rows(*folders, "--classes", "1,2")
    assert float(found["(1, 2)", "Dice", "a"]["mean"]) == pytest.approx(0.8)


def test_single_class_needs_no_mean(summary, rows):
    folders = [summary(name, {"1": {"Dice": [0.5, 0.6]}}) for name in ("a", "b")]
    assert {key for key, _, _ in rows(*folders)} == {"1"}


def test_default_metrics_are_those_that_all_have(summary, folders, rows):
    without = summary("without", {key: {"Dice": dice} for key, dice in DICE["ours"].items()})
    assert {metric for _, metric, _ in rows(*folders, without)} == {"Dice"}


def test_alpha_sets_marks_and_intervals(folders, command):
    status, out, _ = command(*folders, "--classes", "1", "--metrics", "Dice", "--alpha", "0.001")
    assert (status, "±" in out, " †" in out.split("Tests")[0].split("Mean ±")[0]) == (0, True, False)
    assert "99.9 % interval" in out
    _, out, _ = command(*folders, "--classes", "1", "--metrics", "Dice", "--alpha", "0.5")
    assert " †" in out.split("Tests")[0].split("Mean ±")[0]
    assert "50 % interval" in out


def test_seed_and_resamples_reach_the_interval(folders, rows):
    def interval(*options):
        row = rows(*folders, *ONE, *options)["1", "Dice", "ours"]
        return row["interval_low"], row["interval_high"]

    assert interval("--seed", "1") == interval("--seed", "1") != interval("--seed", "2")
    assert interval("--bootstrap", "200") != interval("--bootstrap", "300")


def test_higher_alpha_makes_the_interval_narrower(folders, rows):
    def width(alpha):
        row = rows(*folders, *ONE, "--alpha", alpha)["1", "Dice", "ours"]
        return float(row["interval_high"]) - float(row["interval_low"])

    assert 0 < width("0.5") < width("0.2") < width("0.01")


def test_three_methods_are_each_tested_against_the_reference(folders, summary, rows):
    third = summary("third", {key: {"Dice": dice[::-1]} for key, dice in DICE["base"].items()})
    found = rows(*folders, third)
    assert [found["1", "Dice", name]["reference"] for name in ("base", "ours", "third")] == ["", "base", "base"]
    assert float(found["1", "Dice", "third"]["difference"]) == pytest.approx(0, abs=1e-12)


def test_python_api_gives_the_numbers_of_the_verb(folders, rows):
    comparison = compare(folders, options=Options(metrics=["Dice"], classes=["1"]))
    base, ours = comparison.scores
    assert base.test is None
    assert repr(ours.test.p_t) == rows(*folders)["1", "Dice", "ours"]["p_t"]
    assert comparison.options.reference == "base"


# ---- tables


def test_best_is_marked_by_the_direction_of_the_metric(folders, command):
    _, out, _ = command(*folders, "--format", "latex", "--classes", "1")
    base, ours = (next(line for line in out.splitlines() if line.startswith(f"1 & {n} &")) for n in ("base", "ours"))
    assert ours.count(r"\textbf") == 2
    assert base.count(r"\textbf") == 0


def test_methods_that_are_printed_alike_are_both_best(summary, command):
    folders = [summary(name, {"1": {"Dice": [0.5, value]}}) for name, value in (("a", 0.6001), ("b", 0.6), ("c", 0.5))]
    _, out, _ = command(*folders, "--format", "markdown")
    assert [line.count("**") for line in out.splitlines() if line.startswith("| 1 | ")][:3] == [2, 2, 0]


def test_nothing_is_best_where_nothing_is_better_or_nothing_is_known(summary, command):
    folders = [summary(name, {"1": {"TP": [1, 2], "Dice": [None, None]}}) for name in ("a", "b")]
    status, out, _ = command(*folders, "--metrics", "TP", "Dice", "--format", "markdown")
    assert status == 0
    assert "| 1 | a | 1.500 ± 0.707 | n/a |" in out
    assert "Not known what is better, none marked: TP." in out


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_nothing_is_best_where_all_are_printed_alike(summary, command, value):
    folders = [summary(name, {"1": {"Dice": [value, value]}}) for name in ("a", "b")]
    _, out, _ = command(*folders)
    assert "*" not in out
    assert "none if all are" in out


def test_values_that_the_mean_leaves_out_are_counted_in_its_cell(summary, command):
    """A method that misses a class altogether has the smaller distance in the mean, which shall be seen."""
    nan = float("nan")
    base = summary("base", {"1": {"HD95": [2.0, 2.0, 2.0]}, "2": {"HD95": [9.0, 9.0, 8.0]}})
    ours = summary("ours", {"1": {"HD95": [3.0, 2.0, 3.0]}, "2": {"HD95": [nan, nan, nan]}})
    _, out, _ = command(base, ours)
    lines = [line.split() for line in out.splitlines() if line.startswith("mean ")]
    assert lines[0][1:5] == ["base", "5.333", "±", "0.289"]
    assert "[-3]" in lines[1]
    assert "[-n]: so many values" in out
    _, out, _ = command(base, base, "--names", "a", "b")
    assert "[-" not in out


def test_a_metric_that_one_folder_lacks_is_named_in_every_output(folders, summary, command, tmp_path):
    plain = summary("plain", {key: {"Dice": values} for key, values in DICE["base"].items()})
    note = "HD95 is left out: plain has none. nnunetv2_diffusion evaluate GROUND_TRUTH FOLDER --overwrite adds it."
    for name in ("text", "markdown", "latex"):
        status, out, err = command(*folders, plain, "--format", name)
        assert (status, err) == (0, "")
        assert "HD95 is left out: plain has none." in out, name
        assert out.count("HD95") == 1, "it has no column"
    table = tmp_path / "table.csv"
    status, out, err = command(*folders, plain, "-o", table)
    assert (status, out, err) == (0, f"{table}\n{note}\n", "")
    assert "left out:" not in table.read_text()
    assert "HD95 is left out" not in command(*folders, plain, "--metrics", "Dice")[1]
    assert "is left out: " not in command(*folders)[1]
    assert "is left out: " not in command(plain, plain, "--names", "a", "b")[1], "nobody has it"


def test_classes_have_the_names_of_their_labels(folders, command, rows, summary):
    other = summary("other", {key: {"Dice": values, "HD95": [1.0] * 5} for key, values in DICE["base"].items()})
    for folder in folders:
        labels = {"background": 0, "Anterior": 1, "odd, name": [1, 2]}
        (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    content = json.loads((other / "summary.json").read_text())
    content["conventions"] = {"names": {"1": "Anterior"}}
    (other / "summary.json").write_text(json.dumps(content))
    _, out, _ = command(*folders, other)
    assert "Anterior" in out
    assert not any(line.startswith("1 ") for line in out.splitlines())
    assert {key for key, _, _ in rows(*folders, "--classes", "Anterior")} == {"1"}, "csv is for programs"
    (folders[0] / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "Posterior": 1}}))
    _, out, _ = command(*folders, other)
    assert "Anterior" not in out, "they do not agree"
    (folders[0] / "dataset.json").write_text("[]")
    assert command(*folders)[0] == 0


def test_names_are_escaped_in_latex(folders, command):
    _, out, _ = command(*folders, "--names", "K_5 & 50%", "x", "--format", "latex")
    assert r"K\_5 \& 50\%" in out
    assert "K_5" not in out


def test_csv_has_all_digits(folders, rows):
    row = rows(*folders)["mean", "Dice", "ours"]
    (score,) = [s for s in compare(folders).scores if (s.label, s.metric, s.name) == ("mean", "Dice", "ours")]
    assert (float(row["mean"]), float(row["p_t"]), float(row["won"])) == (score.mean, score.test.p_t, score.test.won)


# ---- files


def test_ending_of_the_output_says_the_format(folders, command, tmp_path):
    target = tmp_path / "table.tex"
    status, out, _ = command(*folders, "-o", target)
    assert (status, out) == (0, f"{target}\n")
    assert target.read_text().startswith("% needs")


def test_several_formats_are_files_side_by_side(folders, command, tmp_path):
    status, out, _ = command(*folders, "-o", tmp_path / "v1.2.txt", "--format", "text", "markdown", "latex", "csv")
    names = [f"v1.2{ending}" for ending in (".txt", ".md", ".tex", ".csv")]
    assert (status, out.split()) == (0, [str(tmp_path / name) for name in names])
    assert all((tmp_path / name).is_file() for name in names)


def test_output_that_exists_is_kept(folders, command, tmp_path):
    (tmp_path / "t.csv").write_text("mine")
    status, out, err = command(*folders, "-o", tmp_path / "t.md", "--format", "markdown", "csv")
    assert (status, out) == (1, "")
    assert err == f"nnunetv2_diffusion compare: {tmp_path / 't.csv'} exists; it is not overwritten\n"
    assert (tmp_path / "t.csv").read_text() == "mine"
    assert not (tmp_path / "t.md").exists()


# ---- refusals


@pytest.fixture
def refused(command):
    """Run the verb, which must fail with one line -> that line."""

    def run(*arguments):
        status, out, err = command(*arguments)
        assert (status, out) == (1, "")
        assert err.startswith("nnunetv2_diffusion compare: ")
        assert err.count("\n") == 1
        return err

    return run


def test_unequal_cases_are_listed_where_they_are_missing(summary, refused):
    many = summary("many", {"1": {"Dice": [0.5] * 14}}, cases=[f"c{i:02}" for i in range(14)])
    few = summary("few", {"1": {"Dice": [0.5] * 3}}, cases=["c00", "c01", "new"])
    message = refused(many, few)
    assert f"many ({many / 'summary.json'}) lacks 1 of 15: new;" in message
    assert "lacks 12 of 15: c02, c03, c04, c05, c06, c07, c08, c09, c10, c11, ... (12 in all)" in message


def test_missing_metric_names_file_case_and_what_there_is(folders, refused):
    message = refused(*folders, "--metrics", "NSD_1mm")
    assert (
        f"{folders[0] / 'summary.json'}: case case_0, class 1 has no metric NSD_1mm; it has Dice, HD95, TP" in message
    )


def test_missing_class_names_file_and_what_there_is(folders, summary, refused):
    assert "case case_0 has no class 7; it has 1, 2" in refused(*folders, "--classes", "7")
    lacks = summary("lacks", {"1": {"Dice": [0.5] * 5}})
    message = refused(folders[0], lacks)
    assert f"{lacks / 'summary.json'}: case case_0 has no class 2; it has 1" in message


def test_summaries_without_default_metrics_say_what_they_have(summary, refused):
    folders = [summary(name, {"1": {"IoU": [0.5]}}) for name in ("a", "b")]
    assert "choose metrics with --metrics: all have IoU" in refused(*folders)


def test_folder_without_summary_says_what_to_type(folders, refused, tmp_path):
    (tmp_path / "masks").mkdir()
    message = refused(folders[0], tmp_path / "masks")
    assert f"{tmp_path / 'masks'} has no summary.json" in message
    assert f"nnunetv2_diffusion evaluate GROUND_TRUTH {tmp_path / 'masks'}" in message


def test_source_that_does_not_exist_is_named(folders, refused, tmp_path):
    assert f"{tmp_path / 'gone'} does not exist" in refused(folders[0], tmp_path / "gone")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{half", "broken.json: not JSON ("),
        ("[]", "holds list, expected a mapping"),
        ('{"metric_per_case": []}', "has no cases"),
        ('{"metric_per_case": [{"metrics": {}}]}', "metric_per_case[0] has no text 'prediction_file'"),
        (
            '{"metric_per_case": [{"prediction_file": "a.png", "metrics": {"1": 0.5}}]}',
            "metric_per_case[0] has no 'met",
        ),
        (
            json.dumps({"metric_per_case": [{"prediction_file": f"{f}/a.png", "metrics": {}} for f in "xy"]}),
            "has case a twice",
        ),
    ],
)
def test_file_that_is_no_summary_is_named(folders, refused, tmp_path, content, message):
    broken = tmp_path / "broken.json"
    broken.write_text(content)
    line = refused(folders[0], broken)
    assert str(broken) in line
    assert message in line


def test_summaries_of_background_only_have_no_foreground(summary, refused):
    folders = [summary(name, {"0": {"Dice": [0.5]}}) for name in ("a", "b")]
    assert "no foreground class" in refused(*folders)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--names", "a"), "1 names are given for 2 folders: a"),
        (("--names", "a", "a"), "a: more than one method has this name"),
        (("--names", "a", " "), "a name is empty"),
        (("--reference", "other"), "reference is other, expected one of base, ours"),
        (("--alpha", "1"), "alpha is 1.0"),
        (("--bootstrap", "5"), "bootstrap is 5, expected at least 100"),
        (("--bootstrap", "1000000000"), "at most 1000000"),
        (("--seed", "1" + "0" * 30), "expected at least 0 and less than"),
        (("--seed", "-1"), "seed is -1"),
        (("--higher_is_better", "TP", "--lower_is_better", "TP"), "TP cannot be better both high and low"),
    ],
)
def test_options_that_cannot_be_used_are_named(folders, refused, options, message):
    assert message in refused(*folders, *options)


def test_one_folder_is_nothing_to_compare(folders, refused):
    assert "1 folder of predictions is given, expected two or more" in refused(folders[0])


def test_folders_of_the_same_name_need_names(folders, rows, refused, tmp_path):
    (tmp_path / "other").mkdir()
    twin = (folders[1]).rename(tmp_path / "other" / "base")
    assert "base: more than one method has this name; give others with --names" in refused(folders[0], twin)
    assert ("1", "Dice", "b") in rows(folders[0], twin / "summary.json", "--names", "a", "b")


def test_nothing_is_written_beside_the_summaries(folders, command):
    before = {folder: sorted(folder.iterdir()) for folder in folders}
    command(*folders)
    assert {folder: sorted(folder.iterdir()) for folder in folders} == before
