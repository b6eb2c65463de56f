"""The judge of a task: one number an answer, and a verdict a pair of answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmdoctor.data.formats import Message
from llmdoctor.errors import UserError

Messages = Sequence[Message]


class TaskJudge:
    """A scorer, a reward model, or a chat model that compares.

    Args:
        spec: a scorer's name, `reward:MODEL` or `chat:MODEL@URL`.
        folder: where a chat judge keeps its replies.
    """

    def __init__(self, spec: str, folder: Path) -> None:
        from llmdoctor.evaluation.judges import RewardJudge, ScoreJudge

        self.name = spec
        self._score: Any = None
        kind, _, rest = spec.partition(":")
        if kind == "chat":
            self._judge: Any = _chat_judge(rest, folder)
        elif kind == "reward":
            from llmdoctor.models.reward_model import load_reward_model

            model = load_reward_model(rest)
            self._judge = RewardJudge(model, name=spec)
            self._score = model.score
        else:
            from llmdoctor.evaluation.scorers import get_scorer

            scorer = get_scorer(spec)
            self._judge = ScoreJudge(scorer)
            self._score = lambda prompts, texts: scorer(texts)

    def scores(self, prompts: Sequence[Messages], texts: Sequence[str], patient: Sequence[str]) -> list[float]:
        """One number an answer: the score; from a judge that only compares, 1, ½ or 0 against the patient's answer."""
        if self._score is not None:
            return list(self._score(prompts, texts))
        return self.outcomes(prompts, texts, patient)

    def outcomes(self, prompts: Sequence[Messages], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """1 where the first answer wins, 0 where the second does, else ½."""
        return [verdict.outcome for verdict in self._judge.compare(prompts, first, second)]


def _chat_judge(rest: str, folder: Path) -> Any:
    from llmdoctor.evaluation.chat_endpoint import ChatEndpoint
    from llmdoctor.evaluation.chat_judge import ChatJudge

    model, _, url = rest.partition("@")
    if not model:
        raise UserError("a chat judge is named chat:MODEL or chat:MODEL@URL")
    endpoint = ChatEndpoint(model, url) if url else ChatEndpoint(model)
    folder.mkdir(parents=True, exist_ok=True)
    return ChatJudge(endpoint, cache=folder / "judge.sqlite")
