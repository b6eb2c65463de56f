"""GenARM on the trainer of stage 2: its loss, what it trains, the folder and its guard."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import acquire, config, fresh_doctor, naive_logps, shaken, some_pairs, tensors

from llmdoctor.baselines.genarm import BETA, GenARMTrainer, genarm_loss, train_genarm
from llmdoctor.baselines.implicit import accuracy, implicit_rewards
from llmdoctor.baselines.training import BaselineOptions
from llmdoctor.data.chat import ChatEncoder
from llmdoctor.decoding.guides import load_guide
from llmdoctor.errors import FingerprintMismatch, TrainingDiverged
from llmdoctor.models.doctor import Doctor, DoctorConfig
from llmdoctor.models.loading import LoadedModel, load_model
from llmdoctor.rewards.store import SIDES, RewardStore
from llmdoctor.tfpo.checkpoints import last_checkpoint


def load(folder: Path, dtype: str = "float32") -> LoadedModel:
    return load_model(str(folder), dtype=dtype, device="cpu")


@pytest.fixture(scope="module")
def store(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RewardStore:
    return acquire(load(tiny_folder), some_pairs(12), tmp_path_factory.mktemp("rewards") / "store")


OPTIONS = BaselineOptions(lora_rank=2, eval_fraction=0.25, batch_pairs=3, learning_rate=1e-2)


def test_the_loss_by_hand() -> None:
    """β = 0.5: a margin of 2 gives −log σ(1) = log(1 + e⁻¹) = 0.313262; none gives log 2; −2000 is linear, 1000."""
    chosen = torch.tensor([-3.0, -4.0, -2000.0], dtype=torch.float64)
    rejected = torch.tensor([-5.0, -4.0, 0.0], dtype=torch.float64)
    assert genarm_loss(chosen, rejected, 0.5).tolist() == pytest.approx([0.313262, math.log(2), 1000.0], rel=1e-5)


def test_the_trainers_loss_is_the_papers(
    tiny_folder: Path, tiny_model: LoadedModel, store: RewardStore, tmp_path: Path
) -> None:
    """−log σ(β_r (Σ log π_r(y⁺) − Σ log π_r(y⁻))), sums not means, no reference; from single rows in float64."""
    doctor = shaken(fresh_doctor(load(tiny_folder)))
    trainer = GenARMTrainer(doctor, config(tmp_path), store.dataset(), beta=0.02)
    encoder = ChatEncoder.for_model(tiny_model.model, tiny_model.tokenizer)
    losses = []
    for row in store.rows(5):
        prompt = encoder.prompt_ids(json.loads(row["prompt"]))
        totals = [float(naive_logps(doctor.lm, prompt, row[f"{side}_ids"]).sum()) for side in SIDES]
        losses.append(math.log1p(math.exp(-0.02 * (totals[0] - totals[1]))))
    assert max(losses) - min(losses) > 0.1
    batch = trainer.data_collator([store.dataset()[index] for index in range(5)])
    assert "ref_logps" not in trainer.data_collator([trainer.train_dataset[0]]), "no reference was computed"
    doctor.eval()
    with torch.no_grad():
        assert float(trainer.compute_loss(doctor, batch)) == pytest.approx(sum(losses) / 5, rel=1e-5)


def test_only_the_adapter_is_trained(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    """In bfloat16: base bits and the value head stay, V is 1 everywhere, the adapter moves in float32."""
    base = load(tiny_folder, "bfloat16")
    before = tensors(base.model)
    output = train_genarm(base, store, tmp_path / "arm", OPTIONS)
    doctor = Doctor.from_pretrained(output, base=load(tiny_folder, "bfloat16"))
    assert doctor.doctor_config.training["beta"] == BETA
    after = tensors(base.model)
    plain = {name.replace("base_layer.", ""): value for name, value in after.items() if "lora_" not in name}
    assert all(plain[name].equal(before[name]) for name in before)
    adapter = {name: value for name, value in after.items() if "lora_B" in name}
    assert len(adapter) == 7
    assert all(value.dtype == torch.float32 and value.abs().sum() > 0 for value in adapter.values())
    assert not doctor.value_head(torch.randn(3, 32)).any()


def test_it_learns_and_writes_a_guide(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    output = train_genarm(load(tiny_folder), store, tmp_path / "arm", replace(OPTIONS, epochs=20, beta=0.2))
    stored = DoctorConfig.load(output)
    assert (stored.training["method"], stored.training["beta"]) == ("genarm", 0.2)
    assert (stored.metrics["train_pairs"], stored.metrics["held_out_pairs"]) == (9, 3)
    rows = list(store.rows())
    rewards = implicit_rewards(output, rows, base=load(tiny_folder))
    assert rewards[0].chosen.max() < 0, "log-probs, not log-ratios"
    untrained = implicit_rewards(fresh_doctor(load(tiny_folder)), rows, reference=False)
    assert accuracy(rewards[:9]) > accuracy(untrained[:9])
    gained = [sum(a.totals[0] - a.totals[1] for a in side[:9]) for side in (untrained, rewards)]
    assert gained[1] > gained[0] + 9
    assert accuracy(rewards[9:]) == pytest.approx(stored.metrics["preference_accuracy"])
    guide = load_guide(output, load(tiny_folder), form="product", dtype="float32")
    assert guide.reference is None
    assert (guide.name, stored.rewards_fingerprint) == ("kind", store.fingerprint)


def test_it_resumes_and_is_reused(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    """Cut within an epoch, it ends with the bits of an uncut run; finished, it is taken; other settings are refused."""
    whole = train_genarm(load(tiny_folder), store, tmp_path / "whole", OPTIONS)
    folder = tmp_path / "cut"

    class Cut(Exception):
        pass

    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4:
                raise Cut

    with pytest.raises(Cut):
        train_genarm(load(tiny_folder), store, folder, OPTIONS, callbacks=[Stop()])
    assert last_checkpoint(folder / "checkpoints") == folder / "checkpoints" / "checkpoint-4"
    assert not (folder / "doctor.json").exists()
    with pytest.raises(FingerprintMismatch, match=r"\(seed: stored 0, now 1\)"):
        train_genarm(load(tiny_folder), store, folder, replace(OPTIONS, seed=1))
    train_genarm(load(tiny_folder), store, folder, OPTIONS)
    adapter = "adapter/adapter_model.safetensors"
    assert (folder / adapter).read_bytes() == (whole / adapter).read_bytes()
    assert DoctorConfig.load(folder) == DoctorConfig.load(whole)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert train_genarm(load(tiny_folder), store, folder, OPTIONS) == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(FingerprintMismatch, match=r"\(beta: stored .*, now 1\.0\)\. Give the settings"):
        train_genarm(load(tiny_folder), store, folder, replace(OPTIONS, beta=1.0))


def test_it_stops_when_it_diverges(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match="training diverged at step"):
        train_genarm(load(tiny_folder), store, tmp_path / "arm", replace(OPTIONS, learning_rate=1e30, epochs=9))
