"""One HTML page with everything in it: it opens without a network."""

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import Environment

from nnunetv2_diffusion.evaluation.tables import Table

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-top: 1px solid var(--line); padding-top: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { background: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(34rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; } .figures figure:first-child { grid-column: 1 / -1; }
figure img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
figcaption, .note { font-size: 0.85rem; opacity: 0.75; max-width: 60rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1.2rem; font-size: 0.92rem; }
dt { opacity: 0.75; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  dl { grid-template-columns: 1fr; } dd { margin-bottom: 0.4rem; }
  .figures figure:first-child { overflow-x: auto; } .figures figure:first-child img { min-width: 52rem; }
}
</style></head><body><h1>{{ title }}</h1>
{% for sentence in summary %}<p>{{ sentence }}</p>{% endfor %}
<div class="figures">
{% for caption, png in figures %}
<figure><img alt="{{ caption }}" src="data:image/png;base64,{{ png }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
</div>
{% for table in tables %}
<h2>{{ table.title }}</h2><div class="scroll"><table>
<thead><tr>{% for name in table.columns %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in table.cells() %}<tr>{% for cell in row %}<td>{{ cell.text }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{% for note in table.notes %}<p class="note">{{ note }}</p>{% endfor %}
{% endfor %}
<h2>Settings and versions</h2><dl>{% for key, value in settings %}<dt>{{ key }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
</body></html>
"""  # noqa: E501, CSS


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings one by one, nested ones by dotted names; those that are not set are left out."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat_settings(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def html_report(
    title: str,
    figures: Sequence[tuple[str, bytes]],
    tables: Sequence[Table],
    settings: Mapping[str, Any],
    summary: Sequence[str] = (),
) -> str:
    """The page.

    Args:
        title: of the page.
        figures: caption and PNG of each; the first takes the whole width.
        tables: below the figures.
        settings: name -> value, at the end: model, options, versions.
        summary: sentences at the beginning.
    """
    pictures = [(caption, b64encode(png).decode("ascii")) for caption, png in figures]
    page = Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
    return page.render(
        title=title, figures=pictures, tables=tables, settings=flat_settings(settings), summary=summary
    )  # fmt: skip
