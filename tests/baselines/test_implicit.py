"""Implicit rewards against whole forward passes of single rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import acquire, fresh_doctor, load, naive_logps, pair, shaken, some_pairs

from llmdoctor.baselines.implicit import ImplicitReward, accuracy, held_out_metrics, implicit_rewards, reference_logps
from llmdoctor.data.chat import ChatEncoder
from llmdoctor.errors import UserError
from llmdoctor.models.loading import LoadedModel
from llmdoctor.rewards.store import SIDES, RewardStore


@pytest.fixture(scope="module")
def store(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RewardStore:
    return acquire(load(tiny_folder), some_pairs(9), tmp_path_factory.mktemp("rewards") / "store")


def slow(model: Any, plain: LoadedModel, row: dict[str, Any], side: str, reference: bool) -> torch.Tensor:
    prompt = ChatEncoder.for_model(plain.model, plain.tokenizer).prompt_ids(json.loads(row["prompt"]))
    logps = naive_logps(model, prompt, row[f"{side}_ids"])
    return logps - naive_logps(plain.model, prompt, row[f"{side}_ids"]) if reference else logps


@pytest.mark.parametrize(("method", "reference"), [("dpo", True), (None, True), ("genarm", False)])
def test_they_are_log_ratios_or_genarms_log_probs(
    tiny_folder: Path, tiny_model: LoadedModel, store: RewardStore, method: str | None, reference: bool
) -> None:
    """Batched, prompts shared, sorted by length: as row by row, in the order of the pairs, float32."""
    doctor = shaken(fresh_doctor(load(tiny_folder)))
    doctor.doctor_config.training = {"method": method} if method else {}
    doctor.train()
    rows = list(store.rows())
    heard: list[int] = []
    rewards = implicit_rewards(doctor, rows, batch_size=4, progress=heard.append)
    assert sum(heard) == len(rows)
    assert max(heard) == 4
    assert doctor.training, "the doctor is left as it was"
    assert len(rewards) == len(rows)
    for row, reward in zip(rows, rewards, strict=True):
        for side in SIDES:
            ours = getattr(reward, side)
            assert ours.dtype == np.float32
            assert ours.shape == (len(row[f"{side}_ids"]),)
            expected = slow(doctor.lm, tiny_model, row, side, reference)
            assert torch.from_numpy(ours).double() == pytest.approx(expected, abs=1e-4)
    forced = implicit_rewards(doctor, rows, reference=not reference)
    assert not np.allclose(forced[0].chosen, rewards[0].chosen)


def test_pairs_of_text_are_read_as_stage_1_reads_them(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    """The same pairs as text, as rows of the store, and from the doctor's folder."""
    doctor = shaken(fresh_doctor(load(tiny_folder)))
    doctor.save_pretrained(tmp_path / "doctor")
    from_rows = implicit_rewards(doctor, store.dataset())
    from_text = implicit_rewards(tmp_path / "doctor", some_pairs(9), base=load(tiny_folder))
    for one, other in zip(from_rows, from_text, strict=True):
        assert one.chosen == pytest.approx(other.chosen, abs=1e-5)
        assert one.rejected == pytest.approx(other.rejected, abs=1e-5)
    cut = implicit_rewards(doctor, some_pairs(9), max_completion_length=2)
    assert all(len(reward.chosen) <= 2 for reward in cut)


def test_guides_of_one_base_share_what_it_says(tiny_folder: Path, store: RewardStore) -> None:
    """Read once, its log-probs give each guide the very rewards that it has by itself."""
    doctors = [shaken(fresh_doctor(load(tiny_folder)), seed) for seed in (0, 1)]
    heard: list[int] = []
    references = reference_logps(doctors[0], store.rows(), progress=heard.append)
    assert sum(heard) == len(references) == len(store.dataset())
    for doctor in doctors:
        alone = implicit_rewards(doctor, store.rows())
        shared = implicit_rewards(doctor, store.rows(), references=references)
        for one, other in zip(alone, shared, strict=True):
            assert one.chosen == pytest.approx(other.chosen, abs=1e-6)
            assert one.rejected == pytest.approx(other.rejected, abs=1e-6)
    without = implicit_rewards(doctors[0], store.rows(), reference=False, references=references)
    assert not np.allclose(without[0].chosen, implicit_rewards(doctors[0], store.rows())[0].chosen)
    with pytest.raises(UserError, match="the reference's log-probs are of other pairs"):
        implicit_rewards(doctors[0], some_pairs(3), references=references)


def test_an_untrained_guide_has_no_opinion(tiny_folder: Path, store: RewardStore) -> None:
    """Log-ratios are exactly zero, so every pair is a tie and the accuracy one half."""
    doctor = fresh_doctor(load(tiny_folder))
    rewards = implicit_rewards(doctor, store.rows())
    assert all(not reward.chosen.any() and not reward.rejected.any() for reward in rewards)
    assert accuracy(rewards) == 0.5
    metrics = held_out_metrics(doctor, store.dataset())
    assert metrics == {"preference_accuracy": 0.5, "margin": 0.0, "chosen_reward": 0.0, "rejected_reward": 0.0}
    assert held_out_metrics(doctor, None) == {}


def test_accuracy_counts_sums_and_halves_ties() -> None:
    """Totals (3, 2) right, (1, 2) wrong, (1, 1) a tie, (−1, −2) right: 2.5 of 4."""

    def reward(chosen: list[float], rejected: list[float]) -> ImplicitReward:
        return ImplicitReward(np.array(chosen, dtype=np.float32), np.array(rejected, dtype=np.float32))

    pairs = [reward([1, 2], [2]), reward([1], [3, -1]), reward([0.5, 0.5], [1]), reward([-1], [-1, -1])]
    assert [one.totals for one in pairs] == [(3, 2), (1, 2), (1, 1), (-1, -2)]
    assert accuracy(pairs) == 2.5 / 4


def test_bad_input(tiny_folder: Path) -> None:
    whole = fresh_doctor(load(tiny_folder), lora=False)
    with pytest.raises(UserError, match="whose weights were all trained keeps no reference"):
        implicit_rewards(whole, some_pairs(1))
    with pytest.raises(UserError, match="whose weights were all trained keeps no reference"):
        reference_logps(whole, some_pairs(1))
    assert len(implicit_rewards(whole, some_pairs(1), reference=False)) == 1
    empty = pair("", "no", chosen_complete=False)
    with pytest.raises(UserError, match="pair 2 has an empty response that is not complete"):
        implicit_rewards(fresh_doctor(load(tiny_folder)), [*some_pairs(1), empty])
    assert implicit_rewards(fresh_doctor(load(tiny_folder)), []) == []
