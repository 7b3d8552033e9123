"""Dice + cross-entropy for each sample: what the paper's recipe and importance sampling of time need.

nnU-Net's own losses return one number for the batch; a weight for every sample needs the numbers apart.
"""

import torch
from torch import nn
from torch.nn import functional as F


class SampleDiceCELoss(nn.Module):
    """weight_dice * Dice + weight_ce * CE of every sample (Fu et al. 2024, section 4.2: 1 and 20).

    Dice is soft and smoothed, so a patch without foreground gives a number and not NaN. Background is left out of
    Dice for classes. For regions, sigmoid and binary cross-entropy are used.

    Args:
        regions: heads are independent regions; the target is then one channel a region, plus one that marks ignored
            voxels if there is an ignore label.
        ignore_label: value of ignored voxels in the target of classes; not None for regions says that the last
            channel marks them.
        weight_dice: weight of Dice.
        weight_ce: weight of cross-entropy.
        smooth: added to numerator and denominator of Dice.
    """

    def __init__(
        self,
        regions: bool,
        ignore_label: int | None = None,
        weight_dice: float = 1.0,
        weight_ce: float = 1.0,
        smooth: float = 1e-5,
    ):
        super().__init__()
        self.regions = regions
        self.ignore_label = ignore_label
        self.weight_dice = weight_dice
        self.weight_ce = weight_ce
        self.smooth = smooth

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean over samples; see ``per_sample``."""
        return self.per_sample(logits, target).mean()

    def per_sample(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Loss of each sample.

        Args:
            logits: (B, K, *spatial).
            target: nnU-Net's, (B, 1, *spatial) labels or (B, K [+ 1], *spatial) regions.

        Returns:
            float32 (B,).
        """
        logits = logits.float()
        truth, valid = one_hot_target(target, logits.shape[1], self.regions, self.ignore_label)
        if self.regions:
            p = logits.sigmoid()
            ce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1, keepdim=True)
            foreground = slice(None)
        else:
            log_p = logits.log_softmax(1)
            p = log_p.exp()
            ce = -(truth * log_p).sum(1, keepdim=True)
            foreground = slice(1, None)
        space = tuple(range(2, logits.ndim))
        ce = (ce * valid).sum(space).mean(1) / valid.sum(space).mean(1).clamp(min=1)
        p, truth = (p * valid)[:, foreground], truth[:, foreground]
        overlap = 2 * (p * truth).sum(space) + self.smooth
        dice = overlap / (p.sum(space) + truth.sum(space) + self.smooth).clamp(min=1e-8)
        return self.weight_dice * (1 - dice.mean(1)) + self.weight_ce * ce


def one_hot_target(
    target: torch.Tensor, num_heads: int, regions: bool, ignore_label: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """nnU-Net's target as one channel a head, and where it is known.

    Args:
        target: (B, 1, *spatial) labels, or (B, K [+ 1], *spatial) regions of which the last channel marks ignored
            voxels if ignore_label is not None.
        num_heads: K.
        regions: which of the two.
        ignore_label: see above.

    Returns:
        float32 (B, K, *spatial), zero at ignored voxels, and float32 (B, 1, *spatial), 1 where the truth is known.
    """
    if regions:
        truth = target[:, :num_heads].float()
        valid = torch.ones_like(truth[:, :1])
        if ignore_label is not None:
            valid = 1 - target[:, num_heads:].float()
        return truth * valid, valid
    labels = target.long()
    valid = torch.ones_like(labels)
    if ignore_label is not None:
        valid = (labels != ignore_label).long()
    truth = torch.zeros(len(labels), num_heads, *labels.shape[2:], device=labels.device)
    truth.scatter_(1, labels * valid, 1.0)
    return truth * valid, valid.float()


class SampleDeepSupervision(nn.Module):
    """Weighted sum of a per-sample loss over deep-supervision outputs.

    Args:
        loss: has ``per_sample``.
        weights: one for each output, finest first.
    """

    def __init__(self, loss: SampleDiceCELoss, weights: list[float]):
        super().__init__()
        self.loss = loss
        self.weights = weights

    def forward(self, outputs: list[torch.Tensor], targets: list[torch.Tensor]) -> torch.Tensor:
        """Mean over samples; see ``per_sample``."""
        return self.per_sample(outputs, targets).mean()

    def per_sample(self, outputs: list[torch.Tensor], targets: list[torch.Tensor]) -> torch.Tensor:
        """Loss of each sample, float32 (B,)."""
        terms = [w * self.loss.per_sample(o, t) for w, o, t in zip(self.weights, outputs, targets, strict=True) if w]
        return torch.stack(terms).sum(0)
