"""The proposed trainer through nnU-Net's own commands, unmodified."""

import json
import shutil

import numpy as np
import pytest
import torch

from nnunetv2_diffusion.checkpoints import load_checkpoint_file

TRAINER = "nnUNetTrainerRecycleXT"


@pytest.fixture(scope="module")
def masks(recycled):
    """Masks and probabilities of the unseen cases by the plain command."""
    return recycled.predict("plain", TRAINER, "--save_probabilities")


def probabilities(project, folder):
    return {f.stem: np.load(f)["probabilities"] for f in sorted((project.root / folder).glob("*.npz"))}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert np.array_equal(found[name], expected[name]), name


def test_training_writes_what_nnunet_writes(recycled):
    fold = recycled.model(TRAINER) / "fold_0"
    written = {p.name for p in fold.iterdir()}
    assert {"checkpoint_final.pth", "checkpoint_best.pth", "progress.png", "debug.json", "validation"} <= written
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert 0 <= summary["foreground_mean"]["Dice"] <= 1
    assert list((fold / "validation").glob("*.npz")), "--npz"
    logs = [file.read_text() for file in fold.glob("training_log_*.txt")]  # trainers that only start write one too
    log = next(text for text in logs if "Epoch time" in text)
    assert log.count("Epoch time") == 2
    assert "nan" not in log.lower().replace("hiddenlayer", "")


def test_checkpoint_holds_only_tensors_and_plain_data(recycled):
    checkpoint = load_checkpoint_file(recycled.model(TRAINER) / "fold_0" / "checkpoint_final.pth")
    assert checkpoint["trainer_name"] == TRAINER
    assert all(isinstance(v, torch.Tensor) for v in checkpoint["network_weights"].values())


def test_stock_plans_are_not_touched(recycled):
    plans = json.loads((recycled.preprocessed / "nnUNetPlans.json").read_text())
    assert "diffusion" not in json.dumps(plans)


def test_masks_have_geometry_and_labels_of_the_data_set(recycled, masks):
    import nibabel as nib

    assert len(masks) == 2
    for name, mask in masks.items():
        truth = nib.load(recycled.raw / "labelsTs" / name)
        found = nib.load(recycled.root / "plain" / name)
        assert mask.shape == truth.shape
        np.testing.assert_allclose(found.affine, truth.affine)
        assert set(np.unique(mask)) <= {0, 1, 2}


def test_probabilities_are_probabilities(recycled, masks):
    for p in probabilities(recycled, "plain").values():
        np.testing.assert_allclose(p.sum(0), 1, atol=2e-2)  # nnU-Net adds up in half precision
        assert (p >= 0).all()


def test_same_mask_sequentially_and_in_another_order(recycled, masks):
    swapped = recycled.root / "swapped"
    swapped.mkdir()
    names = {"case_6": "b_last", "case_7": "a_first"}
    for file in (recycled.raw / "imagesTs").iterdir():
        case = file.name[:6]
        shutil.copyfile(file, swapped / file.name.replace(case, names[case]))
    found = recycled.predict("reordered", TRAINER, "-npp", "0", "-nps", "0", images=swapped)
    expected = {f"{names[name[:6]]}.nii.gz": mask for name, mask in masks.items()}
    assert_same(dict(sorted(found.items())), dict(sorted(expected.items())))


def test_same_mask_in_parts_and_from_the_model_folder(recycled, masks):
    for part in ("0", "1"):
        found = recycled.predict("parts", TRAINER, "-num_parts", "2", "-part_id", part, "-npp", "0", "-nps", "0")
    assert_same(found, masks)
    recycled.run(
        "nnUNetv2_predict_from_modelfolder", "-i", recycled.raw / "imagesTs", "-o", recycled.root / "folder",
        "-m", recycled.model(TRAINER), "-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1",
    )  # fmt: skip
    from tiny_project import read_masks

    assert_same(read_masks(recycled.root / "folder"), masks)


def test_environment_changes_the_sampling(recycled, masks):
    options = ("--save_probabilities", "-npp", "0", "-nps", "0")
    recycled.predict(
        "seed", TRAINER, *options, nnUNet_diffusion_seed="7", nnUNet_diffusion_samples="2",
        nnUNet_diffusion_sampler="ddim", nnUNet_diffusion_steps="3",
    )  # fmt: skip
    plain, other = probabilities(recycled, "plain"), probabilities(recycled, "seed")
    assert plain.keys() == other.keys()
    assert all(not np.array_equal(plain[k], other[k]) for k in plain)


def test_bad_environment_is_named_before_anything_is_predicted(recycled):
    printed = recycled.run(
        "nnUNetv2_predict_from_modelfolder", "-i", recycled.raw / "imagesTs", "-o", recycled.root / "never",
        "-m", recycled.model(TRAINER), "-f", "0", "-device", "cpu", fails=True, nnUNet_diffusion_steps="1002",
    )  # fmt: skip
    assert "nnUNet_diffusion_steps=1002" in printed
    assert "expected 1 .. 1001" in printed
    assert not list((recycled.root / "never").glob("*.nii.gz"))


def test_val_reproduces_the_validation(recycled):
    folder = recycled.model(TRAINER) / "fold_0" / "validation"
    before = json.loads((folder / "summary.json").read_text())["metric_per_case"]
    shutil.rmtree(folder)
    recycled.train(TRAINER, "--val", "--npz")
    assert json.loads((folder / "summary.json").read_text())["metric_per_case"] == before


def test_best_configuration_and_ensemble_with_a_host_trainer(recycled, masks):
    recycled.train("nnUNetTrainerBaseline", "--npz")
    recycled.run(
        "nnUNetv2_find_best_configuration", "901", "-p", "tiny", "-c", "3d_fullres", "-f", "0", "-np", "1",
        "-tr", TRAINER, "nnUNetTrainerBaseline",
    )  # fmt: skip
    information = recycled.root / "nnUNet_results" / recycled.name / "inference_information.json"
    assert "ensemble" in information.read_text().lower()
    recycled.predict("host", "nnUNetTrainerBaseline", "--save_probabilities", "-npp", "0", "-nps", "0")
    recycled.run("nnUNetv2_ensemble", "-i", recycled.root / "host", recycled.root / "plain", "-o",
                 recycled.root / "both", "-np", "1")  # fmt: skip
    assert len(list((recycled.root / "both").glob("*.nii.gz"))) == 2


def test_model_survives_export_and_install(recycled, masks, tmp_path):
    archive = tmp_path / "model.zip"
    recycled.run(
        "nnUNetv2_export_model_to_zip", "-d", "901", "-o", archive, "-c", "3d_fullres", "-tr", TRAINER,
        "-p", "tiny", "-f", "0",
    )  # fmt: skip
    elsewhere = tmp_path / "results"
    elsewhere.mkdir()
    recycled.run("nnUNetv2_install_pretrained_model_from_zip", archive, nnUNet_results=str(elsewhere))
    found = recycled.predict("installed", TRAINER, "-npp", "0", "-nps", "0", nnUNet_results=str(elsewhere))
    assert_same(found, masks)


def test_a_training_continues_beside_a_half_written_checkpoint(recycled, tmp_path):
    """As after kill -9 while the final checkpoint was written; the whole one beside it is taken."""
    results = tmp_path / "results"
    shutil.copytree(recycled.root / "nnUNet_results", results)
    fold = results / recycled.name / recycled.model(TRAINER).name / "fold_0"
    shutil.rmtree(fold / "validation")
    final = fold / "checkpoint_final.pth"
    content = final.read_bytes()
    final.write_bytes(content[: len(content) // 2])
    printed = recycled.train(TRAINER, "--val", fails=True, nnUNet_results=str(results))
    assert "checkpoint_best.pth beside it is whole: continue the training with --c" in printed
    printed = recycled.train(TRAINER, "--c", nnUNet_results=str(results))
    assert "checkpoint_final.pth: cut off while it was written" in printed
    assert f"the training continues from {fold / 'checkpoint_best.pth'}" in printed
    assert load_checkpoint_file(final)["current_epoch"] == 2
    assert (fold / "validation" / "summary.json").is_file()
    assert not list(fold.glob("*.part"))


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_pretrained_weights_is_not_run(recycled, tmp_path):
    file, touched = tmp_path / "evil.pth", tmp_path / "touched"
    torch.save({"network_weights": {}, "more": Evil(touched)}, file)
    printed = recycled.train(
        TRAINER, "-pretrained_weights", file, fold="1", fails=True, nnUNet_results=str(tmp_path / "results")
    )
    assert f"{file}: " in printed.splitlines()[-1]
    assert not touched.exists()
