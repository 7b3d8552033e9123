"""Loss over all combinations of several predictions of one mask (MUTATION; Rahman and Marculescu, MIDL 2023)."""

from functools import reduce
from itertools import chain, combinations
from operator import add

import torch
from torch import nn

from nnunetv2_diffusion.training.losses import SampleDiceCELoss


class MutationLoss(nn.Module):
    """Sum of a loss over every non-empty subset of the heads, whose logits are added up: 15 terms for 4 heads.

    Args:
        loss: has ``per_sample``; MERIT's is SampleDiceCELoss with weight_dice=0.7 and weight_ce=0.3.
    """

    def __init__(self, loss: SampleDiceCELoss):
        super().__init__()
        self.loss = loss

    def forward(self, heads: list[torch.Tensor] | torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean over samples; see ``per_sample``."""
        return self.per_sample(heads, target).mean()

    def per_sample(self, heads: list[torch.Tensor] | torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Loss of each sample.

        Args:
            heads: logits, each (B, K, *spatial); a single tensor is one head, hence the plain loss.
            target: as the loss takes it, one for all heads.

        Returns:
            float32 (B,).

        Raises:
            ValueError: if there is no head.
        """
        heads = [heads] if isinstance(heads, torch.Tensor) else list(heads)
        if not heads:
            raise ValueError("MutationLoss got an empty list of heads, expected at least one")
        # fp32: a sum of half-precision logits would be rounded before the loss sees it
        heads = [head.float() for head in heads]
        subsets = chain.from_iterable(combinations(heads, size) for size in range(1, len(heads) + 1))
        return torch.stack([self.loss.per_sample(reduce(add, subset), target) for subset in subsets]).sum(0)
