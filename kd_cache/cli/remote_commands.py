"""The table's commands for caches at an URL."""

from __future__ import annotations

from pathlib import Path

from kd_cache.cli import notes
from kd_cache.commands import Command
from kd_cache.options import CACHE, OUTPUT, SHOWING, Option

_URL = Option("url", str, "Where it lies in a store: s3://, gs://, az://, hf://, file://, and to pull https://, too.",
              "Arguments", positional=True, metavar="URL")  # fmt: skip

PUSH_TO = Option("push", str | None, "Push what was scored there when it is done: a part's packs, or the finished "
                 "cache (pip install kd-cache[remote]).", OUTPUT, None, metavar="URL", kept=False)  # fmt: skip

PUSH = Command(
    "push",
    "kd_cache.cli.remote:push",
    "Send a cache to an object store, without its view. What is there already is not sent again.",
    (
        Option("cache", Path, "A cache, such as cache/A2b: finished, or the parts of one.", "Arguments",
               positional=True),
        _URL,
        Option("replace", bool, "Put it in the place of an index that this cache was not pulled from.", CACHE, False),
        Option("check", bool, "Download what is there already and compare it, instead of believing name and size.",
               CACHE, False),
        Option("prune", bool, "Afterwards remove old packs there that the index does not name.", CACHE, False),
        # Not "older_than": in a settings file that is gc's, in seconds.
        Option("prune_older_than", int, "With --prune: packs younger than this stay.", CACHE, 7,
               flag="--older-than", low=0, high=36_500, metavar="DAYS"),
        *SHOWING,
    ),
    "Needs obstore: pip install kd-cache[remote]. Credentials are taken from the environment, as the store's own "
    "tools read them.",
    ("kd-cache push cache/A2b file://outputs/store/A2b",
     "kd-cache push cache/A2b file://outputs/store/A2b --check --prune --older-than 30"),
    ("replace", "check", "prune", "prune_older_than"),
    (0, 1, 2, 3, 4, 5),
    notes=notes.PUSH,
)  # fmt: skip

PULL = Command(
    "pull",
    "kd_cache.cli.remote:pull",
    "Bring a cache from an object store into a folder, checked; or bring the one there up to date.",
    (
        _URL,
        Option("cache", Path, "The folder, such as cache/A2b.", "Arguments", positional=True),
        *SHOWING,
    ),
    "Needs obstore: pip install kd-cache[remote]. What is in the folder already, and whole, is not fetched again.",
    ("kd-cache pull file://outputs/store/A2b cache/pulled/A2b",),
    exit_codes=(0, 1, 2, 3, 4, 5),
    notes=notes.PULL,
)  # fmt: skip
