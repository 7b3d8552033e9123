"""HiDiff behind nnU-Net's one call: a segmentor, and a Bernoulli-diffusion refiner of its mask (Chen et al. 2024)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from nnunetv2_diffusion.diffusion import BernoulliDiffusion, NoiseCalibration
from nnunetv2_diffusion.networks.chain_network import ChainNetwork
from nnunetv2_diffusion.networks.discriminative import Segmentor, SegmentorOutput, cumulative_strides
from nnunetv2_diffusion.networks.refiner import Refiner
from nnunetv2_diffusion.sampling import (
    BernoulliChain,
    Chain,
    Estimator,
    SamplingConfig,
    SinglePass,
    Window,
    mean_of_samples,
)
from nnunetv2_diffusion.sampling.views import View

# bits of the extra state beside the lowest, which says that heads are regions; all are 0 in version 0.1
REFINER_UNUSED = 2  # by the trainer's verdict
STARTS_FROM_TRAINED_LOSS = 4  # see ``HiDiffNetwork.prior_logits``

MAX_STAGES = 6  # the paper's refiner goes down to 1/32; deeper maps of a 2D network have few voxels left
FIRST_CONDITION = 2  # features enter from the third stage on, as in the published refiner (1/4 and coarser)


def refiner_topology(arch_kwargs: Mapping) -> tuple[list[list[int]], list[list[int]]]:
    """Kernel sizes and strides of the refiner's stages, from the plans' ``arch_kwargs``."""
    axes = max(len(s) if isinstance(s, (list, tuple)) else 1 for s in arch_kwargs["strides"])

    def per_axis(values: list) -> list[list[int]]:
        return [list(v) if isinstance(v, (list, tuple)) else [v] * axes for v in values[:MAX_STAGES]]

    return per_axis(arch_kwargs["kernel_sizes"]), per_axis(arch_kwargs["strides"])


def match_features(
    feature_strides: list[tuple[int, ...]], strides: list[list[int]], first: int = FIRST_CONDITION
) -> dict[int, int]:
    """Which feature of a segmentor enters each stage of the refiner: that of the nearest stride.

    Args:
        feature_strides: cumulative, fine to coarse.
        strides: of the refiner, from stage to stage.
        first: first stage with a feature; the last stage has one in any case.

    Returns:
        stage -> index of the feature. With nnU-Net's own network strides agree exactly.
    """
    stages = cumulative_strides(strides)

    def size(stride: tuple[int, ...]) -> float:
        return math.log(math.prod(stride))

    return {
        stage: min(range(len(feature_strides)), key=lambda i: abs(size(feature_strides[i]) - size(stages[stage])))
        for stage in range(min(first, len(stages) - 1), len(stages))
    }


class HiDiffNetwork(ChainNetwork):
    """Segmentor f, refiner g and the process between f(image) and the mask.

    ``forward(image)`` is what nnU-Net calls to predict: the segmentor once, then K refinement steps from
    y_T ~ B(f(image)); the soft estimate is returned as bounded logits. K = 0 returns the segmentor's own logits.

    Args:
        segmentor: see ``networks.discriminative.Segmentor``.
        image_channels: C.
        num_heads: K classes, background included, or regions.
        kernel_sizes: of the refiner's stages.
        strides: of the refiner's stages, from each to the next; of the first all 1.
        process: trained diffusion process.
        sampling: how predictions are drawn; None for K = 0. May be replaced at any time.
        width: channels of the refiner's first stage.
        norm: "instance" or "batch", in the refiner.
        binarized: 1-bit weights and activations in the refiner.
        cross_transformer: exchange features at the bottleneck by the X-Former.
        calibration: of the loss that the refiner is trained with; None takes its outputs as they are.
        prior_residual: the refiner's output corrects the logit of the prior's mask, see ``estimate_noise``.

    Attributes:
        refiner_pays: whether the training found the refined masks no worse than the prior; stored with the weights. If
            not, the prior is predicted. True for weights of version 0.1, which do not tell.
        always_refine: refine all the same, because somebody asked for steps.

    Raises:
        ValueError: if sampling wants more steps than the process has.
    """

    min_probability = 1e-4  # one tile that is too sure must not outvote the others: estimates are nearly binary
    parts = ("segmentor", "refiner")
    least_steps = 0

    def __init__(
        self,
        segmentor: Segmentor,
        image_channels: int,
        num_heads: int,
        kernel_sizes: list[list[int]],
        strides: list[list[int]],
        process: BernoulliDiffusion,
        sampling: SamplingConfig | None,
        width: int = 32,
        norm: str = "instance",
        binarized: bool = True,
        cross_transformer: bool = True,
        calibration: NoiseCalibration | None = None,
        prior_residual: bool = True,
    ):
        super().__init__()
        self.segmentor = segmentor
        self.prior_residual = prior_residual
        self.calibration = calibration
        self._starts = self._starts_at_first(process, calibration)
        self._starts_from_trained_loss = True
        self.refiner_pays, self.always_refine, self._told = True, False, False
        self.num_heads = num_heads
        self.process = process
        self.sampling = sampling
        if sampling is not None:
            self.respace(sampling)  # raises now rather than at the first prediction
        self.matches = match_features(segmentor.feature_strides, strides)
        self.strides = cumulative_strides(strides)
        channels = {stage: segmentor.feature_channels[index] for stage, index in self.matches.items()}
        if not cross_transformer:
            channels.pop(len(strides) - 1)
        start = {"noise_probability": 0.5} if prior_residual else {}  # adds nothing to the prior's logits
        self.refiner = Refiner(
            image_channels, num_heads, kernel_sizes, strides, channels, width, norm, binarized, cross_transformer,
            **start,
        )  # fmt: skip

    @staticmethod
    def _starts_at_first(
        process: BernoulliDiffusion, calibration: NoiseCalibration | None
    ) -> dict[bool, NoiseCalibration]:
        """What ``prior_logits`` inverts: the trained loss, or as in version 0.1 its focal part alone (False)."""
        focal = NoiseCalibration(process, calibration.gamma if calibration else 0.0, bound=False)
        return {True: calibration or focal, False: focal}

    def get_extra_state(self) -> torch.Tensor:
        """See ``HeadsMixin``; and whether the refiner pays, and from which logits it starts, as bits of one integer."""
        flags = REFINER_UNUSED * (not self.refiner_pays) + STARTS_FROM_TRAINED_LOSS * self._starts_from_trained_loss
        return super().get_extra_state() + flags

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Restored with the weights."""
        super().set_extra_state(state)
        flags = int(state.item())
        self.refiner_pays = not flags & REFINER_UNUSED
        self._starts_from_trained_loss = bool(flags & STARTS_FROM_TRAINED_LOSS)

    def uses_refiner(self) -> bool:
        """Whether a prediction refines the prior; if the refiner does not pay, it does not, and says so once."""
        if self.refiner_pays or self.always_refine:
            return True
        if not self._told:
            print(
                "nnunetv2_diffusion: the refiner of these weights is untrained, or made masks worse in its training; "
                "the segmentor's own masks are given. nnUNet_diffusion_steps=K or --steps K uses the refiner all the "
                "same"
            )
        self._told = True
        return False

    def compile_parts(self, **kwargs: Any) -> None:
        """torch.compile both networks in place; the loop stays outside and names in the state dict do not change."""
        self.segmentor.compile(**kwargs)
        self.refiner.compile(**kwargs)

    def compile_passes(self) -> None:
        """As the host asks for by compiling the whole network to predict: both networks by themselves, once."""
        if self.refiner._compiled_call_impl is None:
            self.compile_parts()

    def prior(self, logits: torch.Tensor) -> torch.Tensor:
        """f(image): probabilities of the segmentor's logits, float32 also under autocast."""
        with torch.autocast(logits.device.type, enabled=False):
            return self.probabilities(logits)

    def estimate_noise(
        self, image: torch.Tensor, y_t: torch.Tensor, prior: torch.Tensor, t: torch.Tensor, features: list[torch.Tensor]
    ) -> torch.Tensor:
        """Logits of the Bernoulli noise between y_t and the mask, (B, K, *spatial); one pass of the refiner.

        Args:
            image: (B, C, *spatial).
            y_t: state, 0 or 1, (B, K, *spatial).
            prior: f(image), (B, K, *spatial).
            t: training time index (B,), 0-based.
            features: of the segmentor, fine to coarse.
        """
        given = (image, y_t, prior, t.to(image.device), self._conditions(image, features))
        logits = self.refiner(*given)
        if self.prior_residual:
            # The refiner corrects the logit of the mask, which says the same whatever was drawn as y_t. A correction
            # of the noise's logit would have to change its sign with every voxel of y_t's speckle.
            logits = (1 - 2 * y_t) * logits.float() + self.prior_logits(y_t, prior, t)
        return logits

    def noise_probability(
        self,
        image: torch.Tensor,
        y_t: torch.Tensor,
        prior: torch.Tensor,
        t: torch.Tensor,
        features: list[torch.Tensor] | None,
    ) -> torch.Tensor:
        """P(y_t is wrong), calibrated, (B, K, *spatial) in float32; arguments as for ``estimate_noise``."""
        assert features is not None, "windows of this network have the segmentor's features, see look"
        logits = self.estimate_noise(image, y_t, prior, t, features).float()
        with torch.autocast(logits.device.type, enabled=False):
            if self.calibration is not None:
                logits = self.calibration.logits(logits, y_t, prior.float(), t)
            return logits.sigmoid()

    @torch.no_grad()
    def prior_logits(self, y_t: torch.Tensor, prior: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Logits of the noise in y_t as far as prior and t tell, as the trained loss would make them.

        If the mask is drawn from the prior, Bayes gives P(y_t is wrong) = (1 - alphas_cumprod) |prior - y_t|. Before
        training, refinement then draws masks from the prior, and one step (K = 1) returns the prior itself. Without
        it, an undertrained refiner lets y_T's speckle pass, and takes it for truth in the next step.

        Weights of version 0.1 were trained to correct what the focal loss alone would make of it, and go on doing so.
        """
        with torch.autocast(prior.device.type, enabled=False):
            return self.start.prior_logits(y_t, prior.float(), t)

    @property
    def start(self) -> NoiseCalibration:
        """What ``prior_logits`` inverts."""
        return self._starts[self._starts_from_trained_loss]

    def _conditions(self, image: torch.Tensor, features: list[torch.Tensor]) -> dict[int, torch.Tensor]:
        """Features on the grids of the stages that they enter."""
        conditions = {}
        for stage, index in self.matches.items():
            grid = tuple(-(-n // s) for n, s in zip(image.shape[2:], self.strides[stage], strict=True))
            feature = features[index]
            if feature.shape[2:] != grid:
                mode = "bilinear" if len(grid) == 2 else "trilinear"
                feature = F.interpolate(feature, grid, mode=mode, align_corners=False)
            conditions[stage] = feature
        return conditions

    def forward(self, image: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Predict; see ``predict``."""
        return self.predict(image, torch.compiler.is_compiling())

    @torch.compiler.disable  # with all that it calls: a loop would be compiled anew for every step, up to a limit
    def predict(self, image: torch.Tensor, compiled: bool = False) -> torch.Tensor | list[torch.Tensor]:
        """The refined mask, or the prior if sampling is None or the refiner does not pay.

        Args:
            image: (B, C, *spatial), finite.
            compiled: the caller is compiled, so both networks are to be, each by itself.

        Returns:
            logits (B, K, *spatial); under deep supervision a list, whose coarser maps are those of the segmentor or,
            refined, the fine one on their grid.

        Raises:
            ValueError: for an image with NaN or infinite values.
            NotFiniteError: for an answer that is not finite.
        """
        if compiled:
            self.compile_passes()
        output = self.segmentor(image)
        if self.sampling is None or not self.uses_refiner():
            return self.prior_answer(output)
        return self.refine(image, output, self.sampling)

    def prior_answer(self, output: SegmentorOutput) -> torch.Tensor | list[torch.Tensor]:
        """The segmentor's own logits, as ``predict`` returns them.

        Raises:
            NotFiniteError: for logits that are not finite.
        """
        self.check_answer(output.logits)
        return output.heads if self._deep_supervision else output.logits

    def refine(
        self, image: torch.Tensor, output: SegmentorOutput, config: SamplingConfig
    ) -> torch.Tensor | list[torch.Tensor]:
        """The mean over samples of the refined mask, as ``predict`` returns it.

        Args:
            image: (B, C, *spatial), finite.
            output: of the segmentor.
            config: how to sample.

        Raises:
            ValueError: for an image with NaN or infinite values.
            NotFiniteError: for probabilities that are not finite.
        """
        known: dict[View, Window] = {(): self._window(image, output)}
        estimator = Estimator(BernoulliChain(self, config), image, windows=known)
        answer = self.bounded_logits(mean_of_samples(estimator, config))
        if not self._deep_supervision:
            return answer
        return [answer, *[F.interpolate(answer, head.shape[2:]) for head in output.heads[1:]]]

    def _window(self, image: torch.Tensor, output: SegmentorOutput) -> Window:
        return Window(image, self.prior(output.logits), output.features)

    def look(self, image: torch.Tensor) -> Window:
        """What every step needs of images (B, C, *spatial): prior and features of the segmentor."""
        return self._window(image, self.segmentor(image))

    def make_chain(self, config: SamplingConfig | None) -> Chain:
        """See ``ChainNetwork``: the refinement from y_T ~ B(f(image)) (algorithm 2), or the segmentor alone."""
        if config is not None and self.uses_refiner():
            return BernoulliChain(self, config)
        return SinglePass(_PriorOnly(self), self.sigmoid, 1 if config is None else config.steps)

    def respace(self, config: SamplingConfig) -> None:
        """See ``ChainNetwork``."""
        self.process.respace(config.steps, config.step_spacing)

    def resolve(self, given: Mapping[str, Any], insist: bool = False) -> SamplingConfig | None:
        """See ``ChainNetwork``; steps that somebody asks for are made even if the refiner does not pay."""
        self.always_refine = insist
        return super().resolve(given, insist)

    @property
    def _deep_supervision(self) -> bool:
        decoder = getattr(self.segmentor, "decoder", None)
        return bool(getattr(decoder, "deep_supervision", False))

    def set_deep_supervision(self, enabled: bool) -> None:
        """Switch coarse heads of a segmentor that has them as nnU-Net's do."""
        decoder = getattr(self.segmentor, "decoder", None)
        if decoder is not None and hasattr(decoder, "deep_supervision"):
            decoder.deep_supervision = enabled


class _PriorOnly(nn.Module):
    """HiDiff's segmentor as a network with one output."""

    def __init__(self, network: HiDiffNetwork):
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network.segmentor(image).logits
