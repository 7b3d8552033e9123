"""From a stock training to a warm-started one, through the real commands alone."""

import pytest
import torch
from tiny_project import tiny_plans

from nnunetv2_diffusion.checkpoints import checkpoint_network, load_checkpoint_file

STILL = '''
from nnunetv2_diffusion.training import DiffusionTrainer, RecycleXT


class nnUNetTrainerStill(DiffusionTrainer):
    """Recycling that computes its steps and takes none: what is trained is what was loaded."""

    strategy = RecycleXT()

    def _update(self, *_):
        pass
'''
NO_STEP = {"learning_rate": 0.0, "segmentor_learning_rate": 0.0}  # pretraining has a rate of its own


def checkpoint(project, trainer):
    return project.model(trainer, plans="warm") / "fold_0" / "checkpoint_final.pth"


def logits_of(trained, name, image, *given):
    """What the network of a checkpoint makes of an image; ``name`` is a trainer that is installed."""
    network = checkpoint_network({**trained, "trainer_name": name})
    with torch.inference_mode():
        return network(image, *given)


@pytest.mark.slow  # four trainings; tests/planning/test_warm_start.py loads such files as nnU-Net does
def test_stock_training_starts_with_the_logits_of_the_source(project, tmp_path):
    (tmp_path / "nnUNetTrainerStill.py").write_text(STILL)
    found_there = {"nnUNet_extTrainer": str(tmp_path)}
    tiny_plans(project, "warm", num_epochs=1, hidiff={"refiner_width": 4, "pretraining_epochs": 1, **NO_STEP})
    project.train("nnUNetTrainerBaseline", plans="warm")
    source = checkpoint(project, "nnUNetTrainerBaseline")
    files = {trainer: project.root / f"{trainer}.pth" for trainer in ("nnUNetTrainerStill", "nnUNetTrainerHiDiff")}
    logs = {}
    for trainer, file in files.items():
        project.run(
            "nnunetv2_diffusion", "warm-start", "--from", source, "-o", file, "-d", project.number, "-c", "3d_fullres",
            "-p", "warm", "-tr", trainer, **found_there,
        )  # fmt: skip
        logs[trainer] = project.train(trainer, "-pretrained_weights", str(file), plans="warm", **found_there)
        assert "Loading pretrained weights from file" in logs[trainer]
        assert "segmentation heads taken from the warm-start file" in logs[trainer]
        assert logs[trainer].count("Epoch time") == 1

    stock = load_checkpoint_file(source)
    image = torch.randn(2, 2, *stock["init_args"]["plans"]["configurations"]["3d_fullres"]["patch_size"])
    expected = logits_of(stock, "nnUNetTrainerBaseline", image)
    trained = load_checkpoint_file(checkpoint(project, "nnUNetTrainerStill"))
    for t in (0, 1000):
        noisy = 2 * torch.randn_like(expected)
        found = logits_of(trained, "nnUNetTrainerRecycleXT", image, noisy, torch.tensor([t, t]))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found = logits_of(trained, "nnUNetTrainerRecycleXT", image)
    torch.testing.assert_close(found.softmax(1), expected.softmax(1), rtol=1e-3, atol=1e-5)

    log = logs["nnUNetTrainerHiDiff"]
    assert "segmentor: from the warm-start file, heads included; it is not trained alone first" in log
    assert "no checkpoint to start from" not in log
    trained = load_checkpoint_file(checkpoint(project, "nnUNetTrainerHiDiff"))["network_weights"]
    assert all(torch.equal(trained[f"segmentor.{key}"], w) for key, w in stock["network_weights"].items())
