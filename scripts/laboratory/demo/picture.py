"""One picture of a case: image, ground truth, prediction and the steps of the reverse process."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_file_ending
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunetv2_diffusion.diffusion.noise import content_hash
from nnunetv2_diffusion.drawing import overlay
from nnunetv2_diffusion.sampling import Estimator, NoiseByContent, run_chain


def reverse_steps(
    model_folder: Path, images: list[Path], steps: int, device: str
) -> tuple[np.ndarray, list[tuple[int, np.ndarray, np.ndarray]]]:
    """Run the reverse process of K steps on the central patch of a case; fold 0 of the model is used.

    Returns:
        the patch's first channel (rows, columns) of its middle slice, and for each step the training time, the
        noisy mask of the last class in [-1, 1] and the label map, of that slice.
    """
    predictor = nnUNetPredictor(device=torch.device(device), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model_folder), (0,))
    network = predictor.network.to(device).eval()
    configuration = predictor.configuration_manager
    preprocessor = configuration.preprocessor_class(verbose=False)
    data, _, _ = preprocessor.run_case(
        [str(f) for f in images], None, predictor.plans_manager, configuration, predictor.dataset_json
    )[:3]
    label_map = predictor.label_manager.convert_probabilities_to_segmentation
    patch = _central_patch(data, configuration.patch_size)[None].to(device)
    with torch.inference_mode():
        found = [
            (t, _middle(state), _middle(label_map(probabilities[0])))
            for t, state, probabilities in _chain(network, patch, steps)
        ]
    return _middle(patch[0, 0]), found


def _chain(
    network: torch.nn.Module, patch: torch.Tensor, steps: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Training time, noisy mask of the last class in [-1, 1] and probabilities of every step; none without a chain."""
    if not getattr(network, "has_chain", False) or network.sampling is None or network.process is None:
        return
    config = replace(network.sampling, steps=steps)  # sampler and spacing as the model predicts
    chain = network.make_chain(config)
    if not chain.channels:
        return  # HiDiff's segmentor alone
    times = network.process.respace(steps, config.step_spacing).timestep_map.flip(0).tolist()
    noise = NoiseByContent(content_hash(patch), 0, 0, (chain.channels, *patch.shape[2:]), patch.device)
    for t, step in zip(times, run_chain(chain, Estimator(chain, patch), [[()]] * steps, noise), strict=True):
        state = 2 * step.state - 1 if chain.has_prior else step.state
        yield t, state[0, -1].clamp(-1, 1), step.answer


def _central_patch(data: np.ndarray, size: list[int]) -> torch.Tensor:
    """Centre of (C, *spatial), padded with zeros to size; of a volume the middle slice if size is 2D."""
    if len(size) == 2:
        data = data[:, data.shape[1] // 2]
    starts = [(n - s) // 2 for n, s in zip(data.shape[1:], size, strict=True)]
    box = [[start, start + s] for start, s in zip(starts, size, strict=True)]
    return torch.from_numpy(np.ascontiguousarray(crop_and_pad_nd(data, box, 0))).float()


def _middle(x: torch.Tensor) -> np.ndarray:
    """Middle slice of a volume, or the image itself."""
    x = x.float().cpu()
    return (x[len(x) // 2] if x.ndim == 3 else x).numpy()


def draw_case(
    file: Path,
    images: list[Path],
    truth: Path,
    ending: str,
    predictions: dict[str, Path],
    steps: tuple[np.ndarray, list[tuple[int, np.ndarray, np.ndarray]]],
) -> None:
    """Write a PNG: image, ground truth and predictions (mask files by trainer) above, ``reverse_steps`` below.

    The slice with most foreground is shown, of the first of the image's channels.
    """
    reader = determine_reader_writer_from_file_ending(ending, str(truth), verbose=False)()
    image = reader.read_images([str(images[0])])[0][0]  # (z, y, x); one slice for 2D images
    labels = reader.read_seg(str(truth))[0][0]
    index = int(np.argmax((labels > 0).sum((1, 2))))  # the slice with most foreground
    first = [("image", np.zeros_like(labels)), ("ground truth", labels)]
    first += [(name, reader.read_seg(str(mask))[0][0]) for name, mask in predictions.items()]
    patch, found = steps
    columns = max(len(first), len(found))
    figure, grid = plt.subplots(3, columns, figsize=(2.2 * columns, 7), squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (name, mask) in zip(grid[0], first, strict=False):
        overlay(axes, image[index], mask[index], name)
    for column, (t, noisy, step_labels) in enumerate(found):
        grid[1, column].imshow(noisy, cmap="gray", vmin=-1, vmax=1)
        grid[1, column].set_title(f"network input, t = {t}", fontsize=8)
        overlay(grid[2, column], patch, step_labels, f"estimate, step {column + 1} of {len(found)}")
    figure.suptitle(truth.name, fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)
