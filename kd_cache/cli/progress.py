"""How far a stage of a run is: one line that always fits, with what matters first."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

from rich.console import Console, ConsoleOptions
from rich.text import Text

_WINDOW = 30.0
"""Seconds that the rate is of; where a batch takes longer, it is of the last one."""
_AT_ONCE = 0.1
"""Seconds: what a stage is through with at first, and so soon, had not to be done."""
_SHORTEST, _LONGEST = 8, 40


class Progress:
    """A stage of ``total`` samples: counts what is done, and shows it in one line of the console's width.

    Count, rate and ETA come first and are never cut; then the bar; then those of ``extras`` that there is room for.
    """

    def __init__(
        self, name: str = "", total: int = 0, clock: Callable[[], float] = time.monotonic, unit: str = "samples"
    ) -> None:
        self.name, self.total, self.done, self.unit = name, total, 0, unit
        self.extras: dict[str, str] = {}
        self._clock = clock
        self.began = clock()
        self._points: deque[tuple[float, int]] = deque([(self.began, 0)])

    def advance(self, count: int) -> None:
        now = self._clock()
        self.done += count
        if self.done == count < self.total and now - self.began < _AT_ONCE:
            self._points = deque([(now, count)])
            return
        self._points.append((now, self.done))
        while len(self._points) > 2 and self._points[1][0] <= now - _WINDOW:
            self._points.popleft()

    @property
    def rate(self) -> float | None:
        """Samples per second, from the first batch on; ``None`` before it."""
        (since, before), (until, done) = self._points[0], self._points[-1]
        if until - since < _AT_ONCE:  # too short to tell, but for all of it
            since, before = self.began, 0
        return (done - before) / max(until - since, 1e-9) if done > before else None

    @property
    def figures(self) -> list[str]:
        """Count, rate and ETA."""
        per = 1e6 if self.unit == "MB" else 1
        count = f"{self.done / per:,.0f}/{self.total / per:,.0f}"
        if self.rate is None:
            return [count, f"ETA -:--:-- ({clock_time(self._clock() - self.began)} so far)"]
        left = (self.total - self.done) / self.rate
        return [count, f"{rate_in_words(self.rate / per)} {self.unit}/s", f"ETA {clock_time(left)}"]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield self.line(options.max_width, is_plain=not options.encoding.startswith("utf"))

    def line(self, width: int, *, is_plain: bool = False) -> Text:
        """It all in ``width`` cells; ``is_plain`` draws the bar in ASCII."""
        dot, full, rest = (" - ", "#", ".") if is_plain else (" · ", "━", "─")
        figures = dot.join(self.figures)
        room = width - 1 - len(figures)
        name = self.name if len(self.name) < room else self.name[: max(room - 2, 0)] + "…"
        room -= len(name) + 2  # a space on either side of the bar
        extras = ""
        for extra in self.extras.values():
            if extra and len(extras) + len(dot) + len(extra) <= room - _LONGEST // 2:
                extras += dot + extra
        cells = min(room - len(extras), _LONGEST)
        done = int(cells * self.done / self.total) if self.total else 0
        line = Text(f"{name} " if name else "", no_wrap=True)
        if cells >= _SHORTEST:
            line.append(full * done, "bar.complete").append(rest * (cells - done), "bar.back").append(" ")
        return line.append(figures, "progress.percentage").append(extras)


def rate_in_words(rate: float) -> str:
    """Samples per second, with decimals below ten."""
    return f"{rate:,.0f}" if rate >= 9.95 else f"{rate:.1f}" if rate >= 0.95 else f"{rate:.2g}"


def clock_time(seconds: float) -> str:
    """``0:00:07``; hours go on after 24."""
    minutes, left = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{left:02}"
