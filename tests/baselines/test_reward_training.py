"""A reward model by TRL: our ids, read at their last token, TRL's loss, and a folder that is read back."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import acquire, some_pairs, tensors
from transformers import TrainerCallback

from llmdoctor.baselines.reward_training import reward_trainer, train_reward_model
from llmdoctor.baselines.training import BaselineOptions
from llmdoctor.data.chat import ChatEncoder
from llmdoctor.errors import FingerprintMismatch, TrainingDiverged, UserError
from llmdoctor.models.loading import LoadedModel, load_model
from llmdoctor.models.reward_model import RewardModelConfig, load_reward_model
from llmdoctor.rewards.store import SIDES, RewardStore
from llmdoctor.tfpo.checkpoints import last_checkpoint

pytest.importorskip("trl")


def load(folder: Path, dtype: str = "float32") -> LoadedModel:
    return load_model(str(folder), dtype=dtype, device="cpu")


@pytest.fixture(scope="module")
def store(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RewardStore:
    return acquire(load(tiny_folder), some_pairs(12), tmp_path_factory.mktemp("rewards") / "store")


OPTIONS = BaselineOptions(lora_rank=2, eval_fraction=0.25, batch_pairs=3, learning_rate=1e-2)


def responses(base: LoadedModel, rows: Any) -> dict[str, list[list[int]]]:
    encoder = ChatEncoder.for_model(base.model, base.tokenizer)
    return {
        side: [encoder.prompt_ids(json.loads(row["prompt"])) + list(row[f"{side}_ids"]) for row in rows]
        for side in SIDES
    }


def end_of_turn_pads(base: LoadedModel) -> LoadedModel:
    """The tokenizer pads with the end-of-turn token, as SmolLM2's does."""
    base.tokenizer.pad_token = base.tokenizer.eos_token
    return base


def test_trls_loss_is_bradley_terry_at_the_last_token(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    """−log σ(r⁺ − r⁻), r = score · hidden state of the very last id, the end-of-turn token where there is one.

    From single unpadded rows; the padding token is the end-of-turn token.
    """
    base = end_of_turn_pads(load(tiny_folder))
    trainer = reward_trainer(base, store.dataset(), OPTIONS, tmp_path)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    rows = list(store.rows(5))
    assert {row["chosen_terminal"] for row in rows} == {True, False}
    classifier = trainer.model.get_base_model()
    weight = classifier.score.modules_to_save["default"].weight[0]
    sides = responses(base, rows)

    @torch.no_grad()
    def reward(ids: list[int]) -> float:
        hidden = classifier.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state
        return float(hidden[0, -1].double() @ weight.double())

    margins = [reward(one) - reward(other) for one, other in zip(*(sides[side] for side in SIDES), strict=True)]
    expected = [math.log1p(math.exp(-margin)) for margin in margins]
    assert max(expected) - min(expected) > 0.01
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(5)])
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
    assert float(loss) == pytest.approx(sum(expected) / 5, rel=1e-4)


def test_the_ids_that_reach_the_model_are_the_stores(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    base = end_of_turn_pads(load(tiny_folder))
    trainer = reward_trainer(base, store.dataset(), replace(OPTIONS, epochs=1), tmp_path)
    sides = responses(base, list(store.rows()))
    seen: list[list[int]] = []

    def watch(_: Any, __: Any, call: Any) -> None:
        rows = zip(call["input_ids"].tolist(), call["attention_mask"].tolist(), strict=True)
        assert trainer.model.config.pad_token_id not in {ids[-1] for ids in sides["chosen"] + sides["rejected"]}
        seen.extend([token for token, real in zip(ids, mask, strict=True) if real] for ids, mask in rows)

    handle = trainer.model.register_forward_pre_hook(watch, with_kwargs=True)
    trainer.train()
    handle.remove()
    assert sorted(seen) == sorted(sides["chosen"] + sides["rejected"])


def test_the_score_learns_in_float32_on_a_bfloat16_base(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    base = load(tiny_folder, "bfloat16")
    before = tensors(base.model)
    trainer = reward_trainer(base, store.dataset(), OPTIONS, tmp_path)
    started = tensors(trainer.model)
    trained = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
    # Rank 2 on every linear layer of the upper half: 1 layer × 7 modules × (A, B); and the score.
    assert len(trained) == 15
    assert set(trained.values()) == {torch.float32}
    trainer.train()
    after = tensors(trainer.model)
    score = next(name for name in trained if "score" in name)
    assert not after[score].equal(started[score])
    plain = {name.replace("base_layer.", ""): value for name, value in tensors(base.model).items()}
    assert all(plain[name].equal(value) for name, value in before.items())


def test_it_learns_and_is_read_back(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    """Trained pairs are told apart by what `load_reward_model` reads, and the held-out figures are its figures."""
    options = replace(OPTIONS, epochs=12)
    output = train_reward_model(end_of_turn_pads(load(tiny_folder)), store, tmp_path / "rm", options)
    config = RewardModelConfig.load(output)
    assert config.training["method"] == "reward_model"
    assert "beta" not in config.training
    assert (config.metrics["train_pairs"], config.metrics["held_out_pairs"]) == (9, 3)
    model = load_reward_model(output, base=load(tiny_folder))
    rows = list(store.rows())
    prompts = [model.encoder.prompt_ids(json.loads(row["prompt"])) for row in rows]
    chosen, rejected = (model.score_ids(prompts, [row[f"{side}_ids"] for row in rows]) for side in SIDES)
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    assert all(margin > 0 for margin in margins[:9])
    assert sum(margins[9:]) / 3 == pytest.approx(config.metrics["margin"], rel=1e-3, abs=1e-4)
    assert sum(chosen[9:]) / 3 == pytest.approx(config.metrics["chosen_reward"], rel=1e-3, abs=1e-4)
    accuracy = sum(margin > 0 for margin in margins[9:]) / 3
    assert accuracy == pytest.approx(config.metrics["preference_accuracy"])


class Cut(Exception):
    """The run is cut here."""


class CutAtStep4(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 4:
            raise Cut


def test_it_resumes_and_is_reused(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    """Cut within an epoch, it ends with the bits of an uncut run; finished, it is taken; other settings are refused."""
    whole = train_reward_model(load(tiny_folder), store, tmp_path / "whole", OPTIONS)
    folder = tmp_path / "cut"
    with pytest.raises(Cut):
        train_reward_model(load(tiny_folder), store, folder, OPTIONS, callbacks=[CutAtStep4()])
    assert last_checkpoint(folder / "checkpoints") == folder / "checkpoints" / "checkpoint-4"
    train_reward_model(load(tiny_folder), store, folder, OPTIONS)
    adapter = "adapter/adapter_model.safetensors"
    assert (folder / adapter).read_bytes() == (whole / adapter).read_bytes()
    assert RewardModelConfig.load(folder) == RewardModelConfig.load(whole)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert train_reward_model(load(tiny_folder), store, folder, OPTIONS) == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(FingerprintMismatch, match=r"\(epochs: stored 2.0, now 3\)\. Give the settings"):
        train_reward_model(load(tiny_folder), store, folder, replace(OPTIONS, epochs=3))


def test_bad_input(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a reward model has no beta, got 0\.1; leave it None"):
        train_reward_model(load(tiny_folder), store, tmp_path / "rm", replace(OPTIONS, beta=0.1))
    with pytest.raises(UserError, match="give the reward_model baseline a folder of its own"):
        train_reward_model(load(tiny_folder), store, store.folder, OPTIONS)
    with pytest.raises(TrainingDiverged, match="loss or gradient is not finite"):
        train_reward_model(load(tiny_folder), store, tmp_path / "rm", replace(OPTIONS, learning_rate=1e30, epochs=9))
    assert not (tmp_path / "rm" / "reward_model.json").exists()
    without = replace(OPTIONS, eval_fraction=0.0)
    output = train_reward_model(load(tiny_folder), store, tmp_path / "all", without)
    assert RewardModelConfig.load(output).metrics == {"train_pairs": 12.0, "held_out_pairs": 0.0}
