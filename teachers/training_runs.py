"""What ``kd-cache train city``, ``city2scene``, ``scene``, ``all`` and ``extract`` do, once their options are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from kd_cache.cli.console import Screen, percent
from kd_cache.cli.dump import dump_and_report
from kd_cache.cli.inputs import data_of
from kd_cache.cli.pages import pages_of
from kd_cache.cli.saved import run_record
from kd_cache.cli.teachers import BUILT_IN, described, load_teachers
from kd_cache.commands import Report, Run, Table
from kd_cache.dataset.dataset import Dataset
from kd_cache.dataset.task import DCASE
from kd_cache.errors import TrainingError, UsageError, shown, worst_exit_code
from kd_cache.score.device import resolve_device
from kd_cache.score.dump import DumpJob
from kd_cache.score.teacher import TeacherSpec, parse_teacher
from kd_cache.store.cache import CacheFolder
from kd_cache.store.index import is_teacher_name
from kd_cache.train.checkpoint_file import checkpoint_limit
from kd_cache.train.embeddings import FOLDER, VALUE_KIND
from kd_cache.train.evaluation import headline
from kd_cache.train.job import TrainJob, TrainReport
from kd_cache.train.nets import embedding_dim, make_net
from kd_cache.train.run_folder import published
from kd_cache.train.settings import CITY, CITY2SCENE, SCENE, SIZES, Settings, parse_stage, stages_of
from teachers.embeddings import EmbeddingTeacher, source_name
from teachers.loading import load_teacher, own_teacher
from teachers.recipes import is_city2scene, train_teacher

SHARED = frozenset({
    "json_path", "data_root", "features", "num_scenes", "num_cities", "allow_shared_locations", "allow_outside",
    "rename_map", "val_ratio", "fold", "quick_experiment", "feature_spec", "output_dir", "arch", *SIZES, "feature_dim",
    "seed",
    "deterministic", "precision", "compile", "device", "workers", "half", "pth", "resume", "shuffle_labels",
    "tensorboard", "max_manifest_bytes", "max_feature_bytes", "max_checkpoint_bytes", "target",
})  # fmt: skip
"""What a teacher that another one needs takes from the command line, which speaks of that other one."""


def train_city(run: Run, screen: Screen, target: str, max_checkpoint_bytes: int) -> Report:
    """A city teacher for a target, or for each."""
    with checkpoint_limit(max_checkpoint_bytes):
        _check_settings(run, (CITY,))
        return _reported(run, [_trained(run.section(CITY), CITY, each, screen) for each in _each(target)], screen)


def train_scene(run: Run, screen: Screen, max_checkpoint_bytes: int) -> Report:
    """The scene teacher, which serves every target."""
    with checkpoint_limit(max_checkpoint_bytes):
        _check_settings(run, (SCENE,))
        return _reported(run, [_trained(run.section(SCENE), SCENE, DCASE.source, screen)], screen)


def train_city2scene(run: Run, screen: Screen, target: str, sweep: str | None, max_checkpoint_bytes: int) -> Report:
    """A City2Scene teacher for a target, or for each, after the city teacher it stands on where none was given."""
    reports: list[TrainReport] = []
    head = run.section(CITY2SCENE)
    with checkpoint_limit(max_checkpoint_bytes):
        _check_settings(run, (CITY, CITY2SCENE), spoken_of=SHARED)
        for each in _each(target):
            if sweep is None:
                reports += _pair(run, each, screen, spoken_of=SHARED)
                continue
            below, backbone = _backbone(run, each, screen, spoken_of=SHARED)
            reports += [*below, swept(sweep, job_for(head, CITY2SCENE, each, backbone), screen)]
    return _reported(run, reports, screen)


def train_all(run: Run, screen: Screen, target: str, max_checkpoint_bytes: int) -> Report:
    """The chain for each target: city, City2Scene, scene (once), then the dump."""
    codes, dumps = [0], []
    with checkpoint_limit(max_checkpoint_bytes):
        _check_settings(run, (SCENE, CITY, CITY2SCENE))
        scene = _trained(run.section(SCENE), SCENE, DCASE.source, screen)
        reports, folders = [scene], list[CacheFolder]()
        datas = {each: data_of(each, run.values) for each in _each(target)}
        # As a dump of several targets: what the scene teacher scored for one of them is copied into the others.
        planned = sorted({file for data in datas.values() for file in data.selection.listed}) if len(datas) > 1 else ()
        for each, data in datas.items():
            pair = _pair(run, each, screen)
            reports += pair
            if scene.published and pair[-1].published:
                checkpoints = {CITY2SCENE: pair[-1].checkpoint, SCENE: scene.checkpoint}
                code, content = _dumped(run, data, checkpoints, screen, planned, folders)
                folders.append(CacheFolder(run.values["cache_root"] / data.adaptation))
                codes.append(code)
                dumps.append(content)
    report = _reported(run, reports, screen)
    return replace(report, content={**report.content, "dumps": dumps}, exit_code=worst_exit_code(codes))


def _reported(run: Run, reports: Sequence[TrainReport], screen: Screen) -> Report:
    pages = pages_of([report.run for report in reports], screen, wanted=run.values["report"])
    content = {"trained": [report.as_json() for report in reports], **pages.content}
    return Report(content, [*report_lines(reports), *pages.lines])


def _each(target: str) -> Sequence[str]:
    return DCASE.targets if target == "all" else [target]


def _check_settings(run: Run, roles: Sequence[str], spoken_of: frozenset[str] | None = None) -> None:
    """Raise what each teacher's settings and net are wrong in, before any of them is trained.

    ``spoken_of``: all that the command line says of a city teacher, where it speaks of the one on it.
    """
    if CITY2SCENE in roles:
        head = run.section(CITY2SCENE).values
        if head.get("embeddings") or _given_backbone(head) is not None:
            roles = [role for role in roles if role != CITY]
    for role in roles:
        settings = settings_of(role, run.section(role, spoken_of if role == CITY else None))
        if settings.stages or settings.preset != "auto":
            stages_of(settings, settings.preset)
        if role == CITY2SCENE:
            continue  # its net is the city teacher's
        with nullcontext() if ":" in settings.arch else torch.device("meta"):
            net = make_net(settings, settings.num_classes)
        if role == CITY and CITY2SCENE in roles:
            embedding_dim(net)


def _pair(run: Run, target: str, screen: Screen, spoken_of: frozenset[str] | None = None) -> list[TrainReport]:
    """City2Scene, after the city teacher it stands on where none was given."""
    below, backbone = _backbone(run, target, screen, spoken_of)
    return [*below, _trained(run.section(CITY2SCENE), CITY2SCENE, target, screen, backbone)]


def _backbone(
    run: Run, target: str, screen: Screen, spoken_of: frozenset[str] | None
) -> tuple[list[TrainReport], Path | None]:
    """What a City2Scene teacher stands on, trained if it must be."""
    head = run.section(CITY2SCENE).values
    given = _given_backbone(head)
    if head.get("embeddings") or given is not None:
        return [], given
    job = job_for(run.section(CITY, spoken_of), CITY, target)
    city = train_teacher(replace(job, replace=spoken_of is None), screen)
    return [city], city.checkpoint


def _given_backbone(head: Any) -> Path | None:
    """The checkpoint whose backbone a City2Scene teacher is told to stand on, if it is."""
    given: Path | None = head.get("city_teacher_ckpt")
    if head.get("embeddings") and given is not None:
        raise UsageError("--embeddings and --city-teacher-ckpt both say what to stand on; give one of them")
    init: Path | None = head.get("init")
    if head.get("embeddings") or given is not None or init is None or ":" in head["arch"]:
        return given
    return init if is_city2scene(init) else None  # it has a city teacher of its own


def _trained(run: Run, role: str, target: str, screen: Screen, backbone: Path | None = None) -> TrainReport:
    return train_teacher(job_for(run, role, target, backbone), screen)


def job_for(run: Run, role: str, target: str, backbone: Path | None = None) -> TrainJob:
    """The training of one role by that role's section of a run. Raises as `data_of`, and `UsageError`."""
    values = run.values
    data = data_of(target, values)
    taken = ("output_dir", "resume", "workers", "pth", "half", "tensorboard")
    return TrainJob(
        settings=settings_of(role, run),
        data=data,
        device=resolve_device(values["device"]),
        backbone=backbone,
        init=values.get("init"),
        embeddings=tuple(values.get("embeddings", ())),
        cached_features=values.get("cached_features", True),
        record={"options": run.record(), "paths": dict(data.paths)},
        **{name: values[name] for name in taken},
    )


def settings_of(role: str, run: Run) -> Settings:
    """The training's settings. Raises `UsageError` for those that contradict each other."""
    values = run.values
    names = {each.name for each in fields(Settings)} - {"role", "stages", "drop_last"}
    return Settings(
        role=role,
        stages=tuple(map(parse_stage, values["stage"])),
        drop_last=values["drop_last"] or values["compile"],
        **{name: values[name] for name in names},
    )


# -- the dump that ends the chain --------------------------------------------------------------------------------------


def _dumped(
    run: Run,
    data: Dataset,
    checkpoints: dict[str, Path],
    screen: Screen,
    planned: Sequence[str],
    lent_by: Sequence[CacheFolder],
) -> tuple[int, dict[str, Any]]:
    specs = [TeacherSpec(name, _factory(run, name), path) for name, path in checkpoints.items()]
    more = {"cache_root": run.values["cache_root"], "planned": planned}
    return _scored(run, data, specs, _loaded(run, specs, screen), screen, lent_by, **more)


def _scored(
    run: Run,
    data: Dataset,
    specs: Sequence[TeacherSpec],
    teachers: dict[str, Any],
    screen: Screen,
    lent_by: Sequence[CacheFolder] = (),
    **more: Any,
) -> tuple[int, dict[str, Any]]:
    """Dump with these teachers, and verify ten samples. ``lent_by``: see `dump_logits`; ``more``: fields of the job."""
    job = DumpJob(
        data=data,
        teachers=teachers,
        device=resolve_device(run.values["device"]),
        workers=run.values["workers"],
        notes={spec.name: {"source": described(spec, teachers[spec.name])} for spec in specs},
        record=run_record(run, data),
        **more,
    )
    return dump_and_report(job, 10, screen, lent_by)


def _factory(run: Run, role: str) -> str:
    """Of a built-in net the built-in one; nothing that is saved may name a user's code."""
    return BUILT_IN[role] if ":" not in run.section(role).values["arch"] else ""


def _loaded(run: Run, specs: Sequence[TeacherSpec], screen: Screen) -> dict[str, Any]:
    values = run.values
    built_in = [spec for spec in specs if spec.factory]
    limits = (values["num_scenes"], values["num_cities"], values["max_checkpoint_bytes"])
    loaded: dict[str, Any] = dict(load_teachers(built_in, *limits, screen))
    for spec in specs:
        if not spec.factory and spec.checkpoint is not None:
            arch = run.section(spec.name).values["arch"]
            loaded[spec.name] = own_teacher(arch, spec.checkpoint, num_cities=values["num_cities"])
    return loaded


SWEPT = {"lr": float, "weight_decay": float, "dropout": float, "label_smoothing": float, "batch_size": int,
         "epochs": int, "seed": int}  # fmt: skip


def swept(text: str, job: TrainJob, screen: Screen) -> TrainReport:
    """Train them all and show a table; the best is published.

    Of validation alone: a person must not choose by ``test`` either.
    """
    choices = parse_sweep(text)
    if job.settings.stages and (useless := {"lr", "epochs"} & set(choices)):
        raise UsageError(
            f"--sweep {shown(text)}: {' and '.join(sorted(useless))} of stages that are given one by one are theirs",
            hint="Leave out --stage, or what it says from the sweep.",
        )
    if "dropout" in choices and not job.settings.mlp_hidden_dims:
        screen.note("a linear scene head has no dropout: give --mlp-hidden-dims for it to matter")
    base = replace(job, publish=False, shared={})
    made: list[tuple[TrainJob, TrainReport]] = []
    rows = []
    for values in product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        one = replace(base, settings=replace(base.settings, **chosen))
        try:
            report = train_teacher(one, screen)
        except TrainingError as error:
            rows.append([*(f"{value:g}" for value in values), "failed", "–"])
            screen.note(f"{', '.join(f'{name}={value:g}' for name, value in chosen.items())}: {error.message}")
            continue
        made.append((one, report))
        validation = report.results["validation"]
        scores = [percent(validation["accuracy"]), number(validation["log_loss"])]
        rows.append([*(f"{value:g}" for value in values), *scores])
    if not made:
        raise TrainingError("no combination of the sweep learnt anything", hint="See the notes above.")
    screen.result(Table("Sweep", [*choices, "Validation", "Log loss"], rows), "")
    one, best = max(made, key=lambda pair: _rank(pair[1]))
    return published(replace(one, publish=True), best, screen)


def _rank(report: TrainReport) -> tuple[float, float]:
    validation = report.results["validation"]
    return validation["accuracy"], -validation["log_loss"]


def parse_sweep(text: str) -> dict[str, list[Any]]:
    """``lr=1e-3/1e-2,dropout=0/0.3``: values by setting. Raises `UsageError`."""
    found: dict[str, list[Any]] = {}
    for item in text.split(","):
        name, separator, values = item.strip().partition("=")
        name = name.replace("-", "_")
        if not separator or name not in SWEPT or name in found:
            raise UsageError(
                f"--sweep {shown(text)}: found {shown(item)}, expected NAME=VALUE/VALUE/…, each name once, of "
                f"{', '.join(SWEPT)}"
            )
        try:
            found[name] = [SWEPT[name](value) for value in values.split("/")]
        except ValueError as error:
            raise UsageError(f"--sweep {shown(text)}: {shown(error)}") from error
    return found


def report_lines(reports: Sequence[TrainReport]) -> list[str | Table]:
    """A table of all, then what there is to say of each."""
    made: list[str | Table] = [_headlines(reports)]
    for report in reports:
        made += ["", *_details(report)]
    return made


def _headlines(reports: Sequence[TrainReport]) -> Table:
    rows = []
    for report in reports:
        found = headline(report.results)
        chance = report.results["chance"]
        validation = report.results["validation"]
        rows.append(
            [
                f"{report.role} {report.place}",
                report.how,
                percent(found["validation"]),
                number(validation.get("log_loss")),
                number(validation.get("ece")),
                *(percent(found[where]) for where in ("test, source", "test, target")),
                percent(chance),
            ]
        )
    columns = ["Teacher", "", "Validation", "its log loss", "its ECE", "Test, A", "Test, target", "Chance"]
    return Table("Accuracy on locations that were not trained on", columns, rows)


def _details(report: TrainReport) -> list[str]:
    lines = [f"{report.role} {report.place}: {shown(report.checkpoint)}"]
    lines += [f"  {said}" for said in report.results.get("frozen", [])]
    split = "Test" if report.results.get("test") else "Validation"
    test = report.results.get("test") or report.results["validation"]
    if test.get("samples"):
        sure = next(one for one in test["early_exit"] if one["threshold"] == 0.9)
        lines.append(
            f"  {split}, {test['samples']} clips: macro accuracy {percent(test['macro_accuracy'])}, log loss "
            f"{number(test['log_loss'])}, ECE {number(test['ece'])} (equal mass {number(test['ece_equal_mass'])}), "
            f"Brier {number(test['brier'])}; {percent(sure['coverage'])} are at least 0.9 sure, of those "
            f"{percent(sure['accuracy'])} right"
        )
    for kind, name in (("device_group", "Devices"), ("device", "Device"), ("city", "City")):
        groups = test.get("by", {}).get(kind, {})
        told = ", ".join(f"{group} {percent(one['accuracy'])} of {one['samples']}" for group, one in groups.items())
        if told:
            lines.append(f"  {name}: {told}")
    return lines


def number(value: float | None) -> str:
    """A figure for a person; a dash where it is not known."""
    return "–" if value is None else f"{value:.3f}"


def extract(
    run: Run, screen: Screen, target: str, checkpoint: list[str], teacher: list[str], output_dir: Path
) -> Report:
    """Guard, load, embed, verify."""
    if not checkpoint and not teacher:
        raise UsageError("there is nothing to embed with", hint="Pass --checkpoint NAME=PATH, or --teacher NAME=….")
    data = data_of(target, run.values)
    with checkpoint_limit(run.values["max_checkpoint_bytes"]):
        specs, sources = _sources(checkpoint, teacher)
    code, content = _scored(run, data, specs, sources, screen, cache_root=output_dir / FOLDER, files=False)
    lines = ["", f"Embeddings: {', '.join(f'--embeddings {name}' for name in sources)}"]
    return Report({**content, "embeddings": list(sources)}, lines, code)


def _sources(checkpoints: list[str], own: list[str]) -> tuple[list[TeacherSpec], dict[str, Any]]:
    """What to embed with: where it is from, and loaded, by name."""
    specs: list[TeacherSpec] = []
    found: dict[str, Any] = {}
    for text in checkpoints:
        name, named, rest = text.partition("=")
        path = Path(rest if named else text).expanduser()
        teacher = load_teacher(path)
        name = name if named else source_name(teacher)
        if not is_teacher_name(name):
            raise UsageError(f"--checkpoint {shown(text)}: {shown(name)} cannot be a name (letters, digits, _ . -)")
        _refuse_taken(name, found)
        specs.append(TeacherSpec(name, "", path))
        found[name] = EmbeddingTeacher(teacher)
    for spec in map(parse_teacher, own):
        _refuse_taken(spec.name, found)
        found[spec.name] = net = spec.load()
        if net.value_kind != VALUE_KIND:
            raise UsageError(
                f"{shown(spec.name)} gives {net.value_kind}, expected {VALUE_KIND}",
                hint='Its value_kind says what its vectors are: "embedding", of num_classes numbers each.',
            )
        specs.append(spec)
    return specs, found


def _refuse_taken(name: str, found: Mapping[str, Any]) -> None:
    if name in found:
        raise UsageError(f"two sources are called {name}; give one of them another NAME")
