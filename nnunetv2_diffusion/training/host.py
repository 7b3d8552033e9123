"""What has to change in nnU-Net's trainer for any network of ours, and no more."""

import functools
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_diffusion.architecture import check_architecture
from nnunetv2_diffusion.checkpoint_files import (
    NAMES,
    is_whole,
    newest_whole,
    weights_only,
    whole_neighbour,
    write_whole,
)
from nnunetv2_diffusion.checkpoints import CheckpointError, check_checkpoint, load_checkpoint_file
from nnunetv2_diffusion.diffusion import MaskEncoding
from nnunetv2_diffusion.locks import locked
from nnunetv2_diffusion.networks.heads import HeadsMixin
from nnunetv2_diffusion.plans_content import foreground_labels
from nnunetv2_diffusion.settings import (
    SECTION,
    DiffusionSettings,
    apply_environment,
    earlier_notes,
    environment_overrides,
    read_settings,
)
from nnunetv2_diffusion.training import checks
from nnunetv2_diffusion.training.continuing import AXES, FIXED, LENGTHS, changes, dataset_changes, plans_changes, unread
from nnunetv2_diffusion.training.divergence import DivergedError, StepGuard, backward_seed, describe_not_finite
from nnunetv2_diffusion.training.label_scan import FILE
from nnunetv2_diffusion.training.losses import encoded_target
from nnunetv2_diffusion.training.pretrained import check_pretrained_weights

PEAK_GPU_MEMORY = "Peak GPU memory of tensors"  # a line of the log
LOCK = ".training.lock"  # in the fold's folder
RECENT_EPOCHS = 5  # whose pseudo Dice tells at the end of a training whether a class is found


def apply_schedule_length(trainer: nnUNetTrainer, settings: DiffusionSettings) -> None:
    """Set epochs and iterations of a trainer from the settings; null keeps nnU-Net's."""
    for name in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch"):
        value = getattr(settings, name)
        if value is not None:
            setattr(trainer, name, value)


def plans_unet(
    configuration: ConfigurationManager, in_channels: int, out_channels: int, deep_supervision: bool
) -> nn.Module:
    """The network that nnU-Net planned, initialised as nnU-Net does.

    Raises:
        UnsupportedArchitectureError: if the plans name what is not allowed; nothing was imported.
    """
    check_architecture(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
    )
    return get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        in_channels,
        out_channels,
        allow_init=True,
        deep_supervision=deep_supervision,
    )


def sampling_from_environment(settings: DiffusionSettings, section: str) -> DiffusionSettings:
    """Settings with the environment's overrides, which are echoed; steps and sampler are those of a section.

    Raises:
        SettingsError: naming the variables if the result cannot be used.
    """
    overrides = environment_overrides()
    if overrides:
        print("nnunetv2_diffusion: sampling set by the environment:", overrides)
    return apply_environment(settings, section)


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


def look_at_pretrained_weights(look: Callable[[str], None]) -> None:
    """Let nnU-Net's ``-pretrained_weights`` read weights only, after a look at the file.

    nnU-Net unpickles that file by a function of its training command, with no hook of the trainer between. So that
    function is wrapped, where this process has the command loaded.

    Args:
        look: given the file; raises if it cannot be used.
    """
    commands: list[Any] = [sys.modules.get(name) for name in ("nnunetv2.run.run_training", "__main__")]
    for command in commands:
        load = getattr(command, "load_pretrained_weights", None)
        if load is not None:
            # of another trainer in this process, nothing is left
            command.load_pretrained_weights = _safe_loader(getattr(load, "__wrapped__", load), look)


def _safe_loader(load: Callable[..., None], look: Callable[[str], None]) -> Callable[..., None]:
    @functools.wraps(load)
    def checked(network: nn.Module, fname: str, verbose: bool = False) -> None:
        look(fname)
        with weights_only():
            load(network, fname, verbose)

    return checked


if TYPE_CHECKING:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer as _Host  # whose methods a mixin calls
else:
    _Host = object


class MemoryLog(_Host):
    """Writes a training's peak memory on a GPU to its log; a class to inherit before nnU-Net's trainer."""

    def on_train_end(self) -> None:
        """As nnU-Net's, after a line with PyTorch's peak since the process started, in bytes."""
        if self.device.type == "cuda":
            self.print_to_log_file(f"{PEAK_GPU_MEMORY}: {torch.cuda.max_memory_allocated(self.device)} bytes")
        super().on_train_end()


class CommonTrainer(MemoryLog, nnUNetTrainer):
    """What all trainers here do, the baseline included, beside nnU-Net's: lose nothing, run nothing, stop in time.

    Settings come from the plans. A fold is trained by one process at a time, checkpoints are written whole or not at
    all and only with finite weights, a training that diverges stops.
    """

    my_init_kwargs: dict[str, Any]  # nnU-Net's

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        self._continues = bool(plans.get("continue_training"))  # --c; nnU-Net takes it out of the plans
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.settings = read_settings(self.configuration_manager.configuration, self.plans_manager.plans_name)
        apply_schedule_length(self, self.settings)
        self.guard = StepGuard(self.settings.max_bad_steps)
        self._honour_thread_limit()

    @classmethod
    def reads(cls) -> frozenset[str]:
        """Names of the settings that this trainer reads, those of a section within as ``hidiff.steps``."""
        return LENGTHS

    def look_at_weights(self, file: str) -> None:
        """Raise before the file of ``-pretrained_weights`` is loaded if that cannot be done.

        Raises:
            CheckpointError: it is missing, damaged, or holds more than weights and plain data.
        """
        load_checkpoint_file(file)

    def _honour_thread_limit(self) -> None:
        """Undo what nnUNetv2_train does on a CPU: as many threads as processors, whatever OMP_NUM_THREADS says."""
        limit = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
        if self.device.type == "cpu" and limit.isdecimal() and int(limit):
            torch.set_num_threads(int(limit))
            self.print_to_log_file(f"CPU threads: {limit}, as OMP_NUM_THREADS says")

    def initialize(self) -> None:
        """As nnU-Net's; settings of the plans that have no effect go to the log."""
        super().initialize()
        look_at_pretrained_weights(self.look_at_weights)
        for note in earlier_notes(self.configuration_manager.configuration.get(SECTION)):
            self.print_to_log_file(note[0].upper() + note[1:])
        ignored = unread(self.settings, self.reads())
        if ignored:
            self.print_to_log_file(
                f"{type(self).__name__} does not read these settings of the plans, they have no effect: "
                f"{', '.join(ignored)}"
            )

    def run_training(self) -> None:
        """As nnU-Net's, while no other process trains this fold.

        Raises:
            LockedError: naming the process that trains it.
            DivergedError: after ``max_bad_steps`` steps in a row without a finite loss and gradients.
        """
        alone = locked(Path(self.output_folder) / LOCK, "a training") if self.local_rank == 0 else nullcontext()
        with alone:
            super().run_training()

    def _judge_step(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        """Count a step that was left out; stop the training after too many."""
        if self.guard.judge(optimizer, loss, self.grad_scaler):
            raise DivergedError(
                f"the training diverged in epoch {self.current_epoch}: loss or gradients of {self.guard.limit} steps "
                f"in a row are not finite. {self._way_back()}"
            )

    def _way_back(self) -> str:
        """The last good checkpoint, and what to try."""
        found = None if self.output_folder is None else newest_whole(self.output_folder, NAMES[1:])
        good = f"The last good checkpoint is {found[0]} ({found[1]} epochs)" if found else "There is no checkpoint yet"
        return (
            f"{good}. Try --c once, which draws other cases; if it happens again, train with a lower learning rate or "
            "the other recipe, and look for images with extreme values."
        )

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """As nnU-Net's, over finite losses; how many steps were left out goes to the log."""
        losses = np.array([float(output["loss"]) for output in train_outputs])
        finite = losses[np.isfinite(losses)]
        if 0 < len(finite) < len(losses):  # the number of losses stays: nnU-Net stacks those of all processes
            mean = np.asarray(finite.mean(), dtype=np.float32)
            train_outputs = [o if np.isfinite(o["loss"]) else {**o, "loss": mean} for o in train_outputs]
        left_out = self.guard.end_epoch()
        if left_out:
            self.print_to_log_file(
                f"{left_out} optimiser steps of this epoch ({len(losses)} iterations) were left out: loss or gradients "
                "were not finite"
            )
        super().on_train_epoch_end(train_outputs)

    def on_train_end(self) -> None:
        """As nnU-Net's, then a word about classes that are never found."""
        super().on_train_end()
        recent = self.logger.get_value("dice_per_class_or_region", step=None)[-RECENT_EPOCHS:]
        lost = checks.never_found(recent, list(foreground_labels(self.dataset_json)))
        if lost:
            self.print_to_log_file(
                f"Never found in the validation patches of the last {len(recent)} epochs: {', '.join(lost)}. Was the "
                "training too short, or is the class too rare?"
            )

    def save_checkpoint(self, filename: str) -> None:
        """As nnU-Net's; the file is whole or, after an error, the one from before.

        Raises:
            DivergedError: if weights or statistics are not finite; nothing is written then.
            CheckpointError: if the file cannot be written.
        """
        if self.local_rank or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        problem = describe_not_finite(self.network.state_dict())
        if problem:
            raise DivergedError(f"{filename} is not written: {problem}. {self._way_back()}")
        write_whole(filename, super().save_checkpoint)

    def load_checkpoint(self, filename_or_checkpoint: str | dict) -> None:
        """As nnU-Net's, after a look whether the file belongs to this training; no code of it is run.

        With ``--c`` the newest whole checkpoint beside a half-written one is taken.

        Raises:
            CheckpointError: if the file was written by another trainer, for other classes, labels or inputs or with
                settings of another process, if it is damaged, or holds more than weights and plain data.
        """
        if not isinstance(filename_or_checkpoint, str):
            super().load_checkpoint(filename_or_checkpoint)
            return
        file = self._whole_checkpoint(filename_or_checkpoint)
        check_checkpoint(file, type(self).__name__, self.label_manager.num_segmentation_heads)
        self._compare_settings(file)
        if not self.was_initialized:
            self.initialize()
        own = self.my_init_kwargs
        with weights_only():
            super().load_checkpoint(file)
        self.my_init_kwargs = own  # nnU-Net takes the file's: further checkpoints would hold plans from before

    def _whole_checkpoint(self, file: str) -> str:
        """The file, or with ``--c`` the newest whole one beside it if it was cut off."""
        if not os.path.isfile(file) or is_whole(file):
            return file
        other = whole_neighbour(file)
        if other is None:
            raise CheckpointError(
                f"{file}: cut off while it was written, and no whole checkpoint lies beside it. Train without --c"
            )
        if not self._continues:
            raise CheckpointError(
                f"{file}: cut off while it was written. {other.name} beside it is whole: continue the training with --c"
            )
        self.print_to_log_file(f"{file}: cut off while it was written")
        self.print_to_log_file(f"the training continues from {other}, the newest whole checkpoint beside it")
        return str(other)

    def _compare_settings(self, file: str) -> None:
        """Refuse a checkpoint of another process, other labels or other inputs; tell what else differs."""
        arguments = load_checkpoint_file(file).get("init_args")
        arguments = arguments if isinstance(arguments, dict) else {}
        old, different = {}, {}
        try:
            plans = PlansManager(dict(arguments["plans"]))
            old = plans.get_configuration(arguments["configuration"]).configuration
            different = changes(read_settings(old, str(file)), self.settings, self.reads())
        except (KeyError, TypeError, ValueError) as error:
            self.print_to_log_file(f"{file}: its settings cannot be read, nor compared with the plans' ({error})")
        axes = {key: arguments["plans"][key] for key in AXES if old and key in arguments["plans"]}
        new = {**self.configuration_manager.configuration, **{key: self.plans_manager.plans.get(key) for key in AXES}}
        meaning, told = plans_changes({**old, **axes}, new)
        data = dataset_changes(arguments.get("dataset_json"), self.dataset_json)
        if data:
            raise _changed(file, "dataset.json has", data, f"dataset.json of {self.plans_manager.dataset_name}")
        fixed = [text for name, text in different.items() if name in FIXED] + meaning
        if fixed:
            raise _changed(file, "the plans have", fixed, self.plans_manager.plans_name)
        told = [text for name, text in different.items() if name not in FIXED] + told
        if told:
            self.print_to_log_file(f"settings changed since the checkpoint: {', '.join(told)}")


def _changed(file: str, what: str, changed: list[str], place: str) -> CheckpointError:
    named = ", ".join(changed[:8]) + (f" and {len(changed) - 8} more" if len(changed) > 8 else "")
    return CheckpointError(
        f"{file}: {what} changed since it was written: {named}. A trained network means something else "
        f"then: set them back in {place}, or train anew with plans of another name, if you like from these weights: "
        "nnunetv2_diffusion warm-start"
    )


class PlannedTrainer(CommonTrainer):
    """The common trainer with early checks, and a loop kept out of torch.compile.

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
        self.prepare()

    def prepare(self) -> None:
        """What a method adds to nnU-Net's ``__init__``, from ``self.settings``; the planner calls it as well."""

    def rehearse(self, image: torch.Tensor, target: torch.Tensor | list[torch.Tensor]) -> Any:
        """One training step up to its backward pass, for the memory planner; returns what holds the graph.

        It is run on tensors without content, so it may not look at values.
        """
        with self._autocast():
            return self._training_loss(image, target)

    def recomputed(self, image: torch.Tensor) -> tuple[list[torch.Tensor], Callable[[], torch.Tensor]] | None:
        """What the backward pass computes again at its start: tensors that are there, and the computation."""
        return None

    def held_gradients(self) -> Iterable[nn.Parameter]:
        """Parameters whose gradients of the step before are still there while activations are at their most."""
        return ()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """All that a step updates by."""
        return [self.optimizer]

    @property
    def inner_network(self) -> HeadsMixin:
        """The network without the wrapper of distributed training."""
        return self.network.module if isinstance(self.network, DistributedDataParallel) else self.network

    def look_at_weights(self, file: str) -> None:
        """As ``CommonTrainer.look_at_weights``; weights of another network are told in three lines."""
        check_pretrained_weights(self, self.inner_network, file)

    def _do_i_compile(self) -> bool:
        # nnU-Net would compile the whole module, loop included, and rename its weights; see initialize()
        return False

    def _compile(self) -> None:
        """Compile parts of the network in place; names in the state dict must not change."""
        raise NotImplementedError

    def initialize(self) -> None:
        """As nnU-Net's; then compile in place and say which heads are regions."""
        super().initialize()
        self.inner_network.sigmoid = self.label_manager.has_regions
        if super()._do_i_compile():
            self.print_to_log_file("Using torch.compile within the network, the reverse process left out")
            self._compile()

    def get_tr_and_val_datasets(self) -> tuple:
        """As nnU-Net's, with a look at every label before workers start; what was found is remembered.

        Raises:
            ValueError: for a label that dataset.json does not define, or no foreground in any training case.
        """
        datasets = super().get_tr_and_val_datasets()
        if self.local_rank == 0:
            folder, cache = self.preprocessed_dataset_folder, Path(self.preprocessed_dataset_folder_base) / FILE
            found = checks.check_labels(datasets, self.label_manager, folder, show_progress=True, cache=cache)
            training = [found[case] for case in datasets[0].identifiers]
            absent = checks.absent_classes(training, self.label_manager, folder)
            if absent:
                self.print_to_log_file(
                    f"WARNING: none of the {len(training)} training cases has {', '.join(absent)}: it cannot be learnt"
                )
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
        """Gradients of a loss; none of them is finite where the loss is not."""
        self._loss = loss.detach()
        scaled = loss if self.grad_scaler is None else self.grad_scaler.scale(loss)
        scaled.backward(backward_seed(loss).to(scaled.dtype))

    def _update(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], gradient_clip: float
    ) -> None:
        """Clip gradients and step, unless they are not finite; the scaler is not updated, it may serve several.

        Raises:
            DivergedError: if too many steps in a row were left out.
        """
        self.guard.watch(optimizer, self.grad_scaler)
        if self.grad_scaler is None:
            nn.utils.clip_grad_norm_(parameters, gradient_clip)
            optimizer.step()
        else:
            self.grad_scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, gradient_clip)
            self.grad_scaler.step(optimizer)
        self._judge_step(optimizer, self._loss)

    def validation_step(self, batch: dict) -> dict:
        """As nnU-Net's; a case that is not finite is named."""
        checks.check_images(batch, batch["data"])
        return super().validation_step(batch)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """As nnU-Net's; a trainer without deep supervision keeps it off, also after the final validation."""
        super().set_deep_supervision_enabled(enabled and self.enable_deep_supervision)
