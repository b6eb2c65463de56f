"""DPO by TRL: our ids, our LoRA, TRL's loss; a doctor's folder at the end, whatever happened in between."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.killing import JobServer, last_step
from tests.tiny import OTHER_CORPUS, acquire, byte_level, naive_logps, save_tiny, some_pairs, tensors

from llmdoctor.baselines import dpo, training
from llmdoctor.baselines.dpo import BETA, dpo_trainer, train_dpo
from llmdoctor.baselines.implicit import accuracy, implicit_rewards
from llmdoctor.baselines.training import BaselineOptions, token_rows
from llmdoctor.data.chat import ChatEncoder
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import load_guide
from llmdoctor.decoding.request import Request, SamplingParams
from llmdoctor.errors import FingerprintMismatch, TrainingDiverged, UserError
from llmdoctor.models.doctor import Doctor, DoctorConfig
from llmdoctor.models.loading import LoadedModel, load_model
from llmdoctor.rewards.store import SIDES, RewardStore
from llmdoctor.tfpo.options import DoctorOptions, lora_arguments

pytest.importorskip("trl")


def load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(str(folder), **{"dtype": "float32", "device": "cpu", **options})


@pytest.fixture(scope="module")
def store(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RewardStore:
    return acquire(load(tiny_folder), some_pairs(12), tmp_path_factory.mktemp("rewards") / "store")


OPTIONS = BaselineOptions(lora_rank=2, eval_fraction=0.25, batch_pairs=3, learning_rate=1e-2)


def prompt_of(base: LoadedModel, row: dict[str, Any]) -> list[int]:
    return ChatEncoder.for_model(base.model, base.tokenizer).prompt_ids(json.loads(row["prompt"]))


def shake(model: Any) -> None:
    """Random adapters in the place of trained ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def test_the_ids_that_reach_the_model_are_the_stores(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    """The trainer's own batches, all of an epoch, row by row: prompt without a face, then the stored completion."""
    base = load(tiny_folder)
    rows = list(store.rows())
    expected = {(tuple(prompt_of(base, row)), tuple(row[f"{side}_ids"])): side for row in rows for side in SIDES}
    trainer = dpo_trainer(base, store.dataset(), OPTIONS, BETA, tmp_path)
    batches, read = [], []
    collate = trainer.data_collator
    trainer.data_collator = lambda examples: batches.append(collate(examples)) or batches[-1]
    watch = base.model.get_decoder().register_forward_pre_hook(lambda *call: read.append(call[2]), with_kwargs=True)
    trainer.args.num_train_epochs = 1
    trainer.train()
    watch.remove()
    seen = []
    for batch, call in zip(batches, read, strict=True):
        assert call["input_ids"].equal(batch["input_ids"]), "the batch is what the decoder reads"
        assert call["attention_mask"].equal(batch["attention_mask"])
        columns = (batch[name].tolist() for name in ("input_ids", "attention_mask", "completion_mask"))
        for index, (ids, mask, completion) in enumerate(zip(*columns, strict=True)):
            length, begin = sum(mask), completion.index(1)
            assert completion == [0] * begin + [1] * (length - begin) + [0] * (len(ids) - length)
            response = (tuple(ids[:begin]), tuple(ids[begin:length]))
            assert expected[response] == SIDES[2 * index // len(batch["input_ids"])]
            seen.append(response)
    assert sorted(seen) == sorted(expected), "every response once an epoch, none changed, cut or left out"


def test_where_texts_are_long_gradients_are_added_up(
    tiny_folder: Path, store: RewardStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer pairs at once, the same steps and weights."""
    ends, read = [], []
    for most in (100_000, 1):
        monkeypatch.setattr(training, "TOKENS_AT_ONCE", most)
        # Adam divides tiny gradients by their own size, which would turn rounding into whole steps.
        trainer = dpo_trainer(load(tiny_folder), store.dataset(), OPTIONS, BETA, tmp_path / str(most))
        trainer.args.optim = "sgd"
        trainer.args.learning_rate = 0.1
        rows: list[int] = []
        collate = trainer.data_collator
        trainer.data_collator = lambda examples, rows=rows, collate=collate: (
            rows.append(len(examples)) or collate(examples)
        )
        trainer.train()
        assert trainer.state.global_step == 8
        ends.append(tensors(trainer.model))
        read.append(rows)
    assert set(read[0]) == {3}
    assert set(read[1]) == {1}
    moved = [float((ends[0][name] - values).abs().max()) for name, values in ends[1].items()]
    assert max(moved) < 1e-4
    fresh = tensors(dpo_trainer(load(tiny_folder), store.dataset(), OPTIONS, BETA, tmp_path).model)
    assert max(float((ends[0][name] - values).abs().max()) for name, values in fresh.items()) > 1e-2


def test_how_many_pairs_fit_at_once() -> None:
    """8,192 tokens: eight pairs of responses of up to 512 tokens with their prompts, four of 513, one of any length.

    On a CPU a token of c counts as 1 + c/256: 16 rows of 256 tokens are 16 · 256 · 2 = 8,192.
    """
    for on_cpu, longest, expected in (
        (False, 1, 8), (False, 512, 8), (False, 513, 4), (False, 1100, 2), (False, 5000, 1),
        (True, 1, 8), (True, 256, 8), (True, 257, 4), (True, 607, 2), (True, 1230, 1), (True, 5000, 1),
    ):  # fmt: skip
        arguments = BaselineOptions().training_arguments(Path("x"), on_cpu, longest)
        at_once, added = (arguments[name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps"))
        assert (at_once, added) == (expected, 8 // expected), (on_cpu, longest)


def test_trls_loss_is_dpos(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    """−log σ(β [(log π/π_ref)(y⁺) − (log π/π_ref)(y⁻)]), in float64 from whole forward passes of single rows."""
    base, plain = load(tiny_folder), load(tiny_folder)
    trainer = dpo_trainer(base, store.dataset(), OPTIONS, 0.3, tmp_path)
    shake(trainer.model)
    losses = []
    for row in store.rows(5):
        prompt = prompt_of(plain, row)
        ratios = [
            (
                naive_logps(trainer.model, prompt, row[f"{side}_ids"])
                - naive_logps(plain.model, prompt, row[f"{side}_ids"])
            )
            .sum()
            .item()
            for side in SIDES
        ]
        losses.append(math.log1p(math.exp(-0.3 * (ratios[0] - ratios[1]))))
    assert max(losses) - min(losses) > 0.01, "the adapter does something"
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(5)])
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
    assert float(loss) == pytest.approx(sum(losses) / 5, rel=1e-4)


def test_only_labelled_positions_are_projected_and_nothing_changes(
    tiny_folder: Path, store: RewardStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, gradients and every figure TRL logs, against TRL's own head on all positions of the same batch."""
    from trl.trainer import utils

    projected = []
    head = utils._ChunkedLogProbFunction
    monkeypatch.setattr(
        utils,
        "_ChunkedLogProbFunction",
        type("Watched", (), {"apply": lambda *a: projected.append(len(a[0])) or head.apply(*a)}),
    )

    def step(name: str) -> tuple[float, dict[str, torch.Tensor], dict[str, list[float]]]:
        trainer = dpo_trainer(load(tiny_folder), store.dataset(), OPTIONS, 0.3, tmp_path / name)
        references.append(sum(projected))
        projected.clear()
        shake(trainer.model)
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(5)])
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        labels.append(int(batch["completion_mask"][:, 1:].sum()))
        positions.append(batch["completion_mask"][:, 1:].numel())
        gradients = {name: each.grad for name, each in trainer.model.named_parameters() if each.grad is not None}
        return loss.item(), gradients, dict(trainer._metrics["train"])

    labels: list[int] = []
    positions: list[int] = []
    references: list[int] = []
    loss, gradients, metrics = step("labelled")
    assert projected == labels
    assert references == [sum(len(row[f"{side}_ids"]) for row in store.rows() for side in SIDES)]
    monkeypatch.setattr(dpo, "score_labelled_positions", lambda model: None)
    expected, its_gradients, its_metrics = step("whole")
    assert projected == positions[-1:], "TRL's head left to itself reads prompts and padding, too"
    assert labels[0] < 0.8 * positions[0]
    assert loss == pytest.approx(expected, rel=1e-6)
    assert gradients.keys() == its_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, its_gradients[name], rtol=1e-4, atol=1e-7)
    assert metrics.keys() == its_metrics.keys()
    assert len(metrics) > 8
    for name, values in metrics.items():
        assert values == pytest.approx(its_metrics[name], rel=1e-4, abs=1e-6), name


def test_it_trains_what_a_doctor_would(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    """The same LoRA on the same modules from the same initial weights; the base keeps its dtype and its bits."""
    base = load(tiny_folder, dtype="bfloat16")
    before = tensors(base.model)
    options = replace(OPTIONS, seed=5)
    lora = lora_arguments(base.model, DoctorOptions(lora_rank=2))
    doctor = Doctor.from_base(load(tiny_folder, dtype="bfloat16"), lora=lora, seed=5)
    trainer = dpo_trainer(base, store.dataset(), options, BETA, tmp_path)
    theirs = {name.removeprefix("lm."): value for name, value in tensors(doctor).items() if "lora_" in name}
    ours = {name: value for name, value in tensors(trainer.model).items() if "lora_" in name}
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert {value.dtype for value in ours.values()} == {torch.float32}
    trainer.train()
    after = {
        name.replace("base_layer.", ""): value for name, value in tensors(base.model).items() if "lora_" not in name
    }
    assert after.keys() == before.keys()
    assert all(after[name].dtype == torch.bfloat16 and after[name].equal(before[name]) for name in before)
    assert any(not tensors(trainer.model)[name].equal(value) for name, value in ours.items())


def test_it_learns_and_writes_a_guide(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    """Trained pairs are told apart; the folder is read as a guide in both forms, and as a plain policy."""
    output = train_dpo(load(tiny_folder), store, tmp_path / "dpo", replace(OPTIONS, epochs=8))
    config = DoctorConfig.load(output)
    assert config.training["method"] == "dpo"
    assert config.training["beta"] == BETA
    assert (config.metrics["train_pairs"], config.metrics["held_out_pairs"]) == (9, 3)
    assert config.rewards_fingerprint == store.fingerprint
    rows = list(store.rows())
    rewards = implicit_rewards(output, rows, base=load(tiny_folder))
    assert accuracy(rewards[:9]) == 1.0
    assert accuracy(rewards[9:]) == pytest.approx(config.metrics["preference_accuracy"])
    assert "flow balance" not in (output / "README.md").read_text()
    named = [json.loads(path.read_text())["base_model_name_or_path"] for path in output.rglob("adapter_config.json")]
    assert len(named) == 3, "the result and two checkpoints"
    assert set(named) == {config.base}
    assert "README.md" not in {path.name for path in (output / "checkpoints").rglob("*")}
    patient = load(tiny_folder)
    guide = load_guide(output, patient, form="product", dtype="float32")
    request = Request.from_text(
        "Hi", alpha=0.0, betas={guide.name: 1.0}, sampling=SamplingParams(max_new_tokens=6, temperature=1.0)
    )
    drawn = GuidedDecoder(patient, [guide]).generate([request])[0]
    policy = Doctor.from_pretrained(output, dtype="float32", device="cpu")
    expected = naive_logps(policy.lm, policy.encoder.prompt_ids(request.messages), drawn.token_ids)
    assert torch.tensor(drawn.logps) == pytest.approx(expected.float(), abs=1e-4)
    assert load_guide(output, patient, dtype="float32").reference == "patient"


def test_a_finished_folder_is_taken_and_others_are_refused(
    tiny_folder: Path, store: RewardStore, tmp_path: Path
) -> None:
    output = train_dpo(load(tiny_folder), store, tmp_path / "dpo", OPTIONS)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    base = load(tiny_folder)
    assert train_dpo(base, store, output, OPTIONS) == output
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert not hasattr(base.model, "peft_config"), "nothing was trained"
    with pytest.raises(FingerprintMismatch, match=r"\(beta: stored 0\.1, now 0\.2\)\. Give the settings"):
        train_dpo(load(tiny_folder), store, output, replace(OPTIONS, beta=0.2))
    train_dpo(load(tiny_folder), store, output, replace(OPTIONS, beta=0.2), resume=False)
    assert DoctorConfig.load(output).training["beta"] == 0.2


JOB = """
from llmdoctor.baselines.dpo import train_dpo
from llmdoctor.baselines.training import BaselineOptions
from llmdoctor.models.loading import load_model
from llmdoctor.rewards.store import RewardStore
def main(model, rewards, folder):
    options = BaselineOptions(epochs=12, lora_rank=2, batch_pairs=3, eval_fraction=0.25, learning_rate=1e-2)
    train_dpo(load_model(model, dtype="float32", device="cpu"), RewardStore.open(rewards), folder, options)
"""


def test_killed_and_resumed_it_ends_with_the_same_weights(
    tiny_folder: Path, store: RewardStore, tmp_path: Path, job_server: JobServer
) -> None:
    """12 epochs of 3 steps, a checkpoint every fourth, SIGKILL in the middle: bit-identical adapters and figures."""
    job_server.run(JOB, tiny_folder, store.folder, tmp_path / "whole")
    folder = tmp_path / "killed"
    job_server.run_through_kills(
        *(JOB, tiny_folder, store.folder, folder),
        progress=lambda: last_step(folder / "checkpoints"),
        kills=[6],
    )
    adapter = "adapter/adapter_model.safetensors"
    assert (folder / adapter).read_bytes() == (tmp_path / "whole" / adapter).read_bytes()
    assert DoctorConfig.load(folder) == DoctorConfig.load(tmp_path / "whole")


def test_without_held_out_pairs_there_are_only_counts(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    output = train_dpo(load(tiny_folder), store, tmp_path / "dpo", replace(OPTIONS, eval_fraction=0.0, epochs=0.5))
    assert DoctorConfig.load(output).metrics == {"train_pairs": 12.0, "held_out_pairs": 0.0}


def test_a_loss_or_gradient_that_is_not_finite_stops_the_training(
    tiny_folder: Path, store: RewardStore, tmp_path: Path
) -> None:
    with pytest.raises(
        TrainingDiverged, match=r"diverged at step \d+: loss or gradient is not finite; lower learning_rate"
    ):
        train_dpo(load(tiny_folder), store, tmp_path / "dpo", replace(OPTIONS, learning_rate=1e30, epochs=9))
    assert not (tmp_path / "dpo" / "doctor.json").exists()
    trainer = dpo_trainer(load(tiny_folder), store.dataset(), OPTIONS, BETA, tmp_path / "gradient")
    trained = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    trained.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(TrainingDiverged, match="diverged at step 1"):
        trainer.train()


def test_a_base_of_another_tokenizer(store: RewardStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is trained on the pairs' texts in its own tokens, and held-out pairs are measured in them."""
    base = load(save_tiny(tmp_path / "other", byte_level(320, OTHER_CORPUS, begin="<|begin|>"), seed=7))
    encoder = ChatEncoder.for_model(base.model, base.tokenizer)
    read: list[Any] = []
    monkeypatch.setattr(dpo, "token_rows", lambda rows, own: read.append(token_rows(rows, own)) or read[-1])
    output = train_dpo(base, store, tmp_path / "dpo", replace(OPTIONS, epochs=1))
    for side in SIDES:
        texts = ["".join(row[f"{side}_tokens"]).removesuffix("<|im_end|>") for row in store.rows()]
        assert [encoder.decode(ids) for ids in read[0][f"{side}_ids"]] == texts[:9]
    config = DoctorConfig.load(output)
    assert {key: config.rewards_fingerprint[key] for key in store.fingerprint} == store.fingerprint
    assert "carried_to" in config.rewards_fingerprint
    assert config.metrics["held_out_pairs"] == 3


def test_bad_input(tiny_folder: Path, store: RewardStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="holds the token rewards; give the dpo baseline a folder of its own"):
        train_dpo(load(tiny_folder), store, store.folder, OPTIONS)
    used = load(tiny_folder)
    Doctor.from_base(used, lora=lora_arguments(used.model, DoctorOptions()))
    with pytest.raises(UserError, match="carries an adapter already"):
        train_dpo(used, store, tmp_path / "dpo", OPTIONS)
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    with pytest.raises(UserError, match=r"DPO is trained by TRL, which is not installed: pip install -e '\.\[bench\]'"):
        train_dpo(load(tiny_folder), store, tmp_path / "dpo", OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"batch_pairs": 0}, "batch_pairs must be at least 1, got 0"),
        ({"learning_rate": math.inf}, "learning_rate must be positive, got inf"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\), got 1.0"),
        ({"beta": 0.0}, "beta must be positive, or None, got 0.0"),
        ({"lora_rank": 0}, "lora_rank must be at least 1, got 0"),
        ({"eval_fraction": 1.0}, r"eval_fraction must lie in \[0, 1\), got 1.0"),
    ],
)
def test_options_check_themselves(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BaselineOptions(**options)
