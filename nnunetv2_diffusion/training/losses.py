"""Dice + cross-entropy for each sample: what the paper's recipe and importance sampling of time need.

nnU-Net's own losses return one number for the batch; a weight for every sample needs the numbers apart.
"""

import torch
from torch import nn
from torch.nn import functional as F

from nnunetv2_diffusion.diffusion import MaskEncoding


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
        terms = self._region_terms if self.regions else self._class_terms
        ce, overlap, predicted, present, known = terms(logits, target)
        dice = (2 * overlap + self.smooth) / (predicted + present + self.smooth).clamp(min=1e-8)
        return self.weight_dice * (1 - dice.mean(1)) + self.weight_ce * ce / known.clamp(min=1)

    def _region_terms(self, logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Sums over space: cross-entropy (B,), overlap, predicted and true volume (B, K), known voxels (B,)."""
        truth, valid = encoded_target(target, MaskEncoding(logits.shape[1]), True, self.ignore_label)
        space = tuple(range(2, logits.ndim))
        ce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1, keepdim=True)
        p = logits.sigmoid() * valid
        sums = (x.sum(space) for x in (p * truth, p, truth))
        return (ce * valid).sum(space)[:, 0], *sums, valid.sum(space)[:, 0]

    def _class_terms(self, logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As for regions, without background in overlap and volumes.

        With a hundred classes every map of all of them counts: only logarithm and probability are made, and the rest
        is gathered from the labelled class.
        """
        labels, valid = known_labels(target, self.ignore_label)
        log_p = logits.log_softmax(1)
        p = log_p.exp()
        ce = -(log_p.gather(1, labels) * valid).flatten(1).sum(1)
        bins, known = labels.flatten(1), valid.flatten(1)
        zeros = known.new_zeros(p.shape[:2])
        overlap = zeros.scatter_add(1, bins, p.gather(1, labels).flatten(1) * known)
        present = zeros.scatter_add(1, bins, known)
        with torch.autocast(p.device.type, enabled=False):  # a sum in half precision ends at 65504 voxels
            predicted = torch.einsum("bkn,bn->bk", p.flatten(2), known)
        return ce, overlap[:, 1:], predicted[:, 1:], present[:, 1:], known.sum(1)


def known_labels(labels: torch.Tensor, ignore_label: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (B, 1, *spatial) as integers, 0 where they are to be ignored, and float32 1 where they are known."""
    labels = labels.long()
    if ignore_label is None:
        return labels, torch.ones_like(labels, dtype=torch.float32)
    valid = labels != ignore_label
    return labels * valid, valid.float()


def encoded_target(
    target: torch.Tensor, encoding: MaskEncoding, regions: bool, ignore_label: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """nnU-Net's target as the channels of a mask, and where it is known.

    Args:
        target: (B, 1, *spatial) labels, or (B, K [+ 1], *spatial) regions of which the last channel marks ignored
            voxels if ignore_label is not None.
        encoding: of the mask; for regions it keeps them as they are.
        regions: which of the two.
        ignore_label: see above.

    Returns:
        float32 (B, C_mask, *spatial), zero at ignored voxels, and float32 (B, 1, *spatial), 1 where the truth is known.
    """
    if regions:
        truth = target[:, : encoding.channels].float()
        valid = torch.ones_like(truth[:, :1])
        if ignore_label is not None:
            valid = 1 - target[:, encoding.channels :].float()
        return truth * valid, valid
    labels, valid = known_labels(target, ignore_label)
    truth = encoding.encode_labels(labels)
    return truth if ignore_label is None else truth * valid, valid


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
