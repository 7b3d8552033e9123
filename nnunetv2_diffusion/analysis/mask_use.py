"""What a network makes of a mask that it is given: does it copy, correct or ignore it?"""

from collections.abc import Sequence
from typing import Any

import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image

from nnunetv2_diffusion.analysis.cases import LabelledCase, dice_scores, label_set
from nnunetv2_diffusion.inference.cases import check_finite, final_mask
from nnunetv2_diffusion.inference.chains import BoxNoise
from nnunetv2_diffusion.inference.options import OptionError
from nnunetv2_diffusion.inference.predictor import Canvas, DiffusionPredictor
from nnunetv2_diffusion.inference.sliding_window import at_once
from nnunetv2_diffusion.networks import DiffusionSegmentor
from nnunetv2_diffusion.training.corruption import CORRUPTIONS, make_corruption
from nnunetv2_diffusion.training.losses import encoded_target

LEVELS = (0.0, 0.5)  # low and high noise: t as a share of the last one
SHIFT = 6  # voxels along every axis, of a shifted mask
GIVEN = ("true", "shifted", *CORRUPTIONS[1:])


def check_mask_use(predictor: DiffusionPredictor) -> None:
    """Raises OptionError for a model that is given no mask of a Gaussian process."""
    network = predictor.network
    if not isinstance(network, DiffusionSegmentor) or network.process is None:
        raise OptionError("--mask_use: the network of this model is given no noisy mask")


def true_x_start(predictor: DiffusionPredictor, labels: torch.Tensor) -> torch.Tensor:
    """Ground truth as training encodes it.

    Args:
        predictor: of the model.
        labels: (1, *spatial), integers; ignored voxels and those outside of the case count as they do in training.

    Returns:
        (1, C_mask, *spatial) in [-1, 1], 0 where the truth is unknown.
    """
    manager = predictor.label_manager
    target = labels[None].clamp(min=0)
    if manager.has_regions:
        regions = [*manager.foreground_regions, *([manager.ignore_label] if manager.has_ignore_label else [])]
        values = [torch.tensor(r if isinstance(r, list | tuple) else [r]) for r in regions]
        target = torch.cat([torch.isin(target, v) for v in values], 1).float()
    encoding = predictor.network.encoding
    truth, valid = encoded_target(target, encoding, manager.has_regions, manager.ignore_label)
    return (2 * truth - 1) * valid


def given_masks(predictor: DiffusionPredictor, x_start: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    """Kind of ``GIVEN`` -> mask (1, C_mask, *spatial); x_start is the true one. Shifted masks are moved in a circle."""
    moves = [min(SHIFT, n // 2) for n in x_start.shape[2:]]
    masks = {"true": x_start, "shifted": torch.roll(x_start, moves, list(range(2, x_start.ndim)))}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for kind in CORRUPTIONS[1:]:
            corrupt = make_corruption(kind, predictor.network.encoding, predictor.label_manager.has_regions)
            masks[kind] = corrupt(x_start)
    return masks


@torch.inference_mode()
def estimate_from(
    predictor: DiffusionPredictor, canvas: Canvas, x_start: torch.Tensor, level: float, seed: int = 0
) -> torch.Tensor:
    """One pass on every tile, given x_t ~ q(x_t | b x_start); no mirroring.

    Args:
        predictor: of the model.
        canvas: of the case.
        x_start: mask of the padded case, (1, C_mask, *padded), in [-1, 1].
        level: t as a share of the last time step.
        seed: of the noise.

    Returns:
        blended probabilities (K, *spatial) without padding.
    """
    network, device = predictor.network, predictor.device
    t = torch.tensor([round(level * (network.process.num_timesteps - 1))])
    start, size = tuple(-p for p in canvas.padding), tuple(canvas.data.shape[1:])
    noise = BoxNoise(seed, 0, network.encoding.channels, start, size, False, torch.device("cpu")).normal(0)
    state = network.process.q_sample(x_start, t, noise)[0]
    blend = canvas.blend()
    for tiles in at_once(canvas.tiles, predictor.tiles_at_once):
        image, seen = (torch.stack([v[tile.index] for tile in tiles]).to(device) for v in (canvas.data, state))
        logits = network(image, seen, network.process.timestep_map[t].expand(len(image)), full_resolution_only=True)
        blend.add_all(tiles, network.probabilities(logits[0] if isinstance(logits, list | tuple) else logits))
    return blend.mean()[0][(slice(None), *canvas.crop[1:])]


def mask_use(
    predictor: DiffusionPredictor, case: LabelledCase, levels: Sequence[float] = LEVELS, seed: int = 0
) -> list[dict[str, Any]]:
    """Dice with the reference of what a network says when it is given a true or a wrong mask.

    A network that ignores the mask has the same Dice for all; one that copies it has nearly 1 for the true mask and
    little for the others.

    Args:
        predictor: of a model of the recycling family.
        case: with ``truth``.
        levels: of noise, t as a share of the last time step.
        seed: of noise and corruptions.

    Returns:
        rows: case, given (see ``GIVEN``), level, label, Dice.

    Raises:
        OptionError: the model is given no noisy mask.
        CaseError: the network's answer is not finite.
    """
    check_mask_use(predictor)
    canvas, labels = predictor.canvas(case.data), label_set(predictor)
    patch = predictor.configuration_manager.patch_size
    truth, _ = pad_nd_image(case.truth, patch, "constant", {"value": 0}, True, None)
    rows = []
    for given, mask in given_masks(predictor, true_x_start(predictor, truth), seed).items():
        for level in levels:
            p = estimate_from(predictor, canvas, mask, level, seed)
            check_finite(p, predictor, f"{case.name}: given the {given} mask")
            scores = dice_scores(labels, case.reference, final_mask(predictor, p, case.properties))
            where = {"case": case.name, "given": given, "level": level}
            rows += [{**where, "label": name, "Dice": value} for name, value in scores.items()]
    return rows
