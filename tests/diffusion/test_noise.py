"""Laws of noise in prediction: a function of seed, content and sample, of nothing else."""

import os
import subprocess
import sys
from itertools import combinations

import pytest
import torch

from nnunetv2_diffusion.diffusion import ContentNoise
from nnunetv2_diffusion.diffusion.noise import _positions, content_hash

CPU = torch.device("cpu")
SHAPE = (3, 4, 5)


def noise_of(image, seed=0, sample=0, shape=SHAPE, calls=1):
    """Noise of the last of some calls, (B, *shape)."""
    source = ContentNoise(content_hash(image), seed, sample, CPU)
    return [source(shape) for _ in range(calls)][-1]


def uniform_of(image, seed=0, sample=0, shape=SHAPE):
    """First uniform noise of the streams, (B, *shape)."""
    return ContentNoise(content_hash(image), seed, sample, CPU).uniform(shape)


def two_dots():
    """An image that is not its own mirror image, but balanced: both have the same sum of positions."""
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 2, 1] = image[0, 0, 5, 6] = 1
    return image


# ---- what noise depends on


def test_the_same_content_has_the_same_noise_in_every_call():
    image = torch.randn(2, 1, 6, 7)
    assert torch.equal(noise_of(image), noise_of(image.clone()))
    assert torch.equal(noise_of(image, calls=3), noise_of(image.clone(), calls=3))


def test_noise_does_not_depend_on_the_global_random_state():
    image = torch.randn(1, 1, 6, 7)
    first = noise_of(image)
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    assert torch.equal(noise_of(image), first)
    assert torch.equal(torch.get_rng_state(), before)  # and leaves it alone


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_noise_of_an_image_does_not_depend_on_the_rest_of_the_batch_or_its_order(calls):
    images = torch.randn(5, 2, 6, 7)
    together = noise_of(images, calls=calls)
    for i in range(5):
        assert torch.equal(noise_of(images[i : i + 1], calls=calls), together[i : i + 1])
    order = [3, 0, 4, 2, 1]
    assert torch.equal(noise_of(images[order], calls=calls), together[order])


def test_noise_of_an_image_does_not_depend_on_calls_for_other_images():
    first, second = torch.randn(2, 1, 1, 6, 7)
    expected = noise_of(second)
    source = ContentNoise(content_hash(first), 0, 0, CPU)
    source(SHAPE)
    interleaved = ContentNoise(content_hash(second), 0, 0, CPU)
    source(SHAPE)
    assert torch.equal(interleaved(SHAPE), expected)


def test_equal_images_in_a_batch_have_equal_noise():
    noise = noise_of(torch.randn(1, 1, 6, 7).expand(2, -1, -1, -1))
    assert torch.equal(noise[0], noise[1])


def test_the_memory_layout_of_an_image_is_not_content():
    image = torch.randn(2, 3, 6, 7)
    assert content_hash(image.to(memory_format=torch.channels_last)) == content_hash(image)
    assert content_hash(image.transpose(2, 3).contiguous().transpose(2, 3)) == content_hash(image)


def test_the_dtype_of_an_image_is_not_content():
    image = torch.randn(2, 1, 6, 7).half()
    assert content_hash(image) == content_hash(image.float()) == content_hash(image.double())


def test_the_sign_of_a_zero_is_not_content():
    assert content_hash(torch.tensor([[[0.0, 1.0]]])) == content_hash(torch.tensor([[[-0.0, 1.0]]]))


def test_gradients_of_an_image_are_no_obstacle():
    image = torch.randn(2, 1, 6)
    assert content_hash(image.clone().requires_grad_()) == content_hash(image)


def test_another_process_makes_the_same_noise():
    program = (
        "import torch; from nnunetv2_diffusion.diffusion import ContentNoise;"
        "from nnunetv2_diffusion.diffusion.noise import content_hash;"
        "image = torch.linspace(-1, 1, 24).reshape(2, 1, 3, 4);"
        "print(ContentNoise(content_hash(image), 5, 1, torch.device('cpu'))((2, 3)).tolist())"
    )
    image = torch.linspace(-1, 1, 24).reshape(2, 1, 3, 4)
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "99", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == str(noise_of(image, seed=5, sample=1, shape=(2, 3)).tolist())


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (torch.linspace(-1, 1, 24).reshape(2, 1, 3, 4), [12974468730364030750, 10596661058400766956]),
        (torch.linspace(-1, 1, 30).reshape(2, 1, 3, 5), [13579077841267261649, 17945815822642343567]),
        (torch.zeros(1, 1, 4), [1507938732534546606]),
    ],
    ids=["12 voxels", "15 voxels", "4 voxels"],
)
def test_hashes_are_those_of_former_versions(image, expected):
    # predictions are made from them: another hash would change every result
    assert content_hash(image) == expected


def test_hashes_do_not_depend_on_the_sizes_hashed_before():
    images = [torch.linspace(-1, 1, size).reshape(1, 1, size) for size in (5, 6, 7, 8)]
    expected = [content_hash(image) for image in images]
    for _ in range(3):
        assert [content_hash(image) for image in reversed(images)] == expected[::-1]
        assert [content_hash(image) for image in images] == expected


def test_positions_of_voxels_are_made_once_for_images_of_one_size_and_few_sizes_are_kept():
    _positions.cache_clear()
    for _ in range(5):
        content_hash(torch.randn(2, 1, 6, 7))
    assert _positions.cache_info().misses == 1
    for size in range(1, 20):
        content_hash(torch.randn(1, 1, size))
    assert _positions.cache_info().currsize <= 2


def test_positions_made_in_inference_mode_serve_images_outside_of_it():
    image = torch.randn(1, 1, 11)
    _positions.cache_clear()
    with torch.inference_mode():
        expected = content_hash(image)
    assert content_hash(image.clone().requires_grad_()) == expected


# ---- what makes it differ


def test_different_seeds_and_samples_have_different_noise():
    image = torch.randn(1, 1, 6, 7)
    noises = [noise_of(image, seed, sample) for seed in (0, 1, 2, -1, 2**40) for sample in (0, 1, 2)]
    assert not any(torch.equal(a, b) for a, b in combinations(noises, 2))


def test_consecutive_calls_differ():
    source = ContentNoise(content_hash(torch.randn(2, 1, 6)), 0, 0, CPU)
    noises = [source(SHAPE) for _ in range(4)]
    assert not any(torch.equal(a, b) for a, b in combinations(noises, 2))


def test_different_images_of_a_batch_have_different_noise():
    noise = noise_of(torch.randn(4, 1, 6, 7))
    assert not any(torch.equal(a, b) for a, b in combinations(noise, 2))


def change_last_bit(image):
    image = image.clone()
    image[0, 0, 3, 2] = torch.nextafter(image[0, 0, 3, 2], torch.tensor(9.0))
    return image


CHANGES = {
    "last bit of one voxel": change_last_bit,
    "sign": lambda x: -x,
    "scale": lambda x: 2 * x,
    "offset": lambda x: x + 1,
    "rolled": lambda x: x.roll(1, -1),
    "mirrored along the first axis": lambda x: x.flip(2),
    "mirrored along the second axis": lambda x: x.flip(3),
    "rotated": lambda x: x.rot90(2, (2, 3)),
    "transposed": lambda x: x.transpose(2, 3),
    "permuted voxels": lambda x: x.flatten(2)[:, :, torch.randperm(64)].reshape(x.shape),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_content_has_different_noise(change):
    image = torch.randn(1, 1, 8, 8)
    assert not torch.equal(image, change(image))
    assert not torch.equal(noise_of(image), noise_of(change(image)))


@pytest.mark.parametrize("axes", [(2,), (3,)], ids=str)
def test_a_mirrored_balanced_image_has_different_noise(axes):
    image = two_dots()
    assert not torch.equal(noise_of(image), noise_of(image.flip(axes)))


def test_no_two_arrangements_of_a_few_equal_voxels_share_their_hash():
    # phantoms, masks and tiles with an empty background hold few distinct values
    images = torch.zeros(1820, 1, 16)
    for image, places in zip(images, combinations(range(16), 4), strict=True):
        image[0, list(places)] = 1
    assert len(set(content_hash(images))) == len(images)


def test_swapped_channels_have_different_noise():
    image = torch.randn(1, 2, 5, 5)
    assert not torch.equal(noise_of(image), noise_of(image.flip(1)))


# ---- distribution


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs().item()


def test_noise_is_float32_of_the_shape_asked_for():
    noise = noise_of(torch.randn(2, 1, 6), shape=(3, 4, 5, 6))
    assert noise.shape == (2, 3, 4, 5, 6)
    assert noise.dtype == torch.float32


def test_noise_is_standard_normal():
    noise = noise_of(torch.randn(1, 1, 6), shape=(400_000,)).double()
    standard_error = 400_000**-0.5
    for power, (moment, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs((noise**power).mean().item() - moment) < 5 * variance**0.5 * standard_error


def test_streams_of_neighbouring_seeds_samples_images_and_calls_are_uncorrelated():
    image = torch.zeros(1, 1, 6)
    changed = image.clone()
    changed[0, 0, 0] = 1e-3
    shape = (100_000,)
    base = noise_of(image, shape=shape)
    others = [
        noise_of(image, seed=1, shape=shape),
        noise_of(image, sample=1, shape=shape),
        noise_of(changed, shape=shape),
        noise_of(image, shape=shape, calls=2),
    ]
    assert max(correlation(base, other) for other in others) < 5 * 100_000**-0.5


def test_seeds_of_neighbouring_streams_are_spread():
    # the first value of each of many streams is itself standard normal
    image = torch.randn(1, 1, 6)
    first = torch.stack([noise_of(image, seed, sample, (1,)) for seed in range(50) for sample in range(40)]).double()
    assert abs(first.mean().item()) < 5 * 2000**-0.5
    assert abs(first.var().item() - 1) < 5 * (2 / 2000) ** 0.5


# ---- uniform noise


def test_uniform_noise_is_float32_of_the_shape_asked_for_whatever_the_default_dtype():
    image = torch.randn(2, 1, 6)
    expected = uniform_of(image, shape=(3, 4, 5, 6))
    assert expected.shape == (2, 3, 4, 5, 6)
    assert expected.dtype == torch.float32
    torch.set_default_dtype(torch.float16)
    try:
        actual = uniform_of(image, shape=(3, 4, 5, 6))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(actual, expected)


def test_uniform_noise_is_uniform_on_0_to_1_without_1():
    noise = uniform_of(torch.randn(1, 1, 6), shape=(400_000,))
    assert noise.min() >= 0
    assert noise.max() < 1
    standard_error = 400_000**-0.5
    for power in (1, 2, 3, 4):
        variance = 1 / (2 * power + 1) - 1 / (power + 1) ** 2
        moment = (noise.double() ** power).mean().item()
        assert abs(moment - 1 / (power + 1)) < 5 * variance**0.5 * standard_error


def test_uniform_noise_of_an_image_does_not_depend_on_the_rest_of_the_batch():
    images = torch.randn(4, 2, 6, 7)
    together = uniform_of(images)
    assert torch.equal(uniform_of(images[[3, 1]]), together[[3, 1]])
    assert not any(torch.equal(a, b) for a, b in combinations(together, 2))


def test_uniform_noise_differs_by_seed_and_sample():
    image = torch.randn(1, 1, 6, 7)
    noises = [uniform_of(image, seed, sample) for seed in (0, 1, -1) for sample in (0, 1)]
    assert not any(torch.equal(a, b) for a, b in combinations(noises, 2))


def test_uniform_and_normal_noise_are_drawn_from_the_same_streams():
    image = torch.randn(2, 1, 6)
    source, other = (ContentNoise(content_hash(image), 0, 0, CPU) for _ in range(2))
    before = source.uniform(SHAPE)
    after = source(SHAPE)
    assert torch.equal(other.uniform(SHAPE), before)
    assert torch.equal(other(SHAPE), after)
    assert not torch.equal(noise_of(image), after)  # the uniform draw has moved the stream on
    assert not torch.equal(source.uniform(SHAPE), before)


def test_uniform_noise_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    uniform_of(torch.zeros(1, 1, 6))
    assert torch.equal(torch.get_rng_state(), before)


# ---- bad input


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_an_error_that_names_the_image_and_counts_them(bad):
    images = torch.randn(3, 2, 4, 5)
    images[1, 0, 2, 3] = images[1, 1, 0, 0] = images[1, 1, 3, 4] = bad
    with pytest.raises(ValueError, match=r"image 1 of the batch has 3 NaN or infinite values among 40;"):
        content_hash(images)


def test_infinities_of_both_signs_do_not_cancel():
    images = torch.tensor([[[float("inf"), -float("inf"), 0.0]]])
    with pytest.raises(ValueError, match=r"image 0 of the batch has 2 NaN or infinite values among 3;"):
        content_hash(images)


# ---- devices


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_image_has_the_same_hash_on_every_device():
    images = torch.randn(3, 2, 16, 16, 16)
    assert content_hash(images.cuda()) == content_hash(images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_noise_is_made_on_its_device_and_is_repeatable_there():
    hashes = content_hash(torch.randn(3, 1, 8))
    first, second = (ContentNoise(hashes, 0, 0, torch.device("cuda"))(SHAPE) for _ in range(2))
    assert first.device.type == "cuda"
    assert torch.equal(first, second)
