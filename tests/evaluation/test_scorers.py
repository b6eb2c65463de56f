from __future__ import annotations

import math
import socket
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdoctor.errors import UserError
from llmdoctor.evaluation import scorers
from llmdoctor.evaluation.scorers import Scorer, get_scorer, register_scorer

BUILT_IN = ["brevity", "flesch", "nontoxic", "vader"]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a scorer tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def ordered(name, *texts):
    """Scores of texts given from best to worst."""
    scores = get_scorer(name)(texts)
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)
    return scores


def test_the_built_in_scorers_say_what_they_mean():
    scorers = [get_scorer(name) for name in BUILT_IN]
    assert [scorer.name for scorer in scorers] == BUILT_IN
    assert all(scorer.higher_is and scorer.scale == "−1…1" for scorer in scorers)


@pytest.mark.parametrize("name", BUILT_IN)
@given(text=st.text(max_size=60))
@settings(max_examples=40, deadline=None)
def test_any_text_has_a_score_on_the_scale(name, text):
    """Every scorer, any text: finite, in −1…1, and independent of the texts beside it."""
    [score] = get_scorer(name)([text])
    assert -1 <= score <= 1
    assert get_scorer(name)(["other words", text])[1] == score


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_texts_give_no_scores(name):
    assert get_scorer(name)([]) == []


def test_vader_ranks_sentiment_and_calls_neutral_zero():
    ordered("vader", "I love this wonderful day!", "It is a day.", "I hate this horrible day.")
    assert get_scorer("vader")(["The table has four legs.", ""]) == [0.0, 0.0]


def test_flesch_by_hand():
    """ "The cat sat on the mat." has 6 words, 6 syllables, 1 sentence: F = 206.835 − 1.015·6 − 84.6 = 116.145."""
    assert get_scorer("flesch")(["The cat sat on the mat."]) == [pytest.approx(math.tanh((116.145 - 50) / 40))]


def test_flesch_ranks_easy_over_plain_over_academic():
    ordered(
        "flesch",
        "The dog ran to the red barn. It was hot. He lay down in the shade.",
        "Most people find that a regular morning walk improves their mood and their sleep.",
        "Notwithstanding epistemological considerations, institutional heterogeneity necessitates evaluation.",
    )


@pytest.mark.parametrize("text", ["", "  \n", "123 456", "🎉🎉", "…!?"])
def test_flesch_gives_nothing_to_read_the_lowest_score(text):
    assert get_scorer("flesch")([text]) == [-1.0]


def test_brevity_by_hand():
    """2^(1 − w/50) − 1: 0 at 50 words, −0.5 at 100, and −1 for a text without words, which must not win.

    Punctuation is no word, and a script without spaces has as many as characters."""
    scores = get_scorer("brevity")(["word " * 50, "word – " * 50, "word " * 100, "字" * 100, "", "  ", "…!"])
    assert scores == [0.0, 0.0, -0.5, -0.5, -1.0, -1.0, -1.0]
    ordered("brevity", "Yes.", "Yes, I do.", "Yes, I most certainly do.")


def test_nontoxic_halves_the_way_down_with_each_flagged_word():
    scores = get_scorer("nontoxic")(["What a kind thing to do.", "Oh shit.", "Shit, you bastard.", "sh1t happens"])
    assert scores == [1.0, 0.0, -0.5, 0.0]


def test_nontoxic_does_not_find_words_inside_words():
    assert get_scorer("nontoxic")(["The assassin grew shiitake in Scunthorpe."]) == [1.0]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        UserError, match="unknown scorer 'sentimental'; known: brevity, flesch, nontoxic, vader; or your"
    ):
        get_scorer("sentimental")


def test_a_registered_scorer_is_found_and_cannot_be_registered_twice(monkeypatch):
    monkeypatch.setattr(scorers, "_REGISTRY", dict(scorers._REGISTRY))

    @register_scorer("vowels", higher_is="more vowels", scale="0…")
    def vowels(texts):
        return [sum(c in "aeiou" for c in text) for text in texts]

    assert get_scorer("vowels")(["aeb", ""]) == [2.0, 0.0]
    assert get_scorer("vowels").scale == "0…"
    with pytest.raises(ValueError, match="'vowels' exists already"):
        register_scorer("vowels", higher_is="x")(vowels)
    with pytest.raises(ValueError, match="without ':'"):
        register_scorer("my:vowels", higher_is="x")(vowels)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_scores.py").write_text(
        "from llmdoctor.evaluation.scorers import Scorer\n"
        "def length(texts):\n    return [len(t) for t in texts]\n"
        "def short(texts):\n    return [0.5]\n"
        "def broken(texts):\n    return [float('nan') for t in texts]\n"
        "def fails(texts):\n    raise OSError('no such\\nmodel')\n"
        "def nothing(texts):\n    pass\n"
        "def letters(texts):\n    return texts\n"
        "named = Scorer('named', length, 'longer', '0…')\n"
        "number = 3\n"
    )
    (tmp_path / "own_crash.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    yield
    sys.modules.pop("own_scores", None)


@pytest.mark.usefixtures("own_module")
def test_a_users_function_in_the_current_folder_is_found():
    assert get_scorer("own_scores:length")(["ab", "abc"]) == [2.0, 3.0]
    assert isinstance(get_scorer("own_scores:length"), Scorer)
    assert get_scorer("own_scores:named").higher_is == "longer"


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("own_scores:missing", "module 'own_scores' has no function 'missing'"),
        ("own_scores:number", "module 'own_scores' has no function 'number'"),
        ("own_scores:", "has no function ''"),
        ("own_nothing:f", "cannot import 'own_nothing'.*No module named"),
        ("own_crash:f", "cannot import 'own_crash'.*ZeroDivisionError"),
        (":f", "cannot import ''"),
    ],
)
def test_a_users_path_that_leads_nowhere_is_one_clear_line(path, message):
    with pytest.raises(UserError, match=message) as caught:
        get_scorer(path)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("own_module")
def test_a_users_scorer_that_returns_nonsense_is_refused():
    with pytest.raises(UserError, match="'own_scores:short' returned 1 scores for 2 texts"):
        get_scorer("own_scores:short")(["a", "b"])
    with pytest.raises(UserError, match="'own_scores:broken' returned nan for text 1: 'a'"):
        get_scorer("own_scores:broken")(["a", "b"])


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("fails", "OSError: no such"),
        ("nothing", "TypeError: 'NoneType' object is not iterable"),
        ("letters", "ValueError: could not convert string to float: 'a'"),
    ],
)
def test_a_users_scorer_that_fails_is_one_clear_line(name, problem):
    with pytest.raises(UserError) as caught:
        get_scorer(f"own_scores:{name}")(["a", "b"])
    assert str(caught.value) == f"scorer 'own_scores:{name}' failed on 2 texts ({problem}); --debug shows where"
