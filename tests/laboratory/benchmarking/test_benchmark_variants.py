"""Variants of a training step: each changes what it says, and nothing else."""

import pytest
import torch
from torch import nn

from laboratory.benchmarking import host, variants
from laboratory.benchmarking.commands import DIFFERENT_INPUTS, Turns
from laboratory.benchmarking.options import REFERENCE
from laboratory.benchmarking.problem import synthetic_problem
from laboratory.benchmarking.timing import Stopwatch
from nnunetv2_diffusion.networks.time_conditioning import ModulatedInstanceNorm

CPU = torch.device("cpu")
PROBLEM = variants._planned(synthetic_problem(3, (16, 16, 16), 2, 8, 3, 3, False))


@pytest.fixture(scope="module")
def folders():
    with host.temporary_folders():
        yield


def step(change=None) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of one step, on the same batch with the same noise."""
    trainer = host.create_trainer(variants.TRAINER, PROBLEM, CPU)
    batch = host.make_batches(trainer, DIFFERENT_INPUTS)[0]
    if change is not None:
        change(trainer)
    torch.manual_seed(3)
    loss = trainer.train_step(batch)["loss"]
    return float(loss), [p.grad for p in trainer.network.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "change",
    [
        variants.all_heads_in_first_pass,
        variants.inference_mode_in_first_pass,
        variants.keep_graph_of_first_pass,
        variants.channels_last,
        variants.channels_last_with_own_norm,
    ],
    ids=lambda change: change.__name__,
)
def test_a_change_of_the_computation_leaves_loss_and_gradients(folders, change):
    loss, gradients = step()
    changed_loss, changed = step(change)
    assert changed_loss == pytest.approx(loss, rel=1e-4)
    assert len(changed) == len(gradients)
    for a, b in zip(gradients, changed, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-2, atol=2e-4)


def test_the_coarse_heads_are_computed_twice(folders):
    counts = []
    for change in (None, variants.all_heads_in_first_pass):
        trainer = host.create_trainer(variants.TRAINER, PROBLEM, CPU)
        if change is not None:
            change(trainer)
        calls = []
        trainer.inner_network.decoder.seg_layers[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train_step(host.make_batches(trainer, 1)[0])
        counts.append(len(calls))
    assert counts == [1, 2]


@pytest.mark.parametrize("modulated", [False, True])
def test_the_own_norm_is_the_instance_norm_and_keeps_the_order_of_the_data(modulated):
    norm = ModulatedInstanceNorm(nn.InstanceNorm3d(6, affine=True))
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    if modulated:
        norm.modulation = torch.randn(2, 12)
    x = torch.randn(2, 6, 5, 4, 3).to(memory_format=torch.channels_last_3d)
    out = variants._LayoutPreservingNorm(norm)(x)
    torch.testing.assert_close(out, norm(x), rtol=1e-5, atol=1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    assert not norm(x).is_contiguous(memory_format=torch.channels_last_3d)  # what the own one is for


def test_results_have_all_variants_and_ratios_to_both(folders):
    turns = Turns(CPU, Stopwatch(CPU), rounds=1, warmup=0)
    results = variants.variant_steps(PROBLEM, turns)
    assert [r["variant"] for r in results] == [REFERENCE, variants.DEFAULT, *(v.name for v in variants.VARIANTS)]
    by_name = {r["variant"]: r for r in results}
    assert by_name[REFERENCE]["ratio"]["median"] == by_name[variants.DEFAULT]["ratio_to_default"]["median"] == 1
    seconds = {name: r["seconds"]["median"] for name, r in by_name.items()}
    for name, result in by_name.items():
        assert result["ratio_to_default"]["median"] == pytest.approx(seconds[name] / seconds[variants.DEFAULT])
    kept = by_name["graph of the first pass kept"]["peak_memory_bytes"]
    assert kept > 1.3 * by_name[variants.DEFAULT]["peak_memory_bytes"]
    columns, rows = variants.variant_rows(results)
    assert len(rows) == len(results)
    assert {len(row) for row in rows} == {len(columns)}
