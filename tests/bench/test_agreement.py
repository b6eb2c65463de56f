"""A judge against human labels, and the record beside what was found."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from tests.bench.tools import Told
from tests.chat_server import Judging, Say, serving

from llmdoctor.bench import record as record_module
from llmdoctor.bench.agreement import AgreementResult, make_agreement
from llmdoctor.bench.asking import Asking
from llmdoctor.bench.judging import TaskJudge
from llmdoctor.bench.record import SCHEMA_VERSION, read_records, write_result
from llmdoctor.data.formats import PreferencePair
from llmdoctor.errors import UserError


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def pair(chosen: str, rejected: str) -> PreferencePair:
    return PreferencePair(prompt=[{"role": "user", "content": "Hi"}], chosen=chosen, rejected=rejected)


# A judge that likes long answers agrees with the first two, not with the third, and ties on the last.
PAIRS = [pair("long one", "short"), pair("a longer one", "brief"), pair("no", "a long no"), pair("abc", "xyz")]


def test_a_chat_judge_against_labels(tmp_path: Path) -> None:
    """(1 + 1 + 0 + ½) / 4 = 62.5 %, one tie, every order the same. Eight questions, told before."""
    told: list[Asking] = []
    steps = Told()
    with serving(Judging()) as server:
        judge = TaskJudge(f"chat:wise@{server.url}", tmp_path)
        found = make_agreement(judge, "labels.jsonl", PAIRS, tmp_path, steps, consent=told.append)
        assert len(server.bodies) == 8
    assert [asking.estimate.uncached for asking in told] == [8]
    assert steps.units == [4]
    assert found == json.loads((tmp_path / "judge.json").read_text())
    assert set(found) == set(get_type_hints(AgreementResult))
    assert (found["agreement"], found["position_consistency"]) == (62.5, 100.0)
    assert (found["ties"], found["unanswered"], found["pairs"]) == (1, 0, 4)
    assert found["low"] <= 62.5 <= found["high"]
    record = read_records(tmp_path)["judge.json"]
    assert (record["judge"], record["judge_fingerprint"]) == (judge.name, judge.fingerprint)
    assert (record["labelled"]["source"], record["labelled"]["pairs"]) == ("labels.jsonl", 4)


def test_a_judge_swayed_by_position_and_one_that_refuses(tmp_path: Path) -> None:
    """Always A: every pair a tie that hangs on the order. A refusal is unanswered, and a tie as well."""
    with serving(Judging(answer=lambda _: Say('{"verdict": "A"}'))) as server:
        judge = TaskJudge(f"chat:wise@{server.url}", tmp_path)
        found = make_agreement(judge, "labels.jsonl", PAIRS, tmp_path, Told())
    assert (found["agreement"], found["position_consistency"], found["ties"], found["unanswered"]) == (50, 0, 4, 0)
    with serving(Judging(answer=lambda _: Say("I'm sorry, I can't judge that."))) as server:
        judge = TaskJudge(f"chat:wise@{server.url}", tmp_path)
        found = make_agreement(judge, "labels.jsonl", PAIRS, tmp_path, Told())
    assert (found["agreement"], found["position_consistency"], found["ties"], found["unanswered"]) == (50, None, 4, 4)


def test_a_scorer_against_labels_needs_no_consent(tmp_path: Path) -> None:
    """Brevity likes what the other judge does not: 37.5 %."""

    def never(asking: Asking) -> None:
        raise AssertionError("a scorer costs nothing")

    judge = TaskJudge("brevity", tmp_path)
    found = make_agreement(judge, "labels.jsonl", [*PAIRS[:3]], tmp_path, Told(), consent=never, quick=True)
    assert found["agreement"] == pytest.approx(100 / 3)
    assert found["position_consistency"] is None
    assert read_records(tmp_path)["judge.json"]["quick"] is True
    with pytest.raises(UserError, match="there are no labelled pairs"):
        make_agreement(judge, "labels.jsonl", [], tmp_path, Told())


def record(**fields: Any) -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, **fields}


def test_each_result_keeps_its_own_record(tmp_path: Path) -> None:
    assert read_records(tmp_path) == {}
    write_result(tmp_path, "table.json", [1], record(commit="one"))
    write_result(tmp_path, "human.json", [2], record(commit="two"))
    write_result(tmp_path, "table.json", [3], record(commit="three"))
    assert json.loads((tmp_path / "table.json").read_text()) == [3]
    assert read_records(tmp_path) == {"table.json": record(commit="three"), "human.json": record(commit="two")}


def test_a_record_of_the_first_schema_says_nothing_of_any_file(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"schema_version": 1, "commit": "one", "machine": {}}))
    assert read_records(tmp_path) == {}
    write_result(tmp_path, "table.json", [], record())
    assert read_records(tmp_path) == {"table.json": record()}


@pytest.mark.parametrize(
    ("content", "message"),
    [("[", "is broken"), ("[1]", "one object a result file"), ('{"a.json": {}}', "schema version None; this version")],
)
def test_a_record_that_cannot_be_read_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_records(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_commit_is_named_only_where_this_code_is_tracked(monkeypatch, tmp_path):
    """This checkout has one; without git, or installed into a folder of somebody else's repository, there is none."""
    commit = record_module._commit()
    assert commit
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", commit)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "-C", str(tmp_path), *who, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    monkeypatch.setattr(record_module, "__file__", str(tmp_path / "record.py"))
    (tmp_path / "record.py").touch()
    assert record_module._commit() is None
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record_module._commit() is None
