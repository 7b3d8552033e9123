"""Two processes on the CPU (gloo). nnU-Net itself starts distributed training on CUDA only."""

import json
import os

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed as dist


def _worker(rank, environment, plans_file, dataset_file, name, settings, out):
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as host  # noqa: N813  a module of a class's name
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    # the host's two assumptions of CUDA
    wrapper = host.DDP
    host.DDP = lambda network, device_ids: wrapper(network)
    base = recursive_find_trainer_class_by_name(name)

    class OnCpu(base):
        def initialize(self):
            self.device = torch.device("cpu")
            self.grad_scaler = None
            super().initialize()

    OnCpu.__name__ = name
    plans = json.loads(plans_file.read_text())
    plans["continue_training"] = False
    plans["configurations"]["3d_fullres"]["diffusion"].update(settings)
    trainer = OnCpu(plans, "3d_fullres", 0, json.loads(dataset_file.read_text()), torch.device("cpu"))
    torch.manual_seed(100)  # same initial weights; DDP would broadcast rank 0's anyway
    trainer.initialize()
    torch.manual_seed(rank)
    from tiny_project import batch_for

    trainer.on_train_epoch_start()
    for step in range(4):
        batch = batch_for(trainer, seed=10 * rank + step)
        if step == 2 and rank == 1:
            batch["data"] *= 3e37  # its gradients are not finite: both processes leave the step out
        trainer.train_step(batch)
    left_out = trainer.guard.end_epoch()
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        # different numbers of predictions on the ranks must not wait for each other
        for _ in range(1 + rank):
            trainer.validation_step(batch_for(trainer))
    weights = trainer.network.module.state_dict()
    history = trainer.time_sampler.state_dict() if hasattr(trainer, "time_sampler") else {}
    torch.save({"weights": weights, "history": history, "left_out": left_out}, out / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("nnUNetTrainerRecycleXT", {"time_sampling": "importance"}),
        ("nnUNetTrainerSelfCondXt", {"recipe": "paper"}),
        ("nnUNetTrainerRecycleScore", {"recipe": "nnunet"}),
        ("nnUNetTrainerHiDiff", {"hidiff": {"refiner_width": 4, "pretraining_epochs": 0, "learning_rate": 1e-2}}),
    ],
)
def test_two_processes_train_one_network(project, tmp_path, name, settings, unused_port):
    environment = {
        **{k: v for k, v in project.environment().items() if k.startswith("nnUNet_")},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(unused_port),
    }
    arguments = (environment, project.preprocessed / "tiny.json", project.preprocessed / "dataset.json")
    mp.spawn(_worker, args=(*arguments, name, settings, tmp_path), nprocs=2, join=True)
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key
        assert torch.isfinite(value).all(), key
    assert first["left_out"] == second["left_out"] == (2 if name == "nnUNetTrainerHiDiff" else 1)
    assert first["history"].keys() == second["history"].keys()
    for key, value in first["history"].items():
        assert torch.equal(value, second["history"][key]), key
    if first["history"]:
        # steps * batch over both processes, without the loss that is left out if it is not finite
        assert first["history"]["count"].sum() in (4 * 2 - 1, 4 * 2)
