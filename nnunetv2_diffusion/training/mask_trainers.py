"""Trainers whose masks tell more: recycled across views, or mixed with the ground truth."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform

from nnunetv2_diffusion.diffusion import make_encoding
from nnunetv2_diffusion.networks import DiffusionSegmentor
from nnunetv2_diffusion.planning.settings import DiffusionSettings
from nnunetv2_diffusion.training.corruption import make_corruption
from nnunetv2_diffusion.training.strategies import RecycleMixed, RecycleView
from nnunetv2_diffusion.training.trainer import DiffusionTrainer
from nnunetv2_diffusion.training.views import Frame, Views, look, look_at_labels, patch_frame


class ViewTrainer(DiffusionTrainer):
    """Recycles across views, and both passes learn (settings: section ``views``).

    Where a view reaches beyond the patch, training loads and augments a larger one. The network's own patch is its
    centre, so what is trained on, its place in a case included, is what nnU-Net would have loaded. Validation loads
    the planned patch.
    """

    strategy = RecycleView()

    def _configured(self, strategy: RecycleView) -> RecycleView:
        return replace(strategy, views=Views(self.settings.views.coarse, self.settings.views.zoom))

    @property
    def loaded_size(self) -> tuple[int, ...]:
        """Voxels that training loads along each axis."""
        patch = self.configuration_manager.patch_size
        return tuple(n + 2 * m for n, m in zip(patch, self.strategy.views.margin(patch), strict=True))

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:  # noqa: N802, nnU-Net's name
        """As nnU-Net's, with more room around the patch."""
        rotation, dummy_2d, initial, mirror_axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        patch = np.array(self.configuration_manager.patch_size)
        enlarged = -(-np.array(initial) * np.array(self.loaded_size) // patch)  # in proportion, rounded up
        return rotation, dummy_2d, enlarged, mirror_axes

    def get_training_transforms(
        self,
        patch_size: Any,
        rotation_for_DA: Any,  # noqa: N803, nnU-Net's name
        deep_supervision_scales: Any,
        *args: Any,
        **kwargs: Any,
    ) -> BasicTransform:
        """As nnU-Net's for the larger patch; its targets of deep supervision are made after it is cut.

        A method where nnU-Net has a static one: it is called in the same way.
        """
        if self.loaded_size != tuple(patch_size):
            patch_size, deep_supervision_scales = self.loaded_size, None
        return super().get_training_transforms(patch_size, rotation_for_DA, deep_supervision_scales, *args, **kwargs)

    def on_train_epoch_start(self) -> None:
        """As nnU-Net's; the share of true masks falls from epoch to epoch."""
        super().on_train_epoch_start()
        until = self.settings.views.truth_until * self.num_epochs
        share = max(0.0, 1 - self.current_epoch / until) if until else 0.0
        self.strategy = replace(self.strategy, truth_share=share)

    def _training_loss(self, image: torch.Tensor, target: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        self._loaded_target = target[0] if isinstance(target, list) else target
        return (super()._training_loss(image, self._patch_target(target)) + self._first_loss) / 2

    def _draw_time_range(self) -> tuple[int, int]:
        steps, views = self.process.num_timesteps, self.settings.views
        if views.noise_share and float(torch.rand(())) < views.noise_share:
            return steps - 1, steps  # where no mask can be seen
        return 0, max(1, min(super()._draw_time_range()[1], round(views.time_below * steps)))

    def _origin(self, loaded: torch.Tensor) -> tuple[int, ...]:
        """First voxel of the patch in what was loaded, (B, C, *loaded)."""
        patch = self.configuration_manager.patch_size
        return tuple((n - m) // 2 for n, m in zip(loaded.shape[2:], patch, strict=True))

    def _seen(self, image: torch.Tensor, view: Frame) -> torch.Tensor:
        """What a view shows of the image that was loaded."""
        return look(image, view, self._origin(image))

    def _patch(self, image: torch.Tensor) -> torch.Tensor:
        return self._seen(image, patch_frame(self.configuration_manager.patch_size))

    def _patch_target(self, target: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """The target of the patch, for every head of deep supervision."""
        if isinstance(target, list):  # nothing larger was loaded
            return target
        return self._heads(self._patch(target))

    def _heads(self, own: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Targets of deep supervision, if there is any, of a target at full resolution."""
        scales = self._get_deep_supervision_scales()
        if scales is None:
            return own
        heads = DownsampleSegForDSTransform(scales)(segmentation=own.flatten(0, 1))["segmentation"]
        return [head.unflatten(0, own.shape[:2]) for head in heads]

    def _first_pass(self, image: torch.Tensor) -> Callable[..., torch.Tensor]:
        """predict(x, t, view=view) for the strategy: a pass that learns what the view shows of the loaded image.

        It has half of the step's loss, and its gradient is added at once: so the activations of one pass are held at
        a time, as in recycling. Processes share the gradient of the second pass, into which this one is summed. No
        cache, as in the first pass of recycling.
        """

        def predict(x: torch.Tensor, t: torch.Tensor, view: Frame) -> torch.Tensor:
            apart = self.network.no_sync() if self.is_ddp else nullcontext()
            with apart, self._autocast(cache_enabled=False):
                output = self.network(self._seen(image, view), x, self.process.timestep_map[t], None)
                own = look_at_labels(self._loaded_target, view, self._origin(image))
                loss = self.loss(output, self._heads(own))
                self._backward(loss / 2)
            self._first_loss = loss.detach()
            logits = output[0] if isinstance(output, list | tuple) else output
            network = self.inner_network
            return network.encoding.encode(network.probabilities(logits.detach()))

        return predict


class MixedTrainer(DiffusionTrainer):
    """Recycles the masks of some samples and noises the ground truth of others (settings: section ``mixture``)."""

    strategy = RecycleMixed()

    def _configured(self, strategy: RecycleMixed) -> RecycleMixed:
        own = self.settings.mixture
        encoding = make_encoding(self.settings.mask_encoding, self.label_manager.num_segmentation_heads)
        return replace(
            strategy,
            share=own.recycle_share,
            truth_above=own.truth_above,
            corruption=make_corruption(own.truth_corruption, encoding, self.label_manager.has_regions),
            mask_scale=own.mask_scale,
        )

    @classmethod
    def _extend(cls, network: DiffusionSegmentor, settings: DiffusionSettings) -> None:
        network.mask_scale = settings.mixture.mask_scale
