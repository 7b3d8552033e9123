"""The page of masks on a GPU, from the JSON that ``scripts/gpu_day`` wrote."""

from pathlib import Path

from nnunetv2_diffusion.evaluation.tables import Table, number, to_markdown
from nnunetv2_diffusion.files import read_json

MASKS = ("trainer", "K", "precision on the GPU", "differing voxels", "of foreground", "largest change of a probability")
TRAINING = ("trainer", "mean loss of the first 10 steps", "of the last 10", "waits for the GPU in a step")


def page(file: Path) -> str:
    """Tables in Markdown, of ``masks.json`` of a day."""
    content = read_json(file)
    steps = content["results"][0]["training"]["steps"]
    masks, trainings = [], []
    for result in content["results"]:
        own, name = result["training"], result["trainer"]
        waits = number(own["synchronisations_per_step"], 1)
        trainings.append([name, f"{own['loss_first']:.2f}", f"{own['loss_last']:.2f}", waits])
        for k, precisions in result["masks"].items():
            for precision, found in precisions.items():
                worst = f"{found['largest_difference_of_a_probability']:.1e}"
                masks.append([name, k, precision, str(found["differing"]), str(found["foreground"]), worst])
    where = f"Masks of {content['hardware']['name']} against the CPU in float32, networks trained for {steps} steps"
    tables = Table(where, MASKS, masks, left=3), Table(f"The {steps} steps in mixed precision", TRAINING, trainings)
    return "\n".join(map(to_markdown, tables))
