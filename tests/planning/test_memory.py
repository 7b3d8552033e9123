"""The estimate of memory is what autograd saves, to the byte, and what a step allocates, to some percent."""

import gc

import pytest
import torch

from laboratory.benchmarking import host
from laboratory.benchmarking.memory import main, measure_memory
from laboratory.benchmarking.options import SUBJECTS
from laboratory.benchmarking.problem import synthetic_problem, with_settings
from nnunetv2_diffusion.planning.memory import SavedBytes, estimate_memory
from nnunetv2_diffusion.settings import SettingsError

SCALAR = 4  # the step asks whether the loss is finite, which saves it
NARROW = {"hidiff": {"refiner_width": 4}}


@pytest.fixture(scope="module", autouse=True)
def _folders():
    with host.temporary_folders():
        yield


def problem(dim=2, classes=3, resenc=False, edge=16, batch=4, settings=None, labels=None):
    made = synthetic_problem(dim, (edge,) * dim, batch, 8, classes, 3, resenc)
    if labels is not None:
        made.dataset_json.update(labels)
    return with_settings(made, {**NARROW, **(settings or {})})


def estimate(family, given, device="cuda"):
    return estimate_memory(family, given.plans["configurations"][given.configuration], given.dataset_json, 1, device)


def measured_saved(trainer_name, given):
    """Bytes that a real training step saves, and its batch."""
    trainer = host.create_trainer(trainer_name, given, torch.device("cpu"))
    batch = host.make_batches(trainer, 1)[0]
    with SavedBytes(trainer.network.parameters()) as saved:
        trainer.train_step(batch)
    return saved.peak


GRID = [
    *((subject, {"classes": classes}) for subject in SUBJECTS for classes in (3, 104)),
    *((subject, {"dim": 3, "classes": 2}) for subject in ("stock", "hidiff")),
    ("recycling", {"dim": 3, "classes": 16, "resenc": True}),
    ("recycling", {"settings": {"recipe": "nnunet"}}),
    ("recycling", {"settings": {"transformer_layers": 0, "time_conditioning": False}}),
]


@pytest.mark.parametrize(("subject", "shape"), GRID, ids=[f"{s}-{i}" for i, (s, _) in enumerate(GRID)])
def test_estimate_is_what_a_real_step_saves_for_its_backward_pass(subject, shape):
    trainer, family, own = SUBJECTS[subject]
    given = problem(**{**shape, "settings": {**own, **shape.get("settings", {})}})
    assert abs(estimate(family, given, "cpu").saved_for_backward(4) - measured_saved(trainer, given)) <= SCALAR


REGIONS = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
IGNORE = {"labels": {"background": 0, "object": 1, "ignore": 2}}


@pytest.mark.parametrize(
    ("subject", "labels"),
    [("stock", IGNORE), ("recycling", REGIONS), ("recycling", IGNORE), ("hidiff", REGIONS)],
    ids=["stock-ignore", "recycling-regions", "recycling-ignore", "hidiff-regions"],
)
def test_estimate_knows_regions_and_ignored_voxels(subject, labels):
    trainer, family, _ = SUBJECTS[subject]
    given = problem(labels=labels)
    assert abs(estimate(family, given, "cpu").saved_for_backward(4) - measured_saved(trainer, given)) <= SCALAR


@pytest.mark.parametrize(
    ("subject", "classes", "low", "high"),
    [("stock", 3, 0.95, 1.1), ("recycling", 3, 0.95, 1.1), ("recycling", 104, 0.95, 1.1), ("hidiff", 3, 0.95, 1.25)],
)
def test_estimate_is_what_a_real_step_allocates(subject, classes, low, high):
    trainer, family, own = SUBJECTS[subject]
    result = measure_memory(problem(classes=classes, edge=64, settings=own), trainer, family, "cpu")
    assert low < result["ratio"] < high


def test_half_precision_saves_less_than_full_but_not_in_the_loss():
    few, many = problem(edge=64), problem(classes=104, edge=64)
    full, half = estimate("recycling", few, "cpu"), estimate("recycling", few)
    assert half.weights == full.weights
    assert full.saved / 2 < half.saved < full.saved
    grown = estimate("recycling", many).saved - half.saved
    assert grown > 2 * 4 * (104 - 3) * 64**2  # probabilities and their logarithms, float32


def test_attention_on_a_gpu_makes_no_matrix_of_weights():
    heads, tokens = 8, (64 // 4) ** 2
    assert estimate("recycling", problem(edge=64)).temporaries < 2 * 4 * heads * tokens**2


def test_mask_channels_are_counted():
    one_hot, bits = (
        estimate("recycling", problem(classes=104, edge=64, settings={"mask_encoding": name})).saved
        for name in ("one-hot", "analog-bits")
    )
    assert one_hot - bits == 2 * (104 - 7) * 64**2  # the first convolution's input, in half precision


@pytest.mark.parametrize(
    ("family", "recipe", "states"),
    [("stock", "paper", 1), ("recycling", "paper", 2), ("recycling", "nnunet", 1), ("hidiff", "paper", 2)],
)
def test_optimizer_state_is_that_of_the_recipe(family, recipe, states):
    found = estimate(family, problem(settings={"recipe": recipe}))
    assert found.optimizer == states * found.gradients
    assert found.gradients <= found.weights  # heads that are not trained have none


def test_memory_grows_with_the_patch_and_the_batch_alone():
    small, large = (estimate("recycling", problem(edge=edge, settings={"transformer_layers": 0})) for edge in (32, 64))
    assert small.fixed == large.fixed
    assert large.saved == pytest.approx(4 * small.saved, rel=0.02)
    assert large.allocated(8) - large.allocated(7) == large.per_sample


def test_update_of_the_weights_counts_where_it_needs_most():
    found = estimate("recycling", problem(dim=2, edge=16))
    assert found.allocated(0) == 2 * found.weights + found.gradients + found.optimizer


def test_estimate_leaves_random_numbers_alone():
    before = torch.get_rng_state()
    estimate("hidiff", problem(classes=5))
    assert torch.equal(torch.get_rng_state(), before)


def test_estimate_refuses_settings_that_cannot_be_used():
    with pytest.raises(SettingsError, match="recipe"):
        estimate("recycling", problem(settings={"recipe": "papper"}))


def test_saved_bytes_count_a_storage_once_and_parameters_never():
    weight, x = torch.ones(10, requires_grad=True), torch.ones(10)
    with SavedBytes([weight]) as saved:
        y = weight * x  # saves x
        z = (y * y[:]).sum()  # saves y twice
    assert saved.peak == saved.now == 80
    z.backward()
    assert weight.grad.tolist() == [2.0] * 10
    assert (saved.peak, saved.now) == (80, 0)


def test_saved_bytes_go_with_their_graph():
    weight = torch.ones(10, requires_grad=True)
    with SavedBytes([weight]) as saved:
        for _ in range(3):
            result = weight.exp().exp()
    del result
    gc.collect()
    assert (saved.peak, saved.now) == (160, 0)  # the last graph was made before the one before it went


def test_table_shows_estimate_measurement_and_ratio(tmp_path, capsys):
    file = tmp_path / "table.json"
    options = ["--dims", "2", "--networks", "plain", "--classes", "3", "--subjects", "recycling", "--patch-2d", "16"]
    assert main([*options, "--device", "cpu", "--json", str(file)]) == 0
    assert "2d plain" in capsys.readouterr().out
    assert file.read_text().count('"saved_measured"') == 1
    with pytest.raises(SystemExit):
        main([*options, "--device", "cpu", "--json", str(file)])
