"""The read-out: its states against a plain pass, its weights against the optimum's condition, and what it is for."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import pair, some_pairs
from torch.nn.functional import softplus
from transformers import GPT2Config, GPT2LMHeadModel, RwkvConfig, RwkvForCausalLM

from llmdoctor.data.preferences import PreferencePair
from llmdoctor.errors import FingerprintMismatch, UserError
from llmdoctor.models.loading import LoadedModel, load_model
from llmdoctor.rewards.readout import (
    Readout,
    ReadoutFit,
    _pooled,
    _states,
    calibration,
    fit_bradley_terry,
    fit_readout,
    left_out_margins,
    parts_of,
)


@pytest.fixture(scope="module")
def shared_model(tiny_folder: Path) -> LoadedModel:
    """One model for tests that only read it."""
    return load_model(str(tiny_folder), dtype="float32", device="cpu")


@pytest.fixture
def rows(shared_model: LoadedModel) -> list[tuple[list[int], list[int]]]:
    """Prompts and answers of very different lengths, one without a token."""
    return [([5, 6, 7], [8, 9]), ([10], [11, 12, 13, 14, 15, 16]), ([5, 6], []), ([3] * 40, [4]), ([7, 8], [9] * 30)]


def plain_states(model: LoadedModel, prompt: list[int], answer: list[int], layer: int) -> torch.Tensor:
    """[L, D] float64, one row without padding; the prompt's last token where there is no answer."""
    with torch.no_grad():
        out = model.model.get_decoder()(input_ids=torch.tensor([[*prompt, *answer]]), output_hidden_states=True)
    return out.hidden_states[layer][0, -(len(answer) or 1) :].double()


def test_pooled_states_are_those_of_each_row_alone(
    shared_model: LoadedModel, rows: list[tuple[list[int], list[int]]]
) -> None:
    layers = [0, 1, 2]
    for (prompt, answer), pooled in zip(rows, _pooled(shared_model, rows, layers), strict=True):
        for place, layer in enumerate(layers):
            expected = plain_states(shared_model, prompt, answer, layer).mean(0)
            torch.testing.assert_close(pooled[place], expected, atol=1e-5, rtol=1e-4)


def test_a_model_that_takes_no_notice_of_masks(rows: list[tuple[list[int], list[int]]]) -> None:
    model = RwkvForCausalLM(RwkvConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, context_length=512)).eval()
    recurrent = LoadedModel(model, None, "rwkv", {})
    for row, pooled in zip(rows, _pooled(recurrent, rows, [0, 1, 2]), strict=True):
        torch.testing.assert_close(pooled, _pooled(recurrent, [row], [0, 1, 2])[0], atol=1e-5, rtol=1e-4)


def test_token_rewards_sum_to_the_score(shared_model: LoadedModel) -> None:
    weights = torch.randn(2, shared_model.model.config.hidden_size, dtype=torch.float64)
    readout = Readout(shared_model, weights, ReadoutFit((0, 1), (1.0, 1.0), 2, 0.0, 1.0))
    messages = [({"role": "user", "content": text},) for text in ("Hi", "How are you, cat?", "the")]
    texts = ["the cat sat", "no", "on the mat with a zebra"]
    complete = [True, False, True]
    prompts = [readout.encoder.prompt_ids(message) for message in messages]
    ids = [readout.encoder.completion(text, end).ids for text, end in zip(texts, complete, strict=True)]
    scores = readout.score(messages, texts, complete=complete)
    for score, rewards, answer, prompt in zip(scores, readout.token_rewards(prompts, ids), ids, prompts, strict=True):
        words, states = (plain_states(shared_model, prompt, answer, layer) for layer in (0, 1))
        expected = (words @ weights[0] + states @ weights[1]) / len(answer)
        torch.testing.assert_close(rewards, expected, atol=1e-4, rtol=1e-4)
        assert float(rewards.sum()) == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize(("pairs", "width"), [(12, 40), (60, 7), (30, 30)])
def test_weights_are_the_optimum(pairs: int, width: int) -> None:
    """The gradient of the ridge-penalised loss, by autograd, is zero, and no neighbour is better."""
    generator = torch.Generator().manual_seed(pairs)
    gaps = torch.randn(pairs, width, dtype=torch.float64, generator=generator) * 3
    ridges = [10.0, 0.1, 1e-3]
    for ridge, found in zip(ridges, fit_bradley_terry(gaps, ridges), strict=True):
        weights = found.clone().requires_grad_()
        loss = softplus(-gaps @ weights).sum() + ridge / 2 * weights.square().sum()
        loss.backward()
        assert weights.grad is not None
        assert float(weights.grad.abs().max()) < 1e-6


def test_left_out_margins_do_not_see_their_own_fold() -> None:
    gaps = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # Nine prompts, most of them asked twice or more.
    prompts = [[1, number * number % 17] for number in range(20)]
    parts = parts_of(prompts, 4)
    assert {int(part) for part in parts} == {0, 1, 2, 3}
    assert len({(tuple(prompt), int(part)) for prompt, part in zip(prompts, parts, strict=True)}) == 9
    margins = left_out_margins(gaps, [0.5], parts)[0]
    for part in range(4):
        out = parts == part
        weights = fit_bradley_terry(gaps[~out], [0.5])[0]
        torch.testing.assert_close(margins[out], gaps[out] @ weights)


def test_calibration_is_the_best_scale() -> None:
    margins = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    best = calibration(margins)
    losses = [float(softplus(-scale * best * margins).mean()) for scale in (0.98, 1, 1.02)]
    assert losses[1] == min(losses)
    assert calibration(-margins.abs()) < 1e-6
    assert calibration(torch.zeros(3, dtype=torch.float64)) == 1.0


def test_pairs_of_few_prompts_are_left_out_one_by_one() -> None:
    assert parts_of([[1], [2], [3], [4]], 2).tolist() == [0, 1, 0, 1]
    assert parts_of([[1]] * 5, 3).tolist() == [0, 1, 2, 0, 1]


def test_a_judge_without_a_mistake_claims_what_so_many_pairs_allow() -> None:
    """As with one mistake of mean size: odds of N to one, not of any number to one."""
    margins = torch.ones(40, dtype=torch.float64) * 3
    assert calibration(margins) * 3 == pytest.approx(math.log(40), rel=1e-6)
    with_a_mistake = torch.cat([margins, -margins[:1]])
    assert calibration(with_a_mistake) * 3 == pytest.approx(math.log(40), rel=1e-6)
    # A mistake too small to be one changes next to nothing.
    barely = torch.cat([margins, torch.tensor([-1e-9], dtype=torch.float64)])
    assert calibration(barely) * 3 == pytest.approx(math.log(40), rel=0.02)


def test_pairs_that_were_given_twice_tell_nothing_about_themselves(shared_model: LoadedModel) -> None:
    """Labels at random: left out with its double, a pair is told right by chance."""
    pairs = [
        replace(one, chosen=one.rejected, rejected=one.chosen) if number * number % 11 % 2 else one
        for number, one in enumerate(some_pairs(60))
    ]
    twice = [one for one in pairs for _ in range(2)]
    assert fit_readout(shared_model, twice).fit.accuracy < 0.7


def test_it_learns_what_the_pairs_say_and_not_what_they_do_not(shared_model: LoadedModel) -> None:
    told: list[int] = []
    pairs = [
        pair(one.chosen + " zebra", one.chosen + " mat", f"{i}") if i % 2 else pair(
            "zebra " + one.rejected, "mat " + one.rejected, f"{i}"
        )
        for i, one in enumerate(some_pairs(40))
    ]  # fmt: skip
    readout = fit_readout(shared_model, pairs, layers=[0, 1, 2], folds=4, progress=told.append)
    assert readout.fit.pairs == sum(told) == 40
    assert readout.fit.accuracy > 0.9
    assert readout.fit.loss < 0.5
    prompt = [({"role": "user", "content": "new"},)] * 2
    liked, other = readout.score(prompt, ["the zebra ran", "the mat ran"])
    assert liked > other
    flipped = [replace(p, chosen=p.rejected, rejected=p.chosen) if i % 3 else p for i, p in enumerate(some_pairs(40))]
    noise = fit_readout(shared_model, [replace(p, rejected=p.rejected.strip("!")) for p in flipped], folds=4)
    assert noise.fit.loss > readout.fit.loss


def test_a_folder_brings_the_same_scores_to_the_same_patient(shared_model: LoadedModel, tmp_path: Path) -> None:
    readout = fit_readout(shared_model, some_pairs(12), folds=3)
    readout.save_pretrained(tmp_path / "r")
    again = Readout.from_pretrained(tmp_path / "r", shared_model)
    prompt = [({"role": "user", "content": "Hi"},)]
    assert again.fit == readout.fit
    # Not to the last bit: products of float64 may depend on where in memory their factors lie.
    assert again.score(prompt, ["the cat"]) == pytest.approx(readout.score(prompt, ["the cat"]), rel=1e-12)
    other = replace(shared_model, fingerprint={**shared_model.fingerprint, "model": "feedbeef"})
    with pytest.raises(FingerprintMismatch, match="Fit a read-out on this patient"):
        Readout.from_pretrained(tmp_path / "r", other)
    with pytest.raises(UserError, match=r"is not a read-out: it has no readout\.json"):
        Readout.from_pretrained(tmp_path, shared_model)
    record = json.loads((tmp_path / "r" / "readout.json").read_text())
    (tmp_path / "r" / "readout.json").write_text(json.dumps({**record, "schema_version": 9}))
    with pytest.raises(UserError, match="has schema version 9"):
        Readout.from_pretrained(tmp_path / "r", shared_model)
    (tmp_path / "r" / "readout.json").write_text("{")
    with pytest.raises(UserError, match=r"readout\.json is not JSON"):
        Readout.from_pretrained(tmp_path / "r", shared_model)
    (tmp_path / "r" / "readout.json").write_text(json.dumps({"schema_version": record["schema_version"]}))
    with pytest.raises(UserError, match="lacks the fields: fit, patient_fingerprint; fit the read-out anew"):
        Readout.from_pretrained(tmp_path / "r", shared_model)
    (tmp_path / "r" / "readout.json").write_text(json.dumps(record))
    (tmp_path / "r" / "readout.safetensors").write_text("cut")
    with pytest.raises(UserError, match=r"readout\.safetensors cannot be read .*; fit the read-out anew"):
        Readout.from_pretrained(tmp_path / "r", shared_model)


def test_bad_input(shared_model: LoadedModel) -> None:
    with pytest.raises(UserError, match="2 pairs in each, got 9 pairs"):
        fit_readout(shared_model, some_pairs(9))
    with pytest.raises(UserError, match=r"layers must lie in 0 … 2 .*got \[1, 3\]"):
        fit_readout(shared_model, some_pairs(12), layers=[1, 3])
    with pytest.raises(UserError, match=r"pair 13 has \d+ tokens with its prompt, more than the context of 512 of "):
        fit_readout(shared_model, [*some_pairs(12), pair("a" * 9000, "b")], max_completion_length=None)
    with pytest.raises(UserError, match=r"pair 13 \('' …\): a prompt must end with a user turn; mend it or take it"):
        fit_readout(shared_model, [*some_pairs(12), PreferencePair((), "a", "b")])
    labelled = [replace(item, dimension="kind" if number % 2 else "brief") for number, item in enumerate(some_pairs(9))]
    with pytest.raises(UserError, match=r"several dimensions \(brief and kind\), .*--dimension NAME"):
        fit_readout(shared_model, labelled)


def test_an_answer_that_does_not_fit_is_named(shared_model: LoadedModel) -> None:
    judge = fit_readout(shared_model, some_pairs(12))
    prompt = [{"role": "user", "content": "Hi"}]
    with pytest.raises(UserError, match=r"answer 2 has \d+ tokens with its prompt, more than the context of 512 of "):
        judge.score([prompt] * 2, ["a", "a" * 9000])


def test_no_layer_above_the_wanted_one_runs(
    shared_model: LoadedModel, rows: list[tuple[list[int], list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    def counted(number: int, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            ran.append(number)
            return forward(*args, **kwargs)

        return run

    for number, block in enumerate(shared_model.model.get_decoder().layers):
        monkeypatch.setattr(block, "forward", counted(number, block.forward))
    _pooled(shared_model, rows, [1])
    assert set(ran) == {0}
    assert not any(module._forward_pre_hooks for module in shared_model.model.modules())


def test_a_model_of_another_family_is_read_alike() -> None:
    """GPT-2 keeps its layers under another name and learns its positions."""
    config = GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=50, n_positions=64)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        expected = model.transformer(**inputs, output_hidden_states=True).hidden_states
        found = _states(model.transformer, config, {**inputs, "use_cache": False}, [0, 2, 3])
    for layer, state in zip([0, 2, 3], found, strict=True):
        torch.testing.assert_close(state, expected[layer])
