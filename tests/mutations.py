"""Does the gate notice? Breaks the product in one place after another, and runs the tests until one fails.

    python tests/mutations.py [NAME …]        # about half an hour on two cores; the table is in docs/reliability.md

Each mutant is one edit of one file. The tests named with it run first, the whole gate if they all pass. The working
tree must be clean: a mutant is written into it, and what was there is put back whatever happens.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).parent.parent
PYTEST = (sys.executable, "-m", "pytest", "-x", "-q", "-n", "2", "-p", "no:cacheprovider", "--no-header")
NOT_OF_THE_PRODUCT = ("--deselect", "tests/test_floors.py::test_each_mutation_finds_its_place_and_its_tests")
SECONDS = 600


@dataclass(frozen=True)
class Mutant:
    """``old`` stands in ``file`` once, and becomes ``new``; ``tests`` are the likely ones."""

    name: str
    file: str
    tests: list[str]
    old: str
    new: str

    @classmethod
    def parsed(cls, text: str) -> Mutant:
        """Its name, ``file: test, test``, and a difference: lines, or parts of one, with - and with + before them."""
        name, where, *lines = text.split("\n")
        file, tests = where.split(": ")
        old, new = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
        return cls(name, file, [f"{test}.py" for test in tests.split(", ")], old, new)


MUTANTS = r"""
a row is carried into a new pack without a look at its checksum
kd_cache/store/union.py: test_union_and_seal, test_repair
-    if len(wrong):
+    if len(wrong) < 0:

a pack is opened without a look at its digest
kd_cache/store/pack.py: test_pack, test_faults_bits
-if check == "full" and xxhash
+if check == "never" and xxhash

rows read lazily are not checked
kd_cache/store/pack.py: test_lazy, test_loader
-            if wrong:
-                raise _damaged(self.path, f"row
+            if not wrong and wrong:
+                raise _damaged(self.path, f"row

a file is renamed into place without an fsync
kd_cache/files/atomic.py: test_stored_files, test_union_and_seal, test_faults_calls
-            os.fsync(file.fileno())
-            status
+            status

a folder is not fsynced after a rename
kd_cache/files/atomic.py: test_union_and_seal, test_faults_calls
-        os.fsync(descriptor)
-    except OSError as error:
+        pass
+    except OSError as error:

all processes share one temporary name
kd_cache/files/atomic.py: test_faults_calls
-{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
+{TEMPORARY}shared"

merged packs go before the merged one is written
kd_cache/store/union.py: test_faults_calls
-    return write_pack(
+    [pack.path.unlink() for pack in union.packs]
+    return write_pack(

files resolve to the row after theirs
kd_cache/serve/resolve.py: test_loader, test_student
-        found = self._finder.find(keys_of_bytes(names))
+        found = self._finder.find(keys_of_bytes(names))
+        found = np.where(found >= 0, (found + 1) % len(self.numbers), found)

unseen devices may train
kd_cache/dataset/guard.py: test_splits
-            _unseen_devices(train, task),
+            [],

a location in train and test is let pass
kd_cache/dataset/guard.py: test_splits
-            [] if allow_shared_locations else shared,
+            [],

a file in train and in another split is let pass
kd_cache/dataset/guard.py: test_splits
-_files_in_two_splits(manifest, data_root)),
+[]),

a row counts as fresh whatever its feature
kd_cache/score/existing.py: test_known, test_dump
-            fresh[pending] = (self.union.inputs[position[pending]] == digests[pending]).all(axis=1)
+            fresh[pending] = True

a sample counts as fresh by its neighbour's feature
kd_cache/score/existing.py: test_known, test_dump
-            fresh[pending] = (self.union.inputs[position[pending]] == digests[pending]).all(axis=1)
+            fresh[pending] = (self.union.inputs[position[pending]] == np.roll(digests, 1, axis=0)[pending]).all(axis=1)

a seal keeps rows of features that changed
kd_cache/store/union.py: test_union_and_seal, test_seal
-            hit = (self.inputs[position[pending]] == inputs[pending]).all(axis=1)
+            hit = np.ones(len(pending), bool)

two teachers are swapped in the table
kd_cache/serve/gather.py: test_loader
-                rows.fill(table[:, number])
+                rows.fill(table[:, -1 - number])

two teachers are swapped when their maps are read
kd_cache/serve/gather.py: test_loader, test_lazy
-                    out[part, number] = scratch[0]
+                    out[part, -1 - number] = scratch[0]

readers forget the list of permitted samples
kd_cache/serve/rows.py: test_permitted
-            self._kept = None if permitted is None else _kept(shelf, permitted)
+            self._kept = None

workers do not compare the list of permitted samples
kd_cache/serve/logit_cache.py: test_permitted, test_loader
-chosen = () if permitted is None else (str(permitted["file"]),)
+chosen = ()

packs just written go with those they replace
kd_cache/store/publish.py: test_dump, test_seal
-sorted(path for path in self.superfluous if path.name not in current)
+sorted(self.superfluous)

an index that another process wrote meanwhile is overwritten
kd_cache/store/publish.py: test_seal
-maps, record, state=self.snapshot.state)
+maps, record)

pending records go although the index does not know them
kd_cache/store/pending.py: test_seal, test_parts
-[record.path for record in records if is_told(record)]
+[record.path for record in records]

a seal forgets what a dump measured
kd_cache/store/entry.py: test_kept_words
-    "precision_cost": _added,

precision is no part of the fingerprint
kd_cache/score/teacher.py: test_fingerprint, test_teacher_contract
-        precision,
-        dtype,
-        str(FORMAT_VERSION),
+        "fp32",
+        dtype,
+        str(FORMAT_VERSION),

weights are digested by their names alone
kd_cache/store/origin.py: test_fingerprint
-            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
+            pass

every sample is computed at the first slot
kd_cache/store/plan.py: test_engine, test_pipeline, test_dump
-        return Place(size, rank % size)
+        return Place(size, 0)

rows of a batch come back in another order
kd_cache/score/engine.py: test_engine, test_pipeline
-logits.numpy()[running.slots]
+logits.numpy()[running.slots[::-1]]

a damaged batch plan is believed
kd_cache/store/plan.py: test_engine, test_dump
-if digest in (None, _digest(content)) else None
+if digest != 0 else None

students see the scene labels of the target
kd_cache/serve/student_loader.py: test_student
-torch.where(source_mask, scene, IGNORED)
+scene

a student's feature is compared with the first teacher's alone
kd_cache/serve/student_loader.py: test_student
-            if digests != feature.digest * (len(digests) // len(feature.digest)):
+            if digests[: len(feature.digest)] != feature.digest:

a note of an unchanged file is believed although its row is stale
kd_cache/score/unchanged.py: test_unchanged, test_seen, test_dump
-            numbers = numbers[known.are_fresh(numbers + part.start, digests[numbers])]
+            pass

a changed file counts as unchanged by its size
kd_cache/score/unchanged.py: test_seen, test_unchanged
-self.notes["stat"][at[held]] == stats[held]).all(axis=1)
+self.notes["stat"][at[held]][:, :3] == stats[held][:, :3]).all(axis=1)

rows joined to wrong files are not noticed by their accuracy
kd_cache/store/accuracy.py: test_accuracy
-now.correct == before.correct:
+now.correct >= 0:

verify does not look for rows that are not permitted
kd_cache/care/verify.py: test_verify, test_permitted
-        self._look_for_forbidden_rows()

a teacher may have seen anything in training
kd_cache/dataset/guard.py: test_provenance
-    if not len(outside):
-        return []
+    if len(outside) >= 0:
+        return []

gc takes what is young
kd_cache/care/gc.py: test_gc
-        if max(found.st_mtime, since) > self.limit:
+        if max(found.st_mtime, since) < 0:
"""


def parsed() -> list[Mutant]:
    return [Mutant.parsed(text) for text in MUTANTS.strip("\n").split("\n\n")]


def main(names: Iterable[str]) -> int:
    wanted = [mutant for mutant in parsed() if not names or any(name in mutant.name for name in names)]
    status = ("git", "status", "--porcelain", "--", "kd_cache", "teachers")
    if subprocess.run(status, cwd=REPO, capture_output=True, check=True).stdout:
        print("the working tree has changes in kd_cache or teachers: commit them first", file=sys.stderr)
        return 2
    results = [(mutant.name, *tried(mutant)) for mutant in wanted]
    print("\n| the product is broken so | caught by | s |\n|---|---|---|")
    for name, caught, seconds in results:
        print(f"| {name} | {caught or '**not caught**'} | {seconds:.0f} |")
    survivors = [name for name, caught, _ in results if not caught]
    print(f"\n{len(results) - len(survivors)} of {len(results)} caught")
    return 1 if survivors else 0


def tried(mutant: Mutant) -> tuple[str, float]:
    """The first test that fails, empty where none does, and how long that took."""
    path = REPO / mutant.file
    before = path.read_text()
    if before.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.name}: what it replaces stands {before.count(mutant.old)} times in {mutant.file}")
    began = time.monotonic()
    try:
        path.write_text(before.replace(mutant.old, mutant.new))
        likely = [str(REPO / "tests" / test) for test in mutant.tests if (REPO / "tests" / test).exists()]
        caught = failing(likely) or failing([str(REPO / "tests")])
    finally:
        path.write_text(before)
    seconds = time.monotonic() - began
    print(f"{mutant.name}: {caught or 'NOT CAUGHT'} ({seconds:.0f} s)", flush=True)
    return caught, seconds


def failing(tests: list[str]) -> str:
    """The first test of these that fails."""
    if not tests:
        return ""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = (*PYTEST, "-rfE", *NOT_OF_THE_PRODUCT, *tests)
    try:
        done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "a test that no longer ends"
    if done.returncode == 0:
        return ""
    named = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return named[0].removeprefix("tests/") if named else f"pytest's exit status {done.returncode}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
