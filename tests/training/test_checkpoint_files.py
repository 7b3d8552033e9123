"""Checkpoints that are written whole or not at all, and what becomes of one that was cut off."""

import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunetv2_diffusion import checkpoint_files
from nnunetv2_diffusion.checkpoint_files import is_whole, newest_whole, weights_only, whole_neighbour, write_whole
from nnunetv2_diffusion.checkpoints import CheckpointError
from nnunetv2_diffusion.inference.loading import _read
from nnunetv2_diffusion.training import DiffusionTrainer, RecycleXT

FINAL, LATEST, BEST = checkpoint_files.NAMES
CUTS = [0, 0.3, 0.9, 0.999]


class TinyTrainer(DiffusionTrainer):
    strategy = RecycleXT()


def checkpoint(epoch: int) -> dict:
    return {"network_weights": {"w": torch.full((2000,), float(epoch))}, "current_epoch": epoch}


def cut(file: Path, share: float = 0.5) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])


@pytest.fixture
def fold(tmp_path):
    """A fold with its three checkpoints: best of epoch 3, latest of 5, final of 7."""
    for name, epoch in ((BEST, 3), (LATEST, 5), (FINAL, 7)):
        torch.save(checkpoint(epoch), tmp_path / name)
    return tmp_path


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_is_written_beside_its_place_and_moved(tmp_path):
    file, seen = tmp_path / "checkpoint_best.pth", []
    file.write_bytes(b"before")

    def write(name):
        seen.append((Path(name).parent, file.read_bytes()))
        torch.save(checkpoint(1), name)
        assert file.read_bytes() == b"before"

    write_whole(file, write)
    assert seen == [(tmp_path, b"before")]
    assert is_whole(file)
    assert os.listdir(tmp_path) == [file.name]


def test_it_is_on_the_disk_before_it_replaces_the_other(tmp_path, monkeypatch):
    """A power cut must not leave an empty file under the name: contents first, then the name, then the folder."""
    done = []
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("replace") or replace(a, b))
    write_whole(tmp_path / "x.pth", lambda name: torch.save({}, name))
    assert done == ["x.pth.part", "replace", tmp_path.name]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 64")])
@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_leaves_the_old_file_whole(tmp_path, error, exists):
    file = tmp_path / LATEST
    if exists:
        torch.save(checkpoint(1), file)
        before = file.read_bytes()

    def write(name):
        Path(name).write_bytes(b"half")
        raise error

    expected = "the one from before is unchanged" if exists else "no part of it was kept"
    with pytest.raises(
        CheckpointError, match=rf"checkpoint_latest\.pth: could not be written, {expected} \(.*Make room"
    ):
        write_whole(file, write)
    assert os.listdir(tmp_path) == ([LATEST] if exists else [])
    assert not exists or file.read_bytes() == before


def test_a_file_that_reaches_its_limit_is_such_a_case(tmp_path):
    """The kernel's own refusal, through torch's writer."""
    file = tmp_path / LATEST
    torch.save(checkpoint(1), file)
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written, the one from before is unchanged"):
            write_whole(file, lambda name: torch.save(checkpoint(2), name))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == [LATEST]


@pytest.mark.parametrize("share", CUTS)
def test_a_file_that_was_cut_off_is_not_whole(fold, share):
    assert is_whole(fold / FINAL)
    cut(fold / FINAL, share)
    assert not is_whole(fold / FINAL)
    assert not is_whole(fold / "missing.pth")
    assert not is_whole(fold)


@pytest.mark.parametrize("share", CUTS)
def test_the_newest_whole_neighbour_is_found_by_its_epoch(fold, share):
    assert whole_neighbour(fold / FINAL) is None, "it is whole itself"
    cut(fold / FINAL, share)
    os.utime(fold / LATEST, (0, 0))  # copied files have any time
    assert whole_neighbour(fold / FINAL) == fold / LATEST
    cut(fold / LATEST, share)
    assert whole_neighbour(fold / LATEST) == fold / BEST
    assert newest_whole(fold) == (fold / BEST, 3)
    (fold / BEST).unlink()
    assert whole_neighbour(fold / FINAL) is None
    assert newest_whole(fold) is None


def test_archives_that_are_no_checkpoints_are_not_offered(fold):
    cut(fold / FINAL)
    torch.save({"something": "else"}, fold / LATEST)
    torch.save({"network_weights": {}}, fold / BEST)  # no epoch
    assert whole_neighbour(fold / FINAL) is None


def test_prediction_names_the_whole_checkpoint_beside(fold):
    assert _read(fold / FINAL)["current_epoch"] == 7
    cut(fold / FINAL)
    with pytest.raises(
        CheckpointError, match=r"checkpoint_latest\.pth beside it is whole: use it with -chk checkpoint_l"
    ):
        _read(fold / FINAL)


def test_too_little_memory_is_not_a_reason_to_take_another(fold, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    assert whole_neighbour(fold / FINAL) is None


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("variable", [{}, {checkpoint_files.FORBID: "1"}, {checkpoint_files.FORCE: "0"}])
def test_no_code_is_run_where_weights_only_are_read(tmp_path, monkeypatch, variable):
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    evil, touched = tmp_path / "evil.pth", tmp_path / "touched"
    torch.save({"network_weights": Evil(touched)}, evil)
    with weights_only(), pytest.raises(Exception, match="Weights only load failed"):
        torch.load(evil, weights_only=False)
    assert not touched.exists()
    assert {n: os.environ.get(n) for n in (checkpoint_files.FORCE, checkpoint_files.FORBID)} == {
        checkpoint_files.FORCE: variable.get(checkpoint_files.FORCE),
        checkpoint_files.FORBID: variable.get(checkpoint_files.FORBID),
    }


# --- trainers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(make):
    """A trainer with a checkpoint of epoch 3, 5 and 7 in its fold."""
    trainer = make(TinyTrainer)
    folder = Path(trainer.output_folder)
    for file in folder.glob("checkpoint_*"):
        file.unlink()
    for name, epoch in ((BEST, 3), (LATEST, 5), (FINAL, 7)):
        trainer.current_epoch = epoch - 1
        trainer.save_checkpoint(str(folder / name))
    return folder


def log_of(trainer):
    return Path(trainer.log_file).read_text()


@pytest.mark.parametrize("share", CUTS)
def test_a_training_goes_on_from_the_newest_whole_checkpoint(make, trained, share):
    cut(trained / FINAL, share)
    trainer = make(TinyTrainer, continue_training=True)
    trainer.load_checkpoint(str(trained / FINAL))
    assert trainer.current_epoch == 5
    assert "checkpoint_final.pth: cut off while it was written" in log_of(trainer)
    assert f"the training continues from {trained / LATEST}, the newest whole checkpoint" in log_of(trainer)


def test_whole_checkpoints_are_taken_as_they_are_named(make, trained):
    trainer = make(TinyTrainer, continue_training=True)
    trainer.load_checkpoint(str(trained / BEST))
    assert trainer.current_epoch == 3
    assert "cut off" not in log_of(trainer)


def test_a_validation_does_not_take_another_checkpoint_for_the_final_one(make, trained):
    cut(trained / FINAL)
    trainer = make(TinyTrainer)
    with pytest.raises(CheckpointError, match=r"checkpoint_latest\.pth beside it is whole: continue the .* with --c"):
        trainer.load_checkpoint(str(trained / FINAL))
    assert trainer.current_epoch == 0


def test_without_a_whole_one_the_error_says_what_to_do(make, trained):
    for file in trained.glob("checkpoint_*"):
        cut(file)
    trainer = make(TinyTrainer, continue_training=True)
    with pytest.raises(CheckpointError, match=r"checkpoint_latest\.pth: cut off .* no whole .* Train without --c"):
        trainer.load_checkpoint(str(trained / LATEST))


def test_an_interrupted_write_leaves_the_checkpoint_from_before(make, trained, monkeypatch):
    trainer = make(TinyTrainer)
    before = (trained / LATEST).read_bytes()

    class Killed(BaseException):
        pass

    def save(content, name):
        Path(name).write_bytes(before[:1000])
        raise Killed

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(Killed):
        trainer.save_checkpoint(str(trained / LATEST))
    assert (trained / LATEST).read_bytes() == before


def test_no_code_of_a_checkpoint_is_run_between_the_look_and_the_reading(make, trained, tmp_path, monkeypatch):
    """Somebody exchanges the file after it was found harmless."""
    from nnunetv2_diffusion.training import host

    trainer, touched = make(TinyTrainer), tmp_path / "touched"
    content = torch.load(trained / FINAL, weights_only=False)

    def exchange(*_):
        torch.save({**content, "evil": Evil(touched)}, trained / FINAL)

    monkeypatch.setattr(host.CommonTrainer, "_compare_settings", exchange)
    with pytest.raises(Exception, match="Weights only load failed"):
        trainer.load_checkpoint(str(trained / FINAL))
    assert not touched.exists()


@pytest.mark.parametrize("name", ["RecycleXT", "Baseline"])
def test_pretrained_weights_are_looked_at_before_nnunet_unpickles_them(make, tmp_path, name):
    """As ``nnUNetv2_train -pretrained_weights`` does it."""
    from nnunetv2.run import run_training

    trainer = make(recursive_find_trainer_class_by_name(f"nnUNetTrainer{name}"))
    file, touched = tmp_path / "from_the_internet.pth", tmp_path / "touched"
    content = {"network_weights": trainer.network.state_dict()}
    torch.save({**content, "evil": Evil(touched)}, file)
    with pytest.raises(CheckpointError, match=r"from_the_internet\.pth: .*not loaded"):
        run_training.maybe_load_checkpoint(trainer, False, False, str(file))
    assert not touched.exists()
    torch.save({key: {k: v + 1 for k, v in w.items()} for key, w in content.items()}, file)
    first = next(key for key in content["network_weights"] if key.endswith("weight"))
    before = trainer.network.state_dict()[first].clone()
    run_training.maybe_load_checkpoint(trainer, False, False, str(file))
    assert torch.equal(trainer.network.state_dict()[first], before + 1)
    other = make(recursive_find_trainer_class_by_name("nnUNetTrainerHiDiff"))
    assert not hasattr(run_training.load_pretrained_weights.__wrapped__, "__wrapped__"), "wrapped once"
    with pytest.raises(CheckpointError, match="does not fit nnUNetTrainerHiDiff"):
        run_training.maybe_load_checkpoint(other, False, False, str(file))
