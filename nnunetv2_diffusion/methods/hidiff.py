"""HiDiff inside nnU-Net: a segmentor and a refiner of its mask, trained by turns (Chen et al. 2024, algorithm 1)."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from nnunetv2_diffusion.checkpoints import CheckpointError
from nnunetv2_diffusion.diffusion import (
    BernoulliDiffusion,
    MaskEncoding,
    NoiseCalibration,
    cosine_beta_schedule,
    noise_loss,
    variational_bound,
)
from nnunetv2_diffusion.networks.discriminative import Segmentor, SegmentorOutput, UNetSegmentor
from nnunetv2_diffusion.networks.hidiff import HiDiffNetwork, refiner_topology
from nnunetv2_diffusion.sampling import SamplingConfig
from nnunetv2_diffusion.settings import (
    DiffusionSettings,
    HiDiffSettings,
    environment_overrides,
    read_settings,
)
from nnunetv2_diffusion.training import checks
from nnunetv2_diffusion.training.continuing import LENGTHS, section_names
from nnunetv2_diffusion.training.host import (
    PlannedTrainer,
    keep_in_optimizer_state,
    plans_unet,
    sampling_from_environment,
)
from nnunetv2_diffusion.training.pretrained import find_segmentor, load_segmentor

GRADIENT_CLIP = 12  # nnU-Net's
RECENT_EPOCHS = 5  # whose pseudo Dice tells whether the refiner pays
VALIDATION_STEPS = 3  # at most, in the validation of every epoch: all T would take longer than the training
# terms of the loss, logged apart; the last two in bits
TERMS = {"discriminative": "L_Disc {:.4f}", "kl": "KL {:.4f} bits", "noise": "noise loss {:.4f} bits"}


class Draw(NamedTuple):
    """One (t, eps) of algorithm 1, for both phases of an iteration."""

    y_start: torch.Tensor
    y_t: torch.Tensor
    t: torch.Tensor
    valid: torch.Tensor


def hidiff_sampling(settings: DiffusionSettings, steps: int | None = None) -> SamplingConfig | None:
    """How HiDiff samples by the plans.

    Args:
        settings: of the plans.
        steps: K instead of the settings'.

    Returns:
        None for K = 0.
    """
    own = settings.hidiff
    steps = own.steps if steps is None else steps
    if not steps:
        return None
    samples = settings.samples if own.samples is None else own.samples
    seed = settings.seed if own.seed is None else own.seed
    return SamplingConfig(steps, own.sampler, samples=samples, seed=seed, step_spacing=own.step_spacing)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Parameters get no gradient and normalisation keeps its statistics; inputs still get gradients."""
    modes = [(m, m.training) for m in module.modules()]
    trainable = [p for p in module.parameters() if p.requires_grad]
    module.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)


class TurnsSchedule:
    """Learning rates by epoch: the segmentor alone first, then both networks, each with nnU-Net's polynomial decay.

    It has no state: the rates follow from the epoch, so a continued training finds the same ones.

    Args:
        trainer: asked for its optimisers, settings and lengths at every step.
    """

    def __init__(self, trainer: "HiDiffTrainer"):
        self.trainer = trainer

    def step(self, epoch: int) -> None:
        """Set the rates of an epoch; nnU-Net calls it at the start of each."""
        trainer, settings = self.trainer, self.trainer.settings.hidiff
        first = trainer.pretraining_epochs
        if epoch < first:
            rates = (settings.learning_rate, settings.rate_alone * (1 - epoch / first) ** 0.9)
        else:
            left = (1 - (epoch - first) / max(trainer.num_epochs - first, 1)) ** 0.9
            rates = (settings.learning_rate * left, settings.segmentor_learning_rate * left)
        for optimizer, rate in zip((trainer.optimizer, trainer.segmentor_optimizer), rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate


class HiDiffTrainer(PlannedTrainer):
    """Trains f (segmentor) and g (refiner) by turns and predicts by f, then K steps of g.

    Phase A updates g with KL + focal loss while f is frozen; phase B updates f with its own loss plus the diffusion
    loss while g is frozen. ``self.optimizer`` is the refiner's; its state carries the segmentor's, for the
    checkpoint. In distributed training gradients are averaged here and not by DDP, whose wrapped forward is meant for
    one backward pass over all parameters.
    """

    takes_host_network = True  # an nnU-Net result can be the segmentor
    network: Any  # the network, DDP's wrapper of it, or an answer in its place, see _validated
    inner_network: HiDiffNetwork
    segmentor_optimizer: torch.optim.Optimizer

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        own = self.settings.hidiff
        self._alone = self.num_epochs // 2 if own.pretraining_epochs is None else own.pretraining_epochs
        self.pretraining_epochs = self._alone
        self.pseudo_dice: dict[str, list] = {"prior": [], "refined": []}
        self._resuming = self._untrained = False

    @classmethod
    def reads(cls) -> frozenset[str]:
        """As ``CommonTrainer.reads``."""
        own = section_names("hidiff") - {"hidiff.merit", "hidiff.merit_weights"}
        return LENGTHS | own | {"samples", "seed"}

    @classmethod
    def build_segmentor(
        cls,
        configuration: ConfigurationManager,
        settings: HiDiffSettings,
        num_input_channels: int,
        num_heads: int,
        deep_supervision: bool,
    ) -> Segmentor:
        """The segmentor f, see ``networks.discriminative.Segmentor``: here nnU-Net's own network."""
        return UNetSegmentor(plans_unet(configuration, num_input_channels, num_heads, deep_supervision))

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Segmentor and refiner; called by nnU-Net to train and to predict.

        Raises:
            SettingsError: for unusable settings or environment variables.
            UnsupportedArchitectureError: for an architecture that cannot be used.
        """
        settings = read_settings(configuration_manager.configuration, plans_manager.plans_name)
        settings = sampling_from_environment(settings, "hidiff")
        own = settings.hidiff
        kernel_sizes, strides = refiner_topology(configuration_manager.network_arch_init_kwargs)
        process = BernoulliDiffusion(cosine_beta_schedule(own.timesteps))
        gamma = own.focal_gamma if own.noise_loss == "focal" else 0.0
        network = HiDiffNetwork(
            cls.build_segmentor(
                configuration_manager, own, num_input_channels, num_output_channels, enable_deep_supervision
            ),
            num_input_channels,
            num_output_channels,
            kernel_sizes,
            strides,
            process,
            hidiff_sampling(settings),
            own.refiner_width,
            own.refiner_norm,
            own.binarized,
            own.cross_transformer,
            NoiseCalibration(process, gamma, own.lambda_focal) if own.is_calibrated else None,
            own.corrects_prior,
        )
        network.always_refine = bool(environment_overrides().get("steps"))
        return network

    def _compile(self) -> None:
        self.inner_network.compile_parts()

    def initialize(self) -> None:
        """As nnU-Net's; then the segmentor's weights from an existing result, if there is one."""
        super().initialize()
        self.inner_network.refiner_pays = False  # it is untrained; see _judge_refiner
        self._start_segmentor()
        self.print_to_log_file(f"{type(self).__name__}: {self.settings.hidiff}", also_print_to_console=False)

    def _start_segmentor(self) -> None:
        if self._resuming:
            return  # weights and plan of the training come from the checkpoint that is continued
        own = self.settings.hidiff
        file = find_segmentor(
            self, own.segmentor_trainer if self.takes_host_network else None, own.segmentor_checkpoint
        )
        if file is not None:
            load_segmentor(self.inner_network.segmentor, file)
            self.pretraining_epochs = 0
            self.print_to_log_file(f"segmentor: {file}")
        elif not own.collaborative and not self.pretraining_epochs:
            raise CheckpointError(
                "collaborative is false and pretraining_epochs is 0, but there is no checkpoint of a segmentor: its "
                f"random weights would stay. Train -tr {own.segmentor_trainer} first, or name a file in "
                "hidiff.segmentor"
            )
        else:
            self._untrained = True

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, TurnsSchedule]:
        """Two AdamW; without weight decay, which would shrink weights that only count by their sign."""
        own = self.settings.hidiff
        network = self.inner_network
        optimizer = torch.optim.AdamW(network.refiner.parameters(), own.learning_rate, weight_decay=0.0)
        self.segmentor_optimizer = torch.optim.AdamW(
            network.segmentor.parameters(), own.segmentor_learning_rate, weight_decay=0.0
        )
        keep_in_optimizer_state(optimizer, "hidiff", self._state, self._load_state)
        return optimizer, TurnsSchedule(self)

    def _state(self) -> dict:
        return {
            "segmentor_optimizer": self.segmentor_optimizer.state_dict(),
            "pretraining_epochs": self.pretraining_epochs,
            "pseudo_dice": self.pseudo_dice,
        }

    def _load_state(self, state: dict) -> None:
        self.segmentor_optimizer.load_state_dict(state["segmentor_optimizer"])
        self.pretraining_epochs = state["pretraining_epochs"]
        self.pseudo_dice = state["pseudo_dice"]

    def on_train_start(self) -> None:
        """As nnU-Net's; tells where the segmentor is from: ``-pretrained_weights`` come after ``initialize``."""
        if not self.was_initialized:
            self.initialize()
        start, warm_heads = "no checkpoint to start from" if self._untrained else None, self.inner_network.warm_heads
        if warm_heads is not None:
            self.pretraining_epochs = 0 if warm_heads else self._alone
            start = f"from the warm-start file, {'heads included' if warm_heads else 'with fresh heads'}"
        if start is not None:
            alone = f"it is trained alone for the first {self.pretraining_epochs} of {self.num_epochs} epochs"
            self.print_to_log_file(
                f"segmentor: {start}; {alone if self.pretraining_epochs else 'it is not trained alone first'}"
            )
        super().on_train_start()

    def load_checkpoint(self, filename_or_checkpoint: str | dict) -> None:
        """As nnU-Net's; the segmentor's start is not looked for again."""
        self._resuming = True
        super().load_checkpoint(filename_or_checkpoint)

    @property
    def is_pretraining(self) -> bool:
        """The segmentor is trained alone in this epoch."""
        return self.current_epoch < self.pretraining_epochs

    def train_step(self, batch: dict) -> dict:
        """The segmentor alone, or phase A and phase B on the same batch, time steps and noise."""
        image = batch["data"].to(self.device, non_blocking=True)
        target = self._to_device(batch["target"])
        trains_segmentor = self.is_pretraining or self.settings.hidiff.collaborative
        network = self.inner_network
        discriminative: torch.Tensor | None = None
        draw: Draw | None = None
        with nullcontext() if trains_segmentor else frozen(network.segmentor), self._autocast():
            output = network.segmentor(image)
            if trains_segmentor:
                discriminative = self._discriminative_loss(output, target)
        terms = dict.fromkeys(TERMS, torch.full((), torch.nan))
        losses: list[torch.Tensor] = []
        if not self.is_pretraining:
            draw = self._draw(output, target)
            losses.append(self.refiner_phase(image, output, draw))
            terms["kl"], terms["noise"] = self._diffusion_terms
        if discriminative is not None:
            losses.append(self.segmentor_phase(image, output, discriminative, draw))
            terms["discriminative"] = discriminative.detach()
        if not torch.isfinite(torch.stack(losses).sum()):
            checks.check_images(batch, image)
        if self.grad_scaler is not None:
            self.grad_scaler.update()
        # the segmentor's loss has the refiner's in it (eq. 17), so the last one is the whole of it
        return {"loss": losses[-1].cpu().numpy(), **{name: term.cpu().numpy() for name, term in terms.items()}}

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """As nnU-Net's; then the terms of the loss, each by itself."""
        super().on_train_epoch_end(train_outputs)
        values = {name: np.array([float(o.get(name, np.nan)) for o in train_outputs]) for name in TERMS}
        means = {name: v[np.isfinite(v)].mean() for name, v in values.items() if np.isfinite(v).any()}
        told = [TERMS[name].format(mean) for name, mean in means.items()]
        if told:
            self.print_to_log_file(f"Terms of the loss: {', '.join(told)}")

    def _discriminative_loss(self, output: SegmentorOutput, target: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        """L_Disc, eq. 1: nnU-Net's own loss, deep supervision included."""
        return self.loss(output.heads if self.enable_deep_supervision else output.logits, target)

    @torch.no_grad()
    def _draw(self, output: SegmentorOutput, target: torch.Tensor | list[torch.Tensor]) -> Draw:
        """Time steps, and y_t = y_0 xor eps with eps ~ B((1 - alphas_cumprod) |f(x) - y_0|)."""
        y_start, valid = self.truth(target, MaskEncoding(self.inner_network.num_heads))
        prior = self.inner_network.prior(output.logits)
        # ignored voxels: no ground truth may enter, so the segmentor's own guess stands for it
        y_start = torch.where(valid.bool(), y_start, (torch.rand_like(prior) < prior).float())
        t = torch.randint(self.process.num_timesteps, (len(y_start),))
        y_t = self.process.q_sample(y_start, prior, t, torch.rand_like(prior))
        return Draw(y_start, y_t, t, valid)

    @property
    def process(self) -> BernoulliDiffusion:
        """The network's diffusion process."""
        return self.inner_network.process

    def diffusion_loss(self, image: torch.Tensor, output: SegmentorOutput, draw: Draw) -> torch.Tensor:
        """L_Diff, eq. 13, in bits: one pass of the refiner, mean over the batch."""
        own = self.settings.hidiff
        network = self.inner_network
        prior = network.prior(output.logits)
        with self._autocast():
            eps = network.estimate_noise(image, draw.y_t, prior, draw.t, output.features)
        gamma = own.focal_gamma if own.noise_loss == "focal" else 0.0
        # elementwise, but some twenty maps at full resolution: computed again rather than kept for the backward pass
        bound = checkpoint(
            variational_bound, self.process, eps, draw.y_start, draw.y_t, prior, draw.t, draw.valid, use_reentrant=False
        )
        noise = noise_loss(eps, draw.y_start, draw.y_t, gamma, draw.valid)
        self._diffusion_terms = bound.detach().mean(), noise.detach().mean()
        return (bound + own.lambda_focal * noise).mean()

    def rehearse(self, image: torch.Tensor, target: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        """See ``PlannedTrainer``: the refiner's phase, while the segmentor's graph waits, and the segmentor's."""
        trains_segmentor = self.settings.hidiff.collaborative
        with nullcontext() if trains_segmentor else frozen(self.network.segmentor), self._autocast():
            output = self.network.segmentor(image)
            loss = self._discriminative_loss(output, target)
        draw = self._draw(output, target)
        given = SegmentorOutput(output.logits.detach(), [], [f.detach() for f in output.features])
        self.diffusion_loss(image, given, draw)  # its graph goes here, as by its backward pass
        if not trains_segmentor:
            return loss
        with frozen(self.network.refiner):
            return loss + self.diffusion_loss(image, output, draw)

    def recomputed(self, image: torch.Tensor) -> tuple[list[torch.Tensor], Callable[[], torch.Tensor]]:
        """See ``PlannedTrainer``: the bound."""
        shape = (len(image), self.network.refiner.num_heads, *image.shape[2:])
        eps, prior = (torch.zeros(shape, device=image.device, requires_grad=True) for _ in range(2))
        state, t = torch.zeros(shape, device=image.device), torch.zeros(len(image), dtype=torch.long)
        return [eps, prior, state], lambda: variational_bound(self.process, eps, state, state, prior, t, state[:, :1])

    def held_gradients(self) -> Iterable[nn.Parameter]:
        """See ``PlannedTrainer``."""
        return self.network.segmentor.parameters()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """See ``PlannedTrainer``."""
        return [self.optimizer, self.segmentor_optimizer]

    def refiner_phase(self, image: torch.Tensor, output: SegmentorOutput, draw: Draw) -> torch.Tensor:
        """Phase A: one step of the refiner; the segmentor is not touched. Returns the loss, detached."""
        self.optimizer.zero_grad(set_to_none=True)
        given = SegmentorOutput(output.logits.detach(), [], [f.detach() for f in output.features])
        loss = self.diffusion_loss(image, given, draw)
        self._backward(loss)
        self._step(self.optimizer, self.inner_network.refiner.parameters())
        return loss.detach()

    def segmentor_phase(
        self, image: torch.Tensor, output: SegmentorOutput, discriminative: torch.Tensor, draw: Draw | None
    ) -> torch.Tensor:
        """Phase B, eq. 17: one step of the segmentor; the refiner is not touched. Returns the loss, detached.

        Args:
            image: (B, C, *spatial).
            output: of the segmentor, with its graph.
            discriminative: L_Disc of this output.
            draw: None leaves the diffusion loss out.
        """
        self.segmentor_optimizer.zero_grad(set_to_none=True)
        weight = self.settings.hidiff.lambda_diffusion
        loss = discriminative
        with frozen(self.inner_network.refiner):
            if draw is not None and weight:
                loss = loss + weight * self.diffusion_loss(image, output, draw)
            self._backward(loss)
        self._step(self.segmentor_optimizer, self.inner_network.segmentor.parameters())
        return loss.detach()

    def _step(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        parameters = [p for p in parameters if p.grad is not None]
        if self.is_ddp:
            gradients = [p.grad for p in parameters if p.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for gradient, mean in zip(gradients, flat.split([p.numel() for p in parameters]), strict=True):
                gradient.copy_(mean.view_as(gradient))
        self._update(optimizer, parameters, GRADIENT_CLIP)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """As nnU-Net's, for the segmentor."""
        self.inner_network.set_deep_supervision(enabled and self.enable_deep_supervision)

    def validation_step(self, batch: dict) -> dict:
        """As nnU-Net's, for the prior and, once the refiner is trained, for the refined mask: the one that counts."""
        checks.check_images(batch, batch["data"])
        network = self.inner_network
        image, target = batch["data"].to(self.device, non_blocking=True), batch["target"]
        kept = [x.clone() for x in target] if isinstance(target, list) else target.clone()  # nnU-Net changes it
        with self._autocast():
            output = network.segmentor(image)
            refined = None if self.is_pretraining else network.refine(image, output, self._validation_sampling())
        found = prior = self._validated(batch, image, network.prior_answer(output))
        if refined is not None:
            found = self._validated({**batch, "target": kept}, image, refined)
        return {**found, **{f"prior_{key}": prior[key] for key in ("tp_hard", "fp_hard", "fn_hard")}}

    def _validation_sampling(self) -> SamplingConfig:
        """One sample of as many steps as a prediction has, within limits."""
        steps = min(max(self.settings.hidiff.steps, 1), VALIDATION_STEPS)
        sampling = hidiff_sampling(self.settings, steps)
        assert sampling is not None, "there is at least one step"
        return replace(sampling, samples=1)

    def _validated(self, batch: dict, image: torch.Tensor, answer: torch.Tensor | list[torch.Tensor]) -> dict:
        """nnU-Net's validation of an answer that is there already."""
        network, self.network = self.network, lambda image: answer
        try:
            return super().validation_step({**batch, "data": image})
        finally:
            self.network = network

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """As nnU-Net's; then prior and refined pseudo Dice side by side."""
        super().on_validation_epoch_end(
            [{k: v for k, v in o.items() if not k.startswith("prior_")} for o in val_outputs]
        )
        sums = [sum(o[f"prior_{key}"] for o in val_outputs) for key in ("tp_hard", "fp_hard", "fn_hard")]
        if self.is_ddp:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, sums)
            sums = [sum(parts) for parts in zip(*gathered, strict=True)]
        tp, fp, fn = sums
        with np.errstate(invalid="ignore"):
            prior = 2 * tp / (2 * tp + fp + fn)
        refined = np.asarray(self.logger.get_value("dice_per_class_or_region", step=-1))
        for name, values in (("prior", prior), ("refined", refined)):
            self.pseudo_dice[name].append([float(v) for v in values])
        self._judge_refiner()

    @property
    def gain(self) -> float:
        """Recent pseudo Dice of refined masks minus that of the prior; NaN if no class is in any."""
        recent = [np.array(self.pseudo_dice[name][-RECENT_EPOCHS:], dtype=float) for name in ("refined", "prior")]
        difference = recent[0] - recent[1]
        return float(np.mean(difference[np.isfinite(difference)])) if np.isfinite(difference).any() else np.nan

    def _judge_refiner(self) -> None:
        """Tell the network, which stores it with its weights, whether predictions are to use the refiner."""
        self.inner_network.refiner_pays = not self.is_pretraining and not self.gain < 0

    def on_epoch_end(self) -> None:
        """As nnU-Net's; what the refiner brings is printed first, and the best epoch is looked for among those with it.

        The pseudo Dice before its first epoch is the prior's: ``checkpoint_best`` would keep an untrained refiner for
        as long as refined masks are worse.
        """
        if not self.is_pretraining:
            prior, refined = (np.array(self.pseudo_dice[name][-1]) for name in ("prior", "refined"))
            steps = self._validation_sampling().steps
            self.print_to_log_file(
                f"Pseudo dice of the prior {np.round(prior, 4).tolist()}, refined in {steps} "
                f"step{'s' * (steps > 1)} {np.round(refined, 4).tolist()}, "
                f"mean difference {100 * np.nanmean(refined - prior):+.2f} points"
            )
        if self.current_epoch == self.pretraining_epochs:
            self._best_ema = None
        super().on_epoch_end()

    def on_train_end(self) -> None:
        """As nnU-Net's; then a word if the refiner does not pay."""
        super().on_train_end()
        if not self.is_pretraining and self.gain < 0:
            self.print_to_log_file(
                f"The refiner does not pay yet: {100 * self.gain:+.2f} points of pseudo Dice to the prior. Predictions "
                "give the segmentor's own masks, unless steps are asked for. Train longer."
            )
