"""How the report draws."""

from __future__ import annotations

import itertools
import re

import pytest

from llmdoctor.bench.methods import CONTENDERS
from llmdoctor.bench.report.charts import Bar, Series, Spot, frontier, intervals
from llmdoctor.bench.report.looks import look
from llmdoctor.evaluation.metrics import Interval
from llmdoctor.evaluation.plot import Plot, ticks


def test_no_two_methods_are_drawn_alike():
    """Each contender differs from every other in marker, filling or dash, so also where colours cannot be told."""
    drawn = [(seen.marker, seen.hollow, seen.dash, seen.strong) for seen in map(look, CONTENDERS)]
    assert len(set(drawn)) == len(CONTENDERS)
    assert len({look(name).name for name in CONTENDERS}) == len(CONTENDERS)
    assert [name for name in CONTENDERS if look(name).strong] == ["llmdoctor"]


def test_names_keep_off_points_lines_and_each_other():
    """A name stands right of its point; one that is there already moves it above; lines all round leave no room."""
    plot = Plot(200, (0, 1), (0, 1), "")
    plot.marker("m", "circle", 0.5, 0.5, 4, "")
    assert plot.label_point("name", 0.5, 0.5, "one")
    assert 'text-anchor="start"' in plot.parts[-1]
    assert plot.label_point("name", 0.5, 0.5, "two")
    assert 'text-anchor="middle"' in plot.parts[-1]
    for y in range(21):
        plot.keep_off((0, 1), (y / 20, y / 20))
    assert not plot.label_point("name", 0.5, 0.5, "three")
    assert plot.parts[-1].count("two") == 1, "nothing was written"


def test_ticks_are_round_and_few():
    """0.6 over at most 7 steps is 0.1 each; 1000 is written without a comma."""
    assert [text for _, text in ticks(0.21, 0.81)] == ["0.3", "0.4", "0.5", "0.6", "0.7", "0.8"]
    assert [text for _, text in ticks(990, 1310)] == ["1000", "1050", "1100", "1150", "1200", "1250", "1300"]
    assert [text for _, text in ticks(-0.3, 0.3, 4)] == ["−0.2", "0.0", "0.2"]


@pytest.mark.parametrize(("name", "most"), [("soup", 6), ("LLMdoctor, strength 3", 3)])
def test_texts_of_an_axis_do_not_run_into_each_other(name, most):
    """Letters are about 7.8 pixels wide; a long name leaves the axis little room, so it has fewer marks."""
    bar = Bar(look("dpo"), Interval(0.29, 0.17, 0.38), "0.292 (0.170 to 0.380)")
    drawn = str(intervals([(name, [bar])], "", ""))
    marks = [(float(x), text) for x, text in re.findall(r'class="tick" x="([\d.]+)"[^>]*>([\d.]+)<', drawn)]
    assert 2 <= len(marks) <= most
    for (left, before), (right, after) in itertools.pairwise(marks):
        assert right - left > 7.8 * (len(before) + len(after)) / 2


def test_a_root_axis_of_negative_estimates_ends_at_zero():
    """Estimates of a small KL from few answers may all be below 0, whose root is not asked for."""
    spots = [Spot(-0.2, 0.5, "", (-0.3, -0.1)), Spot(-0.1, 0.6, "")]
    drawn = str(frontier([Series(look("dpo"), spots)], "KL", "", root=True))
    assert re.findall(r'class="tick" x="[\d.]+"[^>]*>([^<]*)<', drawn)[-1] == "0"


def test_the_root_axis_spaces_by_square_roots():
    """0, 1, 4, 9 are equally far apart: 360 pixels over three steps are 120 each."""
    plot = Plot(200, (0, 9), (0, 1), "", root=True)
    assert [plot.x(value) for value in (0, 1, 4, 9)] == [46, 166, 286, 406]
