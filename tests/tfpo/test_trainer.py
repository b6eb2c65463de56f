"""Stage 2: the loss against float64 double loops, real training, and what survives a kill or a divergence."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tests.tiny import LORA, acquire, config, fresh_doctor, load, naive_logps, pair, shaken, some_pairs, tensors
from tests.twoprocs import in_two_processes
from torch import Tensor

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.data.collate import RewardCollator
from llmdoctor.errors import TrainingDiverged, UserError
from llmdoctor.models.doctor import Doctor
from llmdoctor.models.loading import LoadedModel
from llmdoctor.rewards.store import SIDES, RewardStore
from llmdoctor.tfpo.config import TFPOConfig
from llmdoctor.tfpo.trainer import TFPOTrainer, _pair_value_loss, preference_metrics, with_reference


@pytest.fixture(scope="module")
def store(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RewardStore:
    return acquire(load(tiny_folder), some_pairs(12), tmp_path_factory.mktemp("rewards") / "store", theta=0.1)


def trainer_of(doctor: Doctor, folder: Path, dataset: Any, **options: Any) -> TFPOTrainer:
    return TFPOTrainer(doctor, config(folder, **options), dataset)


@torch.no_grad()
def slow_states(doctor: Doctor, base: LoadedModel, row: dict[str, Any], side: str) -> dict[str, Tensor]:
    """log π̂, log π_ref [L] and log V [N] of one response in float64: whole forward passes of one row."""
    encoder = ChatEncoder.for_model(base.model, base.tokenizer)
    prompt, ids = encoder.prompt_ids(json.loads(row["prompt"])), row[f"{side}_ids"]
    hidden = doctor.causal_lm.get_decoder()(input_ids=torch.tensor([prompt + ids])).last_hidden_state[0]
    return {
        "logps": naive_logps(doctor.lm, prompt, ids),
        "ref": naive_logps(base.model, prompt, ids),
        "log_v": doctor.value_head(hidden[len(prompt) - 1 :]).double(),
        "rewards": torch.tensor(row[f"{side}_rewards"], dtype=torch.float64),
    }


def slow_balance(states: dict[str, Tensor], terminal: bool, args: TFPOConfig) -> float:
    """Weighted mean over all m < n of [log Q_n V_n − log Q_m V_m − Σ log π̂]², by definition."""
    length = len(states["logps"])
    if args.objective == "none":
        return 0.0
    if args.objective == "squared_error":
        return float((states["logps"] - states["ref"] - states["rewards"] / args.eta).square().mean())
    log_v = states["log_v"].clone()
    if args.terminal_anchor and terminal:
        log_v[-1] = 0.0
    total = weights = 0.0
    for m in range(length + 1):
        for n in range(m + 1, length + 1):
            log_q = states["rewards"][m:n].sum() / args.eta
            if args.reference_anchor:
                log_q = log_q + states["ref"][m:n].sum()
            residual = log_q + log_v[n] - log_v[m] - states["logps"][m:n].sum()
            # λ = 0 is the limit: single steps alone.
            weight = args.subtb_lambda ** (n - m) if args.subtb_lambda else float(n == m + 1)
            total, weights = total + weight * float(residual) ** 2, weights + weight
    return total / weights / (length if args.length_normalize else 1)


def slow_value(chosen: Tensor, rejected: Tensor, row: dict[str, Any], margin: float) -> float:
    """Hinge on V after the first token at which the two responses part, if both have one there."""
    ids = [row[f"{side}_ids"] for side in SIDES]
    apart = next((t for t, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), None)
    if apart is None:
        return 0.0
    return max(0.0, margin - float(chosen[apart + 1] - rejected[apart + 1]))


def slow_loss(doctor: Doctor, base: LoadedModel, rows: list[dict[str, Any]], args: TFPOConfig) -> float:
    """Mean over responses of the balance, plus λ_value and λ_leaf times the means over pairs of hinge and leaf loss."""
    balance, value, leaf = [], [], []
    for row in rows:
        states = {side: slow_states(doctor, base, row, side) for side in SIDES}
        balance += [slow_balance(states[side], row[f"{side}_terminal"], args) for side in SIDES]
        value.append(slow_value(states["chosen"]["log_v"], states["rejected"]["log_v"], row, args.value_margin))
        chosen, rejected = (float((states[side]["logps"] - states[side]["ref"]).sum()) for side in SIDES)
        leaf.append(math.log1p(math.exp(-args.leaf_beta * (chosen - rejected))))
    pairs = len(rows)
    return sum(balance) / len(balance) + args.value_coef * sum(value) / pairs + args.leaf_coef * sum(leaf) / pairs


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "lambda 0.8": {"subtb_lambda": 0.8},
    "lambda 0": {"subtb_lambda": 0.0},
    "eta": {"eta": 2.0},
    "no value loss": {"value_coef": 0.0},
    "value margin": {"value_coef": 3.0, "value_margin": 2.0},
    "no reference anchor": {"reference_anchor": False},
    "no terminal anchor": {"terminal_anchor": False},
    "no leaf loss": {"leaf_coef": 0.0},
    "leaf beta": {"leaf_beta": 1.0},
    "as the paper writes it": {"reference_anchor": False, "terminal_anchor": False, "leaf_coef": 0.0},
    "whole lengths": {"length_normalize": False},
    "no flow": {"objective": "squared_error"},
    "no balance": {"objective": "none"},
    "value alone": {"objective": "none", "leaf_coef": 0.0},
}


def test_the_loss_is_the_double_loop_and_switches_say_what_they_do(
    tiny_folder: Path, store: RewardStore, tmp_path: Path
) -> None:
    """Every variant equals its own definition, and no two variants are the same number."""
    base = load(tiny_folder)
    doctor = shaken(fresh_doctor(load(tiny_folder), value_hidden=4))
    rows = list(store.rows())[:5]
    extra = dict(rows[0])
    for name in ("ids", "tokens", "rewards", "pos_logps", "neg_logps"):
        extra[f"rejected_{name}"] = rows[0][f"chosen_{name}"][:2]  # a prefix: the pair never parts
    extra["rejected_terminal"] = False
    rows.append(extra)
    assert {row["chosen_terminal"] for row in rows} == {True, False}
    assert any(slow_value(*(slow_states(doctor, base, r, s)["log_v"] for s in SIDES), r, 0.5) for r in rows)
    dataset = Dataset.from_list(rows)
    seen = {}
    for name, options in VARIANTS.items():
        # At its default weight the leaf loss is most of the number, and other switches would hardly show.
        trainer = trainer_of(doctor, tmp_path, dataset, **{"leaf_coef": 0.5, **options})
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
        with torch.no_grad():
            loss = float(trainer.compute_loss(doctor.eval(), inputs))
        assert loss == pytest.approx(slow_loss(doctor, base, rows, trainer.args), rel=1e-4), name
        seen[name] = loss
    values = sorted(seen.values())
    assert min(b - a for a, b in itertools.pairwise(values)) > 1e-4, seen


def test_a_batch_is_the_mean_of_its_pairs(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    """Padded ≡ unpadded."""
    doctor = shaken(fresh_doctor(load(tiny_folder)))
    trainer = trainer_of(doctor, tmp_path, store.dataset())
    rows = [trainer.train_dataset[i] for i in range(12)]
    assert len({len(row["chosen_ids"]) for row in rows}) > 4
    with torch.no_grad():
        together = trainer.compute_loss(doctor.eval(), trainer.data_collator(rows))
        alone = torch.stack([trainer.compute_loss(doctor, trainer.data_collator([row])) for row in rows])
    torch.testing.assert_close(together, alone.mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("lora", [True, False])
def test_reference_is_the_untrained_doctor(tiny_folder: Path, store: RewardStore, lora: bool) -> None:
    """Row by row in the data's order, although it is computed by length; with LoRA also once it was trained."""
    base = load(tiny_folder)
    doctor = fresh_doctor(load(tiny_folder), lora=lora)
    if lora:
        shaken(doctor)
    dataset = with_reference(doctor, store.dataset(), RewardCollator(doctor.encoder), 5)
    assert len(dataset) == 12
    for row in dataset:
        for side in SIDES:
            expected = slow_states(doctor, base, row, side)["ref"]
            torch.testing.assert_close(torch.tensor(row[f"{side}_ref_logps"]).double(), expected, rtol=0, atol=1e-4)


def test_untrained_implicit_rewards_are_zero(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    trainer = TFPOTrainer(fresh_doctor(load(tiny_folder)), config(tmp_path), store.dataset(), store.dataset())
    metrics = trainer.evaluate()
    assert metrics["eval_preference_accuracy"] == pytest.approx(0.5, abs=0.5)
    assert abs(metrics["eval_margin"]) < 1e-4


def test_only_the_adapters_own_dropout_is_on(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    """An untrained doctor in training is its reference, whose log-probs were computed without dropout."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "dropping"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "attention_dropout": 0.5}))
    doctor = Doctor.from_base(load(folder), lora={**LORA, "lora_dropout": 0.5})
    trainer = trainer_of(doctor, tmp_path, store.dataset())
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    inputs = [batch[name] for name in ("input_ids", "attention_mask", "completion_mask", "prompt_width")]
    doctor.train()
    mask = batch["completion_mask"]
    torch.testing.assert_close(doctor(*inputs)[0][mask], batch["ref_logps"][mask], rtol=0, atol=1e-4)
    shaken(doctor)
    one, other = doctor(*inputs)[0], doctor(*inputs)[0]
    assert float((one - other).detach().abs().max()) > 1e-2


def test_preference_metrics_by_hand() -> None:
    """Margins 2, −1, 0: one right, one wrong, one tie, which counts half; mean margin 1/3."""
    predictions = [[1.0, -1.0], [0.0, 1.0], [0.5, 0.5]]
    figures = preference_metrics(type("P", (), {"predictions": predictions})())
    assert figures["preference_accuracy"] == pytest.approx(0.5)
    assert figures["margin"] == pytest.approx(1 / 3)
    assert figures["chosen_reward"] == pytest.approx(0.5)
    assert figures["rejected_reward"] == pytest.approx(0.5 / 3)


def test_what_lies_elsewhere_than_it_is_trained_is_refused(
    tiny_folder: Path, store: RewardStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TFPOConfig, "device", torch.device("cuda", 0))
    with pytest.raises(UserError, match="the doctor is on cpu and would be moved to cuda"):
        trainer_of(fresh_doctor(load(tiny_folder)), tmp_path, store.dataset())


_PROCESS = """
import os, sys
from pathlib import Path
import torch
from tiny import config, fresh_doctor, load
from llmdoctor.errors import TrainingDiverged
from llmdoctor.rewards.store import RewardStore
from llmdoctor.tfpo.trainer import TFPOTrainer
torch.set_num_threads(1)
folder, store, output, bad, accumulated = sys.argv[1:]
settings = config(Path(output), per_device_train_batch_size=1, gradient_accumulation_steps=int(accumulated),
                  learning_rate=1e-3, max_steps=4, ddp_timeout=60)
trainer = TFPOTrainer(fresh_doctor(load(Path(folder))), settings, RewardStore.open(Path(store)).dataset())
own, calls = TFPOTrainer.training_step, []
def step(self, model, inputs, count=None):
    calls.append(1)
    if os.environ["RANK"] == bad and len(calls) == 1 + int(accumulated):
        inputs = {**inputs, "token_rewards": inputs["token_rewards"] * float("nan")}
    return own(self, model, inputs, count)
TFPOTrainer.training_step = step
try:
    trainer.train()
except TrainingDiverged as error:
    print(error)
    os._exit(7)
"""


@pytest.mark.parametrize(("bad", "accumulated"), [(0, 1), (1, 2)])
def test_processes_stop_together_where_one_diverges(
    tiny_folder: Path, store: RewardStore, tmp_path: Path, bad: int, accumulated: int
) -> None:
    """Else those that see nothing wrong would wait for the others, for hours, and nothing would be saved."""
    ended = in_two_processes(_PROCESS, tiny_folder, store.folder, tmp_path / "out", bad, accumulated)
    assert [status for status, _ in ended] == [7, 7], ended
    assert all("training diverged at step 2" in said for _, said in ended), ended
    assert list((tmp_path / "out").glob("checkpoint-*/trainer_state.json"))


def test_two_half_batches_accumulate_to_one(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    results = []
    for size, steps in ((4, 1), (2, 2)):
        doctor = fresh_doctor(load(tiny_folder))
        trainer_of(
            doctor,
            tmp_path / str(size),
            store.dataset(),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=3,
            lr_scheduler_type="constant",
            warmup_steps=0,
            # Adam divides tiny gradients by their own size, which would turn rounding into whole steps.
            optim="sgd",
            learning_rate=0.1,
        ).train()
        results.append(tensors(doctor))
    fresh = tensors(fresh_doctor(load(tiny_folder)))
    moved = max(float((results[0][name] - fresh[name]).abs().max()) for name in fresh)
    assert moved > 1e-3
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=0, atol=1e-3 * moved)


def test_a_batch_in_parts_is_the_batch(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    """Weights and log lines, to rounding, where batches are read whole, two pairs or so at once, and pair by pair."""
    ends, logs = [], []
    for most in (100_000, 150, 1):
        doctor = shaken(fresh_doctor(load(tiny_folder)))
        options = {
            "max_steps": 3,
            "learning_rate": 1e-2,
            "optim": "sgd",
            "logging_steps": 1,
            "max_tokens_at_once": most,
        }
        trainer = trainer_of(doctor, tmp_path / str(most), store.dataset(), **options)
        passes = []
        doctor.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        trainer.train()
        assert {100_000: len(passes) == 3, 150: 3 < len(passes) < 12, 1: len(passes) == 12}[most], (most, len(passes))
        ends.append(tensors(doctor))
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    assert len(logs[0]) == 3
    for end, log in zip(ends[1:], logs[1:], strict=True):
        for name, values in ends[0].items():
            torch.testing.assert_close(end[name], values, rtol=1e-4, atol=1e-6)
        for entry, whole in zip(log, logs[0], strict=True):
            assert {k: float(v) for k, v in entry.items()} == pytest.approx(
                {k: float(v) for k, v in whole.items()}, rel=1e-3, abs=1e-5
            )


def test_held_out_pairs_are_read_in_parts_to_the_same_figures(
    tiny_folder: Path, store: RewardStore, tmp_path: Path
) -> None:
    found, predicted = [], []
    for most in (100_000, 150, 1):
        doctor = shaken(fresh_doctor(load(tiny_folder)))
        sizes: list[int] = []
        settings = config(tmp_path / str(most), max_tokens_at_once=most, per_device_eval_batch_size=8)
        trainer = TFPOTrainer(doctor, settings, None, store.dataset())
        doctor.register_forward_pre_hook(lambda _, inputs, sizes=sizes: sizes.append(inputs[0].numel()))
        figures = trainer.evaluate()
        assert most == 1 or max(sizes) <= most
        assert most > 1 or len(sizes) == len(store)
        found.append({name: value for name, value in figures.items() if "time" not in name and "second" not in name})
        # In the order of the pairs, whatever was read together.
        predicted.append(trainer.predict(trainer.eval_dataset).predictions)
    for figures, rewards in zip(found[1:], predicted[1:], strict=True):
        assert figures == pytest.approx(found[0], rel=1e-4)
        np.testing.assert_allclose(rewards, predicted[0], rtol=1e-3, atol=1e-5)
    assert np.abs(predicted[0]).max() > 1e-3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_only_attention_that_keeps_scores_makes_long_rows_count_for_more(
    tiny_folder: Path, store: RewardStore, tmp_path: Path, attention: str
) -> None:
    """Tokens that just keep a limit are above it with their scores: read whole by one, in parts by the other."""
    doctor = shaken(fresh_doctor(load(tiny_folder)))
    doctor.causal_lm.set_attn_implementation(attention)
    # A single batch, however it is shuffled.
    rows = store.dataset().select(range(4))
    trainer = trainer_of(doctor, tmp_path, rows, max_steps=1, per_device_train_batch_size=4)
    sizes: list[int] = []
    doctor.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].numel()))
    whole = next(iter(trainer.get_train_dataloader()))["input_ids"].numel()
    trainer.args.max_tokens_at_once = whole
    trainer.train()
    assert (len(sizes) == 1) == (attention == "sdpa"), sizes
    assert max(sizes) <= whole


@pytest.mark.parametrize("lora", [True, False])
def test_it_learns_a_preference(tiny_folder: Path, tmp_path: Path, lora: bool) -> None:
    """Chosen responses speak of cats, rejected ones of dogs. Held-out pairs are told apart."""
    words = ["house", "mat", "ran", "sat", "how", "are", "you", "today", "zebra", "on"]
    pairs = [
        pair(
            f"cat {words[n % 10]} cat {words[n // 10 % 10]}",
            f"dog {words[n * 7 % 10]} dog {words[n // 5 % 10]}",
            f"{n}",
        )
        for n in range(48)
    ]
    store = acquire(load(tiny_folder), pairs, tmp_path / "rewards", theta=0.0)
    dataset = store.dataset()
    doctor = fresh_doctor(load(tiny_folder), lora=lora)
    args = config(
        tmp_path / "out",
        learning_rate=1e-2 if lora else 1e-3,
        per_device_train_batch_size=8,
        num_train_epochs=4,
    )
    trainer = TFPOTrainer(doctor, args, dataset.select(range(32)), dataset.select(range(32, 48)))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_preference_accuracy"] >= 0.9
    assert after["eval_loss"] < 0.7 * before["eval_loss"]
    assert after["eval_chosen_reward"] > 0.5 > -0.5 > after["eval_rejected_reward"]


def test_the_value_head_has_its_own_learning_rate(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    doctor = fresh_doctor(load(tiny_folder), value_hidden=2)
    options = {"learning_rate": 3e-4, "value_learning_rate": 7e-3, "weight_decay": 0.1, "warmup_steps": 0}
    trainer = trainer_of(doctor, tmp_path, store.dataset(), lr_scheduler_type="constant", max_steps=1, **options)
    trainer.train()
    rest, head = trainer.optimizer.param_groups
    assert (rest["lr"], head["lr"]) == (3e-4, 7e-3)
    assert (rest["weight_decay"], head["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in head["params"]} == {id(p) for p in doctor.value_head.parameters()}
    assert {id(p) for p in rest["params"]} == {id(p) for n, p in doctor.named_parameters() if "lora_" in n}
    # Adam's first step is the learning rate in size, wherever the gradient is not tiny.
    assert float(doctor.value_head.out.bias.detach().abs()) == pytest.approx(7e-3, rel=1e-3)


def test_several_gpus_in_one_process_are_refused(
    tiny_folder: Path, store: RewardStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DataParallel cuts [2B] rows in the middle: all chosen responses to one GPU, all rejected ones to the other."""
    monkeypatch.setattr(TFPOConfig, "n_gpu", property(lambda self: 2))
    with pytest.raises(UserError, match="2 GPUs in one process are not supported: start one process a GPU"):
        trainer_of(fresh_doctor(load(tiny_folder)), tmp_path, store.dataset())


STEADY = {"lr_scheduler_type": "constant", "warmup_steps": 0, "per_device_train_batch_size": 2}


def test_a_nan_reward_stops_and_keeps_the_weights_before(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    rows = list(store.rows())
    broken = [dict(row) for row in rows]
    broken[0]["chosen_rewards"] = [float("nan")] * len(rows[0]["chosen_rewards"])
    dataset = Dataset.from_list(rows)
    seed = next(s for s in range(20) if _place_of_row_0(tiny_folder, dataset, tmp_path, s) >= 2)
    doctor = fresh_doctor(load(tiny_folder))
    with pytest.raises(
        TrainingDiverged, match=r"training diverged at step \d+: loss or gradient is not finite"
    ) as caught:
        trainer_of(doctor, tmp_path / "broken", Dataset.from_list(broken), seed=seed, **STEADY).train()
    step = int(re.search(r"at step (\d+)", str(caught.value))[1])  # type: ignore[index]
    assert step >= 3
    folder = tmp_path / "broken" / f"checkpoint-{step - 1}"
    assert f"after step {step - 1}, are in {folder};" in str(caught.value)
    kept = Doctor.from_pretrained(folder, dtype="float32", device="cpu")
    expected = fresh_doctor(load(tiny_folder))
    trainer_of(expected, tmp_path / "sound", dataset, seed=seed, max_steps=step - 1, **STEADY).train()
    for name, tensor in tensors(expected).items():
        assert torch.isfinite(tensor).all()
        assert tensors(kept)[name].equal(tensor), name


def _place_of_row_0(tiny_folder: Path, dataset: Any, folder: Path, seed: int) -> int:
    """Number of the batch (from 0) that row 0 is in."""
    trainer = trainer_of(fresh_doctor(load(tiny_folder)), folder / "order", dataset, seed=seed, **STEADY)
    order = list(trainer._get_train_sampler())
    return int(order.index(0)) // 2


@pytest.mark.parametrize("lora", [True, False])
def test_a_learning_rate_that_explodes_keeps_weights_that_work(
    tiny_folder: Path, store: RewardStore, tmp_path: Path, lora: bool
) -> None:
    """The step that breaks the weights looks fine itself; what is kept are the weights before it, not its own."""
    doctor = fresh_doctor(load(tiny_folder), lora=lora)
    options = {**STEADY, "learning_rate": 1e25, "value_learning_rate": 1e25, "max_steps": 5}
    with pytest.raises(TrainingDiverged, match=r"diverged at step 2: .* after step 0, are in .*checkpoint-0;"):
        trainer_of(doctor, tmp_path / "out", store.dataset(), **options).train()
    kept = Doctor.from_pretrained(tmp_path / "out" / "checkpoint-0", dtype="float32", device="cpu")
    fresh = tensors(fresh_doctor(load(tiny_folder), lora=lora))
    assert all(fresh[name].equal(tensor) for name, tensor in tensors(kept).items())


@pytest.mark.parametrize(("terminal_anchor", "expected"), [(True, [0.5, 0.0]), (False, [0.5, 0.7])])
def test_value_loss_keeps_off_ends_that_the_anchor_pins(terminal_anchor: bool, expected: list[float]) -> None:
    """Pair 1 diverges at its first of two tokens: γ − (1.0 − 0.9) = 0.5 at γ = 0.6. Pair 2 diverges at its only token,
    which ends both responses: γ − (0.2 − 0.3) = 0.7, unless V is pinned there.
    """
    log_v = torch.tensor([[0.0, 1.0, 5.0], [0.0, 0.2, 0.0], [0.0, 0.9, 7.0], [0.0, 0.3, 0.0]])
    inputs = {
        "divergence": torch.tensor([0, 0]),
        "completion_mask": torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0]], dtype=torch.bool),
        "terminal": torch.tensor([True, True, True, True]),
    }
    torch.testing.assert_close(_pair_value_loss(log_v, inputs, 0.6, terminal_anchor), torch.tensor(expected))
