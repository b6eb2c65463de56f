"""ARGS: the reward model votes on every token.

Source: Khanov, Burapacheep and Li, "ARGS: Alignment as Reward-Guided Search" (ICLR 2024, arXiv 2402.01694).
Shapes: B rows, K candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

from llmdoctor.baselines.method import Method, newly_finished, pick, room_of, survivors
from llmdoctor.decoding.lane import Lane
from llmdoctor.decoding.reward_lane import RewardLane
from llmdoctor.decoding.row import Row
from llmdoctor.errors import UserError
from llmdoctor.models.loading import LoadedModel
from llmdoctor.models.reward_model import RewardModel


class ARGS(Method):
    """Among the patient's K likeliest next tokens v, takes the one of the highest log π(v | x, y) + w · r(x, y v).

    With a temperature above 0 in the request it is ARGS-stochastic: the token is drawn from softmax(score /
    temperature) over the K. The paper's equation says "LM(v | x)" and its published code adds the raw logit; the
    log-probability used here differs from that by a constant per position, so choice and distribution are the same.

    A completion's `logps` are those of the method's own distribution: 0 for every token of the greedy form.

    Args:
        patient: the frozen model.
        reward_model: of the same vocabulary; reads the beginning of an answer as if it were one.
        weight: w; the paper uses 1 to 1.5. 0 is the patient's own top-K sampling.
        top_k: K; the paper uses 10.
        max_batch_size: rows decoded together.

    Raises:
        UserError: another vocabulary, or no candidate.
    """

    name = "ARGS"
    sampling_fields = frozenset({"temperature"})

    def __init__(
        self,
        patient: LoadedModel,
        reward_model: RewardModel,
        *,
        weight: float = 1.5,
        top_k: int = 10,
        max_batch_size: int = 32,
    ) -> None:
        super().__init__(patient, [reward_model], max_batch_size=max_batch_size)
        if top_k < 1:
            raise UserError(f"ARGS needs at least 1 candidate, got top_k {top_k}")
        self.reward_model = reward_model
        self.weight = weight
        self.top_k = min(top_k, self.width)

    def _search(self, rows: list[Row]) -> Iterator[list[Row]]:
        room = room_of(rows) + self.top_k
        lane = Lane(self.patient, [row.prompts[0] for row in rows], room)
        critic = RewardLane(self.reward_model, [row.prompts[1] for row in rows], room)
        logits = lane.prefill()
        while True:
            logps, candidates = logits[:, : self.width].float().log_softmax(-1).topk(self.top_k, dim=-1)
            scores = logps + self.weight * critic.peek(candidates).to(logps.device)
            choice, own, broken = pick(rows, scores)
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
                row.completion.guide_forwards += self.top_k
            yield newly_finished(rows)
            if all(row.done for row in rows):
                return
            critic.advance(tokens)
            keep = survivors(rows)
            if keep is not None:
                rows = [rows[place] for place in keep]
                lane.keep(keep)
                critic.keep(keep)
                tokens = tokens[keep]
            logits = lane.step(tokens)
