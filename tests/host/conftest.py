"""A tiny data set, planned and trained once for all tests of the host."""

import json
import os
import socket

import pytest
import torch
from tiny_project import Project, tiny_plans, write_dataset


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Project:
    """Two channels, two classes, 2d and 3d_fullres planned and preprocessed by the stock command."""
    made = Project(tmp_path_factory.mktemp("tiny"), "Dataset901_Tiny")
    write_dataset(made.raw, cases=6)
    made.run(
        "nnUNetv2_plan_and_preprocess",
        "-d",
        "901",
        "-c",
        "2d",
        "3d_fullres",
        "-np",
        "1",
        "-npfp",
        "1",
        nnUNet_n_proc_DA="1",
    )
    tiny_plans(made)
    return made


@pytest.fixture(scope="session")
def recycled(project) -> Project:
    """The project after ``nnUNetv2_train -tr nnUNetTrainerRecycleXT --npz``."""
    project.log = project.train("nnUNetTrainerRecycleXT", "--npz")
    return project


@pytest.fixture(scope="session")
def regions(tmp_path_factory):
    """Overlapping regions with an ignore label in half of the training cases."""
    made = Project(tmp_path_factory.mktemp("regions"), "Dataset902_Regions")
    dataset = {
        "labels": {"background": 0, "whole": [1, 2], "inner": 2, "ignore": 3},
        "regions_class_order": [1, 2],
    }

    def edit(labels, index):
        if index < 6 and index % 2:
            labels[:, :6] = 3
        return labels

    write_dataset(made.raw, 6, channels=1, dataset=dataset, edit=edit)
    made.run(
        "nnUNetv2_plan_and_preprocess", "-d", "902", "-c", "3d_fullres", "-np", "1", "-npfp", "1", nnUNet_n_proc_DA="1"
    )
    tiny_plans(made)
    return made


@pytest.fixture
def make_trainer(project, monkeypatch):
    """Build and initialize a trainer as nnUNetv2_train does."""
    for variable, value in project.environment().items():
        if variable.startswith("nnUNet_"):
            monkeypatch.setitem(os.environ, variable, value)

    def make(name="RecycleXT", configuration="3d_fullres", plans="tiny", edit=None, initialize=True, **settings):
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

        content = json.loads((project.preprocessed / f"{plans}.json").read_text())
        content["continue_training"] = False
        content["configurations"][configuration]["diffusion"].update(settings)
        if edit is not None:
            edit(content["configurations"][configuration])
        dataset = json.loads((project.preprocessed / "dataset.json").read_text())
        cls = recursive_find_trainer_class_by_name(f"nnUNetTrainer{name}")
        trainer = cls(content, configuration, 0, dataset, torch.device("cpu"))
        if initialize:
            trainer.initialize()
        return trainer

    return make


@pytest.fixture
def unused_port() -> int:
    """A free TCP port on this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
