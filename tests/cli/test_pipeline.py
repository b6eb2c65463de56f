"""Prompts to guided answers through the command line alone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.cli.harness import CPU, PAIRS, Cli, write_jsonl
from tests.twoprocs import in_two_processes

from llmdoctor.data.preferences import load_preferences
from llmdoctor.models.doctor import DoctorConfig
from llmdoctor.rewards.store import RewardStore


def test_from_prompts_to_guided_answers(
    good: Cli, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_scorer.py").write_text("def letters(texts):\n    return [sum(map(ord, text)) for text in texts]\n")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"Question {number}?\n" for number in range(6)))
    pairs, rewards, doctor = tmp_path / "pairs.jsonl.gz", tmp_path / "rewards", tmp_path / "doctor"

    made = good("pairs", "--prompts", prompts, "--scorer", "my_scorer:letters", "--patient", tiny_folder, "-o", pairs,
                "--samples", 2, "--max-new-tokens", 5, "--batch-size", 4, *CPU)  # fmt: skip
    assert "6 pairs of 6 prompts" in made.out
    assert "answering: 6 prompts in" in made.err
    assert f"next: llmdoctor train --pairs {pairs}" in made.out
    assert len(list(load_preferences(pairs))) == 6
    assert json.loads((tmp_path / "pairs.jsonl.gz.recipe.json").read_text())["scorer"] == "my_scorer:letters"

    scored = good("rewards", "--pairs", pairs, "--faces", "polite", "--paraphrase", 2, "--patient", tiny_folder,
                  "-o", rewards, "--theta", 0, "--max-completion-length", "none", *CPU)  # fmt: skip
    store = RewardStore.open(rewards)
    assert store.manifest["faces"]["name"] == "polite#2"
    assert store.manifest["reward_options"]["theta"] == 0
    assert store.manifest["scoring_options"]["max_completion_length"] is None
    assert f"6 pairs, {store.manifest['tokens']} tokens, " in scored.out
    assert "tokens/s" in scored.out
    assert "scoring: 6 pairs in" in scored.err

    page = tmp_path / "page.html"
    seen = good("inspect", rewards, "-o", page, "--agreement-pairs", 2, "--examples", 1, *CPU)
    assert "chosen" in seen.out
    assert "Rank agreement" in seen.out
    assert "comparing faces: 6 readings of a pair in" in seen.err, "two pairs under three paraphrases"
    assert "polite#3" in page.read_text()

    trained = good("train", "--rewards", rewards, "-o", doctor, "--eval-fraction", 0.34, "--rounds", 0,
                   "--num-train-epochs", 1, "--per-device-train-batch-size", 2, "--no-length-normalize",
                   "--lora-rank", 2, *CPU)  # fmt: skip
    config = DoctorConfig.load(doctor)
    assert config.dimension == "polite#2"
    assert config.training["lora_rank"] == 2
    assert config.training["length_normalize"] is False
    shown = re.search(r"preference accuracy +(\d+) % \((\d+) … (\d+)\)", trained.out)
    assert shown, "with its interval: two held-out pairs tell little"
    assert int(shown[2]) <= int(shown[1]) <= int(shown[3])
    assert "training: 2 steps in" in trained.err, "four pairs left to train on, two a step"
    assert "{'" not in trained.out, "a dict that the Trainer printed"
    assert "%|" not in trained.err, "a bar of tqdm's"
    assert f"--doctor {doctor}=1.0" in trained.out

    answer = good("generate", "Hello", "--patient", tiny_folder, "--doctor", f"{doctor}=2", "--max-new-tokens", 4, *CPU)
    assert "tokens, ended by" in answer.err

    answers = tmp_path / "answers.jsonl"
    good("generate", "--prompts", prompts, "-o", answers, "--patient", tiny_folder, "--doctor", f"mine:{doctor}=2",
         "--alpha", 0.5, "--max-new-tokens", 4, "--batch-size", 4, *CPU)  # fmt: skip
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert rows[0]["prompt"] == [{"role": "user", "content": "Question 0?"}]
    assert {(row["alpha"], *row["betas"].items()) for row in rows} == {(0.5, ("mine", 2.0))}
    assert all(0 < row["tokens"] <= 4 for row in rows)
    assert not list(tmp_path.glob("*.partial"))


def test_pairs_by_faces(good: Cli, tiny_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("One?\nTwo?\n")
    output = tmp_path / "pairs.jsonl"
    good("pairs", "--prompts", prompts, "--faces", "concise", "--patient", tiny_folder, "-o", output,
         "--max-new-tokens", 4, *CPU)  # fmt: skip
    assert json.loads(Path(f"{output}.recipe.json").read_text())["faces"]["name"] == "concise"


def test_of_how_many_prompts_is_not_said_where_the_pairs_are_limited(
    good: Cli, tiny_folder: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"Question {number}?\n" for number in range(6)))
    command = ("pairs", "--prompts", prompts, "--scorer", "brevity", "--patient", tiny_folder, "--samples", 2,
               "--max-new-tokens", 9, "--batch-size", 2, "--seed", 1, *CPU)  # fmt: skip
    assert "answering: 0 of 6 prompts" in good(*command, "-o", tmp_path / "all.jsonl").err
    made = good(*command, "-o", tmp_path / "one.jsonl", "--limit", 1)
    assert "answering\n" in made.err
    assert "of 6 prompts" not in made.err
    assert "1 pairs of " in made.out


def test_a_model_named_from_one_folder_is_found_from_another(
    good: Cli, cli: Cli, tiny_folder: Path, deep_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The doctor's base is not the patient it guides, so it has to be found by its name."""
    here = tmp_path / "here"
    shutil.copytree(tiny_folder, here / "model")
    pairs = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    monkeypatch.chdir(here)
    good("rewards", "--pairs", pairs, "--faces", "polite", "--patient", "./model", "-o", "rewards", *CPU)
    monkeypatch.chdir(tmp_path)
    train = ("train", "--rewards", "here/rewards", "-o", "doctor", "--rounds", 0, "--num-train-epochs", 1, *CPU)
    trained = good(*train)
    assert f"--patient {here / 'model'} " in trained.out
    assert DoctorConfig.load(Path("doctor")).base == str(here / "model")
    adapter = json.loads(Path("doctor/adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(here / "model")
    monkeypatch.chdir(here)
    good("generate", "Hi", "--patient", deep_folder, "--doctor", "../doctor", "--max-new-tokens", 1, *CPU)
    shutil.rmtree(here / "model")
    gone = cli(*train[:2], "rewards", "-o", "../new", *train[5:])
    assert f"the patient that made the rewards in rewards, as it was called: There is no folder {here}" in gone.err


def test_inspect_without_the_patient(good: Cli, finished: Path, tmp_path: Path) -> None:
    ended = good("inspect", finished / "rewards", "-o", tmp_path / "page.html", "--no-agreement")
    assert "loading" not in ended.err
    assert "Rank agreement" not in ended.out


def test_pairs_that_no_faces_read(good: Cli, cli: Cli, tiny_folder: Path, tmp_path: Path) -> None:
    """They are enough for what training does by default, and there is nothing to look at."""
    pairs, rewards = write_jsonl(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "bare"
    made = good("rewards", "--pairs", pairs, "--faces", "none", "--patient", tiny_folder, "-o", rewards, *CPU)
    assert "kept" not in made.out
    assert "scoring" not in made.err
    assert f"the pairs are in {rewards}, without token rewards" in made.out
    assert "llmdoctor inspect" not in made.out
    assert "so they have no token rewards to look at" in cli("inspect", rewards).err
    doctor = tmp_path / "doctor"
    told = cli("train", "--rewards", rewards, "-o", doctor, "--rounds", 0)
    assert "so they have no token rewards, of which objective subtb learns" in told.err
    assert "loading" not in told.err
    made = good("train", "--rewards", rewards, "-o", doctor, "--rounds", 1, "--round-prompts", 2, "--lora-rank", 2,
         "--num-train-epochs", 1, "--eval-fraction", 0, *CPU)  # fmt: skip
    assert f"the doctor is in {doctor}" in made.out
    assert DoctorConfig.load(doctor).dimension == ""


def test_training_straight_from_pairs(good: Cli, cli: Cli, tiny_folder: Path, tmp_path: Path) -> None:
    """The same doctor, to the bit, as of the folder that `llmdoctor rewards` makes."""
    pairs, rewards = write_jsonl(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "bare"
    good("rewards", "--pairs", pairs, "--faces", "none", "--patient", tiny_folder, "-o", rewards, *CPU)
    how = ("--rounds", 1, "--round-prompts", 2, "--lora-rank", 2, "--num-train-epochs", 1, "--eval-fraction", 0, *CPU)
    good("train", "--rewards", rewards, "-o", tmp_path / "two", *how)
    command = ("train", "--pairs", pairs, "--patient", tiny_folder, "--dimension", "polite", "-o", tmp_path / "one")
    made = good(*command, *how)
    assert "4 pairs, " in made.out
    assert f"next: llmdoctor generate 'How was your day?' --patient {tiny_folder}" in made.out
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert DoctorConfig.load(tmp_path / "one").dimension == "polite"
    assert RewardStore.open(tmp_path / "one" / "pairs").manifest["pairs"] == 4
    assert "training: " not in good(*command, *how).err, "all is done"
    good("generate", "Hi", "--patient", tiny_folder, "--doctor", tmp_path / "one", "--max-new-tokens", 1, *CPU)

    more = write_jsonl(tmp_path / "more.jsonl", [*PAIRS, {"prompt": "Hm?", "chosen": "Yes.", "rejected": "No."}])
    other = ("train", "--pairs", more, *command[3:], *how)
    refused = cli(*other).err
    assert "stored" in refused, "other pairs are not mixed with those that are there"
    assert refused.rstrip().endswith("Give another output folder, or --restart to start anew.")
    nobody = ("train", "--pairs", pairs, "--patient", tmp_path / "nobody", "-o", tmp_path / "one")
    assert "faces: stored" in cli(*nobody, "--faces", "polite", "--rounds", 0, *CPU).err, "told before one is loaded"
    good(*other, "--restart")
    assert RewardStore.open(tmp_path / "one" / "pairs").manifest["pairs"] == 5
    tokens = {path: path.stat().st_mtime_ns for path in (tmp_path / "one" / "pairs" / "logps").iterdir()}
    assert "training: " in good(*other, "--restart").err
    assert {path: path.stat().st_mtime_ns for path in tokens} == tokens, "of the same pairs they are kept"


def test_a_folder_of_ones_own_is_not_taken_for_that_of_an_earlier_run(
    cli: Cli, tiny_folder: Path, tmp_path: Path
) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    mine = tmp_path / "doctor" / "pairs" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    cli("train", "--pairs", pairs, "--patient", tiny_folder, "-o", tmp_path / "doctor", "--restart", "--rounds", 1,
        "--round-prompts", 2, "--lora-rank", 2, "--num-train-epochs", 1, "--eval-fraction", 0, *CPU)  # fmt: skip
    assert mine.read_text() == "mine"


def test_two_processes_train_straight_from_pairs(tiny_folder: Path, tmp_path: Path) -> None:
    """One of them makes the tokens, and the other waits for it."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    command = ("train", "--pairs", pairs, "--patient", tiny_folder, "-o", tmp_path / "doctor", "--rounds", 1,
               "--round-prompts", 2, "--lora-rank", 2, "--num-train-epochs", 1, "--eval-fraction", 0, *CPU)  # fmt: skip
    for status, said in in_two_processes("from llmdoctor.cli.main import main; main()", *command):
        assert status == 0, said[-3000:]
    assert RewardStore.open(tmp_path / "doctor" / "pairs").manifest["pairs"] == 4
    assert DoctorConfig.load(tmp_path / "doctor").base == str(tiny_folder)


def test_token_rewards_and_training_in_one(good: Cli, tiny_folder: Path, tmp_path: Path) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    good("train", "--pairs", pairs, "--faces", "polite", "--patient", tiny_folder, "-o", tmp_path / "doctor",
         "--rounds", 0, "--num-train-epochs", 1, "--max-completion-length", 2, *CPU)  # fmt: skip
    assert DoctorConfig.load(tmp_path / "doctor").dimension == "polite"
    store = RewardStore.open(tmp_path / "doctor" / "pairs")
    assert store.has_token_rewards
    assert max(len(row["chosen_ids"]) for row in store.rows()) == 2


def test_rewards_are_rescored_without_scoring_again(
    good: Cli, cli: Cli, finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished / "rewards", tmp_path / "rewards")
    command = ("rewards", "--pairs", finished / "pairs.jsonl", "--faces", "positive", "--patient", tiny_folder,
               "-o", folder, "--density", 0.25, *CPU)  # fmt: skip
    refused = cli(*command)
    assert refused.status == 2
    assert "density: stored None, now 0.25" in refused.err
    assert "loading" not in refused.err
    refused = cli(*command, "--max-completion-length", 5)
    assert "(max_completion_length: stored 512, now 5)" in refused.err
    assert "loading" not in refused.err
    ended = good(*command, "--rescore")
    assert "tokens/s" not in ended.out, "the speed of an earlier run"
    assert RewardStore.open(folder).manifest["reward_options"]["density"] == 0.25
