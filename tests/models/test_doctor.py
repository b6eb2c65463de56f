"""The doctor: what it is before training, what a folder keeps, and what training may change."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import peft.utils.save_and_load
import pytest
import torch
from huggingface_hub import errors as hub_errors
from peft.tuners.lora.layer import Linear
from safetensors.torch import load_file
from tests.tiny import acquire, config, fresh_doctor, load, naive_logps, shaken, some_pairs, tensors

from llmdoctor.errors import FingerprintMismatch, UserError
from llmdoctor.models import doctor as doctor_module
from llmdoctor.models import hub
from llmdoctor.models.card import model_card
from llmdoctor.models.doctor import Doctor, DoctorConfig, ValueHead, local_folder
from llmdoctor.models.loading import load_model, tokenizer_fingerprint, weights_fingerprint
from llmdoctor.tfpo.trainer import TFPOTrainer

PROMPTS = [[5, 6, 7], list(range(20, 40))]
COMPLETIONS = [[9, 8, 7, 6, 2], [30, 2]]


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Two rows of different prompts and completions: P = 20, L = 5."""
    width, length = 20, 5
    ids = torch.zeros(2, width + length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        ids[row, width - len(prompt) : width + len(completion)] = torch.tensor(prompt + completion)
        mask[row, width - len(prompt) : width + len(completion)] = 1
    return ids, mask, mask[:, width:].bool(), width


@torch.no_grad()
def outputs(doctor: Doctor) -> tuple[torch.Tensor, torch.Tensor]:
    logps, log_v = doctor.eval()(*batch())
    return logps, log_v


@pytest.mark.parametrize("lora", [True, False])
def test_a_fresh_doctor_is_its_base_with_v_of_one(tiny_folder: Path, lora: bool) -> None:
    base = load(tiny_folder)
    logps, log_v = outputs(fresh_doctor(load(tiny_folder), lora=lora))
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        slow = naive_logps(base.model, prompt, completion)
        torch.testing.assert_close(logps[row, : len(completion)].double(), slow, rtol=0, atol=1e-4)
    assert logps[1, 2:].eq(0).all()
    assert log_v.shape == (2, 6)
    assert log_v.eq(0).all()
    # Exactly the base, not just nearly: an untrained adapter adds 0.
    ids = torch.tensor([PROMPTS[1]])
    doctor = fresh_doctor(load(tiny_folder), lora=lora)
    assert doctor.lm(input_ids=ids).logits.equal(base.model(input_ids=ids).logits)


def test_adapters_off_is_the_base_whatever_was_trained(tiny_folder: Path) -> None:
    fresh, _ = outputs(fresh_doctor(load(tiny_folder)))
    doctor = shaken(fresh_doctor(load(tiny_folder)))
    assert not torch.allclose(outputs(doctor)[0], fresh, atol=1e-3)
    with doctor.as_reference():
        assert outputs(doctor)[0].equal(fresh)
    with (
        pytest.raises(RuntimeError, match="a fully trained doctor holds no reference"),
        fresh_doctor(load(tiny_folder), lora=False).as_reference(),
    ):
        pass


def test_the_seed_decides_the_adapter_and_leaves_the_callers_alone(tiny_folder: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, same, other = (tensors(fresh_doctor(load(tiny_folder), seed=seed, value_hidden=4)) for seed in (1, 1, 2))
    assert torch.rand(3).equal(expected)
    assert all(one[name].equal(same[name]) for name in one)
    assert any(not one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("value_hidden", [0, 8])
def test_round_trip(tiny_folder: Path, tmp_path: Path, lora: bool, value_hidden: int) -> None:
    """Log-probs and values are the same numbers, bit for bit."""
    doctor = shaken(fresh_doctor(load(tiny_folder), lora=lora, value_hidden=value_hidden, dimension="kind"))
    doctor.doctor_config.metrics = {"preference_accuracy": 0.75}
    doctor.save_pretrained(tmp_path / "doctor")
    again = Doctor.from_pretrained(tmp_path / "doctor", dtype="float32", device="cpu")
    assert again.doctor_config == doctor.doctor_config
    for mine, theirs in zip(outputs(doctor), outputs(again), strict=True):
        assert mine.equal(theirs)
    assert not outputs(again)[1].eq(0).any(), "the value head's own weights came back"
    assert not any(parameter.requires_grad for parameter in again.lm.parameters())
    open_again = Doctor.from_pretrained(tmp_path / "doctor", dtype="float32", device="cpu", trainable=True)
    names = {name for name, parameter in open_again.named_parameters() if parameter.requires_grad}
    assert names == {name for name, parameter in doctor.named_parameters() if parameter.requires_grad}
    given = Doctor.from_pretrained(tmp_path / "doctor", base=load(tiny_folder), dtype="float32", device="cpu")
    assert outputs(given)[0].equal(outputs(doctor)[0])


@pytest.mark.parametrize("lora", [True, False])
def test_weights_are_read_back_in_place(tiny_folder: Path, tmp_path: Path, lora: bool) -> None:
    doctor = shaken(fresh_doctor(load(tiny_folder), lora=lora, value_hidden=3))
    before = tensors(doctor)
    doctor.save_weights(tmp_path)
    shaken(doctor, seed=5)
    doctor.load_weights(tmp_path)
    after = tensors(doctor)
    assert all(before[name].equal(after[name]) for name in before)


@pytest.mark.parametrize("lora", [True, False])
def test_merged_is_unmerged(tiny_folder: Path, lora: bool) -> None:
    doctor = shaken(fresh_doctor(load(tiny_folder), lora=lora))
    expected, _ = outputs(doctor)
    merged = doctor.merged()
    assert not [name for name, _ in merged.model.named_parameters() if "lora" in name]
    assert not any(parameter.requires_grad for parameter in merged.model.parameters())
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        got = naive_logps(merged.model, prompt, completion)
        torch.testing.assert_close(got, expected[row, : len(completion)].double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("lora", [True, False])
def test_merged_weights_are_nobody_elses(tiny_folder: Path, tmp_path: Path, lora: bool) -> None:
    """Token rewards and doctors of the base are not the merged model's."""
    base = load(tiny_folder)
    first, second = (shaken(fresh_doctor(load(tiny_folder), lora=lora), seed=seed).merged() for seed in (1, 2))
    again = shaken(fresh_doctor(load(tiny_folder), lora=lora), seed=1).merged()
    assert first.fingerprint == again.fingerprint
    assert len({each.fingerprint["model"] for each in (base, first, second)}) == 3
    assert {key: first.fingerprint[key] for key in ("tokenizer", "template")} == {
        key: base.fingerprint[key] for key in ("tokenizer", "template")
    }
    acquire(base, some_pairs(4), tmp_path / "rewards")
    with pytest.raises(FingerprintMismatch, match="model: stored"):
        acquire(first, some_pairs(4), tmp_path / "rewards")
    assert not fresh_doctor(load(tiny_folder)).doctor_config.is_on(first)


def test_weights_that_were_cut_and_a_base_that_is_gone_are_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    fresh_doctor(load(base)).save_pretrained(tmp_path / "d")
    weights = tmp_path / "d/adapter/adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:40])
    with pytest.raises(UserError, match=r"is not whole: adapter/adapter_model.safetensors is cut or no weights at all"):
        Doctor.from_pretrained(tmp_path / "d", dtype="float32", device="cpu")
    weights.write_bytes(whole)
    shutil.rmtree(base)
    with pytest.raises(UserError, match=r"the base of the doctor .*/d, as it was trained: There is no folder .*/base"):
        Doctor.from_pretrained(tmp_path / "d", dtype="float32", device="cpu")
    (tmp_path / "begun/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="its training has not finished: run the same command again"):
        DoctorConfig.load(tmp_path / "begun")


def test_the_value_head_keeps_float32_in_autocast() -> None:
    torch.manual_seed(0)
    head = ValueHead(16, width=8)
    for parameter in head.parameters():
        parameter.data.normal_()
    hidden = torch.randn(5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head(hidden.bfloat16())
    assert inside.dtype == torch.float32
    assert torch.equal(inside, head(hidden.bfloat16()))


def test_an_adapter_is_merged_in_float32_without_a_second_model_in_it(tiny_folder: Path) -> None:
    base = load_model(str(tiny_folder), dtype="bfloat16", device="cpu")
    doctor = shaken(fresh_doctor(base))
    expected = {}
    for name, module in doctor.lm.named_modules():
        if hasattr(module, "get_delta_weight"):
            place = name.removeprefix("base_model.model.")
            weight = module.get_base_layer().weight.float() + module.get_delta_weight("default").float()
            expected[f"{place}.weight"] = weight.bfloat16()
    assert expected
    largest = 0
    merge = Linear.merge

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal largest
        wide = [p for name, p in doctor.lm.named_parameters() if p.dtype == torch.float32 and "lora_" not in name]
        largest = max(largest, sum(p.numel() for p in wide))
        merge(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Linear, "merge", watched)
        merged = doctor.merged().model
    found = dict(merged.named_parameters())
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert 0 < largest <= max(weight.numel() for weight in expected.values())


def test_merging_leaves_the_rotary_frequencies_as_they_are(tiny_folder: Path) -> None:
    """Rounded to bfloat16 they would turn far positions by whole radians."""
    base = load_model(str(tiny_folder), dtype="bfloat16", device="cpu")
    before = {name: buffer.clone() for name, buffer in base.model.named_buffers()}
    assert any(not buffer.equal(buffer.bfloat16().float()) for buffer in before.values())
    merged = shaken(fresh_doctor(base)).merged().model
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16} == {merged.config.dtype}
    after = dict(merged.named_buffers())
    assert before.keys() == after.keys()
    for name, buffer in before.items():
        torch.testing.assert_close(after[name], buffer, rtol=0, atol=0)


@pytest.mark.parametrize("value_hidden", [0, 8])
def test_training_changes_every_adapter_and_no_base_weight(
    tiny_folder: Path, tmp_path: Path, value_hidden: int
) -> None:
    base = load(tiny_folder)
    store = acquire(base, some_pairs(8), tmp_path / "rewards", theta=0.1)
    doctor = fresh_doctor(base, value_hidden=value_hidden)
    before = tensors(doctor)
    # The first step moves only what stands last (B of LoRA, the head's output); the others' gradient passes through it.
    TFPOTrainer(doctor, config(tmp_path / "out", max_steps=3), store.dataset()).train()
    after = tensors(doctor)
    trained = {name for name in before if "lora_" in name or "value_head" in name}
    # 2 layers × 3 modules × (A, B), and the head: norm, output's weight and bias, perhaps a hidden layer's.
    assert len(trained) == 12 + (5 if value_hidden else 3)
    unchanged = {name for name in trained if before[name].equal(after[name])}
    assert not unchanged
    changed = {name for name in before if name not in trained and not before[name].equal(after[name])}
    assert not changed
    doctor.lm.unload()
    assert weights_fingerprint(doctor.causal_lm) == weights_fingerprint(load(tiny_folder).model)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_folder: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        doctor = shaken(fresh_doctor(load(tiny_folder))).train()
        if checkpointing:
            doctor.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        logps, log_v = doctor(*batch())
        (logps.sum() + log_v.square().sum()).backward()
        gradients.append({name: p.grad for name, p in doctor.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 15
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, gradients[1][name])


@pytest.mark.parametrize("detach", [False, True])
def test_detach_keeps_the_value_gradient_out_of_the_model(tiny_folder: Path, detach: bool) -> None:
    doctor = shaken(fresh_doctor(load(tiny_folder)))
    doctor.detach_value = detach
    doctor(*batch())[1].sum().backward()
    assert all(parameter.grad is not None for parameter in doctor.value_head.parameters())
    reached = [parameter.grad is not None for name, parameter in doctor.named_parameters() if "lora_" in name]
    assert (not any(reached)) if detach else all(reached)


def test_another_base_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    base = load(tiny_folder)
    fresh_doctor(load(tiny_folder)).save_pretrained(tmp_path / "doctor")
    other = replace(base, spec="other", fingerprint={**base.fingerprint, "model": "feedbeef"})
    stored = base.fingerprint["model"]
    with pytest.raises(UserError, match=rf"trained on .* \(weights {stored}\), .* is other \(weights feedbeef\)"):
        Doctor.from_pretrained(tmp_path / "doctor", base=other)
    base.tokenizer.add_tokens(["<new>"])
    with pytest.raises(UserError, match=rf"\(tokenizer {tokenizer_fingerprint(base.tokenizer)}\); give it the base"):
        Doctor.from_pretrained(tmp_path / "doctor", base=base)


def test_a_base_whose_files_changed_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    fresh_doctor(load(folder)).save_pretrained(tmp_path / "doctor")
    changed = load(folder).model
    with torch.no_grad():
        changed.model.norm.weight.add_(1.0)
    changed.save_pretrained(folder)
    with pytest.raises(UserError, match="give it the base it was trained on"):
        Doctor.from_pretrained(tmp_path / "doctor", dtype="float32", device="cpu")


def test_the_card_and_the_files(tiny_folder: Path, tmp_path: Path) -> None:
    doctor = fresh_doctor(replace(load(tiny_folder), spec="someone/base"), dimension="kind")
    doctor.doctor_config.metrics = {"preference_accuracy": 0.8125, "margin": 1.25}
    doctor.doctor_config.training = {"eta": 0.5}
    doctor.save_pretrained(tmp_path / "doctor")
    assert {path.name for path in (tmp_path / "doctor").iterdir()} == {
        "README.md",
        "adapter",
        "doctor.json",
        "value_head.safetensors",
    }
    card = (tmp_path / "doctor" / "README.md").read_text()
    for line in ("| preference_accuracy | 0.8125 |", "| margin | 1.25 |", "| eta | 0.5 |", "# Doctor: kind"):
        assert f"\n{line}\n" in card
    assert card.startswith("---\nlibrary_name: llmdoctor\nbase_model: someone/base\n")
    assert str(tiny_folder) not in "".join(p.read_text() for p in (tmp_path / "doctor").rglob("*.json"))
    assert "base_model:" not in model_card({**vars(doctor.doctor_config), "base": "builtin:smollm2", "metrics": {}})


def test_the_bases_revision_is_kept(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(repository: str, *, revision: str | None, **_: Any) -> str:
        asked.append((repository, revision))
        return str(tiny_folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    base = load_model("someone/base", revision="v1", dtype="float32", device="cpu")
    fresh_doctor(base).save_pretrained(tmp_path / "doctor")
    adapter = json.loads((tmp_path / "doctor" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("someone/base", "v1")
    card = (tmp_path / "doctor" / "README.md").read_text()
    assert "\nbase_model: someone/base\n" in card
    assert "--patient someone/base@v1 " in card
    Doctor.from_pretrained(tmp_path / "doctor", dtype="float32", device="cpu")
    assert asked == [("someone/base", "v1")] * 2


def test_saving_asks_no_network(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> bool:
        raise AssertionError("peft looked on the hub")

    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", refuse)
    doctor = fresh_doctor(replace(load(tiny_folder), spec="someone/base"))
    doctor.save_pretrained(tmp_path / "doctor")
    assert not [
        name for name in load_file(tmp_path / "doctor" / "adapter" / "adapter_model.safetensors") if "embed" in name
    ]


def test_the_folder_appears_whole_or_not_at_all(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doctor = fresh_doctor(load(tiny_folder))

    def disk_full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(doctor_module, "save_file", disk_full)
        with pytest.raises(OSError, match="No space left"):
            doctor.save_pretrained(tmp_path / "doctor")
        assert list(tmp_path.iterdir()) == []
    doctor.save_pretrained(tmp_path / "doctor")
    before = {path: path.read_bytes() for path in (tmp_path / "doctor").rglob("*") if path.is_file()}
    shaken(doctor)
    with monkeypatch.context() as context:
        context.setattr(doctor_module, "save_file", disk_full)
        with pytest.raises(OSError, match="No space left"):
            doctor.save_pretrained(tmp_path / "doctor")
    assert before == {path: path.read_bytes() for path in (tmp_path / "doctor").rglob("*") if path.is_file()}
    doctor.save_pretrained(tmp_path / "doctor")
    head = tmp_path / "doctor" / "value_head.safetensors"
    assert head.read_bytes() != before[head]
    assert [path.name for path in tmp_path.iterdir()] == ["doctor"]


def test_its_read_out_goes_with_it(tiny_folder: Path, tmp_path: Path) -> None:
    """Over itself, too; a doctor without one leaves none behind."""
    one, other = tmp_path / "one", tmp_path / "other"
    fresh_doctor(load(tiny_folder)).save_pretrained(one)
    plain = Doctor.from_pretrained(one, base=load(tiny_folder))
    (one / "readout").mkdir()
    (one / "readout" / "readout.json").write_text("the judge")
    doctor = Doctor.from_pretrained(one, base=load(tiny_folder))
    for folder in (other, one):
        doctor.save_pretrained(folder)
        assert (folder / "readout" / "readout.json").read_text() == "the judge"
    plain.save_pretrained(other)
    assert not (other / "readout").exists()
    (one / "readout").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"the read-out .*readout of this doctor is gone: put it back"):
        doctor.save_pretrained(other)
    assert (other / "doctor.json").is_file()


def test_push_to_hub_uploads_the_folder(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None) -> None:
            seen["token"] = token

        def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
            seen["repo"] = (repo_id, private, exist_ok)

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> str:
            shutil.copytree(folder_path, tmp_path / "uploaded")
            return "https://example.org/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    doctor = shaken(fresh_doctor(load(tiny_folder)))
    assert doctor.push_to_hub("me/doctor", token="secret") == "https://example.org/commit"
    assert seen == {"token": "secret", "repo": ("me/doctor", True, True)}
    again = Doctor.from_pretrained(tmp_path / "uploaded", dtype="float32", device="cpu")
    assert outputs(again)[0].equal(outputs(doctor)[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"is not a doctor: it has no doctor\.json \(train one with `llmdoctor train`\)"),
        ("{", r"doctor\.json is not JSON"),
        ("[]", "has schema version None, this version of llmdoctor reads 1"),
        ('{"schema_version": 7}', "has schema version 7, this version of llmdoctor reads 1"),
        ('{"schema_version": 1, "base": "b", "base_fingerprint": {}, "bse": 1}', "has unknown fields: bse"),
        ('{"schema_version": 1}', "lacks the fields: base, base_fingerprint"),
        (json.dumps({"schema_version": 1, "base": "b", "base_fingerprint": {}}), "is not whole: it lacks adapter/"),
    ],
)
def test_what_is_no_doctor(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "doctor.json").write_text(text)
    with pytest.raises(UserError, match=message):
        Doctor.from_pretrained(tmp_path)


@pytest.mark.parametrize("lost", ["value_head.safetensors", "adapter/adapter_model.safetensors"])
def test_a_doctor_that_lost_a_file(tiny_folder: Path, tmp_path: Path, lost: str) -> None:
    fresh_doctor(load(tiny_folder)).save_pretrained(tmp_path / "doctor")
    (tmp_path / "doctor" / lost).unlink()
    with pytest.raises(UserError, match=f"is not whole: it lacks {lost}"):
        Doctor.from_pretrained(tmp_path / "doctor")


def test_config_round_trip(tmp_path: Path) -> None:
    stored = DoctorConfig("b", {"model": "x"}, dimension="kind", metrics={"margin": 1.0}, training={"eta": 0.5})
    (tmp_path / "doctor.json").write_text(json.dumps(vars(stored)))
    assert DoctorConfig.load(tmp_path) == stored


def test_a_base_makes_one_doctor(tiny_folder: Path) -> None:
    base = load(tiny_folder)
    fresh_doctor(base)
    with pytest.raises(UserError, match="carries an adapter already; load the base again for another doctor"):
        fresh_doctor(base)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            hub_errors.LocalEntryNotFoundError,
            "no folder team/doctor here, and the hub could not be reached for team/doctor",
        ),
        (hub_errors.HFValidationError, "'team/doctor' is neither a folder here nor a hub id"),
        (hub_errors.RepositoryNotFoundError, "there is no folder team/doctor here and no public doctor of that id"),
        (hub_errors.GatedRepoError, "team/doctor is gated: accept its terms on the hub"),
    ],
)
def test_a_doctor_that_is_nowhere_says_why(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], message: str
) -> None:
    def nowhere(*_: Any, **__: Any) -> str:
        # Its constructor wants a response of the hub's.
        raise kind.__new__(kind, "the hub's words")

    monkeypatch.setattr(hub, "snapshot_download", nowhere)
    with pytest.raises(UserError, match=message):
        local_folder("team/doctor")
