"""Choice of the best setting, equal KL, and the rows of the table and the frontier."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from tests.bench.tools import PROMPTS, SEEDS, arena_of, tasks_of

from llmdoctor.bench.arena import Arena
from llmdoctor.bench.cells import Answer
from llmdoctor.bench.chosen import Chosen
from llmdoctor.bench.methods import CONTENDERS, DOCTOR, FORMS, PATIENT, Contender, Setting
from llmdoctor.bench.options import Shard, Task
from llmdoctor.bench.points import Figures, Point
from llmdoctor.bench.table import Elo, Match, Row, _all_outcomes, at_kl, best_point, make_frontier, make_table
from llmdoctor.errors import UserError
from llmdoctor.evaluation.diversity import self_bleu
from llmdoctor.evaluation.metrics import distinct_n

TASK = Task("a", "", "positive", "vader")
DOCUMENTED = {
    "task", "method", "at", "win", "tie", "loss", "win_plus_half_tie", "ci_low", "ci_high", "score", "distinct_4",
    "kl", "tokens_per_second", "prompts", "seeds",
}  # fmt: skip


def nothing(*_: Any) -> Any:
    raise AssertionError("a hand-made method is never built")


def answer(prompt: str, text: str = "one two three four", **options: Any) -> Answer:
    fields = {"tokens": 4, "finish": "stop", "kl": 0.0, "patient_logp": -4.0, "patient_forwards": 4}
    return Answer(prompt=prompt, sample=0, text=text, **{**fields, "guide_forwards": 0, **options})


def point(setting: Setting, scores: Sequence[float], *, texts: Sequence[str] = (), **options: Any) -> Point:
    """A point with one seed: prompts p0, p1, … with these scores; by default every text is another one."""
    prompts = [f"p{place}" for place in range(len(scores))]
    words = texts or [f"w{place} x{place} y{place} z{place}" for place in range(len(scores))]
    answers = {p: [answer(p, text, **options)] for p, text in zip(prompts, words, strict=True)}
    method = Contender("some", "some", "", (), nothing)
    return Point("a", method, setting, answers, {p: [s] for p, s in zip(prompts, scores, strict=True)}, 1.0)


class Given:
    """As much of an arena as the choice looks at: points made by hand, LLMdoctor's for every method."""

    def __init__(self, points: list[Point], patient: Point) -> None:
        self._points, self._patient = points, patient

    def points(self, task: Task, contender: Contender) -> list[Point]:
        return self._points

    def patient(self, task: Task) -> Point:
        return self._patient


def best(points: list[Point], patient: Point) -> Chosen:
    return best_point(Given(points, patient), TASK, CONTENDERS[DOCTOR])  # type: ignore[arg-type]


def test_each_half_is_answered_at_the_setting_that_won_on_the_other() -> None:
    """Even prompts (p0, p2) like setting 1, odd ones (p1, p3) setting 2: even ones get 2's answers, odd ones 1's.

    Chosen on all prompts, the score would be 1 · ½ + 0 · ½ at best by either setting; chosen and measured on the same
    half it would be 1. Cross-fitted it is 0: nothing chosen by luck counts.
    """
    one = point({"beta": 1.0}, [1, 0, 1, 0])
    two = point({"beta": 2.0}, [0, 1, 0, 1])
    chosen = best([one, two], point({}, [0, 0, 0, 0]))
    assert chosen.scores == {"p0": [0], "p2": [0], "p1": [0], "p3": [0]}
    assert chosen.score == 0
    assert chosen.settings == [{"beta": 2.0}, {"beta": 1.0}]


def test_a_setting_that_is_better_everywhere_is_chosen_for_all() -> None:
    one, two = point({"beta": 1.0}, [0, 0, 1, 0]), point({"beta": 2.0}, [1, 1, 1, 1])
    chosen = best([one, two], point({}, [0, 0, 0, 0]))
    assert chosen.settings == [{"beta": 2.0}]
    assert chosen.score == 1
    assert set(chosen.texts) == {"p0", "p1", "p2", "p3"}


@pytest.mark.parametrize(
    ("logp", "allowed"),
    [(-4.0 * (1 + math.log(1.49)), True), (-4.0 * (1 + math.log(1.51)), False), (-1.0, True)],
)
def test_perplexity_may_be_one_and_a_half_times_the_patients(logp: float, allowed: bool) -> None:
    """The patient's is e: −4 nats over 4 tokens. 1.49 e is allowed, 1.51 e is not, and less is always."""
    gentle, strong = point({"beta": 1.0}, [0, 0, 0, 0]), point({"beta": 2.0}, [1, 1, 1, 1], patient_logp=logp)
    chosen = best([gentle, strong], point({}, [0, 0, 0, 0]))
    assert chosen.settings == [{"beta": 2.0 if allowed else 1.0}]


def test_distinct_4_must_keep_95_percent_of_the_patients() -> None:
    """Four prompts, one 4-gram each: the patient has 4 distinct of 4; a method that repeats itself 1 of 4."""
    same = ["a b c d"] * 4
    gentle, strong = point({"beta": 1.0}, [0, 0, 0, 0]), point({"beta": 2.0}, [1, 1, 1, 1], texts=same)
    assert best([gentle, strong], point({}, [0, 0, 0, 0])).settings == [{"beta": 1.0}]
    # Measured against a patient that repeats itself as well, it is no worse.
    assert best([gentle, strong], point({}, [0, 0, 0, 0], texts=same)).settings == [{"beta": 2.0}]


def test_where_no_setting_keeps_the_text_the_gentlest_is_best() -> None:
    points = [point({"beta": beta}, [beta] * 4, patient_logp=-40.0) for beta in (1.0, 2.0, 3.0)]
    chosen = best(points, point({}, [0, 0, 0, 0]))
    assert chosen.settings == [{"beta": 1.0}]
    assert not chosen.keeps_text
    assert not best(points[:1], point({}, [0, 0, 0, 0])).keeps_text
    assert best([point({"beta": 0.5}, [0] * 4), *points], point({}, [0, 0, 0, 0])).keeps_text


def test_where_none_keeps_the_text_the_one_with_the_least_kl_stands_in() -> None:
    """A knob may go the other way round: α below 1 steers harder."""
    points = [point({"alpha": alpha}, [0] * 4, kl=kl, patient_logp=-40.0) for alpha, kl in ((0.75, 9.0), (1.25, 3.0))]
    assert best(points, point({}, [0, 0, 0, 0])).settings == [{"alpha": 1.25}]


def test_the_gate_is_for_all_prompts_together() -> None:
    """Each half of these is as distinct as the patient's, all of them are not: the same four texts in both halves."""
    twice = ["a b c d", "a b c d", "e f g h", "e f g h"]
    gentle, strong = point({"beta": 1.0}, [0, 0, 0, 0]), point({"beta": 2.0}, [1, 1, 1, 1], texts=twice)
    assert best([gentle, strong], point({}, [0, 0, 0, 0])).settings == [{"beta": 1.0}]
    alone = best([strong], point({}, [0, 0, 0, 0]))
    assert (alone.settings, alone.keeps_text) == ([{"beta": 2.0}], False)


def test_the_doctor_at_equal_kl_has_to_keep_the_text_as_well() -> None:
    """Its mixture of a sound setting and one that says the same to everybody."""
    count = 8
    sound = point({"beta": 1.0}, [0] * count, kl=1.0)
    same = point({"beta": 2.0}, [1] * count, kl=3.0, texts=["a b c d"] * count)
    given = Given([sound, same], point({}, [0] * count))
    gentle, hard = (at_kl(given, TASK, opponent(kl)) for kl in (1.0, 2.0))  # type: ignore[arg-type]
    assert (gentle.keeps_text, gentle.distinct_4) == (True, 1.0)
    assert (hard.keeps_text, hard.distinct_4) == (False, 5 / 8)


def test_a_single_setting_is_taken_for_all_prompts() -> None:
    chosen = best([point({"n": 2.0}, [1, 2, 3])], point({}, [0, 0, 0]))
    assert (chosen.settings, chosen.score) == ([{"n": 2.0}], 2)


def test_diversity_of_a_choice_is_of_all_its_prompts() -> None:
    """Both halves have distinct 4-grams of their own, 1.0 each; together 4 of 8 repeat: half are distinct."""
    texts = ["a b c d", "a b c d", "e f g h", "e f g h"]
    only = point({"beta": 1.0}, [0, 0, 0, 0], texts=texts)
    halves = Chosen([only.only(["p0", "p2"]), only.only(["p1", "p3"])])
    assert [part.distinct_4 for part in halves.points] == [1.0, 1.0]
    assert halves.distinct_4 == 0.5


def test_part_of_a_choice() -> None:
    part = Chosen([point({"beta": 1.0}, [1, 2, 3])]).only(["p0", "p2"])
    assert (part.score, set(part.texts), part.settings) == (2, {"p0", "p2"}, [{"beta": 1.0}])


def opponent(kl: float, prompts: int = 8) -> Chosen:
    return Chosen([point({}, [0.0] * prompts, kl=kl)])


def test_llmdoctor_is_mixed_to_the_opponents_kl() -> None:
    """Points at 2 and 6 nats and a target of 3: one prompt in four is answered at 6, so the mean is 3."""
    low, high = point({"beta": 1.0}, [1] * 8, kl=2.0), point({"beta": 2.0}, [5] * 8, kl=6.0)
    arena = Given([low, high], point({}, [0] * 8, kl=0.0))
    chosen = at_kl(arena, TASK, opponent(3.0))  # type: ignore[arg-type]
    assert chosen.kl == pytest.approx(3.0)
    assert chosen.score == pytest.approx(0.75 * 1 + 0.25 * 5)
    assert (chosen.settings, chosen.clamped) == ([{"beta": 1.0}, {"beta": 2.0}], False)
    assert set(chosen.texts) == {f"p{place}" for place in range(8)}


def test_below_its_gentlest_setting_llmdoctor_is_mixed_with_the_patient() -> None:
    """At 1 nat half of the answers are the patient's own (β = 0) and half those of β = 1."""
    arena = Given([point({"beta": 1.0}, [1] * 8, kl=2.0)], point({}, [0] * 8, kl=0.0))
    chosen = at_kl(arena, TASK, opponent(1.0))  # type: ignore[arg-type]
    assert (chosen.kl, chosen.score, chosen.clamped) == (1.0, 0.5, False)
    assert chosen.settings == [{}, {"beta": 1.0}]


def of_seeds(*points: Point) -> Point:
    """Points of one seed each, as one."""
    answers = {prompt: [point.answers[prompt][0] for point in points] for prompt in points[0].answers}
    scores = {prompt: [point.scores[prompt][0] for point in points] for prompt in points[0].scores}
    return replace(points[0], answers=answers, scores=scores)


class Judged(Given):
    """The longer text wins."""

    def outcomes(self, task: Task, first: Any, second: Any) -> dict[str, list[float]]:
        gaps = {prompt: zip(map(len, row), map(len, second[prompt]), strict=True) for prompt, row in first.items()}
        return {prompt: [(1 + (one > two) - (one < two)) / 2 for one, two in row] for prompt, row in gaps.items()}


def test_each_seed_is_mixed_to_the_kl_that_its_opponent_spends() -> None:
    """At 2 and 6 nats with the first seed, 1 and 3 with the second; the opponent spends 3 and 2. So a quarter of the
    first seed's answers and half of the second's are the stronger ones, whatever the means over seeds.

    The milder ones tie, the stronger ones win: 0.5 · ¾ + ¼ = 0.625 and 0.75, and no lot decides.
    """
    low = of_seeds(*(point({"beta": 1.0}, [1] * 8, kl=kl, texts=["a"] * 8) for kl in (2.0, 1.0)))
    high = of_seeds(*(point({"beta": 2.0}, [5] * 8, kl=kl, texts=["aa"] * 8) for kl in (6.0, 3.0)))
    other = Chosen([of_seeds(*(point({}, [0] * 8, kl=kl, texts=["b"] * 8) for kl in (3.0, 2.0)))])
    arena: Any = Judged([low, high], of_seeds(*[point({}, [0] * 8, kl=0.0)] * 2))
    chosen = at_kl(arena, TASK, other)
    assert chosen.kl == pytest.approx(2.5)
    assert chosen.score == pytest.approx((1 + 0.25 * 4 + 1 + 0.5 * 4) / 2)
    drawn = [sum(row[seed] == "aa" for row in chosen.texts.values()) for seed in (0, 1)]
    assert drawn == [2, 4]
    contest = chosen.against(arena, TASK, other)
    assert contest.by_seed == pytest.approx([62.5, 75])
    assert contest.matchup().win_plus_half_tie == pytest.approx(68.75)
    assert (contest.matchup().win, contest.matchup().tie) == (6, 10)


@pytest.mark.parametrize(("kl", "setting"), [(9.0, {"beta": 1.0}), (-1.0, {})])
def test_beyond_what_was_measured_the_nearest_setting_stands_in(kl: float, setting: Setting) -> None:
    arena = Given([point({"beta": 1.0}, [1] * 8, kl=2.0)], point({}, [0] * 8, kl=0.0))
    chosen = at_kl(arena, TASK, opponent(kl))  # type: ignore[arg-type]
    assert (chosen.clamped, chosen.settings) == (True, [dict(setting)])


def test_figures_of_a_point_by_hand() -> None:
    """Two prompts, two seeds, 4 tokens each at −1 nat: perplexity e; 16 tokens in 2 s; 3 guide positions of 4."""
    texts = {"p0": ["a b c d", "e f g h"], "p1": ["a b c d", "i j k l"]}
    answers = {p: [answer(p, text, guide_forwards=3, kl=2.0) for text in row] for p, row in texts.items()}
    made = Point("a", CONTENDERS["dpo"], {"beta": 1.0}, answers, {"p0": [1.0, 2.0], "p1": [3.0, 6.0]}, 2.0)
    found = made.figures()
    assert set(found) == set(get_type_hints(Figures))
    assert (found["score"], found["kl"], found["kl_low"], found["kl_high"]) == (3.0, 2.0, 2.0, 2.0)
    assert (found["score_low"], found["score_high"]) == (1.5, 4.5)
    # Seed 0 says one 4-gram twice, seed 1 two different ones.
    assert found["distinct_4"] == pytest.approx((0.5 + 1.0) / 2)
    assert found["perplexity"] == pytest.approx(math.e)
    assert (found["tokens_per_second"], found["guide_forwards_per_token"]) == (8.0, 0.75)
    assert (found["prompts"], found["seeds"]) == (2, 2)
    assert found["self_bleu_within"] == pytest.approx(sum(map(self_bleu, texts.values())) / 2)
    assert found["pairwise_distance"] is None
    # The two answers to a prompt lie at a right angle.
    angled = made.figures(lambda given: [[float(text[0] == "a"), float(text[0] != "a")] for text in given])
    assert angled["pairwise_distance"] == pytest.approx(1.0)
    part = made.only(["p1"])
    assert (part.score, part.seconds, part.seeds) == (4.5, 1.0, 2)


@pytest.fixture(scope="module")
def rows(compared: Arena) -> list[Row]:
    found: list[Row] = json.loads((compared.output / "table.json").read_text())
    return found


def test_rows_have_the_documented_fields(rows: list[Row]) -> None:
    assert set(get_type_hints(Row)) >= DOCUMENTED
    assert all(set(row) == set(get_type_hints(Row)) for row in rows)


def test_every_method_has_its_rows_and_llmdoctor_never_meets_itself(rows: list[Row]) -> None:
    names = [name for name in CONTENDERS if name != DOCTOR]
    assert [(row["method"], row["at"]) for row in rows] == [
        (name, at) for name in names for at in ("best", "equal_kl") if (name, at) != (PATIENT, "equal_kl")
    ]


def test_what_stands_aside_takes_part_where_it_is_asked_for(
    compared: Arena, tiny_folder: Path, bench_sources: Path, tmp_path: Path
) -> None:
    """Its answers are there; without being asked for, it has no rows all the same."""
    aside = {name for name, contender in CONTENDERS.items() if contender.aside}
    assert aside == {*FORMS, "llmdoctor_alpha", "dpo_best", "readout_best"} - {"llmdoctor_product"}
    output = shutil.copytree(compared.output, tmp_path / "out")
    arena, told = arena_of(tiny_folder, bench_sources, output)
    assert {row["method"] for row in make_table(arena)} == set(CONTENDERS) - aside - {DOCTOR}
    assert {row["method"] for row in make_frontier(arena)} == set(CONTENDERS) - aside
    assert {row["method"] for row in make_table(arena, ["llmdoctor_alpha"])} == {"llmdoctor_alpha", PATIENT}
    assert not told.started


def test_counts_and_shares_agree(rows: list[Row]) -> None:
    for row in rows:
        count = row["win"] + row["tie"] + row["loss"]
        assert count == row["prompts"] * row["seeds"]
        assert row["seeds"] == SEEDS
        assert row["prompts"] == (4 if row["method"] == "transfer_q" else PROMPTS)
        assert row["win_plus_half_tie"] == pytest.approx(100 * (row["win"] + row["tie"] / 2) / count)
        assert row["ci_low"] <= row["win_plus_half_tie"] <= row["ci_high"]
        assert row["tokens_per_second"] > 0
        assert 0 <= row["distinct_4"] <= 1
        assert 0 <= row["doctor_distinct_4"] <= 1


def test_at_equal_kl_llmdoctor_spends_what_the_other_does(rows: list[Row], compared: Arena) -> None:
    """Whatever the lot, unless it is clamped."""
    task = compared.tasks[0]
    for row in rows:
        if row["at"] == "equal_kl" and not row["clamped"]:
            assert row["doctor_kl"] == pytest.approx(row["kl"])
        if row["at"] == "best":
            assert not row["clamped"]
    # Whether any opponent spends what lies between LLMdoctor's settings is luck at this size; its own middle one does.
    points = sorted(compared.points(task, CONTENDERS[DOCTOR]), key=lambda point: point.kl)
    middle = Chosen([points[len(points) // 2]])
    chosen = at_kl(compared, task, middle)
    assert not chosen.clamped
    assert chosen.kl == pytest.approx(middle.kl)


def test_rows_say_what_the_cells_say(rows: list[Row], compared: Arena) -> None:
    """Greedy has one setting: its row is made anew from its answers and the judge, and the best LLMdoctor's."""
    task = compared.tasks[0]
    scorer = compared.judge(task)
    (row,) = [row for row in rows if row["method"] == "greedy" and row["at"] == "best"]
    doctor = best_point(compared, task, CONTENDERS[DOCTOR])
    signs, scores, kls, texts = [], [], [], []
    for seed in range(SEEDS):
        cell = compared.cells.get(task, CONTENDERS["greedy"], {}, seed)
        texts.append([answer.text for answer in cell.answers])
        for prompt, one in zip(compared.prompts, cell.answers, strict=True):
            score = scorer.scores([prompt.messages], [one.text], [""])[0]
            ours = scorer.scores([prompt.messages], [doctor.texts[prompt.id][seed]], [""])[0]
            scores.append(score)
            kls.append(one.kl)
            signs.append((ours > score) - (ours < score))
    assert (row["win"], row["tie"], row["loss"]) == (signs.count(1), signs.count(0), signs.count(-1))
    by_seed = [signs[start : start + len(compared.prompts)] for start in range(0, len(signs), len(compared.prompts))]
    assert row["by_seed"] == pytest.approx([50 + 50 * sum(seed) / len(seed) for seed in by_seed])
    assert row["score"] == pytest.approx(sum(scores) / len(scores))
    assert row["kl"] == pytest.approx(sum(kls) / len(kls))
    assert row["distinct_4"] == pytest.approx(sum(distinct_n(seed, 4) for seed in texts) / SEEDS)


def test_a_method_of_few_prompts_is_compared_on_those(rows: list[Row], compared: Arena) -> None:
    (row,) = [row for row in rows if row["method"] == "transfer_q" and row["at"] == "best"]
    doctor = best_point(compared, compared.tasks[0], CONTENDERS[DOCTOR])
    scores = [score for prompt in compared.prompts[:4] for score in doctor.scores[prompt.id]]
    assert row["doctor_score"] == pytest.approx(sum(scores) / len(scores))


def test_the_frontier_has_every_setting(compared: Arena) -> None:
    found = json.loads((compared.output / "frontier.json").read_text())
    assert [(row["method"], row["setting"]) for row in found] == [
        (name, dict(setting)) for name, contender in CONTENDERS.items() for setting in contender.settings
    ]
    assert all(set(row) == set(get_type_hints(Figures)) for row in found)
    by_method = {row["method"]: row for row in found}
    assert by_method[PATIENT]["kl"] == pytest.approx(0, abs=1e-4)
    # One prompt beside another: seed 0's answers.
    task = compared.tasks[0]
    texts = [[a.text for a in compared.cells.get(task, CONTENDERS["top_p"], {}, s).answers] for s in range(SEEDS)]
    assert by_method["top_p"]["self_bleu"] == pytest.approx(sum(map(self_bleu, texts)) / SEEDS)
    by_setting = {(row["method"], *row["setting"].values()): row for row in found}
    assert by_setting["best_of_n", 8.0]["kl"] == pytest.approx(math.log(8) - 7 / 8)
    for row in found:
        assert row["score_low"] <= row["score"] <= row["score_high"]
        assert row["perplexity"] >= 1


def test_ratings_hold_the_patient_still(compared: Arena) -> None:
    found = json.loads((compared.output / "elo.json").read_text())
    assert sorted(row["method"] for row in found) == sorted(CONTENDERS)
    assert all(set(row) == set(get_type_hints(Elo)) for row in found)
    (own,) = [row for row in found if row["method"] == PATIENT]
    assert own["low"] == own["elo"] == own["high"]


def test_each_pair_of_methods_has_its_row(rows: list[Row], compared: Arena) -> None:
    """Of n methods n(n − 1)/2; where LLMdoctor is one of them, what the table says from its side, on all prompts."""
    every = json.loads((compared.output / "pairs.json").read_text())
    found = [row for row in every if row["at"] == "best"]
    assert [(row["first"], row["second"]) for row in found] == list(itertools.combinations(CONTENDERS, 2))
    assert all(set(row) == set(get_type_hints(Match)) for row in found)
    best = {row["method"]: row for row in rows if row["at"] == "best"}
    for row in found:
        assert row["ci_low"] <= row["win_plus_half_tie"] <= row["ci_high"]
        if row["first"] == DOCTOR:
            same = ("win", "tie", "loss", "win_plus_half_tie", "ci_low", "ci_high", "prompts")
            assert [row[key] for key in same] == [best[row["second"]][key] for key in same]  # type: ignore[literal-required]


def mean_kl(answers: Any, seed: int) -> float:
    return statistics.fmean(row[seed].kl for row in answers.values())


def test_other_forms_of_llmdoctor_meet_the_methods_at_their_kl(rows: list[Row], compared: Arena) -> None:
    every = json.loads((compared.output / "pairs.json").read_text())
    found = {(row["first"], row["second"]): row for row in every if row["at"] == "equal_kl"}
    others = [name for name in CONTENDERS if name not in (DOCTOR, PATIENT, *FORMS)]
    assert list(found) == list(itertools.product(FORMS, others))
    task = compared.tasks[0]
    dpo = best_point(compared, task, CONTENDERS["dpo"])
    for form in FORMS:
        row = found[form, "dpo"]
        doctor = at_kl(compared, task, dpo, form)
        assert set(map(tuple, map(dict.items, doctor.settings))) <= {
            tuple(dict(setting).items()) for setting in (*CONTENDERS[form].settings, {})
        }
        points = [compared.patient(task), *compared.points(task, CONTENDERS[form])]
        reached = [[mean_kl(point.answers, seed) for point in points] for seed in range(SEEDS)]
        asked = [mean_kl(dpo.answers, seed) for seed in range(SEEDS)]
        # An estimate may be below 0, which is less than the patient itself spends.
        inside = [min(kls) <= kl <= max(kls) for kls, kl in zip(reached, asked, strict=True)]
        assert row["clamped"] != all(inside)
        assert row["win_plus_half_tie"] == pytest.approx(sum(row["by_seed"]) / SEEDS)
        outcomes = compared.outcomes(task, doctor.texts, dpo.texts)
        assert row["win_plus_half_tie"] == pytest.approx(
            100 * sum(map(sum, outcomes.values())) / (SEEDS * len(outcomes))
        )


def test_a_judge_that_costs_money_is_asked_no_more_than_links_all(
    compared: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = compared.tasks[0]
    best = {name: best_point(compared, task, CONTENDERS[name]) for name in (DOCTOR, PATIENT, "greedy", "dpo", "top_p")}
    assert len(_all_outcomes(compared, task, best)) == 5 * 4 / 2
    monkeypatch.setattr(type(compared.judge(task)), "only_compares", True)
    assert len(_all_outcomes(compared, task, best)) == 5 * 4 / 2 - 3 * 2 / 2


def test_some_methods_only(tiny_folder: Path, bench_sources: Path, tmp_path: Path) -> None:
    """LLMdoctor and the patient always take part; greedy is decoded for both tasks at once."""
    arena, told = arena_of(tiny_folder, bench_sources, tmp_path / "out", tasks=tasks_of(bench_sources), seeds=1)
    rows = make_table(arena, ["greedy"])
    assert [(row["task"], row["method"], row["at"]) for row in rows] == [
        (task, *rest) for task in "ab" for rest in ((PATIENT, "best"), ("greedy", "best"), ("greedy", "equal_kl"))
    ]
    assert [step for step in told.started if "greedy" in step] == ["seed 0: greedy"]


@pytest.fixture
def unfinished(compared: Arena, tmp_path: Path) -> Path:
    """The comparison's folder with one setting of GenARM's second seed and of CARDS's first not yet there."""
    folder = Path(shutil.copytree(compared.output, tmp_path / "out"))
    for name in ("genarm/beta=1-seed1", "cards/temperature=0.7-seed0"):
        (folder / "raw" / "a" / f"{name}.jsonl.gz").unlink()
    return folder


def test_results_so_far(
    rows: list[Row], unfinished: Path, compared: Arena, tiny_folder: Path, bench_sources: Path
) -> None:
    """Nothing is decoded; who has one seed of two meets the others on that one, who has none is left out."""
    arena, told = arena_of(tiny_folder, bench_sources, unfinished, so_far=True)
    found = make_table(arena)
    frontier = make_frontier(arena)
    assert not told.started
    assert any("left out" in line and line.endswith(": cards") for line in told.said)

    def others(rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if row["method"] not in ("genarm", "cards")]

    assert others(found) == others(rows)
    genarm = [row for row in found if row["method"] == "genarm"]
    assert [(row["at"], row["seeds"], row["prompts"]) for row in genarm] == [
        ("best", 1, PROMPTS),
        ("equal_kl", 1, PROMPTS),
    ]
    alone, _ = arena_of(tiny_folder, bench_sources, unfinished, seeds=1)
    doctor, method = (
        best_point(one, one.tasks[0], CONTENDERS[name]) for one, name in ((arena, DOCTOR), (alone, "genarm"))
    )
    outcomes = alone.outcomes(arena.tasks[0], doctor.only(doctor.texts, 1).texts, method.texts)
    assert genarm[0]["win_plus_half_tie"] == pytest.approx(100 * sum(map(sum, outcomes.values())) / PROMPTS)
    assert genarm[0]["score"] == method.score
    assert {row["seeds"] for row in frontier if row["method"] == "genarm"} == {1}
    matches = json.loads((unfinished / "pairs.json").read_text())
    assert not [row for row in matches if "cards" in (row["first"], row["second"])]


def test_so_far_needs_llmdoctors_own_answers(unfinished: Path, tiny_folder: Path, bench_sources: Path) -> None:
    for path in (unfinished / "raw" / "a" / DOCTOR).glob("*-seed0.jsonl.gz"):
        path.unlink()
    arena, told = arena_of(tiny_folder, bench_sources, unfinished, so_far=True)
    with pytest.raises(UserError, match="a: LLMdoctor and the patient have not answered at all their settings"):
        make_table(arena)
    assert not told.started


def test_so_far_makes_no_shard(tiny_folder: Path, bench_sources: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--so-far makes results of what is there, --shard makes answers"):
        arena_of(tiny_folder, bench_sources, tmp_path, so_far=True, shard=Shard(1, 2))


def test_tasks_need_names_of_their_own(tiny_folder: Path, bench_sources: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two tasks share a name: a, a"):
        arena_of(tiny_folder, bench_sources, tmp_path, tasks=tasks_of(bench_sources)[:1] * 2)


def test_the_record_says_what_the_results_are_made_of(compared: Arena) -> None:
    records = json.loads((compared.output / "run.json").read_text())
    assert set(records) == {"table.json", "pairs.json", "elo.json", "frontier.json"}
    record = records["table.json"]
    assert record["quick"] is False
    assert record["note"] == ""
    assert record["options"]["pairs"] == 12
    assert (record["prompts"], record["seeds"]) == (PROMPTS, [0, 1])
    assert record["tasks"][0]["name"] == "a"
    assert {"commit", "prompts_hash", "versions", "machine"} <= set(record)
    assert {"torch", "transformers", "trl", "peft"} <= set(record["versions"])
