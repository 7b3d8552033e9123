"""What the planners plan for fixed images, of which only the fingerprint is there."""

import contextlib
import io
import json
import warnings

import nibabel as nib
import numpy as np
from fence_runs import find_planner, host_folder

DATASET = "Dataset903_Planned"
SHAPE, SPACING = [32, 48, 40], [1.5, 1.0, 1.0]
MIN_EDGE = 8  # of the coarsest map, nnU-Net has 4: networks of fewer stages take less time to rehearse
# GB, so little that memory decides: for batches, and for HiDiff's patches
MEMORY = {
    "nnUNetPlannerDiffusion": 0.5,
    "nnUNetPlannerDiffusionResEncM": 0.5,
    "nnUNetPlannerDiffusionResEncL": 0.6,
    "nnUNetPlannerDiffusionResEncXL": 0.7,
    "nnUNetPlannerHiDiff": 0.65,
    "nnUNetPlannerHiDiffResEncM": 0.5,
    "nnUNetPlannerHiDiffResEncL": 0.6,
    "nnUNetPlannerHiDiffResEncXL": 0.7,
}
PLANNERS = list(MEMORY)


def _write_dataset() -> None:
    """Two empty images, which nnU-Net reads nothing of but how they are stored, and the fingerprint."""
    raw = host_folder("raw") / DATASET
    folder = host_folder("preprocessed") / DATASET
    if folder.exists():
        return
    for part, ending, kind in (("imagesTr", "_0000.nii.gz", np.float32), ("labelsTr", ".nii.gz", np.uint8)):
        (raw / part).mkdir(parents=True)
        for name in "ab":
            nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), kind), np.eye(4)), raw / part / f"{name}{ending}")
    dataset = {"channel_names": {"0": "CT", "1": "MR"}, "labels": {"background": 0, "a": 1, "b": 2}}
    dataset |= {"numTraining": 2, "file_ending": ".nii.gz"}
    intensities = {"mean": 0.5, "std": 0.3, "min": 0, "max": 1, "median": 0.5}
    intensities |= {"percentile_00_5": 0.01, "percentile_99_5": 0.99}
    fingerprint = {
        "spacings": [SPACING] * 2,
        "shapes_after_crop": [SHAPE] * 2,
        "foreground_intensity_properties_per_channel": {"0": intensities, "1": intensities},
        "median_relative_size_after_cropping": 1.0,
    }
    folder.mkdir(parents=True)
    (raw / "dataset.json").write_text(json.dumps(dataset))
    (folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))


def planned(name: str) -> dict:
    """The numbers of plans that count, and the section of settings as it is written."""
    _write_dataset()
    cls = find_planner(name)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nnU-Net warns of another memory target than its own
        planner = cls(903, gpu_memory_target_in_gb=MEMORY[name])
        planner.UNet_featuremap_min_edge_length = MIN_EDGE
        plans = planner.plan_experiment()
    configurations = {
        key: {
            "patch_size": [int(n) for n in c["patch_size"]],
            "batch_size": int(c["batch_size"]),
            "network": c["architecture"]["network_class_name"].rsplit(".", 1)[-1],
            "features": [int(n) for n in c["architecture"]["arch_kwargs"]["features_per_stage"]],
            "data": c["data_identifier"],
            "diffusion": c["diffusion"],
        }
        for key, c in plans["configurations"].items()
        if "patch_size" in c
    }
    return {"plans_name": plans["plans_name"], "memory": MEMORY[name], "configurations": configurations}
