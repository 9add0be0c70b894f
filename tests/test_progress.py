"""What a terminal of 80 columns shows: how far a run is, how fast, and tables without broken words."""

from __future__ import annotations

import re

import pytest
from conftest import Run, World
from hypothesis import given
from hypothesis import strategies as st

from kd_cache.cli.progress import Progress, clock_time, rate_in_words
from kd_cache.commands import Table


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now

    def runs(self, progress: Progress, *batches: tuple[float, int]) -> Progress:
        for seconds, count in batches:
            self.now += seconds
            progress.advance(count)
        return progress


@given(
    st.text("abc ", max_size=90), st.integers(0, 10**8), st.integers(1, 10**8), st.floats(1e-3, 1e4),
    st.dictionaries(st.sampled_from(["saved", "busy", "epoch"]), st.text("xy 1%", max_size=99)), st.booleans(),
)  # fmt: skip
def test_count_rate_and_eta_always_fit(
    name: str, total: int, done: int, seconds: float, extras: dict[str, str], is_plain: bool
) -> None:
    clock = Clock()
    progress = clock.runs(Progress(name, total + done, clock), (seconds, done))
    progress.extras = extras
    line = progress.line(80, is_plain=is_plain)
    assert line.cell_len < 80
    assert all(figure in line.plain for figure in progress.figures)
    assert [figure.split()[0] for figure in progress.figures][2] == "ETA"
    assert line.plain.isascii() or not is_plain or len(name) > 20


def test_the_first_batch_tells_the_rate_of_a_slow_teacher() -> None:
    clock = Clock()
    progress = Progress("scoring", 3200, clock)
    clock.now += 40
    assert progress.figures == ["0/3,200", "ETA -:--:-- (0:00:40 so far)"]
    assert clock.runs(progress, (60, 32)).figures == ["32/3,200", "0.32 samples/s", "ETA 2:45:00"]
    assert clock.runs(progress, (50, 32)).rate == 32 / 50, "of the last batch, which took longer than the window"


def test_what_had_not_to_be_done_is_no_rate() -> None:
    clock = Clock()
    progress = clock.runs(Progress("scoring", 100_064, clock), (0.01, 100_000), (10, 32))
    assert progress.rate == pytest.approx(3.2)


@pytest.mark.parametrize(
    ("rate", "words"), [(0.3, "0.3"), (0.04, "0.04"), (0.97, "1.0"), (7.04, "7.0"), (9.96, "10"), (1234.5, "1,234")]
)
def test_low_rates_have_decimals(rate: float, words: str) -> None:
    assert rate_in_words(rate) == words
    assert (clock_time(0.4), clock_time(59.6), clock_time(90_061)) == ("0:00:00", "0:01:00", "25:01:01")


def printed(run: Run, *args: object) -> list[str]:
    """The lines of both streams, of progress as it was last, without what drives a terminal."""
    result = run(*args)
    assert result.exit_code == 0, result.output
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", result.stdout + result.stderr).replace("\r", "\n").splitlines()


def test_nothing_is_wider_than_a_terminal_and_no_word_is_broken(
    run: Run, dump: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    lines = printed(dump)
    assert any(line.startswith("scoring ") and "20/20" in line and "ETA 0:00:00" in line for line in lines)
    lines += printed(run, "info")
    long = [line for line in lines if len(line) > 80]
    assert all(" " not in line for line in long), "but for paths, which must stay whole"
    assert any(str(world.json_path) in line for line in lines)


def test_a_table_that_is_too_wide_is_written_cell_by_cell(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from kd_cache.cli.console import _drawn

    path = "outputs/teacher_city2scene/A2b/best.safetensors"
    table = Table("Trained teachers", ["File", "Teacher", "Trained on"], [[path, "city2scene A2b", "305"]])
    for width, last in ((80, f"{path} │ city2scene A2b │        305"), (60, "  Trained on  305")):
        console = Console(width=width)
        console.print(_drawn(table, width), crop=False)
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1].rstrip() == last
        assert any(path in line for line in lines)
