"""What ``kd-cache train extract`` does, once its options are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd_cache.cli.console import Screen
from kd_cache.cli.dump import dump_and_report
from kd_cache.cli.inputs import data_of
from kd_cache.cli.saved import run_record
from kd_cache.cli.teachers import described
from kd_cache.commands import Report, Run
from kd_cache.errors import UsageError, shown
from kd_cache.score.device import resolve_device
from kd_cache.score.dump import DumpJob
from kd_cache.score.teacher import TeacherSpec
from kd_cache.store.index import is_teacher_name
from kd_cache.train.checkpoint_file import checkpoint_limit
from teachers.embeddings import FOLDER, EmbeddingTeacher, source_name
from teachers.loading import load_teacher


def extract(
    run: Run, screen: Screen, target: str, checkpoint: list[str], output_dir: Path, device: str, workers: int
) -> Report:
    """Guard, load, embed, verify."""
    data = data_of(target, run.values)
    with checkpoint_limit(run.values["max_checkpoint_bytes"]):
        specs, sources = _sources(checkpoint)
    job = DumpJob(
        cache_root=output_dir / FOLDER,
        data=data,
        teachers=sources,
        device=resolve_device(device),
        files=False,
        workers=workers,
        notes={spec.name: {"source": described(spec, sources[spec.name])} for spec in specs},
        record=run_record(run, data),
    )
    code, content = dump_and_report(job, 10, screen)
    lines = ["", f"Embeddings: {', '.join(f'--embeddings {name}' for name in sources)}"]
    return Report({**content, "embeddings": list(sources)}, lines, code)


def _sources(texts: list[str]) -> tuple[list[TeacherSpec], dict[str, Any]]:
    """What to embed with: where it is from, and loaded, by name."""
    specs, found = [], {}
    for text in texts:
        name, named, rest = text.partition("=")
        path = Path(rest if named else text).expanduser()
        teacher = load_teacher(path)
        name = name if named else source_name(teacher)
        if not is_teacher_name(name):
            raise UsageError(f"--checkpoint {shown(text)}: {shown(name)} cannot be a name (letters, digits, _ . -)")
        if name in found:
            raise UsageError(f"two sources are called {name}; give --checkpoint NAME=PATH another NAME")
        specs.append(TeacherSpec(name, "", path))
        found[name] = EmbeddingTeacher(teacher)
    return specs, found
