"""Stage 2 as one call: the doctor's folder, and what survives a kill."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.killing import JobServer, last_step
from tests.tiny import OTHER_CORPUS, acquire, byte_level, config, load, save_tiny, some_pairs, tensors
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from llmdoctor.baselines.genarm import train_genarm
from llmdoctor.data.preferences import PreferencePair
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import load_guide
from llmdoctor.decoding.request import Request, SamplingParams
from llmdoctor.errors import FingerprintMismatch, UserError
from llmdoctor.files import digest
from llmdoctor.models.doctor import Doctor, DoctorConfig
from llmdoctor.models.loading import LoadedModel, load_model
from llmdoctor.rewards.acquire import _ShardWriter
from llmdoctor.rewards.store import SIDES, RewardStore
from llmdoctor.tfpo import train
from llmdoctor.tfpo.checkpoints import last_checkpoint
from llmdoctor.tfpo.config import TFPOConfig
from llmdoctor.tfpo.options import RECORDED, DoctorOptions, lora_arguments, recorded
from llmdoctor.tfpo.rounds import RoundOptions
from llmdoctor.tfpo.train import train_doctor
from llmdoctor.tfpo.trainer import TFPOTrainer


@pytest.fixture(scope="module")
def store(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RewardStore:
    return acquire(load(tiny_folder), some_pairs(12), tmp_path_factory.mktemp("rewards") / "store", theta=0.1)


PAIRS = RoundOptions(rounds=0)
OPTIONS = DoctorOptions(lora_rank=2, eval_fraction=0.25)


def checkpointed(folder: Path, **options: Any) -> TFPOConfig:
    steps = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "epoch", "per_device_train_batch_size": 1}
    return config(folder, **{**steps, "num_train_epochs": 2, **options})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_patient_that_is_not_given_is_loaded_as_the_base_is(
    tiny_folder: Path, store: RewardStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    class Loaded(Exception):
        """Far enough."""

    def load_it(spec: str, **options: Any) -> LoadedModel:
        raise Loaded(load_model(spec, **options))

    monkeypatch.setattr(train, "load_model", load_it)
    base = load_model(tiny_folder, dtype=dtype, device="cpu")
    with pytest.raises(Loaded) as found:
        train_doctor(base, store, checkpointed(tmp_path / "doctor"), rounds=RoundOptions(rounds=1), options=OPTIONS)
    (patient,) = found.value.args
    assert (patient.spec, str(patient.model.dtype)) == (str(tiny_folder), f"torch.{dtype}")
    assert patient.model.device.type == "cpu"


def test_train_doctor_writes_a_doctor(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    args = checkpointed(tmp_path / "doctor")
    output = train_doctor(load(tiny_folder), store, args, rounds=PAIRS, options=OPTIONS)
    assert output == tmp_path / "doctor"
    assert (args.output_dir, args.eval_strategy) == (str(output), "epoch"), "the caller's settings stay as they were"
    assert {path.name for path in output.iterdir()} == {
        "README.md",
        "adapter",
        "checkpoints",
        "doctor.json",
        "value_head.safetensors",
    }
    stored = DoctorConfig.load(output)
    assert stored.dimension == "kind"
    assert stored.rewards_fingerprint == store.fingerprint
    assert stored.training["eta"] == 0.5
    assert stored.training["lora_rank"] == 2
    assert (stored.metrics["train_pairs"], stored.metrics["held_out_pairs"]) == (9, 3)
    assert f"| lr_scheduler_type | {args.lr_scheduler_type.value} |" in (output / "README.md").read_text()
    assert 0 <= stored.metrics["preference_accuracy"] <= 1
    assert f"| margin | {stored.metrics['margin']:.4g} |" in (output / "README.md").read_text()
    doctor = Doctor.from_pretrained(output, dtype="float32", device="cpu")
    # Rank 2 on every linear layer of the upper half: 1 layer × 7 modules × (A, B).
    assert len([name for name in tensors(doctor) if "lora_" in name]) == 14
    assert all("layers.1." in name for name in tensors(doctor) if "lora_" in name)
    before = {path: path.read_bytes() for path in output.glob("**/*.safetensors")}
    train_doctor(load(tiny_folder), store, args, rounds=PAIRS, options=OPTIONS)
    assert before == {path: path.read_bytes() for path in output.glob("**/*.safetensors")}, "a finished run stays"
    assert DoctorConfig.load(output) == stored


def test_the_rewards_folder_is_no_place_for_the_doctor(tiny_folder: Path, store: RewardStore) -> None:
    before = sorted(store.folder.iterdir())
    with pytest.raises(UserError, match="holds the token rewards; give the doctor a folder of its own"):
        train_doctor(load(tiny_folder), store, checkpointed(store.folder), rounds=PAIRS, options=OPTIONS)
    assert sorted(store.folder.iterdir()) == before


TRAIN_JOB = """
from pathlib import Path
from llmdoctor.models.loading import load_model
from llmdoctor.rewards.store import RewardStore
from llmdoctor.tfpo.rounds import RoundOptions
from llmdoctor.tfpo.options import DoctorOptions
from llmdoctor.tfpo.train import train_doctor
from tiny import config
def main(model, rewards, folder, lora):
    settings = config(
        Path(folder), save_strategy="steps", save_steps=2, eval_strategy="epoch", per_device_train_batch_size=1,
        num_train_epochs=4, learning_rate=1e-2,
    )
    base = load_model(model, dtype="float32", device="cpu")
    options = DoctorOptions(lora=lora == "True", lora_rank=2, eval_fraction=0.25)
    train_doctor(base, RewardStore.open(rewards), settings, rounds=RoundOptions(rounds=0), options=options)
"""


@pytest.mark.parametrize("lora", [True, False])
def test_killed_and_resumed_it_ends_with_the_same_weights(
    tiny_folder: Path, store: RewardStore, tmp_path: Path, job_server: JobServer, lora: bool
) -> None:
    """36 steps with a checkpoint every 2, SIGKILL at random moments: bit-identical, and the same figures."""
    job_server.run(TRAIN_JOB, tiny_folder, store.folder, tmp_path / "whole", lora)
    folder = tmp_path / "killed"
    job_server.run_through_kills(
        *(TRAIN_JOB, tiny_folder, store.folder, folder, lora),
        progress=lambda: last_step(folder / "checkpoints"),
        kills=[4, 12, 20],
    )
    for path in (tmp_path / "whole").glob("*/*.safetensors" if lora else "model/*.safetensors"):
        assert (folder / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes(), path.name
    head = "value_head.safetensors"
    assert (folder / head).read_bytes() == (tmp_path / "whole" / head).read_bytes()
    assert DoctorConfig.load(folder) == DoctorConfig.load(tmp_path / "whole")


def test_a_resumed_run_starts_at_the_last_whole_checkpoint(
    tiny_folder: Path, store: RewardStore, tmp_path: Path
) -> None:
    output = train_doctor(
        load(tiny_folder), store, checkpointed(tmp_path / "d", save_total_limit=5), rounds=PAIRS, options=OPTIONS
    )
    checkpoints = output / "checkpoints"
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-18"
    state = checkpoints / "checkpoint-18" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:100])
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-16"
    (checkpoints / "checkpoint-16" / "trainer_state.json").unlink()
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-14"
    assert last_checkpoint(tmp_path) is None


def test_settings_that_ended_a_run_before_its_first_step_may_be_mended(
    tiny_folder: Path, store: RewardStore, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    settings = checkpointed(tmp_path / "d", max_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TFPOTrainer, "train", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            train_doctor(load(tiny_folder), store, settings, rounds=PAIRS, options=OPTIONS)
    assert (tmp_path / "d" / "checkpoints" / "fingerprint.json").is_file()
    mended = checkpointed(tmp_path / "d", max_steps=2, eta=0.5)
    assert train_doctor(load(tiny_folder), store, mended, rounds=PAIRS, options=OPTIONS).is_dir()


@pytest.mark.parametrize(
    ("key", "change"),
    [
        (r"eta: stored 0\.5, now 0\.7", {"eta": 0.7}),
        ("lr_scheduler_type: stored (cosine|SchedulerType.COSINE), now linear", {"lr_scheduler_type": "linear"}),
        (r"seed: stored \d+, now 3", {"seed": 3}),
        (r"adam_beta2: stored \(absent\), now 0\.9", {"adam_beta2": 0.9}),
        (r"lora_rank: stored \d+, now 3", {"options": replace(OPTIONS, lora_rank=3)}),
        (r"rewards: stored \w{16}, now \w{16}", {}),
        (r"model: stored \w{16}, now another", {}),
    ],
)
def test_other_settings_beside_checkpoints_are_refused(
    tiny_folder: Path, store: RewardStore, tmp_path: Path, key: str, change: dict[str, Any]
) -> None:
    """By name, and nothing else is named."""
    train_doctor(load(tiny_folder), store, checkpointed(tmp_path / "d", max_steps=2), rounds=PAIRS, options=OPTIONS)
    options = change.get("options", OPTIONS)
    args = checkpointed(tmp_path / "d", max_steps=2, **{k: v for k, v in change.items() if k != "options"})
    rewards = store
    if key.startswith("rewards"):
        rewards = acquire(load(tiny_folder), some_pairs(12), tmp_path / "rewards", theta=0.2)

    def base() -> LoadedModel:
        loaded = load(tiny_folder)
        if key.startswith("model"):
            loaded = replace(loaded, fingerprint={**loaded.fingerprint, "model": "another"})
        return loaded

    with pytest.raises(FingerprintMismatch, match=rf"\({key}\)\. Give the settings it began with, start anew \(--r"):
        train_doctor(base(), rewards, args, rounds=PAIRS, options=options)
    marker = tmp_path / "d" / "checkpoints" / "fingerprint.json"
    stored = json.loads(marker.read_text())
    del stored["training"], stored["base_fingerprint"]
    marker.write_text(json.dumps(stored))
    with pytest.raises(FingerprintMismatch, match=r"\(\w+: stored \w{16}, now \w{16}\)"):  # as older versions left it
        train_doctor(base(), rewards, args, rounds=PAIRS, options=options)
    train_doctor(base(), rewards, args, rounds=PAIRS, options=options, resume=False)
    assert DoctorConfig.load(tmp_path / "d").training["eta"] == change.get("eta", 0.5)


def test_settings_at_their_defaults_are_recorded_as_ever(tmp_path: Path) -> None:
    """Doctors and answers that are there were made before the rarer ones were recorded; they are known by the others'
    digest.
    """
    assert recorded(config(tmp_path)).keys() == set(RECORDED)


@pytest.mark.parametrize(
    "change",
    [
        {"optim": "sgd"},
        {"adam_beta1": 0.8},
        {"adam_epsilon": 1e-6},
        {"lr_scheduler_kwargs": {"num_cycles": 1.5}},
        {"data_seed": 5},
        {"accelerator_config": {"use_seedable_sampler": False}},
        {"dataloader_drop_last": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_rare_setting_that_was_changed_is_recorded(tmp_path: Path, change: dict[str, Any]) -> None:
    found = recorded(config(tmp_path, **change))
    assert found.keys() == {*RECORDED, *change}
    assert digest(found) != digest(recorded(config(tmp_path)))


def test_the_number_of_processes_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of two processes has twice the pairs."""
    monkeypatch.setattr(TFPOConfig, "world_size", 2)
    assert recorded(config(tmp_path))["world_size"] == 2


def test_a_doctor_can_be_trained_without_holding_pairs_out(
    tiny_folder: Path, store: RewardStore, tmp_path: Path
) -> None:
    options = replace(OPTIONS, eval_fraction=0.0)
    output = train_doctor(
        load(tiny_folder), store, checkpointed(tmp_path / "d", max_steps=2), rounds=PAIRS, options=options
    )
    assert DoctorConfig.load(output).metrics == {"train_pairs": 12.0, "held_out_pairs": 0.0}


def test_a_base_of_another_tokenizer(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    """It learns from its own tokens, guides the patient, and is not confused with a doctor of the patient's tokens."""
    other = save_tiny(tmp_path / "other", byte_level(320, OTHER_CORPUS, begin="<|begin|>"), seed=7)
    output = train_doctor(
        load(other), store, checkpointed(tmp_path / "doctor", max_steps=6), rounds=PAIRS, options=OPTIONS
    )
    stored = DoctorConfig.load(output)
    assert {key: stored.rewards_fingerprint[key] for key in store.fingerprint} == store.fingerprint
    assert stored.base_fingerprint["tokenizer"] != store.fingerprint["tokenizer"]
    assert (stored.metrics["train_pairs"], stored.metrics["held_out_pairs"]) == (9, 3)
    patient = load(tiny_folder)
    guide = load_guide(output, patient, dtype="float32", device="cpu")
    assert isinstance(guide.reference, LoadedModel)
    decoder = GuidedDecoder(patient, [guide])
    request = Request.from_text("Hi", betas={"kind": 4.0}, sampling=SamplingParams(max_new_tokens=12, temperature=0.0))
    guided, alone = decoder.generate([request, replace(request, betas={})])
    assert guided.logps != pytest.approx(alone.logps, abs=1e-3)
    with pytest.raises(FingerprintMismatch):
        train_doctor(load(tiny_folder), store, checkpointed(output, max_steps=6), rounds=PAIRS, options=OPTIONS)


def test_pairs_that_a_base_cannot_read_are_told_before_anything_is_read(
    tiny_tokenizer: Any, store: RewardStore, tmp_path: Path
) -> None:
    """Beyond its context a model with rotary positions would say something, if nothing that it was taught."""
    most = max(len(row[f"{side}_ids"]) for row in store.rows() for side in SIDES)
    small = save_tiny(tmp_path / "small", tiny_tokenizer, seed=5, context=most + 4)
    message = (
        rf"pair \d+ has a prompt of \d+ and a response of \d+ tokens, more than .*small's context of {most + 4}: gi"
    )
    for rounds in (PAIRS, RoundOptions(rounds=1)):
        with pytest.raises(UserError, match=message):
            train_doctor(load(small), store, checkpointed(tmp_path / "d"), rounds=rounds, options=OPTIONS)
    with pytest.raises(UserError, match=message):
        train_genarm(load(small), store, tmp_path / "g")
    assert not (tmp_path / "d").exists()
    settings = checkpointed(tmp_path / "d", max_steps=1, max_prompt_length=4)
    assert train_doctor(load(small), store, settings, rounds=PAIRS, options=OPTIONS).is_dir()


def test_the_patient_itself_cannot_read_every_pair_as_a_base(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """It has read the pair under faces, which replace the pair's own long system prompt; so earlier versions let it."""
    model = save_tiny(tmp_path / "model", tiny_tokenizer, context=128)
    prompt = ({"role": "system", "content": "the cat sat on the mat " * 40}, {"role": "user", "content": "Hi"})
    pairs = [*some_pairs(3), PreferencePair(prompt, "the cat", "the dog")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ShardWriter, "_too_long", lambda *_: "")
        store = acquire(load(model), pairs, tmp_path / "store")
    with pytest.raises(
        UserError, match=r"pair 4 has a prompt of \d+ and a response of \d+ tokens, more than .* of 128: "
    ):
        train_doctor(load(model), store, checkpointed(tmp_path / "d"), rounds=PAIRS, options=OPTIONS)


def test_a_base_that_keeps_its_weights_the_other_way_round(
    tiny_folder: Path, tiny_tokenizer: Any, store: RewardStore, tmp_path: Path
) -> None:
    """GPT-2's projections: all four of the upper layer are adapted, without a warning, and what is saved guides."""
    sizes = {"vocab_size": len(tiny_tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2)).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    base = load(tmp_path / "gpt2")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fan_in_fan_out")
        output = train_doctor(
            base, store, checkpointed(tmp_path / "doctor", max_steps=6), rounds=PAIRS, options=OPTIONS
        )
    doctor = Doctor.from_pretrained(output, dtype="float32", device="cpu")
    moved = {name for name, tensor in tensors(doctor).items() if "lora_B" in name and tensor.any()}
    assert len(moved) == 4
    assert all("h.1." in name for name in moved)
    patient = load(tiny_folder)
    decoder = GuidedDecoder(patient, [load_guide(output, patient, dtype="float32", device="cpu")])
    request = Request.from_text("Hi", betas={"kind": 4.0}, sampling=SamplingParams(max_new_tokens=12, temperature=0.0))
    guided, alone = decoder.generate([request, replace(request, betas={})])
    assert guided.logps != pytest.approx(alone.logps, abs=1e-3)


def test_a_base_without_linear_layers_is_refused(tiny_model: LoadedModel) -> None:
    for layer in tiny_model.model.get_decoder().layers:
        layer.self_attn = layer.mlp = torch.nn.Identity()
    with pytest.raises(
        UserError, match=r"LlamaForCausalLM has no linear layers that an adapter could be put on; train"
    ):
        lora_arguments(tiny_model.model, OPTIONS)


def test_tokens_that_are_no_bytes_are_refused(store: RewardStore, tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(UserError, match="cannot be read as bytes"):
        train_doctor(
            load(save_tiny(tmp_path / "other", tokenizer)), store, config(tmp_path / "d"), rounds=PAIRS, options=OPTIONS
        )
    assert not (tmp_path / "d").exists()


def test_too_few_pairs(tiny_folder: Path, tmp_path: Path) -> None:
    store = acquire(load(tiny_folder), some_pairs(1), tmp_path / "rewards")
    with pytest.raises(UserError, match=r"1 pairs leave none to train on with eval_fraction 0\.9"):
        train_doctor(
            load(tiny_folder), store, config(tmp_path / "d"), rounds=PAIRS, options=DoctorOptions(eval_fraction=0.9)
        )


def test_whole_model_training(tiny_folder: Path, store: RewardStore, tmp_path: Path) -> None:
    """All weights move, and the folder stands without its base."""
    args = checkpointed(tmp_path / "d", max_steps=3)
    output = train_doctor(load(tiny_folder), store, args, rounds=PAIRS, options=replace(OPTIONS, lora=False))
    before, after = tensors(load(tiny_folder).model), tensors(Doctor.from_pretrained(output, dtype="float32").lm)
    assert before.keys() == after.keys()
    same = [name for name in before if before[name].equal(after[name])]
    assert not same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 0}, "lora_rank must be at least 1, got 0"),
        ({"lora_layers": 0.0}, r"lora_layers must lie in \(0, 1\], got 0.0"),
        ({"value_hidden": -1}, "value_hidden must not be negative, got -1"),
        ({"eval_fraction": 1.0}, r"eval_fraction must lie in \[0, 1\), got 1.0"),
    ],
)
def test_doctor_options_check_themselves(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DoctorOptions(**options)
