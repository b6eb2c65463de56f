"""Prompts from files, and the prompts that ship."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llmdoctor.data.prompts import Prompt, load_prompts
from llmdoctor.data.rows import BUILTIN
from llmdoctor.errors import UserError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def lines(*values: Any) -> str:
    return "".join(f"{value if isinstance(value, str) else json.dumps(value)}\n" for value in values)


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("Why?\n\n  What is <|im_end|>? \n", encoding="utf-8")
    expected = [Prompt("1", (user("Why?"),)), Prompt("3", (user("What is <|im_end|>?"),))]
    assert load_prompts(path) == expected
    assert load_prompts(str(path), limit=1) == expected[:1]
    assert load_prompts(path, limit=9) == expected


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_rows_have_text_or_messages_and_perhaps_an_id(tmp_path: Path, name: str) -> None:
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {"prompt": "Why?", "topic": "x"},
        {"prompt": [system, user("How?")], "id": "how"},
        {"prompt": "So?", "id": 7},
        {"prompt": "And?", "id": 8.0},
        {"prompt": "Then?", "system": "Be brief."},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "system": None},
    ]
    path = tmp_path / name
    path.write_text(lines(*rows) if name == "p.jsonl" else json.dumps(rows), encoding="utf-8")
    assert load_prompts(path) == [
        Prompt("1", (user("Why?"),)),
        Prompt("how", (system, user("How?"))),
        Prompt("7", (user("So?"),)),
        Prompt("8", (user("And?"),)),
        Prompt("5", (system, user("Then?"))),
        Prompt("6", (user("Hi"),)),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n \n", "p.txt is empty: it has no prompts"),
        ("p.jsonl", "", "p.jsonl is empty: it has no rows"),
        ("p.jsonl", lines({"prompt": "a"}, "{"), "p.jsonl: line 2 is not JSON ("),
        ("p.jsonl", lines("a"), "p.jsonl: line 1 is not JSON ("),
        (
            "p.jsonl",
            lines({"text": "a"}),
            "p.jsonl: line 1 has no `prompt`; expected prompt and perhaps id, got columns text",
        ),
        ("p.jsonl", lines({"prompt": ""}), "p.jsonl: line 1 has an empty `prompt`"),
        ("p.jsonl", lines({"prompt": 4}), "p.jsonl: line 1 has 4 as `prompt`, expected text or a list of messages"),
        (
            "p.jsonl",
            lines({"prompt": [user("a"), {"role": "assistant", "content": "b"}]}),
            "p.jsonl: line 1 has a `prompt` that ends with a turn of the assistant, not the user",
        ),
        ("p.jsonl", lines({"prompt": "a", "id": [1]}), "p.jsonl: line 1 has [1] as `id`, expected text or a whole"),
        ("p.jsonl", lines({"prompt": "a", "id": 1.5}), "p.jsonl: line 1 has 1.5 as `id`, expected text or a whole n"),
        ("p.jsonl", '{"prompt": "a", "id": NaN}', "p.jsonl: line 1 has nan as `id`, expected text or a whole number"),
        (
            "p.jsonl",
            lines({"prompt": "a", "id": 1}, {"prompt": "b", "id": 1.0}),
            "p.jsonl: line 2 has the id '1' a second time (first: ",
        ),
        (
            "p.jsonl",
            lines({"prompt": "a", "id": "2"}, {"prompt": "b"}),
            "p.jsonl: line 2 has the id '2' a second time (first: ",
        ),
        ("p.md", "a", "p.md: unknown kind of file, expected one of .txt, .jsonl"),
    ],
)
def test_a_bad_file_gets_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_prompts(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path}/{message}")
    assert "\n" not in str(caught.value)


def test_a_source_that_is_not_there_gets_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.txt: no such file"):
        load_prompts(tmp_path / "none.txt")
    with pytest.raises(UserError, match="is a folder, expected a file of prompts"):
        load_prompts(tmp_path)
    with pytest.raises(UserError, match="builtin:prompts/dev: no such builtin prompts; there is builtin:prompts, "):
        load_prompts("builtin:prompts/dev")
    with pytest.raises(UserError, match="limit is 0, expected at least 1"):
        load_prompts("builtin:prompts", limit=0)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 text"):
        load_prompts(tmp_path / "latin.txt")


def test_the_shipped_prompts_are_distinct_everyday_and_split_once() -> None:
    rows = [json.loads(line) for line in (BUILTIN / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {tuple(row) for row in rows} == {("id", "topic", "split", "prompt")}
    assert [(row["topic"], row["id"]) for row in rows] == sorted((row["topic"], row["id"]) for row in rows)
    assert all(re.fullmatch(rf"{row['topic'].replace(' ', '-')}-\d\d", row["id"]) for row in rows)
    plain = [re.sub(r"\W+", " ", row["prompt"]).strip().lower() for row in rows]
    assert len(set(plain)) == len(rows) >= 600
    assert all(row["prompt"] == row["prompt"].strip() for row in rows)
    for split, least in (("train", 600), ("test", 100)):
        topics = Counter(row["topic"] for row in rows if row["split"] == split)
        assert len(topics) >= 12
        assert topics.total() >= least


def test_the_parts_of_the_shipped_prompts_are_disjoint_and_whole() -> None:
    every, train, test = (load_prompts(f"builtin:prompts{part}") for part in ("", "/train", "/test"))
    assert (len(train), len(test)) == (600, 320)
    assert not {prompt.messages[0]["content"] for prompt in train} & {prompt.messages[0]["content"] for prompt in test}
    assert sorted(every, key=lambda prompt: prompt.id) == sorted([*train, *test], key=lambda prompt: prompt.id)
    assert load_prompts("builtin:prompts/test", limit=2) == test[:2]
