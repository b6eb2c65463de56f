"""Packed ≡ unpacked: one row a pair gives the loss, the gradients and the training of two."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import acquire, config, fresh_doctor, load, naive_logps, shaken, some_pairs, tensors
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, MistralConfig, Qwen3Config

from llmdoctor.baselines.genarm import GenARMTrainer
from llmdoctor.data.collate import RewardCollator
from llmdoctor.models.doctor import Doctor
from llmdoctor.models.loading import LoadedModel
from llmdoctor.models.packing import PackedPairs, can_pack
from llmdoctor.rewards.store import SIDES, RewardStore
from llmdoctor.tfpo.trainer import TFPOTrainer

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def store(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RewardStore:
    return acquire(load(tiny_folder), some_pairs(12), tmp_path_factory.mktemp("rewards") / "store", theta=0.1)


def of_kind(base: LoadedModel, model_config: Any) -> LoadedModel:
    """The tiny model's tokenizer on a random model of another architecture."""
    model_config.vocab_size = len(base.tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32, attn_implementation="eager")
    return replace(base, model=model.eval().requires_grad_(False))


def test_the_example_of_the_docstring() -> None:
    """Prompt 2, responses 3 and 1, one column of padding."""
    completion_mask = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    pairs = PackedPairs(torch.tensor([[1, 1, 1, 1, 1, 1, 0]]), completion_mask)
    assert pairs.segments.tolist() == [[1, 1, 2, 2, 2, 3, 0]]
    assert pairs.positions.tolist() == [[0, 1, 2, 3, 4, 2, 0]]
    assert pairs.states.tolist() == [[1, 2, 3, 4], [1, 5, 5, 5]]
    assert pairs.take(torch.tensor([[10, 11, 12, 13, 14, 15, 0]])).tolist() == [[11, 12, 13, 14], [11, 15, 15, 15]]
    low = torch.finfo(torch.float32).min
    seen = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 0],  # the rejected token sees the prompt and itself
        [1, 1, 0, 0, 0, 0, 1],  # padding sees something, so that no row of scores is empty
    ]
    bias = pairs.attention_bias(torch.float32)
    assert bias.shape == (1, 1, 7, 7)
    assert bias[0, 0].eq(0).long().tolist() == seen
    assert bias[0, 0][bias[0, 0] != 0].eq(low).all()


def test_a_packed_batch_is_the_same_batch(tiny_model: LoadedModel, store: RewardStore) -> None:
    """One row a pair, ids without gaps; all that is per response is bit for bit that of two rows."""
    rows = list(store.rows(5))
    encoder = fresh_doctor(tiny_model).encoder
    two, one = (RewardCollator(encoder, packed=packed)(rows) for packed in (False, True))
    assert two["input_ids"].shape[0] == 10
    assert one["input_ids"].shape[0] == 5
    for row, ids, mask in zip(rows, one["input_ids"], one["attention_mask"], strict=True):
        expected = [*encoder.prompt_ids(json.loads(row["prompt"])), *row["chosen_ids"], *row["rejected_ids"]]
        assert ids[: len(expected)].tolist() == expected
        assert mask.tolist() == [1] * len(expected) + [0] * (len(ids) - len(expected))
    assert int(one["attention_mask"].sum(-1).max()) == one["input_ids"].shape[1], "no column of padding alone"
    assert one["prompt_width"] is None
    for name in set(two) - {"input_ids", "attention_mask", "prompt_width"}:
        assert one[name].equal(two[name]), name


@pytest.mark.parametrize(("prompt", "response", "packs"), [(50, 50, True), (50, 256, False), (300, 256, True)])
def test_long_responses_behind_short_prompts_keep_their_rows(
    tiny_model: LoadedModel, prompt: int, response: int, packs: bool
) -> None:
    """Tokens × (1 + columns / 1,000) of one pair: 150 × 1.15 < 200 × 1.1; 562 × 1.562 = 878 > 612 × 1.306 = 799;
    812 × 1.812 = 1,471 < 1,112 × 1.556 = 1,730.
    """
    collator = RewardCollator(fresh_doctor(tiny_model).encoder, max_prompt_length=prompt, packed=True)
    row = {f"{side}_{name}": [5] * response for side in SIDES for name in ("ids", "rewards")}
    row |= {
        "prompt": json.dumps([{"role": "user", "content": "x" * 400}]),
        "chosen_terminal": 1,
        "rejected_terminal": 1,
    }
    batch = collator([row])
    assert (batch["prompt_width"] is None) == packs
    assert batch["input_ids"].shape == ((1, prompt + 2 * response) if packs else (2, prompt + response))


def loss_and_gradients(
    doctor: Doctor, trainer: TFPOTrainer, inputs: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    doctor.zero_grad(set_to_none=True)
    loss = trainer.compute_loss(doctor.eval(), inputs)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in doctor.named_parameters() if p.grad is not None}


def assert_packed_is_unpacked(doctor: Doctor, store: RewardStore, folder: Path, **options: Any) -> None:
    trainer = TFPOTrainer(doctor, config(folder, value_coef=1.0, value_margin=2.0, **options), store.dataset())
    assert trainer.data_collator.packed
    rows = [trainer.train_dataset[index] for index in range(12)]
    unpacked = copy.copy(trainer.data_collator)
    unpacked.packed = False
    packed = trainer.data_collator(rows)
    assert packed["prompt_width"] is None
    loss, gradients = loss_and_gradients(doctor, trainer, packed)
    expected, slow = loss_and_gradients(doctor, trainer, unpacked(rows))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert gradients.keys() == slow.keys()
    assert len(slow) > 10
    for name, gradient in slow.items():
        assert gradient.abs().max() > 0, name
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=2e-5 * scale, msg=name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("lora", [True, False])
def test_loss_and_gradients_are_those_of_two_rows(
    tiny_folder: Path, store: RewardStore, tmp_path: Path, lora: bool, attention: str
) -> None:
    """Twelve pairs with prompts and responses of very different lengths, both pads at work, float32."""
    lengths = [[len(row[f"{side}_ids"]) for row in store.rows()] for side in SIDES]
    assert min(len(set(side)) for side in lengths) > 4
    doctor = shaken(fresh_doctor(load(tiny_folder), lora=lora, value_hidden=4))
    doctor.causal_lm.set_attn_implementation(attention)
    assert_packed_is_unpacked(doctor, store, tmp_path)


def test_cut_prompts_and_lambda(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    doctor = shaken(fresh_doctor(load(tiny_folder)))
    assert_packed_is_unpacked(doctor, store, tmp_path, max_prompt_length=5, subtb_lambda=0.9)


@pytest.mark.parametrize(
    "other",
    [Qwen3Config(**SIZES, **GROUPED), GPTNeoXConfig(**SIZES), MistralConfig(**SIZES, **GROUPED, sliding_window=None)],
    ids=lambda other: other.model_type,
)
def test_other_architectures_that_pack(tiny_folder: Path, store: RewardStore, tmp_path: Path, other: Any) -> None:
    base = of_kind(load(tiny_folder), copy.deepcopy(other))
    doctor = shaken(Doctor.from_base(base, lora={"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}))
    assert_packed_is_unpacked(doctor, store, tmp_path)


def test_log_probs_are_those_of_single_rows(tiny_folder: Path, store: RewardStore) -> None:
    """Against whole forward passes of one response each in float64 of the logits: the slow way, without our mask."""
    doctor = shaken(fresh_doctor(load(tiny_folder))).eval()
    rows = list(store.rows(6))
    batch = RewardCollator(doctor.encoder, packed=True)(rows)
    with torch.no_grad():
        logps, _ = doctor(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], None)
    for place, (side, row) in enumerate((side, row) for side in SIDES for row in rows):
        ids = row[f"{side}_ids"]
        slow = naive_logps(doctor.lm, doctor.encoder.prompt_ids(json.loads(row["prompt"])), ids)
        torch.testing.assert_close(logps[place, : len(ids)].double(), slow, rtol=0, atol=1e-4)
        assert logps[place, len(ids) :].eq(0).all()


def test_neither_response_sees_the_other(tiny_folder: Path) -> None:
    """Other chosen tokens leave every number of the rejected response as it was, bit for bit, and the reverse."""
    doctor = shaken(fresh_doctor(load(tiny_folder))).eval()
    prompt = list(range(30, 40))
    completion_mask = torch.ones(2, 4, dtype=torch.bool)

    @torch.no_grad()
    def outputs(chosen: list[int], rejected: list[int]) -> list[Tensor]:
        ids = torch.tensor([[*prompt, *chosen, *rejected]])
        return [torch.cat(both, dim=-1) for both in zip(*doctor(ids, ids.ne(-1), completion_mask, None), strict=True)]

    one, other = outputs([5, 6, 7, 8], [9, 10, 11, 12])
    changed = outputs([50, 60, 70, 80], [9, 10, 11, 12])
    assert changed[1].equal(other)
    assert not changed[0].allclose(one, atol=1e-3)
    changed = outputs([5, 6, 7, 8], [90, 100, 110, 120])
    assert changed[0].equal(one)
    assert not changed[1].allclose(other, atol=1e-3)
    swapped = outputs([9, 10, 11, 12], [5, 6, 7, 8])
    torch.testing.assert_close(swapped[1], one, rtol=0, atol=1e-5)
    torch.testing.assert_close(swapped[0], other, rtol=0, atol=1e-5)


def test_gradient_checkpointing_reads_packed_rows(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    results = []
    for checkpointing in (False, True):
        doctor = shaken(fresh_doctor(load(tiny_folder)))
        trainer = TFPOTrainer(doctor, config(tmp_path), store.dataset())
        if checkpointing:
            doctor.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inputs = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
        doctor.train()
        trainer.compute_loss(doctor, inputs).backward()
        results.append({name: p.grad for name, p in doctor.named_parameters() if p.grad is not None})
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient)


def test_training_packed_ends_where_training_unpacked_ends(
    tiny_folder: Path, store: RewardStore, tmp_path: Path
) -> None:
    """Twelve pairs in batches of 5, 5 and 2, two epochs; held-out figures as well."""
    ends, figures = [], []
    for packed in (True, False):
        doctor = fresh_doctor(load(tiny_folder))
        # Adam divides tiny gradients by their own size, which would turn rounding into whole steps.
        options = {"per_device_train_batch_size": 5, "optim": "sgd", "learning_rate": 0.1}
        trainer = TFPOTrainer(doctor, config(tmp_path / str(packed), **options), store.dataset(), store.dataset())
        trainer.data_collator.packed = packed
        trainer.train()
        ends.append(tensors(doctor))
        figures.append(trainer.evaluate())
    fresh = tensors(fresh_doctor(load(tiny_folder)))
    moved = max(float((ends[0][name] - fresh[name]).abs().max()) for name in fresh)
    assert moved > 1e-3
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=0, atol=1e-3 * moved)
    for name in ("eval_loss", "eval_margin", "eval_chosen_reward", "eval_preference_accuracy"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=1e-3, abs=1e-5), name


def test_genarm_trains_on_packed_rows_too(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    doctor = shaken(fresh_doctor(load(tiny_folder)))
    trainer = GenARMTrainer(doctor, config(tmp_path), store.dataset(), beta=0.05)
    rows = [trainer.train_dataset[index] for index in range(6)]
    losses = []
    for packed in (True, False):
        trainer.data_collator.packed = packed
        losses.append(float(trainer.compute_loss(doctor.eval(), trainer.data_collator(rows)).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("other", "packs"),
    [
        (MistralConfig(**SIZES, **GROUPED, sliding_window=None), True),
        (MistralConfig(**SIZES, **GROUPED, sliding_window=16), False),
        (GPT2Config(n_embd=32, n_layer=2, n_head=4), False),
    ],
    ids=["full attention", "sliding window", "learned positions"],
)
def test_which_models_pack(tiny_folder: Path, store: RewardStore, tmp_path: Path, other: Any, packs: bool) -> None:
    """A sliding window would count the chosen response's columns; such a model trains on two rows a pair."""
    base = of_kind(load(tiny_folder), copy.deepcopy(other))
    assert can_pack(base.model) == packs
    doctor = Doctor.from_base(base, lora={"r": 2, "target_modules": "all-linear"})
    trainer = TFPOTrainer(doctor, config(tmp_path, max_steps=1), store.dataset())
    assert trainer.data_collator.packed == packs
    trainer.train()


def test_attention_kernels_without_a_mask_do_not_pack(tiny_model: LoadedModel) -> None:
    for attention, packs in (("eager", True), ("sdpa", True), ("flash_attention_2", False), ("flex_attention", False)):
        tiny_model.model.config._attn_implementation = attention
        assert can_pack(tiny_model.model) == packs
