"""Log-likelihoods under a face against whole forward passes, one row at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import naive_logps, some_pairs
from transformers import (
    AutoModelForCausalLM,
    GPTNeoConfig,
    JambaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.models.loading import LoadedModel, load_model
from llmdoctor.models.logps import LogitsHead
from llmdoctor.rewards import face_scorer
from llmdoctor.rewards.face_scorer import FaceScorer, _alike

LONG = "the cat sat on the mat and the dog ran to the house and " * 3


@pytest.fixture(scope="module")
def shared_model(tiny_folder: Path) -> LoadedModel:
    """One model for tests that only read it."""
    return load_model(str(tiny_folder), dtype="float32", device="cpu")


def scorer_of(loaded: LoadedModel, system: str | None) -> FaceScorer:
    encoder = ChatEncoder.for_model(loaded.model, loaded.tokenizer)
    return FaceScorer(loaded.model, encoder, LogitsHead.for_model(loaded.model), system)


def close(scored: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert [len(row) for row in scored] == [len(row) for row in expected]
    for row, slow in zip(scored, expected, strict=True):
        torch.testing.assert_close(row.double(), slow, rtol=0, atol=1e-4)


def naive(loaded: LoadedModel, prompts: list[list[int]], completions: list[tuple[list[int], list[int]]]) -> Any:
    return [naive_logps(loaded.model, p, ids) for p, both in zip(prompts, completions, strict=True) for ids in both]


COMPLETIONS = [([7, 9, 2], [11] * 40), ([2], [2]), ([30, 31], [5])]


@pytest.mark.parametrize("system", ["Be kind.", None])
def test_face_scorer_is_the_naive_score(shared_model: LoadedModel, system: str | None) -> None:
    """Very different lengths in one batch, completions of one token, and a conversation of three turns."""
    scorer = scorer_of(shared_model, system)
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}]
    prompts = [
        scorer.prompt_ids([{"role": "user", "content": "x"}]),
        scorer.prompt_ids([{"role": "user", "content": LONG}]),
        scorer.prompt_ids(turns),
    ]
    assert scorer._prefix, "the tests below would not see the shared prefix"
    assert all(ids[: len(scorer._prefix)] == scorer._prefix for ids in prompts)
    close(scorer.score(prompts, COMPLETIONS), naive(shared_model, prompts, COMPLETIONS))


@pytest.mark.parametrize("system", ["Be kind.", None])
def test_two_passes_are_the_naive_score(
    shared_model: LoadedModel, system: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What models get that cannot read packed rows, on one that can."""
    monkeypatch.setattr(face_scorer, "can_pack", lambda model: False)
    test_face_scorer_is_the_naive_score(shared_model, system)
    test_all_completions_of_one_token(shared_model)


def test_a_batch_is_split_where_padding_would_cost(shared_model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two forward passes in place of one, and every score in its own place."""
    scorer = scorer_of(shared_model, "Be kind.")
    prompts = [scorer.prompt_ids([{"role": "user", "content": text}]) for text in ("x", LONG, "the dog")]
    monkeypatch.setattr(face_scorer, "ENOUGH_TOKENS", 60)
    passes = []
    decoder = shared_model.model.get_decoder()
    watch = decoder.register_forward_pre_hook(lambda *call: passes.append(call[2]["input_ids"].shape), with_kwargs=True)
    scores = scorer.score(prompts, COMPLETIONS)
    watch.remove()
    assert [rows for rows, _ in passes] == [1, 2]
    close(scores, naive(shared_model, prompts, COMPLETIONS))


def test_rows_alike_by_hand() -> None:
    """Longest first. 600 + 590 tokens are enough, and padding 300 to 600 would make 1,800 of 1,490, over 1.1 ×; after
    that 300 and 20 are too few to be split.
    """
    assert list(_alike([20, 600, 300, 590])) == [[1, 3], [2, 0]]
    assert list(_alike([7])) == [[0]]
    assert list(_alike([600] * 4)) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("other", ["another prompt", "the prefix and no more"])
def test_prompts_that_do_not_share_the_prefix(shared_model: LoadedModel, other: str) -> None:
    scorer = scorer_of(shared_model, "Be kind.")
    odd = [40, 41, 42] if other == "another prompt" else list(scorer._prefix)
    prompts = [*(scorer.prompt_ids([{"role": "user", "content": text}]) for text in ("x", LONG)), odd]
    close(scorer.score(prompts, COMPLETIONS), naive(shared_model, prompts, COMPLETIONS))


def test_all_completions_of_one_token(shared_model: LoadedModel) -> None:
    scorer = scorer_of(shared_model, "Be kind.")
    prompts = [scorer.prompt_ids([{"role": "user", "content": text}]) for text in ("x", "the dog")]
    completions = [([2], [9]), ([7], [2])]
    close(scorer.score(prompts, completions), naive(shared_model, prompts, completions))


def test_eight_pairs_at_once_are_eight_times_one(shared_model: LoadedModel) -> None:
    scorer = scorer_of(shared_model, "Be kind.")
    encoder = scorer.encoder
    pairs = some_pairs(8, seed=3)
    prompts = [scorer.prompt_ids(list(item.prompt)) for item in pairs]
    completions = [(encoder.completion(p.chosen, True).ids, encoder.completion(p.rejected, True).ids) for p in pairs]
    together = scorer.score(prompts, completions)
    one_by_one = [row for p, c in zip(prompts, completions, strict=True) for row in scorer.score([p], [c])]
    close(together, [row.double() for row in one_by_one])


def test_the_prefix_cache_is_not_used_up(shared_model: LoadedModel) -> None:
    scorer = scorer_of(shared_model, "Be kind.")
    prompts = [scorer.prompt_ids([{"role": "user", "content": LONG}])]
    first = scorer.score(prompts, COMPLETIONS[:1])
    assert all(a.equal(b) for a, b in zip(first, scorer.score(prompts, COMPLETIONS[:1]), strict=True))


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                      num_key_value_heads=2, sliding_window=24, max_position_embeddings=512, initializer_range=0.2),
        MptConfig(vocab_size=300, d_model=32, n_heads=4, n_layers=2, max_seq_len=512, initializer_range=0.2),
        GPTNeoConfig(vocab_size=300, hidden_size=32, num_heads=4, num_layers=2, attention_types=[[["local"], 2]],
                     window_size=24, max_position_embeddings=512, initializer_range=0.2),
    ],
    ids=["a sliding window", "distances in columns", "a window that its cache does not tell"],
)  # fmt: skip
def test_columns_that_a_model_counts_are_not_put_between_prefix_and_prompt(shared_model: LoadedModel, config) -> None:
    """In a window padding there would push the prefix out; ALiBi would take it for distance."""
    another_model_is_the_naive_score(shared_model, config)


RECURRENT = {"vocab_size": 300, "hidden_size": 32, "initializer_range": 0.2}


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(**RECURRENT, num_hidden_layers=2, state_size=4),
        JambaConfig(**RECURRENT, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4,
                    num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=1,
                    mamba_d_state=4, mamba_dt_rank=4),
        RecurrentGemmaConfig(**RECURRENT, num_hidden_layers=3, intermediate_size=48, num_attention_heads=4,
                             num_key_value_heads=1, lru_width=32, attention_window_size=24, logits_soft_cap=3.0),
        RwkvConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, context_length=512),
    ],
    ids=["a state alone", "states and keys", "states, a window and a cap", "a state that heeds no mask"],
)  # fmt: skip
def test_models_with_a_state_read_every_response_by_itself(shared_model: LoadedModel, config) -> None:
    another_model_is_the_naive_score(shared_model, config)


def another_model_is_the_naive_score(shared_model: LoadedModel, config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    loaded = replace(shared_model, model=model)
    scorer = scorer_of(loaded, "Be kind.")
    prompts = [scorer.prompt_ids([{"role": "user", "content": text}]) for text in ("x", LONG)]
    completions = COMPLETIONS[:2]
    close(scorer.score(prompts, completions), naive(loaded, prompts, completions))
