"""How many tokens a model can see at once."""

from __future__ import annotations

from typing import Any


def context_of(model: Any) -> int:
    """Tokens that `model` can see at once, as its config says; 2³⁰ where it says nothing.

    Where its angles are other ones beyond some length (LongRoPE), that length: a text that crosses it would have to be
    read anew, and a short one beside a long one with angles of its own.
    """
    config = text_config(model)
    longest = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
    rope = getattr(config, "rope_parameters", None) or {}
    # Models with several kinds of layers have parameters for each.
    for parameters in (rope, *(each for each in rope.values() if isinstance(each, dict))):
        if parameters.get("rope_type") == "longrope":
            first = parameters.get("original_max_position_embeddings")
            longest = min(longest, int(first or getattr(config, "original_max_position_embeddings", None) or longest))
    return longest


def text_config(model: Any) -> Any:
    """The config of the part of `model` that reads text; of a draft model, which has one part, its own."""
    return getattr(model.config, "get_text_config", lambda: model.config)()
