"""What goes into the engine and what comes out."""

from __future__ import annotations

import math
import numbers
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmdoctor.errors import UserError

LEAST_TEMPERATURE = 1e-5
"""Below it scores over it are no longer finite; the most likely token is drawn long before."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn from the guided distribution.

    A seed is always set, so the same request gives the same answer again. `seed=None` draws one, which is then there to
    be read.

    Attributes:
        max_new_tokens: most tokens a completion may have; 0 gives an empty one.
        temperature: 0 takes the most likely token (greedy).
        top_k: 0 is off.
        top_p: 1 is off.
        min_p: 0 is off.
        repetition_penalty: 1 is off.
        seed: of this row's draws; the same request gives the same tokens whoever shares its batch, up to the rounding
            of batched products, which in bfloat16 now and then decides between two tokens.
        stop: strings that end the completion; they are not part of its text.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.seed is None:
            # 53 bits: exact in JSON.
            object.__setattr__(self, "seed", secrets.randbits(53))
        for name, (kind, good, expected) in _SAMPLING.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or not good(value):
                raise UserError(f"{name} must be {expected}, got {value!r:.80}")


_SAMPLING: Mapping[str, tuple[type, Callable[[Any], bool], str]] = {
    "max_new_tokens": (numbers.Integral, lambda value: value >= 0, "a whole number of at least 0"),
    "temperature": (
        numbers.Real,
        lambda value: value == 0 or value >= LEAST_TEMPERATURE,
        f"0 (greedy) or at least {LEAST_TEMPERATURE:g}",
    ),
    "top_k": (numbers.Integral, lambda value: value >= 0, "a whole number of at least 0 (0 is off)"),
    "top_p": (numbers.Real, lambda value: 0 < value <= 1, "in (0, 1]"),
    "min_p": (numbers.Real, lambda value: 0 <= value < 1, "in [0, 1)"),
    "repetition_penalty": (numbers.Real, lambda value: value > 0, "positive"),
    "seed": (numbers.Integral, lambda value: True, "a whole number, or None, which draws one"),
    "stop": (
        Collection,
        lambda value: not isinstance(value, str) and all(isinstance(text, str) and text for text in value),
        "a list of non-empty strings",
    ),
}
"""What each setting must be: its type, a test, and both in words."""


@dataclass(frozen=True)
class Request:
    """One prompt with its own mixture and sampling.

    Attributes:
        messages: the conversation, ending with a user turn; `from_text` makes one of a string.
        alpha: exponent of the patient, α.
        betas: exponent β of each doctor by its name; one that is not named has β = 0, so {} is the patient alone. None
            is β = 1 for every doctor there is.
        sampling: how to draw.
        id: returned with the result.
        onset: tokens at the start of the answer over which the βs grow to their values: token t (from 0) is drawn with
            β · min(1, (t + 1) / (onset + 1)). 0 steers alike throughout. Openings are where a strong β says the same to
            every prompt.
    """

    messages: tuple[Mapping[str, Any], ...]
    alpha: float = 1.0
    betas: Mapping[str, float] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    id: str = ""
    onset: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.messages, str) or not all(isinstance(message, Mapping) for message in self.messages):
            raise UserError(
                "messages must be a conversation, such as ({'role': 'user', 'content': 'Hello'},), got "
                f"{self.messages!r:.80}; for a prompt that is one string there is Request.from_text"
            )
        if self.betas is not None and not isinstance(self.betas, Mapping):
            raise UserError(
                "betas must be the β of each doctor by its name, such as {'positive': 1.0}, got "
                f"{self.betas!r:.80}; without betas every doctor has β = 1"
            )
        betas = (self.betas or {}).items()
        for name, value in (("alpha", self.alpha), *((f"beta of {key!r}", beta) for key, beta in betas)):
            if not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise UserError(f"{name} must be a finite number, got {value!r:.80}")
        if self.onset < 0:
            raise UserError(f"onset must be at least 0, got {self.onset}")

    def beta_of(self, name: str) -> float:
        """The exponent β of the doctor of that name."""
        return 1.0 if self.betas is None else self.betas.get(name, 0.0)

    @classmethod
    def from_text(cls, prompt: str, **kwargs: Any) -> Request:
        """A request whose conversation is one user turn."""
        return cls(({"role": "user", "content": prompt},), **kwargs)


def listed(requests: Iterable[Request]) -> list[Request]:
    """The requests as a list; UserError where they are one alone, or something else."""
    # A request alone, or a text, is a usual slip.
    found: list[Any] = [requests] if isinstance(requests, str | Request) else list(requests)
    wrong = [one for one in found if one is requests or not isinstance(one, Request)]
    if wrong:
        raise UserError(f"requests are a list, such as [Request.from_text('Hello')], of Request; got {wrong[0]!r:.80}")
    return found


@dataclass
class Completion:
    """What the engine made of a request.

    Attributes:
        text: without the end-of-turn token and without the stop string.
        token_ids: all tokens drawn, the end-of-turn token included.
        finish_reason: "stop" (end of turn or a stop string), "length" (max_new_tokens), "context" (the model's
            context is full), "cancelled" (the caller gave it up; what was said until then is kept) or "error" (no
            distribution to draw from, because a model returned NaN, or no memory even for this one alone).
        logps: log π_dec of each token, before warpers, in nats.
        patient_logps: log π_patient of each token, before warpers, in nats.
        drawn_logps: log-probability of each token under what it was drawn from, after warpers, in nats; 0 where greedy.
        patient_forwards: token positions at which the patient was run for this completion, prompt not counted.
        guide_forwards: the same for all other models together, a draft model aside.
        guessed: tokens that were guessed ahead.
        guesses_held: of these, those that were the ones drawn.
        unmapped_mass: over the doctors of other vocabularies that have a β here, and their references, the mean
            probability a position of tokens that stand for none of the patient's; None where nothing was translated.
        kl_bound: nats a sequence; set by methods whose KL to the patient is known only as a bound or as an estimate of
            their own.
    """

    id: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    logps: list[float] = field(default_factory=list)
    patient_logps: list[float] = field(default_factory=list)
    drawn_logps: list[float] = field(default_factory=list)
    patient_forwards: int = 0
    guide_forwards: int = 0
    guessed: int = 0
    guesses_held: int = 0
    unmapped_mass: float | None = None
    kl_bound: float | None = None

    @property
    def kl(self) -> float:
        """Estimate, in nats, of KL(what was drawn from ‖ patient) by this answer; unbiased unless `kl_bound` is set."""
        return sum(self.drawn_logps) - sum(self.patient_logps) if self.kl_bound is None else self.kl_bound


class Decoder(Protocol):
    """Whatever completes requests: guided decoding and every method it is compared with."""

    def generate(
        self, requests: Iterable[Request], *, on_done: Callable[[int, Completion], None] | None = None
    ) -> list[Completion]:
        """Complete all requests; results come in their order, and `on_done` hears of each as soon as it is finished."""
        ...
