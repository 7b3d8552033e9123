"""HiDiff with MERIT as segmentor, for 2D (Chen et al. 2024; Rahman and Marculescu 2023)."""

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_diffusion.methods.hidiff import HiDiffTrainer
from nnunetv2_diffusion.methods.mutation_loss import MutationLoss
from nnunetv2_diffusion.networks.discriminative import Segmentor, SegmentorOutput
from nnunetv2_diffusion.networks.merit import SCALES, Merit
from nnunetv2_diffusion.settings import HiDiffSettings
from nnunetv2_diffusion.training.continuing import LENGTHS, section_names
from nnunetv2_diffusion.training.losses import SampleDiceCELoss


class MeritTrainer(HiDiffTrainer):
    """HiDiff whose segmentor is MERIT, trained by its MUTATION loss of 0.7 Dice + 0.3 CE."""

    takes_host_network = False

    @classmethod
    def reads(cls) -> frozenset[str]:
        """As ``CommonTrainer.reads``."""
        return LENGTHS | section_names("hidiff") | {"samples", "seed"}

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        patch = PlansManager(plans).get_configuration(configuration).patch_size
        if len(patch) != 2:
            raise NotImplementedError(
                f"{type(self).__name__}: configuration {configuration} is 3D, MERIT is a 2D network. Use -c 2d, or "
                "nnUNetTrainerHiDiff"
            )
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False  # its four heads are at full resolution

    @classmethod
    def build_segmentor(
        cls,
        configuration: ConfigurationManager,
        settings: HiDiffSettings,
        num_input_channels: int,
        num_heads: int,
        deep_supervision: bool,
    ) -> Segmentor:
        """MERIT for the plans' patch size, with random weights: a trained model must not need a download."""
        height, width = (int(n) for n in configuration.patch_size)
        return Merit(num_input_channels, num_heads, (height, width), settings.merit)

    def _start_segmentor(self) -> None:
        super()._start_segmentor()
        own = self.settings.hidiff
        if self._resuming or own.segmentor_checkpoint or not own.merit_weights:
            return
        merit = self.inner_network.segmentor
        height, width = (int(n) for n in self.configuration_manager.patch_size)
        pretrained = Merit(self.num_input_channels, 1, (height, width), own.merit, own.merit_weights)
        for scale in SCALES:
            getattr(merit, scale).load_state_dict(getattr(pretrained, scale).state_dict())
        self.print_to_log_file(f"MERIT: pretrained backbones from {own.merit_weights}")

    def _build_loss(self) -> nn.Module:
        labels = self.label_manager
        return MutationLoss(SampleDiceCELoss(labels.has_regions, labels.ignore_label, weight_dice=0.7, weight_ce=0.3))

    def _discriminative_loss(self, output: SegmentorOutput, target: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        return self.loss(output.heads, target)
