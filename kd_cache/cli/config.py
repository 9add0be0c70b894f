"""Settings from a YAML file, below the command line and the environment, above the defaults."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import typer
import yaml

from kd_cache.errors import KDCacheError, UsageError, shown

DEFAULT_FILE = Path("kd-cache.yaml")
SECTIONS = ("train", "city", "city2scene", "scene")
"""Parts of the file for `kd-cache train`: for all teachers, and for each. What they leave out, the rest of it says."""
_MOST = 1 << 14
_FILE = "kd_cache.file"


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Callback of ``--config``: make the file's values the defaults of this command. Unknown keys are errors."""
    if path is None and DEFAULT_FILE.is_file():
        path = DEFAULT_FILE
    if path is not None and not ctx.resilient_parsing:
        try:
            ctx.meta[_FILE] = _sections(ctx, _load(path), path)
            ctx.default_map = file_settings(ctx, str(ctx.command.name))
        except KDCacheError as error:
            raise typer.BadParameter(error.message) from error
    return path


class _Loader(yaml.SafeLoader):
    """Without merge keys (``<<``): a few dozen of them, each of the one before twice, take for ever."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "merge keys (<<) are not settings", node.start_mark)


def _load(path: Path) -> dict[str, Any]:
    """The file's settings by name, underscores for hyphens."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST + 1)  # the file in the current folder may be anybody's
        if len(text) > _MOST:
            raise UsageError(f"{shown(path)} has more than {_MOST} characters, expected settings")
        content = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
        top = yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise UsageError(f"cannot read {shown(path)}: {error.strerror or error}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = "\n".join(shown(line) for line in str(error).splitlines())
        raise UsageError(f"{shown(path)} is not YAML: {reason}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"{shown(path)}: expected settings such as 'target: b', one per line")
    names = [key.value.replace("-", "_") for key, _ in top.value] if isinstance(top, yaml.MappingNode) else []
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise UsageError(f"{shown(path)}: {shown(twice)} is set more than once")
    return {key.replace("-", "_"): value for key, value in content.items()}


def file_settings(ctx: typer.Context, part: str) -> dict[str, Any]:
    """What the file says for this command, as texts: its section ``part`` before ``train`` before everything else."""
    found: dict[str, dict[str, Any]] = ctx.meta.get(_FILE, {})
    training = found.get("train", {}) if is_training(ctx) else {}
    section = found.get(part, {}) if is_training(ctx) and part in SECTIONS else {}
    return {**found.get("", {}), **training, **section}


def is_training(ctx: typer.Context) -> bool:
    """Whether this is one of the commands ``kd-cache train …``."""
    return ctx.parent is not None and ctx.parent.command.name == "train"


def _sections(ctx: typer.Context, settings: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """The file's settings that this command has, by section; ``""`` holds those outside of any."""
    parts = {key: value for key, value in settings.items() if key in SECTIONS and isinstance(value, dict)}
    found = {"": _applicable(ctx, {key: value for key, value in settings.items() if key not in parts}, path)}
    for name, section in parts.items():
        if not all(isinstance(key, str) for key in section):
            raise UsageError(f"{shown(path)}: {name}: expected settings such as 'epochs: 30', one per line")
        spelled = {key.replace("-", "_"): value for key, value in section.items()}
        found[name] = _applicable(ctx, spelled, path)
    return found


def _all_commands(command: Any) -> list[Any]:
    """The command itself, or all below a group."""
    below = getattr(command, "commands", None)
    return [command] if below is None else [leaf for each in below.values() for leaf in _all_commands(each)]


def _applicable(ctx: typer.Context, settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings that this command has. One file serves all commands, so another command's are known too."""
    commands = _all_commands(ctx.find_root().command)
    known = {spelled for command in commands for spelled in _spellings(command)}
    # A name means the setting that is called so: "seed" is the dump's, not the one verify draws its samples with.
    names = {parameter.name for command in commands for parameter in command.params}
    mine = {key: found for key, found in _spellings(ctx.command).items() if key == found.name or key not in names}
    chosen: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in known:
            near = difflib.get_close_matches(key, [*known, *SECTIONS], 1)
            raise UsageError(f"{shown(path)}: unknown setting {shown(key)}" + (f"; is it {near[0]}?" if near else ""))
        parameter = mine.get(key)
        if parameter is None or value is None:
            continue
        if parameter.name in chosen:
            raise UsageError(f"{shown(path)}: {key} is set more than once, under several names")
        chosen[str(parameter.name)] = _checked(parameter, key, value, path)
    return chosen


def _spellings(command: Any) -> dict[str, Any]:
    """A command's options by every name that a file may give them: ``json`` and ``as_json``, ``target_name``, …"""
    found: dict[str, Any] = {}
    for parameter in command.params:
        if parameter.name != "config":
            long = [option[2:].replace("-", "_") for option in parameter.opts if option.startswith("--")]
            found |= dict.fromkeys([parameter.name, *long], parameter)
    return found


def _checked(parameter: Any, key: str, value: Any, path: Path) -> Any:
    """The value as the command line would have it: a text, a list of texts, or a truth value for a switch."""
    where = f"{shown(path)}: {key}"
    if parameter.name == "stage":  # a stage may also be written as the settings that it is of
        value = [
            _joined(item) if isinstance(item, dict) else item
            for item in (value if isinstance(value, list) else [value])
        ]
    if isinstance(value, dict):
        raise UsageError(f"{where} must be a value or a list, not a section")
    if getattr(parameter, "multiple", False):
        return [_text(where, item) for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, list) and "," in (getattr(parameter, "metavar", None) or ""):
        return ",".join(_text(where, item) for item in value) or "none"
    if isinstance(value, list):
        raise UsageError(f"{where} must be one value, not a list")
    if not getattr(parameter, "is_flag", False):
        return _text(where, value)
    if not isinstance(value, bool):
        raise UsageError(f"{where} must be true or false (without quotes), found {shown(value)}")
    return value


def _joined(section: dict[Any, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in section.items())


def _text(where: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{where} must be a text or a number; put it in quotes if it is one")
    return str(value)


def given(ctx: typer.Context, name: str) -> bool:
    """Whether a person set this option: on the command line, in the environment or in the file."""
    return source_name(ctx, name) != "DEFAULT"


def source_name(ctx: typer.Context, name: str) -> str:
    """Where an option's value is from: ``COMMANDLINE``, ``ENVIRONMENT``, ``DEFAULT_MAP`` (the file) or ``DEFAULT``."""
    source = ctx.get_parameter_source(name)
    return "DEFAULT" if source is None else str(source.name)


def resolved_settings(ctx: typer.Context, without: Collection[str] = ()) -> dict[str, Any]:
    """Every option's value and where it came from, ``without`` left out, and a SHA-256 over the values.

    Raises `UsageError` for a value that is not Unicode (a path whose bytes are not UTF-8): no JSON can keep it.
    """
    from kd_cache.fingerprint import canonical_json  # brings numpy, which --help must not wait for

    values = {name: _plain(value) for name, value in sorted(ctx.params.items()) if name not in without}
    sources = {name: source.name.lower() for name in values if (source := ctx.get_parameter_source(name)) is not None}
    for name, value in values.items():
        try:
            canonical_json(value)
        except UnicodeEncodeError as error:
            raise UsageError(f"{name} is {shown(value)}, which is not UTF-8") from error
    return {"values": values, "sources": sources, "sha256": hashlib.sha256(canonical_json(values)).hexdigest()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    return value
