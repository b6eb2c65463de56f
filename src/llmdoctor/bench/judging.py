"""The judge of a task: one number an answer, and a verdict a pair of answers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmdoctor.data.formats import Message, PreferencePair
from llmdoctor.errors import UserError

if TYPE_CHECKING:
    from llmdoctor.evaluation.chat_judge import ChatJudge
    from llmdoctor.evaluation.judge_report import CostEstimate, JudgeReport
    from llmdoctor.evaluation.judges import JudgeAgreement, Progress

Messages = Sequence[Message]


@dataclass(frozen=True)
class JudgeOptions:
    """How a chat judge is asked. Other judges take none of these.

    Attributes:
        judge_price_in: US dollars for a million tokens that a chat judge reads; with --judge-price-out costs are told.
        judge_price_out: US dollars for a million tokens that it writes.
        judge_prompt: a file with the question to a chat judge, {prompt}, {first} and {second} in it; the one that ships
            if left out.
        judge_rpm: at most so many requests a minute; no limit if left out.
        judge_concurrency: requests to a chat judge in flight at once.
        judge_params: JSON of request parameters, over temperature 0, seed 0 and max_tokens 512; null removes one.
            Reasoning models of OpenAI want '{"temperature": null, "max_tokens": null, "max_completion_tokens": 4096}'.
        judge_key_env: the environment variable that holds the key; OPENAI_API_KEY if left out.
        judge_timeout: seconds of silence after which a chat judge is asked again.
    """

    judge_price_in: float | None = None
    judge_price_out: float | None = None
    judge_prompt: str | None = None
    judge_rpm: float | None = None
    judge_concurrency: int = 4
    judge_params: str | None = None
    judge_key_env: str | None = None
    judge_timeout: float = 60.0

    def __post_init__(self) -> None:
        prices = (self.judge_price_in, self.judge_price_out)
        if prices.count(None) == 1:
            raise UserError("a judge's cost needs both judge_price_in and judge_price_out, got one of them")
        for price in prices:
            if price is not None and not 0 <= price < math.inf:
                raise UserError(f"a judge's price must be a finite number of at least 0, got {price}")
        if self.judge_rpm is not None and not self.judge_rpm > 0:
            raise UserError(f"judge_rpm must be greater than 0, got {self.judge_rpm}")
        if self.judge_concurrency < 1:
            raise UserError(f"judge_concurrency must be at least 1, got {self.judge_concurrency}")
        if not 0 < self.judge_timeout < math.inf:
            raise UserError(f"judge_timeout must be a finite number greater than 0, got {self.judge_timeout}")
        self.params()

    def params(self) -> dict[str, Any]:
        """The parameters of `judge_params`; UserError where it is no JSON object."""
        try:
            found = json.loads(self.judge_params or "{}", parse_constant=_no_number)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(
                f"judge_params must be a JSON object, such as '{{\"temperature\": 1}}', got {self.judge_params!r}"
            )
        return found


class TaskJudge:
    """A scorer, a reward model, or a chat model that compares.

    Args:
        spec: a scorer's name, `reward:MODEL` or `chat:MODEL@URL`.
        folder: where a chat judge keeps its replies.
        options: of a chat judge.

    Raises:
        UserError: no such judge, one that cannot be used, or options for another than a chat judge.
    """

    def __init__(self, spec: str, folder: Path, options: JudgeOptions | None = None) -> None:
        from llmdoctor.evaluation.judges import RewardJudge, ScoreJudge

        self.name = spec
        self._score: Any = None
        self._chat: ChatJudge | None = None
        options = options or JudgeOptions()
        kind, _, rest = spec.partition(":")
        if not is_chat(spec) and (given := _given(options)):
            raise UserError(f"{', '.join(given)}: only for a chat judge, the judge is {spec!r}")
        if kind == "chat":
            self._chat = _chat_judge(rest, folder, options)
            self._judge: Any = self._chat
        elif kind == "reward":
            from llmdoctor.models.reward_model import load_reward_model

            model = _Finished(spec, load_reward_model(rest))
            self._judge = RewardJudge(model, name=spec)
            self._score = model.score
        else:
            from llmdoctor.evaluation.scorers import get_scorer

            scorer = get_scorer(spec)
            self._judge = ScoreJudge(scorer)
            self._score = lambda prompts, texts: scorer(texts)
        if self._score is not None:
            # One that cannot score, with broken weights say, is told now, not after hours of decoding.
            self._score([[{"role": "user", "content": "Hello"}]], ["Hello."])

    @property
    def only_compares(self) -> bool:
        """It has no number for a single answer."""
        return self._score is None

    @property
    def fingerprint(self) -> str | None:
        """Of endpoint, parameters and question of a chat judge; None for the others."""
        return self._chat.fingerprint if self._chat else None

    def scores(
        self,
        prompts: Sequence[Messages],
        texts: Sequence[str],
        patient: Sequence[str],
        progress: Progress | None = None,
    ) -> list[float]:
        """One number an answer: the score; from a judge that only compares, 1, ½ or 0 against the patient's answer.

        Raises:
            UserError: a reward that is not a finite number, or a chat judge that refuses or stays down.
        """
        if self._score is not None:
            return list(self._score(prompts, texts))
        return self.outcomes(prompts, texts, patient, progress)

    def outcomes(
        self,
        prompts: Sequence[Messages],
        first: Sequence[str],
        second: Sequence[str],
        progress: Progress | None = None,
    ) -> list[float]:
        """1 where the first answer wins, 0 where the second does, else ½; `progress` hears of every comparison."""
        return [verdict.outcome for verdict in self._judge.compare(prompts, first, second, progress=progress)]

    def agreement(self, pairs: Sequence[PreferencePair], progress: Progress | None = None) -> JudgeAgreement:
        """How often it prefers the response that people chose."""
        from llmdoctor.evaluation.judges import judge_agreement

        return judge_agreement(self._judge, pairs, progress=progress)

    def estimate(self, prompts: Sequence[Messages], first: Sequence[str], second: Sequence[str]) -> CostEstimate | None:
        """What a chat judge would be asked for these verdicts; None for a judge that costs nothing."""
        return self._chat.estimate(prompts, first, second) if self._chat else None

    def report(self) -> JudgeReport | None:
        """What a chat judge has been asked so far; None for the others."""
        return self._chat.report() if self._chat else None


@dataclass(frozen=True)
class _Finished:
    """A reward model that reads every answer as a finished turn, as chat templates write them, also one that was cut.

    Rewards without the end of the turn are not what reward models are trained for.
    """

    name: str
    model: Any

    def score(self, prompts: Sequence[Messages], texts: Sequence[str]) -> list[float]:
        """One finite number a text, higher is better."""
        return finite_rewards(self.name, self.model.score(prompts, texts, complete=True))


def is_chat(spec: str) -> bool:
    """Whether a judge of this name is a chat model."""
    return spec.startswith("chat:")


def finite_rewards(name: str, rewards: Sequence[float]) -> list[float]:
    """The rewards; UserError, naming the reward model, if one is not a finite number."""
    bad = [reward for reward in rewards if not math.isfinite(reward)]
    if bad:
        raise UserError(
            f"{name} gave the reward {bad[0]} to {len(bad)} of {len(rewards)} answers; expected finite numbers: its "
            "weights are broken, or too large for its dtype"
        )
    return list(rewards)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _given(options: JudgeOptions) -> list[str]:
    return [field.name for field in fields(options) if getattr(options, field.name) != field.default]


def _chat_judge(rest: str, folder: Path, options: JudgeOptions) -> ChatJudge:
    from llmdoctor.evaluation.chat_endpoint import ChatEndpoint
    from llmdoctor.evaluation.chat_judge import ChatJudge
    from llmdoctor.evaluation.judge_report import Prices

    # The @ before a URL, which models' names may have too; without a scheme what follows is refused as a URL.
    named = re.fullmatch(r"(.*?)@(\w+://.*)", rest)
    model, url = named.groups() if named else rest.partition("@")[::2]
    if not model:
        raise UserError("a chat judge is named chat:MODEL or chat:MODEL@URL")
    how: dict[str, Any] = {
        "requests_per_minute": options.judge_rpm,
        "concurrency": options.judge_concurrency,
        "params": options.params(),
        "timeout_s": options.judge_timeout,
    }
    how |= {"base_url": url} if url else {}
    how |= {"api_key_env": options.judge_key_env} if options.judge_key_env else {}
    endpoint = ChatEndpoint(model, **how)
    prices = None
    if options.judge_price_in is not None and options.judge_price_out is not None:
        prices = Prices(options.judge_price_in, options.judge_price_out)
    folder.mkdir(parents=True, exist_ok=True)
    return ChatJudge(endpoint, prompt=options.judge_prompt, cache=folder / "judge.sqlite", prices=prices)
