"""The model card that a doctor's folder carries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llmdoctor.models.loading import split_revision


def model_card(config: dict[str, Any]) -> str:
    """Markdown card with the hub's metadata block, from a `DoctorConfig` as a dict."""
    base = str(config["base"])
    metrics = "\n".join(f"| {name} | {value:.4g} |" for name, value in config["metrics"].items()) or "| – | – |"
    merged = config["training"].get("merged", [])
    origin = "was trained on token rewards with flow balance over all sub-trajectories (TFPO, arXiv 2601.10416)."
    if merged:
        # They may be another method's, so what they were trained by is left to the table.
        measured = "" if "margin" in config["metrics"] else "; nothing of it was measured when it was made"
        origin = f"adds up the adapters of {len(merged)} doctors{measured}. How each was trained is said below."
    name, _ = split_revision(base)
    hub_base = f"base_model: {name}\n" if name.count("/") == 1 and not name.startswith((".", "/")) else ""
    return f"""---
library_name: llmdoctor
{hub_base}tags:
- llmdoctor
- test-time-alignment
- gflownet
---

# Doctor: {config["dimension"] or "unnamed"}

A doctor steers a large frozen language model while it decodes; the large model's weights are never touched. This one
{origin}

- Base: `{base}` ({"LoRA adapter" if config["lora"] else "all weights"} and a value head)
- Dimension: {config["dimension"] or "–"}

```bash
llmdoctor generate "Your prompt" --patient {base} --doctor THIS_FOLDER=1.0
```

## Figures

| metric | value |
|---|---|
{metrics}

All but the counts are of held-out pairs. `preference_accuracy` is the share of them where
log π̂/π_ref is higher on the chosen response.

## Training

{_merged_table(merged) if merged else _table(["setting", "value"], config["training"].items())}

## Limits

It was trained on one data set, for one dimension, and inherits its base model's flaws. Steering with a large β trades
fluency and diversity for the reward: look at both.
"""


def _merged_table(parts: list[dict[str, Any]]) -> str:
    """A column for each doctor that was merged."""
    names = list(dict.fromkeys(name for part in parts for name in part["training"]))
    rows: list[list[Any]] = [
        ["weight", *(f"{part['weight']:g}" for part in parts)],
        ["dimension", *(part["dimension"] or "–" for part in parts)],
        ["adapter", *(part["adapter"][:16] for part in parts)],
    ]
    rows += [[name, *(part["training"].get(name, "–") for part in parts)] for name in names]
    return _table(["setting", *(f"doctor {number}" for number, _ in enumerate(parts, start=1))], rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *(list(rows) or [["–"] * len(head)])]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
