"""Hooks of MkDocs for the site in docs/: the page of commands, equations, and links that lead out of docs/."""

import argparse
import re
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path, PurePosixPath
from posixpath import normpath
from textwrap import wrap
from typing import Any

from nnunetv2_diffusion import cli

COMMANDS = "reference/commands.md"
PROGRAM = "nnunetv2_diffusion"


def on_files(files: Any, config: Any) -> Any:
    """Add the page of commands."""
    from mkdocs.structure.files import File  # other functions are tested without MkDocs

    files.append(File.generated(config, COMMANDS, content=commands_page()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Equations as MathML, which browsers draw by themselves; files that are shown; links out of docs/ as text."""
    docs = Path(config.docs_dir)
    return with_files(linked_within(equations(markdown), page.file.src_uri, docs), docs.parent)


def equations(markdown: str) -> str:
    """Replace blocks ```math, as GitHub has them, by MathML."""
    from latex2mathml.converter import convert

    def drawn(match: re.Match) -> str:
        drawing = convert(" ".join(match[1].split()), display="block")
        return f'<div class="math">{drawing}</div>'

    return re.sub(r"^```math\n(.*?)^```$", drawn, markdown, flags=re.DOTALL | re.MULTILINE)


def with_files(markdown: str, root: Path) -> str:
    """Fill every Python block that holds nothing but the name of a file, as a comment, with that file.

    Raises:
        FileNotFoundError: if there is no such file.
    """

    def filled(match: re.Match) -> str:
        return f"```python\n{(root / match[1]).read_text(encoding='utf-8')}```"

    return re.sub(r"^```python\n# (\S+\.py)\n```$", filled, markdown, flags=re.MULTILINE)


def linked_within(markdown: str, page: str, docs: Path) -> str:
    """Links to folders and to files outside of docs/ as their text: the site does not have them."""

    def kept(match: re.Match) -> str:
        text, target = match.groups()
        if ":" in target or target.startswith("#"):
            return match[0]
        path = normpath(PurePosixPath(page).parent / target.split("#")[0])
        return text if path.startswith("..") or (docs / path).is_dir() else match[0]

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", kept, markdown)


def commands_page() -> str:
    """Every verb of the command with its options, in Markdown."""
    parts = [
        "# Commands",
        "This page is made from the commands' own `--help`. Every example there can be typed as it is once a data set "
        "and a model are at hand.",
    ]
    for verb, (_, summary) in cli.VERBS.items():
        parser = verb_parser(verb)
        parts += [f"## {verb}", f"{summary[0].upper()}{summary[1:]}."]
        parts += [code(line.strip() for line in (parser.epilog or "").splitlines()[1:])]
        for group in parser._action_groups:
            shown = [text for action in group._group_actions for text in described(parser, action)]
            if shown:
                parts += [f"**{group.title[0].upper()}{group.title[1:]}**", *shown]
    return "\n\n".join(parts) + "\n"


def verb_parser(verb: str) -> argparse.ArgumentParser:
    """The parser of one verb, its arguments included."""
    verbs = next(a for a in cli.build_parser(verb)._actions if isinstance(a, argparse._SubParsersAction))
    return verbs.choices[verb]


def code(commands: Iterable[str]) -> str:
    """A block of shell commands, long ones on several lines."""
    wrapped = [" \\\n    ".join(wrap(line, 76, break_long_words=False, break_on_hyphens=False)) for line in commands]
    return "\n".join(["```bash", *wrapped, "```"])


def described(parser: argparse.ArgumentParser, action: argparse.Action) -> Iterator[str]:
    """An argument and its meaning, an entry of a definition list; nothing for --help."""
    if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
        return
    formatter = parser.formatter_class(prog=PROGRAM, width=200)
    names = formatter._format_action_invocation(action)
    meaning = " ".join(formatter._expand_help(action).split())
    yield f"`{names}`\n:   {escape(meaning, quote=False)}"
