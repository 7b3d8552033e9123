"""RecycleScore: a trainer whose network makes another plausible mask of an image from other random numbers.

Recycling feeds the mask of a first pass, made without gradient, back into the input. Here such a mask goes into the
loss: the mask that is trained shall be near the truth, and as far from another mask of the same image as the truth may
be from itself.
"""

import torch
from torch import nn

from nnunetv2_diffusion.networks import RecycleScoreUNet
from nnunetv2_diffusion.sampling import SamplingConfig
from nnunetv2_diffusion.settings import DiffusionSettings
from nnunetv2_diffusion.training.continuing import section_names
from nnunetv2_diffusion.training.trainer import DiffusionTrainer, transformer_options

SMOOTH = 10.0  # voxels: a class of less than that hardly counts


def jaccard_distance(a: torch.Tensor, b: torch.Tensor, valid: torch.Tensor, smooth: float = SMOOTH) -> torch.Tensor:
    """1 - sum min(a, b) / sum max(a, b), Jaccard's distance of masks of probabilities (Ruzicka).

    The ratio is a positive definite kernel, so this is a squared distance in a Hilbert space and the score that is
    made of it a proper one (Gneiting and Raftery 2007, section 5.1). ``smooth`` is one further voxel of that value in
    both masks, which changes nothing about it.

    Args:
        a: probabilities (B, K, *spatial) in [0, 1].
        b: the same.
        valid: 1 where voxels count, (B, 1, *spatial).
        smooth: in voxels; masks that are empty have the distance 0.

    Returns:
        mean over channels, float32 (B,), in [0, 1].
    """
    space = tuple(range(2, a.ndim))
    a, b = a.float() * valid, b.float() * valid
    union = torch.maximum(a, b).sum(space) + smooth
    return ((a - b).abs().sum(space) / union).mean(1)


def score_gap(p: torch.Tensor, other: torch.Tensor, truth: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The score: distance d of a mask to the truth, minus its distance to another mask of the same image.

    Minimising it trains the whole distribution P of masks of an image. The kernel score of P against the truth y is
    E d(p, y) - E d(p, p') / 2, with p and p' drawn from P independently, and it is least if P is the distribution of
    the truth. p and p' are drawn alike, so the gradient through both is, in the mean, twice the gradient through p
    alone. Hence only p has to learn, p' is held fixed and made without gradient, as the first pass of recycling (Fu et
    al. 2024), and the factor 1 / 2 goes.

    Args:
        p: probabilities (B, K, *spatial) in [0, 1] of the mask that is trained.
        other: the same, of another mask of the same image; no gradient reaches it.
        truth: (B, K, *spatial).
        valid: (B, 1, *spatial), 1 where the truth is known.

    Returns:
        float32 (B,).
    """
    return jaccard_distance(p, truth, valid) - jaccard_distance(p, other.detach(), valid)


class RecycleScoreTrainer(DiffusionTrainer):
    """Trains a network that turns an image and a code of random numbers into one plausible mask.

    Masks of one image from several codes shall differ where, and as much as, the truth may. Every step makes two masks
    from two codes, the second one without gradient. The loss is the recipe's, plus ``score.weight`` times
    ``score_gap`` (settings: section ``score``).
    """

    uses_mask = False
    section = "score"
    inner_network: RecycleScoreUNet

    @classmethod
    def reads(cls) -> frozenset[str]:
        """As ``CommonTrainer.reads``."""
        return super().reads() | section_names("score") | {"samples", "seed"}

    @classmethod
    def make_sampling(cls, settings: DiffusionSettings) -> SamplingConfig:
        """See ``DiffusionTrainer``; steps are single masks here."""
        return SamplingConfig(settings.score.steps, samples=settings.samples, seed=settings.seed)

    @classmethod
    def make_network(cls, unet: nn.Module, heads: int, settings: DiffusionSettings) -> RecycleScoreUNet:
        """See ``DiffusionTrainer``: with an input for the code."""
        own = settings.score.latent_channels
        return RecycleScoreUNet(unet, cls.make_sampling(settings), heads, own, **transformer_options(settings))

    def _training_loss(self, image: torch.Tensor, target: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        code, other_code = torch.randn(2, len(image), self.settings.score.latent_channels, device=self.device)
        network = self.inner_network
        # no cache: weights that autocast casts here would be reused, without gradient, by the pass that learns
        with torch.no_grad(), self._autocast(cache_enabled=False):
            other = network.probabilities(network(image, other_code, full_resolution_only=True))
        heads = self.network(image, code)
        p = network.probabilities(heads[0] if isinstance(heads, list | tuple) else heads)
        truth, valid = self.truth(target, network.encoding)
        first = 0 if self.label_manager.has_regions else 1  # without background
        gap = score_gap(p[:, first:], other[:, first:], truth[:, first:], valid).mean()
        return self.loss(heads, target) + self.settings.score.weight * gap
