"""What has to change in nnU-Net's trainer for any network of ours, and no more."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_diffusion.checkpoints import check_checkpoint
from nnunetv2_diffusion.diffusion import MaskEncoding
from nnunetv2_diffusion.networks.heads import HeadsMixin
from nnunetv2_diffusion.planning.schema import S
from nnunetv2_diffusion.planning.settings import (
    DiffusionSettings,
    apply_environment,
    environment_overrides,
    read_settings,
)
from nnunetv2_diffusion.training import checks
from nnunetv2_diffusion.training.losses import encoded_target
from nnunetv2_diffusion.training.pretrained import check_pretrained_weights

PEAK_GPU_MEMORY = "Peak GPU memory of tensors"  # a line of the log


def apply_schedule_length(trainer: nnUNetTrainer, settings: DiffusionSettings) -> None:
    """Set epochs and iterations of a trainer from the settings; null keeps nnU-Net's."""
    for name in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch"):
        value = getattr(settings, name)
        if value is not None:
            setattr(trainer, name, value)


def plans_unet(
    configuration: ConfigurationManager, in_channels: int, out_channels: int, deep_supervision: bool
) -> nn.Module:
    """The network that nnU-Net planned, initialised as nnU-Net does."""
    return get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        in_channels,
        out_channels,
        allow_init=True,
        deep_supervision=deep_supervision,
    )


def sampling_from_environment(settings: S) -> S:
    """Settings with the environment's overrides, which are echoed.

    Raises:
        SettingsError: naming the variables if the result cannot be used.
    """
    overrides = environment_overrides()
    if overrides:
        print("nnunetv2_diffusion: sampling set by the environment:", overrides)
    return apply_environment(settings)


def keep_in_optimizer_state(
    optimizer: torch.optim.Optimizer, key: str, save: Callable[[], dict], load: Callable[[dict], None]
) -> None:
    """Let an optimiser's state dict carry more, so that nnU-Net's own checkpoint does.

    Args:
        optimizer: the one that nnU-Net saves.
        key: under which it is stored.
        save: returns tensors and plain data.
        load: is given what save returned, {} if there is none.
    """

    def add(optimizer: torch.optim.Optimizer, state: dict) -> dict:
        return {**state, key: save()}

    def take(optimizer: torch.optim.Optimizer, state: dict) -> dict:
        state = dict(state)
        load(state.pop(key, {}))
        return state

    optimizer.register_state_dict_post_hook(add)
    optimizer.register_load_state_dict_pre_hook(take)


class MemoryLog:
    """Writes a training's peak memory on a GPU to its log; a class to inherit before nnU-Net's trainer."""

    def on_train_end(self) -> None:
        """As nnU-Net's, after a line with PyTorch's peak since the process started, in bytes."""
        if self.device.type == "cuda":
            self.print_to_log_file(f"{PEAK_GPU_MEMORY}: {torch.cuda.max_memory_allocated(self.device)} bytes")
        super().on_train_end()


class PlannedTrainer(MemoryLog, nnUNetTrainer):
    """nnU-Net's trainer with settings from the plans, early checks, and a loop kept out of torch.compile.

    ``self.network`` is a ``HeadsMixin``; subclasses say in ``_compile`` which of its parts are compiled.
    """

    network: HeadsMixin

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        # before nnU-Net makes folders and log files: a typo in the plans leaves no trace
        checks.check_plans(plans, configuration, dataset_json)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.settings = read_settings(self.configuration_manager.configuration, self.plans_manager.plans_name)
        apply_schedule_length(self, self.settings)

    @property
    def inner_network(self) -> HeadsMixin:
        """The network without the wrapper of distributed training."""
        return self.network.module if isinstance(self.network, DistributedDataParallel) else self.network

    def _do_i_compile(self) -> bool:
        # nnU-Net would compile the whole module, loop included, and rename its weights; see initialize()
        return False

    def _compile(self) -> None:
        """Compile parts of the network in place; names in the state dict must not change."""
        raise NotImplementedError

    def initialize(self) -> None:
        """As nnU-Net's; then compile in place and say which heads are regions."""
        super().initialize()
        check_pretrained_weights(self, self.inner_network)
        self.inner_network.sigmoid = self.label_manager.has_regions
        if super()._do_i_compile():
            self.print_to_log_file("Using torch.compile within the network, the reverse process left out")
            self._compile()

    def get_tr_and_val_datasets(self) -> tuple:
        """As nnU-Net's, with a look at every label before workers start."""
        datasets = super().get_tr_and_val_datasets()
        if self.local_rank == 0:
            folder = self.preprocessed_dataset_folder
            checks.check_labels(datasets, self.label_manager, folder, show_progress=True)
        return datasets

    def truth(
        self, target: torch.Tensor | list[torch.Tensor], encoding: MaskEncoding
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ground truth at full resolution, encoded, and where it is known; see ``encoded_target``."""
        return encoded_target(
            target[0] if isinstance(target, list) else target,
            encoding,
            self.label_manager.has_regions,
            self.label_manager.ignore_label,
        )

    def _autocast(self, cache_enabled: bool = True) -> AbstractContextManager:
        """Half precision on CUDA only, as in nnU-Net."""
        if self.device.type != "cuda":
            return nullcontext()
        return torch.autocast(self.device.type, enabled=True, cache_enabled=cache_enabled)

    def _to_device(self, target: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(target, list):
            return [x.to(self.device, non_blocking=True) for x in target]
        return target.to(self.device, non_blocking=True)

    def _backward(self, loss: torch.Tensor) -> None:
        (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()

    def _update(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], gradient_clip: float
    ) -> None:
        """Clip gradients and step; the scaler is not updated, because one may serve several optimisers."""
        if self.grad_scaler is None:
            nn.utils.clip_grad_norm_(parameters, gradient_clip)
            optimizer.step()
            return
        self.grad_scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, gradient_clip)
        self.grad_scaler.step(optimizer)

    def validation_step(self, batch: dict) -> dict:
        """As nnU-Net's; a case that is not finite is named."""
        checks.check_images(batch, batch["data"])
        return super().validation_step(batch)

    def load_checkpoint(self, filename_or_checkpoint: str | dict) -> None:
        """As nnU-Net's, after a look whether the file belongs to this training.

        Raises:
            CheckpointError: if it was written by another trainer or for other classes, or holds more than weights
                and plain data.
        """
        if isinstance(filename_or_checkpoint, str):
            check_checkpoint(filename_or_checkpoint, type(self).__name__, self.label_manager.num_segmentation_heads)
        super().load_checkpoint(filename_or_checkpoint)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """As nnU-Net's; a trainer without deep supervision keeps it off, also after the final validation."""
        super().set_deep_supervision_enabled(enabled and self.enable_deep_supervision)
