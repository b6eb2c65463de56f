"""One model's cache: rows out of step, side-by-side candidates, erased columns, forks; against whole forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.decoding import lane as lane_module
from llmdoctor.decoding.guides import LaneSpec, lanes_of
from llmdoctor.decoding.lane import Lane
from llmdoctor.decoding.reward_lane import RewardLane
from llmdoctor.errors import UserError
from llmdoctor.models.loading import LoadedModel
from llmdoctor.models.logps import LogitsHead
from llmdoctor.models.reward_model import RewardModel, base_classifier

PROMPTS = [[5, 9, 200], [7], [40, 41, 42, 43, 44, 45, 46], [5, 9, 200]]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=["rotary", "learned positions", "eager attention"])
def spec(request: pytest.FixtureRequest, tiny_model: LoadedModel) -> LaneSpec:
    if request.param == "learned positions":
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
        model = GPT2LMHeadModel(config).eval()
        return LaneSpec(model, ChatEncoder(tiny_model.tokenizer), LogitsHead.for_model(model))
    if request.param == "eager attention":
        tiny_model.model.set_attn_implementation("eager")
    return lanes_of(tiny_model, [])[0][0]


def whole(spec: LaneSpec, ids: list[int]) -> Tensor:
    """[V] logits after `ids`: one row, no cache, no padding."""
    return spec.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


def close(got: Tensor, expected: Tensor) -> None:
    assert float((got - expected).abs().max()) < 2e-3 * max(1.0, float(expected.abs().max()))


def check(lane: Lane, spec: LaneSpec, rows: list[list[int]]) -> None:
    """The cache holds `rows`: one more token gives what a whole pass gives."""
    logits = lane.step(torch.full((len(rows),), 11))
    for row, got in zip(rows, logits, strict=True):
        close(got, whole(spec, [*row, 11]))
        row.append(11)


BEGINNING = list(range(60, 90))
ALIKE = [
    [*BEGINNING, 5], [*BEGINNING, 7, 8, 9, 10, 11], [*BEGINNING, 5], [*BEGINNING, 7, 8], [*BEGINNING, *BEGINNING[:4]],
]  # fmt: skip
"""Two are one prompt, and one is how another begins."""


def read(spec: LaneSpec, prompts: list[list[int]], above: int, patch: pytest.MonkeyPatch) -> tuple[Lane, Tensor, int]:
    """A lane that has read its prompts, their states, and how many tokens were run."""
    patch.setattr(lane_module, "_SHARE_ABOVE", above)
    lane, run = Lane(spec, prompts, 4), 0
    forward = lane._forward

    def counted(ids: Tensor, *others: Any) -> Tensor:
        nonlocal run
        run += ids.numel()
        return forward(ids, *others)

    patch.setattr(lane, "_forward", counted)
    return lane, lane.prefill_states(), run


@pytest.mark.parametrize("begin", [0, 10**9])
def test_long_prompts_are_read_piece_by_piece(spec: LaneSpec, begin: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No table of who sees whom is larger than allowed, and states, mask and what follows are those of one pass."""
    plain, expected, _ = read(spec, ALIKE, 10**9, monkeypatch)
    monkeypatch.setattr(lane_module, "_TABLE_ENTRIES", 400)
    monkeypatch.setattr(lane_module, "_SHORTEST_PIECE", 2)
    widths: list[int] = []
    feed = Lane._feed

    def seen(self: Lane, tokens: Tensor, mask: Tensor) -> Tensor:
        states = feed(self, tokens, mask)
        widths.append(tokens.shape[1])
        assert tokens.shape[1] * len(mask) * self.mask.shape[1] <= 400 or tokens.shape[1] == 2
        return states

    monkeypatch.setattr(Lane, "_feed", seen)
    lane, states, _ = read(spec, ALIKE, begin, monkeypatch)
    assert len(widths) > 2
    assert sum(widths) == lane.mask.shape[1]
    assert torch.equal(lane.mask, plain.mask)
    close(states[lane.mask.bool()], expected[lane.mask.bool()])
    rows = [list(row) for row in ALIKE]
    check(lane, spec, rows)
    check(lane, spec, rows)


@pytest.mark.parametrize("prompts", [ALIKE, [[*BEGINNING, token] for token in (1, 2, 3)]])
def test_a_beginning_that_all_share_is_read_once(
    spec: LaneSpec, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """States, mask and what follows are those of whole passes; the tokens that were run are fewer."""
    lane, states, run = read(spec, prompts, 2 * len(BEGINNING) - 1, monkeypatch)
    plain, expected, all_of_them = read(spec, prompts, 10**9, monkeypatch)
    distinct, longest = len({tuple(row) for row in prompts}), max(map(len, prompts))
    assert run == len(BEGINNING) + distinct * (longest - len(BEGINNING))
    assert all_of_them == distinct * longest
    assert torch.equal(lane.mask, plain.mask)
    close(states[lane.mask.bool()], expected[lane.mask.bool()])
    rows = [list(row) for row in prompts]
    check(lane, spec, rows)
    check(lane, spec, rows)


@pytest.mark.parametrize(
    "prompts", [[[5, 9], [5, 9]], [[5], [5, 9]], [[5, 9], [6, 9]], [[*BEGINNING, 1], [*BEGINNING, 2]]]
)
def test_what_saves_too_little_is_read_in_one_pass(
    spec: LaneSpec, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lane, _, run = read(spec, prompts, len(BEGINNING), monkeypatch)
    assert run == lane._ids.numel()
    check(lane, spec, [list(row) for row in prompts])


def test_candidates_do_not_see_each_other(spec: LaneSpec) -> None:
    """Each state is that of the whole row with that candidate alone; afterwards the row is as it was."""
    rows = [list(ids) for ids in PROMPTS]
    lane = Lane(spec, PROMPTS, 4)
    lane.prefill()
    check(lane, spec, rows)
    candidates = torch.tensor([[3, 8, 3], [8, 9, 10], [250, 1, 2], [0, 3, 299]])
    outputs = lane.outputs(lane.peek(candidates))
    for row, options, got in zip(rows, candidates.tolist(), outputs, strict=True):
        for token, logits in zip(options, got, strict=True):
            close(logits, whole(spec, [*row, token]))
    lane.forget()
    check(lane, spec, rows)
    lane.peek(candidates)
    choice = torch.tensor([2, 0, 1, 1])
    lane.accept(choice)
    for row, options, place in zip(rows, candidates.tolist(), choice.tolist(), strict=True):
        row.append(options[place])
    check(lane, spec, rows)
    lane.keep([2, 0])
    check(lane, spec, [rows[2], rows[0]])


def test_rows_out_of_step(spec: LaneSpec) -> None:
    """Row 1 sits a step out, row 0 loses two tokens, row 2 its own; then the holes are closed."""
    rows = [list(ids) for ids in PROMPTS]
    lane = Lane(spec, PROMPTS, 4)
    lane.prefill()
    starts = [lane.mask.shape[1]] * 4
    lane.step(torch.tensor([20, 21, 22, 23]), torch.tensor([True, False, True, True]))
    for place in (0, 2, 3):
        rows[place].append(20 + place)
    check(lane, spec, rows)
    lane.erase([0, 2], starts[:3:2])
    rows[0], rows[2] = list(PROMPTS[0]), list(PROMPTS[2])
    check(lane, spec, rows)
    before = lane.mask.clone()
    moved = lane.pack()
    assert lane.mask.shape[1] == max(map(len, rows))
    assert lane.mask.sum(-1).tolist() == [len(row) for row in rows]
    for row, old, new, columns in zip(rows, before, lane.mask, moved, strict=True):
        assert int(columns[-1]) == lane.mask.shape[1]
        assert columns[:-1][old.bool()].tolist() == new.nonzero()[:, 0].tolist(), len(row)
    check(lane, spec, rows)


def test_a_fork_is_a_row_of_its_own(spec: LaneSpec) -> None:
    """Two forks of row 2 and one of row 1 grow by different lengths; the second and third are taken back in."""
    rows = [list(ids) for ids in PROMPTS]
    lane = Lane(spec, PROMPTS, 4)
    lane.prefill()
    check(lane, spec, rows)
    fork = lane.fork([2, 2, 1], 3)
    hidden = fork.feed(
        torch.tensor([[8, 9, 10], [6, 0, 0], [4, 3, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    )
    for place, added, states in zip([2, 2, 1], [[8, 9, 10], [6], [4, 3]], hidden, strict=True):
        close(lane.outputs(states[len(added) - 1]), whole(spec, rows[place] + added))
    check(fork, spec, [rows[2] + [8, 9, 10], rows[2] + [6], rows[1] + [4, 3]])
    fork = lane.fork([2, 2, 1], 3)
    fork.feed(torch.tensor([[8, 9, 10], [6, 0, 0], [4, 3, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]))
    lane.absorb(fork, [1, 2], [2, 1])
    rows[2].append(6)
    rows[1] += [4, 3]
    assert lane.mask.shape[1] == max(map(len, PROMPTS)) + 1 + 2
    check(lane, spec, rows)
    lane.pack()
    check(lane, spec, rows)


def test_a_window_is_refused(tiny_model: LoadedModel) -> None:
    config = MistralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=4,
    )
    model: Any = MistralForCausalLM(config).eval()
    lane = Lane(LaneSpec(model, ChatEncoder(tiny_model.tokenizer), LogitsHead.for_model(model)), PROMPTS, 4)
    lane.prefill()
    for use in (lambda: lane.peek(torch.ones(4, 2).long()), lambda: lane.erase([0], [1]), lambda: lane.fork([0], 1)):
        with pytest.raises(UserError, match="MistralForCausalLM has layers that see a window"):
            use()


@pytest.fixture
def critic(tiny_model: LoadedModel) -> RewardModel:
    model = base_classifier(tiny_model, seed=3)
    return RewardModel(model, tiny_model.tokenizer, "critic", dict(tiny_model.fingerprint))


def test_rewards_of_candidates_are_those_of_whole_answers(critic: RewardModel) -> None:
    """Every candidate scored from scratch, before and after tokens that were peeked at and one that was not."""
    answers: list[list[int]] = [[], [], [], []]
    lane = RewardLane(critic, PROMPTS, 4)
    assert lane.rewards.tolist() == pytest.approx(critic.score_ids(PROMPTS, answers), abs=1e-4)
    candidates = torch.tensor([[3, 8, 3, 2], [8, 9, 10, 2], [250, 1, 2, 4], [0, 3, 299, 2]])
    for tokens in ([3, 9, 4, 299], [1, 2, 250, 0], [4, 4, 4, 4]):
        rewards = lane.peek(candidates)
        for place, options in enumerate(candidates.tolist()):
            brute = critic.score_ids([PROMPTS[place]] * 4, [[*answers[place], token] for token in options])
            assert rewards[place].tolist() == pytest.approx(brute, abs=1e-4)
        lane.advance(torch.tensor(tokens))
        for answer, token in zip(answers, tokens, strict=True):
            answer.append(token)
    lane.keep([3, 1])
    for place, rewards in zip([3, 1], lane.peek(candidates[[3, 1]]), strict=True):
        brute = critic.score_ids(
            [PROMPTS[place]] * 4, [[*answers[place], token] for token in candidates[place].tolist()]
        )
        assert rewards.tolist() == pytest.approx(brute, abs=1e-4)


def test_segments(critic: RewardModel) -> None:
    """Several segments of one row, of which some are kept; then more."""
    lane = RewardLane(critic, PROMPTS, 2)
    answers: list[list[int]] = [[], [], [], []]
    for _ in range(12):
        places, segments = [0, 0, 2, 3], [[6, 7, 8], [9], [10, 11], [12, 13, 14]]
        brute = critic.score_ids(
            [PROMPTS[place] for place in places],
            [answers[place] + segment for place, segment in zip(places, segments, strict=True)],
        )
        assert lane.extend(places, segments).tolist() == pytest.approx(brute, abs=1e-4)
        lane.commit([1, 2])
        answers[0].append(9)
        answers[2] += [10, 11]
    assert lane.extend([1], [[5]]).tolist() == pytest.approx(critic.score_ids([PROMPTS[1]], [[5]]), abs=1e-4)
