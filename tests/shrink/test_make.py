"""From a patient to a small model's folder: what it says, what it learns, and what survives a kill."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.killing import JobServer, last_step
from tests.tiny import load, naive_logps, tensors

from llmdoctor.data.prompts import Prompt, load_prompts
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.request import Completion, Request, SamplingParams
from llmdoctor.errors import FingerprintMismatch, TrainingDiverged, UserError
from llmdoctor.models.doctor import Doctor
from llmdoctor.models.layers import keep_layers
from llmdoctor.models.loading import LoadedModel, load_model
from llmdoctor.models.logps import LogitsHead
from llmdoctor.shrink import make, samples
from llmdoctor.shrink.distil import Batches
from llmdoctor.shrink.losses import distillation_loss
from llmdoctor.shrink.make import RECORD_NAME, ShrinkOptions, collate, shrink
from llmdoctor.shrink.samples import Answer, Sampler

PROMPTS = [Prompt(f"p{number}", ({"role": "user", "content": f"{number} the cat" * 3},)) for number in range(40)]
OPTIONS = ShrinkOptions(
    layers=3, tokens=1500, epochs=4, max_new_tokens=16, held_out=8, batch_tokens=200, learning_rate=1e-2
)


@pytest.fixture(scope="module")
def patient(deep_folder: Path) -> LoadedModel:
    return load(deep_folder)


@pytest.fixture(scope="module")
def made(deep_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The small model's folder and what `shrink` returned."""
    folder = tmp_path_factory.mktemp("made") / "small"
    return folder, shrink(load(deep_folder), PROMPTS, folder, options=OPTIONS)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_the_small_model_learns_and_its_record_says_so(patient: LoadedModel, made: tuple[Path, dict[str, Any]]) -> None:
    folder, record = made
    assert json.loads((folder / RECORD_NAME).read_text()) == record
    assert (record["schema"], record["layers"], record["of_layers"]) == (1, [0, 1, 4], 5)
    assert record["patient_fingerprint"] == patient.fingerprint
    assert record["answers"]["held_out"] == 8
    assert record["tokens"]["learned"] >= 1500
    before, after = record["held_out"]["before"], record["held_out"]["after"]
    assert after["kl"] < 0.7 * before["kl"]
    assert after["acceptance"] > before["acceptance"] + 0.1
    assert not folder.with_name("small.parts").exists()


def test_the_folder_is_a_model_with_the_patients_vocabulary(
    patient: LoadedModel, made: tuple[Path, dict[str, Any]]
) -> None:
    folder, record = made
    small = load(folder)
    assert small.model.config.num_hidden_layers == 3
    assert small.fingerprint["model"] != patient.fingerprint["model"]
    assert {key: small.fingerprint[key] for key in ("tokenizer", "template", "dtype")} == {
        key: patient.fingerprint[key] for key in ("tokenizer", "template", "dtype")
    }
    assert small.model.generation_config.eos_token_id == patient.model.generation_config.eos_token_id
    assert torch.equal(small.model.lm_head.weight, patient.model.lm_head.weight), "embeddings and head are frozen"
    kept = tensors(keep_layers(patient.model, record["layers"]))
    trained = tensors(small.model)
    assert {name for name in kept if torch.equal(kept[name], trained[name])} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    assert record["weights_read"]["small"] == sum(parameter.numel() for parameter in small.model.parameters())
    words = "".join(path.read_text() for path in folder.glob("*.json") if path.name != RECORD_NAME)
    assert str(patient.spec) not in words, "nobody else has that folder"
    Doctor.from_base(small, lora={"r": 2, "target_modules": ["q_proj"]})


def test_each_prompt_that_is_held_out_is_answered_once(
    patient: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "BLOCK", 3)
    answers = Sampler(patient, tmp_path, 4, 0).draw("held-out", PROMPTS[:8], None)
    prompts = [tuple(answer.prompt_ids) for answer in answers]
    assert len(prompts) == len(set(prompts)) == 8


def test_a_patient_that_answers_nothing_ends_it(
    patient: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not the disk."""
    sampler = Sampler(patient, tmp_path, 4, 0)
    monkeypatch.setattr(sampler.decoder, "generate", lambda requests: [Completion(id="") for _ in requests])
    for tokens in (100, None):
        with pytest.raises(UserError, match="answers none of the 8 prompts: are they empty or too long"):
            sampler.draw(f"{tokens}", PROMPTS[:8], tokens)


def test_the_figures_are_those_of_the_stored_model(
    patient: LoadedModel, made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Acceptance and KL of the held-out answers, drawn once more and read one by one in float64."""
    folder, record = made
    small = load(folder)
    mixed = random.Random(0).sample(PROMPTS, len(PROMPTS))
    answers = Sampler(patient, tmp_path, OPTIONS.max_new_tokens, 0).draw("held-out", mixed[-8:], 1)
    accepted = kl = tokens = 0.0
    with torch.no_grad():
        for answer in answers:
            ids = torch.tensor([answer.prompt_ids + answer.completion_ids])
            part = slice(len(answer.prompt_ids) - 1, -1)
            p = patient.model(input_ids=ids, use_cache=False).logits[0, part].double().softmax(-1)
            q = small.model(input_ids=ids, use_cache=False).logits[0, part].double().softmax(-1)
            accepted += float(torch.minimum(p, q).sum())
            kl += float((p * (p / q).log()).sum())
            tokens += len(answer.completion_ids)
    assert record["tokens"]["held_out"] == tokens
    assert record["held_out"]["after"]["acceptance"] == pytest.approx(accepted / tokens, abs=1e-4)
    assert record["held_out"]["after"]["kl"] == pytest.approx(kl / tokens, abs=1e-4)


def test_figures_in_bfloat16_are_those_of_the_stored_model(deep_folder: Path, tmp_path: Path) -> None:
    """To the last bit: the same weights, and the same rotary frequencies, which a plain cast would round."""
    patient = load_model(str(deep_folder), dtype="bfloat16", device="cpu")
    record = shrink(patient, PROMPTS, tmp_path / "small", options=replace(OPTIONS, tokens=200, epochs=1))
    small = load_model(str(tmp_path / "small"), dtype="bfloat16", device="cpu").model
    small.set_attn_implementation("eager")
    mixed = random.Random(0).sample(PROMPTS, len(PROMPTS))
    held = Sampler(patient, tmp_path / "answers", OPTIONS.max_new_tokens, 0).draw("held-out", mixed[-8:], 1)
    assert make._measure(small, held, LogitsHead.for_model(patient.model)) == record["held_out"]["after"]


def test_total_variation_takes_over_as_training_goes_on(
    deep_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights_seen: list[float] = []

    def loss(hidden: torch.Tensor, teacher: torch.Tensor, head: Any, tv_weight: float) -> torch.Tensor:
        weights_seen.append(tv_weight)
        return distillation_loss(hidden, teacher, head, tv_weight)

    monkeypatch.setattr(make, "distillation_loss", loss)
    shrink(load(deep_folder), PROMPTS, tmp_path / "small", options=replace(OPTIONS, epochs=1, tv_weight=0.5))
    steps = len(weights_seen)
    assert steps > 5
    assert weights_seen == pytest.approx([0.5 * step / steps for step in range(steps)])


def test_a_finished_run_does_nothing_again(
    deep_folder: Path, made: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, record = made
    before = weights(folder)
    folder.with_name("small.parts").mkdir()
    monkeypatch.setattr(make, "keep_layers", lambda *_: pytest.fail("work"))
    assert shrink(load(deep_folder), PROMPTS, folder, options=OPTIONS) == record
    assert weights(folder) == before
    assert not folder.with_name("small.parts").exists(), "what a kill at the very end had left"
    for options, prompts in ((replace(OPTIONS, seed=1), PROMPTS), (OPTIONS, PROMPTS[1:])):
        with pytest.raises(FingerprintMismatch, match=r"was made from other inputs .*stored .*, now "):
            shrink(load(deep_folder), prompts, folder, options=options)


def test_answers_are_the_patients_own_at_temperature_one(patient: LoadedModel, tmp_path: Path) -> None:
    sampler = Sampler(patient, tmp_path, max_new_tokens=12, seed=5)
    prompts = PROMPTS[:3]
    drawn = sampler.draw("learned", prompts, 60)
    assert sum(len(answer.completion_ids) for answer in drawn) >= 60
    assert len({tuple(answer.completion_ids) for answer in drawn}) == len(drawn) > 3, "a prompt's draws differ"
    for answer in drawn:
        ids, states = answer.prompt_ids + answer.completion_ids, answer.states()
        assert states.shape == (answer.length - 1, 32)
        begin = len(answer.prompt_ids) - 1
        plain = patient.model.get_decoder()(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, :-1]
        assert torch.allclose(states, plain, atol=1e-5)
        logits = patient.model.lm_head(states[begin:])
        assert torch.allclose(answer.log_normalisers()[begin:], logits.logsumexp(-1), atol=1e-5)
        assert not answer.log_normalisers()[:begin].any()
        got = logits.log_softmax(-1).gather(1, torch.tensor(answer.completion_ids)[:, None])
        expected = naive_logps(patient.model, answer.prompt_ids, answer.completion_ids)
        assert torch.allclose(got[:, 0].double(), expected, atol=1e-4), ids
    stored = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    told: list[int] = []
    assert sampler.draw("learned", prompts, 60, told.append) == drawn
    assert sum(told) == 60, "of the last block's tokens those that were wanted"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stored, "what is there is not drawn again"
    first = min(stored)
    from_before = {name: tensor for name, tensor in load_file(first).items() if name != "log_normalisers"}
    save_file(from_before, str(first))
    assert sampler.draw("learned", prompts, 60) == drawn
    assert drawn[0].log_normalisers().any(), "a file of another format is drawn again"
    assert sampler.draw("other", prompts, 1)[0].completion_ids != drawn[0].completion_ids
    seed = random.Random("5/learned/0/p0").getrandbits(62)
    request = Request(prompts[0].messages, sampling=SamplingParams(max_new_tokens=12, temperature=1.0, seed=seed))
    assert GuidedDecoder(patient).generate([request])[0].token_ids == drawn[0].completion_ids


def test_batches_hold_every_answer_once_and_no_more_tokens_than_allowed() -> None:
    draw = random.Random(0)
    answers = [Answer([1] * draw.randint(1, 9), [2] * draw.randint(1, 9), Path(), n) for n in range(50)]
    answers.append(Answer([1] * 30, [2] * 30, Path(), 50))
    batches = Batches(answers, 40).batches
    assert sorted(answer.start for batch in batches for answer in batch) == list(range(51))
    sizes = [len(batch) * max(answer.length for answer in batch) for batch in batches]
    assert sizes[-1] == 60, "an answer that is too long by itself is a batch by itself"
    assert max(sizes[:-1]) <= 40
    assert len(batches) < 25


def test_collate(patient: LoadedModel, tmp_path: Path) -> None:
    """The docstring's example: columns 1, 2 of the first row and 0 of the second come before answer tokens."""
    states = torch.arange(8.0).reshape(4, 2)
    make_file = tmp_path / "s.safetensors"
    save_file({"states": states}, str(make_file))
    batch = collate([Answer([5, 6], [7, 2], make_file, 1), Answer([5], [8], make_file, 0)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2] + [0] * 12, [5, 8] + [0] * 14]
    assert batch["before"].nonzero().tolist() == [[0, 1], [0, 2], [1, 0]]
    assert torch.equal(batch["states"], states[[2, 3, 0]])


JOB = f"""
from pathlib import Path
from llmdoctor.data.prompts import Prompt
from llmdoctor.models.loading import load_model
from llmdoctor.shrink.make import ShrinkOptions, shrink

def main(patient, output):
    shrink(load_model(patient, dtype="float32", device="cpu"), {PROMPTS!r}, output, options={OPTIONS!r})
"""


def test_a_killed_run_goes_on_and_ends_the_same(
    deep_folder: Path, made: tuple[Path, dict[str, Any]], tmp_path: Path, job_server: JobServer
) -> None:
    """Killed while it draws and twice while it trains."""
    output = tmp_path / "small"
    parts = tmp_path / "small.parts"

    def progress() -> int:
        return len(list((parts / "answers").glob("*.safetensors"))) + last_step(parts / "checkpoints")

    seen = job_server.run_through_kills(
        JOB, deep_folder, output, progress=progress, kills=(1, 12, 40), left=lambda: (progress(), output.exists())
    )
    assert not any(finished for _, finished in seen)
    assert seen[0][0] < seen[1][0] < seen[2][0]
    assert weights(output) == weights(made[0])
    assert json.loads((output / RECORD_NAME).read_text())["held_out"] == made[1]["held_out"]
    assert list(tmp_path.iterdir()) == [output]


def test_an_unfinished_run_of_other_settings_is_refused(deep_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "small"
    with pytest.raises(TrainingDiverged, match="lower learning_rate"):
        shrink(load(deep_folder), PROMPTS, output, options=replace(OPTIONS, learning_rate=1e30))
    assert not output.exists()
    with pytest.raises(FingerprintMismatch, match=r"small.parts was made .*\(learning_rate: stored 1e\+30, now "):
        shrink(load(deep_folder), PROMPTS, output, options=OPTIONS)


def test_bad_input(patient: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "small"
    for options, message in (
        (replace(OPTIONS, layers=5), "fewer than the 5 there are, got 5"),
        (replace(OPTIONS, keep="4,1"), "ascending numbers from 0 to 4"),
        (replace(OPTIONS, held_out=40), "40 prompts leave none to learn from with held_out 40"),
    ):
        with pytest.raises(UserError, match=message):
            shrink(patient, PROMPTS, output, options=options)
    with monkeypatch.context() as patched:
        patched.setattr(
            patient.model.lm_head, "forward", lambda hidden: hidden[..., :1].expand(*hidden.shape[:-1], 300)
        )
        patched.setattr(LogitsHead, "logits", lambda self, hidden: hidden.new_zeros(*hidden.shape[:-1], 300))
        with pytest.raises(UserError, match=r"cannot be shrunk: LlamaForCausalLM: logits are not head\(hidden state\)"):
            shrink(patient, PROMPTS, output, options=OPTIONS)
    assert not list(tmp_path.iterdir()), "refused before anything is written"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="holds something else than a shrunk model"):
        shrink(patient, PROMPTS, output, options=OPTIONS)
    for bad in (
        {"layers": 0}, {"tokens": 0}, {"epochs": 0}, {"epochs": float("inf")}, {"max_new_tokens": 0}, {"held_out": 0},
        {"learning_rate": 0}, {"batch_tokens": 0}, {"tv_weight": 1.5},
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"{next(iter(bad))} must be"):
            ShrinkOptions(**bad)


@pytest.mark.model
def test_the_real_patient(tmp_path: Path) -> None:
    """Five of thirty layers have nothing in common with the patient; forty short steps halve the divergence."""
    patient = load_model("builtin:smollm2", device="cpu")
    options = ShrinkOptions(tokens=800, epochs=2, max_new_tokens=40, held_out=4, batch_tokens=128)
    record = shrink(patient, load_prompts("builtin:prompts/train", limit=24), tmp_path / "small", options=options)
    assert record["layers"] == [0, 1, 2, 3, 29]
    assert record["weights_read"]["small"] < 0.35 * record["weights_read"]["patient"]
    before, after = record["held_out"]["before"], record["held_out"]["after"]
    assert before["acceptance"] < 0.02
    assert after["acceptance"] > 0.05
    assert after["kl"] < before["kl"] / 2
    small = load_model(str(tmp_path / "small"), device="cpu")
    assert small.fingerprint["tokenizer"] == patient.fingerprint["tokenizer"]
    assert GuidedDecoder(small).generate([Request.from_text("Hi", sampling=SamplingParams(max_new_tokens=4))])
