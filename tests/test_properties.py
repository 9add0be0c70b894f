"""Round trips that must hold for any data: manifest and keys, export and adoption."""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import World
from fault_tools import LIMIT, often
from hypothesis import given, settings
from hypothesis import strategies as st
from store_fixtures import MadeCache, Rows, make_cache, origin
from typer.testing import CliRunner

from kd_cache.cli import app
from kd_cache.dataset.manifest import load_manifest, spelling
from kd_cache.dataset.task import DCASE
from kd_cache.keys import keys_of, sample_key
from kd_cache.serve.logit_cache import LogitCache

pytestmark = [pytest.mark.faults, LIMIT]


def examples(one: int, more: int, full: int) -> settings:
    return settings(max_examples=often(one, more, full))


@contextmanager
def folder() -> Iterator[Path]:
    """An empty folder, and the working one meanwhile."""
    with tempfile.TemporaryDirectory() as name, chdir(name):
        yield Path(name)


def run(*args: object) -> dict[str, Any]:
    """Run ``kd-cache`` in this process; it must succeed. Returns what it prints as JSON."""
    result = CliRunner().invoke(app, [*map(str, args), "--json"], prog_name="kd-cache")
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(result.stdout)
    return content


# -- manifest and keys ------------------------------------------------------------------------------------------------

FILES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
SAMPLES = st.lists(
    st.fixed_dictionaries(
        {
            "file": FILES,
            "scene_label": st.integers(0, 9),
            "city_label": st.none() | st.integers(0, 11),
            "device_id": st.sampled_from(DCASE.devices),
            "split": st.sampled_from(["train", "val", "test"]),
        }
    ),
    min_size=1,
    max_size=20,
    unique_by=lambda row: spelling(row["file"]),
)


@given(SAMPLES, st.booleans(), st.booleans(), st.integers(0, 2))
def test_a_manifest_is_read_as_it_was_written(rows: list[dict[str, Any]], lists: bool, plain: bool, said: int) -> None:
    """In lists or flat, escaped or not, with device, domain or both; and each key is the MD5 of its file."""
    written = []
    for row in rows:
        kept = dict(row) | {"domain": DCASE.domain_of[row["device_id"]]}
        if said < 2:
            del kept[("domain", "device_id")[said]]
        written.append(kept)
    content: Any = written
    if lists:
        content = {split: [row for row in written if row["split"] == split] for split in ("train", "val", "test")}
        rows = [row for split in ("train", "val", "test") for row in rows if row["split"] == split]
    with folder() as place:
        path = place / "dataset.json"
        path.write_bytes(json.dumps(content, ensure_ascii=not plain).encode())
        manifest = load_manifest(path)
        assert manifest.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    fields = ("file", "scene_label", "city_label", "device_id", "split")
    assert [[getattr(one, name) for name in fields] for one in manifest] == [
        [row[key] for key in fields] for row in rows
    ]
    assert [one.domain for one in manifest] == [DCASE.domain_of[row["device_id"]] for row in rows]
    by_hand = [hashlib.md5(row["file"].encode(), usedforsecurity=False) for row in rows]
    assert [sample_key(one.file) for one in manifest] == [digest.hexdigest() for digest in by_hand]
    assert keys_of(one.file for one in manifest).tobytes() == b"".join(digest.digest() for digest in by_hand)


# -- export and adoption ----------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..") and len(name.encode()) < 200
)


@st.composite
def rows_of_any_kind(draw: st.DrawFn) -> Rows:
    """Rows under odd names, of any finite numbers: denormals, minus zero and the largest ones too."""
    files = draw(st.lists(NAMES, min_size=2, max_size=12, unique=True))  # one of each device
    dtype = draw(st.sampled_from(["fp32", "fp16"]))
    classes = draw(st.integers(1, 5))
    rows = Rows.of([f"x/{name}.npy" for name in files], classes, dtype)
    pattern = {"fp32": np.uint32, "fp16": np.uint16}[dtype]
    random = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    bits = random.integers(0, np.iinfo(pattern).max, rows.logits.shape, pattern, endpoint=True)
    values = bits.view(rows.logits.dtype)
    rows.logits = np.where(np.isfinite(values), values, values.dtype.type(-0.0))
    return rows


def world_of(root: Path, rows: Rows) -> World:
    """A manifest that permits these rows' files, with a feature for each."""
    world = World(root)
    for number, file in enumerate(rows.files):
        world.write_feature(file, np.full((4, 3), number, np.float32))
        row = {"file": file, "scene_label": 0, "city_label": 0, "device_id": "Ab"[number % 2], "split": "train"}
        world.rows.append(row | {"identifier": f"vienna-{number}"})
    return world.write()


def older(made: MadeCache) -> Path:
    """The cache as the older script would have left it: row files, and an index of paths alone."""
    path = made.path / "cache_index.json"
    content = json.loads(path.read_text())
    del content["kd_cache"]
    path.write_text(json.dumps(content))
    return made.path


@given(st.data(), st.sampled_from(["pt", "tsv", "older"]))
@examples(9, 50, 300)
def test_what_was_exported_is_adopted_bit_for_bit(data: st.DataObject, kind: str) -> None:
    with folder() as place:
        rows = data.draw(rows_of_any_kind())
        dtype = {"<f4": "fp32", "<f2": "fp16"}[rows.logits.dtype.str]
        world = world_of(place, rows)
        made_by = origin("scene", rows.logits.shape[1], dtype)
        made = make_cache(place / "made" / "A2b", {"scene": rows}, {"scene": made_by})
        if kind == "older":
            source = older(made)
        else:
            run("export", made.path, "--to", kind, "--output", place / "exported")
            source = place / "exported" / f"scene.{kind}"
        said = ("--dtype", dtype) if kind == "tsv" else ()
        run("adopt", source, "--target", "b", "--json-path", world.json_path, *said)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cache = LogitCache.open(place / "cache" / "A2b")
        assert any("never verified" in str(warning.message) for warning in caught)
        assert cache.teachers == ("scene",)
        assert cache.batch(rows.files).numpy().tobytes() == rows.logits.tobytes()
        assert len(cache) == len(rows)
