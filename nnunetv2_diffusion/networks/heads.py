"""What every module behind ``network(image) -> logits`` shares: the meaning of its heads, and readable errors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

HOST_SKIPS = ".seg_layers."  # in keys that nnU-Net's -pretrained_weights does not load


class NotFiniteError(ValueError):
    """A network's answer has NaN or infinite values."""


def is_finite(x: torch.Tensor) -> bool:
    """Whether all values are finite, by one sum: no map of the tensor's size is made."""
    return bool(torch.isfinite(x.sum(dtype=torch.float32)))


@torch.compiler.disable  # it looks at values
def check_answer(x: torch.Tensor, network: nn.Module | None = None) -> None:
    """Raise unless all values of an answer are finite.

    Args:
        x: probabilities or bounded logits of any shape.
        network: that gave them, whose weights are looked at if they are not.

    Raises:
        NotFiniteError: naming how many are not, and the weights if it is these.
    """
    if is_finite(x):
        return
    count = int((~torch.isfinite(x)).sum())
    if not count:
        return  # finite, but too large to be summed up
    parameters = network.named_parameters() if network is not None else ()
    weights = [name for name, weight in parameters if not torch.isfinite(weight).all()]
    found = f"the network's answer has {count} NaN or infinite values among {x.numel()}"
    if weights:
        raise NotFiniteError(
            f"{found}: {len(weights)} of its weights are not finite, {weights[0]} for example. The training that wrote "
            "this checkpoint diverged; predict with an earlier one (-chk checkpoint_best.pth), or train again with a "
            "lower learning rate"
        )
    raise NotFiniteError(
        f"{found}, its weights are finite. Check the image for NaN, infinite or extreme intensities; on a GPU half "
        "precision can overflow, which -device cpu avoids"
    )


class HeadsMixin(nn.Module):
    """Heads that are exclusive classes or independent regions.

    Set ``sigmoid`` if heads are regions; it is stored with the weights, because nnU-Net does not tell the network at
    inference. Put it in front of the module class.
    """

    min_probability: float  # bounds the logits: nnU-Net adds them up, times a weight of 10, in half precision
    parts: tuple[str, ...] = ()  # names of children that settings can leave out
    warm_heads: bool | None  # from a warm-start file, all heads trained or not; None: they are from no such file

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sigmoid = False
        self.warm_heads = None

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Softmax over heads, or sigmoid for regions, in float32."""
        logits = logits.float()
        return logits.sigmoid() if self.sigmoid else logits.softmax(1)

    def bounded_logits(self, p: torch.Tensor) -> torch.Tensor:
        """Logits whose softmax or sigmoid is p, bounded by ``min_probability``.

        Raises:
            NotFiniteError: if p is not finite: its logits would be an empty mask.
        """
        self.check_answer(p)
        if self.sigmoid:
            return torch.logit(p, eps=self.min_probability)
        return p.clamp(min=self.min_probability).log()

    def check_answer(self, x: torch.Tensor) -> None:
        """See the function ``check_answer``; weights that are not finite are named."""
        check_answer(x, self)

    def get_extra_state(self) -> torch.Tensor:
        """Stored with the weights, as a tensor like everything that nnU-Net expects there: heads are regions."""
        return torch.tensor([int(self.sigmoid)])

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Restored with the weights."""
        self.sigmoid = bool(int(state.item()) & 1)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, but a checkpoint of another network is named as such instead of listing every key.

        Heads that a warm-start file carries are taken along, see ``carry_heads``.
        """
        problem = describe_mismatch(self.state_dict(), state_dict, self.parts) if strict else None
        if problem:
            raise RuntimeError(problem)
        result = super().load_state_dict(state_dict, strict, assign)
        heads = getattr(state_dict.get("_extra_state"), "warm_heads", None)
        partly = getattr(state_dict.get("_extra_state"), "warm_partly", False)
        self.warm_heads = None if heads is None else bool(heads) and not partly
        if heads:
            super().load_state_dict(heads, strict=False)
            print(f"nnunetv2_diffusion: segmentation heads taken from the warm-start file, {len(heads)} tensors")
        return result


def carry_heads(weights: Mapping[str, torch.Tensor], copied: bool, complete: bool = True) -> None:
    """Mark the weights of a ``HeadsMixin`` as a warm start, in place, and let its heads pass nnU-Net's loader.

    nnU-Net's ``-pretrained_weights`` keeps the network's own value of every key with ``.seg_layers.``, and demands
    all others. A further key for the heads would thus be demanded of every checkpoint, those of earlier trainings
    included. So the heads are an attribute of the extra state, which nnU-Net hands to the network as it is, and which
    ``torch.save`` and ``torch.load`` keep, ``weights_only`` included. Checkpoints without it load as ever.

    Args:
        weights: state dict, ``_extra_state`` included.
        copied: the heads are to be taken along; otherwise those of the network stay, as in nnU-Net's fine-tuning.
        complete: all heads are trained ones; otherwise some that are taken along are fresh.
    """
    carried = {key: w for key, w in weights.items() if copied and is_carried(key)}
    state: Any = weights["_extra_state"]  # Any: tensors can have attributes, their type knows none
    state.warm_heads = carried
    if carried and not complete:
        state.warm_partly = True


def is_carried(key: str) -> bool:
    """A head of nnU-Net's network or of MERIT."""
    return HOST_SKIPS in key or key.startswith("segmentor.heads.")


def describe_mismatch(own: Mapping[str, Any], found: Mapping[str, Any], parts: tuple[str, ...] = ()) -> str | None:
    """What distinguishes a checkpoint's network from this one, in the terms a user set; None if nothing.

    Args:
        own: state dict of the network.
        found: state dict of the checkpoint.
        parts: first components of keys that settings can leave out.
    """
    missing = sorted(set(own) - set(found))
    unknown = sorted(set(found) - set(own))
    shapes = [k for k in own if k in found and own[k].shape != found[k].shape]
    if not (missing or unknown or shapes):
        return None
    reasons = []
    for part in parts:
        here, there = (any(k.startswith(f"{part}.") for k in d) for d in (own, found))
        if here != there:
            reasons.append(f"it has {'a' if there else 'no'} {part} part, expected {'one' if here else 'none'}")
    heads = next((k for k in shapes if k.endswith("decoder.seg_layers.0.weight")), None)
    if heads:
        reasons.append(f"it segments {len(found[heads])} classes, expected {len(own[heads])}")
    example = (shapes + missing + unknown)[0]
    if example in shapes:
        reasons.append(f"{example} has shape {tuple(found[example].shape)}, expected {tuple(own[example].shape)}")
    reasons.append(f"{len(missing)} keys missing, {len(unknown)} unknown, {len(shapes)} of another shape")
    return (
        "the checkpoint belongs to another network (trainer, plans, classes or settings differ): "
        + "; ".join(reasons)
        + f" (first: {example})"
    )
