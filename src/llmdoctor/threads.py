"""How torch's threads wait for each other."""

from __future__ import annotations

import os

_SPINS = "10000"


def spin_briefly() -> None:
    """Make threads that wait for each other spin for some microseconds before they sleep, unless told otherwise.

    Call it before torch is loaded. GNU OpenMP's own default spins for milliseconds: where other work shares the cores,
    decoding became eight times slower. Not spinning at all wastes the second core. Tokens a second, two cores, idle and
    beside a busy process: 490 and 460 asleep, 710 and 290 so, 730 and 90 by the default.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
