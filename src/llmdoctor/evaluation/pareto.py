"""Several objectives at once, all to be maximised: who is beaten by nobody, and how much ground a method covers.

Shapes: N points, D ≥ 2 objectives.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmdoctor.evaluation.metrics import Floats

Points = Sequence[Sequence[float]] | Floats


def pareto_front(points: Points) -> list[int]:
    """Rows of `points` [N, D] that no other point dominates, by their first objective, rising.

    A point dominates another that it equals or exceeds in every objective and exceeds in one. Of equal points the
    first is kept.
    """
    import moocore

    array = _points(points)
    rows = np.flatnonzero(moocore.is_nondominated(array, maximise=True, keep_weakly=False))
    return [int(row) for row in rows[np.argsort(array[rows, 0], kind="stable")]]


def hypervolume(points: Points, reference: Sequence[float] | Floats) -> float:
    """Volume that the points [N, D] dominate above `reference` [D], in the product of the objectives' units.

    It is comparable only at the same reference: state it. As in moocore, which computes it exactly, a point that does
    not exceed the reference in every objective adds nothing, so the volume is 0 where none does.
    """
    import moocore

    array = _points(points)
    corner = np.asarray(reference, dtype=np.float64)
    if corner.shape != array.shape[1:] or not np.isfinite(corner).all():
        raise ValueError(f"reference must be {array.shape[1]} finite numbers, one an objective, got {reference}")
    return float(moocore.hypervolume(array, ref=corner, maximise=True))


def _points(points: Points) -> Floats:
    array = np.asarray(points, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] == 0 or array.shape[1] < 2:
        raise ValueError(f"points must be rows of at least two objectives, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("points must be finite")
    return array
