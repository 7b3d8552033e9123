"""What ``--help`` of every verb says, and what pack says before it writes."""

import argparse
import re

import pytest
import torch

from nnunetv2_diffusion import cli
from nnunetv2_diffusion.networks.binary_weights import pack
from nnunetv2_diffusion.networks.refiner import Refiner
from nnunetv2_diffusion.packing import what_it_saves


def verb_parser(verb: str) -> argparse.ArgumentParser:
    parser = cli.build_parser(verb)
    return next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices[verb]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_option_has_a_sentence_and_its_default(verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    parser = verb_parser(verb)
    shown = " ".join(parser.format_help().split())
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        assert re.match(r"\w.*[.?]$", action.help or ""), f"{verb} {action.dest}: {action.help!r}"
        default = action.default
        if default is None or isinstance(default, bool) or default in ((), []):
            continue
        assert f"{' '.join(action.help.split())} (default: {default})" in shown, f"{verb} {action.dest}"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_two_examples_that_it_can_read(verb):
    parser = verb_parser(verb)
    title, *examples = parser.epilog.splitlines()
    assert title == "examples:"
    assert len(examples) >= 2
    for example in examples:
        program, name, *words = example.split()
        if program == "nnunetv2_diffusion":
            cli.build_parser(name).parse_args([name, *words])
    assert any(example.split()[:2] == ["nnunetv2_diffusion", verb] for example in examples)


def test_pack_says_what_it_saves():
    network = torch.nn.ModuleDict(
        {
            "segmentor": torch.nn.Linear(512, 512, bias=False),
            "refiner": Refiner(1, 2, [[3, 3]] * 3, [[1, 1], [2, 2], [2, 2]], {}, 8),
        }
    )
    packed = pack(network)
    signs = sum(layer["signs"].numel() * 8 for layer in packed["binary"].values())
    first, second, third = what_it_saves(packed)
    assert first.startswith(f"{signs:,} binary weights: {signs * 4 / 2**20:.2f} MiB become ")
    assert "1.00 MiB of the segmentor" in second
    whole = sum(v.numel() * 4 for v in network.state_dict().values() if isinstance(v, torch.Tensor)) / 2**20
    found = re.fullmatch(r"together (\S+) MiB instead of (\S+) MiB, (\S+) % less", third)
    assert float(found[2]) == pytest.approx(whole, abs=0.02)
    assert float(found[3]) == pytest.approx(100 * (1 - float(found[1]) / float(found[2])), abs=0.5)
