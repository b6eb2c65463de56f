"""CARDS: acceptance against its closed form, segments against whole passes, and rows that advance apart."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.baselines.tools import TEXTS, ask, chi_square, critic_of, load, log_probs, same
from tests.tiny import naive_logps
from torch import Tensor

from llmdoctor.baselines.best_of_n import best_of_n_kl
from llmdoctor.baselines.cards import CARDS, CARDSOptions
from llmdoctor.decoding import lane
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.request import Request
from llmdoctor.decoding.reward_lane import RewardLane
from llmdoctor.errors import UserError
from llmdoctor.models.loading import LoadedModel
from llmdoctor.models.reward_model import RewardModel


@pytest.fixture(scope="module")
def patient(tiny_folder: Path) -> LoadedModel:
    return load(tiny_folder)


@pytest.fixture(scope="module")
def critic(tiny_folder: Path) -> RewardModel:
    return critic_of(tiny_folder)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int], float]]:
    """Every segment that the reward model was asked about, with its row's place and its reward, in order."""
    seen: list[tuple[int, list[int], float]] = []
    extend = RewardLane.extend

    def recorded(self: RewardLane, places: list[int], segments: list[list[int]]) -> Tensor:
        rewards = extend(self, places, segments)
        seen.extend(zip(places, map(list, segments), rewards.tolist(), strict=True))
        return rewards

    monkeypatch.setattr(RewardLane, "extend", recorded)
    return seen


def test_acceptance_is_its_closed_form(patient: LoadedModel, critic: RewardModel) -> None:
    """Answers of one token v: a(v) = min(1, exp((r(v) − r*)/β)), since τ = r* at the end.

    P = Σ π(v) a(v) is the share of accepted tries, N has mean 1/P and variance (1 − P)/P², the tokens follow π a / P,
    and the mean of `kl_bound` is KL(π a / P ‖ π).
    """
    prompt = GuidedDecoder(patient).encoder.prompt_ids(ask("Hi").messages)
    logps = log_probs(patient, prompt)
    rewards = torch.tensor(critic.score_ids([prompt] * 300, [[token] for token in range(300)]), dtype=torch.float64)
    target = float((logps.exp() * rewards).sum() + 2.5)
    accept = ((rewards - target) / 0.7).clamp(max=0.0).exp()
    share = float((logps.exp() * accept).sum())
    assert 0.02 < share < 0.6
    wanted = logps.exp() * accept / share
    exact = float((wanted * (accept.log() - math.log(share))).sum())

    options = CARDSOptions(target, min_segment=1, max_tries=10_000)
    decoder = CARDS(patient, critic, options, max_batch_size=500)
    done = decoder.generate([ask("Hi", max_new_tokens=1, temperature=1.0, seed=seed) for seed in range(2000)])
    tries = torch.tensor([one.patient_forwards for one in done]).double()
    assert [one.guide_forwards for one in done] == tries.tolist()
    error = math.sqrt((1 - share) / share**2 / 2000)
    assert float(tries.mean()) == pytest.approx(1 / share, abs=4 * error)
    statistic, freedom = chi_square([one.token_ids[0] for one in done], wanted)
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    bounds = torch.tensor([one.kl_bound for one in done]).double()
    assert float(bounds.mean()) == pytest.approx(exact, abs=4 * float(bounds.std()) / math.sqrt(2000))
    assert exact > 0.3


def test_the_threshold_rises() -> None:
    """r(x) = 2, r* = 10, start ½: 6 at the beginning, 8 half-way, 10 at the end; never above r* where r(x) is."""
    options = CARDSOptions(10.0)
    assert [options.threshold(2.0, length, 8) for length in (0, 4, 8)] == [6.0, 8.0, 10.0]
    assert [options.threshold(14.0, length, 8) for length in (0, 4, 8)] == [10.0, 10.0, 10.0]
    assert options.log_acceptance(9.3, 10.0) == pytest.approx(-1.0)
    assert options.log_acceptance(11.0, 10.0) == 0.0


def test_what_is_always_accepted_is_the_patients(patient: LoadedModel, critic: RewardModel) -> None:
    """One segment without a threshold to fear: token for token the patient's own sample of that seed."""
    options = CARDSOptions(-1e6, start=1.0, entropy=1e3)
    requests = [ask(text, temperature=0.9, top_p=0.9, seed=seed, max_new_tokens=30) for seed, text in enumerate(TEXTS)]
    for one, two in zip(
        CARDS(patient, critic, options).generate(requests), GuidedDecoder(patient).generate(requests), strict=True
    ):
        assert (one.token_ids, one.finish_reason, one.text) == (two.token_ids, two.finish_reason, two.text)
        assert one.logps == one.patient_logps == pytest.approx(two.patient_logps, abs=1e-4)
        assert one.kl == one.kl_bound == pytest.approx(two.kl, abs=1e-3)
        assert two.kl > 0.1
        assert one.guide_forwards == one.patient_forwards == len(one.token_ids)


def entropy(patient: LoadedModel, ids: list[int]) -> float:
    logps = log_probs(patient, ids)
    return -float((logps.exp() * logps).sum())


def test_segments_end_where_the_patient_is_unsure(
    patient: LoadedModel, critic: RewardModel, judged: list[tuple[int, list[int], float]]
) -> None:
    """Each, and none of its beginnings of the least length, is followed by entropy above the threshold or is full."""
    prompt = GuidedDecoder(patient).encoder.prompt_ids(ask(TEXTS[1]).messages)
    options = CARDSOptions(-1e6, start=1.0, entropy=5.1, min_segment=2, max_segment=5)
    done = CARDS(patient, critic, options).generate([ask(TEXTS[1], temperature=1.0, seed=8, max_new_tokens=40)])[0]
    begin = 0
    for _, segment, reward in judged:
        end = begin + len(segment)
        assert done.token_ids[begin:end] == segment
        unsure = [
            entropy(patient, [*prompt, *done.token_ids[: begin + length]]) >= 5.1
            for length in range(2, len(segment) + 1)
        ]
        assert not any(unsure[:-1])
        assert (unsure and unsure[-1]) or len(segment) == 5 or end == len(done.token_ids)
        assert reward == pytest.approx(critic.score_ids([prompt], [done.token_ids[:end]])[0], abs=1e-3)
        begin = end
    assert begin == len(done.token_ids)
    assert len({len(segment) for _, segment, _ in judged}) >= 2


def test_after_the_last_try_the_best_is_taken(
    patient: LoadedModel, critic: RewardModel, judged: list[tuple[int, list[int], float]]
) -> None:
    """Nothing is ever accepted. Log-probabilities recomputed from scratch show that the cache forgot the others."""
    options = CARDSOptions(1e6, start=1.0, entropy=1e3, max_segment=4, max_tries=3)
    decoder = CARDS(patient, critic, options)
    done = decoder.generate([ask("Hi", temperature=1.0, seed=5, max_new_tokens=11)])[0]
    prompt = decoder.encoder.prompt_ids(ask("Hi").messages)
    begin = count = 0
    while judged:
        tries, judged[:3] = judged[:3], []
        best = max(tries, key=lambda one: one[2])[1]
        assert done.token_ids[begin : begin + len(best)] == best
        for _, segment, reward in tries:
            brute = critic.score_ids([prompt], [[*done.token_ids[:begin], *segment]])[0]
            assert reward == pytest.approx(brute, abs=1e-3)
        begin += len(best)
        count += 1
        if begin < len(done.token_ids):
            # The reward model reads the segment that was taken once more, to go on from there.
            assert judged.pop(0)[1] == best
    assert begin == len(done.token_ids)
    assert done.patient_logps == pytest.approx(naive_logps(patient.model, prompt, done.token_ids).tolist(), abs=1e-3)
    assert done.kl_bound == pytest.approx(count * best_of_n_kl(3), abs=1e-4)


def some_requests() -> list[Request]:
    """Enough rows that those at the ends of their segments have to wait for each other."""
    return [
        request
        for seed in range(0, 24, 6)
        for request in (
            ask(TEXTS[0], temperature=1.0, seed=seed, max_new_tokens=5),
            ask(TEXTS[1], temperature=1.0, seed=seed + 1, max_new_tokens=30),
            ask(TEXTS[2], temperature=0.8, seed=seed + 2, max_new_tokens=12, top_k=20),
            ask(TEXTS[3], temperature=1.0, seed=seed + 3, max_new_tokens=30, stop=("e", "t")),
            ask(TEXTS[0], temperature=1.0, seed=seed + 4, max_new_tokens=0),
            ask(TEXTS[0], temperature=1.3, seed=seed + 5, max_new_tokens=30, min_p=0.01),
        )
    ]


@pytest.mark.parametrize(("max_tries", "slack"), [(2, 0), (12, 0), (12, 1000)])
def test_a_row_does_not_see_its_batch(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, max_tries: int, slack: int
) -> None:
    """Rows accept, reject, wait, run out of tries and end at different times; caches are packed always, or never."""
    monkeypatch.setattr(lane, "_PACK_ABOVE", 1.0)
    monkeypatch.setattr(lane, "_PACK_SLACK", slack)
    packed: list[int] = []
    pack = lane.Lane.pack
    monkeypatch.setattr(lane.Lane, "pack", lambda self: packed.append(1) or pack(self))
    patient, critic = load(tiny_folder), critic_of(tiny_folder)
    # What a batch rounds otherwise is then far too small to carry an entropy or a reward across its threshold.
    patient.model.double()
    critic.model.double()
    options = CARDSOptions(4.0, entropy=5.1, min_segment=2, max_segment=6, max_tries=max_tries)
    decoder = CARDS(patient, critic, options)
    alone = [decoder.generate([request])[0] for request in some_requests()]
    together = decoder.generate(some_requests())
    for request, one, two in zip(some_requests(), alone, together, strict=True):
        same(one, two)
        prompt = decoder.encoder.prompt_ids(request.messages)
        if one.token_ids:
            expected = naive_logps(patient.model, prompt, two.token_ids).tolist()
            assert two.patient_logps == pytest.approx(expected, abs=1e-3)
    assert max(one.patient_forwards - len(one.token_ids) for one in alone) > 30, "segments should have been rejected"
    assert len({one.finish_reason for one in alone}) >= 2
    assert bool(len(packed) > 20) == (slack == 0)
    assert (alone[4].finish_reason, alone[4].token_ids) == ("length", [])


def test_a_broken_model_ends_its_rows(patient: LoadedModel, critic: RewardModel) -> None:
    broken = copy.deepcopy(patient.model)
    decoder = CARDS(replace(patient, model=broken), critic, CARDSOptions(0.0))
    with torch.no_grad():
        broken.get_decoder().norm.weight.fill_(torch.nan)
    assert decoder.generate([ask("Hi", temperature=1.0)])[0].finish_reason == "error"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_threshold": math.nan}, "reward_threshold of CARDS must be a finite number, got nan"),
        ({"temperature": 0}, "temperature of CARDS must be above 0, got 0"),
        ({"start": 2}, r"start of CARDS must be in \[0, 1\], got 2"),
        ({"entropy": -1}, "entropy of CARDS must be at least 0, got -1"),
        ({"min_segment": 0}, "min_segment of CARDS must be at least 1, got 0"),
        ({"max_segment": 3}, r"max_segment of CARDS must be at least min_segment \(4\), got 3"),
        ({"max_tries": 0}, "max_tries of CARDS must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CARDSOptions(**{"reward_threshold": 1.0, **options})


def test_what_is_refused(patient: LoadedModel, critic: RewardModel) -> None:
    decoder = CARDS(patient, critic, CARDSOptions(0.0))
    with pytest.raises(UserError, match="CARDS draws a rejected segment anew, so the temperature must be above 0"):
        decoder.generate([ask("Hi")])
    with pytest.raises(UserError, match=r"CARDS has no repetition_penalty; leave it at 1.0, got 1.2"):
        decoder.generate([ask("Hi", temperature=1.0, repetition_penalty=1.2)])
    with pytest.raises(UserError, match="CARDS takes no doctors"):
        decoder.generate([Request.from_text("Hi", betas={"kind": 1.0})])
