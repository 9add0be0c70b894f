"""Drawings as SVG: axes with units, colours that the colour-blind tell apart, and never a colour alone.

Text is drawn as outlines of the font that comes with matplotlib, so that it looks the same on every machine. Colours of
ink and series are variables of the page, which has them by day and by night.
"""

from __future__ import annotations

import functools
import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font

from kd_cache.errors import shown

SERIES: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#767676")
"""Okabe & Ito (2008), but for black and yellow, and a grey."""
_INK, _LINE, _PAPER = "#101112", "#c1c2c3", "#fdfcfb"
_VARIABLES: Final = {_INK: "--ink", _LINE: "--line", _PAPER: "--paper"} | {
    colour: f"--c{number}" for number, colour in enumerate(SERIES)
}
_MARKERS, _DASHES = "osD^vPX", ("-", "--", "-.", ":")
_HATCHES: Final = ("", "///", "...", "\\\\\\", "xxx", "+++", "ooo")
_WRITTEN: Final = 12
"""Cells of a larger matrix hold no numbers."""
_NAMED: Final = 40
"""Of a larger one only some rows have their name."""
_RC: Final[dict[Any, Any]] = {
    "svg.fonttype": "path", "svg.hashsalt": "kd-cache", "text.parse_math": False, "font.size": 9.0,
    "axes.unicode_minus": True, "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK,
    "xtick.color": _INK, "ytick.color": _INK, "axes.grid": True, "grid.color": _LINE, "grid.linewidth": 0.5,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.7,
    "legend.frameon": False, "legend.fontsize": 8.0, "lines.linewidth": 1.5, "lines.markersize": 4.0,
}  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """A bar's height, and where its interval begins and ends."""

    value: float
    interval: tuple[float, float] | None = None


def bars(series: Mapping[str, Mapping[str, Bar]], x: str, y: str, top: float | None = None) -> str:
    """Bars by group (the inner names), side by side by series; those that are not there are left out."""
    groups = list(dict.fromkeys(name for each in series.values() for name in each))
    wide = 0.8 / len(series)
    step = -(-len(groups) // _NAMED)
    with _drawn(min(6.0, max(4.2, 0.16 * len(groups)))) as (axes, svg):
        for number, (name, values) in enumerate(series.items()):
            at = [groups.index(group) - 0.4 + wide * (number + 0.5) for group in values]
            axes.bar(
                at, [each.value for each in values.values()], wide * 0.92, label=label(name),
                color=SERIES[number % 7], hatch=_of(_HATCHES, number), edgecolor=_PAPER, linewidth=0.5,
            )  # fmt: skip
            for place, each in zip(at, values.values(), strict=True):
                if each.interval is not None:
                    ends = [[max(0.0, each.value - each.interval[0])], [max(0.0, each.interval[1] - each.value)]]
                    axes.errorbar([place], [each.value], yerr=ends, color=_INK, capsize=2, linewidth=1)
        axes.set_xticks(range(0, len(groups), step), [label(group) for group in groups[::step]], **_slope(groups))
        axes.grid(visible=False, axis="x")
        axes.set_ylim(0, top)
        _named(axes, x, y, len(series) > 1)
    return svg[0]


@dataclass(frozen=True)
class Line:
    """Points of a series. ``steps`` draws it as a histogram's outline over the edges ``x`` (one more than ``y``)."""

    x: Sequence[float]
    y: Sequence[float]
    steps: bool = False


def lines(
    series: Mapping[str, Line], x: str, y: str, *, unit: bool = False, plain: bool = False, marks: Sequence[float] = ()
) -> str:
    """Curves. ``unit`` is the square of shares, with its diagonal; ``plain`` has no markers; ``marks`` are uprights."""
    with _drawn(4.2, 3.6 if unit else 2.9) as (axes, svg):
        if unit:
            axes.plot([0, 100], [0, 100], color=_INK, linewidth=0.8, linestyle=":", label="as sure as right")
            axes.set_xlim(0, 100)
            axes.set_ylim(0, 100)
        for at in marks:
            axes.axvline(at, color=_INK, linewidth=0.6, linestyle=(0, (1, 3)))
        for number, (name, line) in enumerate(series.items()):
            style: dict[str, Any] = {"color": SERIES[number % 7], "label": label(name)}
            dashes = _DASHES[number % 4]
            marker = {"marker": _of(_MARKERS, number), "clip_on": False}
            if line.steps:
                axes.stairs(line.y, line.x, linestyle=dashes, linewidth=1.5, **style)
            else:
                few = len(line.x) <= 40 and not plain
                axes.plot(line.x, line.y, linestyle=dashes, **style, **(marker if few else {}))
        _named(axes, x, y, unit or len(series) > 1)
    return svg[0]


def matrix(values: Sequence[Sequence[float]], names: Sequence[str], x: str, y: str, unit: str, most: float) -> str:
    """A square of shares or counts from 0 to ``most``, row by row; small ones have their number in each cell."""
    cells, count = np.asarray(values, float), len(names)
    if cells.shape != (count, count):
        raise ValueError(f"expected {count} rows and columns, one for each name, found {list(cells.shape)}")
    size = max(2.8, min(4.6, 0.27 * count + 1.3))
    with _drawn(size, size * 0.92) as (axes, svg):
        shades = matplotlib.colormaps["viridis"].resampled(40)  # of more, the scale would be a picture
        if count <= _NAMED:
            drawn = axes.pcolormesh(cells, cmap=shades, vmin=0, vmax=most)
            axes.invert_yaxis()
        else:  # one picture: a path for each of a million cells is more than a browser can draw
            drawn = axes.imshow(cells, cmap=shades, vmin=0, vmax=most, extent=(0, count, count, 0), aspect="auto")
        if count <= _WRITTEN:
            for (row, column), value in np.ndenumerate(cells):
                ink = "#ffffff" if value < 0.6 * most else "#000000"
                told = f"{value:.0f}" if value else ""
                axes.text(column + 0.5, row + 0.5, told, ha="center", va="center", color=ink, fontsize=7)
        step = -(-count // _NAMED)
        ticks, shown_names = np.arange(0, count, step) + 0.5, [label(name) for name in names[::step]]
        axes.set_xticks(ticks, shown_names, rotation=90)
        axes.set_yticks(ticks, shown_names)
        axes.grid(visible=False)
        axes.figure.colorbar(drawn, label=unit).outline.set_visible(False)
        _named(axes, x, y, several=False)
    return svg[0]


def differences(values: Mapping[str, Sequence[float]], spans: Mapping[str, tuple[float, float] | None], x: str) -> str:
    """By name the mean with its span, and every single value as a triangle that points to its side of zero."""
    with _drawn(4.2, 1.1 + 0.5 * len(values)) as (axes, svg):
        axes.axvline(0, color=_INK, linewidth=1)
        for at, (name, each) in enumerate(values.items()):
            mean, span = float(np.mean(each)), spans[name]
            if span is not None:
                axes.plot(span, [at, at], color=SERIES[0], linewidth=2.5, label=None if at else "95 % of the mean")
            axes.plot([mean], [at], "D", color=SERIES[0], markersize=7, label=None if at else "mean")
            for marker, mine in ((">", [v for v in each if v > 0]), ("<", [v for v in each if v < 0]),
                                 ("|", [v for v in each if v == 0])):  # fmt: skip
                axes.plot(mine, [at - 0.22] * len(mine), marker, color=SERIES[1], linestyle="")
        axes.plot([], [], ">", color=SERIES[1], linestyle="", label="one seed")
        axes.set_yticks(range(len(values)), [label(name) for name in values])
        axes.set_ylim(len(values) - 0.4, -0.7)
        _named(axes, x, "", several=True)
    return svg[0]


@contextmanager
def _drawn(width: float, height: float = 2.9) -> Iterator[tuple[Any, list[str]]]:
    """Axes of so many inches; at the end the list holds the SVG. A person's own settings of matplotlib do not count."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        svg: list[str] = []
        yield figure.subplots(), svg
        out = io.StringIO()
        figure.savefig(
            out, format="svg", bbox_inches="tight", pad_inches=0.06, transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )  # fmt: skip
    svg.append(_inline(out.getvalue()))


def _inline(text: str) -> str:
    """The drawing as a part of a page: without what only a file needs (all of it addresses of other places)."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*|<style .*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", text, count=1)
    text = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", text, count=1)
    text = re.sub(r"#[0-9a-f]{6}(?![0-9a-f])", lambda found: _colour(found[0]), text)
    return re.sub(r"<defs>\s*</defs>\s*|<!--.*?-->\s*", "", text, flags=re.DOTALL)


def _colour(written: str) -> str:
    return f"var({_VARIABLES[written]})" if written in _VARIABLES else written


def _named(axes: Any, x: str, y: str, several: bool) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if several:
        handles, _ = axes.get_legend_handles_labels()
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(handles), 3), borderaxespad=0.3)


def _of(kinds: Sequence[str], number: int) -> str:
    """A series' hatch or marker: where colours begin anew, each has another one."""
    return kinds[(number + number // 7) % 7]


def _slope(names: Sequence[str]) -> dict[str, Any]:
    return {"rotation": 90} if len(names) > 6 or max(map(len, names), default=0) > 10 else {}


def label(name: str) -> str:
    """A name as the font can draw it: other signs by their number, long ones over several lines."""
    plain = "".join(c if c in _glyphs() else c.encode("ascii", "backslashreplace").decode() for c in shown(name))
    return "\n".join(textwrap.wrap(plain, 22)) or "–"


@functools.cache
def _glyphs() -> frozenset[str]:
    font = get_font(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf")
    return frozenset(map(chr, font.get_charmap()))
