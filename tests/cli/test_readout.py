"""`llmdoctor readout`, and `generate --best-of` with what it writes."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from tests.cli.harness import CPU, Cli, write_jsonl
from tests.tiny import fresh_doctor, shaken, some_pairs

from llmdoctor.data.prompts import load_prompts
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.request import Request, SamplingParams
from llmdoctor.models.doctor import READOUT_FOLDER
from llmdoctor.models.loading import load_model
from llmdoctor.rewards.readout import Readout

ROWS = [{"id": f"p{number}", "prompt": "Hello" + "!" * number} for number in range(3)]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_jsonl(
        tmp_path / "pairs.jsonl", [{**asdict(pair), "prompt": list(pair.prompt)} for pair in some_pairs(12)]
    )


@pytest.fixture
def folder(good: Cli, pairs: Path, tiny_folder: Path, tmp_path: Path) -> Path:
    done = good("readout", "--pairs", pairs, "--patient", tiny_folder, "--folds", 3, "-o", tmp_path / "readout", *CPU)
    assert "12 pairs, layers " in done.out + done.err
    follows = f"llmdoctor generate PROMPT --patient {tiny_folder} --best-of 8 --readout {tmp_path / 'readout'}"
    assert follows in done.out + done.err
    return tmp_path / "readout"


def test_the_best_of_several_answers_is_kept(good: Cli, folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Against all answers drawn one by one and judged here."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", ROWS)
    command = ("generate", "--prompts", prompts, "--patient", tiny_folder, "--max-new-tokens", 6, *CPU)
    good(*command, "--best-of", 3, "--readout", folder, "-o", tmp_path / "best.jsonl")
    patient = load_model(str(tiny_folder), dtype="float32", device="cpu")
    judge = Readout.from_pretrained(folder, patient)
    drawn: list[Request] = []

    class Recorded(GuidedDecoder):
        def generate(self, requests, **kwargs):  # type: ignore[no-untyped-def]
            drawn.extend(requests)
            return super().generate(drawn, **kwargs)

    from llmdoctor.baselines.best_of_n import BestOfN

    rows = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    for prompt, row in zip(load_prompts(str(prompts)), rows, strict=True):
        drawn.clear()
        request = Request(prompt.messages, sampling=SamplingParams(max_new_tokens=6, seed=row["seed"]))
        BestOfN(Recorded(patient), judge, 3).generate([request])
        answers = GuidedDecoder(patient).generate(drawn)
        scores = judge.score(
            [prompt.messages] * 3, [a.text for a in answers], complete=[a.finish_reason == "stop" for a in answers]
        )
        assert len(drawn) == 3
        assert row["text"] == answers[scores.index(max(scores))].text
        assert row["kl_estimate"] == pytest.approx(0.4319456, abs=1e-6), "log 3 - 2/3"
    one = good("generate", "Hello", "--patient", tiny_folder, "--max-new-tokens", 6, "--best-of", 3,
               "--readout", folder, *CPU)  # fmt: skip
    assert one.out.strip()


def test_a_doctor_trained_in_rounds_brings_its_judge(
    good: Cli, cli: Cli, folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """`train` leaves it in the doctor's folder. Two of them do not choose together."""
    base = load_model(str(tiny_folder), dtype="float32", device="cpu")
    for name in ("one", "two"):
        shaken(fresh_doctor(base), seed=len(name)).save_pretrained(tmp_path / name)
        shutil.copytree(folder, tmp_path / name / READOUT_FOLDER)
        base = load_model(str(tiny_folder), dtype="float32", device="cpu")
    ask = ("generate", "Hello", "--patient", tiny_folder, "--max-new-tokens", 6, "--best-of", 3, *CPU)
    own = good(*ask, "--doctor", tmp_path / "one").out
    assert own.strip()
    assert own == good(*ask, "--doctor", tmp_path / "one", "--readout", folder).out
    both = ("--doctor", f"a1:{tmp_path / 'one'}", "--doctor", f"b1:{tmp_path / 'two'}")
    assert "several doctors have one each: give --readout FOLDER" in " ".join(cli(*ask, *both).err.split())
    assert good(*ask, *both, "--readout", folder).out.strip()


def test_bad_input(cli: Cli, folder: Path, pairs: Path, tiny_folder: Path, tmp_path: Path) -> None:
    def refused(*words: object) -> str:
        done = cli(*words, *CPU)
        assert done.status == 2
        return " ".join(done.err.split())

    ask = ("generate", "Hello", "--patient", tiny_folder)
    assert "--best-of N with N above 1, got --best-of 1" in refused(*ask, "--readout", folder)
    assert "--best-of must be at least 1 answer, got 0" in refused(*ask, "--best-of", 0)
    assert "--best-of 4 needs one read-out that chooses, and no doctor given" in refused(*ask, "--best-of", 4)
    assert "has no readout.json" in refused(*ask, "--best-of", 4, "--readout", tmp_path)
    make = ("readout", "--pairs", pairs, "--patient", tiny_folder, "--folds", 3, "-o")
    assert "holds a read-out already; give another folder, or --overwrite" in refused(*make, folder)
    assert "holds something else than a read-out" in refused(*make, tmp_path)
    assert "is a file; give a folder" in refused(*make, pairs)
    too_many = ("readout", "--pairs", pairs, "--patient", tiny_folder, "--folds", 9, "-o", tmp_path / "new")
    assert "needs at least 2 folds" in refused(*too_many)
    assert not (tmp_path / "new").exists()
