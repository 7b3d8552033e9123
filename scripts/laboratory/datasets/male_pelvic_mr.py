"""T2-weighted MR of the male pelvis from seven institutions (Li et al. 2022), as in Fu et al. 2023, section 4.1.3.

Owner: https://zenodo.org/record/7013610 (``data.zip`` and ``institution.txt``; give both, or a folder with both).

Expected: a folder (``data``) of ``001000_img.nii`` and ``001000_mask.nii``, and ``institution.txt`` with a line for
each case, its number and its institution with a space between. Labels 1 to 8 as in ``STRUCTURES``. Known from
- the code of the data's owners, which cites that record:
  https://github.com/kate-sann5100/CrossInstitutionFewShotSegmentation (README.md,
  dataset/dataset_utils.py; the README writes "instiution.txt", the code ``institution.txt``)
- the loader of the paper's authors, which downloads both files:
  https://github.com/mathpluscode/ImgX-DiffSeg/blob/ce57729e2dcd1d21960ec797bdff2ef5df7e5101/imgx/datasets/male_pelvic_mr/male_pelvic_mr_dataset_builder.py

Not verified: the content of institution.txt, on whose order the split depends.

Split: of n cases of an institution in the file's order, the first 2 to validate, up to number floor(3n/4) - 2 to train,
the rest to test on. The paper calls this random; its authors' loader does what is done here, and it gives the paper's
411, 14 and 164 cases.
"""

from pathlib import Path

from laboratory.datasets.images import take_nifti, write_labels
from laboratory.datasets.layouts import matching, pairs
from laboratory.datasets.raw import Case, Collection, DataSet
from laboratory.datasets.sources import LayoutError, Sources, listing

STRUCTURES = (
    "bladder", "bone", "obturator internus", "transition zone", "central gland", "rectum", "seminal vesicle",
    "neurovascular bundle",
)  # fmt: skip
IMAGE, MASK = r"(\w+)_img\.nii(?:\.gz)?", r"(\w+)_mask\.nii(?:\.gz)?"
VALIDATED = 2  # cases of each institution


def collect(sources: Sources, seed: int) -> Collection:
    """The cases that institution.txt lists, split within each institution."""
    folder = sources.find_folder(
        lambda folder, subfolders, files: any(name.endswith(("_img.nii", "_img.nii.gz")) for name in files),
        "folder with files as 001000_img.nii",
    )
    table = sources.find_file("institution.txt")
    other = rf"{table.name}|.+\.zip"
    found = pairs(
        sources,
        matching(sources, folder, IMAGE, unused=rf"{MASK}|{other}"),
        matching(sources, folder, MASK, unused=rf"{IMAGE}|{other}"),
        folder,
    )
    institutions = _institutions(table)
    known = [key for keys in institutions.values() for key in keys]
    for message, keys in {
        f"no images and labels of cases that {table.name} lists": sorted(set(known) - set(found)),
        f"cases that {table.name} does not list": sorted(set(found) - set(known)),
    }.items():
        if keys:
            sources.problem(f"{folder}: {message}: {listing(keys)}")
    train, val, test = [], [], []
    for keys in institutions.values():
        cases = [Case(f"pelvis_{key}", (found[key][0],), found[key][1]) for key in keys if key in found]
        first_test = max(VALIDATED, int(0.75 * len(cases)) - VALIDATED)
        val += cases[:VALIDATED]
        train += cases[VALIDATED:first_test]
        test += cases[first_test:]
    return Collection(
        train, val, test, "within each institution in institution.txt's order, as in the code of Fu et al. 2023"
    )


def _institutions(table: Path) -> dict[str, list[str]]:
    """Cases of each institution, in the file's order."""
    institutions: dict[str, list[str]] = {}
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2:
            raise LayoutError(f"{table}: line {number} is {line!r}, expected a case and its institution")
        institutions.setdefault(words[1], []).append(words[0])
    return institutions


def write_label(source: Path, image: Path, target: Path) -> None:
    """The label map as it is."""
    write_labels(source, image, target, {value: value for value in range(len(STRUCTURES) + 1)})


DATASET = DataSet(
    title="MalePelvicMR",
    summary="8 structures in T2-weighted MR of the male pelvis (Li et al. 2022).",
    reference="https://zenodo.org/record/7013610",
    channels=("T2",),
    labels={"background": 0, **{name: value for value, name in enumerate(STRUCTURES, start=1)}},
    counts=(411, 14, 164),
    collect=collect,
    write_image=take_nifti,
    write_label=write_label,
    file_ending=".nii.gz",
)
