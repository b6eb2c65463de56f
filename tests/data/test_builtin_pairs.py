"""The preference pairs that ship: sound, about the training prompts alone, and what their recipes say."""

from __future__ import annotations

import json

import pytest

from llmdoctor.bench.options import CONTROLLED_TASKS, Task
from llmdoctor.data.preferences import PreferencePair, load_preferences
from llmdoctor.data.prompts import load_prompts
from llmdoctor.data.rows import BUILTIN
from llmdoctor.evaluation.scorers import get_scorer
from llmdoctor.rewards.faces import face_pairs

SHIPPED = [("sentiment", "vader", 580), ("readability", "flesch", 600)]


def shipped(name: str) -> list[PreferencePair]:
    return list(load_preferences(f"builtin:{name}"))


@pytest.mark.parametrize(("name", "scorer", "count"), SHIPPED)
def test_chosen_scores_above_rejected_by_the_gap_of_the_recipe(name: str, scorer: str, count: int) -> None:
    pairs = shipped(name)
    recipe = json.loads((BUILTIN / f"{name}.jsonl.gz.recipe.json").read_text(encoding="utf-8"))
    assert (recipe["scorer"], recipe["pairs"], len(pairs)) == (scorer, count, count)
    assert recipe["patient"] == "builtin:smollm2"
    score = get_scorer(scorer)
    chosen, rejected = score([pair.chosen for pair in pairs]), score([pair.rejected for pair in pairs])
    gaps = [one - other for one, other in zip(chosen, rejected, strict=True)]
    least = recipe["options"]["min_gap"]
    # The recipe's least gap of 0 still asks for a difference.
    assert all(gap >= least and gap > 0 for gap in gaps)


@pytest.mark.parametrize(("name", "scorer", "count"), SHIPPED)
def test_each_pair_has_a_training_prompt_of_its_own(name: str, scorer: str, count: int) -> None:
    asked = [pair.prompt for pair in shipped(name)]
    assert all(len(prompt) == 1 and prompt[0]["role"] == "user" for prompt in asked)
    texts = [prompt[0]["content"] for prompt in asked]
    train = {prompt.messages[0]["content"] for prompt in load_prompts("builtin:prompts/train")}
    test = {prompt.messages[0]["content"] for prompt in load_prompts("builtin:prompts/test")}
    assert len(set(texts)) == len(texts)
    assert set(texts) <= train
    assert not set(texts) & test


@pytest.mark.parametrize(("name", "scorer", "count"), SHIPPED)
def test_answers_are_text(name: str, scorer: str, count: int) -> None:
    """A model of this size now and then spells a control token out or stops inside a character; hardly ever."""
    texts = [text for pair in shipped(name) for text in (pair.chosen, pair.rejected)]
    assert all(text.strip() for text in texts)
    assert sum("<|im_" in text or "\ufffd" in text for text in texts) <= 5
    # No byte of the file depends on when it was written.
    assert (BUILTIN / f"{name}.jsonl.gz").read_bytes()[4:8] == b"\0\0\0\0"


@pytest.mark.parametrize("task", CONTROLLED_TASKS, ids=lambda task: task.name)
def test_a_controlled_task_is_judged_by_what_chose_its_pairs(task: Task) -> None:
    name = task.pairs.removeprefix("builtin:")
    recipe = json.loads((BUILTIN / f"{name}.jsonl.gz.recipe.json").read_text(encoding="utf-8"))
    assert task.judge == recipe["scorer"]
    assert face_pairs(task.faces)[0].name == task.faces
