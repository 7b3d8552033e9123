"""The page of masks on a GPU, from the JSON that ``scripts/gpu_day`` wrote."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

MASKS = ("trainer", "K", "precision on the GPU", "differing voxels", "of foreground", "largest change of a probability")
TRAINING = ("trainer", "mean loss of the first 10 steps", "of the last 10", "waits for the GPU in a step")


def mask_rows(results: list[dict[str, Any]]) -> list[list[Any]]:
    """A row for each trainer, number of steps and precision."""
    rows = []
    for result in results:
        for steps, precisions in result["masks"].items():
            for precision, found in precisions.items():
                worst = f"{found['largest_difference_of_a_probability']:.1e}"
                rows.append([result["trainer"], steps, precision, found["differing"], found["foreground"], worst])
    return rows


def training_rows(results: list[dict[str, Any]]) -> list[list[Any]]:
    """A row for each trainer."""
    return [
        [r["trainer"], f"{r['training']['loss_first']:.2f}", f"{r['training']['loss_last']:.2f}",
         r["training"]["synchronisations_per_step"]]
        for r in results
    ]  # fmt: skip


def page(file: Path) -> str:
    """Tables in Markdown.

    Args:
        file: ``masks.json`` of a day.
    """
    content = json.loads(file.read_text())
    steps = content["results"][0]["training"]["steps"]
    return "\n".join(
        [
            f"Masks of {content['hardware']['name']} against the CPU in float32, networks trained for {steps} steps.",
            "",
            _table(MASKS, mask_rows(content["results"])),
            "",
            f"The {steps} steps of training, in mixed precision:",
            "",
            _table(TRAINING, training_rows(content["results"])),
            "",
        ]
    )


def _table(columns: Sequence[str], rows: list[list[Any]]) -> str:
    return pd.DataFrame(rows, columns=list(columns)).to_markdown(index=False, disable_numparse=True)
