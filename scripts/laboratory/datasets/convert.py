"""Convert a data set of the papers to nnU-Net's raw layout."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from laboratory.datasets.papers import DATASETS
from laboratory.datasets.raw import Collection, check_collection, split_as_listed, splits_text, staging, write_raw
from laboratory.datasets.sources import LayoutError, Sources, listing

MSD = "the Medical Segmentation Decathlon is converted by nnU-Net itself: nnUNetv2_convert_MSD_dataset -i Task09_Spleen"
RAW, PREPROCESSED, RESULTS = "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"  # nnU-Net's variables


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the conversion."""
    lines = [f"  {name:24}{dataset.summary}\n{'':26}{dataset.reference}" for name, dataset in DATASETS.items()]
    parser = argparse.ArgumentParser(
        prog="scripts/datasets/convert",
        description="Convert a data set, as its owner distributes it, to nnU-Net's raw layout with the paper's split.",
        epilog="\n".join(["data sets:", *lines, "", MSD]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("name", metavar="NAME", choices=(*DATASETS, "msd"), help="data set, one of those below")
    add(
        "--from", dest="sources", nargs="+", type=Path, metavar="PATH", default=[],
        help="archives (.zip, .tar, .tar.gz) or folders of unpacked ones",
    )  # fmt: skip
    add("--id", type=int, metavar="N", help="number of the new data set in nnU-Net, 1 to 999")
    add("--out", type=Path, metavar="DIR", help="default: nnUNet_raw")
    add("--splits", type=Path, metavar="FILE", help='other parts: JSON, names of cases by "train", "val" and "test"')
    add("--seed", type=int, metavar="N", help="of parts that are drawn at random; default: 0")
    add("--incomplete", action="store_true", help="convert what there is; what is missing or unexpected is only told")
    parsed = parser.parse_args(arguments)
    if parsed.name != "msd":
        if not parsed.sources or parsed.id is None:
            parser.error("--from and --id are needed")
        if not 1 <= parsed.id <= 999:
            parser.error(f"--id is {parsed.id}, expected 1 to 999")
    return parsed


def output_folder(given: Path | None) -> tuple[Path, Path | None]:
    """Where the data set goes, and nnU-Net's folder of preprocessed data if it belongs to it."""
    host = os.environ.get(RAW)
    if given is None and not host:
        raise LayoutError("nnUNet_raw is not set; set it as nnU-Net needs it, or give --out")
    out = Path(given or host)
    if not out.is_dir():
        raise LayoutError(f"{out}: no such folder")
    preprocessed = os.environ.get(PREPROCESSED)
    belongs = bool(host) and Path(host).is_dir() and out.samefile(host)
    return out.resolve(), Path(preprocessed) if belongs and preprocessed and Path(preprocessed).is_dir() else None


def check_free(number: int, out: Path) -> None:
    """LayoutError unless no data set of this number exists, there or in nnU-Net's folders."""
    folders = [out, *(Path(os.environ[name]) for name in (RAW, PREPROCESSED, RESULTS) if os.environ.get(name))]
    found = sorted({entry.resolve() for folder in folders for entry in folder.glob(f"Dataset{number:03d}*")})
    if found:
        raise LayoutError(f"{listing(found)}: exists, and is not overwritten; choose another --id")


def convert(options: argparse.Namespace) -> list[str]:
    """Convert, and return what there is to say about it; nothing is left if it fails.

    LayoutError names what is missing, unexpected, unreadable, or would be overwritten.
    """
    dataset = DATASETS[options.name]
    out, preprocessed = output_folder(options.out)
    check_free(options.id, out)
    target = out / f"Dataset{options.id:03d}_{dataset.title}"
    with staging(target) as work:
        try:
            sources = Sources(
                options.sources, work / "unpacked", dataset.wanted, dataset.inner, incomplete=options.incomplete
            )
            collection = dataset.collect(sources, options.seed or 0)
            if options.seed is not None and not collection.drawn:
                raise LayoutError(f"--seed is given, but the split of {options.name} is not drawn")
            check_collection(dataset, collection, sources)
            if options.splits:
                collection = split_as_listed(collection, options.splits)
            write_raw(dataset, collection, work / target.name, sources)
        except LayoutError as error:  # name archives, not where they were unpacked for a while
            raise LayoutError(str(error).replace(f"{work / 'unpacked'}{os.sep}", "")) from error
        told = [note.replace(f"{work / 'unpacked'}{os.sep}", "") for note in sources.notes]
        place = publish(work / target.name, target, preprocessed, collection)
    return [*told, *summary(options.id, target, place, collection)]


def publish(made: Path, target: Path, preprocessed: Path | None, collection: Collection) -> Path | None:
    """Move the data set to its place; splits_final.json, if there is one, goes where nnU-Net looks for it."""
    if not collection.val or preprocessed is None:
        made.rename(target)
        return None
    folder = preprocessed / target.name
    folder.mkdir()
    try:
        (folder / "splits_final.json").write_text(splits_text(collection), encoding="utf-8")
        made.rename(target)
    except BaseException:
        (folder / "splits_final.json").unlink(missing_ok=True)
        folder.rmdir()
        raise
    return folder / "splits_final.json"


def summary(number: int, target: Path, place: Path | None, collection: Collection) -> list[str]:
    """What was written, and what to do with it."""
    train, val, test = (len(part) for part in (collection.train, collection.val, collection.test))
    lines = [
        f"{target}: {train + val} training cases, {val} of them to validate, and {test} test cases",
        f"split: {collection.split}",
    ]
    if not val:
        return [*lines, f"the paper trains on all training cases: nnUNetv2_train {number} CONFIGURATION all"]
    if place is None:
        source = target / "splits_final.json"
        lines.append(f"copy {source} to nnUNet_preprocessed/{target.name}/ before the training")
    else:
        lines.append(f"{place}: written")
    return [*lines, f"the paper's split is fold 0: nnUNetv2_train {number} CONFIGURATION 0"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert one data set; 1 with a message if it cannot be done."""
    options = parse_arguments(arguments)
    if options.name == "msd":
        print(MSD, file=sys.stderr)
        return 1
    try:
        lines = convert(options)
    except (LayoutError, OSError) as error:
        print(f"convert {options.name}: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0
