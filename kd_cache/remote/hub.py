"""`RemoteStore` by huggingface_hub: a folder of a repository, ``hf://datasets/owner/name/kd/A2b``.

A file's ETag is the id of its content. What is written on a condition is a commit whose parent is the one that was
looked at: where another commit came in between, it is looked at again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from kd_cache.errors import ChangedError, StoreError, UsageError, shown
from kd_cache.remote.objects import PATIENCE, heard
from kd_cache.remote.store import Entry, Found
from kd_cache.watch import Watcher

T = TypeVar("T")
_KINDS = {"datasets": "dataset", "spaces": "space"}
_CONFLICT = (409, 412)
_PASSING = (429, 500, 502, 503, 504)


class HubStore:
    """What lies below one folder of a repository's main branch."""

    def __init__(self, url: str) -> None:
        try:
            import huggingface_hub
        except ImportError as error:
            raise UsageError("caches at hf:// need huggingface_hub", hint="pip install huggingface_hub") from error
        self.url, self.lists = url, True
        first, *rest = url.removeprefix("hf://").split("/")
        owner, *path = rest if first in _KINDS else [first, *rest]
        if len(path) < 2:
            raise UsageError(
                f"{shown(url)} names no folder of a repository", hint="hf://datasets/OWNER/NAME/FOLDER, for example"
            )
        self._hub: Any = huggingface_hub
        self._api = huggingface_hub.HfApi()
        self._repo: dict[str, Any] = {"repo_id": f"{owner}/{path[0]}", "repo_type": _KINDS.get(first, "model")}
        self._folder = "/".join(path[1:])

    def head(self, name: str) -> Entry | None:
        return self._head(name, None)

    def _head(self, name: str, revision: str | None) -> Entry | None:
        with self._errors("look at", name):
            paths = [f"{self._folder}/{name}"]
            found = self._asked(lambda: self._api.get_paths_info(paths=paths, revision=revision, **self._repo))
            return next((self._entry(each) for each in found if hasattr(each, "blob_id")), None)

    def get(self, name: str, most: int, unless: str | None = None) -> Found | None:
        entry = self.head(name)
        if entry is None:
            return None
        if entry.etag == unless:
            return Found(None, unless)
        if entry.size > most:
            raise StoreError(f"{self._named(name)} has {entry.size} bytes, expected at most {most}")
        return Found(self.get_range(name, 0, entry.size, None), entry.etag)

    def get_range(self, name: str, start: int, stop: int, etag: str | None) -> bytes:
        """The hub has no condition for a range; whoever asks compares the whole with its digest."""
        if start == 0 and etag is not None and ((now := self.head(name)) is None or now.etag != etag):
            raise ChangedError(f"{self._named(name)} is another by now, or gone")
        with self._errors("read", name):
            try:
                content = b"" if start == stop else self._asked(lambda: self._ranged(name, start, stop))
            except self._hub.errors.EntryNotFoundError as error:
                raise ChangedError(f"{self._named(name)} is gone") from error
        if len(content) != stop - start:
            raise ChangedError(f"{self._named(name)} has other bytes than it had when it was looked at")
        return content

    def _ranged(self, name: str, start: int, stop: int) -> bytes:
        url = self._hub.hf_hub_url(filename=f"{self._folder}/{name}", **self._repo)
        headers = {**self._hub.utils.build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
        session = self._hub.get_session()
        answer = session.get(url, headers=headers, timeout=PATIENCE.stalled, follow_redirects=True)
        self._hub.utils.hf_raise_for_status(answer)
        return bytes(answer.content)

    def put_file(self, name: str, path: Path, watcher: Watcher) -> None:
        self._commit(name, str(path))
        watcher.advance(path.stat().st_size)

    def put_if(self, name: str, content: bytes, etag: str | None) -> str | None:
        for _ in range(PATIENCE.tries):
            with self._errors("look at"):
                revision = self._asked(lambda: self._api.repo_info(**self._repo)).sha
            now = self._head(name, revision)
            if (None if now is None else now.etag) != etag:
                break
            try:
                commit = self._commit(name, content, revision)
            except ChangedError:
                continue  # a commit of something else, perhaps
            entry = self._head(name, commit)
            return None if entry is None else entry.etag
        raise ChangedError(f"{self._named(name)} is another by now")

    def _commit(self, name: str, content: str | bytes, parent: str | None = None) -> str:
        add = self._hub.CommitOperationAdd(path_in_repo=f"{self._folder}/{name}", path_or_fileobj=content)
        return self._committed(name, add, parent)

    def _committed(self, name: str, operation: Any, parent: str | None = None) -> str:
        """Not tried again by us: the hub's own client does that for each request of a commit."""
        with self._errors("write", name):
            commit = heard(
                lambda: self._api.create_commit(
                    operations=[operation], commit_message=f"kd-cache: {name}", parent_commit=parent, **self._repo
                )
            )
            return str(commit.oid)

    def list(self) -> list[Entry]:
        with self._errors("list"):
            try:
                tree = self._asked(
                    lambda: [
                        *self._api.list_repo_tree(path_in_repo=self._folder, recursive=True, expand=True, **self._repo)
                    ]
                )
            except self._hub.errors.EntryNotFoundError:  # of the folder; a repository that is not there is an error
                return []
            return [self._entry(each) for each in tree if hasattr(each, "blob_id")]

    def delete(self, name: str) -> None:
        if self.head(name) is not None:
            self._committed(name, self._hub.CommitOperationDelete(path_in_repo=f"{self._folder}/{name}"))

    def _entry(self, file: Any) -> Entry:
        modified = time.time() if file.last_commit is None else file.last_commit.date.timestamp()
        return Entry(file.path.removeprefix(f"{self._folder}/"), file.size, file.blob_id, modified)

    def _named(self, name: str) -> str:
        return shown(f"{self.url}/{name}" if name else self.url)

    def _asked(self, call: Callable[[], T]) -> T:
        """Try it as often as `PATIENCE` says, where the hub is busy or cannot be reached."""
        for number in range(PATIENCE.tries):
            try:
                return heard(call)
            except self._hub.errors.HTTPError as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                if number + 1 == PATIENCE.tries or status not in (None, *_PASSING):
                    raise
                time.sleep(PATIENCE.pause * 2**number)
        raise AssertionError

    @contextmanager
    def _errors(self, doing: str, name: str = "") -> Iterator[None]:
        """Turn what the hub's client raises into a `StoreError` that names the URL and the cause."""
        try:
            yield
        except StoreError:
            raise
        except (self._hub.errors.HTTPError, self._hub.errors.EntryNotFoundError, OSError, ValueError) as error:
            if getattr(getattr(error, "response", None), "status_code", None) in _CONFLICT:
                raise ChangedError(f"{self._named(name)} is another by now") from error
            why = " ".join(str(error).split())[:500]
            raise StoreError(f"cannot {doing} {self._named(name)}: {shown(why)}") from error
