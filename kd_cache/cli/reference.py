"""docs/commands.md, from the tables: ``python -m kd_cache.cli.reference > docs/commands.md``."""

from __future__ import annotations

import sys

from kd_cache.cli.commands import all_commands
from kd_cache.cli.help import said, spelled
from kd_cache.commands import EXIT_CODES, Command
from kd_cache.options import ENVIRONMENT, PREFIX, Option

HEAD = f"""\
# Commands

Made from the option table by `python -m kd_cache.cli.reference > docs/commands.md`; `kd-cache COMMAND --help` says the
same. Examples run as printed, one after the other, in the repository's root.

An option's value comes from the command line, else from the environment, else from the settings file, else it is
the default. `--cache-root` is `KD_CACHE_CACHE_ROOT` in the environment and `cache_root` in the file; where a name
differs, the tables say so. A variable `KD_CACHE_…` that is no option of any command is an error, and so is an
unknown key of the file; what another command has is left to it. Underscores work too (`--cache_root`,
`--target_name`). Relative paths, in the file too, are relative to the folder where the command runs; `~` is your
home everywhere. The resolved values are kept with the cache, but for `--teacher`, which names code, and `--shard`.

The settings file is `kd-cache.yaml` in the working folder, or what `--config` names:

```yaml
target: b
cache_root: caches
only: [scene]
```

Further variables: {"; ".join(f"`{name}` ({what})" for name, what in ENVIRONMENT.items())}.

With `--json` a command that ends with an error prints `{{"error": {{"kind", "message", "hint", "exit_code"}}}}` on
standard output (`hint` may be `null`), and the same in words on standard error. What an audit finds is no error: it is
in the command's own document.

Exit codes: {" · ".join(f"{code} {what}" for code, what in EXIT_CODES.items())}; of several problems, 6 > 4 > 5 > 3.
"""


def reference() -> str:
    """The whole document."""
    home: dict[str, str] = {}
    return "\n".join([HEAD, *(section(command, home) for command in all_commands()[0].values())])


def section(command: Command, home: dict[str, str]) -> str:
    """One command: what it does, examples, options, exit codes. ``home`` has the command where a row was said first."""
    parts = [f"## kd-cache {command.name}", " ".join(filter(None, [command.help, command.details]))]
    if command.examples:
        parts.append("```console\n" + "".join(f"$ {example}\n" for example in command.examples) + "```")
    parts += [command.notes] if command.notes else []
    rows = {
        _row(option): (option.flags or (spelled(option),))[0]
        for options in command.panels.values()
        for option in options
    }
    own = [row for row in rows if home.setdefault(row, command.name) == command.name]
    parts += ["| option | meaning |\n|---|---|\n" + "\n".join(own)] if own else []
    for other in dict.fromkeys(home[row] for row in rows if row not in own):
        shared = ", ".join(f"`{name}`" for row, name in rows.items() if home[row] == other)
        parts.append(f"As for `kd-cache {other}`: {shared}.")
    parts.append("Exit codes: " + " · ".join(f"{code} {EXIT_CODES[code]}" for code in command.exit_codes))
    return "\n\n".join(parts) + "\n"


def _row(option: Option) -> str:
    names = [PREFIX + flag[2:].replace("-", "_").upper() for flag in option.flags]
    other = f" (`{option.name}`, `{option.envvar}`)" if names and option.envvar not in names else ""
    cells = (f"`{spelled(option)}`{other}", said(option).replace("<", "&lt;"))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    sys.stdout.write(reference())
