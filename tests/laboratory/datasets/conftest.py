"""nnU-Net's folders and the converter as its command."""

import os

import pytest

from laboratory.datasets import convert


@pytest.fixture(autouse=True)
def host(tmp_path, monkeypatch):
    """Folders of nnU-Net, empty."""
    for variable in list(os.environ):
        if variable.lower().startswith("nnunet"):
            monkeypatch.delenv(variable)
    folder = tmp_path / "host"
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (folder / name).mkdir(parents=True)
        monkeypatch.setenv(name, str(folder / name))
    return folder


@pytest.fixture
def run(capsys):
    """Run the converter: name, paths, options -> exit status and what it said."""

    def command(name, *paths, options=("--id", "510")):
        status = convert.main([name, "--from", *map(str, paths), *options])
        captured = capsys.readouterr()
        return status, captured.out if status == 0 else captured.err

    return command


@pytest.fixture
def converted(run, host):
    """Convert, and give the one folder that is there then."""

    def command(name, *paths, options=()):
        status, said = run(name, *paths, options=("--id", "510", *options))
        assert status == 0, said
        (folder,) = (host / "nnUNet_raw").iterdir()
        return folder

    return command
