"""Cases are prepared one by one, here or in worker processes: a bad one is named, and the others go on."""

import multiprocessing
import os
import signal

import numpy as np
import pytest
from odd_inputs import cut_off, volume, write_nifti
from test_inputs import model_of

from nnunetv2_diffusion.inference.inputs import FailedCase, list_cases
from nnunetv2_diffusion.inference.prepared import PreparedCase, prepare_cases


class Model:
    """What ``prepare_cases`` needs of a predictor."""

    verbose_preprocessing = False

    def __init__(self):
        files = model_of(spacing=(2.0, 1.0, 1.0))
        self.plans_manager, self.configuration_manager = files.plans_manager, files.configuration_manager
        self.dataset_json = files.dataset_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Good cases a, c, e, larger than the buffer of a pipe; between them a thin slice and half a file."""
    folder = tmp_path_factory.mktemp("cases")
    affine = np.diag([1, 1, 2, 1])
    for seed, name in enumerate("ace"):
        write_nifti(folder / f"{name}_0000.nii.gz", volume(seed, (20, 40, 40)), affine)
    write_nifti(folder / "b_0000.nii.gz", volume(0, (1, 40, 40)), np.diag([1, 1, 0.5, 1]))
    cut_off(write_nifti(folder / "d_0000.nii.gz", volume(0, (20, 40, 40)), affine), 0.5)
    return folder


def prepared(folder, processes):
    return list(prepare_cases(Model(), list_cases(folder, Model().dataset_json)[0], None, processes))


def test_one_bad_case_does_not_cost_the_others_with_workers_as_without(folder):
    here, there = prepared(folder, 0), prepared(folder, 2)
    assert [case.name for case in here] == [case.name for case in there] == list("abcde")
    for mine, theirs in zip(here, there, strict=True):
        assert type(mine) is type(theirs)
        if isinstance(mine, FailedCase):
            assert mine == theirs
            continue
        np.testing.assert_array_equal(mine.data.numpy(), theirs.data.numpy())
        assert mine.properties["spacing"] == theirs.properties["spacing"]
        assert mine.notes == theirs.notes
    reasons = {case.name: case.reason for case in here if isinstance(case, FailedCase)}
    assert set(reasons) == {"b", "d"}
    assert "b_0000.nii.gz: shape (1, 40, 40) of (0.5, 1, 1) mm becomes (0, 40, 40)" in reasons["b"]
    assert "d_0000.nii.gz: damaged or cut off" in reasons["d"]


def test_a_worker_that_is_killed_costs_its_case_only(folder):
    cases = {name: [folder / f"{name[0]}_0000.nii.gz"] for name in ("a", "c", "e", "c again", "e again")}
    found = prepare_cases(Model(), cases, None, 1)
    for good, bad, sent, words in (
        ("a", "c", signal.SIGKILL, "was killed (signal 9), probably for want of memory"),
        ("e", "c again", signal.SIGSEGV, "crashed (signal 11); a damaged file can do that"),
    ):
        case = next(found)
        assert isinstance(case, PreparedCase)
        assert case.name == good
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, sent)  # it holds the next case until that is taken
        case = next(found)
        assert isinstance(case, FailedCase)
        assert case.name == bad
        assert f"c_0000.nii.gz: its process {words}" in case.reason
    assert multiprocessing.active_children()
    found.close()
    assert not multiprocessing.active_children(), "workers end with the loop that takes their cases"


@pytest.mark.parametrize("change", ["deleted", "emptied"])
def test_an_input_that_goes_while_the_run_goes_on_is_named(folder, tmp_path, change):
    files = {name: [write_nifti(tmp_path / f"{name}_0000.nii.gz", volume(), np.eye(4))] for name in "ab"}
    found = prepare_cases(Model(), files, None, 0)
    assert isinstance(next(found), PreparedCase)
    if change == "deleted":
        files["b"][0].unlink()
    else:
        files["b"][0].write_bytes(b"")
    case = next(found)
    assert str(files["b"][0]) in case.reason
    assert ("no such file" if change == "deleted" else "0 bytes") in case.reason


def test_no_cases_start_no_process():
    assert not list(prepare_cases(Model(), {}, None, 3))
    assert not multiprocessing.active_children()
