"""The data sets of the papers: where their cases are, and how they are split.

docs/datasets.md has for each what is expected, from where that is known, and what was not verified.
"""

import json
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from laboratory.datasets.raw import Case, Collection, DataSet, cut, draw
from laboratory.datasets.sources import LayoutError, Sources, listing

CHEN = "numbers of Chen et al. 2024, whose list is not published"
Pairs = dict[str, tuple[Path, Path]]


def numbered(names: Iterable[str]) -> dict[str, int]:
    """Labels of a data set: background 0, then the names from 1."""
    return {name: value for value, name in enumerate(("background", *names))}


def drawn(cases: list[Case], counts: tuple[int, int, int], seed: int) -> Collection:
    """Cases in drawn parts of the given numbers: training, validation, test."""
    return Collection(**draw(cases, counts, seed), split=f"drawn with seed {seed}; {CHEN}", drawn=True)


def as_cases(found: Pairs, prefix: str, keys: Iterable[str] | None = None) -> list[Case]:
    """Cases of keys that are there, all by default."""
    return [Case(prefix + k, found[k][:1], found[k][1]) for k in (found if keys is None else keys) if k in found]


def report_difference(sources: Sources, where: Path, found: Iterable[str], known: Iterable[str], who: str) -> None:
    """Tell which cases that a list has are missing, and which it does not have."""
    for message, keys in {
        f"no images and labels of cases that {who} lists": sorted(set(known) - set(found)),
        f"cases that {who} does not list": sorted(set(found) - set(known)),
    }.items():
        if keys:
            sources.problem(f"{where}: {message}: {listing(keys)}")


# --- muscle ultrasound


def collect_muscle(sources: Sources, seed: int) -> Collection:
    """The owner's folders; images without a mask are left out, as by the paper's authors."""
    parts = ("train", "val", "test")
    root = sources.find_folder(*parts, *(f"{part}annot" for part in parts), prefer="MuscleCNN")
    cases = {}
    for part in parts:
        images, masks = root / part, root / f"{part}annot"
        found = sources.pairs(*(sources.matching(f, r"(.+)\.png") for f in (images, masks)), images, strict=False)
        if not found:
            raise LayoutError(f"{images} and {masks}: found no PNG files of the same names")
        cases[part] = as_cases(found, "")
    return Collection(**cases, split="the owner's folders train, val and test, as in the paper")


# --- AMOS

LAST_CT = 500
AMOS_ORGANS = (
    "spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach", "aorta", "postcava",
    "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus",
)  # fmt: skip


def collect_amos(sources: Sources, seed: int) -> Collection:
    """The CT cases that dataset.json lists."""
    root = sources.find_folder("dataset.json", "imagesTr", "labelsTr", "imagesVa", "labelsVa")
    try:
        listed = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
        parts = [[(pair["image"], pair["label"]) for pair in listed[part]] for part in ("training", "validation")]
    except (ValueError, KeyError, TypeError) as error:
        raise LayoutError(
            f"{root / 'dataset.json'}: {error!r}, expected 'training' and 'validation' as lists of image and label"
        ) from error
    train, official = (_amos_cases(sources, root, part) for part in parts)
    val = len(official) // 10
    return Collection(
        train, official[:val], official[val:],
        "the official training set; the first tenth of the official validation set, in dataset.json's order, to "
        "validate and the rest to test on, as in the code of Fu et al. 2023",
    )  # fmt: skip


def _amos_cases(sources: Sources, root: Path, listed: list[tuple[str, str]]) -> list[Case]:
    cases, missing = [], []
    for image, label in listed:
        match = re.fullmatch(r"amos_(\d{4})\.nii\.gz", Path(image).name)
        if not match:
            raise LayoutError(f"{root / 'dataset.json'}: lists {image}, expected names as amos_0001.nii.gz")
        if int(match.group(1)) > LAST_CT:
            continue
        absent = [name for name in (image, label) if not (root / name).is_file()]
        missing += absent
        if not absent:
            cases.append(Case(f"amos_{match.group(1)}", (root / image,), root / label))
    if missing:
        sources.problem(f"{root}: dataset.json lists files that are not there: {listing(missing)}")
    return cases


# --- male pelvis

PELVIC = (
    "bladder", "bone", "obturator internus", "transition zone", "central gland", "rectum", "seminal vesicle",
    "neurovascular bundle",
)  # fmt: skip
PELVIC_VALIDATED = 2  # cases of each institution


def collect_pelvis(sources: Sources, seed: int) -> Collection:
    """The cases that institution.txt lists, split within each institution."""
    folder = sources.find_folder("*_img.nii*")
    table = sources.find_file("institution.txt")
    patterns = [rf"(\w+)_{kind}\.nii(?:\.gz)?" for kind in ("img", "mask")]
    unused = "|".join([*patterns, table.name, r".+\.zip"])
    found = sources.pairs(*(sources.matching(folder, pattern, unused) for pattern in patterns), folder)
    institutions: dict[str, list[str]] = {}
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
        words = line.split()
        if len(words) not in (0, 2):
            raise LayoutError(f"{table}: line {number} is {line!r}, expected a case and its institution")
        if words:
            institutions.setdefault(words[1], []).append(words[0])
    report_difference(sources, folder, found, [k for keys in institutions.values() for k in keys], table.name)
    train, val, test = [], [], []
    for keys in institutions.values():
        cases = as_cases(found, "pelvis_", keys)
        first_test = max(PELVIC_VALIDATED, int(0.75 * len(cases)) - PELVIC_VALIDATED)
        val += cases[:PELVIC_VALIDATED]
        train += cases[PELVIC_VALIDATED:first_test]
        test += cases[first_test:]
    split = "within each institution in institution.txt's order, as in the code of Fu et al. 2023"
    return Collection(train, val, test, split)


# --- BraTS

BRATS_FILES = ("t1", "t1ce", "t2", "flair", "seg")
FU_COUNTS, HIDIFF_COUNTS = (938, 31, 282), (1126, 0, 125)


def brats_cases(sources: Sources) -> list[Case]:
    """All labelled cases, by name."""
    cases = []
    for folder, _, files in sources.walk():
        needed = [f"{folder.name}_{kind}.nii.gz" for kind in BRATS_FILES]
        official = re.search("validation", folder.parent.name, re.IGNORECASE) and needed[-1] not in files
        if not re.fullmatch(r"BraTS2021_\d{5}", folder.name) or official:
            continue
        missing, unexpected = [name for name in needed if name not in files], sorted(files - set(needed))
        if unexpected:
            sources.problem(f"{folder}: unexpected {listing(unexpected)}")
        if missing:
            sources.problem(f"{folder}: no {listing(missing)}")
            continue
        *images, label = (folder / name for name in needed)
        cases.append(Case(folder.name, tuple(images), label))
    if not cases:
        sources.nothing("folders as BraTS2021_00000 with five files each")
    return sorted(cases, key=lambda case: case.name)


def collect_brats_fu(sources: Sources, seed: int) -> Collection:
    """Split by sorted names."""
    parts = cut(brats_cases(sources), FU_COUNTS)
    return Collection(**parts, split="sorted names cut into parts, as in the code of Fu et al. 2023")


def collect_brats_hidiff(sources: Sources, seed: int) -> Collection:
    """Split at random."""
    return drawn(brats_cases(sources), HIDIFF_COUNTS, seed)


# --- Synapse

SYNAPSE_ORGANS = {
    "aorta": 8, "gallbladder": 4, "left kidney": 3, "right kidney": 2, "liver": 6, "pancreas": 11, "spleen": 1,
    "stomach": 7,
}  # fmt: skip
SYNAPSE_SCANS = [f"{number:04d}" for number in (*range(1, 11), *range(21, 41))]
SYNAPSE_TEST = {f"{number:04d}" for number in (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)}


def collect_synapse(sources: Sources, seed: int) -> Collection:
    """The 30 labelled scans in TransUNet's parts."""
    root = sources.find_folder("img", "label", prefer="Training")
    found = sources.pairs(
        *(sources.matching(root / kind, rf"{kind}(\d{{4}})\.nii\.gz") for kind in ("img", "label")), root
    )
    report_difference(sources, root, found, SYNAPSE_SCANS, "the split")
    train, test = ([k for k in SYNAPSE_SCANS if (k in SYNAPSE_TEST) == tested] for tested in (False, True))
    parts = (as_cases(found, "synapse_", keys) for keys in (train, [], test))
    return Collection(*parts, "of TransUNet, as in Chen et al. 2024")


# --- polyps

KVASIR_COUNTS, CVC_COUNTS = (800, 100, 100), (488, 62, 62)


def collect_polyps(
    sources: Sources, seed: int, folders: tuple[str, str], prefer: str, pattern: str, counts: tuple[int, int, int]
) -> Collection:
    """All pairs, drawn into parts; numbers become names as cvc_001."""
    root = sources.find_folder(*folders, prefer=prefer)
    found = sources.pairs(*(sources.matching(root / name, pattern) for name in folders), root)
    if all(key.isdecimal() for key in found):
        found = {f"cvc_{int(key):03d}": found[key] for key in sorted(found, key=int)}
    return drawn(as_cases(found, ""), counts, seed)


# --- retina


def collect_drive(sources: Sources, seed: int) -> Collection:
    """The owner's training and test set, the first observer's annotations."""
    parts = []
    for name in ("training", "test"):
        folder = sources.find_folder("images", named=name)
        images = sources.matching(folder / "images", rf"(\d\d)_{name}\.tif")
        manual = folder / "1st_manual"
        if name == "test" and not manual.is_dir():
            sources.notes.append(f"{folder}: no 1st_manual, the test images stay without labels")
            parts.append([Case(f"drive_{key}", (image,), None) for key, image in images.items()])
            continue
        masks = sources.matching(manual, r"(\d\d)_manual1\.gif") if manual.is_dir() else {}
        found = sources.pairs(images, masks, folder) if masks else {}
        if not found:
            sources.nothing(f"{name}/images and {name}/1st_manual with files of the same numbers")
        parts.append(as_cases(found, "drive_"))
    return Collection(parts[0], [], parts[1], "the owner's, as in Chen et al. 2024")


def collect_chase(sources: Sources, seed: int) -> Collection:
    """All eyes, split by child; the first observer's annotations."""
    folder = sources.find_folder("*_1stHO.png")
    image, first = (rf"Image_(\d\d[LR]){ending}" for ending in (r"\.jpg", r"_1stHO\.png"))
    images = sources.matching(folder, image, unused=rf"{first}|Image_\d\d[LR]_2ndHO\.png|.+\.zip")
    found = sources.pairs(images, sources.matching(folder, first, unused=".*"), folder)
    train, test = ([key for key in found if (int(key[:2]) > 10) == late] for late in (False, True))
    return Collection(
        as_cases(found, "chase_", train), [], as_cases(found, "chase_", test),
        "children 1 to 10 and 11 to 14, as in the code of FR-UNet, which Chen et al. 2024 follow",
    )  # fmt: skip


def _brats(title: str, shown: str, labels: dict, fu: bool, **more: object) -> DataSet:
    return DataSet(
        title=f"BraTS2021{title}", summary=f"{shown} in MR of the brain (BraTS 2021, Baid et al. 2021).",
        reference="https://www.synapse.org/#!Synapse:syn27046444", channels=("T1", "T1ce", "T2", "FLAIR"),
        labels=labels, counts=FU_COUNTS if fu else HIDIFF_COUNTS,
        collect=collect_brats_fu if fu else collect_brats_hidiff, wanted=r"BraTS2021_\d{5}_\w+\.nii\.gz$",
        inner=r"BraTS2021_Training_Data\.tar$", **more,
    )  # fmt: skip


_CLASSES = {0: 0, 1: 1, 2: 2, 4: 3}
DATASETS: dict[str, DataSet] = {
    "muscle-us": DataSet(
        "MuscleUS", "Muscles in transverse ultrasound images (Marzola et al. 2021).",
        "https://data.mendeley.com/datasets/3jykz7wz8d/1", labels=numbered(["muscle"]), counts=(2531, 666, 713),
        collect=collect_muscle, picture="L", wanted=r"\.png$",
    ),
    "amos-ct": DataSet(
        "AmosCT", "15 abdominal organs in CT (AMOS 2022, Ji et al. 2022).", "https://zenodo.org/record/7262581",
        channels=("CT",), labels=numbered(AMOS_ORGANS), counts=(200, 10, 90), collect=collect_amos,
        # neither the images to be sent to the challenge nor MR, numbers from 0501
        wanted=r"(^|/)(dataset\.json|(images|labels)(Tr|Va)/amos_0([0-4]\d\d|500)\.nii\.gz)$",
        reader="NibabelIOWithReorient",
    ),
    "male-pelvic-mr": DataSet(
        "MalePelvicMR", "8 structures in T2-weighted MR of the male pelvis (Li et al. 2022).",
        "https://zenodo.org/record/7013610", channels=("T2",), labels=numbered(PELVIC), counts=(411, 14, 164),
        collect=collect_pelvis,
    ),
    "brats2021-whole-tumour": _brats(
        "WholeTumour", "Whole tumour", numbered(["whole tumour"]), True, values={0: 0, 1: 1, 2: 1, 4: 1}
    ),
    "brats2021-classes": _brats(
        "Classes", "Necrotic core, oedema and enhancing tumour",
        numbered(["necrotic core", "oedema", "enhancing tumour"]), False, values=_CLASSES,
    ),
    "brats2021-regions": _brats(
        "Regions", "Whole tumour, tumour core and enhancing tumour",
        {"background": 0, "whole tumour": (1, 2, 3), "tumour core": (1, 3), "enhancing tumour": 3}, False,
        values=_CLASSES,
        regions_class_order=(2, 1, 3),  # a voxel of the whole tumour only is oedema, of the core only necrotic
    ),
    "synapse": DataSet(
        "SynapseCT", "8 abdominal organs in CT (Synapse multi-organ, BTCV; Landman et al. 2015).",
        "https://www.synapse.org/#!Synapse:syn3193805/wiki/217789", channels=("CT",), labels=numbered(SYNAPSE_ORGANS),
        counts=(18, 0, 12), collect=collect_synapse, wanted=r"(^|/)(img/img|label/label)\d{4}\.nii\.gz$",
        # the eight organs in TransUNet's order, the others of 13 as background
        values={**dict.fromkeys(range(14), 0), **{old: new for new, old in enumerate(SYNAPSE_ORGANS.values(), 1)}},
    ),
    "kvasir-seg": DataSet(
        "KvasirSEG", "Polyps in endoscopic images (Kvasir-SEG, Jha et al. 2020).",
        "https://datasets.simula.no/kvasir-seg/", labels=numbered(["polyp"]), counts=KVASIR_COUNTS,
        collect=partial(collect_polyps, folders=("images", "masks"), prefer="Kvasir-SEG",
                        pattern=r"([\w-]+)\.jpe?g", counts=KVASIR_COUNTS),
        picture="RGB", wanted=r"\.jpe?g$",
    ),
    "cvc-clinicdb": DataSet(
        "CVCClinicDB", "Polyps in endoscopic images (CVC-ClinicDB, Bernal et al. 2015).",
        "https://polyp.grand-challenge.org/CVCClinicDB/", labels=numbered(["polyp"]), counts=CVC_COUNTS,
        collect=partial(collect_polyps, folders=("Original", "Ground Truth"), prefer="TIF",
                        pattern=r"(\d+)\.(?:tiff?|png)", counts=CVC_COUNTS),
        picture="RGB", wanted=r"\.(tiff?|png)$",
    ),
    "drive": DataSet(
        "DRIVE", "Vessels in images of the retina (DRIVE, Staal et al. 2004).", "https://drive.grand-challenge.org/",
        labels=numbered(["vessel"]), counts=(20, 0, 20), collect=collect_drive, picture="RGB", wanted=r"\.(tif|gif)$",
    ),
    "chase-db1": DataSet(
        "CHASEDB1", "Vessels in images of the retina (CHASE_DB1, Owen et al. 2011).",
        "https://blogs.kingston.ac.uk/retinal/chasedb1/", labels=numbered(["vessel"]), counts=(20, 0, 8),
        collect=collect_chase, picture="RGB", wanted=r"\.(jpg|png)$",
    ),
}  # fmt: skip
