"""Command line of the post-processing of muscle masks; see scripts/datasets/muscle_postprocess."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Post-process a folder; 1 with a message if it cannot be done."""
    parser = argparse.ArgumentParser(
        prog="scripts/datasets/muscle_postprocess",
        description="Post-process predictions of the muscle ultrasound data as Marzola et al. 2021.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("-i", "--input", required=True, type=Path, metavar="DIR", help="predictions of nnU-Net, PNG")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="new folder")
    parser.add_argument(
        "--component", default="superficial", choices=("superficial", "leftmost"),
        help="which of two components of similar size is kept: as the paper says, or as its published code does",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    # only now, so that help and mistakes are answered at once
    from laboratory.datasets.muscle import LayoutError, postprocess_folder

    try:
        count = postprocess_folder(options.input, options.output, options.component)
    except (LayoutError, OSError) as error:
        print(f"muscle_postprocess: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {count} masks")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
