"""``kd-cache push`` and ``kd-cache pull``: a cache to and from an object store."""

from __future__ import annotations

import shlex
from pathlib import Path

from kd_cache.cli.console import Screen, size
from kd_cache.commands import Report
from kd_cache.errors import shown
from kd_cache.exchange.push import Pushed, push_cache
from kd_cache.serve.pull import pull_cache


def push(
    screen: Screen, cache: Path, url: str, replace: bool, check: bool, prune: bool, prune_older_than: int
) -> Report:
    """Send a cache to an URL."""
    days = prune_older_than if prune else None
    done = push_cache(cache, url, screen, replace=replace, check=check, prune_days=days)
    return Report(done.as_json(), pushed_lines(done))


def pushed_lines(done: Pushed) -> list[str]:
    """What a push did, for a person."""
    index = {"sent": ", and the index", "same": "; the index there is this one", "none": ""}[done.index]
    lines = [
        f"{shown(done.cache)} → {shown(done.url)}: {len(done.sent):,} files sent ({size(done.bytes)}), "
        f"{done.there_already:,} were there{index}"
    ]
    lines += [f"sent again, it had other bytes there: {shown(name)}" for name in done.healed]
    lines += [f"removed there: {shown(name)}" for name in done.pruned]
    if done.index == "none":
        lines.append(f"When all parts are there: kd-cache pull {shlex.quote(done.url)} CACHE, then kd-cache seal")
    return lines


def pull(screen: Screen, url: str, cache: Path) -> Report:
    """Bring a cache from an URL."""
    done = pull_cache(url, cache, screen)
    lines = [
        f"{shown(done.url)} → {shown(done.cache)}: {done.files:,} files fetched ({size(done.bytes)}), "
        f"{done.there_already:,} were here" + ("" if done.changed else "; nothing is new")
    ]
    if not done.finished:
        lines.append("These are parts of a dump; when all are here: kd-cache seal")
    return Report(done.as_json(), lines)
