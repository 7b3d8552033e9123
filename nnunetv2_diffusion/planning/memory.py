"""Memory of a training step, counted from the network, the loss and the optimiser that will really be used.

The step is rehearsed up to its backward pass with tensors that have shapes and types but no content (PyTorch's fake
tensors), in half precision where a GPU would use it; no GPU is needed, and nothing is computed. What autograd saves for
the backward pass is counted exactly. What the backward pass itself needs follows from the largest maps.

Not counted: scratch memory of cuDNN, and what torch.compile saves or costs. The planners compare with nnU-Net's own
network counted in the same way, and both have these.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nnunetv2_diffusion.methods.hidiff import HiDiffTrainer
from nnunetv2_diffusion.settings import read_settings
from nnunetv2_diffusion.training import DiffusionTrainer, RecycleXT
from nnunetv2_diffusion.training.host import PlannedTrainer

CONTEXT = 500 * 2**20
"""Bytes of the CUDA context and the libraries' kernels, roughly; torch.cuda.max_memory_allocated leaves them out."""
BACKWARD_MAPS = 2
"""The backward pass through a layer holds the gradients of its output and its input: two maps of the largest size."""
LOSS_MAPS = 3
"""At the heads: the gradients of probabilities, of their logarithms and of the logits, float32."""
FULL_PRECISION = {
    *("softmax", "log_softmax", "nll_loss", "binary_cross_entropy_with_logits", "softplus"),
    *("layer_norm", "group_norm", "norm", "sum", "prod", "cumsum", "cumprod", "reciprocal", "rsqrt"),
    *("exp", "expm1", "log", "log10", "log1p", "log2", "pow", "__pow__", "interpolate"),
}
"""What autocast computes in float32 on CUDA; on a CPU it leaves most of it as it is."""
AS_GIVEN = {"avg_pool3d"}
"""What autocast computes in float32 on a CPU alone."""
OPTIMIZER_STATES = {torch.optim.SGD: 1, torch.optim.AdamW: 2}
"""Numbers that an optimiser keeps for a parameter: momentum; first and second moment."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the GPU in one training step; what depends on the batch is given for one sample.

    Attributes:
        weights: parameters.
        gradients: of all parameters.
        optimizer: state.
        held: gradients that are still there while activations are at their most; nnU-Net frees them before a step.
        constant: saved for the backward pass whatever the batch: parameters in half precision.
        saved: saved for the backward pass, for one sample.
        temporaries: of the backward pass where it takes most, for one sample.
    """

    weights: int
    gradients: int
    optimizer: int
    held: int
    constant: int
    saved: int
    temporaries: int

    @property
    def fixed(self) -> int:
        """Taken all the time, for any batch."""
        return self.weights + self.optimizer + self.held + self.constant

    @property
    def per_sample(self) -> int:
        """Added by every sample of a batch."""
        return self.saved + self.temporaries

    def saved_for_backward(self, batch: int) -> int:
        """What autograd saves, for a batch."""
        return self.constant + batch * self.saved

    def allocated(self, batch: int) -> int:
        """As torch.cuda.max_memory_allocated: activations, or the update of the weights if that takes more."""
        update = self.weights + self.optimizer + self.gradients + self.weights  # AdamW's denominator, as large
        return max(self.fixed + batch * self.per_sample, update)

    def total(self, batch: int) -> int:
        """What a GPU needs at least: with the CUDA context."""
        return self.allocated(batch) + CONTEXT


class SavedBytes:
    """Counts, while open, the bytes that autograd keeps for backward passes; storage that is shared counts once.

    Args:
        excluded: tensors that exist anyway: parameters.

    Attributes:
        now: bytes kept.
        peak: most bytes kept at a time.
        largest: most bytes of one storage.
    """

    def __init__(self, excluded: Iterable[torch.Tensor] = ()):
        self._excluded = list(excluded)  # as long as they live, no other storage can have their place
        self._uses = {_storage(tensor): 1 for tensor in self._excluded}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: _Kept(t, self), lambda kept: kept.tensor)
        self.now = self.peak = self.largest = 0

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def take(self, tensor: torch.Tensor) -> None:
        """A tensor is kept."""
        key = _storage(tensor)
        self._uses[key] = self._uses.get(key, 0) + 1
        if self._uses[key] == 1:
            size = tensor.untyped_storage().nbytes()
            self.now += size
            self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)

    def release(self, tensor: torch.Tensor) -> None:
        """A tensor is no longer kept."""
        key = _storage(tensor)
        self._uses[key] -= 1
        if not self._uses[key]:
            del self._uses[key]
            self.now -= tensor.untyped_storage().nbytes()


class _Kept:
    """What autograd holds in place of a saved tensor; it goes when the graph does."""

    def __init__(self, tensor: torch.Tensor, counter: SavedBytes):
        self.tensor = tensor.detach()  # with its graph, which holds this, it would never go
        self.counter = counter
        counter.take(tensor)

    def __del__(self):
        self.counter.release(self.tensor)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class WithoutContent(TorchFunctionMode):
    """While open, new parameters are on the meta device: networks are built without filling them."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Called for every torch function."""
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class _AsOnGPU(TorchFunctionMode):
    """While open, tensors that are said to be on the CPU, under its autocast, do as on a GPU with CUDA's.

    Fake tensors that are said to be on a GPU would need its driver, which a machine that only plans may not have.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Called for every torch function."""
        kwargs, name = kwargs or {}, func.__name__
        if name in ("logsigmoid", "log_sigmoid"):
            return _LogSigmoid.apply(*args)
        if name == "cross_entropy":  # autocast does not look into it: only its second half is in float32
            with torch.autocast("cpu", enabled=False):
                log_p = F.log_softmax(args[0], 1).float()
                return F.nll_loss(log_p, args[1], ignore_index=kwargs.get("ignore_index", -100))
        if name in FULL_PRECISION and torch.is_autocast_enabled("cpu"):
            args = tuple(x.float() if _is_half(x) else x for x in args)
        elif name in AS_GIVEN:
            with torch.autocast("cpu", enabled=False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


class _Agreeing(TorchFunctionMode):
    """While open, a tensor that is asked whether it is true says yes: nnU-Net's loss asks if any voxel is known."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Called for every torch function."""
        return True if func is torch.Tensor.__bool__ else func(*args, **(kwargs or {}))


class _LogSigmoid(torch.autograd.Function):
    """What a GPU saves: the input. A CPU saves one more map."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """x of any shape."""
        ctx.save_for_backward(x)
        return torch.empty_like(x)


def _is_half(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float16


def _fake_parameters(module: nn.Module) -> None:
    """Replace parameters and buffers by fake tensors; in an open FakeTensorMode."""
    made: dict[int, tuple] = {}  # with the original, so that no other tensor gets its id
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, tensor in store.items():
                if tensor is not None and id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, tensor.requires_grad)
                    made[id(tensor)] = (tensor, fake)
                if tensor is not None:
                    store[name] = made[id(tensor)][1]


class _Rehearsal:
    """In front of a trainer: its network, loss and optimiser, without folders, log, data and content.

    Args:
        plans: of one configuration.
        configuration: its name.
        dataset_json: labels.
        channels: of the image.
        half: with autocast, as on a GPU.
    """

    def __init__(self, plans: dict, configuration: str, dataset_json: dict, channels: int, half: bool):
        # nnU-Net's own __init__ makes folders and a log file: what it sets and what is used here is repeated
        self.plans_manager = PlansManager(plans)
        self.configuration_manager = self.plans_manager.get_configuration(configuration)
        self.label_manager = self.plans_manager.get_label_manager(dataset_json)
        self.device = torch.device("cpu")
        self.channels, self.half = channels, half
        self.is_ddp, self.local_rank, self.grad_scaler = False, 0, None
        self.initial_lr, self.weight_decay = 1e-2, 3e-5
        self.num_epochs, self.num_iterations_per_epoch = 1000, 250
        self.enable_deep_supervision = True
        self._constant: int | None = None
        self._counts: dict[tuple[int, ...], tuple[int, int]] = {}
        self.settings = read_settings(self.configuration_manager.configuration)
        self.prepare()
        with WithoutContent():
            self.network = self.build_network_architecture(
                self.plans_manager,
                self.configuration_manager,
                channels,
                self.label_manager.num_segmentation_heads,
                self.enable_deep_supervision,
            )
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)  # schedules are real
        with self.mode:
            _fake_parameters(self.network)
        self.network.sigmoid = self.label_manager.has_regions
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
        self.loss = self._build_loss()

    def _do_i_compile(self) -> bool:
        return False

    def _autocast(self, cache_enabled: bool = True) -> AbstractContextManager:
        if not self.half:
            return nullcontext()
        return torch.autocast("cpu", torch.float16, cache_enabled=cache_enabled)

    def batch(self, size: int, patch: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor | list[torch.Tensor]]:
        """Image and target as nnU-Net's loader makes them; in an open FakeTensorMode."""
        patch, labels = tuple(patch), self.label_manager
        image = torch.zeros(size, self.channels, *patch)
        channels, dtype = 1, torch.int16
        if labels.has_regions:
            channels, dtype = len(labels.foreground_regions) + (labels.ignore_label is not None), torch.bool
        scales = self._get_deep_supervision_scales() or [[1.0] * len(patch)]
        targets = [
            torch.zeros(
                size, channels, *(round(n * s) for n, s in zip(patch, scale, strict=True)), dtype=dtype)
            for scale in scales
        ]  # fmt: skip
        return image, targets if self.enable_deep_supervision else targets[0]

    def count(self, size: int, patch: Iterable[int]) -> tuple[int, int]:
        """Bytes saved for backward passes, and temporaries, of a batch; planners ask again for the same patch."""
        key = (size, *patch)
        if key not in self._counts:
            with self.mode, _Agreeing(), _AsOnGPU() if self.half else nullcontext():
                self._counts[key] = self._count(*self.batch(size, patch))
        return self._counts[key]

    def _count(self, image: torch.Tensor, target: torch.Tensor | list[torch.Tensor]) -> tuple[int, int]:
        with SavedBytes(self.network.parameters()) as saved:
            graph = self.rehearse(image, target)
        del graph
        logits = 4 * self.label_manager.num_segmentation_heads * image[:, 0].numel()
        return saved.peak, max(BACKWARD_MAPS * saved.largest, LOSS_MAPS * logits + self._recomputed_bytes(image))

    def _recomputed_bytes(self, image: torch.Tensor) -> int:
        again = self.recomputed(image)
        if again is None:
            return 0
        there, compute = again
        with SavedBytes(there) as saved:
            graph = compute()
        del graph
        return saved.peak

    def constant(self, patch: Iterable[int]) -> int:
        """What is saved whatever the batch, and the patch."""
        if self._constant is None:
            # not of a batch of one: its slices are contiguous, and some copies are left out
            self._constant = 3 * self.count(2, patch)[0] - 2 * self.count(3, patch)[0]
        return self._constant


class _Stock(_Rehearsal, nnUNetTrainer):
    """nnU-Net's own trainer, which knows of no rehearsal."""

    def prepare(self) -> None:
        pass

    def rehearse(self, image: torch.Tensor, target: torch.Tensor | list[torch.Tensor]) -> Any:
        with self._autocast():
            return self.loss(self.network(image), target)

    def recomputed(self, image: torch.Tensor) -> None:
        return None

    def held_gradients(self) -> Iterable[nn.Parameter]:
        return ()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer]


class _Recycling(DiffusionTrainer):
    """Any strategy: RecycleXT's two passes need most of the family."""

    strategy = RecycleXT()


FAMILIES: dict[str, type[PlannedTrainer]] = {"recycling": _Recycling, "hidiff": HiDiffTrainer}
"""Trainers that planners count; a planner class names its own."""


def estimate_memory(
    family: str,
    configuration: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    channels: int,
    device: str = "cuda",
) -> MemoryEstimate:
    """Count the memory of a training step.

    Args:
        family: "stock" for nnUNetTrainer, "recycling" or "hidiff".
        configuration: of plans, resolved: ``patch_size``, ``architecture`` and, if there are, ``diffusion`` and
            ``batch_dice`` are used.
        dataset_json: ``labels`` and, for regions, ``regions_class_order`` are used.
        channels: of the image.
        device: "cuda" for a step on a GPU, "cpu" for one in full precision.

    Raises:
        SettingsError: for diffusion settings that cannot be used.
        UnsupportedArchitectureError: for an architecture that cannot be extended.
    """
    shared = {key: configuration.get(key) for key in ("architecture", "diffusion")}
    shared["batch_dice"] = configuration.get("batch_dice", False)
    labels = {key: dataset_json[key] for key in ("labels", "regions_class_order") if key in dataset_json}
    rehearsal = _rehearsal(family, json.dumps([shared, labels], default=_plain), channels, device == "cuda")
    patch = [int(size) for size in configuration["patch_size"]]
    constant = rehearsal.constant(patch)
    saved, temporaries = rehearsal.count(2, patch)
    weights = _total(rehearsal.network.parameters())
    trained = [p for p in rehearsal.network.parameters() if p.requires_grad]
    states = sum(
        OPTIMIZER_STATES[type(optimizer)] * _total(p for p in group["params"] if p.requires_grad)
        for optimizer in rehearsal.optimizers()
        for group in optimizer.param_groups
    )
    held = _total(rehearsal.held_gradients())
    per_sample = (saved - constant) // 2, temporaries // 2
    return MemoryEstimate(weights, _total(trained), states, held, constant, *per_sample)


@lru_cache(maxsize=32)
def _rehearsal(family: str, description: str, channels: int, half: bool) -> _Rehearsal:
    """A rehearsal; its network serves all patches."""
    configuration, dataset_json = json.loads(description)
    plans = {"plans_name": "plans", "label_manager": "LabelManager", "configurations": {"planned": configuration}}
    rehearsal = _Stock if family == "stock" else type("_Rehearsed", (_Rehearsal, FAMILIES[family]), {})
    return rehearsal(plans, "planned", dataset_json, channels, half)


def _total(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _plain(value: Any) -> Any:
    """numpy's numbers, which nnU-Net plans with, for JSON."""
    return value.tolist()
