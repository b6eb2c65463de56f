"""The option tables of docs/commands.md, made from the commands: `python -m llmdoctor.cli.reference FILE`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from llmdoctor.cli.main import app
from llmdoctor.files import write_text

_BLOCK = re.compile(r"(<!-- options of ([a-z ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def commands() -> dict[str, Any]:
    """Every command by its words, such as `train` and `models fetch`."""
    found: dict[str, Any] = {}
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        children = getattr(command, "commands", {})
        found |= {f"{name} {child}": inner for child, inner in children.items()} or {name: command}
    return found


def spellings(parameter: Any) -> list[str]:
    """How a parameter is written: an option's names, an argument's metavar."""
    if parameter.param_type_name == "argument":
        # An optional one stands in brackets; brackets within are its own.
        return [re.sub(r"^\[(.*)\]$", r"\1", parameter.metavar)]
    return [*parameter.opts, *parameter.secondary_opts]


def option_table(command: Any) -> str:
    """A command's own parameters as a Markdown table (those that all commands share are left out)."""
    rows = ["| Option | Meaning | Default |", "|---|---|---|"]
    for parameter in command.params:
        if getattr(parameter, "rich_help_panel", None) == "Common" or "--help" in parameter.opts:
            continue
        names = ", ".join(f"`{name}`" for name in spellings(parameter))
        rows.append(f"| {names} | {_cell(parameter.help or '')} | {_default(parameter)} |")
    return "\n".join(rows) + "\n"


def with_tables(text: str) -> str:
    """The document with every block between `<!-- options of NAME -->` and `<!-- end -->` made anew."""
    known = commands()
    return _BLOCK.sub(lambda block: f"{block[1]}\n{option_table(known[block[2]])}\n{block[3]}", text)


def _cell(text: str) -> str:
    return text.replace("\\[", "[").replace("|", "\\|")


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required:
        return "required"
    if value is None or value == [] or value == ():
        return ""
    if isinstance(value, bool) and parameter.secondary_opts:
        return f"`{(parameter.opts if value else parameter.secondary_opts)[0]}`"
    return "" if value is False else f"`{value}`"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        typer.echo("usage: python -m llmdoctor.cli.reference docs/commands.md", err=True)
        sys.exit(2)
    document = Path(sys.argv[1])
    write_text(document, with_tables(document.read_text(encoding="utf-8")))
