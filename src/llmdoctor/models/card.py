"""The model card that a doctor's folder carries."""

from __future__ import annotations

from typing import Any

from llmdoctor.models.loading import split_revision


def model_card(config: dict[str, Any]) -> str:
    """Markdown card with the hub's metadata block, from a `DoctorConfig` as a dict."""
    base = str(config["base"])
    metrics = "\n".join(f"| {name} | {value:.4g} |" for name, value in config["metrics"].items()) or "| – | – |"
    merged = config["training"].get("merged", [])
    rows = [(part["dimension"] or "unnamed", f"{part['weight']:g} × adapter {part['adapter'][:16]}") for part in merged]
    settings = "\n".join(f"| {name} | {value} |" for name, value in rows or config["training"].items()) or "| – | – |"
    origin = (
        f"adds up the adapters of {len(merged)} doctors; nothing of it was measured when it was made."
        if merged
        else "was trained on token rewards with flow balance over all sub-trajectories (TFPO, arXiv 2601.10416)."
    )
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

## {"Merged from" if merged else "Training"}

| {"doctor | share" if merged else "setting | value"} |
|---|---|
{settings}

## Limits

It was trained on one data set, for one dimension, and inherits its base model's flaws. Steering with a large β trades
fluency and diversity for the reward: look at both.
"""
