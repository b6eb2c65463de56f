"""`--config FILE.yaml`: a command's options from a file; what is typed wins over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from llmdoctor.errors import UserError

_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_UNSET = ("", "null", "~")


def read_defaults(path: Path, parameters: list[Any]) -> dict[str, Any]:
    """Defaults by parameter name, from a YAML mapping of option names (with - or _) to values.

    Args:
        path: the file.
        parameters: of the command, as typer has them.

    Raises:
        UserError: no such file, not a mapping, an unknown key, or a value of the wrong shape.
    """
    known = {_key(spelling): parameter for parameter in parameters for spelling in _spellings(parameter)}
    defaults: dict[str, Any] = {}
    for key, value in _mapping(path).items():
        parameter = known.get(_key(key))
        if parameter is None:
            names = ", ".join(sorted(name.replace("_", "-") for name in known))
            raise UserError(f"{path}: unknown option {key!r}; known: {names}")
        if value in _UNSET:
            # What may be none is set to it: its default need not be that.
            if not str(getattr(parameter, "metavar", "")).endswith("|none>"):
                continue
            value = "none"
        if parameter.name in defaults:
            raise UserError(f"{path}: {key!r} is given twice")
        defaults[parameter.name] = _value(path, key, value, parameter)
    return defaults


def _mapping(path: Path) -> dict[str, Any]:
    try:
        # Every scalar as text, just as if it were typed: the option's own type decides what it means.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration {path}: {getattr(error, 'strerror', error)}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if content in _UNSET:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} must map option names to values, such as `seed: 0`")
    return content


def _value(path: Path, key: str, value: Any, parameter: Any) -> Any:
    if parameter.multiple:
        entries = value if isinstance(value, list) else [value]
        if not all(isinstance(entry, str) for entry in entries):
            raise UserError(f"{path}: {key!r} must be one value or a list of values, got {value!r}")
        return entries
    if not isinstance(value, str):
        raise UserError(f"{path}: {key!r} must be a single value, got {value!r}")
    if not getattr(parameter, "is_flag", False):
        return value
    if value.lower() not in (*_YES, *_NO):
        raise UserError(f"{path}: {key!r} must be true or false, got {value!r}")
    return value.lower() in _YES


def _spellings(parameter: Any) -> list[str]:
    """The names a key may have: an option's long ones, an argument's own; `--config` and `--help` are not for files."""
    if parameter.param_type_name == "argument":
        return [parameter.name]
    long = [spelling for spelling in parameter.opts if spelling.startswith("--")]
    return [] if {"--config", "--help"} & set(long) else long


def _key(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")
