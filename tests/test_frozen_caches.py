"""Caches that kd-cache 0.1 wrote, kept for ever: each opens, verifies, resumes and seals to the bytes it came to then.

``data/cache-0.1/README.md`` says what they are. A change that breaks one of these tests breaks every user's cache.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import REPO, Run
from store_fixtures import seal_bytes

from kd_cache import LogitCache, teacher_fingerprint
from kd_cache.errors import KDCacheError
from kd_cache.store.origin import canonical_json
from teachers import load_teacher
from teachers.cnn14 import CNN14
from teachers.loading import LoadedTeacher

FROZEN = REPO / "tests" / "data" / "cache-0.1"
CACHES = ("finished", "unfinished", "parts", "half", "packed", "older")
TEACHERS = ("first", "second")
EXPECTED: dict[str, Any] = json.loads((FROZEN / "expected.json").read_text())

DATA = ("--json-path", "dataset.json", "--data-root", ".")
NAMED = tuple(word for name in TEACHERS for word in ("--teacher", f"{name}=frozen_teachers:{name}"))
DUMP = ("dump", "--target", "b", "--json-path", "dataset.json", *NAMED, "--only", "first", "--only", "second")
VERIFY = ("verify", "--target", "b", "--all", "--recompute", *DATA, *NAMED)
SEAL = ("seal", "--target", "b", *DATA)
OWN = {"half": ("--dtype", "fp16"), "packed": ("--features", "features.h5")}
"""Options that a dump of this cache was given."""
FURTHER = {"packed": ("--features", "features.h5")}
"""What verify and seal need to find the features: those of the dump lie in a folder that is nowhere."""


@pytest.fixture
def copy(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The frozen folder, for one test to work on; it is the current folder."""
    shutil.copytree(FROZEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.syspath_prepend(str(FROZEN))
    return tmp_path


# -- what is left of a cache, in a few digests -------------------------------------------------------------------------


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def listing(folder: Path) -> str:
    """One digest over the names and the bytes of a folder's files."""
    return sha256("".join(f"{path.name} {sha256(path.read_bytes())}\n" for path in sorted(folder.iterdir())).encode())


NAMES_IN_2 = {
    f"{old}.h5": f"{new}.h5"
    for old, new in {
        "first-596f1ba0737830db2dd8f91a059cac47": "first-8de6010ea2e345d579c03fc01412bb64",
        "first-2d85df4f1306d7f3c3929e281b4b52e5": "first-de50de07c1ead4c246b1237794842701",
        "second-7f660f6005d63e194af346d18e44492f": "second-06b64cc1c0b32f9dc671e7cbdb32b586",
        "second-383a25606df69ab88cda2bec7abc1579": "second-c4bc999f37ae10de4646987a855acad6",
    }.items()
}
"""What the packs that kd-cache 0.1 sealed are called since format 2: known answers, as those of ``expected.json``."""


def in_format_1(pack: Path) -> Path:
    """The pack, its rows and all else in it as kd-cache 0.1 laid them out: then it has the digests that 0.1 left."""
    if pack.read_bytes()[8] == 1:
        return pack
    folder = pack.parent.parent.parent / "format-1"
    folder.mkdir(exist_ok=True)
    draft = io.BytesIO()
    layout = {"libver": ("v110", "v110"), "userblock_size": 512, "alignment_threshold": 1, "alignment_interval": 64}
    with h5py.File(pack) as new, h5py.File(draft, "w", **layout) as old:
        for name in ("format_version", "teacher", "fingerprint", "parts", "value_kind", "class_names", "dtype"):
            old.attrs[name] = np.bytes_(b"1") if name == "format_version" else new.attrs[name]
        for names in (("keys",), ("inputs",), ("checksums", "logits"), ("file_offsets",), ("files",)):
            for name in names:
                old.create_dataset(name, new[name].shape, new[name].dtype, track_times=False)
            for name in reversed(names):
                old[name][:] = new[name][:]
    sealed = seal_bytes(folder, draft.getvalue()[512:], pack.name.rpartition("-")[0])
    assert NAMES_IN_2[sealed.name] == pack.name
    return sealed


def index_words(path: Path) -> dict[str, Any]:
    """What an index says, but for its moment, its settings and its machine, and the version of its format."""
    index = json.loads(path.read_text())
    maps = {name: index[name] for name in TEACHERS if name in index}
    found: dict[str, Any] = {"maps": sha256(canonical_json(maps)), "num_samples": index["num_samples"]}
    record = index.get("kd_cache")
    if record is None:
        return found
    words = ("format_version", "adaptation", "files", "missing", "num_permitted", "per_device", "plan", "permitted")
    assert record["format_version"] in (1, 2)
    kept = ("fingerprint", "value_kind", "num_classes", "dtype", "rows", "pack", "accuracy", "measured", "earlier")
    found |= {word: record.get(word) for word in words} | {"format_version": 1}
    old = {new: name for name, new in NAMES_IN_2.items()}

    def pack(entry: dict[str, Any]) -> str:
        """The one pack, as its name is in format 1."""
        ((name, rows),) = entry["packs"] if record["format_version"] == 2 else [[entry["pack"], entry["rows"]]]
        assert rows == entry["rows"]
        return old.get(name, name)

    found["manifest"] = record["manifest"]["sha256"]
    found["teachers"] = {
        name: {word: entry.get(word) for word in kept}
        | {"pack": pack(entry), "class_names": sha256(canonical_json(entry["class_names"]))}
        for name, entry in record["teachers"].items()
    }
    return found


def state(cache: Path) -> dict[str, Any]:
    """Digests of a cache's packs, plan, list of permitted samples and view, and the words of its index."""
    packs = map(in_format_1, cache.glob("packs/*.h5"))
    found: dict[str, Any] = {f"packs/{path.name}": sha256(path.read_bytes()) for path in sorted(packs)}
    others = sorted([*cache.glob("plan.json"), *cache.glob("permitted-*.npy")])
    found |= {path.name: sha256(path.read_bytes()) for path in others}
    found |= {f"view of {name}": listing(cache / name) for name in TEACHERS if (cache / name).is_dir()}
    found["pending records"] = len(list(cache.glob("pending/*.json")))
    if (cache / "cache_index.json").exists():
        found["index"] = index_words(cache / "cache_index.json")
    return found


def served(cache: Path) -> dict[str, Any]:
    """What a reader gets of each teacher: a digest over all files and rows, or the refusal and its first words."""
    found: dict[str, Any] = {}
    for name in TEACHERS:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                opened = LogitCache.open(cache, [name])
            except KDCacheError as error:
                found[name] = type(error).__name__
                continue
        files = sorted(opened.files)
        rows = opened.batch(opened.rows(files)).numpy()
        content = canonical_json(files) + str((rows.shape, rows.dtype.str)).encode() + rows.tobytes()
        found[name] = {"rows": len(files), "sha256": sha256(content), "warnings": len(said)}
    return found


def done(run: Run, name: str, *arguments: object) -> dict[str, Any]:
    """Run a command on the cache: its exit code, what is there afterwards if that changed, and what is served."""
    cache = Path(name, "A2b")
    before = state(cache)
    code = run(*arguments, "--cache-root", name).exit_code
    after = state(cache)
    return {"exit": code, "changed": None if after == before else after, "served": served(cache)}


# -- tests -------------------------------------------------------------------------------------------------------------


def test_the_frozen_files_are_as_they_were_written() -> None:
    lines = [line.split("  ", 1) for line in (FROZEN / "SHA256SUMS").read_text().splitlines()]
    listed = {name: digest for digest, name in lines}
    found = {
        str(path.relative_to(FROZEN)): sha256(path.read_bytes())
        for path in FROZEN.rglob("*")
        if path.is_file() and path.name != "SHA256SUMS" and "__pycache__" not in path.parts
    }
    assert found == listed
    assert sum((FROZEN / name).stat().st_size for name in listed) < 300_000


@pytest.mark.parametrize("name", CACHES)
def test_a_frozen_cache_opens_to_its_rows_or_its_refusal(copy: Path, name: str) -> None:
    assert served(Path(name, "A2b")) == EXPECTED[name]["opens to"]


@pytest.mark.parametrize("name", CACHES)
def test_a_frozen_cache_verifies(copy: Path, run: Run, name: str) -> None:
    """Before anything else has touched it, and by scoring it again; an unfinished one is told of."""
    assert done(run, name, *VERIFY, *FURTHER.get(name, ())) == EXPECTED[name]["verify"]


@pytest.mark.parametrize("name", CACHES)
def test_a_frozen_cache_resumes_to_its_digests_and_then_verifies(copy: Path, run: Run, name: str) -> None:
    """What is there is not scored again: all that a finished one says is 14 skipped of each teacher."""
    found = done(run, name, *DUMP, *OWN.get(name, ()), "--batch-size", "4")
    assert found == EXPECTED[name]["resume"]
    if found["exit"] == 0:
        assert run(*VERIFY, "--cache-root", name, *FURTHER.get(name, ())).exit_code == 0


@pytest.mark.parametrize(("name", "skipped"), [("finished", 14), ("half", 14), ("packed", 14), ("unfinished", 8)])
def test_no_frozen_row_is_scored_again(copy: Path, run: Run, name: str, skipped: int) -> None:
    plan = run(*DUMP, *OWN.get(name, ()), "--cache-root", name, "--dry-run", "--json")
    counts = json.loads(plan.stdout)
    assert {count["skipped"] for count in counts["teachers"].values()} == {skipped}


@pytest.mark.parametrize("name", CACHES)
def test_a_frozen_cache_seals_to_its_digests(copy: Path, run: Run, name: str) -> None:
    assert done(run, name, *SEAL, *FURTHER.get(name, ())) == EXPECTED[name]["seal"]


def test_the_older_scripts_cache_is_adopted_to_its_digests(copy: Path, run: Run) -> None:
    assert done(run, "adopted", "adopt", "older/A2b", "--target", "b", *DATA) == EXPECTED["older"]["adopt"]


# -- fingerprints of built-in teachers ---------------------------------------------------------------------------------

SAMPLE_TEACHERS = {
    "teacher_scene/global": "a78a092ba5607d1d39927bae59d99921a63cafac8678b06fc2129254088cd4f4",
    "teacher_city2scene/A2b": "f1298a0852f30c5bd9c1d9c95eef0e240553dfc69217b6350906b573f23557a6",
    "teacher_city2scene/A2c": "74d3af84ae74b6d0a74a10f2328d36787a6ecf284250dbf4ffb011b3fb62301a",
    "teacher_city2scene/A2s1": "4414694410babbca2fc2be95f68645980d6370cbfc5e131b8b6e6130c019c5a3",
    "teacher_city2scene/A2s2": "c15d505e6825cd0d0ee0b5fd92344896d1bac4c1cfcf8399263eb79a341a956d",
    "teacher_city2scene/A2s3": "6602b23c210e935a087921572b523bc4411129e587154d1de7fc5cc9ddb9a211",
}


@pytest.mark.parametrize("place", SAMPLE_TEACHERS)
def test_the_fingerprints_of_the_samples_teachers_stay_the_same(place: str) -> None:
    """Another one would turn every row of every user's cache stale."""
    teacher = load_teacher(REPO / "data" / "sample" / "teachers" / place / "best.safetensors")
    assert teacher_fingerprint(teacher).digest == SAMPLE_TEACHERS[place]


def test_the_fingerprint_of_a_cnn14_stays_the_same() -> None:
    """Its numbers are counted, not drawn: torch's random numbers may change from one version to the next."""
    net = CNN14(10, (2, 4, 8, 8, 16, 24), 8, (4, 4))
    with torch.no_grad():
        for number, tensor in enumerate(net.state_dict().values()):
            tensor.copy_((torch.arange(tensor.numel()) % 13 + number).reshape(tensor.shape))
    assert (
        teacher_fingerprint(LoadedTeacher(net, source="")).digest
        == "7be01024bc26faece4a961dd18369d5d207fd902da26acd228a8dafb10cd2971"
    )


@pytest.mark.parametrize("name", ["finished", "parts", "unfinished", "packed"])
def test_it_goes_over_an_url_as_it_is(copy: Path, run: Run, name: str) -> None:
    for arguments in (("push", f"{name}/A2b", "file://store/A2b"), ("pull", "file://store/A2b", "pulled/A2b")):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
    for folder in ("packs", "pending"):
        held = [{path.name: path.read_bytes() for path in copy.glob(f"{at}/A2b/{folder}/*")} for at in (name, "pulled")]
        assert held[0] == held[1]
    if name in ("finished", "packed"):
        one, other = (LogitCache.open(copy / at / "A2b", ["first"]) for at in (name, "pulled"))
        assert (one.files, one.fingerprints) == (other.files, other.fingerprints)
        assert torch.equal(one.batch(one.files), other.batch(one.files))
