"""A command's options in a YAML or JSON file, as arguments of its command line."""

import difflib
import json
from collections.abc import Collection
from pathlib import Path

import yaml

from vdu_peft.config import ConfigError
from vdu_peft.first_line import first_line


def file_arguments(file: Path, command: str, known: Collection[str], flags: Collection[str]) -> list[str]:
    """The file's options as arguments.

    Args:
        command: whose options they are.
        known: the names of all that it has, those that switch one off (``no-...``) among them.
        flags: of those, which take no value.

    Raises:
        ConfigError: the file cannot be read, is no mapping, names an option that the command has not, or says yes or no
            where it takes a value.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        # JSON is YAML for the most part; tabs are not.
        options = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: not a readable YAML or JSON file ({first_line(error)})") from error
    if not isinstance(options, dict):
        raise ConfigError(f"{file}: expected option: value pairs")
    # Here: by the parser a misspelled name would be told without the file, and one that is false or null not at all.
    for name in options:
        if name not in known:
            alike = difflib.get_close_matches(str(name), known, 1)
            meant = f"; did you mean {alike[0]}?" if alike else ""
            raise ConfigError(f"{file}: {command} has no option {name}{meant}")
        if isinstance(options[name], bool) and name not in flags:
            raise ConfigError(
                f"{file}: {name} takes a value; quote it if it is a word that YAML takes for {options[name]}"
            )
    given = []
    for name, value in options.items():
        if value is True:
            given.append(f"--{name}")
        elif value is False and f"no-{name}" in known:
            given.append(f"--no-{name}")
        elif isinstance(value, list) and len(value) != 1:
            given += [f"--{name}", *map(str, value)] if value else []
        elif value is not False and value is not None:
            # In one: it may begin with a dash.
            given.append(f"--{name}={value[0] if isinstance(value, list) else value}")
    return given
