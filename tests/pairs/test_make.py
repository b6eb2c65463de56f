"""Pairs without human labels: who is chosen, and that a run can be killed, cut otherwise and repeated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.killing import JobServer
from tests.tiny import FACES

from llmdoctor.data.preferences import load_preferences
from llmdoctor.data.prompts import Prompt
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.request import Completion, Request, SamplingParams
from llmdoctor.errors import FingerprintMismatch, UserError
from llmdoctor.evaluation.scorers import Scorer
from llmdoctor.models.loading import LoadedModel, load_model
from llmdoctor.pairs.make import PairOptions, check_wanted, make_pairs

PROMPTS = [Prompt(f"p{number}", ({"role": "user", "content": f"{number} the cat"},)) for number in range(7)]
OPTIONS = PairOptions(samples=4, max_new_tokens=10, batch_size=8)


def count_e(texts: Sequence[str]) -> list[float]:
    return [float(text.count("e") - text.count("a") + len(text) / 1000) for text in texts]


SCORER = Scorer("e", count_e, "more e than a")


@pytest.fixture(scope="module")
def patient(tiny_folder: Path) -> LoadedModel:
    return load_model(str(tiny_folder), dtype="float32", device="cpu")


def answers_are(monkeypatch: pytest.MonkeyPatch, texts: Sequence[Sequence[Completion]]) -> list[Request]:
    """Let the patient give these answers, prompt by prompt; returns the list that the requests will be in."""
    asked: list[Request] = []
    flat = iter([answer for answers in texts for answer in answers])

    def generate(self: GuidedDecoder, requests: Sequence[Request], **kwargs: Any) -> list[Completion]:
        asked.extend(requests)
        return [next(flat) for _ in requests]

    monkeypatch.setattr(GuidedDecoder, "generate", generate)
    return asked


def answer(text: str, reason: str = "stop") -> Completion:
    return Completion(id="", text=text, finish_reason=reason)


def test_answers_that_differ_in_blanks_only_are_no_pair(
    patient: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads the pairs would refuse it."""
    answers = [[answer("yes e"), answer("yes e\n ")], [answer("eee"), answer("a")]]
    answers_are(monkeypatch, answers)
    recipe = make_pairs(patient, PROMPTS[:2], tmp_path / "p.jsonl", judge=SCORER, options=replace(OPTIONS, samples=2))
    assert recipe["pairs"] == 1
    assert [pair.chosen for pair in load_preferences(str(tmp_path / "p.jsonl"))] == ["eee"]


def test_a_cut_character_is_no_part_of_an_answer(
    patient: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is neither scored nor stored; what a whole answer ends with is its own, and what has nothing else is none."""
    cut = answer("eee\ufffd\ufffd", "length")
    answers_are(monkeypatch, [[cut, answer("a\ufffd")], [answer("\ufffd", "length"), answer("e")]])
    scored: list[str] = []

    def kept(texts: Sequence[str]) -> list[float]:
        scored.extend(texts)
        return count_e(texts)

    judge, two = Scorer("e", kept, "more e than a"), replace(OPTIONS, samples=2)
    recipe = make_pairs(patient, PROMPTS[:2], tmp_path / "p.jsonl", judge=judge, options=two)
    assert scored == ["eee", "a\ufffd"]
    assert recipe["pairs"] == 1
    (made,) = load_preferences(tmp_path / "p.jsonl")
    assert (made.chosen, made.rejected, made.chosen_complete) == ("eee", "a\ufffd", False)


def test_best_and_worst_by_the_scorer(patient: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores 1, 3, −2, 0 (plus a thousandth a character): the second is chosen, the third, which was cut, rejected."""
    answers = [answer("xe"), answer("eee"), answer("aa", "length"), answer("x")]
    asked = answers_are(monkeypatch, [answers])
    recipe = make_pairs(patient, PROMPTS[:1], tmp_path / "p.jsonl", judge=SCORER, options=OPTIONS)
    (made,) = load_preferences(tmp_path / "p.jsonl")
    assert (made.chosen, made.rejected) == ("eee", "aa")
    assert (made.chosen_complete, made.rejected_complete) == (True, False)
    assert made.prompt == PROMPTS[0].messages
    assert (recipe["prompts"], recipe["pairs"]) == (1, 1)
    assert [request.messages for request in asked] == [PROMPTS[0].messages] * 4
    assert len({request.sampling.seed for request in asked}) == 4


def test_real_answers_are_the_patients_own(patient: LoadedModel, tmp_path: Path) -> None:
    """Best and worst of four samples drawn with the seeds that a prompt's place in the list decides."""
    make_pairs(patient, PROMPTS, tmp_path / "p.jsonl", judge=SCORER, options=OPTIONS)
    made = list(load_preferences(tmp_path / "p.jsonl"))
    assert len(made) == 7
    decoder = GuidedDecoder(patient)
    for place, (item, prompt) in enumerate(zip(made, PROMPTS, strict=True)):
        drawn = [
            decoder.generate(
                [Request(prompt.messages, sampling=SamplingParams(max_new_tokens=10, seed=(place << 16) + draw))]
            )[0]
            for draw in range(4)
        ]
        texts = [one.text if one.finish_reason == "stop" else one.text.rstrip("\ufffd") for one in drawn]
        usable = [text for text in texts if text.strip()]
        # Stable: of equal scores the first is the worst and the last the best.
        scored = sorted(usable, key=lambda text: count_e([text])[0])
        assert (item.rejected, item.chosen) == (scored[0], scored[-1])


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([answer("e"), answer("e")], "the same text twice"),
        ([answer("xe"), answer("ex")], "no difference in score"),
        ([answer("e"), answer(" \n")], "one answer is empty"),
        ([answer("e"), answer("a", "error")], "one answer broke"),
        ([answer("e"), answer("xy")], "a gap below min_gap"),
    ],
)
def test_prompts_that_give_no_pair(
    patient: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[Completion], reason: str
) -> None:
    options = replace(OPTIONS, samples=2, min_gap=1.5 if "min_gap" in reason else 0.0)
    answers_are(monkeypatch, [answers, [answer("eee"), answer("aaa")]])
    recipe = make_pairs(patient, PROMPTS[:2], tmp_path / "p.jsonl", judge=SCORER, options=options)
    assert [item.prompt for item in load_preferences(tmp_path / "p.jsonl")] == [PROMPTS[1].messages], reason
    assert (recipe["prompts"], recipe["pairs"]) == (2, 1)
    answers_are(monkeypatch, [answers])
    with pytest.raises(UserError, match=f"no prompt gave two usable answers that differ .min_gap {options.min_gap}"):
        make_pairs(patient, PROMPTS[:1], tmp_path / "none.jsonl", judge=SCORER, options=options)
    assert not (tmp_path / "none.jsonl").exists()


def test_min_gap_keeps_a_gap_of_its_size(patient: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers_are(monkeypatch, [[answer("xyz"), answer("x")]])
    options = replace(OPTIONS, samples=2, min_gap=2.0)
    judge = Scorer("length", lambda texts: [float(len(text)) for text in texts], "longer")
    assert make_pairs(patient, PROMPTS[:1], tmp_path / "p.jsonl", judge=judge, options=options)["pairs"] == 1


def test_faces_answer_each_prompt_once(patient: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The positive face's answer is chosen, whatever it says; a system prompt gives way to the face, and comes back."""
    system = {"role": "system", "content": "You are a cat."}
    prompts = [PROMPTS[0], Prompt("s", (system, *PROMPTS[1].messages)), PROMPTS[2]]  # type: ignore[arg-type]
    texts = [
        [answer("good"), answer("bad", "length")],
        [answer("fine"), answer("poor")],
        [answer("e", "error"), answer("x")],
    ]
    asked = answers_are(monkeypatch, texts)
    recipe = make_pairs(patient, prompts, tmp_path / "p.jsonl", judge=FACES, options=OPTIONS)
    made = list(load_preferences(tmp_path / "p.jsonl"))
    assert [(item.chosen, item.rejected) for item in made] == [("good", "bad"), ("fine", "poor")]
    assert [item.prompt for item in made] == [prompts[0].messages, prompts[1].messages]
    assert [item.rejected_complete for item in made] == [False, True]
    assert [request.messages[0]["content"] for request in asked] == [FACES.positive, FACES.negative] * 3
    assert all([message["role"] for message in request.messages] == ["system", "user"] for request in asked)
    assert recipe["method"] == "faces"
    assert recipe["faces"]["positive"] == FACES.positive


def test_the_recipe(patient: LoadedModel, tmp_path: Path) -> None:
    recipe = make_pairs(patient, PROMPTS, tmp_path / "p.jsonl", judge=SCORER, options=OPTIONS)
    assert json.loads((tmp_path / "p.jsonl.recipe.json").read_text()) == recipe
    assert recipe["method"] == "best_of_k"
    assert recipe["scorer"] == "e"
    assert recipe["patient"] == patient.spec
    assert recipe["options"] == {
        "samples": 4,
        "max_new_tokens": 10,
        "temperature": 1.0,
        "top_p": 1.0,
        "min_gap": 0.0,
        "limit": None,
        "seed": 0,
    }
    assert set(recipe["versions"]) == {"llmdoctor", "torch", "transformers"}
    assert set(recipe["fingerprint"]) == {"patient", "prompts", "judge", "options"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl", "p.jsonl.recipe.json"]


@pytest.mark.parametrize("judge", [SCORER, FACES], ids=["best of k", "faces"])
def test_the_seed_decides_and_the_batch_size_does_not(patient: LoadedModel, tmp_path: Path, judge: Any) -> None:
    def made(name: str, **options: Any) -> bytes:
        path = tmp_path / f"{name}.jsonl"
        make_pairs(patient, PROMPTS, path, judge=judge, options=replace(OPTIONS, **options))
        return path.read_bytes()

    first = made("first")
    assert first == made("again")
    assert first == made("small", batch_size=3)
    assert first == made("large", batch_size=100)
    assert first != made("other", seed=1)


def test_a_limit_takes_the_first_pairs(patient: LoadedModel, tmp_path: Path) -> None:
    make_pairs(patient, PROMPTS, tmp_path / "all.jsonl", judge=SCORER, options=OPTIONS)
    options = replace(OPTIONS, limit=3)
    recipe = make_pairs(patient, PROMPTS, tmp_path / "some.jsonl", judge=SCORER, options=options)
    assert recipe["pairs"] == 3
    assert list(load_preferences(tmp_path / "some.jsonl")) == list(load_preferences(tmp_path / "all.jsonl"))[:3]


def interrupted(patient: LoadedModel, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends after its first two blocks of two prompts."""
    real, calls = GuidedDecoder.generate, iter(range(2))

    def generate(self: GuidedDecoder, requests: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(self, requests, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(GuidedDecoder, "generate", generate)
        with pytest.raises(KeyboardInterrupt):
            make_pairs(patient, PROMPTS, target, judge=SCORER, options=OPTIONS)


@pytest.mark.parametrize("batch_size", [8, 4, 12])
def test_an_interrupted_run_goes_on(
    patient: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """Also with another batch size, whose blocks are cut elsewhere."""
    make_pairs(patient, PROMPTS, tmp_path / "whole.jsonl", judge=SCORER, options=OPTIONS)
    target = tmp_path / "cut.jsonl"
    interrupted(patient, target, monkeypatch)
    assert not target.exists()
    assert len(list((tmp_path / "cut.jsonl.parts").glob("0*.json"))) == 2
    asked = []
    real = GuidedDecoder.generate

    def counting(self: GuidedDecoder, requests: Any, **kwargs: Any) -> Any:
        asked.extend(requests)
        return real(self, requests, **kwargs)

    monkeypatch.setattr(GuidedDecoder, "generate", counting)
    seen: list[int] = []
    options = replace(OPTIONS, batch_size=batch_size)
    make_pairs(patient, PROMPTS, target, judge=SCORER, options=options, progress=seen.append)
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sum(seen) == 7
    if batch_size == 8:
        assert len(asked) == 3 * 4, "three prompts were left"
    assert not (tmp_path / "cut.jsonl.parts").exists()


@pytest.mark.parametrize(
    ("told", "change"),
    [
        ("seed: stored 0, now 1", {"options": replace(OPTIONS, seed=1)}),
        (r"prompts: stored \w{16}, now \w{16}", {"prompts": PROMPTS[:6]}),
        (r"faces: stored \(absent\), now kind; scorer: stored e, now \(absent\)", {"judge": FACES}),
        (r"model: stored \w{16}, now another", {}),
    ],
)
def test_an_unfinished_run_of_other_settings_is_refused(
    patient: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, change: dict[str, Any]
) -> None:
    target = tmp_path / "cut.jsonl"
    interrupted(patient, target, monkeypatch)
    parts = {path.name: path.read_bytes() for path in (tmp_path / "cut.jsonl.parts").iterdir()}
    if not change:
        patient = replace(patient, fingerprint={**patient.fingerprint, "model": "another"})
    given = {"prompts": PROMPTS, "judge": SCORER, "options": OPTIONS, **change}
    if change:
        with pytest.raises(FingerprintMismatch, match=rf"\({told}\)\. Delete that folder"):
            check_wanted(target, **given)
    with pytest.raises(FingerprintMismatch, match=rf"\({told}\)\. Delete that folder"):
        make_pairs(patient, given.pop("prompts"), target, **given)
    assert parts == {path.name: path.read_bytes() for path in (tmp_path / "cut.jsonl.parts").iterdir()}


PAIRS_JOB = """
from pathlib import Path
from llmdoctor.data.prompts import Prompt
from llmdoctor.evaluation.scorers import get_scorer
from llmdoctor.models.loading import load_model
from llmdoctor.pairs.make import PairOptions, make_pairs
def main(model, target):
    prompts = [Prompt(str(n), ({"role": "user", "content": f"{n} the cat"},)) for n in range(30)]
    patient = load_model(model, dtype="float32", device="cpu")
    options = PairOptions(samples=4, max_new_tokens=12, batch_size=8)
    make_pairs(patient, prompts, Path(target), judge=get_scorer("brevity"), options=options)
"""


def test_killed_and_started_again_it_makes_the_same_pairs(
    tiny_folder: Path, tmp_path: Path, job_server: JobServer
) -> None:
    """Real SIGKILLs at random moments of 15 blocks."""
    job_server.run(PAIRS_JOB, tiny_folder, tmp_path / "whole.jsonl")
    parts = tmp_path / "cut.jsonl.parts"
    job_server.run_through_kills(
        *(PAIRS_JOB, tiny_folder, tmp_path / "cut.jsonl"),
        progress=lambda: len(list(parts.glob("0*.json"))),
        kills=[1, 4, 8],
    )
    for suffix in ("", ".recipe.json"):
        cut, whole = (tmp_path / f"{name}.jsonl{suffix}" for name in ("cut", "whole"))
        assert cut.read_bytes() == whole.read_bytes()


def test_a_bad_target_is_refused_before_anything_is_sampled(patient: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pairs\.csv: pairs are written as \.jsonl or \.jsonl\.gz"):
        make_pairs(patient, PROMPTS, tmp_path / "pairs.csv", judge=SCORER, options=OPTIONS)
    with pytest.raises(UserError, match="there are no prompts to answer"):
        make_pairs(patient, [], tmp_path / "pairs.jsonl", judge=SCORER, options=OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_a_scorer_that_breaks(patient: LoadedModel, tmp_path: Path) -> None:
    judge = Scorer("nan", lambda texts: [float("nan")] * len(texts), "nothing")
    with pytest.raises(UserError, match="scorer 'nan' returned nan for text 1"):
        make_pairs(patient, PROMPTS, tmp_path / "p.jsonl", judge=judge, options=OPTIONS)
    assert not (tmp_path / "p.jsonl").exists()


def test_a_scorer_that_breaks_later_leaves_what_was_done(patient: LoadedModel, tmp_path: Path) -> None:
    """Two prompts a block: with the fifth prompt the third block breaks, and two blocks are not scored again."""
    credit = 4

    def paid(texts: Sequence[str]) -> list[float]:
        nonlocal credit
        if not credit:
            raise RuntimeError("out of credit")
        credit -= 1
        return [float(len(text)) for text in texts]

    judge = Scorer("paid", paid, "longer")
    with pytest.raises(UserError, match=r"scorer 'paid' failed on \d texts \(RuntimeError: out of credit\)"):
        make_pairs(patient, PROMPTS, tmp_path / "p.jsonl", judge=judge, options=OPTIONS)
    credit = len(PROMPTS) - 4
    assert make_pairs(patient, PROMPTS, tmp_path / "p.jsonl", judge=judge, options=OPTIONS)["prompts"] == len(PROMPTS)


def test_one_answer_again_and_again_makes_no_pairs(patient: LoadedModel, tmp_path: Path) -> None:
    greedy = PairOptions(temperature=0)
    with pytest.raises(UserError, match="temperature 0 gives every prompt the same answer each time"):
        make_pairs(patient, PROMPTS, tmp_path / "p.jsonl", judge=SCORER, options=greedy)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"temperature": -1.0}, r"temperature must be 0 \(greedy\) or at least 1e-05, got -1.0"),
        ({"top_p": 2.0}, r"top_p must be in \(0, 1\], got 2.0"),
        ({"samples": 1}, "samples must be at least 2 to have a best and a worst, got 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"min_gap": -0.1}, "min_gap must not be negative, got -0.1"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
    ],
)
def test_options_check_themselves(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PairOptions(**options)
