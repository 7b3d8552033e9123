"""nnU-Net's predictor, with samples, steps and mirrors under control."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from typing import NamedTuple

import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from tqdm import tqdm

from nnunetv2_diffusion.inference.options import PredictionOptions, resolve_sampling
from nnunetv2_diffusion.inference.sliding_window import Blend, Tile, at_once, make_tiles, tiles_at_once
from nnunetv2_diffusion.sampling import (
    BoxNoise,
    Chain,
    Estimator,
    Noise,
    NoiseByPosition,
    SamplingConfig,
    SinglePass,
    run_chain,
)
from nnunetv2_diffusion.sampling.views import Schedule, count_passes, mirror_views, schedules


class Member(NamedTuple):
    """One drawn mask of a case: probabilities (K, *spatial) after the kept steps, the last one being the result."""

    fold: int
    sample: int
    steps: list[torch.Tensor]


@dataclass
class PassCount:
    """Network passes of a case.

    Attributes:
        tiles: positions of the sliding window.
        members: folds times samples.
        passes: that were made.
        planned: that will have been made.
    """

    tiles: int = 0
    members: int = 0
    passes: int = 0
    planned: int = 0
    report: Callable[[int], None] = field(default=lambda passes: None, repr=False)

    def tick(self, passes: int = 1) -> None:
        """A pass was made."""
        self.passes += passes
        self.report(passes)

    @property
    def per_tile(self) -> float:
        """Passes a tile and member."""
        return self.passes / max(1, self.tiles * self.members)


@dataclass
class Canvas:
    """A padded case and where its tiles lie."""

    data: torch.Tensor
    tiles: list[Tile]
    padding: tuple[int, int, int]
    crop: tuple
    blend: Callable[[], Blend]


class DiffusionPredictor(nnUNetPredictor):
    """Predicts masks of a case one sample after the other.

    Args:
        options: what is asked for.
        *args: as nnU-Net's predictor.
        **kwargs: as nnU-Net's predictor.
    """

    def __init__(self, options: PredictionOptions, *args: object, **kwargs: object):
        with redirect_stdout(StringIO()):  # nnU-Net tells of every device but CUDA that results stay on the CPU
            super().__init__(*args, **kwargs)
        self.options = options
        self.sampling: SamplingConfig | None = None
        self.results_device = self.device if self.perform_everything_on_device else torch.device("cpu")

    def set_options(self, options: PredictionOptions) -> None:
        """Change what is asked for.

        Raises:
            OptionError: if the model cannot do it.
        """
        self.options = options
        self.prepare()

    def prepare(self) -> None:
        """Check the options against the model that was loaded.

        Raises:
            OptionError: if it cannot do what is asked for.
        """
        self.sampling = resolve_sampling(self.network, self.options)
        self.network = self.network.to(self.device).eval()

    @property
    def tiles_at_once(self) -> int:
        """How many tiles go through the network together."""
        return tiles_at_once(self.configuration_manager.batch_size)

    @property
    def samples(self) -> int:
        """N."""
        return self.sampling.samples if self.sampling else 1

    def chain(self) -> Chain:
        """The chain of the loaded network."""
        if hasattr(self.network, "make_chain"):
            return self.network.make_chain(self.sampling)
        return SinglePass(self.network, self.label_manager.has_regions)  # a stock model

    def schedules(self, steps: int) -> list[Schedule]:
        """The chains of a tile."""
        axes = self.allowed_mirroring_axes if self.use_mirroring else None
        return schedules(self.options.tta, mirror_views(axes), steps)

    def canvas(self, image: torch.Tensor) -> Canvas:
        """Pad a case to the patch size at least and find the window positions, as nnU-Net does."""
        patch = self.configuration_manager.patch_size
        data, revert = pad_nd_image(image, patch, "constant", {"value": 0}, True, None)
        padding = tuple(s.start or 0 for s in revert[1:])
        tiles = make_tiles(self._internal_get_sliding_window_slicers(data.shape[1:]), padding)
        device = self.results_device
        weight = compute_gaussian(tuple(patch), sigma_scale=1.0 / 8, value_scaling_factor=10, device=device)
        weight = weight if self.use_gaussian else torch.ones_like(weight)
        heads = self.label_manager.num_segmentation_heads
        blend = partial(Blend, heads, data.shape[1:], weight, device)
        return Canvas(data, tiles, padding, revert, blend)

    def members(self, image: torch.Tensor, name: str = "", count: PassCount | None = None) -> Iterator[Member]:
        """Draw all masks of a preprocessed case, (C, *spatial), with a progress bar of network passes.

        Yields:
            folds times samples members; ``steps`` holds every step's mask if ``save_steps`` is set, else the last.
        """
        count = count or PassCount()
        canvas, folds = self.canvas(image), len(self.list_of_parameters)
        plan = self.schedules(self.chain().steps)
        count.tiles, count.members = len(canvas.tiles), folds * self.samples
        count.planned = count.tiles * count.members * count_passes(plan)
        with tqdm(total=count.planned, desc=name, unit="pass", disable=not self.allow_tqdm) as bar:
            count.report = bar.update
            for fold, weights in enumerate(self.list_of_parameters):
                if folds > 1:
                    self.network.load_state_dict(weights)
                chain = self.chain()
                for sample in range(self.samples):
                    bar.set_postfix_str(f"sample {fold * self.samples + sample + 1}/{count.members}")
                    yield Member(fold, sample, self._draw(chain, plan, canvas, sample, count))

    def _autocast(self) -> torch.autocast | nullcontext:
        return torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()

    @torch.inference_mode()  # not around a generator: torch's would hold a member while the next one is drawn
    def _draw(
        self, chain: Chain, plan: list[Schedule], canvas: Canvas, sample: int, count: PassCount
    ) -> list[torch.Tensor]:
        """One sample; if the device has no room for the results, they are kept on the CPU from here on."""
        passes, blended = count.passes, None
        try:
            with self._autocast():
                blended = self._draw_tiles(chain, plan, canvas, sample, count)
        except torch.cuda.OutOfMemoryError:
            if self.results_device.type == "cpu":
                raise
        if blended is None:  # not within the except clause, whose error keeps what was on the device
            print("The device has no room for the results; they are moved to the CPU")
            self.results_device = torch.device("cpu")
            canvas.blend = self.canvas(canvas.data[(slice(None), *canvas.crop[1:])]).blend
            torch.cuda.empty_cache()
            count.tick(passes - count.passes)
            return self._draw(chain, plan, canvas, sample, count)
        return [p[0][(slice(None), *canvas.crop[1:])] for p in blended]

    def _noise(
        self,
        chain: Chain,
        sample: int,
        start: Sequence[int],
        size: Sequence[int],
        device: torch.device,
        planar: bool = False,
    ) -> BoxNoise:
        seed = self.sampling.seed if self.sampling else 0
        return BoxNoise(seed, sample, chain.channels, tuple(start), tuple(size), planar, device)

    def _draw_tiles(
        self, chain: Chain, plan: list[Schedule], canvas: Canvas, sample: int, count: PassCount
    ) -> list[torch.Tensor]:
        """A chain for each tile; masks of the kept steps, blended."""
        kept = chain.steps if self.options.save_steps else 1
        blends = [canvas.blend() for _ in range(kept)]
        for tiles in at_once(canvas.tiles, self.tiles_at_once):
            image = torch.stack([canvas.data[tile.index] for tile in tiles]).to(self.device)
            estimator = Estimator(chain, image, count.tick)
            noise = NoiseByPosition(
                [self._noise(chain, sample, tile.start, tile.size, self.device, tile.planar) for tile in tiles]
            )
            for blend, p in zip(blends, self._tile_masks(chain, plan, estimator, noise, kept), strict=True):
                blend.add_all(tiles, p)
        return [blend.mean() for blend in blends]

    def _tile_masks(
        self, chain: Chain, plan: list[Schedule], estimator: Estimator, noise: Noise, kept: int
    ) -> list[torch.Tensor]:
        """Mean over a tile's chains of the last ``kept`` steps."""
        totals: list[torch.Tensor] = []
        for schedule in plan:
            steps = deque(run_chain(chain, estimator, schedule, noise), maxlen=kept)
            found = [step.answer for step in steps]
            totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
        return [total / len(plan) for total in totals]
