"""What docs/commands.md says of each command beyond its help, in Markdown."""

DUMP = """\
It reads each feature once, shows progress and how busy reading, copying, scoring and committing are (they work at
the same time; the busiest is the one to make faster), and ends with what was scored, skipped (fresh), rescored
(stale, and why) and dropped (no longer permitted). Interrupt it and run it again: it goes on where it stopped, to
the same bytes.

- **Teachers.** Without options the City2Scene and the scene teacher are loaded; `--teacher` adds one of your own or
  takes the place of a built-in one of the same name, `--only` leaves out the others.
- **`--reread`.** A rerun believes that a feature is unchanged if its file's device, inode, size, mtime and ctime
  are those of the last dump and its last change was at least 2 s old then (120 s on network file systems; files in
  memory are always read). 256 of them, drawn anew each time, are read all the same, and a note says how sure that
  makes one; if one of them changed, all are read. `--reread` reads every feature. It is needed where a file system
  keeps no ctime of its own (FAT, images with fixed times). `verify` and `repair` read them all.
- **`--batch-size auto`** measures the largest size that fits and still makes it faster, before anything is stored.
- **`--compile`** is kept in the index (`kd_cache.teachers.<name>.compiled`), as is the KL against fp32 of a lower
  `--precision`, measured on batches 1, 2, 4, 8, … of the run.
- **`--shard`**, launchers and job arrays: [several.md](several.md). Your own teachers: [teachers.md](teachers.md)."""

VERIFY = REPAIR = DIFF = GC = "What it looks at, and what it does: [care.md](care.md)."
REPORT = "What is on each page: [report.md](report.md)."
PREPARE = "Layouts and front ends: [audio.md](audio.md)."
SEAL = MERGE = "How it is used: [several.md](several.md)."
PUSH = PULL = "What lies at an URL, what is checked, and what ends with which status: [remote.md](remote.md)."

EXPORT = """\
| `--to` | written | |
|---|---|---|
| `pt` | `<teacher>.pt`, `<teacher>.files.json` | a bare tensor [N, C] for `torch.load(weights_only=True)`; beside it \
whose row is whose, the fingerprint, and the SHA-256 of the rows |
| `tsv` | `<teacher>.tsv` | `file` and one column per class, through the csv module (a tab between cells); every \
number reads back exactly |
| `npy` | `<teacher>/<md5>.npy`, `index.json` | the view in another folder; its index has no `kd_cache` entry, \
as an older script's |
| `npy`, no `--output` | the cache's own view | what `dump --no-files` left out |"""

ADOPT = "What a source may be, and what becomes of its rows: [exchange.md](exchange.md)."

EVALUATE = """\
It shows accuracy with its interval, macro accuracy (the mean over classes), log loss, ECE (15 bins of equal width)
and Brier score, of all rows and by device group (source, target, other, unseen), device, city and scene; `--json`
has the confusion, the accuracy per class and what an early exit at a confidence would give as well. Values may be
logits, log probabilities or probabilities. Where a group is always right, its interval is 100 – 100: few rows.

`--against cache/A2b` measures that cache's teachers on the same rows: how much better the net is than each, with an
interval from the same draws of locations for both. `--csv` writes rows and accuracy of each device and class; the JSON
has them too, and so has the page of a training.

`--split val` gives the figures that `kd-cache train` chose the epoch by, with the same `--target`, `--val-ratio`
and `--fold`. A note says how many of the rows trained the net, as its provenance says
([guard.md](guard.md#provenance)), and how many chose its epoch."""

STUDENT = """\
Losses, fusion and what the numbers mean: [distillation.md](distillation.md). Stages, augmentation, run folder and
going on: as for teachers ([training.md](training.md)); the key of a run also holds the teachers' rows, the mode and
the recipe.

- `fit` and `gate` need to know which rows trained the teachers: their checkpoints are looked up where the dump found
  them, and believed only while their fingerprint is the cache's. Where it is not known, `fit` is the mean, with a note.
- A feature that is not the one that the teachers scored is refused (exit 5), and so is a cache without one of the rows
  (3), with damaged rows (4), or of another target (2).
- The checkpoint says what it was distilled from, and its provenance is that of its own rows and of its teachers: it can
  be dumped as a teacher (`--teacher small=scene,ckpt=outputs/student/A2b/fit/best.safetensors`).
- A student of `--student-features` is evaluated with the same option, and refused as a teacher of other features.
- `ce_only`, `mean_fusion` and `attn_fusion` are older names of `ce`, `mean` and `gate`."""

COMPARE = """\
It ends with accuracy over all devices and by device group, mean and standard deviation over the seeds, the difference
to `ce` of each seed, and a sentence. Beside the mean difference stands where it lies with 95 % over 1,000 draws of the
test locations, both students on the same draws, for these seeds; the CSV has it of each seed. A mode is called better
(or worse) where all seeds agree, or where a coin's would agree as much in at most 5 % of cases; else, and of fewer than
three seeds, it is no more than luck.

Each run is kept in `outputs/student/A2b/compare-<digest>/<mode>/seed-<n>/`. The digest is that of everything that they
have in common (data, rows of the teachers, recipe, settings, code), so more `--modes` or `--seeds` join those that are
there, and an interrupted comparison goes on. `comparison.json`, `.csv` (a row per run) and `.md` are beside them."""

PREDICT = """\
The file has tabs between `filename`, `scene_label` and one column per class, in the order of the labels: probabilities
at temperature 1, every number such that it reads back exactly. Names are those of the table less `audio/`; without a
table each `.npy` is of the `.wav` of its name. A clip without a feature is refused, and so is one listed twice.

Beside it, `<name>.info.json` has the net's MACs and parameters (of a clip as long as the first), and where the table
has a column of scenes (`scene_label`) accuracy, macro accuracy and log loss on them, by class and by device."""

COMPLEXITY = """\
A convolution counts its parameters (the bias included) times the positions of its output, every other layer its
parameters, once per call: as the challenge's own tool does. Statistics of batch norm are no parameters."""
