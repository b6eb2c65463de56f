"""What `train_doctor` makes by default: a doctor of the rounds and one of the pairs, merged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.killing import JobServer, last_step
from tests.tiny import OTHER_CORPUS, acquire, byte_level, config, load, save_tiny, some_pairs, tensors
from tests.twoprocs import in_two_processes

from llmdoctor.baselines.implicit import accuracy, implicit_rewards
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import load_guide
from llmdoctor.decoding.request import Request, SamplingParams
from llmdoctor.errors import FingerprintMismatch, UserError
from llmdoctor.models.doctor import READOUT_FOLDER, Doctor, DoctorConfig
from llmdoctor.models.loading import LoadedModel
from llmdoctor.models.merging import merge_doctors
from llmdoctor.rewards.readout import Readout
from llmdoctor.rewards.store import RewardStore
from llmdoctor.tfpo.options import DoctorOptions
from llmdoctor.tfpo.rounds import RoundOptions
from llmdoctor.tfpo.train import check_training, train_doctor

ROUNDS = RoundOptions(rounds=2, round_prompts=6, round_eta=0.5, pairs_weight=0.25)
BALANCED = replace(ROUNDS, pairs_objective="subtb")
OPTIONS = DoctorOptions(lora_rank=2, eval_fraction=0.25)


@pytest.fixture(scope="module")
def store(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RewardStore:
    return acquire(load(tiny_folder), some_pairs(16), tmp_path_factory.mktemp("rewards") / "store", theta=0.1)


def train(
    base: LoadedModel,
    store: RewardStore,
    folder: Path,
    rounds: RoundOptions = ROUNDS,
    objective: str = "subtb",
    **more: Any,
) -> Path:
    settings = config(folder, save_strategy="epoch", learning_rate=1e-2, objective=objective)
    return train_doctor(base, store, settings, options=OPTIONS, rounds=rounds, **more)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    """B A of every adapted layer, which is all that decoding sees."""
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    scaling = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    scale = scaling["lora_alpha"] / scaling["r"]
    names = [name.removesuffix("lora_A.weight") for name in stored if name.endswith("lora_A.weight")]
    return {name: scale * stored[f"{name}lora_B.weight"] @ stored[f"{name}lora_A.weight"] for name in names}


@pytest.mark.parametrize("both", [ROUNDS, BALANCED], ids=["of labels", "of token rewards"])
def test_it_is_the_two_trained_apart_and_merged(
    tiny_folder: Path, store: RewardStore, tmp_path: Path, both: RoundOptions
) -> None:
    heard: list[tuple[str, int]] = []
    base, patient = load(tiny_folder), load(tiny_folder)
    before = tensors(base.model)
    folder = train(base, store, tmp_path / "both", both, patient=patient, told=lambda *told: heard.append(told))
    assert RoundOptions().merges, "by default"
    assert (RoundOptions().pairs_weight, RoundOptions().pairs_objective) == (0.5, "none")
    after = tensors(base.model)
    assert base.model.config._attn_implementation == patient.model.config._attn_implementation
    assert before.keys() == after.keys(), "no adapter is left on the base"
    assert all(torch.equal(before[name], after[name]) for name in before)

    apart = [
        train(load(tiny_folder), store, tmp_path / "rounds", replace(both, pairs_weight=0.0), patient=patient),
        train(load(tiny_folder), store, tmp_path / "pairs", RoundOptions(rounds=0), both.pairs_objective),
    ]
    # The mean of both.
    expected = adapter(merge_doctors(apart, [0.75, 0.25], tmp_path / "merged"))
    found = adapter(folder)
    assert found.keys() == expected.keys()
    for name, matrix in expected.items():
        assert matrix.abs().max() > 1e-4
        torch.testing.assert_close(found[name], matrix, atol=1e-7, rtol=1e-5)
    for name, alone in zip(("rounds", "pairs"), apart, strict=True):
        part = folder / "checkpoints" / "parts" / name
        assert DoctorConfig.load(part).training == DoctorConfig.load(alone).training
        assert Doctor.from_pretrained(part, base=load(tiny_folder)).doctor_config.dimension == "kind"

    stored = DoctorConfig.load(folder)
    assert stored.dimension == "kind"
    assert stored.rewards_fingerprint == store.fingerprint
    assert [part["weight"] for part in stored.training["merged"]] == [0.75, 0.25]
    assert [part["training"]["rounds"] for part in stored.training["merged"]] == [2, 0]
    objectives = [part["training"]["objective"] for part in stored.training["merged"]]
    assert objectives == ["subtb", both.pairs_objective]
    assert set(stored.metrics) == {
        "preference_accuracy", "margin", "chosen_reward", "rejected_reward", "train_pairs", "held_out_pairs",
    }  # fmt: skip
    assert (stored.metrics["train_pairs"], stored.metrics["held_out_pairs"]) == (12, 4)
    rewards = implicit_rewards(folder, list(store.rows())[12:], base=load(tiny_folder))
    assert stored.metrics["preference_accuracy"] == accuracy(rewards)
    chosen = sum(reward.totals[0] for reward in rewards) / 4
    assert stored.metrics["chosen_reward"] == pytest.approx(chosen, rel=1e-3, abs=1e-4)
    card = (folder / "README.md").read_text()
    assert "nothing of it was measured" not in card
    assert f"| margin | {stored.metrics['margin']:.4g} |" in card
    assert "| rounds | 2 | 0 |" in card
    assert Readout.from_pretrained(folder / READOUT_FOLDER, patient).fit.pairs == 12

    began = [what for what, _ in heard if what]
    assert began == [
        "reading the pairs for the read-out",
        "reading the pairs held out",
        "round 1 of 2: answers",
        "round 2 of 2: answers",
        "reading the pairs before training",
        "reading the pairs held out",
    ]
    assert sum(units for what, units in heard if not what) == 12 + 4 + 2 * 16 + 16 + 4

    written = {path: path.read_bytes() for path in folder.glob("**/*.safetensors")}
    assert train(load(tiny_folder), store, folder, both, patient=patient) == folder
    assert written == {path: path.read_bytes() for path in folder.glob("**/*.safetensors")}, "a finished run stays"
    assert DoctorConfig.load(folder) == stored


def test_the_second_doctor_learns_what_is_asked(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    """From labels alone, token rewards change nothing; to a balance they do."""
    patient = load(tiny_folder)
    denser = acquire(patient, some_pairs(16), tmp_path / "denser", theta=0.0)
    found = {}
    for name, rounds in (("labels", ROUNDS), ("rewards", BALANCED)):
        for theta, rewards in (("sparse", store), ("dense", denser)):
            folder = train(load(tiny_folder), rewards, tmp_path / f"{name}-{theta}", rounds, patient=patient)
            found[name, theta] = adapter(folder / "checkpoints" / "parts" / "pairs")
    assert all(
        torch.equal(matrix, found["labels", "dense"][name]) for name, matrix in found["labels", "sparse"].items()
    )
    assert any(
        not torch.allclose(matrix, found["rewards", "dense"][name], atol=1e-6)
        for name, matrix in found["rewards", "sparse"].items()
    )


def test_it_guides(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    """By a folder, as any doctor; on its own base in one pass."""
    patient = load(tiny_folder)
    folder = train(load(tiny_folder), store, tmp_path / "both", patient=patient)
    request = Request.from_text("hello cat", sampling=SamplingParams(max_new_tokens=8, seed=1))
    alone = GuidedDecoder(patient).generate([request])[0]
    guided = GuidedDecoder(patient, [load_guide(folder, patient)]).generate([replace(request, betas={"kind": 1.0})])[0]
    assert guided.kl != 0
    assert alone.kl == 0


def test_other_weights_are_another_training(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    patient = load(tiny_folder)
    folder = train(load(tiny_folder), store, tmp_path / "both", patient=patient)
    whole = adapter(folder)
    said = {
        replace(ROUNDS, pairs_weight=0.75): r"pairs_weight: stored 0\.25, now 0\.75",
        replace(ROUNDS, pairs_weight=0.0): r"pairs_weight: stored 0\.25, now |\(rounds: stored \d, now 0",
        RoundOptions(rounds=0): r"pairs_weight: stored 0\.25, now |\(rounds: stored \d, now 0",
        BALANCED: "pairs_objective: stored none, now subtb",
    }
    for other, message in said.items():
        with pytest.raises(FingerprintMismatch, match=message):
            train(load(tiny_folder), store, folder, other, patient=patient)
    assert all(torch.equal(matrix, whole[name]) for name, matrix in adapter(folder).items()), "nothing was touched"
    anew = train(load(tiny_folder), store, folder, replace(ROUNDS, pairs_weight=0.75), patient=patient, resume=False)
    assert any(not torch.allclose(matrix, whole[name], atol=1e-6) for name, matrix in adapter(anew).items())


def test_a_restart_that_was_cut_leaves_nothing_that_passes_for_the_new_doctor(
    tiny_folder: Path, store: RewardStore, tmp_path: Path
) -> None:
    patient, other = load(tiny_folder), replace(ROUNDS, rounds=1, round_eta=0.2)
    folder = train(load(tiny_folder), store, tmp_path / "both", patient=patient)
    (folder / "checkpoints" / "fingerprint.json").unlink()
    with pytest.raises(FingerprintMismatch):
        train(load(tiny_folder), store, folder, other, patient=patient)
    anew = train(load(tiny_folder), store, folder, other, patient=patient, resume=False)
    rounds, _ = DoctorConfig.load(anew).training["merged"]
    assert (rounds["training"]["rounds"], rounds["training"]["round_eta"]) == (1, 0.2)
    assert not list(folder.glob(".*"))


def test_another_name_is_everywhere(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    patient = load(tiny_folder)
    folder = train(load(tiny_folder), store, tmp_path / "both", patient=patient)
    before = adapter(folder)
    train(load(tiny_folder), store, folder, patient=patient, dimension="calm")
    stored = DoctorConfig.load(folder)
    assert [stored.dimension, *(part["dimension"] for part in stored.training["merged"])] == ["calm"] * 3
    assert all(torch.equal(matrix, before[name]) for name, matrix in adapter(folder).items()), "trained once"


def test_only_what_belongs_to_the_new_doctor_stays(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    folder = train(load(tiny_folder), store, tmp_path / "both", patient=load(tiny_folder))
    assert (folder / READOUT_FOLDER).is_dir()
    train(load(tiny_folder), store, folder, RoundOptions(rounds=0), resume=False)
    assert not (folder / READOUT_FOLDER).exists()
    assert (folder / "adapter").is_dir()


def test_pairs_first_is_one_doctor(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    first = replace(ROUNDS, pairs_first=True, pairs_weight=0.0)
    folder = train(load(tiny_folder), store, tmp_path / "first", first, patient=load(tiny_folder))
    assert not (folder / "checkpoints" / "parts").exists()
    assert "merged" not in DoctorConfig.load(folder).training


def test_a_base_is_left_as_it_was(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    """With gradient checkpointing, too, and where the training breaks off."""
    base, patient = load(tiny_folder), load(tiny_folder)
    settings = config(tmp_path / "both", gradient_checkpointing=True, save_strategy="epoch")
    train_doctor(base, store, settings, options=OPTIONS, rounds=ROUNDS, patient=patient)
    assert not base.model.is_gradient_checkpointing
    assert not base.model.get_input_embeddings()._forward_hooks
    assert not any(parameter.requires_grad for parameter in base.model.parameters())

    def stop(what: str, units: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(base, store, tmp_path / "cut", patient=patient, told=stop)
    assert not hasattr(base.model, "peft_config")
    train(base, store, tmp_path / "cut", patient=patient)


def test_what_the_rounds_lack_is_told_before_anything_is_trained(
    tiny_folder: Path, store: RewardStore, tmp_path: Path
) -> None:
    other = replace(load(tiny_folder), fingerprint={**load(tiny_folder).fingerprint, "model": "feedbeef"})
    with pytest.raises(UserError, match="is not the patient that gave the rewards"):
        train(load(tiny_folder), store, tmp_path / "both", patient=other)
    assert not (tmp_path / "both").exists()


def test_on_a_base_of_another_tokenizer(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    base = load(save_tiny(tmp_path / "base", byte_level(300, OTHER_CORPUS), seed=5))
    folder = train(base, store, tmp_path / "both", patient=load(tiny_folder))
    stored = DoctorConfig.load(folder)
    assert stored.base == str(tmp_path / "base")
    assert len(stored.training["merged"]) == 2
    assert not hasattr(base.model, "peft_config")


JOB = """
from pathlib import Path
from llmdoctor.models.loading import load_model
from llmdoctor.rewards.store import RewardStore
from llmdoctor.tfpo.options import DoctorOptions
from llmdoctor.tfpo.rounds import RoundOptions
from llmdoctor.tfpo.train import train_doctor
from tiny import config
def main(model, rewards, folder):
    settings = config(
        Path(folder), save_strategy="steps", save_steps=2, per_device_train_batch_size=1, num_train_epochs=2,
        learning_rate=1e-2,
    )
    train_doctor(
        load_model(model, dtype="float32", device="cpu"), RewardStore.open(rewards), settings,
        options=DoctorOptions(lora_rank=2, eval_fraction=0.25),
        rounds=RoundOptions(rounds=2, round_prompts=6, round_eta=0.5),
        patient=load_model(model, dtype="float32", device="cpu"),
    )
"""


def test_killed_and_resumed_it_ends_with_the_same_weights(
    tiny_folder: Path, store: RewardStore, tmp_path: Path, job_server: JobServer
) -> None:
    """SIGKILL in the rounds, and twice while the pairs are learned: bit-identical, and the same figures."""
    job_server.run(JOB, tiny_folder, store.folder, tmp_path / "whole")
    folder = tmp_path / "killed"
    parts = folder / "checkpoints" / "parts"

    def progress() -> int:
        rounds, pairs = (parts / "rounds" / "checkpoints" / "rounds", parts / "pairs" / "checkpoints")
        return last_step(rounds) + last_step(pairs)

    job_server.run_through_kills(JOB, tiny_folder, store.folder, folder, progress=progress, kills=[6, 14, 24])
    names = {path.relative_to(folder) for path in folder.glob("*/*.safetensors")}
    assert Path("adapter/adapter_model.safetensors") in names
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert DoctorConfig.load(folder) == DoctorConfig.load(tmp_path / "whole")


def test_faces_are_not_needed_for_labels_and_rounds(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    """What is learned by default is the same, to the bit, of pairs that no faces have read."""
    bare = acquire(load(tiny_folder), some_pairs(16), tmp_path / "bare", faces=None, theta=0.1)
    assert (bare.has_token_rewards, bare.dimension) == (False, "")
    assert (store.has_token_rewards, store.dimension) == (True, "kind")
    patient = load(tiny_folder)
    read = train(load(tiny_folder), store, tmp_path / "read", patient=patient)
    unread = train(load(tiny_folder), bare, tmp_path / "unread", patient=patient)
    for name, matrix in adapter(read).items():
        assert torch.equal(adapter(unread)[name], matrix)
    assert DoctorConfig.load(unread).dimension == ""
    assert load_guide(unread, patient).name == "unread"


@pytest.mark.parametrize(
    ("rounds", "settings", "said"),
    [
        (BALANCED, {}, "of which pairs_objective subtb learns"),
        (RoundOptions(rounds=0), {}, "of which objective subtb learns"),
        (RoundOptions(rounds=1, pairs_first=True), {}, "of which objective subtb learns"),
        (ROUNDS, {"branch_coef": 0.5}, "of which branch_coef 0.5 learns"),
    ],
)
def test_who_needs_token_rewards_says_so(
    tiny_folder: Path, tmp_path: Path, rounds: RoundOptions, settings: dict[str, Any], said: str
) -> None:
    bare = acquire(load(tiny_folder), some_pairs(6), tmp_path / "bare", faces=None)
    with pytest.raises(UserError, match=said):
        train_doctor(load(tiny_folder), bare, config(tmp_path / "x", **settings), rounds=rounds)
    rest = [replace(ROUNDS, pairs_weight=0.0), RoundOptions(rounds=0)]
    for free, objective in zip(rest, ("subtb", "none"), strict=True):
        check_training(bare, config(tmp_path / "x", objective=objective), OPTIONS, free)


PROCESSES = """
import os
import sys
import torch
from pathlib import Path
from llmdoctor.models.loading import load_model
from llmdoctor.rewards.store import RewardStore
from llmdoctor.tfpo.options import DoctorOptions
from llmdoctor.tfpo.rounds import RoundOptions
from llmdoctor.tfpo.train import train_doctor
from tiny import config
from llmdoctor.tfpo import rounds
model, rewards, folder = sys.argv[1:]
draw = rounds.draw_answers
def counted(doctor, conversations, *args, **kwargs):
    with open(f"{folder}.drawn", "a") as file:
        file.write(f"{len(conversations)}\\n")
    if os.environ.get("FAILS") == os.environ["RANK"]:
        raise RuntimeError("a fan broke")
    return draw(doctor, conversations, *args, **kwargs)
rounds.draw_answers = counted
settings = config(Path(folder), save_strategy="epoch", learning_rate=1e-2, per_device_train_batch_size=2)
base, patient = (load_model(model, dtype="float32", device="cpu") for _ in range(2))
train_doctor(
    base, RewardStore.open(rewards), settings, options=DoctorOptions(lora_rank=2, eval_fraction=0.25), patient=patient,
    rounds=RoundOptions(rounds=2, round_prompts=6, round_eta=0.5, pairs_weight=0.25),
)
# Threads that listen to the other process may abort this one at its exit.
torch.distributed.destroy_process_group()
"""


def test_a_process_that_cannot_draw_stops_the_other(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    """Else that one would wait for its answers for half an hour."""
    (status, other), (own_status, own) = in_two_processes(
        PROCESSES, tiny_folder, store.folder, tmp_path / "two", FAILS="1"
    )
    assert status
    assert own_status
    assert own.strip().endswith("RuntimeError: a fan broke")
    assert other.strip().endswith("UserError: process 1 stopped: RuntimeError: a fan broke")


def test_two_processes_train_one_doctor(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    """Twice as many pairs a step, the same number as one process with batches of twice the size; written by one.

    Each draws half of the answers of both rounds: two to each of eight prompts, six in whole batches.
    """
    for status, said in in_two_processes(PROCESSES, tiny_folder, store.folder, tmp_path / "two"):
        assert status == 0, said[-3000:]
    assert (tmp_path / "two.drawn").read_text(encoding="utf-8").split() == ["8"] * 4
    alone = train(load(tiny_folder), store, tmp_path / "one", patient=load(tiny_folder))
    # Both add up the same gradients, in another order.
    expected, found = adapter(alone), adapter(tmp_path / "two")
    assert found.keys() == expected.keys()
    for name, matrix in expected.items():
        torch.testing.assert_close(found[name], matrix, atol=2e-4, rtol=0.05)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in alone.iterdir()}
    assert DoctorConfig.load(tmp_path / "two").metrics == pytest.approx(DoctorConfig.load(alone).metrics, rel=0.05)
