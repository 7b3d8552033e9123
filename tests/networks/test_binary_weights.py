"""1-bit storage gives the same network back, bit for bit."""

import pickle

import pytest
import torch
from torch import nn

from laboratory.benchmarking.refiner import count_cost, refiner_inputs
from nnunetv2_diffusion.networks.binary import BinaryConv
from nnunetv2_diffusion.networks.binary_weights import load_packed, pack, save_packed, unpack
from nnunetv2_diffusion.networks.refiner import Refiner


@pytest.fixture
def make_refiner(wake):
    def make(dims: int = 2, norm: str = "batch", **settings) -> Refiner:
        kernels, strides = [[3] * dims] * 2, [[1] * dims, [2] * dims]
        return wake(Refiner(1, 2, kernels, strides, {0: 8, 1: 12}, **{"width": 8, **settings}, norm=norm))

    return make


def outputs(refiner: Refiner) -> torch.Tensor:
    """Logits of the same random inputs, with batch statistics where there are any."""
    generator = torch.Generator().manual_seed(3)
    dims = len(refiner.strides[0])
    image, mask, _, t, features = refiner_inputs(refiner, (8,) * dims, "cpu")
    image, mask, prior = (torch.randn(x.shape, generator=generator) for x in (image, mask, mask))
    features = {stage: torch.randn(x.shape, generator=generator) for stage, x in features.items()}
    with torch.no_grad():
        return refiner(image, mask, prior, t + 3, features)


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("dims", [2, 3])
def test_outputs_are_the_same_bit_for_bit_after_a_file(make_refiner, tmp_path, dims, norm):
    refiner = make_refiner(dims, norm)
    outputs(refiner)  # moves running statistics, if there are any
    save_packed(refiner, tmp_path / "refiner.pth")
    other = make_refiner(dims, norm)
    assert not torch.equal(outputs(other.eval()), outputs(refiner.eval()))
    load_packed(other, tmp_path / "refiner.pth")
    assert torch.equal(outputs(other), outputs(refiner))
    assert torch.equal(outputs(other.train()), outputs(refiner.train()))


def test_packing_twice_gives_the_same_bits(make_refiner):
    refiner = make_refiner()
    once = pack(refiner)
    refiner.load_state_dict(unpack(once))
    twice = pack(refiner)
    assert once["binary"].keys() == twice["binary"].keys()
    for name, parts in once["binary"].items():
        assert torch.equal(parts["signs"], twice["binary"][name]["signs"])
        assert torch.equal(parts["scale"], twice["binary"][name]["scale"])


def test_binary_weights_take_one_bit_each(tmp_path):
    layer = nn.Sequential(BinaryConv(256, 256, (3, 3), (1, 1)))
    save_packed(layer, tmp_path / "layer.pth")
    size = (tmp_path / "layer.pth").stat().st_size
    count = 256 * 256 * 9
    expected = count_cost(layer, torch.zeros(1, 256, 3, 3)).packed_bytes
    assert expected == count // 8 + 4 * 256
    assert expected <= size < 1.05 * expected
    assert 4 * count / size > 29


@pytest.mark.parametrize("channels", [1, 3, 8, 9])
def test_numbers_of_weights_that_no_byte_divides_come_back(channels):
    layer = BinaryConv(channels, 3, (1, 3), (1, 1))
    state = unpack(pack(layer))
    assert state["weight"].shape == layer.weight.shape
    assert torch.equal(state["weight"] > 0, layer.weight > 0)
    torch.testing.assert_close(state["weight"][:, 0, 0, 0].abs(), layer.weight.detach().abs().mean((1, 2, 3)))


def test_real_valued_state_is_kept_as_it_is(make_refiner):
    refiner = make_refiner()
    packed = pack(refiner)
    state = refiner.state_dict()
    assert packed["real"].keys() | packed["binary"].keys() == state.keys()
    assert not packed["real"].keys() & packed["binary"].keys()
    assert all(torch.equal(value, state[name]) for name, value in packed["real"].items())
    kept = packed["real"]["stem.weight"].clone()
    nn.init.zeros_(refiner.stem.weight)
    assert torch.equal(packed["real"]["stem.weight"], kept)


def test_existing_file_is_not_overwritten(make_refiner, tmp_path):
    path = tmp_path / "refiner.pth"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        save_packed(make_refiner(), path)
    assert path.read_text() == "mine"


def test_network_without_binary_layers_is_refused(make_refiner, tmp_path):
    with pytest.raises(ValueError, match="Refiner has no binary layer"):
        save_packed(make_refiner(binarized=False), tmp_path / "refiner.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 16}, r"refiner.pth: .* has shape \(.*\); expected \(.*\)"),
        ({"norm": "instance"}, r"refiner.pth: .* has shape \(.*\); expected None"),
        ({"binarized": False}, r"refiner.pth: .* is binary in one of file and network"),
    ],
)
def test_file_of_another_architecture_is_refused_and_changes_nothing(make_refiner, tmp_path, settings, message):
    path = tmp_path / "refiner.pth"
    save_packed(make_refiner(), path)
    other = make_refiner(**settings)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_packed(other, path)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


class Foreign:
    """Something that only an unsafe reader would build."""


@pytest.mark.parametrize("content", [{"weight": torch.zeros(1)}, [1, 2], Foreign()], ids=["weights", "list", "object"])
def test_file_of_another_kind_is_refused(make_refiner, tmp_path, content):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"other.pth: .*; expected a file that save_packed wrote"):
        load_packed(make_refiner(), path)


def test_damaged_file_is_named_and_a_missing_one_is_missing(make_refiner, tmp_path):
    path = tmp_path / "damaged.pth"
    save_packed(make_refiner(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"damaged.pth: "):
        load_packed(make_refiner(), path)
    with pytest.raises(FileNotFoundError):
        load_packed(make_refiner(), tmp_path / "none.pth")


def test_packed_state_holds_tensors_and_plain_python_alone(make_refiner, tmp_path):
    save_packed(make_refiner(), tmp_path / "refiner.pth")
    packed = torch.load(tmp_path / "refiner.pth", weights_only=True)
    assert packed["format"].startswith("nnunetv2_diffusion 1-bit weights")
    assert pickle.loads(pickle.dumps(packed["binary"])).keys() == packed["binary"].keys()
