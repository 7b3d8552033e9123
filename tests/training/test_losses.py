"""Laws of the loss that keeps samples apart, and the published numbers."""

import pytest
import torch
from torch.nn import functional as F

from nnunetv2_diffusion.diffusion import MaskEncoding
from nnunetv2_diffusion.training.losses import SampleDeepSupervision, SampleDiceCELoss, encoded_target

K = 4
IGNORE = 4
SPACES = [(6, 5), (3, 4, 5)]
spaces = pytest.mark.parametrize("space", SPACES, ids=["2D", "3D"])
kinds = pytest.mark.parametrize("regions", [False, True], ids=["classes", "regions"])


def make_target(regions: bool, space: tuple[int, ...], batch: int = 3) -> torch.Tensor:
    """nnU-Net's target without ignored voxels."""
    if regions:
        return torch.randint(0, 2, (batch, K, *space)).bool()
    return torch.randint(0, K, (batch, 1, *space)).float()


def make_ignoring(regions: bool, space: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """nnU-Net's target with ignored voxels, and where they are, (B, 1, *space)."""
    target = make_target(regions, space)
    ignored = torch.rand(len(target), 1, *space) < 0.3
    if regions:
        return torch.cat([target, ignored], dim=1), ignored
    return torch.where(ignored, float(IGNORE), target), ignored


def sample_without(ignored: torch.Tensor, x: torch.Tensor, index: int) -> torch.Tensor:
    """The voxels of one sample that are not ignored, as a patch with one axis: (1, K, N)."""
    return x[index][:, ~ignored[index, 0]][None]


# --- published numbers -----------------------------------------------------------------------------------------------


@pytest.fixture
def values(golden) -> dict[str, torch.Tensor]:
    """Golden values, channels first; sample 1 lacks class 3 and sample 2 all but background."""
    loaded = golden("imgx_losses")
    return {key: value.movedim(-1, 1) if value.ndim == 4 else value for key, value in loaded.items()}


def test_cross_entropy_is_the_published_one(values):
    loss = SampleDiceCELoss(regions=False, weight_dice=0)
    torch.testing.assert_close(loss.per_sample(values["logits"], values["label"][:, None]), values["ce"])


def test_cross_entropy_of_regions_is_the_mean_over_regions_of_the_published_one(values):
    """The reference adds up regions; nnU-Net takes their mean."""
    loss = SampleDiceCELoss(regions=True, weight_dice=0)
    torch.testing.assert_close(loss.per_sample(values["logits"], values["mask_true"]), values["ce_sigmoid"] / K)


def test_dice_is_the_published_one_and_1_for_classes_that_are_absent(values):
    loss = SampleDiceCELoss(regions=False, weight_ce=0, smooth=0)
    expected = values["dice_per_class"][:, 1:].nan_to_num(1).mean(1)
    assert values["dice_per_class"].isnan().sum() == 4
    torch.testing.assert_close(loss.per_sample(values["logits"], values["label"][:, None]), expected)


def test_dice_of_regions_is_the_published_one_over_all_heads(values):
    loss = SampleDiceCELoss(regions=True, weight_ce=0, smooth=0)
    expected = values["dice_per_class_sigmoid"].nan_to_num(1).mean(1)
    torch.testing.assert_close(loss.per_sample(values["logits"], values["mask_true"]), expected)


def test_total_and_gradient_of_the_paper_are_the_published_ones(values):
    """On sample 0, which has all classes; the published gradient is that of the mean of two."""
    logits = values["logits"][:1].clone().requires_grad_()
    loss = SampleDiceCELoss(regions=False, weight_dice=1, weight_ce=20, smooth=0)
    total = loss.per_sample(logits, values["label"][:1, None])
    torch.testing.assert_close(total.detach(), values["total_dice1_ce20"][:1])
    (total.sum() / 2).backward()
    torch.testing.assert_close(logits.grad, values["grad_dice1_ce20_first2"][:1], rtol=1e-4, atol=1e-6)


def test_default_smoothing_moves_the_published_dice_by_little(values):
    loss = SampleDiceCELoss(regions=False, weight_ce=0)
    expected = values["dice_per_class"][:2, 1:].nan_to_num(1).mean(1)
    found = loss.per_sample(values["logits"][:2], values["label"][:2, None])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# --- values ----------------------------------------------------------------------------------------------------------


@spaces
@kinds
def test_loss_is_the_formula_of_each_sample(regions, space):
    logits, target = 2 * torch.randn(3, K, *space, dtype=torch.float64), make_target(regions, space)
    smooth = 0.5
    found = SampleDiceCELoss(regions, None, 0.7, 3.0, smooth).per_sample(logits, target)
    assert found.dtype == torch.float32
    for index in range(3):
        if regions:
            truth, p = target[index].double(), logits[index].sigmoid()
            ce = -(truth * p.log() + (1 - truth) * (1 - p).log()).mean()
        else:
            truth = F.one_hot(target[index, 0].long(), K).movedim(-1, 0).double()
            p = logits[index].softmax(0)
            ce = -(truth * p.log()).sum(0).mean()
        dice = [
            (2 * (p[c] * truth[c]).sum() + smooth) / (p[c].sum() + truth[c].sum() + smooth)
            for c in range(0 if regions else 1, K)
        ]
        expected = 0.7 * (1 - sum(dice) / len(dice)) + 3 * ce
        assert float(found[index]) == pytest.approx(float(expected), rel=1e-5)


@spaces
@kinds
def test_loss_is_the_mean_over_samples(regions, space):
    loss = SampleDiceCELoss(regions)
    logits, target = torch.randn(3, K, *space), make_target(regions, space)
    each = torch.stack([loss(logits[i : i + 1], target[i : i + 1]) for i in range(3)])
    assert each.std() > 1e-3
    torch.testing.assert_close(loss.per_sample(logits, target), each)
    torch.testing.assert_close(loss(logits, target), each.mean())


@kinds
def test_a_perfect_answer_costs_nothing_and_the_opposite_a_lot(regions):
    target = make_target(regions, (6, 5))
    truth, _ = encoded_target(target, MaskEncoding(K), regions, None)
    loss = SampleDiceCELoss(regions)
    assert loss.per_sample(100 * (2 * truth - 1), target).abs().max() < 1e-3
    assert loss.per_sample(-100 * (2 * truth - 1), target).min() > 50


@kinds
@pytest.mark.parametrize("smooth", [0.0, 1e-5])
def test_a_patch_without_foreground_has_a_finite_loss_and_gradient(regions, smooth):
    logits = torch.randn(2, K, 6, 5).requires_grad_()
    target = torch.zeros(2, K if regions else 1, 6, 5)
    loss = SampleDiceCELoss(regions, smooth=smooth).per_sample(logits, target)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad.flatten(1).any(1).all()


@pytest.mark.parametrize("size", [1.0, 1e4])
@kinds
def test_half_precision_logits_are_computed_in_float32(regions, size):
    logits, target = (size * torch.randn(2, K, 6, 5)).half(), make_target(regions, (6, 5), 2)
    loss = SampleDiceCELoss(regions)
    found = loss.per_sample(logits, target)
    assert torch.isfinite(found).all()
    assert torch.equal(found, loss.per_sample(logits.float(), target))


# --- ignored voxels --------------------------------------------------------------------------------------------------


@spaces
@kinds
def test_ignored_voxels_count_as_if_they_were_not_there(regions, space):
    target, ignored = make_ignoring(regions, space)
    logits = torch.randn(3, K, *space)
    with_ignored = SampleDiceCELoss(regions, IGNORE).per_sample(logits, target)
    for index in range(3):
        rest = sample_without(ignored, target[:, : K if regions else 1], index)
        alone = SampleDiceCELoss(regions).per_sample(sample_without(ignored, logits, index), rest)
        torch.testing.assert_close(with_ignored[index], alone[0])


@spaces
@kinds
def test_logits_at_ignored_voxels_change_nothing_and_get_no_gradient(regions, space):
    target, ignored = make_ignoring(regions, space)
    loss = SampleDiceCELoss(regions, IGNORE)
    logits = torch.randn(3, K, *space)
    moved = torch.where(ignored, 10 * torch.randn_like(logits), logits)
    gradients, values = [], []
    for x in (logits, moved):
        x.requires_grad_()
        value = loss.per_sample(x, target)
        value.sum().backward()
        values.append(value.detach())
        gradients.append(x.grad)
    assert torch.equal(*values)
    assert torch.equal(*gradients)
    assert not gradients[0][ignored.expand_as(logits)].any()
    assert gradients[0][~ignored.expand_as(logits)].all()


@spaces
def test_what_regions_hold_at_ignored_voxels_changes_nothing(space):
    target, ignored = make_ignoring(True, space)
    other = torch.where(ignored, ~target, target)
    other[:, K:] = target[:, K:]
    assert not torch.equal(other, target)
    logits = torch.randn(3, K, *space)
    loss = SampleDiceCELoss(True, IGNORE)
    assert torch.equal(loss.per_sample(logits, other), loss.per_sample(logits, target))


@pytest.mark.parametrize("label", [IGNORE, 7, 255])
def test_value_of_the_ignore_label_does_not_matter(label):
    target, ignored = make_ignoring(False, (6, 5))
    logits = torch.randn(3, K, 6, 5)
    expected = SampleDiceCELoss(False, IGNORE).per_sample(logits, target)
    found = SampleDiceCELoss(False, label).per_sample(logits, torch.where(ignored, float(label), target))
    assert torch.equal(found, expected)


@kinds
@pytest.mark.parametrize("smooth", [0.0, 1e-5])
def test_a_patch_that_is_ignored_altogether_has_a_finite_loss_without_gradient(regions, smooth):
    logits = torch.randn(2, K, 6, 5).requires_grad_()
    target = torch.ones(2, K + 1, 6, 5) if regions else torch.full((2, 1, 6, 5), float(IGNORE))
    loss = SampleDiceCELoss(regions, IGNORE, smooth=smooth).per_sample(logits, target)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert not logits.grad.any()


# --- target ----------------------------------------------------------------------------------------------------------


@spaces
def test_encoded_target_of_classes(space):
    target, ignored = make_ignoring(False, space)
    truth, valid = encoded_target(target, MaskEncoding(K), False, IGNORE)
    assert truth.dtype == valid.dtype == torch.float32
    assert truth.shape == (3, K, *space)
    assert torch.equal(valid == 0, ignored)
    assert torch.equal(truth.sum(1, keepdim=True), valid)
    assert torch.equal(truth.argmax(1, keepdim=True)[~ignored], target.long()[~ignored])


@spaces
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_encoded_target_of_regions(space, dtype):
    target, ignored = make_ignoring(True, space)
    truth, valid = encoded_target(target.to(dtype), MaskEncoding(K), True, IGNORE)
    assert truth.dtype == valid.dtype == torch.float32
    assert torch.equal(valid == 0, ignored)
    assert torch.equal(truth.bool(), target[:, :K] & ~ignored)


@kinds
def test_encoded_target_without_ignore_label_is_known_everywhere(regions):
    target = make_target(regions, (6, 5))
    truth, valid = encoded_target(target, MaskEncoding(K), regions, None)
    assert torch.equal(valid, torch.ones(3, 1, 6, 5))
    expected = target.float() if regions else F.one_hot(target[:, 0].long(), K).movedim(-1, 1).float()
    assert torch.equal(truth, expected)


@kinds
def test_encoded_target_leaves_its_input_alone(regions):
    target, _ = make_ignoring(regions, (6, 5))
    copied = target.clone()
    encoded_target(target, MaskEncoding(K), regions, IGNORE)
    assert torch.equal(target, copied)


# --- deep supervision ------------------------------------------------------------------------------------------------


@pytest.fixture
def pyramid() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs and targets of three resolutions."""
    sizes = [(8, 12), (4, 6), (2, 3)]
    return [torch.randn(3, K, *s) for s in sizes], [make_target(False, s) for s in sizes]


def test_deep_supervision_is_the_weighted_sum_of_each_sample(pyramid):
    loss, weights = SampleDiceCELoss(False), [0.5, 0.3, 0.2]
    expected = sum(w * loss.per_sample(o, t) for w, o, t in zip(weights, *pyramid, strict=True))
    supervised = SampleDeepSupervision(loss, weights)
    torch.testing.assert_close(supervised.per_sample(*pyramid), expected)
    torch.testing.assert_close(supervised(*pyramid), expected.mean())


def test_deep_supervision_does_not_compute_outputs_of_weight_zero(pyramid):
    outputs, targets = pyramid
    outputs[2] = torch.full_like(outputs[2], float("nan"))
    supervised = SampleDeepSupervision(SampleDiceCELoss(False), [0.6, 0.4, 0.0])
    assert torch.isfinite(supervised(outputs, targets))


@pytest.mark.parametrize("weights", [[1.0, 0.5], [1.0, 0.5, 0.25, 0.125]])
def test_deep_supervision_with_another_number_of_outputs_raises(pyramid, weights):
    with pytest.raises(ValueError, match="zip"):
        SampleDeepSupervision(SampleDiceCELoss(False), weights).per_sample(*pyramid)


@kinds
def test_the_loss_is_computed_in_full_precision_under_autocast(regions):
    """Counts of voxels do not fit half precision."""
    logits, target = torch.randn(2, K, 40, 50), make_target(regions, (40, 50), 2)
    loss = SampleDiceCELoss(regions)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss.per_sample(logits, target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss.per_sample(logits, target), rtol=1e-6, atol=1e-6)
