"""``kd-cache report``: pages of caches, trainings and comparisons; and those that other commands write at their end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kd_cache.cli.console import Screen
from kd_cache.cli.saved import saved_data, saved_in, saved_provenances
from kd_cache.commands import Report, Run
from kd_cache.dataset.dataset import Dataset
from kd_cache.dataset.manifest import Sample
from kd_cache.dataset.provenance import Provenance
from kd_cache.errors import KDCacheError, UsageError, shown
from kd_cache.store.cache import CacheFolder
from kd_cache.store.index import Index
from kd_cache.store.snapshot import Snapshot

if TYPE_CHECKING:
    from kd_cache.report.page import Page

OF_CACHES: Final = Path("outputs/report")


def report(run: Run, screen: Screen, path: Path, output: Path | None) -> Report:
    """Write a page of what is at a path."""
    _require_matplotlib()
    path = path.parent if path.is_file() else path
    folder = CacheFolder(path)
    if folder.is_anything:
        page = _page_of_cache(run, folder, screen)
        written = page.write(output or OF_CACHES / path.resolve().name, outside=path)
    else:
        page, home = _page_of(path)
        written = page.write(output or home)
    return Report({"page": str(written), "report": page.content}, [shown(written)])


class Pages(NamedTuple):
    """What a command says of the pages that it wrote at its end."""

    content: Mapping[str, Any]
    lines: Sequence[str]


def pages_of(folders: Sequence[Path | None], screen: Screen, *, wanted: bool) -> Pages:
    """Write a page of each run or comparison into its folder. Where that cannot be, the command is as good without."""
    found: list[str] = []
    for folder in dict.fromkeys(folders) if wanted else ():
        if folder is None:
            continue
        try:
            _require_matplotlib()
            found.append(str(_page_of(folder)[0].write(folder)))
        except KDCacheError as error:
            screen.note(f"no report is written: {error.message}" + (f": {error.hint}" if error.hint else ""))
    return Pages({"reports": found}, [f"report: {shown(path)}" for path in found])


def _page_of(path: Path) -> tuple[Page, Path]:
    """The page of a training or a comparison, and the folder that it is of."""
    from kd_cache.report.of_comparison import COMPARISON, comparison_page
    from kd_cache.report.of_run import run_folder, run_page

    if (path / COMPARISON).is_file():
        return comparison_page(path), path
    if (folder := run_folder(path)) is not None:
        return run_page(folder), folder
    raise UsageError(
        f"{shown(path)} holds no cache, no training and no comparison",
        hint="Give a cache (cache/A2b), or a folder of kd-cache train, student (outputs/student/A2b/fit) or student "
        "compare.",
    )


def _page_of_cache(run: Run, folder: CacheFolder, screen: Screen) -> Page:
    from kd_cache.report.of_cache import cache_page

    snapshot = Snapshot(folder, maps=True)
    index = snapshot.finished()
    target = saved_in(index).task.target_in(folder.path.resolve().name)
    return cache_page(snapshot, *_known(run, index, target, screen))


def _known(
    run: Run, index: Index, target: str | None, screen: Screen
) -> tuple[dict[str, Provenance | None], Sequence[Sample] | None]:
    """What teachers say of their training, and the permitted samples: as far as they are still there."""
    provenances: dict[str, Provenance | None] = {}
    samples: Sequence[Sample] | None = None
    data: Dataset | None = None
    if target is None:
        return provenances, samples
    try:
        data = saved_data(run, saved_in(index), target)
        samples = data.selection.samples
    except KDCacheError as error:
        screen.note(f"how many rows each device has is not known: {error.message}")
    try:
        provenances = saved_provenances(run, index, target, screen, data)
    except KDCacheError as error:
        screen.note(f"which rows trained the teachers is not known: {error.message}")
    return provenances, samples


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("a report needs matplotlib: pip install -c constraints.txt -e '.[report]'") from error
