"""BerDiff (Chen et al. 2023, MICCAI): Bernoulli diffusion of a binary mask from fair coins, conditioned on the image.

Its process is HiDiff's with the prior 1/2: y_t is the mask with probability alphas_cumprod_t, else a fair coin. The
network sees image and y_t and estimates the noise, P(y_t != y_start). The loss is the KL divergence of a step plus the
binary cross-entropy of the noise; a prediction is DDIM-like steps from y_T ~ B(1/2). With several classes each channel
of the one-hot mask is such a chain, and the chain's answer is their probabilities, normalised.
"""

import torch
from torch import nn

from nnunetv2_diffusion.diffusion import (
    BernoulliDiffusion,
    MaskEncoding,
    cosine_beta_schedule,
    noise_loss,
    variational_bound,
)
from nnunetv2_diffusion.networks import DiffusionUNet
from nnunetv2_diffusion.sampling import BernoulliChain, Chain, SamplingConfig, Window
from nnunetv2_diffusion.settings import DiffusionSettings
from nnunetv2_diffusion.training.continuing import COMMON, section_names
from nnunetv2_diffusion.training.trainer import DiffusionTrainer, transformer_options

TIMESTEPS = 1000  # T, as published


class BerDiffUNet(DiffusionUNet):
    """The plans' U-Net, told y_t and t, whose heads are the logits of the noise: P(y_t != y_start) for each class.

    ``forward(image, y_t, t)`` is one pass. ``forward(image)`` is what nnU-Net calls to predict.
    """

    process: BernoulliDiffusion

    def shown(self, x_t: torch.Tensor) -> torch.Tensor:
        """See ``DiffusionUNet``; states are 0 or 1 already."""
        return x_t

    def make_chain(self, config: SamplingConfig | None) -> Chain:
        """See ``ChainNetwork``."""
        assert config is not None, "this network has no mask without its chain"
        return BernoulliChain(self, config)

    def look(self, image: torch.Tensor) -> Window:
        """The prior: fair coins for each of K classes."""
        return Window(image, image.new_full((len(image), self.num_heads, *image.shape[2:]), 0.5, dtype=torch.float32))

    def noise_probability(
        self,
        image: torch.Tensor,
        y_t: torch.Tensor,
        prior: torch.Tensor,
        t: torch.Tensor,
        features: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """P(y_t != y_start), (B, K, *spatial) in float32."""
        return self(image, y_t, t, full_resolution_only=True).float().sigmoid()


class BerDiffTrainer(DiffusionTrainer):
    """Bernoulli diffusion from fair coins; KL divergence plus binary cross-entropy, both in bits."""

    time_sampling = "uniform"
    section = "berdiff"
    process: BernoulliDiffusion
    inner_network: BerDiffUNet

    def prepare(self) -> None:
        """See ``PlannedTrainer``; noise on a coarser grid is no mask's, so there are no coarse heads."""
        super().prepare()
        self.enable_deep_supervision = False

    @classmethod
    def reads(cls) -> frozenset[str]:
        """As ``CommonTrainer.reads``."""
        return COMMON | section_names("berdiff")

    @classmethod
    def build_process(cls, settings: DiffusionSettings) -> BernoulliDiffusion:
        """See ``DiffusionTrainer``."""
        return BernoulliDiffusion(cosine_beta_schedule(TIMESTEPS))

    @classmethod
    def make_sampling(cls, settings: DiffusionSettings) -> SamplingConfig:
        """See ``DiffusionTrainer``: DDIM-like steps, as published."""
        steps = settings.berdiff.steps
        return SamplingConfig(steps, "ddim", samples=settings.samples, seed=settings.seed)

    @classmethod
    def make_network(cls, unet: nn.Module, heads: int, settings: DiffusionSettings) -> BerDiffUNet:
        """See ``DiffusionTrainer``."""
        return BerDiffUNet(
            unet, cls.build_process(settings), cls.make_sampling(settings), heads, MaskEncoding(heads),
            time_conditioning=settings.time_conditioning, **transformer_options(settings),
        )  # fmt: skip

    def _training_loss(self, image: torch.Tensor, target: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        y_start, valid = self.truth(target, self.inner_network.encoding)
        prior = torch.full_like(y_start, 0.5)
        # no ground truth may enter at voxels to be ignored: a coin stands for it
        y_start = torch.where(valid.bool(), y_start, (torch.rand_like(prior) < prior).float())
        t = torch.randint(self.process.num_timesteps, (len(image),))
        y_t = self.process.q_sample(y_start, prior, t, torch.rand_like(prior))
        output = self.network(image, y_t, t)
        eps = (output[0] if isinstance(output, list | tuple) else output).float()
        with torch.autocast(eps.device.type, enabled=False):
            bound = variational_bound(self.process, eps, y_start, y_t, prior, t, valid)
            return (bound + noise_loss(eps, y_start, y_t, 0.0, valid)).mean()
