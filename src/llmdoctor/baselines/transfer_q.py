"""Transfer Q*: the value of a token is the reward of what an aligned policy makes of it.

Source: Chakraborty et al., "Transfer Q Star: Principled Decoding for LLM Alignment" (NeurIPS 2024, arXiv 2405.20495),
its direct form: the aligned policy was trained for the reward that is asked for.
Shapes: B rows, K candidates, M = open rows × K paths, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmdoctor.baselines.method import Method, newly_finished, pick, room_of, survivors
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
        max_batch_size: rows decoded together; K times as many continuations run at once.

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
        """Q [B, K] of the candidates [B, K]; 0 for finished rows. The continuations are counted as forwards."""
        values = torch.zeros(candidates.shape, device=candidates.device)
        places = [place for place, row in enumerate(rows) if not row.done]
        sources = [place for place in places for _ in range(self.top_k)]
        paths = self._continue(rows, sources, candidates[places].flatten().tolist(), policy)
        rewards = critic.extend(sources, paths)
        critic.commit([])
        values[places] = rewards.to(values).view(len(places), self.top_k)
        for source, path in zip(sources, paths, strict=True):
            rows[source].completion.guide_forwards += 2 * len(path)
        return values

    def _continue(self, rows: list[Row], sources: list[int], starts: list[int], policy: Lane) -> list[list[int]]:
        """M paths of tokens: each start and what the aligned policy lets follow it in its row."""
        paths = [[start] for start in starts]
        limits = [self._limit(rows[source]) for source in sources]

        def open_of(orders: list[int]) -> list[int]:
            return [
                order
                for order in orders
                if len(paths[order]) <= limits[order] and paths[order][-1] not in self.encoder.stop_ids
            ]

        alive = open_of(list(range(len(paths))))
        if not alive:
            return paths
        fork = policy.fork([sources[order] for order in alive], max(limits))
        while True:
            logits = fork.step(torch.tensor([paths[order][-1] for order in alive]))[:, : self.width].float()
            keys = [rows[sources[order]].next_key() for order in alive]
            greedy = torch.full((len(alive),), self.rollout_temperature == 0)
            scores = logits.nan_to_num(nan=0.0) / (self.rollout_temperature or 1.0)
            for order, token in zip(alive, sample(scores, keys, greedy).tolist(), strict=True):
                paths[order].append(token)
            still = open_of(alive)
            if not still:
                return paths
            if len(still) < len(alive):
                fork.keep([alive.index(order) for order in still])
                alive = still

    def _limit(self, row: Row) -> int:
        """Tokens that may follow the next one in `row`."""
        left = min(row.request.sampling.max_new_tokens, row.room) - len(row.completion.token_ids) - 1
        return left if self.rollout_tokens is None else min(left, self.rollout_tokens)
