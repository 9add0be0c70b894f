"""What ``kd-cache train …`` does, once its options are read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kd_cache.cli import options as opt
from kd_cache.cli.config import DEFAULT_FILE, file_settings, resolved_settings, source_name
from kd_cache.cli.console import Screen, percent, table
from kd_cache.cli.inputs import inputs_of
from kd_cache.cli.saved import run_record
from kd_cache.cli.teachers import BUILT_IN, described, load_teachers
from kd_cache.cli.train_options import TrainOptions
from kd_cache.errors import TrainingError, UsageError, shown, worst_exit_code
from kd_cache.manifest import SOURCE, TARGETS
from kd_cache.teacher import TeacherSpec

if TYPE_CHECKING:
    from kd_cache.train.job import TrainJob, TrainReport
    from kd_cache.train.settings import Settings

CITY, CITY2SCENE, SCENE = "city", "city2scene", "scene"
# What a teacher that another one needs takes from the command line, which speaks of that other one.
_SHARED = {
    "json_path", "data_root", "features", "num_scenes", "num_cities", "allow_shared_locations", "allow_outside",
    "val_ratio", "fold", "quick_experiment", "feature_spec", "output_dir", "arch", "feature_dim", "seed",
    "deterministic", "precision", "compile", "device", "workers", "half", "pth", "resume", "shuffle_labels",
    "tensorboard", "max_manifest_bytes", "max_feature_bytes", "max_checkpoint_bytes", "target",
}  # fmt: skip


def run_train(ctx: typer.Context, role: str, options: TrainOptions) -> None:
    """Train one role for one target, or for each."""
    from teachers import checkpoint_limit

    with (
        Screen(quiet=options.quiet, as_json=options.as_json) as screen,
        checkpoint_limit(options.max_checkpoint_bytes),
    ):
        reports = []
        _check_settings(ctx, (CITY, CITY2SCENE) if role == CITY2SCENE else (role,), everything=role != CITY2SCENE)
        for target in _targets(role, options.target):
            if role == CITY2SCENE and options.sweep is not None:
                reports += _swept(ctx, options.sweep, target, screen)
            elif role == CITY2SCENE:
                reports += _chain(ctx, target, screen, everything=False)
            else:
                reports.append(_trained(ctx, role, target, screen, only_shared=False))
        screen.result(*_tables(reports))
        screen.result_json({"trained": [report.as_json() for report in reports]})


def run_train_all(ctx: typer.Context, options: TrainOptions) -> None:
    """The chain for each target: city, City2Scene, scene (once), then the dump. Exits with the dumps' status."""
    from teachers import checkpoint_limit

    codes, dumps = [0], []
    with (
        Screen(quiet=options.quiet, as_json=options.as_json) as screen,
        checkpoint_limit(options.max_checkpoint_bytes),
    ):
        _check_settings(ctx, (SCENE, CITY, CITY2SCENE), everything=True)
        scene = _trained(ctx, SCENE, SOURCE, screen, only_shared=False)
        reports = [scene]
        for target in _targets(CITY, options.target):
            pair = _chain(ctx, target, screen, everything=True)
            reports += pair
            if scene.published and pair[-1].published:
                checkpoints = {CITY2SCENE: pair[-1].checkpoint, SCENE: scene.checkpoint}
                code, content = _dumped(ctx, options, target, checkpoints, screen)
                codes.append(code)
                dumps.append(content)
        screen.result(*_tables(reports))
        screen.result_json({"trained": [report.as_json() for report in reports], "dumps": dumps})
    if code := worst_exit_code(codes):
        raise typer.Exit(code)


def _check_settings(ctx: typer.Context, roles: Sequence[str], *, everything: bool) -> None:
    """Raise what each teacher's settings and net are wrong in, before any of them is trained.

    ``everything``: as of `_chain`, whether the command line speaks of a city teacher too.
    """
    import torch

    from kd_cache.train.nets import embedding_dim, make_net
    from kd_cache.train.settings import stages_of

    if CITY2SCENE in roles:
        own = options_for(ctx, CITY2SCENE)
        if own.embeddings or _given_backbone(own) is not None:
            roles = [role for role in roles if role != CITY]
    for role in roles:
        options = options_for(ctx, role, only_shared=role == CITY and not everything)
        settings = settings_of(role, options)
        if settings.stages or settings.preset != "auto":
            stages_of(settings, settings.preset)
        if role == CITY2SCENE:
            continue  # its net is the city teacher's
        with nullcontext() if ":" in settings.arch else torch.device("meta"):
            net = make_net(settings, settings.num_classes, settings.seed)
        if role == CITY and CITY2SCENE in roles:
            embedding_dim(net)


def _targets(role: str, target: str) -> Sequence[str]:
    if role == SCENE:
        return [SOURCE]
    return TARGETS if target == "all" else [target]


def _chain(ctx: typer.Context, target: str, screen: Screen, *, everything: bool) -> list[TrainReport]:
    """City2Scene, after the city teacher it stands on where none was given."""
    below, backbone = _backbone(ctx, target, screen, everything=everything)
    return [*below, _trained(ctx, CITY2SCENE, target, screen, backbone=backbone, only_shared=False)]


def _backbone(
    ctx: typer.Context, target: str, screen: Screen, *, everything: bool
) -> tuple[list[TrainReport], Path | None]:
    """What a City2Scene teacher stands on, trained if it must be."""
    own = options_for(ctx, CITY2SCENE)
    given = _given_backbone(own)
    if own.embeddings or given is not None:
        return [], given
    city = _trained(ctx, CITY, target, screen, only_shared=not everything)
    return [city], city.checkpoint


def _given_backbone(own: TrainOptions) -> Path | None:
    """The checkpoint whose backbone a City2Scene teacher is told to stand on, if it is."""
    from teachers.recipes import is_city2scene

    if own.embeddings and own.city_teacher_ckpt is not None:
        raise UsageError("--embeddings and --city-teacher-ckpt both say what to stand on; give one of them")
    if own.embeddings or own.city_teacher_ckpt is not None or own.init is None or ":" in own.arch:
        return own.city_teacher_ckpt
    return own.init if is_city2scene(own.init) else None  # it has a city teacher of its own


def _swept(ctx: typer.Context, text: str, target: str, screen: Screen) -> list[TrainReport]:
    """A head for every combination of settings; the best by validation is published. Shows a table of all.

    Of validation alone: a person must not choose by ``test`` either.
    """
    from kd_cache.train.publishing import publish
    from teachers.recipes import train_teacher

    choices = _parse_sweep(text)
    own = options_for(ctx, CITY2SCENE)
    if own.stage and (useless := {"lr", "epochs"} & set(choices)):
        raise UsageError(
            f"--sweep {shown(text)}: {' and '.join(sorted(useless))} of stages that are given one by one are theirs",
            hint="Leave out --stage, or what it says from the sweep.",
        )
    below, backbone = _backbone(ctx, target, screen, everything=False)
    base = replace(_job(ctx, CITY2SCENE, target, backbone, only_shared=False), publish=False, shared={})
    if "dropout" in choices and not base.settings.mlp_hidden_dims:
        screen.note("a linear scene head has no dropout: give --mlp-hidden-dims for it to matter")
    made: list[tuple[dict[str, Any], TrainJob, TrainReport]] = []
    rows = []
    for values in product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        job = replace(base, settings=replace(base.settings, **chosen))
        try:
            report = train_teacher(job, screen)
        except TrainingError as error:
            rows.append([*(f"{value:g}" for value in values), "failed", "–"])
            screen.note(f"{', '.join(f'{name}={value:g}' for name, value in chosen.items())}: {error.message}")
            continue
        made.append((chosen, job, report))
        validation = report.results["validation"]
        scores = [percent(validation["accuracy"]), _number(validation["log_loss"])]
        rows.append([*(f"{value:g}" for value in values), *scores])
    if not made:
        raise TrainingError("no combination of the sweep learnt anything", hint="See the notes above.")
    screen.result(table("Sweep", [*choices, "Validation", "Log loss"], rows), "")
    _, job, best = max(made, key=lambda one: _rank(one[2]))
    if job.settings.quick_experiment < 1:
        screen.note(f"a quick experiment publishes nothing: its weights are {shown(best.checkpoint)}")
    elif not job.settings.shuffle_labels:
        best = replace(best, checkpoint=publish(job, best.checkpoint, best.results, screen), published=True)
    return [*below, best]


def _rank(report: TrainReport) -> tuple[float, float]:
    validation = report.results["validation"]
    return validation["accuracy"], -validation["log_loss"]


_SWEPT = {"lr": float, "weight_decay": float, "dropout": float, "label_smoothing": float, "batch_size": int,
          "epochs": int, "seed": int}  # fmt: skip


def _parse_sweep(text: str) -> dict[str, list[Any]]:
    """``lr=1e-3/1e-2,dropout=0/0.3``: values by setting. Raises `UsageError`."""
    found: dict[str, list[Any]] = {}
    for item in text.split(","):
        name, separator, values = item.strip().partition("=")
        name = name.replace("-", "_")
        if not separator or name not in _SWEPT or name in found:
            raise UsageError(
                f"--sweep {shown(text)}: found {shown(item)}, expected NAME=VALUE/VALUE/…, each name once, of "
                f"{', '.join(_SWEPT)}"
            )
        try:
            found[name] = [_SWEPT[name](value) for value in values.split("/")]
        except ValueError as error:
            raise UsageError(f"--sweep {shown(text)}: {shown(error)}") from error
    return found


def _trained(
    ctx: typer.Context,
    role: str,
    target: str,
    screen: Screen,
    *,
    backbone: Path | None = None,
    only_shared: bool,
) -> TrainReport:
    from teachers.recipes import train_teacher

    job = _job(ctx, role, target, backbone, only_shared=only_shared)
    return train_teacher(replace(job, replace=not only_shared), screen)


def _job(ctx: typer.Context, role: str, target: str, backbone: Path | None, *, only_shared: bool) -> TrainJob:
    options = options_for(ctx, role, only_shared=only_shared)
    inputs = inputs_of(target, vars(options))
    from kd_cache.pipeline.device import resolve_device
    from kd_cache.train.job import TrainJob

    return TrainJob(
        settings=settings_of(role, options),
        manifest=inputs.manifest,
        selection=inputs.selection,
        source=inputs.source,
        output_dir=options.output_dir,
        device=resolve_device(options.device),
        data_root=Path(inputs.paths["data_root"]),
        backbone=backbone,
        init=options.init,
        embeddings=tuple(options.embeddings),
        resume=options.resume,
        workers=options.workers,
        cached_features=options.cached_features,
        pth=options.pth,
        half=options.half,
        tensorboard=options.tensorboard,
        record={"options": resolved_settings(ctx), "paths": inputs.paths},
    )


def settings_of(role: str, options: TrainOptions) -> Settings:
    """The training's settings. Raises `UsageError` for those that contradict each other."""
    from kd_cache.train.settings import Settings, parse_stage

    names = {each.name for each in fields(Settings)} - {"role", "stages", "drop_last"}
    return Settings(
        role=role,
        stages=tuple(map(parse_stage, options.stage)),
        drop_last=options.drop_last or options.compile,
        **{name: getattr(options, name) for name in names},
    )


def options_for(ctx: typer.Context, role: str, *, only_shared: bool = False) -> TrainOptions:
    """The options of one role: the command line, then the environment, the file's section of it, the file, the default.

    ``only_shared``: the command line speaks of another teacher, which needs this one; what both have in common counts.
    """
    file = file_settings(ctx, role)
    chosen: dict[str, Any] = {}
    known = {each.name for each in fields(TrainOptions)}
    params: list[Any] = list(ctx.command.params)
    for parameter in params:
        name = str(parameter.name)
        if name not in known:
            continue
        is_said = source_name(ctx, name) in ("COMMANDLINE", "ENVIRONMENT")
        if is_said and (not only_shared or name in _SHARED):
            chosen[name] = ctx.params[name]
        elif name == "config":
            chosen[name] = ctx.params[name]  # its callback reads the file
        else:
            try:
                chosen[name] = parameter.process_value(ctx, file.get(name, parameter.default))
            except typer.BadParameter as error:  # of a section that typer has not looked at
                where = f"{shown(ctx.params['config'] or DEFAULT_FILE)}: {role}: {name}"
                raise UsageError(f"{where}: {error.message}") from error
    return TrainOptions(**{name: opt.at_home(value) for name, value in chosen.items()})


# -- the dump that ends the chain --------------------------------------------------------------------------------------


def _dumped(
    ctx: typer.Context, options: TrainOptions, target: str, checkpoints: dict[str, Path], screen: Screen
) -> tuple[int, dict[str, Any]]:
    from kd_cache.cli.dump_run import dump_and_report
    from kd_cache.dump import DumpJob
    from kd_cache.pipeline.device import resolve_device

    inputs = inputs_of(target, vars(options))
    specs = [TeacherSpec(name, _factory(ctx, name), path) for name, path in checkpoints.items()]
    teachers = _teachers(ctx, options, specs)
    job = DumpJob(
        cache_root=options.cache_root,
        manifest=inputs.manifest,
        selection=inputs.selection,
        source=inputs.source,
        teachers=teachers,
        device=resolve_device(options.device),
        workers=options.workers,
        notes={spec.name: {"source": described(spec, teachers[spec.name])} for spec in specs},
        record=run_record(ctx, inputs),
    )
    return dump_and_report(job, 10, screen)


def _factory(ctx: typer.Context, role: str) -> str:
    """Of a built-in net the built-in one; nothing that is saved may name a user's code."""
    return BUILT_IN[role] if ":" not in options_for(ctx, role).arch else ""


def _teachers(ctx: typer.Context, options: TrainOptions, specs: Sequence[TeacherSpec]) -> dict[str, Any]:
    from teachers.own_teacher import own_teacher

    built_in = [spec for spec in specs if spec.factory]
    loaded: dict[str, Any] = dict(
        load_teachers(built_in, options.num_scenes, options.num_cities, options.max_checkpoint_bytes)
    )
    for spec in specs:
        if not spec.factory and spec.checkpoint is not None:
            loaded[spec.name] = own_teacher(
                options_for(ctx, spec.name).arch, spec.checkpoint, num_cities=options.num_cities
            )
    return loaded


# -- what a person sees ------------------------------------------------------------------------------------------------


def _tables(reports: Sequence[TrainReport]) -> list[Any]:
    made: list[Any] = [_headlines(reports)]
    for report in reports:
        made += ["", *_details(report)]
    return made


def _headlines(reports: Sequence[TrainReport]) -> Any:
    from kd_cache.train.evaluation import headline

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
                _number(validation.get("log_loss")),
                _number(validation.get("ece")),
                *(percent(found[where]) for where in ("test, source", "test, target")),
                percent(chance),
            ]
        )
    columns = ["Teacher", "", "Validation", "its log loss", "its ECE", "Test, A", "Test, target", "Chance"]
    return table("Accuracy on locations that were not trained on", columns, rows)


def _details(report: TrainReport) -> list[Any]:
    lines: list[Any] = [f"{report.role} {report.place}: {shown(report.checkpoint)}"]
    lines += [f"  {said}" for said in report.results.get("frozen", [])]
    split = "Test" if report.results.get("test") else "Validation"
    test = report.results.get("test") or report.results["validation"]
    if test.get("samples"):
        sure = next(one for one in test["early_exit"] if one["threshold"] == 0.9)
        lines.append(
            f"  {split}, {test['samples']} clips: macro accuracy {percent(test['macro_accuracy'])}, log loss "
            f"{_number(test['log_loss'])}, ECE {_number(test['ece'])} (equal mass {_number(test['ece_equal_mass'])}), "
            f"Brier {_number(test['brier'])}; {percent(sure['coverage'])} are at least 0.9 sure, of those "
            f"{percent(sure['accuracy'])} right"
        )
    for kind, name in (("device_group", "Devices"), ("device", "Device"), ("city", "City")):
        groups = test.get("by", {}).get(kind, {})
        told = ", ".join(f"{group} {percent(one['accuracy'])} of {one['samples']}" for group, one in groups.items())
        if told:
            lines.append(f"  {name}: {told}")
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
