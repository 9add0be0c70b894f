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
SECONDS = 600


@dataclass(frozen=True)
class Mutant:
    """``old`` stands in ``file`` once, and becomes ``new``; ``tests`` are the likely ones."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "a row is carried into a new pack without a look at its checksum",
        "kd_cache/store/union.py",
        "    if len(wrong):\n",
        "    if len(wrong) < 0:\n",
        ("test_union_and_seal.py", "test_repair.py"),
    ),
    Mutant(
        "a pack is opened without a look at its digest",
        "kd_cache/store/pack.py",
        'if check == "full" and xxhash',
        'if check == "never" and xxhash',
        ("test_pack.py", "test_faults_bits.py"),
    ),
    Mutant(
        "rows read lazily are not checked",
        "kd_cache/store/pack.py",
        '            if wrong:\n                raise _damaged(self.path, f"row',
        '            if not wrong and wrong:\n                raise _damaged(self.path, f"row',
        ("test_lazy.py", "test_loader.py"),
    ),
    Mutant(
        "a file is renamed into place without an fsync",
        "kd_cache/files/atomic.py",
        "            os.fsync(file.fileno())\n            status",
        "            status",
        ("test_stored_files.py", "test_union_and_seal.py", "test_faults_calls.py"),
    ),
    Mutant(
        "a folder is not fsynced after a rename",
        "kd_cache/files/atomic.py",
        "    try:\n        os.fsync(descriptor)\n    finally:",
        "    try:\n        pass\n    finally:",
        ("test_union_and_seal.py", "test_faults_calls.py"),
    ),
    Mutant(
        "all processes share one temporary name",
        "kd_cache/files/atomic.py",
        '{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"',
        '{TEMPORARY}shared"',
        ("test_faults_calls.py",),
    ),
    Mutant(
        "merged packs go before the merged one is written",
        "kd_cache/store/union.py",
        "        path = write_pack(\n",
        "        [pack.path.unlink() for pack in union.packs]\n        path = write_pack(\n",
        ("test_faults_calls.py",),
    ),
    Mutant(
        "files resolve to the row after theirs",
        "kd_cache/serve/resolve.py",
        "        found = self._finder.find(keys_of_bytes(names))\n",
        "        found = self._finder.find(keys_of_bytes(names))\n"
        "        found = np.where(found >= 0, (found + 1) % len(self), found)\n",
        ("test_loader.py", "test_student.py"),
    ),
    Mutant(
        "unseen devices may train",
        "kd_cache/dataset/guard.py",
        '    if wrong:\n        raise DataLeakageError(\n            f"{len(wrong)} train samples come',
        '    if not wrong and wrong:\n        raise DataLeakageError(\n            f"{len(wrong)} train samples come',
        ("test_splits.py",),
    ),
    Mutant(
        "a location in train and test is let pass",
        "kd_cache/dataset/guard.py",
        "    if shared and not allow_shared_locations:",
        "    if shared and not shared:",
        ("test_splits.py",),
    ),
    Mutant(
        "a file in train and in another split is let pass",
        "kd_cache/dataset/guard.py",
        "    if both:\n",
        "    if both and not both:\n",
        ("test_splits.py",),
    ),
    Mutant(
        "a row counts as fresh whatever its feature",
        "kd_cache/score/existing.py",
        "            fresh[pending] = (self.union.inputs[position[pending]] == digests[pending]).all(axis=1)",
        "            fresh[pending] = True",
        ("test_known.py", "test_dump.py"),
    ),
    Mutant(
        "a seal keeps rows of features that changed",
        "kd_cache/store/union.py",
        "            hit = (self.inputs[position[pending]] == inputs[pending]).all(axis=1)",
        "            hit = np.ones(len(pending), bool)",
        ("test_union_and_seal.py", "test_seal.py"),
    ),
    Mutant(
        "two teachers are swapped in the table",
        "kd_cache/serve/gather.py",
        "            table[:, number] = rows.all()",
        "            table[:, -1 - number] = rows.all()",
        ("test_loader.py",),
    ),
    Mutant(
        "two teachers are swapped when their maps are read",
        "kd_cache/serve/gather.py",
        "                    out[part, number] = scratch[0]",
        "                    out[part, -1 - number] = scratch[0]",
        ("test_loader.py", "test_lazy.py"),
    ),
    Mutant(
        "readers forget the list of permitted samples",
        "kd_cache/serve/rows.py",
        "    allowed = permitted is None or permitted.has_keys(union.keys)",
        "    allowed = True",
        ("test_permitted.py",),
    ),
    Mutant(
        "workers do not compare the list of permitted samples",
        "kd_cache/serve/logit_cache.py",
        'chosen = () if permitted is None else (str(permitted["file"]),)',
        "chosen = ()",
        ("test_permitted.py", "test_loader.py"),
    ),
    Mutant(
        "packs just written go with those they replace",
        "kd_cache/store/publish.py",
        "sorted(path for path in superfluous if path.name not in current)",
        "sorted(superfluous)",
        ("test_dump.py", "test_seal.py"),
    ),
    Mutant(
        "an index that another process wrote meanwhile is overwritten",
        "kd_cache/store/publish.py",
        "maps, record, state=self.snapshot.state)",
        "maps, record)",
        ("test_seal.py",),
    ),
    Mutant(
        "pending records go although the index does not know them",
        "kd_cache/store/pending.py",
        "[record.path for record in records if is_told(record)]",
        "[record.path for record in records]",
        ("test_seal.py", "test_parts.py"),
    ),
    Mutant(
        "a seal forgets what a dump measured",
        "kd_cache/store/entry.py",
        '    "precision_cost": _added,\n',
        "",
        ("test_kept_words.py",),
    ),
    Mutant(
        "precision is no part of the fingerprint",
        "kd_cache/score/teacher.py",
        "        precision,\n        dtype,\n        str(FORMAT_VERSION),",
        '        "fp32",\n        dtype,\n        str(FORMAT_VERSION),',
        ("test_fingerprint.py", "test_teacher_contract.py"),
    ),
    Mutant(
        "weights are digested by their names alone",
        "kd_cache/store/origin.py",
        "            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)",
        "            pass",
        ("test_fingerprint.py",),
    ),
    Mutant(
        "every sample is computed at the first slot",
        "kd_cache/store/plan.py",
        "        return Place(size, rank % size)",
        "        return Place(size, 0)",
        ("test_engine.py", "test_pipeline.py", "test_dump.py"),
    ),
    Mutant(
        "rows of a batch come back in another order",
        "kd_cache/score/engine.py",
        "logits.numpy()[running.slots]",
        "logits.numpy()[running.slots[::-1]]",
        ("test_engine.py", "test_pipeline.py"),
    ),
    Mutant(
        "a damaged batch plan is believed",
        "kd_cache/store/plan.py",
        "if digest in (None, _digest(content)) else None",
        "if digest != 0 else None",
        ("test_engine.py", "test_dump.py"),
    ),
    Mutant(
        "students see the scene labels of the target",
        "kd_cache/serve/student_loader.py",
        "torch.where(source_mask, scene, IGNORED)",
        "scene",
        ("test_student.py",),
    ),
    Mutant(
        "a student's feature is compared with the first teacher's alone",
        "kd_cache/serve/student_loader.py",
        "            if digests != feature.digest * (len(digests) // len(feature.digest)):",
        "            if digests[: len(feature.digest)] != feature.digest:",
        ("test_student.py",),
    ),
    Mutant(
        "a changed file counts as unchanged by its size",
        "kd_cache/score/unchanged.py",
        'self.notes["stat"][at[held]] == stats[held]).all(axis=1)',
        'self.notes["stat"][at[held]][:, :3] == stats[held][:, :3]).all(axis=1)',
        ("test_seen.py", "test_unchanged.py"),
    ),
    Mutant(
        "rows joined to wrong files are not noticed by their accuracy",
        "kd_cache/store/accuracy.py",
        "now.correct == before.correct:",
        "now.correct >= 0:",
        ("test_accuracy.py",),
    ),
    Mutant(
        "verify does not look for rows that are not permitted",
        "kd_cache/care/verify.py",
        "        self._look_for_forbidden_rows()\n",
        "",
        ("test_verify.py", "test_permitted.py"),
    ),
    Mutant(
        "a teacher may have seen anything in training",
        "kd_cache/dataset/guard.py",
        "    if not len(outside):\n        return []",
        "    if len(outside) >= 0:\n        return []",
        ("test_provenance.py",),
    ),
    Mutant(
        "gc takes what is young",
        "kd_cache/care/gc.py",
        "        if max(found.st_mtime, since) > self.limit:",
        "        if max(found.st_mtime, since) < 0:",
        ("test_gc.py",),
    ),
)


def main(names: Iterable[str]) -> int:
    wanted = [mutant for mutant in MUTANTS if not names or any(name in mutant.name for name in names)]
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
    command = (*PYTEST, "-rfE", *tests)
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
