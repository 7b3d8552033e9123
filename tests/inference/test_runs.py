"""One output folder, several calls: nothing is lost, nothing is mixed, and one bad case costs no other."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from tiny_model import make_model, write_images

from nnunetv2_diffusion import cli
from nnunetv2_diffusion.compat import package_versions
from nnunetv2_diffusion.inference import cases, export, exporter, predict, prepared
from nnunetv2_diffusion.inference.export import CaseExport
from nnunetv2_diffusion.inference.exporter import Exporter
from nnunetv2_diffusion.inference.inputs import CaseError
from nnunetv2_diffusion.inference.loading import load_predictor
from nnunetv2_diffusion.inference.prepared import FailedCase
from nnunetv2_diffusion.inference.runs import RunRecord, clear_leftovers, fingerprint, short_name
from nnunetv2_diffusion.locks import locked

PLAIN = ("--tta", "none", "--steps", "1", "--sampler", "ddim", "--seed", "5")
WITH_ALL = (*PLAIN, "--samples", "2", "--save_uncertainty", "--save_samples", "--save_steps", "--save_probabilities")


def run(model, images, out, *options):
    """Exit status of the verb, without processes of its own."""
    fixed = ["-m", model, "-i", images, "-o", out, "-device", "cpu", "-npp", 0, "-nps", 0, "--disable_progress_bar"]
    return cli.main(["predict", *map(str, fixed), *map(str, options)])


def contents(folder):
    """Relative name -> bytes of all files but JSON, which tell of the call and its time."""
    files = {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if f.is_file()}
    return {name: file.read_bytes() for name, file in files.items() if not name.endswith(".json")}


def everything_in(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def failures(out):
    return json.loads((out / "failed.json").read_text())


@pytest.fixture(scope="module")
def finished(models, images, tmp_path_factory):
    """A finished run with every kind of file; tests copy it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert run(models(), images, out, *WITH_ALL) == 0
    return out


@pytest.fixture
def out(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture(scope="module")
def masks(models, images, tmp_path_factory):
    """A finished run with masks alone; tests copy it."""
    out = tmp_path_factory.mktemp("masks") / "out"
    assert run(models(), images, out, *PLAIN) == 0
    return out


@pytest.fixture
def plain(masks, tmp_path):
    shutil.copytree(masks, tmp_path / "plain")
    return tmp_path / "plain"


# --- going on --------------------------------------------------------------------------------------------------------


def _cut(file):
    file.write_bytes(file.read_bytes()[:50])


def _empty(file):
    file.write_bytes(b"")


def _other(file):
    """As many bytes as before, of another content, as of another seed."""
    file.write_bytes(file.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("case_1.nii.gz", _cut, "case_1.nii.gz is not what was written"),
        ("case_1.nii.gz", _empty, "case_1.nii.gz is not what was written"),
        ("case_1.nii.gz", _other, "case_1.nii.gz is not what was written"),
        ("case_1.npz", _other, "case_1.npz is not what was written"),
        ("case_1.pkl", Path.unlink, "case_1.pkl is missing"),
        ("uncertainty/case_1.json", _other, "uncertainty/case_1.json is not what was written"),
        ("uncertainty/entropy/case_1.nii.gz", Path.unlink, "uncertainty/entropy/case_1.nii.gz is missing"),
        ("samples/001/case_1.nii.gz", _empty, "samples/001/case_1.nii.gz is not what was written"),
        ("steps/01/case_1.nii.gz", _cut, "steps/01/case_1.nii.gz is not what was written"),
    ],
)
def test_what_is_not_whole_is_made_again_and_the_rest_is_kept(
    models, images, finished, out, capsys, name, damage, words
):
    damage(out / name)
    before = (out / "case_0.nii.gz").stat().st_mtime_ns
    assert run(models(), images, out, *WITH_ALL, "--continue_prediction") == 0
    printed = capsys.readouterr().out
    assert f"case_1: {words}; it is made again" in printed
    assert "1 of 2 cases are finished" in printed
    assert (out / "case_0.nii.gz").stat().st_mtime_ns == before
    assert contents(out) == contents(finished)


def test_other_images_of_the_same_names_are_not_finished(models, plain, tmp_path, capsys):
    images = write_images(tmp_path / "in", 1)  # case_0 is the same image in another folder
    (tmp_path / "other").mkdir()
    write_images(tmp_path / "three", 3)
    shutil.copy(tmp_path / "three" / "case_2_0000.nii.gz", images / "case_1_0000.nii.gz")
    assert run(models(), images, plain, *PLAIN, "--continue_prediction") == 0
    printed = capsys.readouterr().out
    assert "1 of 2 cases are finished" in printed
    assert "case_1: made of other images; it is made again" in printed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((*PLAIN[:-1], "6"), "--seed was 5 and is 6"),
        ((*PLAIN, "--steps", "2"), "--steps was 1 and is 2"),
        ((*PLAIN, "--tta", "full"), "--tta was none and is full"),
        ((*PLAIN, "-step_size", "1"), "-step_size was 0.5 and is 1.0"),
        ((*PLAIN, "--save_samples"), "--save_samples was False and is True"),
    ],
)
@pytest.mark.parametrize("how", [(), ("--continue_prediction",)])
def test_other_options_are_refused_by_name(models, images, plain, capsys, options, words, how):
    before = everything_in(plain)
    assert run(models(), images, plain, *options, *how) == 1
    message = capsys.readouterr().err
    assert f"holds 2 cases of another run: {words}. Choose a new folder, or type --overwrite" in message
    assert everything_in(plain) == before


def test_another_model_is_refused_by_name(models, images, plain, tmp_path, capsys):
    assert run(models("nnUNetTrainerHiDiff"), images, plain, *PLAIN, "--continue_prediction") == 1
    message = capsys.readouterr().err
    assert "-tr was nnUNetTrainerRecycleXT and is nnUNetTrainerHiDiff" in message
    assert "weights of fold_0 differ" in message


def test_other_folds_are_refused_by_name(models, images, tmp_path, capsys):
    assert run(models(folds=2), images, tmp_path / "out", *PLAIN, "-f", "0") == 0
    assert run(models(folds=2), images, tmp_path / "out", *PLAIN, "--continue_prediction") == 1
    assert "of another run: weights of fold_1 were not used and are now." in capsys.readouterr().err


def test_options_that_say_what_the_plans_say_are_the_same_run(models, images, tmp_path, monkeypatch, capsys):
    assert run(models(steps=2), images, tmp_path / "out", *PLAIN[:2]) == 0
    assert run(models(steps=2), images, tmp_path / "out", *PLAIN[:2], "--steps", 2, "--continue_prediction") == 0
    assert "2 of 2 cases are finished" in capsys.readouterr().out


def test_without_being_told_a_finished_run_is_neither_kept_nor_replaced(models, images, plain, capsys):
    before = everything_in(plain)
    assert run(models(), images, plain, *PLAIN) == 1
    message = capsys.readouterr().err
    assert "holds 2 cases of this model and these options" in message
    assert "Type --continue_prediction to keep them, --overwrite to make them again" in message
    assert everything_in(plain) == before


@pytest.mark.parametrize("how", [(), ("--continue_prediction",)])
def test_a_folder_without_a_record_is_refused(models, images, plain, capsys, how):
    """Of version 0.1, or of nnUNetv2_predict."""
    shutil.rmtree(plain / ".run")
    before = everything_in(plain)
    assert run(models(), images, plain, *PLAIN, *how) == 1
    assert "holds 5 files that no recorded run wrote: case_0.nii.gz" in capsys.readouterr().err
    assert everything_in(plain) == before


def test_ground_truth_is_not_replaced_unless_asked_and_then_by_the_same_name_only(models, images, tmp_path, capsys):
    labels = tmp_path / "labelsTr"
    labels.mkdir()
    for name in ("case_0.nii.gz", "case_1.nii.gz", "case_7.nii.gz", "readme.txt"):
        (labels / name).write_bytes(b"truth")
    assert run(models(), images, labels, *PLAIN) == 1
    assert "holds 3 files that no recorded run wrote" in capsys.readouterr().err
    assert {f.read_bytes() for f in labels.iterdir()} == {b"truth"}
    assert run(models(), images, labels, *PLAIN, "--overwrite") == 0
    assert {n: (labels / n).read_bytes() == b"truth" for n in ("case_1.nii.gz", "case_7.nii.gz", "readme.txt")} == {
        "case_1.nii.gz": False, "case_7.nii.gz": True, "readme.txt": True
    }  # fmt: skip


def test_a_data_sets_own_json_is_not_replaced(models, images, tmp_path, capsys):
    (tmp_path / "dataset.json").write_text("{}")
    assert run(models(), images, tmp_path, *PLAIN) == 1
    assert "holds 1 file that no recorded run wrote: dataset.json" in capsys.readouterr().err
    assert (tmp_path / "dataset.json").read_text() == "{}"


def test_overwrite_removes_what_the_recorded_run_wrote_and_nothing_else(models, images, masks, out):
    (out / "notes.txt").write_text("of a person")
    (out / "samples/000/mine.nii.gz").write_text("of a person")
    assert run(models(), images, out, *PLAIN, "--overwrite") == 0
    assert contents(out) == {
        **contents(masks), "notes.txt": b"of a person", "samples/000/mine.nii.gz": b"of a person"
    }  # fmt: skip
    assert not (out / "uncertainty").exists()


def test_overwrite_keeps_a_mask_that_a_person_has_corrected_and_that_is_not_made_again(models, plain, tmp_path, capsys):
    (plain / "case_1.nii.gz").write_bytes(b"corrected")
    assert run(models(), write_images(tmp_path / "in", 1), plain, *PLAIN, "--overwrite") == 0
    assert (plain / "case_1.nii.gz").read_bytes() == b"corrected"


def test_overwrite_with_the_same_options_makes_the_cases_of_the_call_alone(models, images, masks, plain, capsys):
    before, old = everything_in(plain), (plain / "case_1.nii.gz").stat().st_mtime_ns
    (plain / "case_0.nii.gz").write_bytes(b"cut off")
    assert run(models(), images / "case_0_0000.nii.gz", plain, *PLAIN, "--overwrite") == 0
    assert contents(plain) == contents(masks)
    assert (plain / "case_1.nii.gz").stat().st_mtime_ns == old
    for record in (".run/run.json", ".run/cases/case_0.json", ".run/cases/case_1.json"):
        assert (plain / record).read_bytes() == before[record]
    assert "removed" not in capsys.readouterr().out


@pytest.mark.parametrize("seed", [5, 6])
def test_overwrite_names_the_files_of_others_that_stay(models, images, plain, capsys, seed):
    shutil.copy(plain / "case_1.nii.gz", plain / "case_7.nii.gz")
    assert run(models(), images, plain, *PLAIN, "--seed", seed, "--overwrite") == 0
    printed = capsys.readouterr().out
    assert "1 file of no recorded run, replaced only by those of the same name: case_7.nii.gz" in printed
    assert (plain / "case_7.nii.gz").is_file()


def test_overwrite_makes_whole_cases_again(models, images, finished, out):
    old = {name: (out / name).stat().st_mtime_ns for name in contents(out)}
    assert run(models(), images, out, *WITH_ALL, "--overwrite") == 0
    assert contents(out) == contents(finished)
    assert all((out / name).stat().st_mtime_ns > then for name, then in old.items())


def test_overwrite_removes_files_of_a_case_that_are_not_made_again(models, images, plain):
    """As a map that could be written then and cannot now."""
    file, record = plain / "uncertainty/case_0.nii.gz", plain / ".run/cases/case_0.json"
    file.parent.mkdir()
    file.write_bytes(b"old")
    content = json.loads(record.read_text())
    content["files"]["uncertainty/case_0.nii.gz"] = fingerprint(file)
    record.write_text(json.dumps(content))
    assert run(models(), images, plain, *PLAIN, "--overwrite") == 0
    assert not (plain / "uncertainty").exists()


def test_overwrite_from_an_image_that_is_cut_off_loses_no_mask(models, masks, plain, tmp_path, capsys):
    images = write_images(tmp_path / "in", 1)
    whole = (images / "case_0_0000.nii.gz").read_bytes()
    _cut(images / "case_0_0000.nii.gz")
    assert run(models(), images, plain, *PLAIN, "--overwrite") == 1
    said = capsys.readouterr()
    assert "case_0: could not be made again; its earlier files stay" in said.out
    assert "case_0 failed: " in said.err
    assert list(failures(plain)) == ["case_0"]
    assert contents(plain) == contents(masks)
    again = (*PLAIN, "--continue_prediction", "--retry_failed")
    assert run(models(), images, plain, *again) == 1
    assert contents(plain) == contents(masks), "nor does trying again"
    (images / "case_0_0000.nii.gz").write_bytes(whole)
    assert run(models(), images, plain, *again) == 0
    assert contents(plain) == contents(masks)
    assert not (plain / "failed.json").exists()


@pytest.mark.parametrize("kind", ["preprocessing", "values", "export", "lost"])
def test_overwrite_that_fails_at_a_case_keeps_its_files(models, images, finished, out, monkeypatch, kind):
    BAD[kind][0](monkeypatch)
    assert run(models(), images, out, *WITH_ALL, "--overwrite") == 1
    assert contents(out) == contents(finished)
    assert list(failures(out)) == ["case_0"]


def test_overwrite_that_fails_while_a_case_is_moved_leaves_no_half_of_it(models, images, out, monkeypatch):
    """Neither new maps beside an old mask, nor the other way round."""
    replace = os.replace

    def full(source, target):
        if str(target).endswith("steps/01/case_0.nii.gz"):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert run(models(), images, out, *WITH_ALL, "--overwrite") == 1
    assert list(failures(out)) == ["case_0"]
    assert not [name for name in contents(out) if "case_0" in name]


@pytest.mark.parametrize("number", ["1 case", "2 cases"])
def test_how_many_cases_of_another_run_are_removed_is_told_before_and_after(models, images, plain, capsys, number):
    if number == "1 case":
        (plain / "case_1.nii.gz").unlink()
    one = images / "case_0_0000.nii.gz"
    assert run(models(), one, plain, *PLAIN, "--seed", 6) == 1
    message = capsys.readouterr().err
    assert f"holds {number} of another run: --seed was 5 and is 6." in message
    assert f"type --overwrite, which removes {number} of that run" in message
    assert run(models(), one, plain, *PLAIN, "--seed", 6, "--overwrite") == 0
    assert f"removed {number} of another run: case_0" in capsys.readouterr().out
    assert set(contents(plain)) == {"case_0.nii.gz"}


@pytest.mark.parametrize("seed", [5, 6])
def test_a_folder_whose_files_a_person_has_removed_is_empty(models, images, plain, seed):
    for file in plain.glob("*"):  # as rm does: hidden ones stay
        if file.is_file():
            file.unlink()
    assert run(models(), images, plain, *PLAIN, "--seed", seed) == 0
    assert json.loads((plain / ".run/run.json").read_text())["about"]["--seed"] == seed


def test_options_that_exclude_each_other_are_named(models, images, tmp_path, capsys):
    assert run(models(), images, tmp_path / "out", "--overwrite", "--continue_prediction") == 1
    assert "choose one" in capsys.readouterr().err
    assert run(models(), images, tmp_path / "out", "--retry_failed") == 1
    assert "--retry_failed goes with --continue_prediction" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_versions_are_told_of(models, images, plain, capsys):
    file = plain / ".run" / "run.json"
    record = json.loads(file.read_text())
    assert record["versions"] == package_versions()
    record["versions"]["torch"] = "2.6.0"
    file.write_text(json.dumps(record))
    assert run(models(), images, plain, *PLAIN, "--continue_prediction") == 0
    assert f"torch was 2.6.0 and is {version('torch')}" in capsys.readouterr().out


# --- kills -----------------------------------------------------------------------------------------------------------


def _killed_at(moment, *arguments):
    """Whether a run was killed, in a process of its own, before a file got its name: the n-th one, or the one given."""
    pid = os.fork()
    if pid == 0:
        replace, calls = os.replace, []

        def dying(*names):
            calls.append(names)
            if moment in (len(calls), names[1]):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*names)

        os.replace = dying
        run(*arguments)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize("moment", range(1, 18, 2))
def test_a_kill_at_any_file_loses_nothing_and_leaves_nothing(models, images, finished, tmp_path, moment):
    """The process is gone before the second, sixth, ... file gets its name."""
    out = tmp_path / "out"
    killed = _killed_at(2 * moment, models(), images, out, *WITH_ALL)
    assert killed or moment > 15
    assert run(models(), images, out, *WITH_ALL, "--continue_prediction") == 0
    assert contents(out) == contents(finished)
    assert not list(out.glob(".[!r]*")), "nothing hidden is left but the record"


@pytest.mark.parametrize("file", [".run/cases/case_0.json", "case_0.npz", "samples/001/case_0.nii.gz", "case_0.nii.gz"])
def test_a_kill_while_a_case_is_replaced_costs_that_case_alone(models, images, finished, out, capsys, file):
    """Before the new record, and before files of the case."""
    assert _killed_at(out / file, models(), images, out, *WITH_ALL, "--overwrite")
    assert json.loads((out / ".run/cases/case_0.json").read_text())["files"]
    assert not (out / "case_0.nii.gz").exists(), "an old mask is never beside new maps"
    assert run(models(), images, out, *WITH_ALL, "--continue_prediction") == 0
    assert "1 of 2 cases are finished" in capsys.readouterr().out
    assert contents(out) == contents(finished)


def test_leftovers_of_the_dead_are_cleared_and_other_files_are_not(tmp_path):
    (tmp_path / ".unfinished_a").mkdir()
    (tmp_path / ".unfinished_a" / "a.nii.gz").write_text("half")
    (tmp_path / ".unfinished_link").symlink_to(tmp_path / "elsewhere")
    left = (".plans.json.123", ".run.json.123.part", ".long_name.7.part", ".writable_7", ".lock_0_of_1")
    for name in (*left, ".mine", ".mine.json"):
        (tmp_path / name).write_text("123")
    clear_leftovers(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {".mine", ".mine.json", ".unfinished_link"}


PARENT = """
import multiprocessing, time
from nnunetv2_diffusion.workers import end_with_parent

def work():
    end_with_parent()
    time.sleep(60)

if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=work, daemon=True)
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(60)
"""


def _lives(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    first = parent.stdout.readline()
    assert first.strip().isdecimal(), first + parent.communicate()[0]
    pid = int(first)
    assert _lives(pid)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 20  # it may be starting still
    while _lives(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _lives(pid)


def test_an_export_worker_is_one_that_ends_with_its_parent(monkeypatch):
    called = []
    monkeypatch.setattr(exporter, "end_with_parent", lambda: called.append(True))
    ours, theirs = multiprocessing.Pipe()
    ours.close()
    exporter._serve(theirs, None)
    assert called


class Deadly(RunRecord):
    """A record at which the process of a certain case is killed, as for want of memory."""

    def write(self, name, work, inputs):
        if name == "b":
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(name, work, inputs)


def test_a_worker_that_is_killed_costs_its_case_alone(models, images, tmp_path, monkeypatch):
    fork = multiprocessing.get_context("fork")  # starts at once; what workers are started with is tested with predict
    monkeypatch.setattr(exporter.multiprocessing, "get_context", lambda method: fork)
    predictor = load_predictor(models(), progress=False)
    case = next(prepared.prepare_cases(predictor, {"x": [images / "case_0_0000.nii.gz"]}, None, 0))
    logits = np.zeros((3, *case.data.shape[1:]), np.float32)
    record = Deadly(tmp_path, "1")
    with Exporter(cases.model_files(predictor), 1) as export_case:
        for name in "abc":
            export_case(CaseExport(name, case.properties, logits, record))
    assert export_case.finished == ["a", "c"]
    ((name, reason),) = [(f.name, f.reason) for f in export_case.failed]
    assert name == "b"
    assert "was killed by signal 9, probably for want of memory" in reason
    assert {f.name for f in tmp_path.iterdir()} == {".run", "a.nii.gz", "c.nii.gz"}


# --- one bad case ----------------------------------------------------------------------------------------------------


def _fails_at_preprocessing(monkeypatch):
    prepare = predict.prepare_cases

    def bad(*arguments):
        for case in prepare(*arguments):
            yield FailedCase("case_0", "too thin") if case.name == "case_0" else case

    monkeypatch.setattr(predict, "prepare_cases", bad)


def _fails_at_prediction(error):
    def patch(monkeypatch):
        draw = cases.draw_case

        def bad(predictor, data, name, *arguments, **kwargs):
            if name == "case_0":
                raise error
            return draw(predictor, data, name, *arguments, **kwargs)

        monkeypatch.setattr(cases, "draw_case", bad)

    return patch


def _fails_at_export(monkeypatch):
    write = export.write_mask

    def bad(logits, target, *arguments, **kwargs):
        if target.name == "case_0":
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        write(logits, target, *arguments, **kwargs)

    monkeypatch.setattr(export, "write_mask", bad)


def _fails_at_a_sample(monkeypatch):
    write = SimpleITKIO.write_seg

    def bad(self, mask, file, properties):
        if "samples/000/case_0" in file:
            raise RuntimeError("ITK ERROR: x.nii.gz:\nno space left")
        write(self, mask, file, properties)

    monkeypatch.setattr(SimpleITKIO, "write_seg", bad)


def _is_lost(monkeypatch):
    prepare = predict.prepare_cases
    monkeypatch.setattr(predict, "prepare_cases", lambda *a: (c for c in prepare(*a) if c.name != "case_0"))


BAD = {
    "preprocessing": (_fails_at_preprocessing, "too thin"),
    "values": (_fails_at_prediction(ValueError("7 probabilities are not finite")), "7 probabilities are not finite"),
    "case": (_fails_at_prediction(CaseError("a.nii.gz: is empty")), "a.nii.gz: is empty"),
    "file": (_fails_at_prediction(OSError(errno.EIO, "Input/output error", "x")), "Input/output error: x"),
    "memory": (_fails_at_prediction(MemoryError()), "not enough main memory"),
    "torch": (
        _fails_at_prediction(RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 bytes")),
        "not enough main memory (DefaultCPUAllocator: can't allocate memory: 1 bytes)",
    ),
    "gpu": (_fails_at_prediction(torch.cuda.OutOfMemoryError("CUDA out of memory")), "the GPU has not enough memory"),
    "export": (_fails_at_export, "No space left on device: case_0"),
    "lost": (_is_lost, "preprocessing returned nothing"),
}


def test_a_sample_that_cannot_be_written_costs_its_case_alone(models, images, tmp_path, monkeypatch):
    _fails_at_a_sample(monkeypatch)
    assert run(models(), images, tmp_path / "out", *PLAIN, "--save_samples") == 1
    assert failures(tmp_path / "out") == {
        "case_0": "case_0.nii.gz: cannot be written (ITK ERROR: x.nii.gz: no space left)"
    }
    assert set(contents(tmp_path / "out")) == {"case_1.nii.gz", "samples/000/case_1.nii.gz"}


@pytest.mark.parametrize("kind", BAD)
def test_one_bad_case_does_not_cost_the_others(models, images, masks, tmp_path, monkeypatch, capsys, kind):
    patch, reason = BAD[kind]
    out = tmp_path / "out"
    with monkeypatch.context() as bad:
        patch(bad)
        assert run(models(), images, out, *PLAIN) == 1
    said = capsys.readouterr()
    assert f"case_0 failed: {reason}" in said.err
    assert "2 cases found: 1 predicted, 0 finished before, 1 failed" in said.out
    assert list(failures(out)) == ["case_0"]
    assert reason in failures(out)["case_0"]
    assert {f.name for f in out.iterdir() if f.name.startswith(".")} == {".run"}, "its work folder is gone"
    assert {n: b for n, b in contents(masks).items() if "case_0" not in n} == contents(out)


def test_a_failed_case_is_tried_again_only_when_asked(models, images, masks, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as bad:
        _fails_at_preprocessing(bad)
        assert run(models(), images, out, *PLAIN) == 1
    capsys.readouterr()
    assert run(models(), images, out, *PLAIN, "--continue_prediction") == 1
    said = capsys.readouterr()
    assert "case_0 failed: too thin (before; --retry_failed tries again)" in said.err
    assert "2 cases found: 0 predicted, 1 finished before, 1 failed" in said.out
    assert failures(out) == {"case_0": "too thin"}
    assert run(models(), images, out, *PLAIN, "--continue_prediction", "--retry_failed") == 0
    assert not (out / "failed.json").exists()
    assert contents(out) == contents(masks)


def test_failures_of_all_parts_are_in_one_file(models, images, tmp_path, monkeypatch):
    monkeypatch.setattr(
        predict, "prepare_cases", lambda predictor, todo, *rest: (FailedCase(name, "bad") for name in todo)
    )
    for part in (0, 1):
        assert run(models(), images, tmp_path / "out", *PLAIN, "-num_parts", 2, "-part_id", part) == 1
    assert failures(tmp_path / "out") == {"case_0": "bad", "case_1": "bad"}


def test_a_failure_of_the_model_ends_at_once_and_keeps_what_is_finished(
    models, tmp_path, images, masks, monkeypatch, capsys
):
    draw, tried = cases.draw_case, []

    def broken(predictor, data, name, *arguments, **kwargs):
        tried.append(name)
        if name == "case_1":
            raise RuntimeError("CUDA error: device-side assert triggered")
        return draw(predictor, data, name, *arguments, **kwargs)

    three = write_images(tmp_path / "in", 3)
    with monkeypatch.context() as bad:
        bad.setattr(cases, "draw_case", broken)
        assert run(models(), three, tmp_path / "out", *PLAIN) == 1
    message = capsys.readouterr().err
    assert "case_1: RuntimeError: CUDA error: device-side assert triggered" in message
    assert message.count("\n") == 1
    assert tried == ["case_0", "case_1"]
    assert run(models(), three, tmp_path / "out", *PLAIN, "--continue_prediction") == 0
    assert "1 of 3 cases are finished" in capsys.readouterr().out


def test_masks_of_the_previous_stage_that_are_missing_cost_their_cases(models, images, tmp_path, monkeypatch, capsys):
    (tmp_path / "lowres").mkdir()
    monkeypatch.setattr(predict, "_previous_stage", lambda *arguments: tmp_path / "lowres")
    assert run(models(), images, tmp_path / "out", *PLAIN) == 1
    assert failures(tmp_path / "out")["case_1"].startswith(str(tmp_path / "lowres" / "case_1.nii.gz"))


def test_want_of_memory_for_the_model_is_named(models, images, tmp_path, monkeypatch, capsys):
    def no_room(*arguments, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(predict, "load_predictor", no_room)
    assert run(models(), images, tmp_path / "out") == 1
    assert "predict: not enough main memory" in capsys.readouterr().err


# --- two at once -----------------------------------------------------------------------------------------------------


def test_a_second_prediction_into_a_folder_is_refused_by_the_number_of_the_first(models, images, plain, capsys):
    pytest.importorskip("fcntl")
    with locked(plain / ".lock_0_of_1", "a prediction"):
        for part in ((), ("-num_parts", 2, "-part_id", 1)):
            assert run(models(), images, plain, *PLAIN, "--continue_prediction", *part) == 1
            assert f"works here already (process {os.getpid()})" in capsys.readouterr().err
    assert run(models(), images, plain, *PLAIN, "--continue_prediction") == 0


def test_parts_work_side_by_side_in_one_run(models, images, masks, tmp_path, capsys):
    out = tmp_path / "out"
    part = (*PLAIN, "-num_parts", 2, "-part_id")
    assert run(models(), images, out, *part, 0) == 0
    (out / ".unfinished_case_0").mkdir()
    with locked(out / ".lock_0_of_2", "a prediction"):
        assert run(models(), images, out, *part, 0) == 1
        assert "works here already" in capsys.readouterr().err
        assert run(models(), images, out, *part, 1) == 0
        assert (out / ".unfinished_case_0").is_dir(), "of the part that lives"
    assert contents(out) == contents(masks)
    assert len({json.loads(f.read_text())["run_id"] for f in (out / ".run").rglob("*.json")}) == 1
    assert run(models(), images, out, *part, 0, "--seed", 6, "--overwrite") == 0
    assert not (out / "case_1.nii.gz").exists(), "of another run"


@pytest.mark.parametrize("how", [(), ("--overwrite",), ("--continue_prediction",)])
def test_a_part_of_another_run_that_works_is_named_and_nothing_is_to_be_removed(models, images, plain, capsys, how):
    pytest.importorskip("fcntl")
    before = everything_in(plain)
    with locked(plain / ".lock_0_of_2", "a prediction"):
        assert run(models(), images, plain, *PLAIN, "--seed", 6, "-num_parts", 2, "-part_id", 1, *how) == 1
    message = capsys.readouterr().err
    assert f"a run with other options works here, -part_id 0 (process {os.getpid()}): --seed was 5 and is 6" in message
    assert "Choose another folder, or wait for its end" in message
    assert "--overwrite" not in message
    assert everything_in(plain) == before


# --- places ----------------------------------------------------------------------------------------------------------


def test_an_output_that_is_an_input_or_in_the_model_is_refused(models, images, tmp_path, capsys):
    model = models()
    before = everything_in(model)
    for out in (model, model / "fold_0", model / "results"):
        assert run(model, images, out) == 1
        assert f"{out}: lies within the folder of the model" in capsys.readouterr().err
    previous = tmp_path / "lowres"
    previous.mkdir()
    (tmp_path / "link").symlink_to(previous)
    assert run(model, images / "case_0_0000.nii.gz", images) == 1
    assert "the same folder as the images of -i" in capsys.readouterr().err
    assert run(model, images, tmp_path / "link", "-prev_stage_predictions", previous) == 1
    assert "the same folder as the masks of -prev_stage_predictions" in capsys.readouterr().err
    assert everything_in(model) == before
    assert list(previous.iterdir()) == []


@pytest.mark.parametrize("name", ["uncertainty", "samples/000", ".run"])
def test_a_link_out_of_the_folder_is_not_followed(models, images, tmp_path, capsys, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    assert run(models(), images, tmp_path / "out", *PLAIN, "--save_uncertainty") == 1
    assert f"{tmp_path / 'out' / name}: is a link out of {tmp_path / 'out'}" in capsys.readouterr().err
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_names_that_are_as_long_as_they_may_be_get_short_ones_here():
    long = "x" * 240
    assert short_name("case") == "case"
    assert len(short_name(long)) < 150
    assert short_name(long) != short_name(long + "y")


# --- what is said ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["abc", "1e9", "/dev/null", ""])
def test_a_data_set_that_is_none_is_named(tmp_path, capsys, dataset):
    for verb in (["predict"], ["analyse", "-l", str(tmp_path)]):
        common = ["-d", dataset, "-c", "2d", "-i", str(tmp_path), "-o", str(tmp_path / "out"), "-device", "cpu"]
        assert cli.main([*verb, *common]) == 1
        message = capsys.readouterr().err
        assert f"-d {dataset}: expected a number, or a name as Dataset001_NAME" in message


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_told_in_two_lines(models, images, tmp_path, monkeypatch, capsys, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for verb in (["predict"], ["analyse", "-l", str(images)]):
        common = ["-m", str(models()), "-i", str(images), "-o", str(tmp_path / "out"), "-device", device]
        assert cli.main([*verb, *common]) == 1
        message = capsys.readouterr().err
        assert f"-device {device}: " in message
        assert "Type -device cpu" in message
        assert message.count("\n") == 2
    assert not (tmp_path / "out").exists()


def test_the_end_is_told_in_one_line_with_words_that_count(models, tmp_path, capsys):
    images = write_images(tmp_path / "in", 1, (8, 12, 8))
    assert run(models(), images, tmp_path / "out", *PLAIN) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("s, 1 mask, 1 tile, 1 pass of the network" in line for line in lines)
    assert lines[-1].startswith("1 case in ")
    assert lines[-1].endswith(f"s, written to {tmp_path / 'out'}")


def test_one_bar_counts_the_cases_of_the_folder(models, images, tmp_path, capsys):
    command = ["predict", "-m", models(), "-i", images, "-o", tmp_path / "out", "-device", "cpu", "-npp", 0, "-nps", 0]
    assert cli.main([*map(str, command), *PLAIN]) == 0
    shown = capsys.readouterr().err
    assert "case 2 of 2, case_1: 100%" in shown
    assert "pass/s" not in shown


def test_a_previous_stage_that_no_one_asked_for_is_told_of(models, images, tmp_path, capsys):
    previous = tmp_path / "lowres"
    assert run(models(), images, tmp_path / "out", *PLAIN, "-prev_stage_predictions", previous) == 0
    assert f"-prev_stage_predictions {previous} is ignored" in capsys.readouterr().out


def test_fold_all_among_others_is_told_of(images, tmp_path, capsys):
    model = make_model(tmp_path / "model", folds=2)
    (model / "fold_1").rename(model / "fold_all")
    assert run(model, images, tmp_path / "out", *PLAIN, "-f", "0", "all") == 0
    assert "-f 0 all: fold all was trained on every case; it counts as one of 2 members" in capsys.readouterr().out


def test_every_json_of_a_run_has_its_id(finished):
    files = [finished / "predict_from_raw_data_args.json", *(finished / "uncertainty").glob("*.json")]
    ids = {json.loads(f.read_text())["run_id"] for f in files}
    assert len(files) == 3
    assert ids == {json.loads((finished / ".run" / "run.json").read_text())["run_id"]}


def test_an_interrupted_call_ends_without_a_traceback(models, images, tmp_path, monkeypatch, capsys):
    def stop(*arguments, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cases, "draw_case", stop)
    assert run(models(), images, tmp_path / "out", *PLAIN) == 130
    assert "--continue_prediction goes on" in capsys.readouterr().err
    assert not (tmp_path / "out" / ".unfinished_case_0").exists()
