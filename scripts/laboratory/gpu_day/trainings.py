"""The study that fills the rest of the day: with and without diffusion, by nnU-Net's recipe and by the paper's."""

from pathlib import Path

from nnunetv2_diffusion.files import read_json, write_json

OVERHEAD = 240  # seconds for preprocessing, compiling, predicting and scoring
STUDY = Path(__file__).resolve().parents[3] / "studies" / "gpu_day.json"


def affordable_epochs(out: Path, seconds: float) -> int:
    """Epochs that all trainings side by side reach in so many seconds, if nothing overlaps.

    Steps are those of ``train_step_compiled.json`` in the folder; ValueError if they were not timed.
    """
    study, results = read_json(STUDY), read_json(out / "train_step_compiled.json")["results"]
    step = {result["trainer"]: result["seconds"]["median"] for result in results}
    steps = sum(step.get(cell["trainer"], step["nnUNetTrainer"]) for cell in study["cells"])
    return max(1, int((seconds - OVERHEAD) / (steps * study["settings"]["num_iterations_per_epoch"] * 1.1)))


def write_study(out: Path, device: str, epochs: int | None, seconds: float, tiny: bool) -> Path:
    """The study's file in a folder; one that is there stays, so that trainings go on.

    ``epochs`` None is for what ``seconds`` allow; ``tiny`` for a few steps of a small network.
    """
    file, study = out / "gpu_day_study.json", read_json(STUDY)
    if file.exists():
        return file
    (out / study["split"]).write_text((STUDY.parent / study["split"]).read_text())
    study["device"] = device
    if tiny:
        study["network"] = {"base_features": 4, "n_stages": 3, "patch_size": [16, 16, 16], "batch_size": 2}
        study["settings"] |= {"num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}
    study["settings"]["num_epochs"] = epochs or (1 if tiny else affordable_epochs(out, seconds))
    length = "{num_epochs} epochs of {num_iterations_per_epoch} steps".format(**study["settings"])
    write_json(file, study | {"summary": f"nnU-Net's own planned network, {length}."})
    return file
