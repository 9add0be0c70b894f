"""Settings from a YAML file (below the command line and the environment, above the defaults), and what else is set."""

from __future__ import annotations

import difflib
import io
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer
import yaml

from kd_cache.cli.commands import all_options, sections
from kd_cache.commands import Command
from kd_cache.errors import KDCacheError, UsageError, shown
from kd_cache.files.atomic import open_file
from kd_cache.options import ENVIRONMENT, PREFIX, SETTINGS_FILE, Option

FILE = "kd_cache.file"
"""Where a context's ``meta`` keeps the file's settings by section; ``""`` holds those outside of any."""
_MOST = 1 << 14


def check_environment() -> None:
    """Refuse a variable that looks like ours and is empty, or that no command knows. Raises `typer.BadParameter`."""
    known = {name for option in all_options() for name in option.variables} | {*ENVIRONMENT}
    for name, text in os.environ.items():
        if name.startswith(PREFIX) and name not in known:
            raise typer.BadParameter(f"unknown variable {shown(name)} in the environment{_is_it(name, known)}")
        if name in known and name not in ENVIRONMENT and not text:  # of $UNSET: not what somebody meant to set
            raise typer.BadParameter(f"the variable {name} in the environment is empty; unset it, or give it a value")


def read_file(ctx: typer.Context, path: Path | None) -> Path | None:
    """Callback of ``--config``: make the file's values the defaults of this command. Unknown keys are errors."""
    was_named = path is not None
    if path is None and SETTINGS_FILE.is_file():
        path = SETTINGS_FILE
    if path is not None and not ctx.resilient_parsing:
        entry: Command = ctx.command.entry  # type: ignore[attr-defined]
        try:
            ctx.meta[FILE] = found = settings_in(path, entry, may_name_code=was_named)
        except KDCacheError as error:
            raise typer.BadParameter(str(error)) from error
        ctx.default_map = {key: value for part in ("", *sections(entry)) for key, value in found.get(part, {}).items()}
    return path


def settings_in(path: Path, entry: Command, *, may_name_code: bool = True) -> dict[str, dict[str, Any]]:
    """The file's settings that this command has, as texts, by section.

    Raises:
        UsageError: no settings; or one that names code, whatever the command, where that is not to be taken from here.
    """
    names = {name for each in all_options() for name in each.spellings if each.name != "config"}
    code = {name for each in all_options() if each.names_code for name in each.spellings}
    known_sections = {*sections()}
    content = _load(path)
    parts = {key: value for key, value in content.items() if key in known_sections and isinstance(value, dict)}
    found = {"": {key: value for key, value in content.items() if key not in parts}}
    for name, section in parts.items():
        if not all(isinstance(key, str) for key in section):
            raise UsageError(f"{shown(path)}: {name}: expected settings such as 'epochs: 30', one per line")
        found[name] = {key.replace("-", "_"): value for key, value in section.items()}
    for settings in found.values():
        for key in settings:
            if key not in names:
                known = [*names, *known_sections]
                raise UsageError(f"{shown(path)}: unknown setting {shown(key)}{_is_it(key, known)}")
            if key in code and not may_name_code and ":" in str(settings[key]):
                raise UsageError(
                    f"{shown(path)}: {key} names code ({shown(settings[key])}), and code comes only from the command "
                    f"line, the environment or a file named with --config; this file was found in the current folder",
                    hint=f"If you trust it: --config {SETTINGS_FILE}",
                )
    return {name: _applicable(entry, settings, path) for name, settings in found.items()}


def _is_it(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), 1)
    return f"; is it {near[0]}?" if near else ""


class _Loader(yaml.SafeLoader):
    """Without merge keys (``<<``): a few dozen of them, each of the one before twice, take for ever."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "merge keys (<<) are not settings", node.start_mark)


def _load(path: Path) -> dict[str, Any]:
    """The file's settings by name, underscores for hyphens."""
    try:
        with io.TextIOWrapper(open_file(path), encoding="utf-8") as file:
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


def _applicable(entry: Command, settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings that this command has. One file serves all commands, so another command's are left to it."""
    # A name means the setting that is called so: "seed" is the dump's, not the one verify draws its samples with.
    names = {option.name for option in all_options()}
    mine = {
        key: option
        for option in entry.options
        for key in option.spellings
        if option.name != "config" and not option.positional and (key == option.name or key not in names)
    }
    chosen: dict[str, Any] = {}
    for key, value in settings.items():
        option = mine.get(key)
        if option is None or value is None:
            continue
        text = _checked(option, key, value, path)
        if (switched := dict(option.switches).get(key)) is not None:
            if not text:
                continue
            text = switched
        if option.name in chosen:
            raise UsageError(f"{shown(path)}: {key} is set more than once, under several names")
        chosen[option.name] = text
    return chosen


def _checked(option: Option, key: str, value: Any, path: Path) -> Any:
    """The value as the command line would have it: a text, a list of texts, or a truth value for a switch."""
    where = f"{shown(path)}: {key}"
    items = value if isinstance(value, list) else [value]
    if option.keyed:
        items = [_joined(item) if isinstance(item, dict) else item for item in items]
    elif isinstance(value, dict):
        raise UsageError(f"{where} must be a value or a list, not a section")
    if option.is_switch or key in dict(option.switches):
        if isinstance(value, list):
            raise UsageError(f"{where} must be one value, not a list")
        if not isinstance(value, bool):
            raise UsageError(f"{where} must be true or false (without quotes), found {shown(value)}")
        return value
    if option.is_list:
        return [_text(where, item) for item in items]
    if isinstance(value, list) and "," in option.metavar:
        return ",".join(_text(where, item) for item in value) or "none"
    if isinstance(value, list):
        raise UsageError(f"{where} must be one value, not a list")
    return _text(where, value)


def _joined(section: dict[Any, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in section.items())


def _text(where: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{where} must be a text or a number; put it in quotes if it is one")
    return str(value)
