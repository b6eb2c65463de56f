"""Embedders: functions from texts to vectors whose angle tells how far apart two texts are.

Shapes: N texts, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from llmdoctor.errors import UserError, first_line
from llmdoctor.evaluation.metrics import Floats
from llmdoctor.evaluation.own_code import own_function

Embedder = Callable[[Sequence[str]], npt.ArrayLike]
"""Vectors [N, D] of N texts."""


def get_embedder(name: str) -> Embedder:
    """The user's own embedder named as `package.module:function`, else the sentence-transformers model `name`.

    Raises:
        UserError: nothing of that name, or sentence-transformers is needed and not installed.
    """
    return own_function(name, "embedder") if ":" in name else _sentence_transformer(name)


def _sentence_transformer(name: str) -> Embedder:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError(
            f"embedder {name!r} needs sentence-transformers (pip install -e '.[embed]' in llmdoctor's folder); "
            "or name your own as package.module:function"
        ) from error
    try:
        model = SentenceTransformer(name)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"embedder {name!r}: cannot load it ({type(error).__name__}: {reason})") from error

    def embed(texts: Sequence[str]) -> npt.ArrayLike:
        vectors: npt.ArrayLike = model.encode(list(texts), show_progress_bar=False)
        return vectors

    return embed


def unit_vectors(embedder: Embedder, texts: Sequence[str]) -> Floats:
    """Directions [N, D] of the texts, each of length 1.

    Raises:
        UserError: the embedder does not give one finite vector, other than zero, a text.
    """
    try:
        vectors = np.asarray(embedder(texts), dtype=np.float64)
    except Exception as error:
        raise UserError(
            f"the embedder did not return an array of numbers for {len(texts)} texts ({type(error).__name__}: "
            f"{first_line(error)})"
        ) from error
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise UserError(f"the embedder returned shape {vectors.shape} for {len(texts)} texts, expected one row a text")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if bad.size:
        raise UserError(f"the embedder gave no direction (a zero or non-finite vector) to {texts[bad[0]][:80]!r}")
    directions: Floats = vectors / lengths
    return directions
