"""Pages: they say what was measured, need nothing else, cut no text at any width, and believe no name."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import yaml
from conftest import REPO, Run, World
from test_distill_student import QUICK, taught
from train_fixtures import scene, town

from kd_cache.errors import CorruptError, UsageError
from kd_cache.report.figures import Line, label, lines
from kd_cache.report.of_comparison import comparison_page, span
from kd_cache.report.of_run import run_folder, run_page
from kd_cache.report.page import Figure, Page, Section
from kd_cache.store.index import read_index, write_index

__all__ = ["scene", "taught", "town"]
NAMES = ["<script>alert(1)</script>", "a\"b'&c", "$x^$ \\frac", "ж中\u202e\x1b[31m", "many words and " * 6 + "x" * 90]
"""Nobody's names, and harmless."""
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def figures(share: float) -> dict[str, Any]:
    return {
        "samples": 10, "accuracy": share, "macro_accuracy": share, "log_loss": 0.5, "ece": 0.1, "brier": 0.2,
        "intervals": {"accuracy": [share / 2, share]},
    }  # fmt: skip


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """A run folder whose classes, devices and settings have `NAMES`."""
    folder, count = tmp_path / "runs/1", len(NAMES)
    folder.mkdir(parents=True)
    measured = figures(0.5) | {
        "confusion": [[row * column for column in range(count)] for row in range(count)],
        "class_names": NAMES,
        "by": {"device": {name: figures(0.75) for name in NAMES}},
        "reliability": [{"low": 0.4, "high": 0.6, "count": 10, "confidence": 0.55, "accuracy": 0.5}],
    }
    results = {"validation": measured, "test": None, "chance": 0.1, "best_epoch": 2, "epochs": 2,
               "locations": {"validation": 3}, "shuffled_labels": True, "distillation": None}  # fmt: skip
    config = {"settings": {"role": NAMES[0]}, "stages": [{"level": 0}], "place": NAMES[1]}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    columns = "stage,epoch,train_loss,val_accuracy,val_macro_accuracy,val_log_loss,seconds\n"
    (folder / "history.csv").write_text(columns + "1,1,2.5,0.5,0.5,2.0,1\n2,1,1.5,0.75,0.5,1.0,1\n")
    (folder / "steps.csv").write_text("stage,epoch,step,lr,loss\n1,1,0,0.001,2.5\n2,1,0,0.0005,1.5\n")
    return tmp_path


def comparison(modes: list[str]) -> dict[str, Any]:
    spread = {"mean": 0.8, "sd": 0.01, "by_seed": [0.79, 0.81, None]}
    apart = {"difference": {"mean": 0.01, "sd": 0.02, "by_seed": [-0.01, 0.03, None]}}
    kinds = ("accuracy", "macro_accuracy", "log_loss", "ece", "brier", "source", "target", "other", "unseen")
    of = {mode: {kind: spread | ({} if mode == "ce" else apart) for kind in kinds} for mode in ["ce", *modes]}
    sentences = [f"{mode}: no more than luck" for mode in modes]
    return {"split": "test", "seeds": [1, 2, 3], "modes": of, "sentences": sentences,
            "verdicts": dict.fromkeys(modes, "no more than luck"), "failures": {}}  # fmt: skip


class Read(HTMLParser):
    """What is in a page: its elements, its text, and all that its attributes point to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text, self.pointed = "", set[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} {name}"
            if name in ("href", "src"):
                self.pointed.add(str(value))
            if name == "id":
                self.ids.append(str(value))

    def handle_data(self, data: str) -> None:
        self.text += data


def check(text: str) -> Read:
    """A page that needs nothing else, whose drawings say what they are."""
    page = Read(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "://" not in text
    assert len(page.ids) == len(set(page.ids))
    assert {each[1:] for each in page.pointed} <= set(page.ids)
    assert all(each.startswith("#") for each in page.pointed)
    assert set(re.findall(r"url\(#(.*?)\)", text)) <= set(page.ids)
    assert (
        page.tags.count("svg")
        == page.tags.count("figcaption")
        == len(re.findall('<svg role="img" aria-label=".', text))
    )
    assert text.isprintable() or not re.search(r"[^\S\n ]|[\x00-\x08\u202e\x1b]", text)
    return page


def test_names_are_text_and_equal_input_gives_equal_bytes(ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(ran)
    assert folder == ran / "runs/1"
    text = run_page(folder).html
    page = check(text)
    for name in NAMES[:3]:
        assert name in page.text
    assert "control" in page.text
    assert "50.0 % of 10 validation rows are right (95 %: 25.0 to 50.0 %)" in page.text
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20.0)
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    assert run_page(folder).html == text, "a person's settings of matplotlib do not count"
    (folder / "results.json").unlink()
    assert "not finished" in check(run_page(folder).html).text


def test_a_comparison_shows_every_seed_and_where_the_mean_lies(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps(comparison(NAMES)))
    page = comparison_page(tmp_path)
    found = check(page.html).text
    assert all(name in found for name in NAMES[:3])
    assert "−1.0" in found
    assert "+3.0" in found
    assert page.content["spans"][NAMES[0]] == pytest.approx((1 - 12.706 * 2, 1 + 12.706 * 2), rel=1e-3)
    assert span([1.0]) is None
    assert span([0.0, 1.0] * 50) == pytest.approx((0.5 - 0.0985, 0.5 + 0.0985), abs=1e-3)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("results.json", lambda _: "{"),
        ("results.json", lambda text: text.replace('"accuracy": 0.5', '"accuracy": "much"')),
        ("results.json", lambda text: text.replace('"accuracy": 0.5', '"accuracy": 1e999')),
        ("results.json", lambda text: text.replace('"class_names": [', '"class_names": [1, ')),
        ("results.json", lambda _: "[" * 100_000),
        ("config.yaml", lambda _: "a: [}"),
        ("config.yaml", lambda _: "[]"),
        ("history.csv", lambda text: text.replace("2.5", "nan")),
        ("steps.csv", lambda text: text.replace("0.001", "fast")),
    ],
)
def test_what_is_not_as_it_was_written_is_said_to_be(ran: Path, name: str, edit: Callable[[str], str]) -> None:
    path = ran / "runs/1" / name
    path.write_text(edit(path.read_text()))
    with pytest.raises(CorruptError, match="is not as kd-cache train writes it"):
        run_page(path.parent)
    (ran / "comparison.json").write_text(json.dumps(comparison(["fit"]) | {"modes": {"ce": {}}}))
    with pytest.raises(CorruptError, match="is not as kd-cache student compare writes it"):
        comparison_page(ran)


def test_only_a_report_is_overwritten_and_nothing_is_written_into_a_cache(tmp_path: Path) -> None:
    page = Page("One", [], [], {"n": 1})
    written = page.write(tmp_path / "new")
    assert written == tmp_path / "new/report.html"
    assert json.loads((tmp_path / "new/report.json").read_text()) == {"kd_cache_report": 1, "title": "One", "n": 1}
    assert Page("Two", [], []).write(tmp_path / "new/report.html") == written
    assert "Two" in written.read_text()
    for path in (tmp_path / "mine.html", tmp_path / "mine.json", tmp_path / "folder.json"):
        path.mkdir() if path.stem == "folder" else path.write_text("{}")
        with pytest.raises(UsageError, match="is no report"):
            page.write(path.with_suffix(".html"))
    assert (tmp_path / "mine.html").read_text() == "{}"
    with pytest.raises(UsageError, match="lies in a cache"):
        page.write(tmp_path / "cache/../cache/x.html", outside=tmp_path / "cache")


def test_labels_are_what_the_font_has() -> None:
    assert label("é – 中") == "é – \\u4e2d"
    assert label("") == "–"
    assert max(map(len, label("x" * 90).split("\n"))) <= 22


@pytest.fixture
def journey(taught: World, run: Run) -> Mapping[str, Path]:
    """The pages of a cache, a student and a comparison, by the commands that write them."""
    student = run("student", "--target", "b", *QUICK, "--report", "--json")
    assert student.exit_code == 0, student.output
    compared = run("student", "compare", "--target", "b", *QUICK, "--modes", "scene", "--seeds", 1, "--report")
    assert compared.exit_code == 0, compared.output
    shown = run("report", "cache/A2b", "--scene-teacher-ckpt", taught.root / "none", "--json")
    assert "which rows trained" in shown.stderr or "not known" in shown.stderr
    shown = run("report", "cache/A2b")
    assert shown.exit_code == 0, shown.output
    (told,) = re.findall(r"^report: (.*)$", compared.stdout, re.MULTILINE)
    return {
        "cache": Path(shown.stdout.strip().splitlines()[-1]),
        "run": Path(json.loads(student.stdout)["reports"][0]),
        "comparison": Path(told),
    }


def test_the_commands_write_pages_that_no_browser_cuts(
    taught: World, journey: Mapping[str, Path], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert journey["cache"] == Path("outputs/report/A2b/report.html")
    assert journey["run"].parent.parent == Path("outputs/student/A2b/fit/runs")
    assert journey["comparison"].parent.parent == Path("outputs/student/A2b")
    for page in journey.values():
        check(page.read_text())
        assert json.loads(page.with_suffix(".json").read_text())["kd_cache_report"] == 1
    of_cache = json.loads(journey["cache"].with_suffix(".json").read_text())
    held = of_cache["accuracy"]["scene"]
    assert list(held) == ["held out", "trained"]
    assert sum(each["rows"] for each in held.values()) == 36
    assert of_cache["devices"] == {"A": {"permitted": 36, "rows": 36}, "b": {"permitted": 18, "rows": 18}}
    assert journey["run"].read_text().count("Accuracy by device and class") == 2  # test and validation
    text = journey["cache"].read_text()
    assert "used to choose the epoch" in text
    assert run("report", "cache/A2b").exit_code == 0
    assert journey["cache"].read_text() == text
    home = run("report", "outputs/student/A2b/fit", "--output", "elsewhere/fit.html", "--json")
    assert json.loads(home.stdout)["page"] == "elsewhere/fit.html"
    nothing = run("report", "x")
    assert (nothing.exit_code, "no cache, no training and no comparison" in nothing.stderr) == (2, True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in (("report", "cache/A2b"), ("student", "--target", "b", *QUICK, "--report")):
        without = run(*command)
        assert without.exit_code == (2 if command[0] == "report" else 0)
        assert without.stderr.count(".[report]") == 1


MEASURE = """
function cut(frame) {
  const view = frame.contentDocument, wide = view.documentElement.clientWidth, found = [];
  const told = (what, node) => found.push(`${what}: ${node.id || node.tagName} ${node.textContent.slice(0, 40)}`);
  if (view.documentElement.scrollWidth > wide) told('the page is wider than the window', view.body);
  for (const node of view.querySelectorAll('h1, h2, p, figcaption, table, svg, th, td')) {
    const box = node.getBoundingClientRect(), scrolls = node.closest('.scroll');
    if (!scrolls && (box.left < -1 || box.right > wide + 1)) told('beyond the window', node);
    if (node.scrollWidth > node.clientWidth + 1 && node.clientWidth) told('cut', node);
  }
  for (const box of view.querySelectorAll('.scroll'))
    if (getComputedStyle(box).overflowX !== 'auto' && box.scrollWidth > box.clientWidth) told('no scrolling', box);
  for (const svg of view.querySelectorAll('svg')) {
    const whole = svg.getBoundingClientRect();
    for (const text of svg.querySelectorAll('g[id*="-text_"], g[id*="-legend_"]')) {
      const box = text.getBoundingClientRect();
      if (box.left < whole.left - 1 || box.right > whole.right + 1 || box.top < whole.top - 1
          || box.bottom > whole.bottom + 1) told('cut in a drawing', text);
    }
  }
  return found;
}
const found = {};
for (const frame of document.querySelectorAll('iframe')) found[frame.name] = cut(frame);
document.body.innerHTML = '<pre>' + JSON.stringify(found).replace(/</g, '&lt;') + '</pre>';
"""


def measured(texts: Mapping[str, str], tmp_path: Path) -> dict[str, list[str]]:
    """What is cut of each page in windows of 400 and 1200 pixels, as a browser without a network lays it out."""
    frames = "".join(
        f'<iframe name="{name} {width}" srcdoc="{html.escape(text)}" style="width:{width}px;height:900px"></iframe>'
        for name, text in texts.items()
        for width in (400, 1200)
    )
    whole = tmp_path / "frames.html"
    whole.write_text(
        f"<!doctype html><meta charset=utf-8><body>{frames}<script>onload = () => {{ {MEASURE} }}</script>"
    )
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,900",
             "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000", "--dump-dom")  # fmt: skip
    command = [str(BROWSER), *flags, f"--user-data-dir={tmp_path}/profile", whole.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, list[str]] = json.loads(html.unescape(re.search(r"<pre>(.*)</pre>", done.stdout, re.DOTALL)[1]))
    return found


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed (apt-get install chromium)")
def test_a_browser_cuts_no_text_at_any_width(ran: Path, tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps(comparison(NAMES)))
    texts = {"run": run_page(ran / "runs/1").html, "comparison": comparison_page(tmp_path).html}
    narrow = lines({"a": Line([0, 1], [0, 1])}, "x (s)", "y (m)").replace('viewBox="0 0 ', 'viewBox="90 0 ')
    texts["drawing"] = Page("Cut", [], [Section("One", [Figure(narrow, "One")])]).html
    texts["wide"] = texts["run"].replace(".scroll { overflow-x: auto;", ".scroll { overflow-x: visible;")
    found = measured(texts, tmp_path)
    for name in ("run", "comparison"):
        assert (found[f"{name} 400"], found[f"{name} 1200"]) == ([], [])
    assert any("drawing" in each for each in found["drawing 400"]), "the measure sees what is cut"
    assert found["wide 400"]


def test_a_cache_whose_manifest_and_labels_are_gone_has_a_page_too(run: Run, tmp_path: Path) -> None:
    frozen, bare = REPO / "tests/data/cache-0.1/finished/A2b", tmp_path / "bare/A2b"
    shutil.copytree(frozen, bare)
    index = read_index(bare / "cache_index.json")
    record = {name: value for name, value in index.record.items() if name != "permitted"}
    write_index(index.path, index.num_samples, index.maps, record)
    for cache, told in ((frozen, "perhaps trained on"), (bare, "No source row has a label")):
        shown = run("report", cache, "--output", "old")
        assert shown.exit_code == 0, shown.output
        assert shown.stderr.count("not known") == 3
        page = check(Path("old/report.html").read_text())
        assert "14 of 14 permitted samples have a row of every teacher" in page.text
        assert told in page.text
