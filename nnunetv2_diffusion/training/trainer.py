"""Trainer bases: what has to change in nnU-Net's trainer for a network that predicts from noise, and no more."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import distributed as dist
from torch import nn

from nnunetv2_diffusion.diffusion import (
    GaussianDiffusion,
    GaussianSteps,
    TimeSteps,
    UniformTimeSampler,
    linear_beta_schedule,
    make_encoding,
    make_time_sampler,
)
from nnunetv2_diffusion.networks import DiffusionUNet, to_x_start
from nnunetv2_diffusion.networks.chain_network import ChainNetwork
from nnunetv2_diffusion.sampling import SamplingConfig
from nnunetv2_diffusion.settings import (
    DiffusionSettings,
    SettingsError,
    read_settings,
)
from nnunetv2_diffusion.training import checks
from nnunetv2_diffusion.training.continuing import GAUSSIAN, LENGTHS, TRANSFORMER
from nnunetv2_diffusion.training.host import (
    CommonTrainer,
    PlannedTrainer,
    keep_in_optimizer_state,
    plans_unet,
    sampling_from_environment,
)
from nnunetv2_diffusion.training.losses import (
    SampleDeepSupervision,
    SampleDiceCELoss,
)
from nnunetv2_diffusion.training.recipes import RECIPES, WarmupCosine, paper_optimizer
from nnunetv2_diffusion.training.strategies import Standard, Strategy

TIME_SAMPLER_KEY = "diffusion_time_sampler"


def transformer_options(settings: DiffusionSettings) -> dict[str, Any]:
    """Of the bottleneck's transformer, for ``DenoisingUNet``."""
    return {name: getattr(settings, name) for name in ("transformer_layers", "transformer_heads", "transformer_width")}


class BaselineTrainer(CommonTrainer):
    """nnU-Net's own trainer, with the length of the training read from the settings; its steps are the host's."""

    def train_step(self, batch: dict) -> dict:
        """As nnU-Net's, unless the gradients are not finite."""
        self.guard.watch(self.optimizer, self.grad_scaler)
        output = super().train_step(batch)
        self._judge_step(self.optimizer, torch.as_tensor(output["loss"], device=self.device))
        return output


class DiffusionTrainer(PlannedTrainer):
    """Trains f(image, x_t, t) -> x_0 by a strategy and predicts by the reverse process.

    A strategy of the recycling family is a subclass that sets ``strategy``. A method with another process, network or
    loss overrides ``build_process``, ``make_sampling``, ``make_network`` or ``_training_loss``, and says in ``reads``
    which settings it uses (``methods/``). Every hook of nnU-Net that is overridden calls nnU-Net's own.
    """

    strategy: Strategy = Standard()
    uses_mask = True
    section: str | None = "gaussian"  # of the settings, whose sampling the environment may change; None: no sampling
    _rehearses = False
    time_sampling: str | None = None  # how t is drawn; None: as the settings say
    process: TimeSteps
    inner_network: DiffusionUNet

    def prepare(self) -> None:
        """See ``PlannedTrainer``."""
        self.strategy = self._configured(self.strategy)
        self.recipe = RECIPES[self.settings.recipe]
        self.enable_deep_supervision = self.recipe.deep_supervision
        self.process = self.build_process(self.settings)
        if self.strategy.uses_next_step and self.uses_mask and self.process.num_timesteps < 2:
            raise SettingsError(
                f"{type(self).__name__} needs a schedule of at least 2 steps, "
                f"the settings have {self.process.num_timesteps}"
            )
        kind = self.time_sampling or self.settings.gaussian.time_sampling
        self.time_sampler = make_time_sampler(kind, self.process.num_timesteps)
        self._iteration = 0

    @classmethod
    def build_process(cls, settings: DiffusionSettings) -> TimeSteps:
        """The diffusion process that training draws from."""
        own = settings.gaussian
        process = GaussianDiffusion(linear_beta_schedule(own.timesteps, *own.betas))
        return process.respace(own.training_steps) if own.training_steps else process

    @classmethod
    def make_sampling(cls, settings: DiffusionSettings) -> SamplingConfig:
        """How predictions are drawn by the plans."""
        own = settings.gaussian.with_steps(cls.strategy.steps)
        assert own.steps is not None, "with_steps has set them"
        return SamplingConfig(own.steps, own.sampler, own.eta, settings.samples, settings.seed, own.step_spacing)

    @classmethod
    def make_network(cls, unet: nn.Module, heads: int, settings: DiffusionSettings) -> ChainNetwork:
        """The plans' network with what the method adds to it.

        Args:
            unet: as nnU-Net builds it for the image; it is taken over.
            heads: K, classes with background, or regions.
            settings: of the plans.
        """
        return DiffusionUNet(
            unet,
            cls.build_process(settings) if cls.uses_mask else None,
            cls.make_sampling(settings),
            heads,
            make_encoding(settings.mask_encoding, heads),
            self_conditioning=cls.uses_mask and cls.strategy.self_conditioning,
            time_conditioning=cls.uses_mask and settings.time_conditioning,
            **transformer_options(settings),
        )

    @classmethod
    def reads(cls) -> frozenset[str]:
        """As ``CommonTrainer.reads``."""
        names = LENGTHS | TRANSFORMER | {"recipe"}
        if cls.uses_mask:
            names |= GAUSSIAN
        if cls.uses_mask and not cls.strategy.self_conditioning:
            names -= {"gaussian.self_conditioning_probability"}
        return names

    def _configured(self, strategy: Strategy) -> Strategy:
        """The strategy with what the settings say of it."""
        if strategy.self_conditioning:
            return replace(strategy, probability=self.settings.gaussian.self_conditioning_probability)
        return strategy

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
        if cls.section:
            settings = sampling_from_environment(settings, cls.section)
        unet = plans_unet(configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision)
        return cls.make_network(unet, num_output_channels, settings)

    def _compile(self) -> None:
        self.inner_network.compile_denoiser()

    def initialize(self) -> None:
        """As nnU-Net's; the settings go to the log."""
        super().initialize()
        self.print_to_log_file(
            f"{type(self).__name__}: strategy {self.strategy}, settings {self.settings}",
            also_print_to_console=False,
        )

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, object]:
        """The recipe's optimiser and schedule; the optimiser's state carries the time sampler's history."""
        if not self.enable_deep_supervision:
            # coarse heads get no gradient: distributed training must not wait for one
            for head in self.inner_network.decoder.seg_layers[:-1]:
                head.requires_grad_(False)
        if self.recipe.host_optimizer:
            optimizer, scheduler = super().configure_optimizers()
        else:
            optimizer = paper_optimizer(list(self.network.parameters()))
            # the paper's 100 steps are under 1 % of its trainings; in a short one they would be most of it
            warmup = min(100, self.num_iterations_per_epoch * self.num_epochs // 10)
            scheduler = WarmupCosine(optimizer, self.num_iterations_per_epoch, self.num_epochs, warmup)
        keep_in_optimizer_state(
            optimizer, TIME_SAMPLER_KEY, self.time_sampler.state_dict, self.time_sampler.load_state_dict
        )
        return optimizer, scheduler

    def _build_loss(self) -> nn.Module:
        """nnU-Net's loss, or one that keeps samples apart where the recipe or the time sampling needs it."""
        needs_samples = self.uses_mask and self.time_sampler.learns
        if self.recipe.host_optimizer and not needs_samples:
            return super()._build_loss()
        loss = SampleDiceCELoss(
            self.label_manager.has_regions,
            self.label_manager.ignore_label,
            weight_ce=self.recipe.weight_ce,
        )
        if not self.enable_deep_supervision:
            return loss
        return SampleDeepSupervision(loss, list(super()._build_loss().weight_factors))

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
        self._backward(loss)
        self._update(self.optimizer, self.network.parameters(), self.recipe.gradient_clip)
        if self.grad_scaler is not None:
            self.grad_scaler.update()
        loss = loss.detach().cpu()
        if not torch.isfinite(loss):
            checks.check_images(batch, image)
        return {"loss": loss.numpy()}

    def _training_loss(self, image: torch.Tensor, target: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        t_range = (0, self.process.num_timesteps - int(self.strategy.uses_next_step))
        t, weights = self.time_sampler.sample(len(image), t_range)
        x_start = self._x_start(target)
        assert isinstance(self.process, GaussianSteps), "a method with another process has a loss of its own"
        last = self.strategy(self._first_pass(image), self.process, x_start, t)
        output = self.network(image, last.x_t, self.process.timestep_map[t], last.estimate)
        if not hasattr(self.loss, "per_sample"):
            return self.loss(output, target)
        losses = self.loss.per_sample(output, target)
        if self.time_sampler.learns:
            self._share_losses(t, losses)
        return (losses * weights.to(losses.device)).mean()

    def _x_start(self, target: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        """Ground truth at full resolution, encoded, in [-1, 1], float32; 0 where it is to be ignored."""
        truth, valid = self.truth(target, self.inner_network.encoding)
        return to_x_start(truth) * valid

    def _first_pass(self, image: torch.Tensor) -> Callable[..., torch.Tensor]:
        """predict(x, t, samples) for strategies: encoded probabilities of one pass without gradient."""

        def predict(x: torch.Tensor, t: torch.Tensor, samples: torch.Tensor | None = None) -> torch.Tensor:
            if self._rehearses:
                return torch.zeros_like(x)
            seen = image if samples is None else image[samples]
            # no cache: weights that autocast casts here would be reused, without gradient, by the trained pass
            with torch.no_grad(), self._autocast(cache_enabled=False):
                network = self.inner_network
                logits = network(seen, x, self.process.timestep_map[t], full_resolution_only=True)
                return network.encoding.encode(network.probabilities(logits))

        return predict

    def rehearse(self, image: torch.Tensor, target: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        """See ``PlannedTrainer``: times have no history, and a first pass, which keeps nothing, is left out."""
        self.time_sampler = UniformTimeSampler(self.process.num_timesteps)
        self._rehearses = True
        with self._autocast():
            return self._training_loss(image, target)

    def _share_losses(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Tell the time sampler the losses of all processes, so that all keep the same history."""
        own = (t.tolist(), losses.detach().float().tolist())
        pairs: list[Any] = [own]
        if self.is_ddp:
            pairs = [None] * dist.get_world_size()
            dist.all_gather_object(pairs, own)
        for steps, values in pairs:
            self.time_sampler.update(steps, values)

    def on_validation_epoch_start(self) -> None:
        """One step is enough to follow the training, at the price of nnU-Net's own validation."""
        super().on_validation_epoch_start()
        self._sampling = self.inner_network.sampling
        assert self._sampling is not None, "make_sampling gives one to every network"
        self.inner_network.sampling = replace(self._sampling, steps=1, samples=1)

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """As nnU-Net's, and back to the sampling of predictions."""
        self.inner_network.sampling = self._sampling
        super().on_validation_epoch_end(val_outputs)


class NoDiffTrainer(DiffusionTrainer):
    """Control without diffusion: the same network and recipe, no mask, no time (Fu et al. 2024, section 5.3)."""

    uses_mask = False
    section = None

    def _training_loss(self, image: torch.Tensor, target: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        return self.loss(self.network(image), target)
