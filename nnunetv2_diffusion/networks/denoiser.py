"""nnU-Net's own U-Net with inputs for a noisy mask and a time step."""

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunetv2_diffusion.networks.time_conditioning import ModulatedInstanceNorm, NormConditioning, TimeConditioning
from nnunetv2_diffusion.networks.transformer import BottleneckTransformer

SUPPORTED = (PlainConvUNet, ResidualEncoderUNet)
INSTANCE_NORMS = (nn.InstanceNorm2d, nn.InstanceNorm3d)
OTHER_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


class UnsupportedArchitectureError(NotImplementedError):
    """The plans' network cannot be given mask channels and time."""


def _widen_first_conv(encoder: nn.Module, extra_channels: int) -> None:
    """Add input channels with zero weights to the first convolution, in place and under the same names."""
    conv = next(m for m in encoder.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    new = conv.weight.new_zeros(conv.out_channels, extra_channels, *conv.kernel_size)
    conv.weight = nn.Parameter(torch.cat([conv.weight.detach(), new], dim=1))
    conv.in_channels += extra_channels


def _modulate_norms(module: nn.Module) -> list[ModulatedInstanceNorm]:
    """Replace every instance norm below module, keeping names and parameters; returns the new ones in order.

    nnU-Net's blocks register a norm twice (``norm`` and inside ``all_modules``): both places get the same object.
    """
    replaced: dict[nn.Module, ModulatedInstanceNorm] = {}
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, INSTANCE_NORMS):
                continue
            if not child.affine:
                raise UnsupportedArchitectureError(
                    "the plans' network has instance norms without affine parameters "
                    "(norm_op_kwargs.affine is false); expected affine: true"
                )
            if child not in replaced:
                replaced[child] = ModulatedInstanceNorm(child)
            setattr(parent, name, replaced[child])
    return list(replaced.values())


def _check_architecture(network: nn.Module) -> None:
    if not isinstance(network, SUPPORTED):
        raise UnsupportedArchitectureError(
            f"the plans' network is {type(network).__module__}.{type(network).__name__}; the diffusion trainers "
            f"support {' and '.join(c.__name__ for c in SUPPORTED)}. Plan with a stock nnU-Net planner."
        )
    modules = list(network.modules())
    others = [type(m).__name__ for m in modules if isinstance(m, OTHER_NORMS)]
    if others or not any(isinstance(m, INSTANCE_NORMS) for m in modules):
        raise UnsupportedArchitectureError(
            f"the plans' network normalises with {others[0] if others else 'no norm that is known'} (norm_op); the "
            "diffusion trainers need InstanceNorm, as nnU-Net plans it: it carries the time step, and batch statistics "
            "would mix the two passes of a training step"
        )


class DenoisingUNet(nn.Module):
    """A plans' U-Net f(image, mask, t) -> logits, with ``encoder`` and ``decoder`` under nnU-Net's names.

    Additions start as the identity: new weights of the first convolution, of the time projection and of the
    transformer's branches are zero, so with copied weights the logits are those of the stock network.

    Args:
        unet: PlainConvUNet or ResidualEncoderUNet built for the image channels alone; it is taken over and changed.
        mask_channels: C_mask, channels of the noisy mask, K for one-hot; 0 for a network without mask.
        self_conditioning: C_mask further channels for the estimate of the pass before.
        time_conditioning: modulate every norm with the time step.
        latent_channels: modulate every norm with a code of so many numbers instead; 0 for none.
        transformer_layers: layers at the bottleneck; 0 for none.
        transformer_heads: attention heads.
        transformer_width: share of the bottleneck's channels that attention works in.

    Raises:
        UnsupportedArchitectureError: for another architecture or normalisation.
        ValueError: for time and code together.
    """

    def __init__(
        self,
        unet: PlainConvUNet | ResidualEncoderUNet,
        mask_channels: int,
        self_conditioning: bool = False,
        time_conditioning: bool = True,
        transformer_layers: int = 1,
        transformer_heads: int = 8,
        transformer_width: float = 0.25,
        latent_channels: int = 0,
    ):
        super().__init__()
        if time_conditioning and latent_channels:
            raise ValueError(f"latent_channels is {latent_channels} with time_conditioning, expected one of them")
        _check_architecture(unet)
        self.mask_channels = mask_channels
        self.self_conditioning = self_conditioning
        self.encoder = unet.encoder
        self.decoder = unet.decoder
        extra_channels = mask_channels * (2 if self_conditioning else 1)
        if extra_channels:
            _widen_first_conv(self.encoder, extra_channels)
        self.time: TimeConditioning | None = None
        self.latent: NormConditioning | None = None
        # norms of the encoder are reached through the decoder as well, which holds a reference to it
        self._norms = tuple(_modulate_norms(self.decoder)) if time_conditioning or latent_channels else ()
        # as wide as the first stage: enough for functions of few numbers, and small in small networks too
        dim = max(16, self.encoder.output_channels[0])
        if time_conditioning:
            self.time = TimeConditioning(list(self._norms), dim + dim % 2)
        if latent_channels:
            self.latent = NormConditioning(list(self._norms), latent_channels, max(32, dim))
        channels = self.encoder.output_channels[-1]
        self.transformer = (
            BottleneckTransformer(channels, transformer_layers, transformer_heads, transformer_width)
            if transformer_layers
            else None
        )

    def denoise(
        self,
        image: torch.Tensor,
        mask: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
        estimate: torch.Tensor | None = None,
        full_resolution_only: bool = False,
        latent: torch.Tensor | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """One pass through the network.

        Args:
            image: (B, C, *spatial).
            mask: noisy mask (B, C_mask, *spatial) in [0, 1]; None if the network has no mask channels.
            t: training time index (B,); None if the network has no time conditioning.
            estimate: encoded probabilities (B, C_mask, *spatial) of the pass before; None stands for zeros.
            full_resolution_only: leave out the deep-supervision heads even if they are enabled.
            latent: code (B, latent_channels); None if the network takes none.

        Returns:
            logits (B, K, *spatial), or a list of them from fine to coarse under deep supervision.
        """
        x = self._stack_inputs(image, mask, estimate)
        modulations = self._modulations(t, latent)
        supervised = self.decoder.deep_supervision
        try:  # a pass that fails, for want of memory, leaves the network as it was
            if full_resolution_only:
                self.decoder.deep_supervision = False
            for norm, modulation in zip(self._norms, modulations, strict=True):
                norm.modulation = modulation
            skips = self.encoder(x)
            if self.transformer is not None:
                skips[-1] = self.transformer(skips[-1])
            return self.decoder(skips)
        finally:
            for norm in self._norms:
                norm.modulation = None
            self.decoder.deep_supervision = supervised

    def _modulations(self, t: torch.Tensor | None, latent: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Of every norm; none for a network that takes neither time nor code."""
        if self.time is not None:
            return self.time(t)
        return () if self.latent is None else self.latent(latent)

    def _stack_inputs(
        self, image: torch.Tensor, mask: torch.Tensor | None, estimate: torch.Tensor | None
    ) -> torch.Tensor:
        if not self.mask_channels:
            return image
        assert mask is not None, "a network with mask channels is given a mask"
        inputs = [image, mask.to(image.dtype)]
        if self.self_conditioning:
            inputs.append(torch.zeros_like(mask) if estimate is None else estimate.to(image.dtype))
        return torch.cat(inputs, dim=1)
