"""Transfer Q*: the value of a token is the reward of what an aligned policy makes of it.

Source: Chakraborty et al., "Transfer Q Star: Principled Decoding for LLM Alignment" (NeurIPS 2024, arXiv 2405.20495),
its direct form: the aligned policy was trained for the reward that is asked for.
Shapes: B rows, K candidates, N tokens of a tree: K chains, a candidate and its continuation each, side by side level
by level, so that a row's text is read, and kept, once for all of them. V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from llmdoctor.baselines.method import Method, newly_finished, pick, room_of, survivors
from llmdoctor.decoding.device import sent
from llmdoctor.decoding.guides import lanes_of
from llmdoctor.decoding.lane import Lane
from llmdoctor.decoding.reward_lane import RewardLane
from llmdoctor.decoding.row import Row
from llmdoctor.decoding.sampling import sample
from llmdoctor.errors import UserError
from llmdoctor.models.loading import LoadedModel
from llmdoctor.models.reward_model import RewardModel


class TransferQ(Method):
    """Draws v from softmax(log π(v | s) + Q(s, v) / α) over the patient's K likeliest tokens.

    Q(s, v) = r(x, y_<t v z) for one continuation z of the aligned policy ρ from [x, y_<t, v], as long as the request's
    limit or `rollout_tokens` allow. Stop strings do not end a continuation. At temperature 0 the best token is taken.

    A completion's `logps` are those of the distribution given the continuations that were drawn. Averaged over those,
    sum(logps) − sum(patient_logps) is an upper bound of the KL, which is convex (with greedy continuations: exact).

    Args:
        patient: the frozen model.
        aligned: ρ, e.g. a merged DPO doctor, of the same vocabulary.
        reward_model: of the same vocabulary.
        strength: 1/α; 0 is the patient's own top-K sampling.
        top_k: K; the paper uses 10.
        rollout_tokens: most tokens of a continuation; None continues to the end.
        rollout_temperature: of ρ; 0 is greedy.
        max_batch_size: rows decoded together, each with its K continuations.

    Raises:
        UserError: another vocabulary, or a setting out of its range.
    """

    name = "Transfer-Q"
    sampling_fields = frozenset({"temperature"})

    def __init__(
        self,
        patient: LoadedModel,
        aligned: LoadedModel,
        reward_model: RewardModel,
        *,
        strength: float = 1.0,
        top_k: int = 10,
        rollout_tokens: int | None = None,
        rollout_temperature: float = 1.0,
        max_batch_size: int = 8,
    ) -> None:
        super().__init__(patient, [aligned, reward_model], max_batch_size=max_batch_size)
        if top_k < 1:
            raise UserError(f"Transfer-Q needs at least 1 candidate, got top_k {top_k}")
        if rollout_tokens is not None and rollout_tokens < 0:
            raise UserError(f"rollout_tokens must be at least 0, or None to continue to the end, got {rollout_tokens}")
        if rollout_temperature < 0:
            raise UserError(f"rollout_temperature must be at least 0, got {rollout_temperature}")
        self.aligned = lanes_of(aligned, [])[0][0]
        self.reward_model = reward_model
        self.strength = strength
        self.top_k = min(top_k, self.width)
        self.rollout_tokens = rollout_tokens
        self.rollout_temperature = rollout_temperature

    def _search(self, rows: list[Row]) -> Iterator[list[Row]]:
        room = room_of(rows)
        lane = Lane(self.patient, [row.prompts[0] for row in rows], room)
        policy = Lane(self.aligned, [row.prompts[1] for row in rows], room)
        critic = RewardLane(self.reward_model, [row.prompts[2] for row in rows], room)
        logits = lane.prefill()
        policy.prefill()
        while True:
            logps, candidates = logits[:, : self.width].float().log_softmax(-1).topk(self.top_k, dim=-1)
            values = self._values(rows, candidates, policy, critic)
            choice, own, broken = pick(rows, logps + self.strength * values.to(logps.device))
            tokens = candidates.gather(1, choice[:, None])[:, 0]
            patient = logps.gather(1, choice[:, None])[:, 0].tolist()
            for place, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
                if row.done:
                    continue
                if broken[place]:
                    row.finish("error")
                    continue
                row.append(token, own[place], patient[place])
                row.completion.patient_forwards += 1
                row.completion.guide_forwards += 2
            yield newly_finished(rows)
            if all(row.done for row in rows):
                return
            keep = survivors(rows)
            if keep is not None:
                rows = [rows[place] for place in keep]
                for follower in (lane, policy, critic):
                    follower.keep(keep)
                tokens = tokens[keep]
            critic.advance(tokens)
            policy.step(tokens)
            logits = lane.step(tokens)

    def _values(self, rows: list[Row], candidates: Tensor, policy: Lane, critic: RewardLane) -> Tensor:
        """Q [B, K] of the candidates [B, K]; of no meaning in finished rows. Continuations are counted as forwards."""
        levels, ends = self._continue(rows, candidates, policy)
        rewards = critic.weigh(torch.cat(levels, dim=1), _chains(self.top_k, len(levels)))
        for row, lengths in zip(rows, ends, strict=True):
            if not row.done:
                row.completion.guide_forwards += 2 * (sum(lengths) + len(lengths))
        last = sent(ends, rewards.device) * self.top_k + torch.arange(self.top_k, device=rewards.device)
        return rewards.gather(1, last)

    def _continue(self, rows: list[Row], candidates: Tensor, policy: Lane) -> tuple[list[Tensor], list[list[int]]]:
        """What the aligned policy lets follow each candidate: tokens [B, K] by level, and each chain's last level."""
        levels, ends = [candidates.cpu()], [[0] * self.top_k for _ in rows]
        limits = [0 if row.done else self._limit(row) for row in rows]

        def going_on(chains: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
            tokens, level = levels[-1].tolist(), len(levels) - 1
            return [
                (place, chain)
                for place, chain in chains
                if level < limits[place] and tokens[place][chain] not in self.encoder.stop_ids
            ]

        alive = going_on((place, chain) for place in range(len(rows)) for chain in range(self.top_k))
        while alive:
            # Chains that have ended are carried along, so that all rows' trees are alike; nobody looks at them.
            states = policy.grow(levels[-1], _chains(self.top_k, len(levels))[-self.top_k :])
            places, chains = (list(column) for column in zip(*alive, strict=True))
            logits = policy.outputs(states[sent(places, states.device), sent(chains, states.device)])
            scores = logits[:, : self.width].nan_to_num_(nan=0.0)
            if self.rollout_temperature not in (0.0, 1.0):
                scores.div_(self.rollout_temperature)
            keys = [rows[place].next_key() for place in places]
            drawn = sample(scores, keys, torch.full((len(alive),), self.rollout_temperature == 0))
            levels.append(torch.zeros_like(levels[0]))
            levels[-1][places, chains] = drawn.cpu()
            for place, chain in alive:
                ends[place][chain] += 1
            alive = going_on(alive)
        policy.forget()
        return levels, ends

    def _limit(self, row: Row) -> int:
        """Tokens that may follow the next one in `row`."""
        left = min(row.request.sampling.max_new_tokens, row.room) - len(row.completion.token_ids) - 1
        return left if self.rollout_tokens is None else min(left, self.rollout_tokens)


def _chains(count: int, levels: int) -> list[int]:
    """Of each of the tokens in a tree of `count` chains, level by level, its parent's number; −1 follows the row."""
    return [number - count if number >= count else -1 for number in range(count * levels)]
