"""Laws of mask encodings: round trips and linearity."""

import math

import pytest
import torch

from nnunetv2_diffusion.diffusion import MaskEncoding, make_encoding

CLASSES = [2, 3, 4, 5, 16, 104, 117]
spaces = pytest.mark.parametrize("space", [(5, 6), (3, 4, 5)])
names = pytest.mark.parametrize("name", ["one-hot", "analog-bits"])


def labels_of(classes: int, space: tuple[int, ...], batch: int = 2) -> torch.Tensor:
    labels = torch.randint(0, classes, (batch, 1, *space))
    labels.view(-1)[:classes] = torch.arange(classes)[: labels.numel()]
    return labels


@names
@pytest.mark.parametrize("classes", CLASSES)
def test_channels_are_the_classes_or_the_digits_of_their_numbers(name, classes):
    expected = classes if name == "one-hot" else len(format(classes - 1, "b"))
    assert make_encoding(name, classes).channels == expected
    assert name == "one-hot" or expected == math.ceil(math.log2(classes))


@names
@spaces
@pytest.mark.parametrize("classes", CLASSES)
def test_labels_survive_the_round_trip(name, space, classes):
    encoding, labels = make_encoding(name, classes), labels_of(classes, space)
    code = encoding.encode_labels(labels)
    assert code.shape == (2, encoding.channels, *space)
    assert set(code.unique().tolist()) <= {0.0, 1.0}
    p = encoding.decode(code)
    assert p.shape == (2, classes, *space)
    assert torch.equal(p.argmax(1, keepdim=True), labels)
    torch.testing.assert_close(p.amax(1), torch.ones_like(p[:, 0]), atol=1e-4, rtol=0)


@names
@pytest.mark.parametrize("classes", CLASSES)
def test_the_code_of_probabilities_is_the_expected_code_of_labels(name, classes):
    encoding = make_encoding(name, classes)
    p = torch.randn(1, classes, 4, 3).double().softmax(1)
    expected = sum(
        p[:, k : k + 1] * encoding.encode_labels(torch.full((1, 1, 4, 3), k)).double() for k in range(classes)
    )
    torch.testing.assert_close(encoding.encode(p), expected)


@pytest.mark.parametrize("classes", [2, 4, 16, 128])
def test_soft_bits_survive_the_round_trip_if_every_number_is_a_class(classes):
    encoding = make_encoding("analog-bits", classes)
    code = 0.02 + 0.96 * torch.rand(2, encoding.channels, 4, 5)
    torch.testing.assert_close(encoding.encode(encoding.decode(code)), code, atol=1e-5, rtol=1e-4)


def test_numbers_that_are_no_class_have_no_probability():
    p = make_encoding("analog-bits", 5).decode(torch.rand(1, 3, 4, 4))
    torch.testing.assert_close(p.sum(1), torch.ones(1, 4, 4))
    certain = make_encoding("analog-bits", 5).decode(torch.ones(1, 3, 1, 1))  # 7 is none
    assert bool(torch.isfinite(certain).all())


def test_with_two_classes_bits_are_the_second_channel_of_one_hot():
    bits, one_hot = make_encoding("analog-bits", 2), make_encoding("one-hot", 2)
    p, labels = torch.rand(2, 2, 5, 6), labels_of(2, (5, 6))
    p = p / p.sum(1, keepdim=True)
    torch.testing.assert_close(bits.encode(p), one_hot.encode(p)[:, 1:])
    assert torch.equal(bits.encode_labels(labels), one_hot.encode_labels(labels)[:, 1:])
    torch.testing.assert_close(bits.decode(bits.encode(p)), p)


@names
def test_regions_stay_as_they_are(name):
    encoding = make_encoding(name, 3, regions=True)
    p = torch.rand(1, 3, 4, 4)
    assert type(encoding) is MaskEncoding
    assert torch.equal(encoding.encode(p), p)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"'bits', expected one of one-hot, analog-bits"):
        make_encoding("bits", 3)


def test_bits_are_in_full_precision_under_autocast():
    encoding, p = make_encoding("analog-bits", 5), torch.randn(1, 5, 6, 6).softmax(1)
    with torch.autocast("cpu", torch.bfloat16):
        code = encoding.encode(p)
        back = encoding.decode(code)
    torch.testing.assert_close(code, encoding.encode(p), rtol=0, atol=0)
    torch.testing.assert_close(back, encoding.decode(code), rtol=0, atol=0)
