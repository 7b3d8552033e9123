"""HiDiff through nnU-Net's own commands, unmodified."""

import json
import shutil

import numpy as np
import pytest
from tiny_project import tiny_plans

TRAINER = "nnUNetTrainerHiDiff"
SEQUENTIAL = ("-npp", "0", "-nps", "0")
REFINED = {"nnUNet_diffusion_steps": "2"}  # as in the plans; asked for, because so short a training does not pay


@pytest.fixture(scope="module")
def trained(project):
    """The segmentor alone in the first epoch, both in the second."""
    project.hidiff_log = project.train(TRAINER, "--npz")
    return project


@pytest.fixture(scope="module")
def masks(trained):
    return trained.predict("hidiff", TRAINER, "--save_probabilities", *SEQUENTIAL, **REFINED)


def test_the_log_says_where_the_segmentor_is_from_and_what_the_refiner_brings(trained):
    first = "segmentor: no checkpoint to start from; it is trained alone for the first 1 of 2 epochs"
    assert trained.hidiff_log.count("segmentor: ") == trained.hidiff_log.count(first) > 0
    assert trained.hidiff_log.count("Pseudo dice of the prior") == 1
    assert "refined in 2 steps" in trained.hidiff_log
    fold = trained.model(TRAINER) / "fold_0"
    assert {"checkpoint_final.pth", "checkpoint_best.pth", "progress.png"} <= {p.name for p in fold.iterdir()}


def test_checkpoint_holds_both_networks_and_both_optimisers_as_plain_data(trained):
    from nnunetv2_diffusion.checkpoints import load_checkpoint_file

    checkpoint = load_checkpoint_file(trained.model(TRAINER) / "fold_0" / "checkpoint_final.pth")
    parts = {key.split(".")[0] for key in checkpoint["network_weights"]}
    assert {"segmentor", "refiner"} <= parts
    kept = checkpoint["optimizer_state"]["hidiff"]
    assert kept["segmentor_optimizer"]["state"]
    assert checkpoint["optimizer_state"]["state"]
    assert kept["pretraining_epochs"] == 1
    assert len(kept["pseudo_dice"]["prior"]) == 2


def test_same_mask_in_another_order_and_in_parts(trained, masks):
    swapped = trained.root / "hidiff_swapped"
    swapped.mkdir()
    names = {"case_6": "b_last", "case_7": "a_first"}
    for file in (trained.raw / "imagesTs").iterdir():
        shutil.copyfile(file, swapped / file.name.replace(file.name[:6], names[file.name[:6]]))
    for part in ("0", "1"):
        found = trained.predict(
            "hidiff_parts", TRAINER, "-num_parts", "2", "-part_id", part, *SEQUENTIAL, images=swapped, **REFINED
        )
    assert len(found) == 2
    for name, mask in masks.items():
        assert np.array_equal(found[f"{names[name[:6]]}.nii.gz"], mask), name


def test_steps_0_gives_the_segmentors_own_mask_and_more_steps_another(trained, masks):
    prior = trained.predict("prior", TRAINER, "--save_probabilities", *SEQUENTIAL, nnUNet_diffusion_steps="0")
    p, refined = (np.load(next((trained.root / f).glob("*.npz")))["probabilities"] for f in ("prior", "hidiff"))
    np.testing.assert_allclose(p.sum(0), 1, atol=2e-2)
    np.testing.assert_allclose(refined.sum(0), 1, atol=2e-2)
    assert not np.array_equal(p, refined)
    assert prior.keys() == masks.keys()


def test_a_packed_checkpoint_gives_the_same_network_bit_for_bit(trained, tmp_path, capsys, monkeypatch):
    import torch

    from nnunetv2_diffusion.checkpoints import load_checkpoint_file
    from nnunetv2_diffusion.cli import main
    from nnunetv2_diffusion.packing import checkpoint_network

    source = trained.model(TRAINER) / "fold_0" / "checkpoint_final.pth"
    packed, back = tmp_path / "packed.pth", tmp_path / "checkpoint_final.pth"
    assert main(["pack", "-i", str(source), "-o", str(packed)]) == 0
    assert main(["unpack", "-i", str(packed), "-o", str(back)]) == 0
    assert main(["pack", "-i", str(source), "-o", str(packed)]) == 1
    assert "exists; it is not overwritten" in capsys.readouterr().err
    assert main(["unpack", "-i", str(source), "-o", str(tmp_path / "x")]) == 1
    assert packed.stat().st_size < source.stat().st_size
    image = torch.randn(1, 2, 16, 16, 16)
    found = []
    for steps in (None, "2"):
        if steps:
            monkeypatch.setenv("nnUNet_diffusion_steps", steps)
        networks = [checkpoint_network(load_checkpoint_file(file)) for file in (source, back)]
        assert networks[0].refiner_pays == networks[1].refiner_pays
        with torch.inference_mode():
            found.append([network(image) for network in networks])
        assert torch.equal(*found[-1])
    assert torch.equal(found[0][0], found[1][0]) == networks[0].refiner_pays


@pytest.mark.slow  # the same without the command: test_hidiff_trainer.py
def test_continuing_goes_on_where_it_ended(trained):
    plans = tiny_plans(trained, "hidiff_longer")
    trained.train(TRAINER, plans="hidiff_longer")
    plans["configurations"]["3d_fullres"]["diffusion"]["num_epochs"] = 3
    (trained.preprocessed / "hidiff_longer.json").write_text(json.dumps(plans))
    printed = trained.train(TRAINER, "--c", plans="hidiff_longer")
    assert "it is trained alone" not in printed
    from nnunetv2_diffusion.checkpoints import load_checkpoint_file

    file = trained.model(TRAINER, plans="hidiff_longer") / "fold_0" / "checkpoint_final.pth"
    checkpoint = load_checkpoint_file(file)
    assert checkpoint["current_epoch"] == 3
    assert len(checkpoint["optimizer_state"]["hidiff"]["pseudo_dice"]["refined"]) == 3


def test_2d_trains_and_predicts(project):
    project.train(TRAINER, configuration="2d", nnUNet_diffusion_steps="1")
    assert len(project.predict("hidiff_2d", TRAINER, *SEQUENTIAL, configuration="2d", nnUNet_diffusion_steps="1")) == 2


def test_regions_with_ignore_label(regions):
    regions.train(TRAINER, nnUNet_diffusion_steps="1")
    assert len(regions.predict("hidiff", TRAINER, "--save_probabilities", *SEQUENTIAL)) == 2
    p = np.load(next((regions.root / "hidiff").glob("*.npz")))["probabilities"]
    assert len(p) == 2
    assert not np.allclose(p.sum(0), 1, atol=1e-2)
