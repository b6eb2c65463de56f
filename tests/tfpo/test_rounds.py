"""On-policy rounds: answers, rewards and weights of a real training, its target on a small model, and what survives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tests.tiny import (
    LORA,
    OTHER_CORPUS,
    acquire,
    byte_level,
    config,
    fresh_doctor,
    load,
    naive_logps,
    save_tiny,
    shaken,
    some_pairs,
    tensors,
)
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import load_guide
from llmdoctor.decoding.request import Request, SamplingParams
from llmdoctor.errors import UserError
from llmdoctor.models.doctor import READOUT_FOLDER, Doctor, DoctorConfig
from llmdoctor.models.loading import LoadedModel, load_model
from llmdoctor.rewards.readout import Readout, fit_readout, fit_readout_to_ids
from llmdoctor.rewards.store import RewardStore
from llmdoctor.tfpo import lesson, rounds
from llmdoctor.tfpo.options import DoctorOptions
from llmdoctor.tfpo.rounds import ReadoutJudge, RoundOptions, RoundsTrainer, answering, draw_answers
from llmdoctor.tfpo.train import train_doctor

OPTIONS = RoundOptions(rounds=2, pairs_weight=0.0, round_prompts=6, round_eta=0.5)


@pytest.fixture(scope="module")
def store(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RewardStore:
    return acquire(load(tiny_folder), some_pairs(14), tmp_path_factory.mktemp("rewards") / "store", theta=0.1)


class Likes:
    """A judge that gives a reward for every token of some, and remembers what it was asked."""

    def __init__(self, liked: int, worth: float = 1.0) -> None:
        self.liked, self.worth = liked, worth
        self.asked: list[tuple[Any, list[int], bool]] = []

    def __call__(
        self, prompts: Sequence[Any], answers: Sequence[list[int]], ended: Sequence[bool]
    ) -> list[list[float]]:
        self.asked += zip(prompts, answers, ended, strict=True)
        return [[self.worth * (token == self.liked) for token in ids] for ids in answers]


def prompts_of(count: int) -> list[str]:
    return [json.dumps([{"role": "user", "content": f"{number} cats"}]) for number in range(count)]


def rounds_of(
    doctor: Doctor, folder: Path, judge: Any, options: RoundOptions = OPTIONS, patient: LoadedModel | None = None
) -> RoundsTrainer:
    settings = config(folder, per_device_train_batch_size=2, learning_rate=5e-3)
    return RoundsTrainer(doctor, settings, options, prompts_of(6), judge, 5, patient=patient)


def test_rows_are_the_doctors_answers_with_the_judges_rewards(tiny_folder: Path, tmp_path: Path) -> None:
    base = load(tiny_folder)
    doctor = shaken(fresh_doctor(base))
    judge = Likes(7)
    trainer = rounds_of(doctor, tmp_path, judge)
    rows = list(trainer.rows(0))
    assert sorted(row["prompt"] for row in rows) == sorted(prompts_of(6))
    told = [(json.dumps(list(messages)), ids, ended) for messages, ids, ended in judge.asked]
    for place, row in enumerate(rows):
        better_first = sorted(told[2 * place : 2 * place + 2], key=lambda answer: -answer[1].count(7))
        for side, (prompt, ids, ended) in zip(("chosen", "rejected"), better_first, strict=True):
            assert (row["prompt"], row[f"{side}_ids"], row[f"{side}_terminal"]) == (prompt, ids, ended)
            assert row[f"{side}_rewards"] == [float(token == 7) for token in ids]
            with doctor.as_reference():
                messages = json.loads(prompt)
                expected = naive_logps(doctor.lm, doctor.encoder.prompt_ids(messages), ids)
            torch.testing.assert_close(torch.tensor(row[f"{side}_ref_logps"]).double(), expected, atol=1e-4, rtol=1e-4)
    assert len(judge.asked) == 12
    assert any(row["chosen_ids"] != row["rejected_ids"] for row in rows)


def test_answers_are_drawn_from_the_doctor_and_not_from_its_base(tiny_folder: Path) -> None:
    doctor = shaken(fresh_doctor(load(tiny_folder)))
    before = tensors(doctor)
    messages = ({"role": "user", "content": "Hi"},)
    drawn = draw_answers(doctor, [messages] * 3000, list(range(3000)), 1, 512)
    assert {name: tensor for name, tensor in before.items() if not torch.equal(tensor, tensors(doctor)[name])} == {}
    prompt = doctor.encoder.prompt_ids(messages)
    with torch.no_grad():
        logits = doctor.lm(input_ids=torch.tensor([prompt])).logits[0, -1].double()
        with doctor.as_reference():
            base = doctor.lm(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    counts = torch.bincount(torch.tensor([ids[0] for ids, _ in drawn]), minlength=len(logits)).double()

    def chi_square(scores: torch.Tensor) -> float:
        expected = 3000 * scores.softmax(-1)
        return float(((counts - expected).square() / expected).sum())

    # 300 tokens: 299 ± 24 where the draws are from it.
    assert chi_square(logits) < 420 < chi_square(base)


@pytest.mark.parametrize("tokenizer", ["the patient's", "another"])
def test_a_doctor_on_another_base_learns_from_what_the_patient_says_under_its_guidance(
    tiny_folder: Path, tiny_tokenizer: Any, tmp_path: Path, tokenizer: str
) -> None:
    own = byte_level(300, OTHER_CORPUS) if tokenizer == "another" else tiny_tokenizer
    base, patient = load(save_tiny(tmp_path / "base", own, seed=5)), load(tiny_folder)
    doctor = shaken(fresh_doctor(base))
    before = tensors(doctor)
    doctor.save_pretrained(tmp_path / "doctor")
    conversations = [tuple(json.loads(prompt)) for prompt in prompts_of(6)]
    drawn = draw_answers(doctor, conversations, list(range(6)), 9, 3, patient=patient)
    assert {name: tensor for name, tensor in before.items() if not torch.equal(tensor, tensors(doctor)[name])} == {}

    guide = load_guide(tmp_path / "doctor", patient, name="kind", dtype="float32")
    asked = [
        Request(messages, betas={"kind": 1.0}, sampling=SamplingParams(max_new_tokens=9, seed=seed))
        for seed, messages in enumerate(conversations)
    ]
    guided = GuidedDecoder(patient, [guide]).generate(asked)
    assert [end for _, end in drawn] == [answer.finish_reason == "stop" for answer in guided]
    if tokenizer == "the patient's":
        assert [ids for ids, _ in drawn] == [answer.token_ids for answer in guided]
    else:
        texts = [doctor.encoder.decode(ids[:-1] if end else ids) for ids, end in drawn]
        assert [text.rstrip("\ufffd") for text in texts] == [answer.text.rstrip("\ufffd") for answer in guided]
        assert any(texts)
    alone = GuidedDecoder(patient).generate([replace(request, betas={}) for request in asked])
    assert [answer.text for answer in guided] != [answer.text for answer in alone]


def test_training_comes_near_the_tilted_reference(tiny_folder: Path, tmp_path: Path) -> None:
    """One token an answer: the target π_ref · exp(r/η) can be written down."""
    doctor = fresh_doctor(load(tiny_folder))
    prompt = doctor.encoder.prompt_ids(json.loads(prompts_of(1)[0]))
    # A tilt that the model can say: its logits are linear in the last state, which is narrower than the vocabulary.
    head = doctor.causal_lm.get_output_embeddings().weight.detach()
    tilt = head @ torch.randn(head.shape[1], generator=torch.Generator().manual_seed(0))
    tilt = 1.5 * tilt / tilt.std()

    def judge(prompts: Any, answers: Sequence[list[int]], ended: Any) -> list[list[float]]:
        return [[0.25 * float(tilt[token]) for token in ids] for ids in answers]

    def logps() -> torch.Tensor:
        with torch.no_grad():
            return doctor.eval().lm(input_ids=torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)

    target = (logps() + tilt).log_softmax(-1)

    def distance() -> float:
        return float((target.exp() * (target - logps())).sum())

    start = distance()
    options = RoundOptions(rounds=10, round_prompts=256, round_eta=0.25, round_branch_coef=1.0)
    settings = config(tmp_path, per_device_train_batch_size=32, learning_rate=1e-2)
    RoundsTrainer(doctor, settings, options, prompts_of(1) * 256, judge, 1).train()
    assert start > 0.5
    assert distance() < 0.2 * start


@pytest.mark.parametrize("who", ["the doctor", "the patient"])
def test_a_killed_run_ends_with_the_same_weights(tiny_folder: Path, tmp_path: Path, who: str) -> None:
    """Whoever answers."""
    patient = load(tiny_folder) if who == "the patient" else None
    whole = fresh_doctor(load(tiny_folder))
    rounds_of(whole, tmp_path / "whole", Likes(7), patient=patient).train()

    class Dies(Likes):
        def __call__(self, *args: Any) -> Any:
            if self.asked:
                raise KeyboardInterrupt
            return super().__call__(*args)

    with pytest.raises(KeyboardInterrupt):
        rounds_of(fresh_doctor(load(tiny_folder)), tmp_path / "cut", Dies(7), patient=patient).train()
    kept = [path.name for path in sorted((tmp_path / "cut").glob("checkpoint-*"))]
    assert kept == ["checkpoint-3"], "a checkpoint stands at the end of each round"
    doctor, judge = fresh_doctor(load(tiny_folder)), Likes(7)
    trainer = rounds_of(doctor, tmp_path / "cut", judge, patient=patient)
    trainer.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert len(judge.asked) == 12, "the first round's answers were there"
    expected, found = tensors(whole), tensors(doctor)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def test_train_doctor_goes_on_in_rounds_and_keeps_its_judge(
    tiny_folder: Path, tmp_path: Path, store: RewardStore
) -> None:
    heard: list[tuple[str, int]] = []

    def train(name: str, rounds: RoundOptions, **more: Any) -> Path:
        base, patient = load(tiny_folder), load(tiny_folder)
        return train_doctor(
            base,
            store,
            config(tmp_path / name, save_strategy="epoch"),
            options=DoctorOptions(lora_rank=2, eval_fraction=0.15),
            rounds=rounds,
            patient=patient,
            **more,
        )

    folder = train("rounds", OPTIONS, told=lambda what, units: heard.append((what, units)))
    plain = train("plain", RoundOptions(rounds=0))
    assert not (plain / READOUT_FOLDER).exists()
    recorded = json.loads((folder / "doctor.json").read_text())
    assert recorded["training"]["rounds"] == 2
    assert recorded["training"]["round_eta"] == 0.5
    assert recorded["metrics"]["held_out_pairs"] == 2
    weights = [Doctor.from_pretrained(path, base=load(tiny_folder)).state_dict() for path in (folder, plain)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0] if "lora_" in name)
    readout = Readout.from_pretrained(folder / READOUT_FOLDER, load(tiny_folder))
    assert readout.fit.pairs == 12, "pairs held out are not read"
    direct = fit_readout(load(tiny_folder), some_pairs(14)[:12])
    torch.testing.assert_close(readout.weights, direct.weights, atol=1e-5, rtol=1e-4)
    began = [what for what, _ in heard if what]
    assert began == [
        "reading the pairs for the read-out",
        "reading the pairs held out",
        "round 1 of 2: answers",
        "round 2 of 2: answers",
    ]
    assert sum(units for what, units in heard if not what) == 12 + 2 + 2 * 16
    assert train("rounds", OPTIONS) == folder, "a finished run is left as it is"
    other_pairs = acquire(load(tiny_folder), some_pairs(14, seed=5), tmp_path / "other-rewards", theta=0.1)
    train_doctor(
        load(tiny_folder), other_pairs, config(tmp_path / "rounds", save_strategy="epoch"), rounds=OPTIONS,
        options=DoctorOptions(lora_rank=2, eval_fraction=0.15), patient=load(tiny_folder), resume=False,
    )  # fmt: skip
    anew = Readout.from_pretrained(folder / READOUT_FOLDER, load(tiny_folder))
    assert not torch.allclose(anew.weights, readout.weights), "begun anew, the judge is fitted anew"
    other = replace(load(tiny_folder), fingerprint={**load(tiny_folder).fingerprint, "model": "feedbeef"})
    with pytest.raises(UserError, match="is not the patient that gave the rewards"):
        train_doctor(load(tiny_folder), store, config(tmp_path / "other"), rounds=OPTIONS, patient=other)
    with pytest.raises(UserError, match=r"base and patient are one and the same model, .* load_model\('"):
        train_doctor(other, store, config(tmp_path / "other"), rounds=OPTIONS, patient=replace(other))


def test_rounds_of_a_doctor_on_another_base(
    tiny_folder: Path, tmp_path: Path, store: RewardStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained to the end, on what the patient said, in its own tokens and beside what its own base says of them."""
    asked: list[tuple[Any, int, int]] = []
    answer = rounds.draw_answers

    def noted(doctor: Doctor, conversations: Any, seeds: Any, most: int, *args: Any, **kwargs: Any) -> Any:
        asked.extend((messages, seed, most) for messages, seed in zip(conversations, seeds, strict=True))
        return answer(doctor, conversations, seeds, most, *args, **kwargs)

    monkeypatch.setattr(rounds, "draw_answers", noted)
    base = load(save_tiny(tmp_path / "base", byte_level(300, OTHER_CORPUS), seed=5))
    folder = train_doctor(
        base, store, config(tmp_path / "doctor", save_strategy="epoch"), rounds=OPTIONS,
        options=DoctorOptions(lora_rank=2, eval_fraction=0.15), patient=load(tiny_folder),
    )  # fmt: skip
    assert json.loads((folder / "doctor.json").read_text())["base"] == str(tmp_path / "base")
    longest = max(len(row[f"{side}_ids"]) for row in store.rows(12) for side in ("chosen", "rejected"))
    assert {most for _, _, most in asked} == {longest}, "as long as the longest response in the patient's tokens"
    own = load(tmp_path / "base")
    encoder = ChatEncoder.for_model(own.model, own.tokenizer)
    # Before the first step the doctor changes nothing.
    alone = GuidedDecoder(load(tiny_folder)).generate(
        [
            Request(messages, sampling=SamplingParams(max_new_tokens=longest, seed=seed))
            for messages, seed, _ in asked[: 2 * 8]
        ]
    )
    rows = pq.read_table(folder / "checkpoints" / "rounds" / "rows" / "000.parquet").to_pylist()
    found = []
    for row in rows:
        for side in ("chosen", "rejected"):
            ids, end = row[f"{side}_ids"], row[f"{side}_terminal"]
            found.append(encoder.decode(ids[:-1] if end else ids))
            expected = naive_logps(own.model, encoder.prompt_ids(json.loads(row["prompt"])), ids)
            torch.testing.assert_close(torch.tensor(row[f"{side}_ref_logps"]).double(), expected, atol=1e-4, rtol=1e-4)
    assert set(found) <= {completion.text.rstrip("\ufffd") for completion in alone}
    assert len(set(found)) > 4


@pytest.mark.parametrize("base", ["fast", "through transformers"])
def test_an_untrained_doctor_on_another_base_changes_nothing(
    tiny_folder: Path, tiny_tokenizer: Any, tmp_path: Path, base: str
) -> None:
    """In bfloat16, which shows whether doctor and reference are one model in one precision."""
    folder = save_tiny(tmp_path / "base", tiny_tokenizer, seed=5)
    if base != "fast":
        torch.manual_seed(0)
        GPTNeoXForCausalLM(
            GPTNeoXConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                          num_attention_heads=4, max_position_embeddings=512, initializer_range=0.2)
        ).save_pretrained(folder)  # fmt: skip
    loaded = load_model(str(folder), dtype="bfloat16", device="cpu")
    targets = LORA["target_modules"] if base == "fast" else ["query_key_value", "dense_4h_to_h"]
    doctor = Doctor.from_base(loaded, lora={**LORA, "target_modules": targets})
    decoder = answering(doctor, load(tiny_folder), 4)
    (done,) = decoder.generate([Request.from_text("Hi", betas={"doctor": 1.0})])
    assert done.logps == pytest.approx(done.patient_logps, abs=1e-5)


def test_an_answer_that_is_longer_in_the_doctors_tokens_is_cut_at_its_context(
    tiny_folder: Path, tmp_path: Path
) -> None:
    base = load(save_tiny(tmp_path / "base", byte_level(259, OTHER_CORPUS), context=80))
    doctor = shaken(fresh_doctor(base))
    conversations = [tuple(json.loads(prompt)) for prompt in prompts_of(6)]
    drawn = draw_answers(doctor, conversations, list(range(6)), 60, 6, patient=load(tiny_folder))
    lengths = [
        len(doctor.encoder.prompt_ids(messages)) + len(ids)
        for messages, (ids, _) in zip(conversations, drawn, strict=True)
    ]
    assert max(lengths) == 80
    assert not any(end for length, (_, end) in zip(lengths, drawn, strict=True) if length == 80)


def test_a_judge_of_another_tokenizer_loses_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    readout = fit_readout(load(tiny_folder), some_pairs(14))
    base = load(save_tiny(tmp_path / "other", byte_level(300, OTHER_CORPUS)))
    judge = ReadoutJudge(readout, base)
    prompts = [({"role": "user", "content": "Hi"},)] * 3
    texts, ended = ["the cat sat", "zebra é 7", ""], [False, True, True]
    answers = [judge.encoder.completion(text, end).ids for text, end in zip(texts, ended, strict=True)]
    expected = readout.score(prompts, texts, complete=ended)
    for ids, rewards, score in zip(answers, judge(prompts, answers, ended), expected, strict=True):
        assert len(rewards) == len(ids)
        assert sum(rewards) == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"eta": 0.3},
            "eta 0.3 is a setting of the training on pairs, and these are rounds: give round_eta, or rounds 0",
        ),
        ({"leaf_coef": 0.0}, "give round_leaf_coef, or rounds 0"),
        ({"branch_coef": 2.0}, "give round_branch_coef, or rounds 0"),
        ({"leaf_beta": 0.2}, "give a round_leaf_coef with it, or rounds 0"),
        ({"value_coef": 0.0}, "value_coef 0.0 .* leave it out, or give rounds 0"),
        ({"value_margin": 0.2}, "leave it out, or give rounds 0"),
        (
            {"eta": 0.3, "merged": True},
            "eta 0.3 is a setting of the balance on pairs, of which the second doctor learns the labels alone: give "
            "round_eta, pairs_objective subtb, or rounds 0",
        ),
        (
            {"leaf_coef": 0.0, "value_coef": 0.0, "merged": True},
            "leaves the second doctor nothing to learn: give pairs_weight 0, or pairs_objective 'subtb'",
        ),
    ],
)
def test_a_setting_that_rounds_do_not_go_by_is_refused(
    tiny_folder: Path, tmp_path: Path, store: RewardStore, settings: dict[str, float], message: str
) -> None:
    settings = dict(settings)
    rounds = replace(OPTIONS, pairs_weight=0.5) if settings.pop("merged", False) else OPTIONS
    arguments = config(tmp_path / "d", **settings)
    with pytest.raises(UserError, match=message):
        train_doctor(load(tiny_folder), store, arguments, rounds=rounds, patient=load(tiny_folder))
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("rounds", "message"),
    [
        (
            RoundOptions(rounds=0, round_eta=0.3),
            "round_eta 0.3 is a setting of the training in rounds, and rounds is 0",
        ),
        (
            RoundOptions(rounds=0, pairs_objective="subtb"),
            "pairs_objective subtb is a setting of the training in rounds",
        ),
        (
            RoundOptions(rounds=1, pairs_first=True, pairs_weight=0.2),
            "with pairs_first there is but one: leave them out",
        ),
    ],
)
def test_a_setting_of_rounds_that_there_are_not_is_refused(
    tiny_folder: Path, tmp_path: Path, store: RewardStore, rounds: RoundOptions, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train_doctor(load(tiny_folder), store, config(tmp_path / "d"), rounds=rounds, patient=load(tiny_folder))
    assert not (tmp_path / "d").exists()


def test_of_many_pairs_the_readout_reads_some_from_first_to_last(
    tiny_folder: Path, tmp_path: Path, store: RewardStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lesson, "READOUT_PAIRS", 5)
    read: list[int] = []

    def fit(patient: LoadedModel, pairs: Any, **options: Any) -> Readout:
        read.extend(rows.index((chosen, rejected)) for _, chosen, rejected in pairs)
        return fit_readout_to_ids(patient, pairs, **{**options, "folds": 2})

    rows = [(row["chosen_ids"], row["rejected_ids"]) for row in store.rows()]
    monkeypatch.setattr(lesson, "fit_readout_to_ids", fit)
    options = replace(OPTIONS, rounds=1)
    folder = train_doctor(load(tiny_folder), store, config(tmp_path / "d"), rounds=options, patient=load(tiny_folder))
    count = int(DoctorConfig.load(folder).metrics["train_pairs"])
    assert read == list(range(0, count, -(-count // 5)))
    assert len(read) == 5 or count < 10


@pytest.mark.parametrize(
    ("settings", "rounds"),
    [
        ({"eta": 0.3}, RoundOptions(rounds=0, round_batch_size=3)),
        ({"eta": 0.3}, replace(OPTIONS, rounds=1, pairs_first=True, pairs_weight=0.0)),
        ({"eta": 0.3}, replace(OPTIONS, rounds=1, pairs_weight=0.5, pairs_objective="subtb")),
        ({"eta": 0.3, "branch_coef": 1.0}, replace(OPTIONS, rounds=1, pairs_weight=0.5)),
        ({"leaf_beta": 0.2}, replace(OPTIONS, rounds=1, pairs_weight=0.5)),
        ({"leaf_beta": 0.2}, replace(OPTIONS, rounds=1, round_leaf_coef=1.0)),
    ],
)
def test_a_setting_that_something_goes_by_is_not(
    tiny_folder: Path, tmp_path: Path, store: RewardStore, settings: dict[str, float], rounds: RoundOptions
) -> None:
    settings = {"max_steps": 1, **settings}
    folder = train_doctor(
        load(tiny_folder), store, config(tmp_path / "d", **settings), rounds=rounds, patient=load(tiny_folder)
    )
    assert (folder / "doctor.json").is_file()


def test_bad_input(tiny_folder: Path, tmp_path: Path) -> None:
    for name, value in (
        ("rounds", -1),
        ("pairs_weight", -0.5),
        ("pairs_weight", 1.0),
        ("pairs_objective", "dpo"),
        ("round_prompts", 0),
        ("round_eta", 0.0),
        ("round_branch_coef", -1.0),
    ):
        with pytest.raises(UserError, match=name):
            RoundOptions(**{name: value})
    with pytest.raises(UserError, match="rounds need a LoRA doctor"):
        rounds_of(fresh_doctor(load(tiny_folder), lora=False), tmp_path, Likes(7))
    whole, read = DoctorOptions(lora=False), {"faces": {"positive": "Be kind."}, "pairs": 4}
    with pytest.raises(UserError, match=r"rounds need a LoRA doctor.*with rounds 0 all weights"):
        train_doctor(load(tiny_folder), RewardStore(tmp_path, read), config(tmp_path / "d"), options=whole)
    few = acquire(load(tiny_folder), some_pairs(3), tmp_path / "few")
    with pytest.raises(UserError, match="rounds need at least 4 pairs to fit a judge to, got 3; with rounds 0"):
        train_doctor(load(tiny_folder), few, config(tmp_path / "d"), patient=load(tiny_folder))
    with pytest.raises(UserError, match="rounds need prompts"):
        RoundsTrainer(fresh_doctor(load(tiny_folder)), config(tmp_path), OPTIONS, [], Likes(7), 5)
