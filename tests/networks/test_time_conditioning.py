"""Laws of the time embedding and of the modulated instance norm."""

import math

import pytest
import torch
from torch import nn

from nnunetv2_diffusion.networks.time_conditioning import (
    ModulatedInstanceNorm,
    TimeConditioning,
    sinusoidal_embedding,
)

NORMS = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
SPACE = {2: (5, 7), 3: (3, 4, 5)}
dims = pytest.mark.parametrize("dim", [2, 3])


def make_norm(dim: int, features: int = 4) -> nn.Module:
    """An instance norm with affine parameters that are not 1 and 0, in float64."""
    norm = NORMS[dim](features, eps=1e-5, affine=True).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    return norm


def naive_norm(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """Instance norm from its definition."""
    space = tuple(range(2, x.ndim))
    shape = (1, -1) + (1,) * len(space)
    mean = x.mean(space, keepdim=True)
    variance = ((x - mean) ** 2).mean(space, keepdim=True)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight.view(shape) + norm.bias.view(shape)


def test_embedding_is_cosines_then_sines_of_geometric_frequencies():
    t, dim = torch.tensor([0, 1, 17, 1000]), 12
    embedding = sinusoidal_embedding(t, dim)
    for row, time in zip(embedding.tolist(), t.tolist(), strict=True):
        for j in range(dim // 2):
            angle = time * 10000 ** (-j / (dim // 2))
            assert row[j] == pytest.approx(math.cos(angle), abs=2e-4)
            assert row[dim // 2 + j] == pytest.approx(math.sin(angle), abs=2e-4)


def test_embedding_tells_all_time_steps_apart():
    embedding = sinusoidal_embedding(torch.arange(1001), 16)
    distance = torch.cdist(embedding.double(), embedding.double()) + torch.eye(1001)
    assert distance.min() > 1e-2


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.float32, torch.float64])
def test_embedding_is_float32_for_any_type_of_time(dtype):
    t = torch.tensor([3, 999])
    embedding = sinusoidal_embedding(t.to(dtype), 16)
    assert embedding.dtype == torch.float32
    assert torch.equal(embedding, sinusoidal_embedding(t, 16))


@dims
def test_modulated_norm_is_the_naive_formula_for_each_sample(dim):
    norm = make_norm(dim)
    x = 3 * torch.randn(3, 4, *SPACE[dim], dtype=torch.float64) + 1
    modulation = torch.randn(3, 8, dtype=torch.float64)
    modulated = ModulatedInstanceNorm(norm)
    modulated.modulation = modulation
    shape = (3, 4) + (1,) * dim
    scale, shift = modulation[:, :4].view(shape), modulation[:, 4:].view(shape)
    torch.testing.assert_close(modulated(x), (1 + scale) * naive_norm(x, norm) + shift)


@dims
def test_modulated_norm_has_the_gradients_of_the_naive_formula(dim):
    norm = make_norm(dim)
    modulated = ModulatedInstanceNorm(norm)
    x = torch.randn(3, 4, *SPACE[dim], dtype=torch.float64, requires_grad=True)
    modulation = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    inputs = [x, modulation, norm.weight, norm.bias]

    modulated.modulation = modulation
    found = torch.autograd.grad((modulated(x) * upstream).sum(), inputs)
    shape = (3, 4) + (1,) * dim
    naive = (1 + modulation[:, :4].view(shape)) * naive_norm(x, norm) + modulation[:, 4:].view(shape)
    expected = torch.autograd.grad((naive * upstream).sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b)


@dims
def test_modulation_of_one_sample_leaves_the_others_alone(dim):
    modulated = ModulatedInstanceNorm(make_norm(dim))
    x = torch.randn(3, 4, *SPACE[dim], dtype=torch.float64)
    plain = modulated(x)
    modulation = torch.zeros(3, 8, dtype=torch.float64)
    modulation[1] = 0.5
    modulated.modulation = modulation
    changed = modulated(x)
    assert torch.equal(changed[[0, 2]], plain[[0, 2]])
    assert not torch.isclose(changed[1], plain[1]).any()


@dims
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_modulation_it_is_the_replaced_norm_bit_for_bit(dim, dtype):
    norm = make_norm(dim).to(dtype)
    modulated = ModulatedInstanceNorm(norm)
    x = torch.randn(3, 4, *SPACE[dim], dtype=dtype)
    assert torch.equal(modulated(x), norm(x))
    modulated.modulation = torch.zeros(3, 8, dtype=dtype)
    assert torch.equal(modulated(x), norm(x))


@dims
def test_it_takes_over_parameters_under_the_same_names(dim):
    norm = make_norm(dim)
    modulated = ModulatedInstanceNorm(norm)
    assert modulated.weight is norm.weight
    assert modulated.bias is norm.bias
    assert set(modulated.state_dict()) == set(norm.state_dict())


@dims
def test_an_offset_before_the_norm_is_cancelled_and_one_behind_it_is_not(dim):
    modulated = ModulatedInstanceNorm(make_norm(dim))
    x = torch.randn(3, 4, *SPACE[dim], dtype=torch.float64)
    offset = torch.randn(3, 4, dtype=torch.float64)
    before = modulated(x + offset.view(3, 4, *[1] * dim)) - modulated(x)
    assert before.abs().max() < 1e-12

    plain = modulated(x)
    modulated.modulation = torch.cat([torch.zeros_like(offset), offset], dim=1)
    torch.testing.assert_close(modulated(x) - plain, offset.view(3, 4, *[1] * dim).expand_as(x))


def make_conditioning(features: tuple[int, ...] = (4, 6), dim: int = 16) -> TimeConditioning:
    return TimeConditioning([ModulatedInstanceNorm(make_norm(2, n)) for n in features], dim)


def test_conditioning_starts_at_zero_for_every_time_step():
    for modulation in make_conditioning()(torch.arange(1001)):
        assert torch.equal(modulation, torch.zeros_like(modulation))


def test_conditioning_gives_each_norm_its_scale_and_shift():
    assert [tuple(m.shape) for m in make_conditioning()(torch.tensor([1, 2, 3]))] == [(3, 8), (3, 12)]


def test_conditioning_of_a_sample_depends_on_its_own_time_alone(wake):
    conditioning = wake(make_conditioning())
    together = conditioning(torch.tensor([5, 900, 5]))
    for modulation in together:
        assert torch.equal(modulation[0], modulation[2])
        assert (modulation[0] - modulation[1]).abs().max() > 1e-2
    for alone, modulation in zip(conditioning(torch.tensor([900])), together, strict=True):
        torch.testing.assert_close(alone[0], modulation[1])


def test_conditioning_is_computed_in_float32_under_autocast(wake):
    conditioning = wake(make_conditioning())
    t = torch.tensor([0, 257, 999, 1000])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conditioning.mlp[0](torch.ones(1, 16)).dtype == torch.bfloat16  # autocast is on here
        halved = conditioning(t)
    for a, b in zip(halved, conditioning(t), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
