"""``kd-cache info``: what a cache holds, made from what, when, and by which settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kd_cache.cli.console import Screen, cost_in_words, size
from kd_cache.cli.info_training import entry_lines, pretrained_entries, teachers_table, trained_teachers
from kd_cache.commands import Report, Table
from kd_cache.dataset.task_file import DEFAULT, recorded_task
from kd_cache.errors import UsageError, shown
from kd_cache.files.atomic import store_errors
from kd_cache.serve.placement import PLACES, check_of, choose
from kd_cache.store.accuracy import near_chance, stored_accuracy, stored_apart
from kd_cache.store.cache import CacheFolder, find_caches, no_finished_cache
from kd_cache.store.index import Index
from kd_cache.store.snapshot import Snapshot

WHEN_CHECKED = {"full": "when opened", "lazy": "when first read"}
SOURCES = {"commandline": "command line", "default_map": "file"}


def info(screen: Screen, path: Path, target: str | None) -> Report:
    """Tell what is at a path: caches, trained teachers, cached pre-training; or the caches of some targets alone."""
    if path.is_file():
        raise UsageError(f"{shown(path)} is a file", hint="Give the folder that it is in.")
    if target is not None:
        return Report({"caches": _described_all(_of_targets(path, target), screen), "trained": [], "pretrained": []})
    # Without a path, what train writes by default is told of as well.
    outputs = Path("outputs") if path == Path("cache") else path
    trained, pretrained = trained_teachers(outputs), pretrained_entries(outputs)
    folders = [CacheFolder(path)] if CacheFolder(path).is_anything else find_caches(path, DEFAULT.is_adaptation)
    if not folders and not trained and not pretrained:
        raise no_finished_cache(path, DEFAULT.is_adaptation)
    described = _described_all(folders, screen)
    lines: list[str | Table] = [teachers_table(trained), ""] if trained else []
    lines += [line for entry in pretrained for line in entry_lines(entry)]
    return Report({"caches": described, "trained": trained, "pretrained": pretrained}, lines)


def _of_targets(path: Path, target: str) -> list[CacheFolder]:
    if CacheFolder(path).is_anything:
        raise UsageError(
            f"{shown(path)} is a cache itself, so --target cannot choose one in it", hint="Name one of the two."
        )
    return [CacheFolder(path / DEFAULT.adaptation(each)) for each in DEFAULT.several(target)]


def _described_all(folders: Sequence[CacheFolder], screen: Screen) -> list[dict[str, Any]]:
    described = []
    for folder in folders:
        snapshot = Snapshot(folder, maps=True)
        index, disk = snapshot.finished(), _pack_sizes(folder)
        described.append(_described(folder, index, disk))
        screen.result(_teacher_table(folder, index), *_lines(snapshot, index, disk), "")
    return described


def _described(folder: CacheFolder, index: Index, disk: dict[str, int]) -> dict[str, Any]:
    return {
        "path": str(folder.path),
        "num_samples": index.num_samples,
        "packs": disk,
        "reading": _reading(index, disk),
        **index.record,
    }


def _reading(index: Index, packs: dict[str, int]) -> dict[str, dict[str, Any]]:
    """What ``LogitCache.open`` chooses on this machine, by the teachers that can be opened together."""
    together: dict[tuple[Any, ...], list[str]] = {}
    for name, origin in index.origins.items():
        together.setdefault((origin.value_kind, origin.num_classes, origin.dtype), []).append(name)
    found = {}
    for names in together.values():
        row = index.origins[names[0]].width * index.origins[names[0]].stored.itemsize
        table = index.num_samples * len(names) * row
        on_disk = sum(packs.get(file, 0) for name in names for file, _ in index.record["teachers"][name]["packs"])
        verify = check_of("auto", "auto", on_disk)
        place = choose("auto", table, is_lazy=verify == "lazy")
        found[", ".join(names)] = {"preload": place, "verify": verify, "table_bytes": table}
    return found


def _pack_sizes(folder: CacheFolder) -> dict[str, int]:
    """Bytes of each pack by name. What a seal has removed since is not counted, and no link is followed."""
    sizes = {}
    for path in folder.pack_paths():
        with store_errors(path, "look at"), suppress(FileNotFoundError):
            sizes[path.name] = path.lstat().st_size
    return sizes


def _teacher_table(folder: CacheFolder, index: Index) -> Table:
    entries = index.record["teachers"]
    facts: dict[str, Callable[[dict[str, Any]], str]] = {
        "Rows": lambda entry: f"{entry['rows']:,}",
        "Values": lambda entry: f"{entry['num_classes']} {entry['value_kind']}, {entry['dtype']}",
        "Accuracy": _accuracy,
        "Architecture": lambda entry: str(entry["parts"]["architecture"]),
        "Front end": lambda entry: str(entry["parts"]["feature_spec"]),
        "Computed in": lambda entry: str(entry["parts"]["precision"]),
        "Weights": lambda entry: f"{entry['parts']['weights'][:16]}…",
        "Fingerprint": lambda entry: f"{entry['fingerprint'][:16]}…",
    }
    rows = [[name, *map(fact, entries.values())] for name, fact in facts.items()]
    return Table(f"{shown(folder.path)}: {index.num_samples:,} samples complete", ["", *entries], rows)


def _accuracy(entry: dict[str, Any]) -> str:
    accuracy = stored_accuracy(entry)
    if entry["value_kind"] == "embedding":
        return "no classes"
    if not accuracy or not accuracy.rows:
        return "not known"
    of_all = f"{accuracy.share} of {accuracy.rows:,} labelled source rows"
    apart = stored_apart(entry)
    return of_all if apart is None else f"{apart.share} of {apart.rows:,} held out from its training; {of_all}"


def _checkpoint(entry: dict[str, Any]) -> str:
    if "adopted" in entry:
        return "unverified: adopted from elsewhere"
    return str(entry.get("source", {}).get("checkpoint", "own code, no checkpoint"))


def _lines(snapshot: Snapshot, index: Index, on_disk: dict[str, int]) -> list[str]:
    record = index.record
    per_device = ", ".join(f"{count:,} of {device}" for device, count in record["per_device"].items())
    environment = record["environment"]
    settings = record["settings"]
    changed = [
        f"{name}={settings['values'][name]} ({SOURCES.get(source, source)})"
        for name, source in settings["sources"].items()
        if source != "default" and name in settings["values"]
    ]
    lines = [
        f"made      {record['created']} by {record['tool']} on {environment['device']} (torch {environment['torch']})",
        f"from      {record['manifest']['path']} (sha256 {record['manifest']['sha256'][:16]}…), "
        f"{record['num_permitted']:,} permitted: {per_device}",
        f"settings  {', '.join(changed) or 'all defaults'}",
        *[f"weights   {name}: {_checkpoint(entry)}" for name, entry in record["teachers"].items()],
        f"on disk   {size(sum(on_disk.values()))} in {len(on_disk)} packs, view: {'yes' if record['files'] else 'no'}",
    ]
    for name, entry in record["teachers"].items():
        told = {"storing as " + entry["dtype"]: "storage_cost", "computing": "precision_cost"}
        costs = {what: entry.get(key) for what, key in told.items()}
        lines += [f"cost      {name}: {what}, {cost_in_words(cost)}" for what, cost in costs.items() if cost]
    for names, chosen in _reading(index, on_disk).items():
        lines.append(
            f"read      {names}: {PLACES[chosen['preload']]} ({size(chosen['table_bytes'])} of logits), "
            f"bytes checked {WHEN_CHECKED[chosen['verify']]}"
        )
    if pending := snapshot.pending:
        lines.append(f"pending   dumps begun and not sealed: {len(pending)}")
    for name, origin in index.origins.items():
        entry, cities = record["teachers"][name], recorded_task(record).cities
        warning = near_chance(origin, stored_accuracy(entry), cities, stored_apart(entry))
        lines += [] if warning is None else [f"warning   {warning}"]
    if record["missing"]:
        lines.append(f"missing   {len(record['missing']):,} samples that could not be scored")
    if record.get("unguarded"):
        lines.append(f"unguarded which {recorded_task(record).group} test uses is not known, as you allowed")
    if "inputs" in record:
        lines.append(f"features  taken {shown(record['inputs'])} when it was sealed: nobody compared rows with them")
    policy = record["split_policy"]
    if policy["shared_locations"]:
        lines.append(f"policy    {policy['shared_locations']:,} train samples share a location with test, as allowed")
    return lines
