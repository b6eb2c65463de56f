"""How a page is made: templates in which every text is escaped, and settings as a list."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from llmdoctor.evaluation.formatting import count, duration, percent, plain, signed
from llmdoctor.evaluation.heatmap import named
from llmdoctor.files import write_text

PAPER = "LLMdoctor, arXiv 2601.10416"


@cache
def _environment() -> Environment:
    # Every text comes from data or a model: autoescape is on for all templates, whatever their suffix.
    environment = Environment(
        loader=PackageLoader("llmdoctor.evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(plain=plain, signed=signed, percent=percent, count=count, duration=duration, named=named)
    return environment


def write_page(template: str, output: Path, **context: Any) -> Path:
    """Fill a template and write it to `output`, whole or not at all."""
    html = _environment().get_template(template).render(**context)
    # A lone surrogate (possible in JSON) cannot be written as UTF-8.
    write_text(output, html.encode("utf-8", errors="replace").decode("utf-8"))
    return output


def flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text)."""
    entries: list[tuple[str, str]] = []
    for key, inner in value.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(inner, Mapping):
            entries += flat(inner, f"{prefix}{key} · ")
        elif isinstance(inner, bool):
            entries.append((name, "yes" if inner else "no"))
        elif isinstance(inner, float):
            entries.append((name, f"{inner:.6g}".replace("-", "−")))
        elif inner is not None:
            entries.append((name, ", ".join(map(str, inner)) if isinstance(inner, (list, tuple)) else str(inner)))
    return entries
