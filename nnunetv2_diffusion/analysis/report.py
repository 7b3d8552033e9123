"""One HTML page with everything in it: it opens without a network."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from nnunetv2_diffusion.evaluation.tables import Table

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-top: 1px solid var(--line); padding-top: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { background: var(--soft); }
figure { display: inline-block; margin: 0.5rem 1rem 0.5rem 0; vertical-align: top; max-width: 100%; }
figure img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
figcaption, .note { font-size: 0.85rem; opacity: 0.75; }
"""  # noqa: E501, CSS


def html_table(table: Table) -> str:
    """A table with its title and notes."""
    head = "".join(f"<th>{escape(c)}</th>" for c in table.columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(c.text)}</td>" for c in row) + "</tr>" for row in table.cells())
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return (
        f"<h2>{escape(table.title)}</h2><div class='scroll'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>{notes}"
    )


def html_figure(caption: str, png: bytes) -> str:
    """A figure with its pixels in the page."""
    data = b64encode(png).decode("ascii")
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def html_report(
    title: str, figures: Sequence[tuple[str, bytes]], tables: Sequence[Table], settings: Mapping[str, Any]
) -> str:
    """The page.

    Args:
        title: of the page.
        figures: caption and PNG of each.
        tables: below the figures.
        settings: name -> value, at the end: model, options, versions.
    """
    facts = Table("Settings and versions", ["what", "value"], [[str(k), str(v)] for k, v in settings.items()])
    content = "".join(html_figure(*figure) for figure in figures)
    content += "".join(html_table(table) for table in [*tables, facts])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{content}</body></html>\n"
    )
