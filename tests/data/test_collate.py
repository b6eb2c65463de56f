"""Pairs to padded tensors: the docstring's example, and the layout that everything after it relies on."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.data.collate import RewardCollator, in_parts
from llmdoctor.models.loading import LoadedModel


class FixedPrompts:
    """Stands for an encoder: a prompt's ids are written in its text."""

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        return [int(word) for word in messages[-1]["content"].split()]


def collator(**options: Any) -> RewardCollator:
    return RewardCollator(FixedPrompts(), **options)  # type: ignore[arg-type]


def row(prompt: str, chosen: list[int], rejected: list[int], **changes: Any) -> dict[str, Any]:
    return {
        "prompt": json.dumps([{"role": "user", "content": prompt}]),
        "chosen_ids": chosen,
        "chosen_rewards": [0.5] * len(chosen),
        "chosen_terminal": True,
        "rejected_ids": rejected,
        "rejected_rewards": [-0.5] * len(rejected),
        "rejected_terminal": True,
    } | changes


def test_the_example_of_the_docstring() -> None:
    batch = collator()(
        [row("5 6", [7, 8, 2], [9], chosen_rewards=[0.9, 0, 0.7], rejected_rewards=[-0.8], rejected_terminal=False)]
    )
    expected = {
        "input_ids": [[5, 6, 7, 8, 2], [5, 6, 9, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
        "completion_mask": [[1, 1, 1], [1, 0, 0]],
        "terminal": [True, False],
        "divergence": [0],
        "prompt_width": 2,
    }
    rewards = batch.pop("token_rewards")
    assert {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in batch.items()} == expected
    torch.testing.assert_close(rewards, torch.tensor([[0.9, 0, 0.7], [-0.8, 0, 0]]))
    assert batch["completion_mask"].dtype == torch.bool
    assert batch["input_ids"].dtype == torch.long


def test_chosen_first_and_completions_in_the_same_column() -> None:
    """Two pairs with prompts of 1 and 3 tokens: rows are chosen 1, chosen 2, rejected 1, rejected 2."""
    batch = collator()([row("5", [7, 2], [8, 9, 2]), row("1 2 3", [4], [6, 2])])
    assert batch["prompt_width"] == 3
    assert batch["input_ids"].tolist() == [
        [0, 0, 5, 7, 2, 0],
        [1, 2, 3, 4, 0, 0],
        [0, 0, 5, 8, 9, 2],
        [1, 2, 3, 6, 2, 0],
    ]
    assert batch["attention_mask"].sum(-1).tolist() == [3, 4, 4, 5]
    assert batch["completion_mask"].sum(-1).tolist() == [2, 1, 3, 2]
    assert batch["token_rewards"].tolist() == [[0.5, 0.5, 0], [0.5, 0, 0], [-0.5, -0.5, -0.5], [-0.5, -0.5, 0]]


def test_padding_is_told_from_a_real_token_of_id_zero() -> None:
    batch = collator()([row("0 0", [0], [0, 0])])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared"),
    [([7, 8, 2], [9], 0), ([7, 8, 2], [7, 9, 2], 1), ([7, 2], [7, 2, 3], 2), ([7, 8, 2], [7, 8], 2), ([7], [7], 1)],
)
def test_divergence_counts_the_shared_beginning(chosen: list[int], rejected: list[int], shared: int) -> None:
    assert collator()([row("5", chosen, rejected)])["divergence"].tolist() == [shared]


def test_a_long_prompt_keeps_its_end() -> None:
    batch = collator(max_prompt_length=2)([row("1 2 3 4", [7], [8])])
    assert batch["input_ids"].tolist() == [[3, 4, 7], [3, 4, 8]]
    assert batch["prompt_width"] == 2


def test_reference_log_probs_come_along_in_the_same_layout() -> None:
    plain = collator()([row("5", [7, 2], [8])])
    assert "ref_logps" not in plain
    batch = collator()([row("5", [7, 2], [8], chosen_ref_logps=[-1.5, -2.5], rejected_ref_logps=[-3.0])])
    assert batch["ref_logps"].tolist() == [[-1.5, -2.5], [-3.0, 0.0]]


def test_prompts_are_encoded_as_the_doctor_will_see_them(tiny_model: LoadedModel) -> None:
    encoder = ChatEncoder.for_model(tiny_model.model, tiny_model.tokenizer)
    messages = [{"role": "user", "content": "the cat"}]
    batch = RewardCollator(encoder)([row("", [7], [8]) | {"prompt": json.dumps(messages)}])
    assert batch["input_ids"][0, : batch["prompt_width"]].tolist() == encoder.prompt_ids(messages)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("most", [1, 20, 24, 40, 10_000])
def test_parts_are_the_batch(packed: bool, most: int) -> None:
    """Each part is what the collator makes of its pairs; together they are all pairs, each once; none is too large."""
    rows = [
        row(" ".join(["5"] * prompt), [7] * chosen, [8] * rejected, chosen_ref_logps=[-1.0] * chosen,
            rejected_ref_logps=[-2.0] * rejected, chosen_rewards=[number / 8] * chosen)
        for number, (prompt, chosen, rejected) in enumerate([(2, 3, 1), (9, 1, 2), (1, 1, 1), (4, 2, 6), (2, 3, 3)])
    ]  # fmt: skip
    collate = collator(packed=packed)
    batch = collate(rows)
    parts = in_parts(batch, most)
    found = []
    for numbers, part in parts:
        # A part says by its rewards, too, which pairs it has.
        assert numbers == [int(8 * value) for value in part["token_rewards"][: len(part["divergence"]), 0]]
        found += numbers
        assert part["input_ids"].numel() <= most or len(numbers) == 1
        own = collate([rows[number] for number in numbers])
        # Whether to pack is decided for the whole batch.
        if (own["prompt_width"] is None) == (part["prompt_width"] is None):
            for name, value in own.items():
                assert torch.equal(value, part[name]) if isinstance(value, torch.Tensor) else value == part[name], name
    assert sorted(found) == list(range(5))
    assert (len(parts) == 1) == (batch["input_ids"].numel() <= most)
    assert len(parts) == 5 or most > 1


def test_kept_scores_make_long_rows_count_for_more() -> None:
    """Two rows of 256 columns each count as 2 · 256 · (1 + 256/256) = 1,024 tokens, where 512 stand in the batch."""
    rows = [row(" ".join(["5"] * 250), [7] * 3, [8] * 3) for _ in range(2)]
    batch = collator(packed=True)(rows)
    assert tuple(batch["input_ids"].shape) == (2, 256)
    assert len(in_parts(batch, 512)) == 1
    assert len(in_parts(batch, 1023, keeps_scores=True)) == 2
    assert len(in_parts(batch, 1024, keeps_scores=True)) == 1
