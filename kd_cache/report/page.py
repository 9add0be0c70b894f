"""A page: text, tables and figures in one HTML file that needs nothing else, by day, by night and on paper.

Everything that is not ours is escaped here, and nowhere else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Final

from yaml import YAMLError

from kd_cache.commands import Table
from kd_cache.errors import CorruptError, KDCacheError, StoreError, UsageError, shown
from kd_cache.files.atomic import make_directory, open_file, write_atomic

PAGE: Final = "report.html"
_MARK: Final = '<meta name="generator" content="kd-cache report">'
_JSON_MARK: Final = '{\n "kd_cache_report": 1,'
_STYLE: Final = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00; --c5: #56b4e9; --c6: #767676; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e6e9ec; --soft: #a5adb5; --line: #3b434c;
  --c0: #4aa3df; --c1: #ee7733; --c2: #2bc49a; --c3: #de9cc2; --c4: #f0b429; --c5: #8fd0f5; --c6: #9a9a9a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem clamp(.75rem, 3vw, 2rem) 3rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 46rem; }
.soft, figcaption, caption { color: var(--soft); }
.figures { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt; }
figcaption { font-size: .875rem; margin-top: .25rem; }
.scroll { overflow-x: auto; max-width: 100%; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; padding-bottom: .25rem; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
td { white-space: nowrap; }
th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
td.text { white-space: normal; text-align: left; min-width: 8rem; max-width: 30rem; overflow-wrap: anywhere; }
@media print { :root { --paper: #fff; --ink: #000; --soft: #333; --line: #999; }
  body { max-width: none; padding: 0; font-size: 10pt; } .scroll { overflow-x: visible; }
  .figures { grid-template-columns: 1fr 1fr; } h2 { break-after: avoid; } tr { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Figure:
    """A drawing: ``svg`` as `kd_cache.report.figures` makes them, and what it shows, in words."""

    svg: str
    title: str
    told: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, and what is below it: sentences, tables, and figures side by side."""

    title: str
    parts: Sequence[str | Table | Figure]


@dataclass(frozen=True)
class Page:
    """What a report says. ``content`` are its numbers, for a program; ``ValueError`` for those that JSON lacks."""

    title: str
    lead: Sequence[str]
    sections: Sequence[Section]
    content: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _ = self.json

    @property
    def html(self) -> str:
        """The whole file. Equal content gives equal bytes."""
        number = 0
        body = [f"<h1>{_text(self.title)}</h1>", *(f"<p>{_text(line)}</p>" for line in self.lead)]
        for section in self.sections:
            body += ["<section>", f"<h2>{_text(section.title)}</h2>"]
            drawn: list[str] = []
            for part in [*section.parts, None]:
                if isinstance(part, Figure):
                    number += 1
                    drawn.append(_figure(part, number))
                    continue
                if drawn:
                    body += ['<div class="figures">', *drawn, "</div>"]
                    drawn = []
                if part is not None:
                    body.append(_table(part) if isinstance(part, Table) else f"<p>{_text(part)}</p>")
            body.append("</section>")
        head = [
            '<meta charset="utf-8">',
            _MARK,
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(self.title)}</title>",
            f"<style>{_STYLE}</style>",
        ]
        start = ["<!doctype html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", "<main>"]
        return "\n".join([*start, *body, "</main>", "</body>", "</html>", ""])

    @property
    def json(self) -> str:
        """The numbers behind it."""
        text = json.dumps({"kd_cache_report": 1, "title": self.title, **self.content}, indent=1, allow_nan=False)
        return text + "\n"

    def write(self, to: Path, outside: Path | None = None) -> Path:
        """Write the page and ``.json`` beside it: into ``to``, a folder, or as ``to``, an ``.html``. Gives its path.

        Raises:
            UsageError: a file that is no report is in the way, or ``to`` is in the folder that it must lie outside of.
            StoreError: it cannot be written.
        """
        page = to if to.suffix.lower() == ".html" else to / PAGE
        if outside is not None and page.resolve().is_relative_to(outside.resolve()):
            raise UsageError(f"{shown(page)} lies in a cache", hint="Give an --output elsewhere.")
        numbers = page.with_suffix(".json")
        for path, mark in ((page, _MARK), (numbers, _JSON_MARK)):
            _refuse_other(path, mark)
        make_directory(page.parent)
        write_atomic(page, self.html.encode())
        write_atomic(numbers, self.json.encode())
        return page


@contextmanager
def as_written_by(command: str, path: Path) -> Iterator[None]:
    """Turn what a file of another content than ``command`` writes leads to into a `CorruptError`."""
    try:
        yield
    except KDCacheError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError, YAMLError) as error:
        why = f"{type(error).__name__}: {shown(error)}"
        raise CorruptError(f"{shown(path)} is not as kd-cache {command} writes it: {why}") from error


def _refuse_other(path: Path, mark: str) -> None:
    if not os.path.lexists(path):
        return
    try:
        with open_file(path) as file:
            is_ours = mark.encode() in file.read(1024)
    except IsADirectoryError:
        is_ours = False
    except OSError as error:
        raise StoreError(f"cannot read {shown(path)}: {error.strerror or error}") from error
    if not is_ours:
        raise UsageError(f"{shown(path)} is there and is no report", hint="Give another --output.")


def _figure(figure: Figure, number: int) -> str:
    """With ids of its own: several drawings share one document."""
    label = _text(figure.title + (f". {figure.told}" if figure.told else ""))
    svg = figure.svg.replace(' id="', f' id="f{number}-').replace("url(#", f"url(#f{number}-")
    svg = svg.replace('href="#', f'href="#f{number}-')
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    at = svg.index(">") + 1
    told = f"<figcaption><b>{_text(figure.title)}</b> {_text(figure.told)}</figcaption>"
    return f"<figure>{svg[:at]}<title>{_text(figure.title)}</title>{svg[at:]}{told}</figure>"


def _table(table: Table) -> str:
    caption = f"<caption>{_text(table.title)}</caption>" if table.title else ""
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in table.columns)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in table.rows)
    return (
        f'<div class="scroll" tabindex="0"><table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody>'
        "</table></div>"
    )


def _cell(text: str) -> str:
    words = ' class="text"' if len(text) > 24 else ""
    return f"<td{words}>{_text(text)}</td>"


def _text(text: str) -> str:
    return escape(shown(text))
