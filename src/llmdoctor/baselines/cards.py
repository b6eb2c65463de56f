"""CARDS: segments of an answer, each drawn until its reward is high enough.

Source: Li et al., "Cascade Reward Sampling for Efficient Decoding-Time Alignment" (COLM 2025, arXiv 2406.16306) and its
published code.
Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmdoctor.baselines.best_of_n import best_of_n_kl
from llmdoctor.baselines.method import Method, newly_finished, room_of, survivors
from llmdoctor.decoding.controls import Controls
from llmdoctor.decoding.device import blocks
from llmdoctor.decoding.lane import Lane
from llmdoctor.decoding.mixture import warped
from llmdoctor.decoding.request import Request
from llmdoctor.decoding.reward_lane import RewardLane
from llmdoctor.decoding.row import Row
from llmdoctor.decoding.sampling import sample
from llmdoctor.errors import UserError
from llmdoctor.models.loading import LoadedModel
from llmdoctor.models.reward_model import RewardModel

_JUDGE_FROM = 0.25
"""Segments at their ends wait until they are this share of the rows: the reward model then runs for many at once."""


@dataclass(frozen=True)
class CARDSOptions:
    """When a segment ends and when it is accepted. Defaults are the published code's, but for r*.

    Attributes:
        reward_threshold: r*, the reward that a whole answer should reach; the paper's code takes 8.5 for a LLaMA-7B
            reward model on HH-RLHF. Sensible is a high quantile of the rewards of the patient's own answers.
        temperature: β of the acceptance; towards 0 a segment below the threshold is always rejected.
        start: share of r* in the threshold at the beginning, (1 − start) · r(x) + start · r*.
        entropy: nats; a segment ends before a token whose distribution has at least this entropy.
        min_segment, max_segment: tokens.
        max_tries: of a segment; then the best one is taken.
    """

    reward_threshold: float
    temperature: float = 0.7
    start: float = 0.5
    entropy: float = 3.0
    min_segment: int = 4
    max_segment: int = 64
    max_tries: int = 20

    def __post_init__(self) -> None:
        checks = {
            "reward_threshold": (math.isfinite(self.reward_threshold), "a finite number"),
            "temperature": (self.temperature > 0, "above 0"),
            "start": (0 <= self.start <= 1, "in [0, 1]"),
            "entropy": (self.entropy >= 0, "at least 0"),
            "min_segment": (self.min_segment >= 1, "at least 1"),
            "max_segment": (self.max_segment >= self.min_segment, f"at least min_segment ({self.min_segment})"),
            "max_tries": (self.max_tries >= 1, "at least 1"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise UserError(f"{name} of CARDS must be {expected}, got {getattr(self, name)!r}")

    def threshold(self, prompt_reward: float, length: int, max_new_tokens: int) -> float:
        """τ(t) = r₀ + (r* − r₀) · t / n for the first t = `length` of at most n tokens, never above r*."""
        first = (1 - self.start) * prompt_reward + self.start * self.reward_threshold
        rising = first + (self.reward_threshold - first) * length / max_new_tokens
        return min(rising, self.reward_threshold)

    def log_acceptance(self, reward: float, threshold: float) -> float:
        """log min(1, exp((r − τ) / β))."""
        return min(0.0, (reward - threshold) / self.temperature)


class CARDS(Method):
    """Draws a segment from the patient, accepts it with probability a = min(1, exp((r − τ) / β)), else draws it again.

    r is the reward of the answer up to the segment's end, τ a threshold that rises from near the prompt's reward to r*
    along the answer, and a segment ends where the patient is unsure of the next token (`CARDSOptions`). Where r never
    exceeds τ this is rejection sampling from π(s) exp(r(s)/β), elsewhere quasi-rejection. After `max_tries` the best
    segment is taken.

    The patient's draws heed temperature, top-k, top-p and min-p of the request. `logps` are the patient's.

    `kl_bound` is the estimate Σ over segments of log a(s) + H_{N−1}, where N is the number of tries and H_m is
    Σ_{k≤m} 1/k. A segment s is kept with probability q(s) = π(s) a(s) / P, P = Σ π a: KL(q‖π) = E_q[log a(s)] − log P.
    N is geometric, P(N = n) = (1 − P)^{n−1} P, so E[H_{N−1}] = Σ_k (1/k) P(N > k) = Σ_k (1 − P)^k / k = −log P. The
    estimate is therefore unbiased for each segment, and by the chain rule for the sequence, while no segment runs out
    of tries. One that does was chosen from M = `max_tries` samples and counts with the most that a choice among M can
    cost, log M − (M − 1)/M. That is the distance to what the tries are drawn from; where the request's warpers make it
    another than the patient, Σ (drawn_logps − patient_logps) is added.

    Args:
        patient: the frozen model.
        reward_model: of the same vocabulary.
        options: thresholds and lengths.
        max_batch_size: rows decoded together; each is at its own segment and try.

    Raises:
        UserError: another vocabulary.
    """

    name = "CARDS"
    sampling_fields = frozenset({"temperature", "top_k", "top_p", "min_p"})

    def __init__(
        self, patient: LoadedModel, reward_model: RewardModel, options: CARDSOptions, *, max_batch_size: int = 32
    ) -> None:
        super().__init__(patient, [reward_model], max_batch_size=max_batch_size)
        self.reward_model = reward_model
        self.options = options

    def _open(self, index: int, request: Request) -> Row:
        if request.sampling.temperature == 0:
            raise UserError("CARDS draws a rejected segment anew, so the temperature must be above 0")
        return super()._open(index, request)

    def _search(self, rows: list[Row]) -> Iterator[list[Row]]:
        room = room_of(rows)
        critic = RewardLane(self.reward_model, [row.prompts[1] for row in rows], room)
        lane = Lane(self.patient, [row.prompts[0] for row in rows], room)
        logits = lane.prefill()[:, : self.width].float()
        controls = Controls(rows, [], logits.device, self.width)
        drafts = [
            _Draft(reward, lane.mask.shape[1], scores.clone(), scores)
            for reward, scores in zip(critic.rewards.tolist(), logits, strict=True)
        ]
        for row in rows:
            row.completion.kl_bound = 0.0
        while True:
            tokens = self._draw(rows, drafts, logits, controls)
            # A row that waits for its reward got no token: `tokens` holds some other draw in its place.
            active = [not (row.done or draft.ends or draft.waits) for row, draft in zip(rows, drafts, strict=True)]
            if any(active):
                logits = lane.step(tokens, torch.tensor(active))[:, : self.width].float()
            self._mark(rows, drafts, logits, active)
            waiting = [place for place, draft in enumerate(drafts) if draft.waits]
            going = sum(not row.done for row in rows)
            if len(waiting) >= max(1.0, _JUDGE_FROM * going):
                self._judge(rows, drafts, waiting, logits, lane, critic)
            finished = newly_finished(rows)
            for row in finished:
                assert row.completion.kl_bound is not None
                row.completion.kl_bound += sum(row.completion.drawn_logps) - sum(row.completion.patient_logps)
            yield finished
            if all(row.done for row in rows):
                return
            keep = survivors(rows)
            if keep is not None:
                rows = [rows[place] for place in keep]
                drafts = [drafts[place] for place in keep]
                lane.keep(keep)
                critic.keep(keep)
                controls.keep(keep)
                logits = logits[keep]
            _close_holes(lane, drafts)

    def _draw(self, rows: list[Row], drafts: list[_Draft], logits: Tensor, controls: Controls) -> Tensor:
        """Book a token for every row that goes on: the next of a segment that is replayed, else a drawn one. [B]."""
        return torch.cat([
            self._draw_block(rows[part], drafts[part], logits[part], controls.of(part)) for part in blocks(logits)
        ])  # fmt: skip

    def _draw_block(self, rows: Sequence[Row], drafts: Sequence[_Draft], logits: Tensor, controls: Controls) -> Tensor:
        """As `_draw`, for some rows: their vocabulary-wide tensors are made several times over."""
        goes_on = [not row.done and not draft.waits for row, draft in zip(rows, drafts, strict=True)]
        broken = (~logits.amax(-1).isfinite()).tolist()
        usable = logits.nan_to_num(nan=0.0)
        scores = warped(usable, controls)
        keys = [
            row.next_key() if goes and not draft.replay else 0
            for row, draft, goes in zip(rows, drafts, goes_on, strict=True)
        ]
        tokens = sample(scores, keys, controls.greedy)
        for place, draft in enumerate(drafts):
            if draft.replay and goes_on[place]:
                tokens[place] = draft.replay.pop(0)
        chosen = tokens[:, None]
        logps = (usable.gather(1, chosen)[:, 0] - usable.logsumexp(-1)).tolist()
        drawn = logps
        if controls.warps:
            drawn = (scores.gather(1, chosen)[:, 0] - scores.logsumexp(-1)).tolist()
        for place, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
            if not goes_on[place]:
                continue
            if broken[place]:
                row.finish("error")
                continue
            row.append(int(tokens[place]), logps[place], logps[place], drawn[place])
            row.completion.patient_forwards += 1
            # Until the segment is accepted the row may have to be opened again.
            draft.ends, row.done = row.done, False
        return tokens

    def _mark(self, rows: list[Row], drafts: list[_Draft], logits: Tensor, active: list[bool]) -> None:
        """See which segments have just come to their ends, and keep what follows them: `logits` [B, V]."""
        options = self.options
        entropies = torch.cat([_entropies(logits[part]) for part in blocks(logits)])
        for place, (row, draft, entropy) in enumerate(zip(rows, drafts, entropies.tolist(), strict=True)):
            if row.done or draft.waits or not (active[place] or draft.ends):
                continue
            length = len(row.completion.token_ids) - draft.begin
            if draft.decided:
                # The reward model has to read it only where the row goes on.
                row.done, over = draft.ends, not draft.ends and not draft.replay
            else:
                unsure = active[place] and entropy >= options.entropy
                over = draft.ends or length >= options.max_segment or (length >= options.min_segment and unsure)
            if over:
                draft.waits, draft.after = True, logits[place].clone()

    def _judge(
        self,
        rows: list[Row],
        drafts: list[_Draft],
        places: list[int],
        logits: Tensor,
        lane: Lane,
        critic: RewardLane,
    ) -> None:
        """Accept or undo the segments of the rows at `places`, and set their `logits` [B, V] to what comes next."""
        options = self.options
        segments = [rows[place].completion.token_ids[drafts[place].begin :] for place in places]
        rewards = critic.extend(places, segments)
        accepted = []
        for order, (place, segment, reward) in enumerate(zip(places, segments, rewards.tolist(), strict=True)):
            row, draft = rows[place], drafts[place]
            done = row.completion
            assert done.kl_bound is not None
            done.guide_forwards += len(segment)
            draft.waits = False
            if not draft.decided:
                draft.tries += 1
                tau = options.threshold(draft.prompt_reward, len(done.token_ids), row.request.sampling.max_new_tokens)
                log_accept = options.log_acceptance(reward, tau)
                # One number for every try, needed or not, so that what follows does not hang on rounding.
                if not math.log1p(-row.uniform()) <= log_accept:
                    draft.reject(row, segment, reward)
                    lane.erase([place], [draft.column])
                    logits[place] = draft.logits
                    if draft.tries >= options.max_tries:
                        draft.decided, draft.replay = True, list(draft.best)
                        done.kl_bound += best_of_n_kl(draft.tries)
                    continue
                done.kl_bound += log_accept + sum(1.0 / k for k in range(1, draft.tries))
            accepted.append(order)
            row.done = draft.ends
            logits[place] = draft.after
            draft.restart(row, lane.mask.shape[1])
        critic.commit(accepted)


@dataclass
class _Draft:
    """The segment at which a row is.

    Attributes:
        prompt_reward: r(x).
        column: of the patient's cache at which the segment begins.
        logits: [V] the patient's at that place.
        after: [V] the patient's at the segment's end, once it is there.
        begin: its first token's place in the completion.
        tries: drawn and judged so far.
        best, best_reward: of the rejected ones.
        decided: no try is left; the best is taken.
        replay: tokens of the best one that are still to be appended.
        ends: the segment's last token ends the row.
        waits: the segment is at its end and waits for its reward.
    """

    prompt_reward: float
    column: int
    logits: Tensor
    after: Tensor
    begin: int = 0
    tries: int = 0
    best: list[int] = field(default_factory=list)
    best_reward: float = -math.inf
    decided: bool = False
    replay: list[int] = field(default_factory=list)
    ends: bool = False
    waits: bool = False

    def reject(self, row: Row, segment: list[int], reward: float) -> None:
        """Take the segment's tokens back, and remember them if they are the best so far."""
        if reward > self.best_reward or not self.best:
            self.best_reward, self.best = reward, segment
        row.retract(self.begin)
        self.ends = False

    def restart(self, row: Row, column: int) -> None:
        """Begin the segment after the last token of `row`."""
        self.column, self.logits, self.begin = column, self.after, len(row.completion.token_ids)
        self.tries, self.best, self.best_reward = 0, [], -math.inf
        self.decided = self.ends = False


def _entropies(logits: Tensor) -> Tensor:
    """[B, V] -> [B] nats."""
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps.clamp(min=torch.finfo(logps.dtype).min)).sum(-1)


def _close_holes(lane: Lane, drafts: Sequence[_Draft]) -> None:
    if lane.has_holes:
        moved = lane.pack().tolist()
        for draft, columns in zip(drafts, moved, strict=True):
            draft.column = columns[draft.column]
