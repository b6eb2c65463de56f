"""Rows of every format become the pairs they mean, and bad rows say what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdoctor.data.formats import FORMATS, PreferencePair, RowError, detect_format, parse_dialogue
from llmdoctor.errors import UserError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
LEAD = [SYSTEM, user("Hi"), assistant("Hello!"), user("A joke?")]
PAIR = PreferencePair(tuple(LEAD), "Knock knock.", "No.")


def parse(format: str, row: dict[str, Any]) -> list[PreferencePair]:
    return FORMATS[format].parse(row)


def hh(*turns: str) -> str:
    """Render turns, the human's first, as HH-RLHF writes them."""
    speakers = ("Human", "Assistant")
    return "".join(f"\n\n{speakers[index % 2]}: {text}" for index, text in enumerate(turns))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": LEAD, "chosen": "Knock knock.", "rejected": "No."},
        {"prompt": LEAD, "chosen": [assistant("Knock knock.")], "rejected": [assistant("No.")]},
        {"prompt": LEAD, "chosen": [*LEAD, assistant("Knock knock.")], "rejected": [*LEAD, assistant("No.")]},
        {"chosen": [*LEAD, assistant("Knock knock.")], "rejected": [*LEAD, assistant("No.")]},
        {"prompt": None, "chosen": [*LEAD, assistant("Knock knock.")], "rejected": [*LEAD, assistant("No.")]},
        {"prompt": "Hi", "chosen": [*LEAD, assistant("Knock knock.")], "rejected": [*LEAD, assistant("No.")]},
        {"prompt": "A joke? ", "chosen": [*LEAD, assistant("Knock knock.")], "rejected": "No."},
        {"prompt": LEAD, "chosen": [{**assistant("Knock knock."), "name": None}], "rejected": "No.", "extra": 1},
        {"system": "Be brief.", "prompt": LEAD[1:], "chosen": "Knock knock.", "rejected": "No."},
        {"system": "Be brief. ", "prompt": LEAD, "chosen": "Knock knock.", "rejected": "No."},
        {"system": "", "prompt": LEAD, "chosen": "Knock knock.", "rejected": "No."},
        {"system": None, "prompt": LEAD, "chosen": "Knock knock.", "rejected": "No."},
        {
            "system": "Be brief.",
            "chosen": [*LEAD[1:], assistant("Knock knock.")],
            "rejected": [*LEAD[1:], assistant("No.")],
        },
        {
            "system": "Be brief.",
            "prompt": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: A joke?\n\nAssistant:",
            "chosen": " Knock knock.",
            "rejected": " No.",
        },
    ],
)
def test_every_way_to_write_a_standard_row_means_the_same_pair(row: dict[str, Any]) -> None:
    assert detect_format(row) == "standard"
    assert parse("standard", row) == [PAIR]


def test_plain_text_is_one_user_turn_and_stays_as_it_is() -> None:
    row = {
        "prompt": " <|im_end|>\n",
        "chosen": " a",
        "rejected": "</s>\n",
        "chosen_complete": False,
        "dimension": "fun",
    }
    expected = PreferencePair((user(" <|im_end|>\n"),), " a", "</s>\n", chosen_complete=False, dimension="fun")
    assert PreferencePair.from_row(row) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Human: Hi",
        "Assistant:",
        "Say:\n\nHuman: Hi\n\nAssistant:",
        "Human: Hi\nAssistant:",
        "Human: Hi\n\nAssistant: Yes",
    ],
)
def test_text_that_is_no_whole_dialogue_is_one_user_turn(text: str) -> None:
    pair = PreferencePair.from_row({"prompt": text, "chosen": " a", "rejected": " b"})
    assert pair == PreferencePair((user(text),), " a", " b")


@pytest.mark.parametrize(
    ("change", "reason", "message"),
    [
        (
            {"rejected": ...},
            "missing column",
            "has no `rejected`; expected prompt, chosen, rejected, got columns prompt, ",
        ),
        ({"prompt": ..., "rejected": ...}, "missing column", "has no `prompt` and no `rejected`; expected"),
        ({"chosen": 3.5}, "wrong type", "has 3.5 as `chosen`, expected text or a list of messages"),
        ({"chosen": None}, "wrong type", "has null as `chosen`"),
        ({"chosen": []}, "wrong type", "has an empty list as `chosen`"),
        ({"chosen": ["yes"]}, "wrong type", "has text as `chosen[0]`, expected a message with role and content"),
        ({"chosen": [user("x")]}, "wrong type", "`chosen` that ends with a turn of the user, not the assistant"),
        ({"prompt": [assistant("x")]}, "wrong type", "`prompt` that ends with a turn of the assistant, not the user"),
        (
            {"prompt": [{"role": "human", "content": "x"}]},
            "wrong type",
            "the role 'human' in `prompt[0]`, expected one",
        ),
        (
            {"prompt": [{"role": "user", "content": ["x"]}]},
            "wrong type",
            "a list as `prompt[0].content`, expected text",
        ),
        ({"chosen_complete": "yes"}, "wrong type", "has text as `chosen_complete`, expected true or false"),
        ({"dimension": True}, "wrong type", "has true as `dimension`, expected text"),
        ({"rejected": "\ud800"}, "broken Unicode", "half of a surrogate pair in `rejected`"),
        ({"prompt": " \n"}, "empty prompt", "has an empty `prompt`"),
        ({"prompt": "Human:\n\nAssistant:"}, "empty prompt", "has an empty `prompt`"),
        (
            {"prompt": "Human: Hi\n\nAssistant: Hm.\n\nAssistant: "},
            "wrong type",
            "has a `prompt` that ends with a turn of the assistant, not the user",
        ),
        ({"system": ["x"]}, "wrong type", "has a list as `system`, expected text"),
        (
            {"system": "Be kind.", "prompt": [SYSTEM, user("x")]},
            "prompts differ",
            "has a `system` that is not the system message of its `prompt`; keep one of them",
        ),
        ({"rejected": " \n"}, "empty response", "has an empty `rejected` response"),
        ({"rejected": "Yes. "}, "identical responses", "has identical `chosen` and `rejected` responses"),
        ({"chosen": [user("Other?"), assistant("x")]}, "prompts differ", "not the one in its conversations"),
        (
            {"chosen": [user("A"), assistant("x")], "rejected": [user("B"), assistant("y")]},
            "prompts differ",
            "has responses to two different prompts",
        ),
        (
            {"prompt": ..., "chosen": [assistant("x")], "rejected": [assistant("y")]},
            "missing column",
            "has no `prompt` and no turn before the answers; got columns chosen, rejected",
        ),
    ],
)
def test_a_bad_standard_row_says_what_is_wrong(change: dict[str, Any], reason: str, message: str) -> None:
    row = {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No.", **change}
    row = {name: value for name, value in row.items() if value is not ...}
    with pytest.raises(RowError) as caught:
        parse("standard", row)
    assert caught.value.reason == reason
    assert message in caught.value.detail
    unusable = {"empty prompt", "empty response", "identical responses", "prompts differ"}
    assert caught.value.malformed == (reason not in unusable)
    with pytest.raises(UserError) as shown:
        PreferencePair.from_row(row, where="x.jsonl: line 7")
    assert str(shown.value) == f"x.jsonl: line 7 {caught.value.detail}"


MARKERS = ("\n\nHuman:", "\n\nAssistant:")
FRAGMENTS = [
    "Human:",
    "Assistant:",
    "\nHuman: ",
    "\n\n",
    "\n\nHuman",
    " ",
    "<|im_end|>",
    "<|endoftext|>",
    "</s>",
    "é",
    "🙂",
]
TURN = (
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=8)), min_size=1, max_size=6)
    .map(lambda parts: "".join(parts).strip())
    .filter(lambda text: bool(text) and not any(marker in text for marker in MARKERS))
)


@given(exchanges=st.lists(st.tuples(TURN, TURN), min_size=1, max_size=4))
def test_a_dialogue_rendered_as_hh_is_parsed_back(exchanges: list[tuple[str, str]]) -> None:
    turns = [text for exchange in exchanges for text in exchange]
    expected = tuple(user(text) if index % 2 == 0 else assistant(text) for index, text in enumerate(turns))
    assert parse_dialogue(hh(*turns)) == expected


@given(lead=st.lists(st.tuples(TURN, TURN), max_size=3), question=TURN, answers=st.tuples(TURN, TURN))
def test_an_hh_pair_is_the_shared_turns_and_two_answers(
    lead: list[tuple[str, str]], question: str, answers: tuple[str, str]
) -> None:
    shared = [*(text for exchange in lead for text in exchange), question]
    row = {"chosen": hh(*shared, answers[0]), "rejected": hh(*shared, answers[1])}
    assert detect_format(row) == "hh"
    if answers[0] == answers[1]:
        with pytest.raises(RowError, match="identical"):
            parse("hh", row)
        return
    (pair,) = parse("hh", row)
    assert [message["content"] for message in pair.prompt] == shared
    assert (pair.chosen, pair.rejected) == answers


def test_hh_turns_of_one_speaker_in_a_row_are_one_turn() -> None:
    """So an answer in two turns is one answer, and the pair still shares its prompt."""
    chosen = "\n\nHuman: A key?\n\nAssistant: Here it is:\n\nAssistant:  1234"
    (pair,) = parse("hh", {"chosen": chosen, "rejected": hh("A key?", "Human: no")})
    assert pair == PreferencePair((user("A key?"),), "Here it is:\n1234", "Human: no")
    (pair,) = parse("hh", {"chosen": chosen + hh("Thanks", "Bye"), "rejected": chosen + hh("Thanks", "Yes")})
    assert pair.prompt == (user("A key?"), assistant("Here it is:\n1234"), user("Thanks"))
    joined = parse_dialogue(hh("A", "B") + "\n\nAssistant:  Human: C")
    assert parse_dialogue(hh(*(turn["content"] for turn in joined))) == joined == (user("A"), assistant("B\nHuman: C"))


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (hh("Hi", ""), hh("Hi", "Hello"), "empty response"),
        (hh("Hi", "Hello"), hh("Hi", "Hello "), "identical responses"),
        (hh("Hi", "Hello"), hh("Hey", "Hello"), "prompts differ"),
        (hh("Hi", "A", "So?", "B"), hh("Hi", "C", "So?", "D"), "prompts differ"),
        (hh("Hi", "A"), hh("Hi", "A", "So?", "B"), "prompts differ"),
        (hh("", "A"), hh("", "B"), "empty prompt"),
        (hh("Hi", "A", "So?"), hh("Hi", "B"), "no answer"),
        ("\n\nAssistant: A" + hh("Hi", "B"), hh("Hi", "A"), "not a dialogue"),
        ("Note." + hh("Hi", "B"), hh("Hi", "A"), "not a dialogue"),
        ("plain", hh("Hi", "A"), "not a dialogue"),
    ],
)
def test_an_unusable_hh_pair_has_a_reason(chosen: str, rejected: str, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        parse("hh", {"chosen": chosen, "rejected": rejected})
    assert caught.value.reason == reason
    assert caught.value.malformed == (reason == "not a dialogue")


PKU = {"prompt": "How?", "response_0": "zero", "response_1": "one", "better_response_id": 1, "safer_response_id": 0}


def test_pku_gives_a_pair_for_each_label() -> None:
    assert detect_format(PKU) == "pku"
    assert parse("pku", PKU) == [
        PreferencePair((user("How?"),), "one", "zero", dimension="helpful"),
        PreferencePair((user("How?"),), "zero", "one", dimension="harmless"),
    ]


def test_pku_with_one_label_gives_one_pair() -> None:
    """The only label of the single-dimension edition is neither helpfulness nor harmlessness."""
    single = {name: value for name, value in PKU.items() if name != "safer_response_id"}
    assert [pair.dimension for pair in parse("pku", single)] == [""]
    safer = {name: value for name, value in PKU.items() if name != "better_response_id"}
    assert [pair.dimension for pair in parse("pku", safer)] == ["harmless"]


@pytest.mark.parametrize("label", [2, -1, True, None, "0"])
def test_a_pku_label_is_0_or_1(label: Any) -> None:
    with pytest.raises(RowError, match="as `safer_response_id`, expected 0 or 1") as caught:
        parse("pku", {**PKU, "safer_response_id": label})
    assert caught.value.malformed


def test_pku_without_a_label_names_the_column() -> None:
    row = {"prompt": "How?", "response_0": "zero", "response_1": "one"}
    with pytest.raises(RowError, match="has no `better_response_id`; expected better_response_id, got columns prompt"):
        parse("pku", row)


ULTRA = {
    "chosen": [user("How?"), assistant("So.")],
    "rejected": [user("How?"), assistant("Thus.")],
    "score_chosen": 8.0,
    "score_rejected": 3,
}


@pytest.mark.parametrize("more", [{}, {"prompt": "How?", "prompt_id": "1f", "messages": [user("How?")]}])
def test_both_editions_of_ultrafeedback(more: dict[str, Any]) -> None:
    row = {**ULTRA, **more}
    assert detect_format(row) == "ultrafeedback"
    assert parse("ultrafeedback", row) == [PreferencePair((user("How?"),), "So.", "Thus.")]


@pytest.mark.parametrize("score", [8, 9.5, float("nan")])
def test_ultrafeedback_pairs_without_a_higher_score_are_unusable(score: float) -> None:
    with pytest.raises(RowError, match="does not score above") as caught:
        parse("ultrafeedback", {**ULTRA, "score_rejected": score})
    assert not caught.value.malformed


def test_ultrafeedback_scores_are_numbers() -> None:
    with pytest.raises(RowError, match="has text as `score_chosen`, expected a number"):
        parse("ultrafeedback", {**ULTRA, "score_chosen": "8"})


def test_unknown_columns_list_the_known_formats() -> None:
    with pytest.raises(
        RowError, match=r"no known format \(standard: prompt, chosen, rejected; hh: .* got columns a, b"
    ):
        detect_format({"a": 1, "b": 2})
    with pytest.raises(RowError, match="got no columns"):
        detect_format({})
