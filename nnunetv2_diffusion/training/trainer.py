"""Trainer bases: what has to change in nnU-Net's trainer for a network that predicts from noise, and no more."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_diffusion.diffusion import (
    GaussianDiffusion,
    ImportanceTimeSampler,
    SamplingConfig,
    UniformTimeSampler,
    linear_beta_schedule,
)
from nnunetv2_diffusion.networks import DiffusionSegmentor, to_x_start
from nnunetv2_diffusion.planning.settings import (
    DiffusionSettings,
    SettingsError,
    apply_environment,
    environment_overrides,
    read_settings,
)
from nnunetv2_diffusion.training import checks
from nnunetv2_diffusion.training.losses import (
    SampleDeepSupervision,
    SampleDiceCELoss,
    one_hot_target,
)
from nnunetv2_diffusion.training.recipes import RECIPES, WarmupCosine, paper_optimizer
from nnunetv2_diffusion.training.strategies import Standard, Strategy

TIME_SAMPLER_KEY = "diffusion_time_sampler"


def build_process(settings: DiffusionSettings) -> GaussianDiffusion:
    """The trained diffusion process of some settings."""
    betas = linear_beta_schedule(settings.timesteps, settings.beta_start, settings.beta_end)
    process = GaussianDiffusion(betas)
    return process.respace(settings.training_steps) if settings.training_steps else process


def apply_schedule_length(trainer: nnUNetTrainer, settings: DiffusionSettings) -> None:
    """Set epochs and iterations of a trainer from the settings; null keeps nnU-Net's."""
    for name in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch"):
        value = getattr(settings, name)
        if value is not None:
            setattr(trainer, name, value)


class BaselineTrainer(nnUNetTrainer):
    """nnU-Net's own trainer, with the length of the training read from the settings; all else is the host's."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        settings = read_settings(self.configuration_manager.configuration, self.plans_manager.plans_name)
        apply_schedule_length(self, settings)


class DiffusionTrainer(nnUNetTrainer):
    """Trains f(image, x_t, t) -> x_0 by a strategy and predicts by the reverse process.

    Subclasses set ``strategy``. Settings come from the plans (``planning.settings``); every hook that is overridden
    calls nnU-Net's own.
    """

    strategy: Strategy = Standard()
    uses_mask = True

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        # before nnU-Net makes folders and log files: a typo in the plans leaves no trace
        checks.check_plans(plans, configuration)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.settings = read_settings(self.configuration_manager.configuration, self.plans_manager.plans_name)
        if self.strategy.uses_next_step and self.uses_mask and self.settings.chain_length < 2:
            raise SettingsError(
                f"{type(self).__name__} needs a schedule of at least 2 steps, "
                f"the settings have {self.settings.chain_length}"
            )
        if self.strategy.self_conditioning:
            p = self.settings.self_conditioning_probability
            self.strategy = replace(self.strategy, probability=p)
        self.recipe = RECIPES[self.settings.recipe]
        self.enable_deep_supervision = self.recipe.deep_supervision
        apply_schedule_length(self, self.settings)
        self.process = build_process(self.settings)
        samplers = {"uniform": UniformTimeSampler, "importance": ImportanceTimeSampler}
        self.time_sampler = samplers[self.settings.time_sampling](self.process.num_timesteps)
        self._iteration = 0

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The plans' network with the additions of this trainer; called by nnU-Net to train and to predict.

        A class method where nnU-Net has a static one: it is called in the same way, and the strategy is known.

        Raises:
            SettingsError: for unusable settings or environment variables.
            UnsupportedArchitectureError: for an architecture that cannot be extended.
        """
        settings = read_settings(configuration_manager.configuration, plans_manager.plans_name)
        settings = apply_environment(settings)
        unet = get_network_from_plans(
            configuration_manager.network_arch_class_name,
            configuration_manager.network_arch_init_kwargs,
            configuration_manager.network_arch_init_kwargs_req_import,
            num_input_channels,
            num_output_channels,
            allow_init=True,
            deep_supervision=enable_deep_supervision,
        )
        if cls.uses_mask and environment_overrides():
            print("nnunetv2_diffusion: sampling set by the environment:", environment_overrides())
        return DiffusionSegmentor(
            unet,
            build_process(settings) if cls.uses_mask else None,
            SamplingConfig(settings.steps, settings.sampler, settings.eta, settings.samples, settings.seed),
            num_output_channels,
            self_conditioning=cls.uses_mask and cls.strategy.self_conditioning,
            time_conditioning=cls.uses_mask and settings.time_conditioning,
            transformer_layers=settings.transformer_layers,
            transformer_heads=settings.transformer_heads,
            transformer_width=settings.transformer_width,
        )

    @property
    def segmentor(self) -> DiffusionSegmentor:
        """The network without the wrapper of distributed training."""
        return self.network.module if isinstance(self.network, DistributedDataParallel) else self.network

    def _do_i_compile(self) -> bool:
        # nnU-Net would compile the whole module, loop included, and rename its weights; see initialize()
        return False

    def initialize(self) -> None:
        """As nnU-Net's; then compile the denoiser in place and say which heads are regions."""
        super().initialize()
        self.segmentor.sigmoid = self.label_manager.has_regions
        if super()._do_i_compile():
            self.print_to_log_file("Using torch.compile for the denoiser")
            self.segmentor.compile_denoiser()
        self.print_to_log_file(
            f"{type(self).__name__}: strategy {self.strategy}, settings {self.settings}",
            also_print_to_console=False,
        )

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, object]:
        """The recipe's optimiser and schedule; the optimiser's state carries the time sampler's history."""
        if not self.enable_deep_supervision:
            # coarse heads get no gradient: distributed training must not wait for one
            for head in self.segmentor.decoder.seg_layers[:-1]:
                head.requires_grad_(False)
        if self.recipe.host_optimizer:
            optimizer, scheduler = super().configure_optimizers()
        else:
            optimizer = paper_optimizer(list(self.network.parameters()))
            # the paper's 100 steps are under 1 % of its trainings; in a short one they would be most of it
            warmup = min(100, self.num_iterations_per_epoch * self.num_epochs // 10)
            scheduler = WarmupCosine(optimizer, self.num_iterations_per_epoch, self.num_epochs, warmup)
        optimizer.register_state_dict_post_hook(self._save_time_sampler)
        optimizer.register_load_state_dict_pre_hook(self._load_time_sampler)
        return optimizer, scheduler

    def _save_time_sampler(self, optimizer: torch.optim.Optimizer, state: dict) -> dict:
        return {**state, TIME_SAMPLER_KEY: self.time_sampler.state_dict()}

    def _load_time_sampler(self, optimizer: torch.optim.Optimizer, state: dict) -> dict:
        state = dict(state)
        self.time_sampler.load_state_dict(state.pop(TIME_SAMPLER_KEY, {}))
        return state

    def _build_loss(self) -> nn.Module:
        """nnU-Net's loss, or one that keeps samples apart where the recipe or the time sampling needs it."""
        if self.recipe.host_optimizer and self.settings.time_sampling == "uniform":
            return super()._build_loss()
        loss = SampleDiceCELoss(
            self.label_manager.has_regions,
            self.label_manager.ignore_label,
            weight_ce=self.recipe.weight_ce,
        )
        if not self.enable_deep_supervision:
            return loss
        return SampleDeepSupervision(loss, list(super()._build_loss().weight_factors))

    def get_tr_and_val_datasets(self) -> tuple:
        """As nnU-Net's, with a look at every label before workers start."""
        datasets = super().get_tr_and_val_datasets()
        if self.local_rank == 0:
            folder = self.preprocessed_dataset_folder
            checks.check_labels(datasets, self.label_manager, folder, show_progress=True)
        return datasets

    def on_train_epoch_start(self) -> None:
        """As nnU-Net's, and count iterations for schedules by step."""
        super().on_train_epoch_start()
        self._iteration = 0

    def train_step(self, batch: dict) -> dict:
        """One optimiser step; the time steps drawn and their losses go to the time sampler."""
        image = batch["data"].to(self.device, non_blocking=True)
        target = self._to_device(batch["target"])
        if isinstance(self.lr_scheduler, WarmupCosine):
            self.lr_scheduler.step(self.current_epoch, self._iteration)
        self._iteration += 1
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self._training_loss(image, target)
        if not torch.isfinite(loss):
            checks.check_images(batch, image)
        self._optimize(loss)
        return {"loss": loss.detach().cpu().numpy()}

    def _training_loss(self, image: torch.Tensor, target: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        t_range = (0, self.process.num_timesteps - int(self.strategy.uses_next_step))
        t, weights = self.time_sampler.sample(len(image), t_range)
        x_start = self._x_start(target)
        last = self.strategy(self._first_pass(image), self.process, x_start, t)
        output = self.network(image, last.x_t, self.process.timestep_map[t], last.estimate)
        if not hasattr(self.loss, "per_sample"):
            return self.loss(output, target)
        losses = self.loss.per_sample(output, target)
        if self.settings.time_sampling == "importance":
            self._share_losses(t, losses)
        return (losses * weights.to(losses.device)).mean()

    def _x_start(self, target: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        """Ground truth at full resolution in [-1, 1], float32; 0 where it is to be ignored."""
        full = target[0] if isinstance(target, list) else target
        truth, valid = one_hot_target(
            full,
            self.label_manager.num_segmentation_heads,
            self.label_manager.has_regions,
            self.label_manager.ignore_label,
        )
        return to_x_start(truth) * valid

    def _first_pass(self, image: torch.Tensor) -> Callable[..., torch.Tensor]:
        """predict(x, t, samples) for strategies: probabilities of one pass without gradient."""

        def predict(x: torch.Tensor, t: torch.Tensor, samples: torch.Tensor | None = None) -> torch.Tensor:
            seen = image if samples is None else image[samples]
            # no cache: weights that autocast casts here would be reused, without gradient, by the trained pass
            with torch.no_grad(), self._autocast(cache_enabled=False):
                logits = self.segmentor(seen, x, self.process.timestep_map[t], full_resolution_only=True)
                return self.segmentor.probabilities(logits)

        return predict

    def _share_losses(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Tell the time sampler the losses of all processes, so that all keep the same history."""
        pairs = [(t.tolist(), losses.detach().float().tolist())]
        if self.is_ddp:
            pairs = [None] * dist.get_world_size()
            dist.all_gather_object(pairs, (t.tolist(), losses.detach().float().tolist()))
        for steps, values in pairs:
            self.time_sampler.update(steps, values)

    def _autocast(self, cache_enabled: bool = True) -> AbstractContextManager:
        """Half precision on CUDA only, as in nnU-Net."""
        if self.device.type != "cuda":
            return nullcontext()
        return torch.autocast(self.device.type, enabled=True, cache_enabled=cache_enabled)

    def _to_device(self, target: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(target, list):
            return [x.to(self.device, non_blocking=True) for x in target]
        return target.to(self.device, non_blocking=True)

    def _optimize(self, loss: torch.Tensor) -> None:
        parameters = self.network.parameters()
        if self.grad_scaler is None:
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, self.recipe.gradient_clip)
            self.optimizer.step()
            return
        self.grad_scaler.scale(loss).backward()
        self.grad_scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(parameters, self.recipe.gradient_clip)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def on_validation_epoch_start(self) -> None:
        """One step is enough to follow the training, at the price of nnU-Net's own validation."""
        super().on_validation_epoch_start()
        self._sampling = self.segmentor.sampling
        self.segmentor.sampling = replace(self._sampling, steps=1, samples=1)

    def validation_step(self, batch: dict) -> dict:
        """As nnU-Net's; a case that is not finite is named."""
        checks.check_images(batch, batch["data"])
        return super().validation_step(batch)

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """As nnU-Net's, and back to the sampling of predictions."""
        self.segmentor.sampling = self._sampling
        super().on_validation_epoch_end(val_outputs)

    def load_checkpoint(self, filename_or_checkpoint: str | dict) -> None:
        """As nnU-Net's, after a look whether the file belongs to this training.

        Raises:
            CheckpointError: if it was written by another trainer or for other classes, or holds more than weights
                and plain data.
        """
        if isinstance(filename_or_checkpoint, str):
            checks.check_checkpoint(
                filename_or_checkpoint, type(self).__name__, self.label_manager.num_segmentation_heads
            )
        super().load_checkpoint(filename_or_checkpoint)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """As nnU-Net's; a recipe without deep supervision keeps it off, also after the final validation."""
        super().set_deep_supervision_enabled(enabled and self.enable_deep_supervision)


class UnconditionalTrainer(DiffusionTrainer):
    """Control without diffusion: the same network and recipe, no mask, no time (Fu et al. 2024, section 5.3)."""

    uses_mask = False

    def _training_loss(self, image: torch.Tensor, target: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        return self.loss(self.network(image), target)
