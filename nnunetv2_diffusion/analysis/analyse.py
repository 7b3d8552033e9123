"""Verb ``analyse``: the papers' studies of a diffusion model, on labelled cases."""

import argparse
import math
import platform
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nnunetv2_diffusion.analysis.cases import find_cases, read_cases
from nnunetv2_diffusion.analysis.figures import all_figures, to_png
from nnunetv2_diffusion.analysis.report import html_report
from nnunetv2_diffusion.analysis.studies import MODES, Findings, Laboratory
from nnunetv2_diffusion.analysis.tables import all_tables, rows_to_csv, summary
from nnunetv2_diffusion.architecture import MOST_VOXELS
from nnunetv2_diffusion.compat import package_versions
from nnunetv2_diffusion.diffusion import SAMPLERS, SPACINGS
from nnunetv2_diffusion.evaluation import EvaluationError
from nnunetv2_diffusion.evaluation.tables import to_markdown, to_text
from nnunetv2_diffusion.files import write_json
from nnunetv2_diffusion.inference.arguments import add_model_options, model_folder
from nnunetv2_diffusion.inference.inputs import InputError
from nnunetv2_diffusion.inference.loading import load_predictor
from nnunetv2_diffusion.inference.options import BOUNDS, OptionError, PredictionOptions, check_number
from nnunetv2_diffusion.inference.predict import EXPECTED
from nnunetv2_diffusion.inference.predictor import DiffusionPredictor
from nnunetv2_diffusion.sampling.views import TTA

HIDDEN = ("i", "l", "o", "m")  # folders of the machine
NAMED_BY_M = ("d", "c", "p", "tr")
EXAMPLES = """
nnunetv2_diffusion analyse -d 501 -c 3d_fullres -f 0 -i imagesTs -l labelsTs -o report
nnunetv2_diffusion analyse -m MODEL_FOLDER -i imagesTs -l labelsTs -o report --counts 1 2 5 --modes full none
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_model_options(parser.add_argument_group("model, as in nnUNetv2_predict"))
    _add_study_options(parser.add_argument_group("what is studied"))
    add = parser.add_argument_group("files and machine").add_argument
    add("-i", required=True, type=Path, metavar="IN", help="Folder of images <case>_0000<ending>, or one of them.")
    add("-l", required=True, type=Path, metavar="DIR", help="Folder of references, <case><ending>.")
    add("-o", required=True, type=Path, metavar="DIR", help="New folder for CSV, PNG, Markdown and report.html.")
    add("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="Where to compute.")
    add("--cases", type=int, metavar="N", help="Study the first N cases. Default: all.")
    add("--patch_size", type=int, nargs="+", metavar="N", help="Another size of tiles than the plans'.")
    add("--disable_progress_bar", action="store_true", help="Show no progress bar.")


def _add_study_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--steps", type=int, metavar="K", help="Steps of the studies of steps and samples. Default: the model's.")
    add("--samples", type=int, metavar="N", help="Chains that are drawn for each case. Default: 3; without a chain 1.")
    add("--counts", type=int, nargs="+", default=[], metavar="K", help="Numbers of steps to compare, as 1 2 5.")
    add(
        "--modes",
        nargs="+",
        default=[],
        choices=[*MODES, "all"],
        metavar="MODE",
        help=f"Ways of mirroring to compare: all, or of {', '.join(MODES)}.",
    )
    add("--tta", choices=TTA, default="none", help="Mirroring in the studies of steps, samples and counts.")
    add("--sampler", choices=SAMPLERS, help="How a step is taken. Default: the model's.")
    add("--step_spacing", choices=SPACINGS, help="Where the steps lie. Default: the model's.")
    add("--seed", type=int, help="Seed of the noise. Default: the model's.")


def run(arguments: argparse.Namespace) -> int:
    """Run the studies; 1 with a message if they cannot be."""
    try:
        findings, predictor = analyse(arguments)
        write_results(arguments, findings, predictor)
    except (*EXPECTED, EvaluationError) as error:
        print(f"nnunetv2_diffusion analyse: {error}", file=sys.stderr)
        return 1
    for table in all_tables(findings):
        print(f"{to_text(table)}\n")
    print(arguments.o / "report.html")
    return 0


def analyse(arguments: argparse.Namespace) -> tuple[Findings, DiffusionPredictor]:
    """All studies on all cases; every check comes before the first network pass.

    Raises:
        InputError: folders that cannot be used, or an output that exists.
        OptionError: the model cannot follow the options.
    """
    if arguments.o.exists():
        raise InputError(f"{arguments.o} exists; the results go into a new folder")
    if arguments.cases is not None and arguments.cases < 1:
        raise OptionError(f"--cases is {arguments.cases}, expected at least 1")
    for name, (low, high) in BOUNDS.items():
        check_number(f"--{name}", getattr(arguments, name), low, high)
    options = PredictionOptions(
        sampler=arguments.sampler, seed=arguments.seed, step_spacing=arguments.step_spacing, tta=arguments.tta
    )
    predictor = load_predictor(
        model_folder(arguments), arguments.f, arguments.chk, arguments.device, options, progress=False
    )
    set_patch_size(predictor, arguments.patch_size)
    modes = list(MODES) if "all" in arguments.modes else arguments.modes
    samples = arguments.samples or (3 if predictor.chain().stochastic else 1)
    laboratory = Laboratory(predictor, options, arguments.steps, samples, arguments.counts, modes)
    laboratory.plan()
    files = find_cases(predictor, arguments.i, arguments.l, arguments.cases)
    cases = read_cases(predictor, files)
    bar = tqdm(cases, total=len(files), unit="case", disable=arguments.disable_progress_bar)
    for case in bar:
        bar.set_description(case.name)
        laboratory.study(case)
    return laboratory.findings, predictor


def set_patch_size(predictor: DiffusionPredictor, size: list[int] | None) -> None:
    """Use tiles of another size than planned.

    Raises:
        OptionError: if the network cannot take them.
    """
    if size is None:
        return
    planned = predictor.configuration_manager.patch_size
    strides = predictor.configuration_manager.network_arch_init_kwargs["strides"]
    factors = [1] * len(planned)
    for stride in strides:
        steps = stride if isinstance(stride, list | tuple) else [stride] * len(planned)
        factors = [a * b for a, b in zip(factors, steps, strict=True)]
    fits = len(size) == len(planned) and all(n >= 1 and n % f == 0 for n, f in zip(size, factors, strict=True))
    if not fits or math.prod(size) > MOST_VOXELS:
        raise OptionError(
            f"--patch_size is {size}, expected {len(planned)} multiples of {factors} and at most {MOST_VOXELS:,} "
            f"voxels, as {list(planned)}"
        )
    predictor.configuration_manager.configuration["patch_size"] = list(size)


def describe(arguments: argparse.Namespace, predictor: DiffusionPredictor, findings: Findings) -> dict[str, Any]:
    """Model, options, versions and hardware."""
    given = {k: v for k, v in vars(arguments).items() if k not in ("run", "verb") and v is not None}
    chosen = {name: getattr(arguments, name) for name in ("steps", "sampler", "seed", "step_spacing")}
    predictor.set_options(PredictionOptions(**chosen))
    return {
        "trainer": predictor.trainer_name,
        "data set": predictor.plans_manager.dataset_name,
        "plans": predictor.plans_manager.plans_name,
        "patch size": list(predictor.configuration_manager.patch_size),
        "sampling": asdict(predictor.sampling) if predictor.sampling else "one pass",
        "cases": len(findings.samples),
        "date": date.today().isoformat(),
        "model": predictor.plans_manager.dataset_name if arguments.m is None else arguments.m.name,
        "options": {k: v for k, v in given.items() if k not in HIDDEN and (arguments.m is None or k not in NAMED_BY_M)},
        "versions": package_versions(),
        "python": platform.python_version(),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, {arguments.device}",
    }


def write_results(arguments: argparse.Namespace, findings: Findings, predictor: DiffusionPredictor) -> None:
    """CSV of all rows, PNG of all figures, the tables as Markdown and report.html, in a new folder."""
    settings, tables = describe(arguments, predictor, findings), all_tables(findings)
    figures = {name: (caption, to_png(figure)) for name, (caption, figure) in all_figures(findings).items()}
    arguments.o.mkdir(parents=True)
    for name in ("steps", "samples", "counts", "modes"):
        rows = getattr(findings, name)
        if rows:
            (arguments.o / f"{name}.csv").write_text(rows_to_csv(rows))
    for name, (_, png) in figures.items():
        (arguments.o / f"{name}.png").write_bytes(png)
    write_json(arguments.o / "settings.json", settings)
    (arguments.o / "tables.md").write_text("\n\n".join(to_markdown(table) for table in tables) + "\n")
    title = f"{settings['trainer']} on {settings['data set']}"
    (arguments.o / "report.html").write_text(
        html_report(title, list(figures.values()), tables, settings, summary(findings, arguments.tta))
    )
