"""What docs/commands.md says of each command beyond its help, in Markdown."""

DUMP = """\
It reads each feature once, shows progress and how busy reading, copying, scoring and committing are (they work at
the same time; the busiest is the one to make faster), and ends with what was scored, skipped (fresh), rescored
(stale, and why) and dropped (no longer permitted). Interrupt it and run it again: it goes on where it stopped, to
the same bytes.

- **Teachers.** Without options the City2Scene and the scene teacher are loaded; `--teacher` adds one of your own or
  takes the place of a built-in one of the same name, `--only` leaves out the others.
- **`--reread`.** A rerun believes that a feature is unchanged if its file's device, inode, size, mtime and ctime
  are those of the last dump and its last change was at least 2 s old then. `--reread` reads every feature. It is
  needed where a file system keeps no ctime of its own (FAT, sshfs, images with fixed times) or shows an old one
  (NFS, for a while). `verify` and `repair` read them all.
- **`--batch-size auto`** measures the largest size that fits and still makes it faster, before anything is stored.
- **`--compile`** is kept in the index (`kd_cache.teachers.<name>.compiled`), as is the KL against fp32 of a lower
  `--precision`, measured on batches 1, 2, 4, 8, … of the run.
- **Parts.** Any number of dumps may fill one cache at the same time, without a lock: a cache is the union of its
  packs. Split the work with `--shard`, then `kd-cache seal`. A part commits packs and leaves view and index alone.
  Without `--shard`, `RANK` of `WORLD_SIZE` (torchrun) or `SLURM_ARRAY_TASK_ID` of `SLURM_ARRAY_TASK_COUNT` say
  which part this process scores; a job array must be evenly spaced (`0-7`, `1-9:2`). `--shard 0/1` does everything whatever they
  say. Give all parts the same `--batch-size`."""

VERIFY = """\
It draws permitted samples at random and checks that each has a row, that the row is intact, fresh and permitted, and
that the view equals the packs. `--all` checks every sample, and looks for rows and files without a manifest entry.
`--recompute` scores again and compares. A teacher of your own is code, so it must be given again (`--teacher`);
otherwise a note says that its fingerprint was not checked.

It also compares each teacher's accuracy on labelled source rows with the one that the dump kept
([care.md](care.md))."""

SEAL = """\
Packs, view and plan are byte for byte those of one process. While rows are missing it does nothing (exit 3, with
the parts that have not run)."""

MERGE = """\
For machines that share no disk. It checks every pack of the sources, copies it whole, leaves out rows that the
manifest does not permit (counted), and then seals; the result has the bytes of one dump. It refuses caches of
another target, damaged sources, and rows of one teacher that were made differently (exit 5, naming the parts;
`--only NAME` merges the other teachers). If rows are still missing (exit 3), what was merged is kept: merge the
rest, or dump it."""

REPAIR = """\
It scores again or rebuilds only what the first verification reports. `--recompute` scores every sample first,
replaces rows that differ, and confirms adopted rows that agree."""

DIFF = """\
Teacher by teacher: rows in either and in both, bit-equal rows, changed argmax, and KL(A ‖ B) at temperature 1 (mean
and largest; for `probs` and `sigmoid` the largest difference). It says which parts of the fingerprints differ and
how many samples were scored from other features. Rows are joined by key. `--json` lists up to 1,000 files whose
argmax changed, the table 20. Teachers with other class counts, class orders or value
kinds are reported and not compared."""

GC = """\
It removes temporaries of killed processes, packs of superseded fingerprints or of teachers no longer in the index,
permitted lists the index does not name, and row files without an index entry. What is younger than `--older-than`
stays: a running dump's temporaries are seconds old, and superseded files count from when the index that superseded
them was written. What the index or an unfinished dump needs, damaged packs (they are listed), links, and files that
kd-cache did not name are never touched. Without an index that can be read only temporaries go; a newer format is
refused.
`--dry-run` lists it all with size and reason."""

EXPORT = """\
| `--to` | written | |
|---|---|---|
| `pt` | `<teacher>.pt`, `<teacher>.files.json` | a bare tensor [N, C] for `torch.load(weights_only=True)`; beside it \
whose row is whose, the fingerprint, and the SHA-256 of the rows |
| `tsv` | `<teacher>.tsv` | `file` and one column per class, through the csv module (a tab between cells); every \
number reads back exactly |
| `npy` | `<teacher>/<md5>.npy`, `index.json` | the view in another folder; its index has no `kd_cache` entry, as an older script's |
| `npy`, no `--output` | the cache's own view | what `dump --no-files` left out |"""

ADOPT = """\
It takes the folder of an older script's cache (in place, or from elsewhere), a `.pt` tensor with its list of files
(`<stem>.files.json` beside it, `--files-list` as JSON or one file a line, or a dict of `logits` and `files`), or a
`.tsv` whose first column is `file`. The guard runs first. Rows of samples that are not permitted are, in place,
removed; permitted samples without a row are listed as missing (exit 3). No value is converted, and no code of the
source runs. More: [exchange.md](exchange.md)."""
