"""The paper's table 1 in shape: LLMdoctor against every method, at each one's best and at equal KL."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TypedDict

from llmdoctor.bench.arena import Arena
from llmdoctor.bench.chosen import Chosen, Contest, mixed_at_kl
from llmdoctor.bench.methods import CONTENDERS, DOCTOR, FORMS, PATIENT, Contender
from llmdoctor.bench.options import Task
from llmdoctor.bench.points import Answers, Figures, distinct_4, perplexity
from llmdoctor.errors import UserError
from llmdoctor.evaluation.embedders import Embedder
from llmdoctor.evaluation.ranking import bradley_terry

MOST_PERPLEXITY, LEAST_DISTINCT = 1.5, 0.95
"""Best means the highest score among settings that keep the text: perplexity and distinct-4 within these multiples of
the patient's. Without such a gate the largest β always scores best, whatever it does to the text."""


class Result(TypedDict):
    """How one method did against another, over the prompts that both answered; `evaluation.arena.Matchup` explains."""

    win: int
    tie: int
    loss: int
    win_plus_half_tie: float
    ci_low: float
    ci_high: float
    sign_test_p: float
    prompts_needed: int | None
    prompts: int


class Row(Result):
    """One row of `table.json`: LLMdoctor's result against the method.

    Where `keeps_text` is false no setting of the method keeps the text, and its gentlest stands in; where
    `doctor_keeps_text` is, LLMdoctor's answers do not. `by_seed` is win + ½ tie of each seed by itself: the intervals
    are over prompts, with the models that were trained. At equal KL, which is each seed's by itself, LLMdoctor's
    figures are expectations over the lot that mixes two of its settings, but for `doctor_distinct_4`.
    """

    task: str
    method: str
    at: str
    score: float
    distinct_4: float
    kl: float
    tokens_per_second: float
    seeds: int
    settings: list[dict[str, float]]
    doctor_settings: list[dict[str, float]]
    doctor_score: float
    doctor_kl: float
    doctor_distinct_4: float
    clamped: bool
    keeps_text: bool
    doctor_keeps_text: bool
    by_seed: list[float]


class Match(Result):
    """One row of `pairs.json`: the first method's result against the second.

    `at` is `best` for each at its best, or `equal_kl`: then the first is one of LLMdoctor's other forms at the KL that
    the second spends at its best (`clamped` where it does not reach that far). `by_seed` is as a `Row`'s.
    """

    task: str
    first: str
    second: str
    at: str
    by_seed: list[float]
    clamped: bool


class Elo(TypedDict):
    """One row of `elo.json`."""

    task: str
    method: str
    elo: float
    low: float
    high: float


def make_table(arena: Arena, names: Sequence[str] = (), everything: bool = False) -> list[Row]:
    """Decode what is missing, write `table.json`, `pairs.json` and `elo.json`; returns the table's rows.

    Args:
        arena: where.
        names: methods; all but those `aside` if empty. LLMdoctor and the patient always take part.
        everything: those `aside`, too, as also where only what is there counts.
    """
    rows: list[Row] = []
    pairs: list[Match] = []
    ratings: list[Elo] = []
    for task, contenders in _part_taking(arena, names, everything):
        chosen = [contender.name for contender in contenders]
        arena.announce_scores(task, contenders, _most_questions(arena, chosen))
        best = {contender.name: best_point(arena, task, contender) for contender in contenders}
        matches: list[tuple[str, str, Chosen, Chosen]] = []
        for name in chosen:
            if name == DOCTOR:
                continue
            # A method that answers few prompts, or has few seeds so far, is compared on those.
            method, doctor = _shared(best[name], best[DOCTOR])
            matches.append((name, "best", method, doctor))
            if name != PATIENT:
                matches.append((name, "equal_kl", method, at_kl(arena, task, method)))
        arena.announce(task, [(texts, method.texts) for *_, method, doctor in matches for texts in doctor.versions])
        rows.extend(_row(arena, task, name, at, method, doctor) for name, at, method, doctor in matches)
        outcomes = _all_outcomes(arena, task, best)
        pairs.extend(_match(task, *names, Contest(of_prompts)) for names, of_prompts in outcomes.items())
        pairs.extend(_forms_at_equal_kl(arena, task, best))
        ratings.extend(_ratings(task, outcomes))
    arena.write("table.json", rows)
    arena.write("pairs.json", pairs)
    arena.write("elo.json", ratings)
    return rows


def make_frontier(
    arena: Arena, names: Sequence[str] = (), everything: bool = False, embedder: Embedder | None = None
) -> list[Figures]:
    """Decode what is missing, write `frontier.json`, one row a task, method and setting; returns the rows.

    `names` and `everything` are as `make_table`'s.
    """
    part_taking = _part_taking(arena, names, everything)
    for task, contenders in part_taking:
        arena.announce_scores(task, contenders)
    points = [point for task, contenders in part_taking for one in contenders for point in arena.points(task, one)]
    rows = [point.figures(embedder) for point in points]
    arena.write("frontier.json", rows)
    return rows


def _part_taking(arena: Arena, names: Sequence[str], everything: bool) -> list[tuple[Task, list[Contender]]]:
    """Decode what is missing; each task with the methods asked for that take part in it."""
    everything = everything or arena.so_far
    chosen = [
        contender
        for name, contender in CONTENDERS.items()
        if name in {*names, DOCTOR, PATIENT} or (not names and (everything or not contender.aside))
    ]
    arena.decode(chosen)
    found = [(task, arena.part_taking(task, chosen)) for task in arena.tasks]
    for task, contenders in found:
        if CONTENDERS[DOCTOR] not in contenders:
            raise UserError(
                f"{task.name}: LLMdoctor and the patient have not answered at all their settings with any seed yet; "
                "run without --so-far first"
            )
    return found


def best_point(arena: Arena, task: Task, contender: Contender) -> Chosen:
    """The method at its best setting that keeps the text, chosen for each half of the prompts on the other half.

    Whether a setting keeps the text is asked of all prompts, since distinct n-grams are fewer in more text; where none
    does, the one with the least KL stands in.
    """
    points = arena.points(task, contender)
    prompts = list(points[0].answers)
    patient = arena.patient(task).only(prompts, points[0].seeds).answers
    sound = [point for point in points if keeps_text(point.answers, patient)]
    allowed = sound or [min(points, key=lambda point: point.kl)]
    halves = (prompts[::2], prompts[1::2])
    if len(allowed) == 1 or not all(halves):
        return Chosen(allowed[:1], keeps_text=bool(sound))
    parts = [
        max(allowed, key=lambda point: point.only(other).score).only(half) for half, other in (halves, halves[::-1])
    ]
    return Chosen(parts, keeps_text=bool(sound))


def keeps_text(answers: Answers, patient: Answers) -> bool:
    """Whether perplexity and distinct-4 stay within their multiples of the patient's, on the same prompts and seeds."""
    return perplexity(answers) <= MOST_PERPLEXITY * perplexity(patient) and distinct_4(
        answers
    ) >= LEAST_DISTINCT * distinct_4(patient)


def at_kl(arena: Arena, task: Task, opponent: Chosen, form: str = DOCTOR) -> Chosen:
    """LLMdoctor, or another form of it, at the KL that the opponent spends on the same prompts."""
    patient = arena.patient(task)
    doctor = mixed_at_kl([patient, *arena.points(task, CONTENDERS[form])], opponent)
    doctor.keeps_text = keeps_text(doctor.answers, patient.only(list(doctor.answers), doctor.seeds).answers)
    return doctor


def _row(arena: Arena, task: Task, name: str, at: str, method: Chosen, doctor: Chosen) -> Row:
    contest = doctor.against(arena, task, method)
    flat = [answer for point in method.points for row in point.answers.values() for answer in row]
    return {
        "task": task.name,
        "method": name,
        "at": at,
        **_result(contest),
        "score": method.score,
        "distinct_4": method.distinct_4,
        "kl": method.kl,
        "tokens_per_second": sum(answer.tokens for answer in flat) / sum(point.seconds for point in method.points),
        "seeds": method.seeds,
        "settings": method.settings,
        "doctor_settings": doctor.settings,
        "doctor_score": doctor.score,
        "doctor_kl": doctor.kl,
        "doctor_distinct_4": doctor.distinct_4,
        "clamped": doctor.clamped,
        "keeps_text": method.keeps_text,
        "doctor_keeps_text": doctor.keeps_text,
        "by_seed": contest.by_seed,
    }


def _most_questions(arena: Arena, names: Sequence[str]) -> int:
    """Most questions behind the rows; those of the patient's are asked for the scores."""
    prompts = sum(len(arena.cells.prompts_of(CONTENDERS[name])) for name in names if name not in (DOCTOR, PATIENT))
    # Both presentation orders: at its best, and at equal KL the answers of two settings.
    return 6 * prompts * arena.options.seeds


Outcomes = Mapping[tuple[str, str], Mapping[str, Sequence[float]]]
"""Of two methods, by prompt: 1 where the first wins, 0 where the second does, else a half."""


def _all_outcomes(arena: Arena, task: Task, best: Mapping[str, Chosen]) -> Outcomes:
    """Each method at its best against each other one, on the prompts that both answer."""
    outcomes = {}
    for one, other in itertools.combinations(best, 2):
        # Where every match costs money, those that were asked for the scores and rows link all methods.
        if arena.judge(task).only_compares and not {one, other} & {PATIENT, DOCTOR}:
            continue
        outcomes[one, other] = arena.outcomes(task, *(chosen.texts for chosen in _shared(best[one], best[other])))
    return outcomes


def _shared(one: Chosen, other: Chosen) -> tuple[Chosen, Chosen]:
    """Both, for the prompts and seeds that both have."""
    prompts = [prompt for prompt in one.texts if prompt in other.texts]
    seeds = min(one.seeds, other.seeds)
    return one.only(prompts, seeds), other.only(prompts, seeds)


def _forms_at_equal_kl(arena: Arena, task: Task, best: Mapping[str, Chosen]) -> list[Match]:
    """LLMdoctor's other forms at the KL of each method that is none of its forms."""
    # Where every match costs money, LLMdoctor itself is all that is asked for at equal KL.
    if arena.judge(task).only_compares:
        return []
    found = []
    for form, second in itertools.product(FORMS, best):
        if form in best and second not in (PATIENT, DOCTOR, *FORMS):
            opponent, _ = _shared(best[second], best[form])
            doctor = at_kl(arena, task, opponent, form)
            contest = doctor.against(arena, task, opponent)
            found.append(_match(task, form, second, contest, at="equal_kl", clamped=doctor.clamped))
    return found


def _match(
    task: Task, first: str, second: str, contest: Contest, at: str = "best", clamped: bool = False
) -> Match:  # fmt: skip
    return {"task": task.name, "first": first, "second": second, "at": at, **_result(contest),
            "by_seed": contest.by_seed, "clamped": clamped}  # fmt: skip


def _result(contest: Contest) -> Result:
    found = contest.matchup()
    return {
        "win": found.win,
        "tie": found.tie,
        "loss": found.loss,
        "win_plus_half_tie": found.win_plus_half_tie,
        "ci_low": found.ci_low,
        "ci_high": found.ci_high,
        "sign_test_p": found.sign_test_p,
        "prompts_needed": found.prompts_needed,
        "prompts": found.prompts,
    }


def _ratings(task: Task, outcomes: Outcomes) -> list[Elo]:
    return [
        {"task": task.name, "method": name, "elo": rating.elo, "low": rating.low, "high": rating.high}
        for name, rating in bradley_terry(outcomes, PATIENT).items()
    ]
