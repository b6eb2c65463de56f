"""Sources of preference pairs: files, folders, shipped data; what is skipped; and writing pairs."""

from __future__ import annotations

import gzip
import json
import logging
import os
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdoctor.data import rows as rows_module
from llmdoctor.data.preferences import PreferencePair, load_preferences, write_pairs
from llmdoctor.errors import UserError

HH_FOLDER = Path(__file__).parents[3] / "shared" / "data" / "hh-harmless"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Question {n}?", "chosen": f"Good {n}.", "rejected": f"Bad {n}."} for n in range(count)]


def pairs(count: int) -> list[PreferencePair]:
    return [PreferencePair((user(f"Question {n}?"),), f"Good {n}.", f"Bad {n}.") for n in range(count)]


def lines(*values: Any) -> str:
    return "".join(f"{value if isinstance(value, str) else json.dumps(value)}\n" for value in values)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def message_of(*args: Any, **options: Any) -> str:
    """The one line that loading and reading this ends with."""
    with pytest.raises(UserError) as caught:
        list(load_preferences(*args, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.json", "p.json.gz", "P.JSONL", "lines.json", "p.parquet"])
def test_every_kind_of_file_gives_the_same_pairs_again_and_again(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(600)), path)
    else:
        array = ".json" in path.suffixes and not name.startswith("lines")
        write(path, json.dumps(rows(600), indent=1) if array else lines(*rows(600)))
    source = load_preferences(path)
    assert source.format == "standard"
    assert source.name == str(path)
    assert list(source) == pairs(600)
    first, second = iter(source), iter(source)
    assert [next(first), next(first), next(second)] == [*pairs(2), *pairs(1)]
    assert list(load_preferences(str(path), limit=3)) == pairs(3)


def test_a_byte_order_mark_blank_lines_and_windows_line_ends_are_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf\r\n" + lines(*rows(2)).replace("\n", "\r\n\r\n").encode())
    assert list(load_preferences(tmp_path / "p.jsonl")) == pairs(2)


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_a_file_is_streamed(tmp_path: Path, name: str) -> None:
    """8 MB on disk, under 2 MB at the peak while it is read."""
    large = [{**row, "chosen": "x" * 8000 + str(n)} for n, row in enumerate(rows(1000))]
    path = write(tmp_path / name, json.dumps(large) if name.endswith("json") else lines(*large))
    del large
    tracemalloc.start()
    count = sum(1 for _ in load_preferences(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1000
    assert peak < 2_000_000


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", "", "p.jsonl is empty: it has no rows"),
        ("p.jsonl", "\n \n", "p.jsonl is empty: it has no rows"),
        ("p.json", "[]", "p.json is empty: it has no rows"),
        ("p.jsonl", lines(*rows(2), "{'a': 1}"), "p.jsonl: line 3 is not JSON (Expecting property name enclosed"),
        ("p.jsonl", lines(*rows(1), "[" * 100_000), "p.jsonl: line 2 is not JSON ("),
        ("p.jsonl", lines(*rows(1), 7), "p.jsonl: line 2 is not a JSON object with named columns"),
        (
            "p.jsonl",
            lines(*rows(1), {"prompt": "a", "chosen": "b"}),
            "p.jsonl: line 2 has no `rejected`; expected prompt, chosen, rejected, got columns prompt, chosen",
        ),
        ("p.jsonl", lines({"prompt": "a", "chosen": "b"}), "p.jsonl: line 1 has no `rejected`; expected"),
        ("p.jsonl", lines({"chosen": "a", "rejected": "b"}), "p.jsonl: line 1 has no `prompt`; expected"),
        (
            "p.jsonl",
            lines({"text": "a"}),
            "p.jsonl: line 1 is of no known format (standard: prompt, chosen, rejected; ",
        ),
        (
            "p.jsonl",
            lines(*rows(1), {"prompt": "a", "chosen": "b", "rejected": "b"}),
            "p.jsonl: line 2 has identical `chosen` and `rejected` responses",
        ),
        ("p.json", '[\n{"prompt": "a", "chosen": "b"}\n]', "p.json: item 1 has no `rejected`"),
        ("p.json", json.dumps(rows(3), indent=1)[:-1], "p.json: line 17 is not JSON (expected a comma or the end"),
        (
            "p.json",
            json.dumps(rows(3), indent=1) + "x",
            "p.json: line 17 is not JSON (text after the end of the array)",
        ),
        ("p.json", f"[\n{json.dumps(rows(1)[0])},\n]", "p.json: line 3 is not JSON (Expecting value)"),
        ("p.json", '[\n{"prompt": "a\n"}]', "p.json: line 2 is not JSON (Invalid control character at)"),
        (
            "p.json",
            f"[\n{json.dumps(rows(1)[0])} {{}}]",
            "p.json: line 2 is not JSON (expected a comma or the end of the array, fo",
        ),
        ("p.parquet", "no table", "p.parquet cannot be read as Parquet: "),
        ("p.csv", "a,b", "p.csv: unknown kind of file, expected one of .jsonl, .jsonl.gz, .json, .json.gz, .parquet"),
    ],
)
def test_a_bad_file_gets_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    said = message_of(write(tmp_path / name, text))
    assert said.startswith(f"{tmp_path}/{message}")


def test_unreadable_bytes_get_one_line(tmp_path: Path) -> None:
    whole = gzip.compress(lines(*rows(500)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert message_of(tmp_path / "cut.jsonl.gz").startswith(f"{tmp_path}/cut.jsonl.gz is not a whole gzip file: ")
    (tmp_path / "plain.jsonl.gz").write_bytes(lines(*rows(2)).encode())
    assert "plain.jsonl.gz is not a whole gzip file" in message_of(tmp_path / "plain.jsonl.gz")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    assert "latin.jsonl is not UTF-8 text" in message_of(tmp_path / "latin.jsonl")


def test_wrong_options_list_the_right_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", lines(*rows(1)))
    expected = "unknown format 'hhh', expected one of auto, standard, hh, pku, ultrafeedback"
    assert message_of(path, format="hhh") == expected
    assert message_of(path, on_bad="drop") == "unknown on_bad 'drop', expected one of auto, error, skip"
    assert message_of(path, limit=0) == "limit is 0, expected at least 1"
    assert message_of(tmp_path / "none.jsonl").startswith(f"{tmp_path}/none.jsonl: no such file or folder")
    assert message_of("data/none.jsonl").startswith("data/none.jsonl: no such file or folder")


def test_a_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    write(tmp_path / "b" / "2.jsonl", lines(*rows(4)[2:]))
    write(tmp_path / "a.json", json.dumps(rows(2)))
    write(tmp_path / ".hidden.jsonl", "broken")
    write(tmp_path / "README.md", "# Data")
    assert list(load_preferences(tmp_path)) == pairs(4)
    (tmp_path / "none").mkdir()
    assert message_of(tmp_path / "none").startswith(f"{tmp_path}/none: no data files in this folder, expected some of")


def test_files_named_after_splits_are_chosen_by_the_split(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-00000-of-00002.jsonl", lines(rows(2)[0]))
    write(tmp_path / "data" / "train-00001-of-00002.jsonl", lines(rows(2)[1]))
    write(tmp_path / "data" / "train_sft.jsonl", lines({"text": "not pairs"}))
    write(tmp_path / "test.jsonl", lines(rows(3)[2]))
    assert list(load_preferences(tmp_path)) == pairs(2)
    assert list(load_preferences(tmp_path, split="test")) == pairs(3)[2:]
    expected = f"{tmp_path}: no files of the split 'dev', there is test, train, train_sft"
    assert message_of(tmp_path, split="dev") == expected


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train/pairs.jsonl", "test/pairs.jsonl"),
        ("harmless/training/1.jsonl", "harmless/my-test_2/1.jsonl"),
        ("train/pairs.jsonl", "test/train_sft.jsonl"),
        ("my_train.jsonl", "my_eval.jsonl"),
        ("hh/Train.jsonl", "hh/test 1/0.jsonl"),
    ],
)
def test_what_is_held_out_by_a_name_is_not_trained_on(tmp_path: Path, train: str, test: str) -> None:
    write(tmp_path / "test" / train, lines(rows(2)[0]))
    write(tmp_path / "test" / test, lines(rows(2)[1]))
    assert list(load_preferences(tmp_path / "test")) == pairs(2)[:1]
    assert list(load_preferences(tmp_path / "test", split="test")) == pairs(2)[1:]
    assert message_of(tmp_path / "test", split="dev").endswith("no files of the split 'dev', there is test, train")


def test_all_words_for_a_split_are_one(tmp_path: Path) -> None:
    write(tmp_path / "dev" / "a.jsonl", lines(rows(2)[0]))
    write(tmp_path / "valid.jsonl", lines(rows(2)[1]))
    for split in ("dev", "validation"):
        assert list(load_preferences(tmp_path, split=split)) == pairs(2)


def test_on_bad_says_what_is_dropped_and_what_stops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    twin = {"prompt": "a", "chosen": "b", "rejected": "b"}
    path = write(tmp_path / "p.jsonl", lines("{", rows(2)[0], twin, twin, {"prompt": "a"}, rows(2)[1]))
    assert "line 1 is not JSON" in message_of(path, format="standard", on_bad="error")
    source = load_preferences(path, on_bad="skip")
    with caplog.at_level(logging.WARNING):
        assert list(source) == list(source) == pairs(2)
    assert source.skipped == {"not JSON": 1, "identical responses": 2, "missing column": 1}
    report = (
        f"{path}: skipped 4 of 6 rows: 2 × identical responses (first: line 3), 1 × not JSON (first: line 1), "
        "1 × missing column (first: line 5)"
    )
    assert source.skip_report() == report
    assert [record.getMessage() for record in caplog.records] == [report]
    nothing = write(tmp_path / "twins.jsonl", lines(twin, twin))
    said = message_of(nothing, on_bad="skip")
    assert said == f"{nothing}: no usable pairs; skipped 2 of 2 rows: 2 × identical responses (first: line 1)"
    nothing = write(tmp_path / "broken.jsonl", "{\n")
    assert message_of(nothing, on_bad="skip").startswith(f"{nothing}: no row of a known format (standard, hh, ")


def test_by_default_published_sets_lose_only_pairs_that_teach_nothing(tmp_path: Path) -> None:
    row = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: What"}
    twin = {**row, "rejected": row["chosen"]}
    path = write(tmp_path / "hh.jsonl", lines(twin, row))
    source = load_preferences(path)
    assert (source.format, list(source)) == ("hh", [PreferencePair((user("Hi"),), "Hello", "What")])
    assert source.skipped == {"identical responses": 1}
    assert "line 1 has identical" in message_of(path, on_bad="error")
    path = write(tmp_path / "bad.jsonl", lines(row, {"chosen": row["chosen"]}))
    assert "line 2 has no `rejected`" in message_of(path)


def test_a_dimension_selects_labelled_pairs_and_labels_the_others(tmp_path: Path) -> None:
    row = {"prompt": "How?", "response_0": "zero", "response_1": "one", "better_response_id": 1, "safer_response_id": 0}
    path = write(tmp_path / "pku.jsonl", lines(row))
    assert [pair.dimension for pair in load_preferences(path)] == ["helpful", "harmless"]
    (pair,) = load_preferences(path, dimension="harmless")
    assert (pair.chosen, pair.dimension) == ("zero", "harmless")
    assert message_of(path, dimension="fun") == f"{path}: no pairs of the dimension 'fun', there is harmless, helpful"
    path = write(tmp_path / "p.jsonl", lines(rows(1)[0]))
    assert [pair.dimension for pair in load_preferences(path, dimension="polite")] == ["polite"]


def test_the_fingerprint_is_of_the_content_and_the_options(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", lines(*rows(2)))
    source = load_preferences(path)
    before = source.fingerprint()
    assert before == load_preferences(write(tmp_path / "copy.jsonl", lines(*rows(2))), on_bad="skip").fingerprint()
    others = [load_preferences(path, limit=1), load_preferences(path, dimension="x"), load_preferences(path.parent)]
    assert len({before, *(other.fingerprint() for other in others)}) == 4
    write(path, lines(*rows(2)).replace("Good", "Fine"))
    os.utime(path, ns=(0, 0))
    assert source.fingerprint() != before, "an edit that keeps the size is seen"


def test_a_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = load_preferences(write(tmp_path / "p.jsonl", lines(*rows(2))))
    before = source.fingerprint()
    monkeypatch.setattr(rows_module, "sha256_file", lambda path: pytest.fail("hashed twice"))
    assert source.fingerprint() == before


def test_shipped_data_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "BUILTIN", tmp_path)
    write(tmp_path / "mood.jsonl.gz", lines(*rows(2)))
    write(tmp_path / "short.jsonl", lines(*rows(1)))
    write(tmp_path / "mood.json", '{"recipe": 1}')
    assert list(load_preferences("builtin:mood")) == pairs(2)
    assert message_of("builtin:mod") == "builtin:mod: no such builtin data; there is builtin:mood, builtin:short"


TEXT = st.text(min_size=1, max_size=20).filter(lambda text: bool(text.strip()))
PAIRS = st.builds(
    lambda lead, question, chosen, rejected, complete, dimension: PreferencePair(
        (*lead, user(question)), chosen, rejected, *complete, dimension
    ),
    st.lists(
        st.builds(dict, role=st.sampled_from(["system", "user", "assistant"]), content=st.text(max_size=9)), max_size=3
    ),
    TEXT | st.sampled_from(["<|im_end|>", "a\u2028b", "\r\n\x85x"]),
    TEXT,
    TEXT,
    st.tuples(st.booleans(), st.booleans()),
    st.text(max_size=5),
).filter(lambda pair: pair.chosen.strip() != pair.rejected.strip())


@given(made=st.lists(PAIRS, min_size=1, max_size=5), name=st.sampled_from(["p.jsonl", "p.jsonl.gz"]))
def test_written_pairs_are_read_back(made: list[PreferencePair], name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        assert write_pairs(path, iter(made)) == len(made)
        assert list(load_preferences(path)) == made


def test_written_pairs_depend_on_nothing_else_and_open_elsewhere(tmp_path: Path) -> None:
    made = [*pairs(2), PreferencePair((user("a"), user("b")), "c", "d", dimension="e")]
    for name in ("one.jsonl.gz", "other.jsonl.gz"):
        write_pairs(tmp_path / name, made)
    assert (tmp_path / "one.jsonl.gz").read_bytes() == (tmp_path / "other.jsonl.gz").read_bytes()
    assert (tmp_path / "one.jsonl.gz").read_bytes()[3:8] == bytes(5), "the gzip header has no file name and no time"
    opened = datasets.Dataset.from_json(str(tmp_path / "one.jsonl.gz"), cache_dir=str(tmp_path / "cache"))
    assert opened.to_list() == [pair.to_row() for pair in made]


def test_pairs_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def stops() -> Iterator[PreferencePair]:
        yield from pairs(2)
        raise KeyboardInterrupt

    path = tmp_path / "p.jsonl.gz"
    write_pairs(path, pairs(1))
    with pytest.raises(KeyboardInterrupt):
        write_pairs(path, stops())
    with pytest.raises(UserError, match=r"p\.jsonl\.gz: there are no pairs to write"):
        write_pairs(path, [])
    with pytest.raises(UserError, match=r"p\.csv: pairs are written as \.jsonl or \.jsonl\.gz"):
        write_pairs(tmp_path / "p.csv", pairs(1))
    assert list(load_preferences(path)) == pairs(1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.jsonl.gz"]


@pytest.mark.skipif(not HH_FOLDER.is_dir(), reason="the HH-RLHF files in ../shared/data/hh-harmless are absent")
@pytest.mark.parametrize(("split", "rows_there", "first"), [("train", 1500, 1287), ("validation", 300, 280)])
def test_the_real_hh_files_lose_only_their_empty_answers(split: str, rows_there: int, first: int) -> None:
    """Of 1,800 rows two have an empty answer; five, where an answer has two turns, are kept by joining those."""
    source = load_preferences(HH_FOLDER / f"{split}.jsonl.gz")
    found = list(source)
    assert source.format == "hh"
    assert source.skipped == {"empty response": 1}
    assert f"1 × empty response (first: line {first})" in source.skip_report()
    assert len(found) == rows_there - 1
    for pair in found:
        roles = [message["role"] for message in pair.prompt]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        texts = [pair.chosen, pair.rejected, *(message["content"] for message in pair.prompt)]
        assert all(text and text == text.strip() for text in texts)
        assert not any(marker in text for text in texts for marker in ("\n\nHuman:", "\n\nAssistant:"))
    assert list(load_preferences(HH_FOLDER, split=split)) == found


def test_rows_in_memory_are_read_again_and_again() -> None:
    for data in (rows(5), tuple(rows(5)), datasets.Dataset.from_list(rows(5))):
        source = load_preferences(data)
        assert source.name == "pairs in memory"
        assert source.format == "standard"
        assert list(source) == list(source) == pairs(5)
        assert list(load_preferences(data, limit=2)) == pairs(2)
    hh = {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Hi\n\nAssistant: B"}
    assert list(load_preferences([hh])) == [PreferencePair((user("Hi"),), "A", "B")]


def test_the_fingerprint_of_rows_in_memory_is_their_content() -> None:
    data = rows(3)
    source = load_preferences(data)
    before = source.fingerprint()
    assert before == load_preferences(datasets.Dataset.from_list(rows(3))).fingerprint()
    assert before not in {load_preferences(other).fingerprint() for other in (rows(2), rows(4), rows(3)[::-1])}
    assert before != load_preferences(data, limit=2).fingerprint()
    data[1]["chosen"] = "Better."
    assert before != source.fingerprint()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((row for row in rows(1)), "not this generator, which may be read only once; make it a list first: list("),
        (map(dict, rows(1)), "not this map, which may be read only once"),
        (datasets.Dataset.from_list(rows(1)).to_iterable_dataset(), "not this IterableDataset, which may be read on"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(rows(1))), "name one, as in data['train'], and put a s"),
        (rows(1)[0], "not this dict; of several splits name one"),
        (7, "expected a path, a name, a list of rows or a datasets.Dataset, not this int"),
        ([], "pairs in memory: there are none"),
        ([*rows(1), {"prompt": "x"}], "pairs in memory: row 2 has no `chosen` and no `rejected`; expected"),
        (pairs(1), "pairs in memory: row 1 is a PreferencePair, expected named columns"),
    ],
)
def test_rows_in_memory_that_cannot_be_used(data: Any, message: str) -> None:
    assert message in message_of(data)


def test_bad_rows_in_memory_are_skipped_and_counted() -> None:
    source = load_preferences([*rows(1), {"prompt": "x"}, *rows(1)], on_bad="skip")
    assert list(source) == pairs(1) * 2
    assert source.skip_report() == "pairs in memory: skipped 1 of 3 rows: 1 × missing column (first: row 2)"
