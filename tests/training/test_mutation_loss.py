"""Laws of the loss over all combinations of heads."""

import pytest
import torch

from nnunetv2_diffusion.methods.mutation_loss import MutationLoss
from nnunetv2_diffusion.training.losses import SampleDiceCELoss

K = 3
SPACE = (6, 5)
kinds = pytest.mark.parametrize("regions", [False, True], ids=["classes", "regions"])


def plain_loss(regions: bool = False, ignore_label: int | None = None) -> SampleDiceCELoss:
    return SampleDiceCELoss(regions, ignore_label, weight_dice=0.7, weight_ce=0.3)


def make_heads(number: int) -> list[torch.Tensor]:
    return [torch.randn(2, K, *SPACE) for _ in range(number)]


def make_target(regions: bool = False) -> torch.Tensor:
    return torch.randint(0, 2, (2, K, *SPACE)) if regions else torch.randint(0, K, (2, 1, *SPACE))


@kinds
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_it_is_the_sum_over_all_non_empty_subsets_of_the_loss_of_added_logits(regions, number):
    heads, target, loss = make_heads(number), make_target(regions), plain_loss(regions)
    expected = torch.zeros(2)
    for mask in range(1, 2**number):
        logits = torch.zeros(2, K, *SPACE)
        for index in range(number):
            if mask >> index & 1:
                logits = logits + heads[index]
        expected += loss.per_sample(logits, target)
    mutation = MutationLoss(loss)
    torch.testing.assert_close(mutation.per_sample(heads, target), expected)
    torch.testing.assert_close(mutation(heads, target), expected.mean())


@kinds
def test_a_single_tensor_has_the_plain_loss(regions):
    (head,), target, loss = make_heads(1), make_target(regions), plain_loss(regions)
    assert torch.equal(MutationLoss(loss)(head, target), loss(head, target))
    assert torch.equal(MutationLoss(loss).per_sample(head, target), loss.per_sample(head, target))


def test_four_heads_make_fifteen_terms():
    class Counting(SampleDiceCELoss):
        def per_sample(self, logits, target):
            return torch.ones(len(logits))

    assert float(MutationLoss(Counting(False))(make_heads(4), make_target())) == 15


def test_order_of_the_heads_does_not_matter():
    heads, target, loss = make_heads(4), make_target(), MutationLoss(plain_loss())
    torch.testing.assert_close(loss(heads, target), loss(heads[::-1], target))


def test_every_head_gets_a_gradient_in_every_sample():
    heads = [head.requires_grad_() for head in make_heads(4)]
    MutationLoss(plain_loss())(heads, make_target()).backward()
    for head in heads:
        assert torch.isfinite(head.grad).all()
        assert (head.grad.flatten(1).abs().amax(1) > 0).all()


def test_ignored_voxels_do_not_count():
    target = make_target().float()
    target[..., :2] = K
    heads = make_heads(3)
    loss = MutationLoss(plain_loss(ignore_label=K))
    for ignored, columns in ((True, slice(0, 2)), (False, slice(2, 4))):
        moved = [head.clone() for head in heads]
        for head in moved:
            head[..., columns] += torch.randn(2, K, SPACE[0], 2)
        assert torch.equal(loss(moved, target), loss(heads, target)) == ignored


def test_half_precision_logits_are_added_up_in_float32():
    heads, target, loss = [30 * h.half() for h in make_heads(4)], make_target(), MutationLoss(plain_loss())
    assert torch.equal(loss(heads, target), loss([h.float() for h in heads], target))


def test_lists_of_heads_are_left_alone():
    heads = make_heads(2)
    copies = [head.clone() for head in heads]
    MutationLoss(plain_loss())(heads, make_target())
    assert len(heads) == 2
    assert all(torch.equal(*pair) for pair in zip(heads, copies, strict=True))


def test_no_heads_raise():
    with pytest.raises(ValueError, match="empty list of heads"):
        MutationLoss(plain_loss())([], make_target())
