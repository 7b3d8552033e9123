"""Trainer whose masks tell more: recycled ones mixed with the ground truth."""

from dataclasses import replace

from nnunetv2_diffusion.diffusion import make_encoding
from nnunetv2_diffusion.planning.continuing import section_names
from nnunetv2_diffusion.training.corruption import make_corruption
from nnunetv2_diffusion.training.strategies import RecycleMixed
from nnunetv2_diffusion.training.trainer import DiffusionTrainer


class MixedTrainer(DiffusionTrainer):
    """Recycles the masks of some samples and noises the ground truth of others (settings: section ``mixture``)."""

    strategy = RecycleMixed()

    @classmethod
    def reads(cls) -> frozenset[str]:
        """As ``CommonTrainer.reads``."""
        return super().reads() | section_names("mixture")

    def _configured(self, strategy: RecycleMixed) -> RecycleMixed:
        own = self.settings.mixture
        encoding = make_encoding(self.settings.mask_encoding, self.label_manager.num_segmentation_heads)
        corruption = make_corruption(own.truth_corruption, encoding, self.label_manager.has_regions)
        return replace(strategy, share=own.recycle_share, corruption=corruption)
