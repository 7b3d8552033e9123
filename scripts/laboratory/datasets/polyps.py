"""What Kvasir-SEG and CVC-ClinicDB share: one class in RGB images, drawn into the numbers of Chen et al. 2024."""

from collections.abc import Callable, Sequence

from laboratory.datasets import splits
from laboratory.datasets.images import RGB, write_mask, write_rgb
from laboratory.datasets.raw import Case, Collection, DataSet
from laboratory.datasets.sources import Sources


def drawn(cases: Sequence[Case], counts: tuple[int, int, int], seed: int) -> Collection:
    """Cases in drawn parts of the given numbers: training, validation, test."""
    sentence = f"drawn with seed {seed}; numbers of Chen et al. 2024, whose list is not published"
    return Collection(**splits.draw(cases, counts, seed), split=sentence, drawn=True)


def polyp_dataset(
    title: str,
    summary: str,
    reference: str,
    counts: tuple[int, int, int],
    collect: Callable[[Sources, int], Collection],
    wanted: str,
) -> DataSet:
    """Polyps against background; ``wanted`` matches the files to unpack."""
    return DataSet(
        title=title, summary=summary, reference=reference, channels=RGB, labels={"background": 0, "polyp": 1},
        counts=counts, collect=collect, write_image=write_rgb, write_label=write_mask, file_ending=".png",
        wanted=wanted,
    )  # fmt: skip
