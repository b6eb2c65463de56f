from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdoctor.evaluation.formatting import count, duration, percent, percent_of, plain, signed


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (plain(-1.239), "−1.24"),
        (plain(-0.001), "0.00"),
        (plain(12345.6, 1), "12,345.6"),
        (plain(math.inf), "∞"),
        (plain(math.nan), "–"),
        (signed(0.5), "+0.50"),
        (signed(-0.5), "−0.50"),
        (signed(0.001), "0.00"),
        (signed(-0.001), "0.00"),
        (signed(math.nan), "–"),
        (signed(math.inf), "+∞"),
        (percent(0.6234, 1), "62.3 %"),
        (percent(math.nan), "–"),
        (percent_of(0.667, 3), "67 % (21 … 94)"),
        (percent_of(0.5, 300), "50 % (44 … 56)"),
        (percent_of(1.0, 10, 1), "100.0 % (72.2 … 100.0)"),
        (percent_of(0.5, 0), "50 %"),
        (percent_of(math.nan, 4), "–"),
        (count(1234567), "1\u202f234\u202f567"),
        (duration(0.44), "0.4 s"),
        (duration(9.96), "10 s"),
        (duration(59.6), "1 min 00 s"),
        (duration(185), "3 min 05 s"),
        (duration(3720), "1 h 02 min"),
    ],
)
def test_numbers_as_people_write_them(shown, expected):
    assert shown == expected


@given(st.floats(-1e6, 1e6), st.integers(0, 4))
def test_what_is_written_reads_back_rounded(value, digits):
    text = signed(value, digits).replace("−", "-").replace(",", "")
    assert float(text) == pytest.approx(value, abs=0.500001 * 10**-digits)
    assert float(text) != 0 or text[0] not in "-+"
