"""A chat model as a judge: both presentation orders of every comparison, each asked once and kept on disk."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing

from llmdoctor.data.formats import Message
from llmdoctor.errors import UserError
from llmdoctor.evaluation.chat_client import ChatClient, Stopped
from llmdoctor.evaluation.chat_endpoint import ChatEndpoint, approximate_tokens
from llmdoctor.evaluation.judge_cache import JudgeCache, Reply
from llmdoctor.evaluation.judge_prompt import REMINDER, JudgePrompt, Reading, read_verdict
from llmdoctor.evaluation.judge_report import CostEstimate, JudgeReport, Prices
from llmdoctor.evaluation.judges import LOSS, TIE, WIN, Progress, Verdict, check_lengths
from llmdoctor.files import digest

# The question with the first answer shown as A, and with it shown as B.
_Orders = tuple[str, str]

_FIRST_IN_FRONT = {Reading.A: WIN, Reading.B: LOSS}
_SECOND_IN_FRONT = {Reading.A: LOSS, Reading.B: WIN}


class ChatJudge:
    """Asks a chat model which of two answers is better, in both presentation orders.

    The verdict is the one on which both orders agree, or else a tie. A question whose reply holds no verdict is asked
    again, up to `attempts` times in all; one that is refused is not. Every reply is in the cache before it counts,
    under a digest of endpoint, parameters, question and attempt, so an interrupted run goes on where it stopped.

    Args:
        endpoint: the model and how it is asked.
        prompt: a file with the question (see `JudgePrompt`); the one that ships if None.
        cache: a file for the replies; None keeps them in memory.
        attempts: most replies to one question.
        prices: for the cost figures.

    Raises:
        UserError: the prompt, the cache, the key or the `openai` package cannot be used.
    """

    def __init__(
        self,
        endpoint: ChatEndpoint,
        *,
        prompt: str | os.PathLike[str] | None = None,
        cache: str | os.PathLike[str] | None = None,
        attempts: int = 3,
        prices: Prices | None = None,
    ) -> None:
        if attempts < 1:
            raise UserError(f"attempts must be at least 1, got {attempts}")
        self.name = f"chat:{endpoint.model}"
        self._endpoint = endpoint
        self._prompt = JudgePrompt(prompt)
        self._attempts = attempts
        self._prices = prices
        self._client = ChatClient(endpoint)
        self._cache = JudgeCache(cache)
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def fingerprint(self) -> str:
        """Short hash of what its verdicts depend on: endpoint, model, parameters, prompt file, attempts."""
        return digest([self._key("", 0), self._prompt.fingerprint, self._attempts])

    def compare(
        self,
        prompts: Sequence[Sequence[Message]],
        first: Sequence[str],
        second: Sequence[str],
        *,
        progress: Progress | None = None,
    ) -> list[Verdict]:
        """See `Judge.compare`.

        Raises:
            UserError: the endpoint refuses, or stays down; what was answered before is in the cache.
        """
        pairs = self._questions(prompts, first, second)
        verdicts = {index: Verdict.from_orders(TIE, TIE) for index, pair in enumerate(pairs) if pair is None}
        if progress and verdicts:
            progress(len(verdicts))
        asked_by = _by_question(pairs)
        readings: dict[str, Reading] = {}
        with closing(self._ask_all(list(asked_by))) as answers:
            for question, reading in answers:
                readings[question] = reading
                for index, pair in asked_by[question]:
                    if all(side in readings for side in pair):
                        verdicts[index] = _verdict(readings[pair[0]], readings[pair[1]])
                        if progress:
                            progress(1)
        self._count_verdicts(pairs, readings, verdicts)
        return [verdicts[index] for index in range(len(pairs))]

    def estimate(
        self, prompts: Sequence[Sequence[Message]], first: Sequence[str], second: Sequence[str]
    ) -> CostEstimate:
        """What `compare` of the same arguments would ask and cost, were every first reply a verdict. Asks nothing."""
        questions = list(
            dict.fromkeys(side for pair in self._questions(prompts, first, second) if pair for side in pair)
        )
        open_questions = [text for question in questions if (text := self._open(question)) is not None]
        read = sum(approximate_tokens(text) for text in open_questions)
        bound = self._endpoint.output_bound
        written = None if bound is None else bound * len(open_questions)
        price = None if self._prices is None or written is None else self._prices.of(read, written)
        return CostEstimate(len(questions), len(open_questions), read, written, price, self._attempts)

    def report(self) -> JudgeReport:
        """What was asked, answered, and counted as a tie so far; also after an error."""
        with self._lock:
            counts = Counter(self._counts)
        names = [name for name in JudgeReport.__dataclass_fields__ if name not in ("retried", "cost")]
        tokens = counts["input_tokens"], counts["output_tokens"]
        return JudgeReport(
            **{name: counts[name] for name in names},
            retried=self._client.retried,
            cost=None if self._prices is None else self._prices.of(*tokens),
        )

    def close(self) -> None:
        """Close the cache and the connections."""
        self._client.close()
        self._cache.close()

    def _questions(
        self, prompts: Sequence[Sequence[Message]], first: Sequence[str], second: Sequence[str]
    ) -> list[_Orders | None]:
        """Both orders of every comparison; None for equal answers."""
        check_lengths(prompts, first, second)
        return [
            None if one == two else (self._prompt.render(prompt, one, two), self._prompt.render(prompt, two, one))
            for prompt, one, two in zip(prompts, first, second, strict=True)
        ]

    def _ask_all(self, questions: Sequence[str]) -> Generator[tuple[str, Reading]]:
        """Each question with its reading, as they come. The first error stops the others where they wait."""
        stop = threading.Event()
        pool = ThreadPoolExecutor(self._endpoint.concurrency, thread_name_prefix="judge")
        futures: dict[Future[Reading], str] = {}
        try:
            futures.update((pool.submit(self._ask, text, stop), text) for text in questions)
            for future in as_completed(futures):
                # Those that an error elsewhere has stopped may be done before the one that bears the error.
                if not isinstance(future.exception(), Stopped):
                    yield futures[future], future.result()
        except UserError as error:
            _end(pool, stop)
            done = sum(not future.cancelled() and future.exception() is None for future in futures)
            path = self._cache.path
            kept = f"; {done} of {len(questions)} questions are answered and kept in {path}: run again to go on"
            raise UserError(f"{error}{kept if path else ''}") from error
        finally:
            _end(pool, stop)

    def _ask(self, question: str, stop: threading.Event) -> Reading:
        """The first verdict or refusal among up to `attempts` replies. An error sets `stop`."""
        try:
            for attempt in range(self._attempts):
                reading = _reading(self._reply(_worded(question, attempt), attempt, stop))
                if reading is not Reading.UNPARSED:
                    return reading
        except UserError:
            # Here and not where the error is reported: this thread would take up the next question before that.
            stop.set()
            raise
        return Reading.UNPARSED

    def _reply(self, text: str, attempt: int, stop: threading.Event) -> Reply:
        key = self._key(text, attempt)
        reply = self._cache.get(key)
        gained = Counter(reasked=int(attempt > 0))
        if reply:
            gained["cached"] = 1
        else:
            reply = self._client.ask(self._endpoint.request(text, attempt), stop)
            self._cache.put(key, reply)
            gained.update(
                asked=1,
                input_tokens=reply.input_tokens,
                output_tokens=reply.output_tokens,
                unmetered=int(not reply.metered),
            )
        with self._lock:
            self._counts.update(gained)
        return reply

    def _open(self, question: str) -> str | None:
        """What the endpoint would next be asked about a question; None if its reading is known from the cache."""
        for attempt in range(self._attempts):
            text = _worded(question, attempt)
            reply = self._cache.get(self._key(text, attempt))
            if reply is None:
                return text
            if _reading(reply) is not Reading.UNPARSED:
                break
        return None

    def _key(self, text: str, attempt: int) -> str:
        # With the URL: local servers answer to any model's name.
        url = self._endpoint.base_url.rstrip("/")
        return digest({"url": url, "request": self._endpoint.request(text, attempt), "attempt": attempt})

    def _count_verdicts(
        self, pairs: Sequence[_Orders | None], readings: Mapping[str, Reading], verdicts: Mapping[int, Verdict]
    ) -> None:
        gained = Counter(comparisons=len(pairs))
        for index, pair in enumerate(pairs):
            found = {readings[side] for side in pair or ()}
            if pair is None:
                gained["identical"] += 1
            elif Reading.REFUSED in found:
                gained["refused"] += 1
            elif Reading.UNPARSED in found:
                gained["unparsed"] += 1
            elif not verdicts[index].consistent:
                gained["inconsistent"] += 1
        with self._lock:
            self._counts.update(gained)


def _by_question(pairs: Sequence[_Orders | None]) -> dict[str, list[tuple[int, _Orders]]]:
    """Every question once, in order, with the comparisons that wait for it."""
    found: dict[str, list[tuple[int, _Orders]]] = {}
    for index, pair in enumerate(pairs):
        if pair is not None:
            for question in dict.fromkeys(pair):
                found.setdefault(question, []).append((index, pair))
    return found


def _end(pool: ThreadPoolExecutor, stop: threading.Event) -> None:
    # What is in flight is paid for: it ends and is kept.
    stop.set()
    pool.shutdown(wait=True, cancel_futures=True)


def _reading(reply: Reply) -> Reading:
    return Reading.REFUSED if reply.declined else read_verdict(reply.text)


def _verdict(ahead: Reading, behind: Reading) -> Verdict:
    """From the reading with the first answer shown as A, and the one with it shown as B."""
    orders = _FIRST_IN_FRONT.get(ahead, TIE), _SECOND_IN_FRONT.get(behind, TIE)
    return Verdict.from_orders(*orders, answered=not {ahead, behind} & {Reading.REFUSED, Reading.UNPARSED})


def _worded(question: str, attempt: int) -> str:
    return f"{question}\n\n{REMINDER}" if attempt else question
