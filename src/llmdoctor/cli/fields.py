"""Options from dataclass fields: each setting's type, default and help are written once, where the setting lives.

The classes belong to modules that import torch or transformers, which takes seconds. They are therefore read as source
text, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

import typer
from rich.markup import escape

_TYPES: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": bool, "tuple[str, ...]": list[str]}


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a dataclass as its source has it."""

    name: str
    annotation: str
    default: Any
    help: str


@dataclass(frozen=True)
class FieldsOf:
    """Marks a command's parameter (a dict) that stands for options made of a dataclass's fields.

    Attributes:
        module, name: where the class is.
        panel: heading of the options in the help.
        only: take these fields; all if empty.
        without: leave these out.
    """

    module: str
    name: str
    panel: str
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The fields that become options."""
        known = {setting.name: setting for setting in read_settings(self.module, self.name)}
        return tuple(known[name] for name in self.only or known if name not in self.without)

    def parameters(self) -> Iterator[inspect.Parameter]:
        """One keyword parameter a field, as typer reads them."""
        for setting in self.settings:
            yield inspect.Parameter(
                setting.name, inspect.Parameter.KEYWORD_ONLY, default=setting.default, annotation=self._option(setting)
            )

    def _option(self, setting: Setting) -> Any:
        flag = f"--{setting.name.replace('_', '-')}"
        kinds = [kind.strip() for kind in setting.annotation.split("|")]
        kind = _TYPES[kinds[0]]
        extra: dict[str, Any] = {}
        if kind is bool:
            flag = f"{flag}/--no-{flag[2:]}"
        elif "None" in kinds and kind in (int, float):
            extra = {"parser": _or_none(kind), "metavar": f"<{kind.__name__}|none>"}
        text = escape(_sentence(setting.help))
        return Annotated[kind, typer.Option(flag, help=text, rich_help_panel=self.panel, **extra)]


@cache
def read_settings(module: str, name: str) -> tuple[Setting, ...]:
    """The fields of a dataclass that its own body declares, in order, then those of the class of ours that it extends.

    A field's help is its `metadata["help"]`, else its entry under "Attributes:" in the class's docstring; a field that
    only gives an inherited one another default has that one's.
    """
    spec = importlib.util.find_spec(module)
    source = spec.loader.get_source(module) if spec and isinstance(spec.loader, importlib.abc.InspectLoader) else None
    if source is None:
        raise RuntimeError(f"no source of {module}, which the command line reads its options from")
    tree = ast.parse(source)
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    inherited = {setting.name: setting for base in body.bases for setting in _settings_of_base(tree, base)}
    documented = {name: setting.help for name, setting in inherited.items()}
    documented |= _attributes(ast.get_docstring(body) or "")
    settings = []
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            default, text = _default_and_help(node.value)
            field = node.target.id
            settings.append(Setting(field, ast.unparse(node.annotation), default, text or documented.get(field, "")))
            inherited.pop(field, None)
    return (*settings, *inherited.values())


def _settings_of_base(tree: ast.Module, base: ast.expr) -> tuple[Setting, ...]:
    name = ast.unparse(base)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            module = node.module or ""
            return read_settings(module, name) if module.startswith("llmdoctor.") else ()
    return ()


def _default_and_help(value: ast.expr) -> tuple[Any, str]:
    if not isinstance(value, ast.Call):
        return ast.literal_eval(value), ""
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in value.keywords}
    return given["default"], given.get("metadata", {}).get("help", "")


def _attributes(docstring: str) -> dict[str, str]:
    """The "Attributes:" section: `name: text` or `name, name: text`, continued on deeper lines."""
    section = re.search(r"^Attributes:\n((?:[ ]+.*\n?|\n)+)", docstring, re.MULTILINE)
    entries: dict[str, str] = {}
    names: list[str] = []
    for line in inspect.cleandoc(section[1]).splitlines() if section else []:
        if found := re.match(r"([a-z_0-9]+(?:, [a-z_0-9]+)*): (.*)", line):
            names = found[1].split(", ")
            entries.update(dict.fromkeys(names, found[2]))
        else:
            entries.update({name: f"{entries[name]} {line.strip()}".strip() for name in names})
    return entries


def _sentence(text: str) -> str:
    """Begin with a capital, unless the first word is a value or a symbol."""
    first = text.partition(" ")[0]
    return text[0].upper() + text[1:] if first.isascii() and first.isalpha() else text


def _or_none(kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def parse(value: Any) -> Any:
        return None if value == "none" else kind(value)

    return parse
