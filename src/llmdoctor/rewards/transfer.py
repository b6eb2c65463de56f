"""Token rewards carried over to the tokens of a doctor with another tokenizer than the patient that gave them.

Shapes: plain lists; S tokens of the patient's, T of the doctor's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.files import digest
from llmdoctor.models.loading import LoadedModel
from llmdoctor.models.vocab import Vocabulary
from llmdoctor.rewards.store import SIDES, RewardStore

CARRIED = ("rewards", "importance", "pos_logps", "neg_logps")
"""Columns that are shared out. Log-likelihoods of a text add up over its tokens, however it is split."""


def rewards_for(base: LoadedModel, rewards: RewardStore) -> RewardStore:
    """`rewards` as a doctor on `base` can be trained on them: themselves where the tokenizer is the patient's.

    Raises:
        UserError: the base's tokens cannot be read as bytes.
    """
    if rewards.fingerprint.get("tokenizer") == base.fingerprint["tokenizer"] or isinstance(rewards, TransferredRewards):
        return rewards
    return TransferredRewards(rewards, base)


class TransferredRewards(RewardStore):
    """A reward store in the tokens of another tokenizer.

    The response's text is split by the doctor's tokenizer, and each of the patient's tokens gives what it has to the
    doctor's tokens that overlap it, in proportion to the bytes they share. So the sum over a response stays what it
    was. A character that was split over several of the patient's tokens counts as one token, whose reward is their
    sum. The end-of-turn token's reward goes to the doctor's own.

    Args:
        rewards: from stage 1.
        base: the doctor's base; its prompts are those of its own chat template.
    """

    def __init__(self, rewards: RewardStore, base: LoadedModel) -> None:
        super().__init__(rewards.folder, rewards.manifest)
        self._encoder = ChatEncoder.for_model(base.model, base.tokenizer)
        self._vocabulary = Vocabulary.of(self._encoder)
        self._tokenizer = base.fingerprint["tokenizer"]

    @property
    def fingerprint(self) -> dict[str, str]:
        """The patient's fingerprints as they were, and under `carried_to` that of the doctor's tokenizer."""
        return {**super().fingerprint, "carried_to": digest([self._tokenizer, self._encoder.end_of_turn])}

    def rows(self, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """Rows in the order of the data, in the doctor's tokens."""
        return map(self._carry, super().rows(limit))

    def dataset(self) -> Any:
        """The rewards as a `datasets.Dataset`, in the doctor's tokens."""
        dataset = super().dataset()
        return dataset.map(
            self._carry,
            features=dataset.features,
            load_from_cache_file=False,
            # Else the tokenizer would be pickled to make one up.
            new_fingerprint=digest([dataset._fingerprint, self.fingerprint]),
        )

    def _carry(self, row: dict[str, Any]) -> dict[str, Any]:
        row = dict(row)
        for side in SIDES:
            values = {name: row[f"{side}_{name}"] for name in CARRIED}
            ids, carried = carry(
                row[f"{side}_tokens"], bool(row[f"{side}_terminal"]), values, self._encoder, self._vocabulary
            )
            row[f"{side}_ids"], row[f"{side}_tokens"] = ids, self._encoder.token_texts(ids)
            row |= {f"{side}_{name}": shares for name, shares in carried.items()}
        return row


def carry(
    tokens: Sequence[str],
    terminal: bool,
    values: dict[str, Sequence[float]],
    encoder: ChatEncoder,
    vocabulary: Vocabulary,
) -> tuple[list[int], dict[str, list[float]]]:
    """One response in the doctor's tokens.

    Args:
        tokens: the surface text of each of the patient's S tokens, as `ChatEncoder.token_texts` gives them.
        terminal: whether the last one is the end-of-turn token.
        values: lists of S numbers.
        encoder, vocabulary: the doctor's.

    Returns:
        T ids, and each list of `values` as T numbers with the same sum.
    """
    texts = list(tokens[:-1] if terminal else tokens)
    whole = "".join(texts)
    # A response that was cut may end within a character.
    text = whole if terminal else whole.rstrip("\ufffd") or whole
    length = len(text.encode())
    source = [min(length, end) for end in accumulate(len(piece.encode()) for piece in texts)]
    ids = encoder.text_ids(text) if text else []
    target = _ends(ids, text.encode(), vocabulary)
    shared = {name: share_out(numbers[: len(texts)], source, target) for name, numbers in values.items()}
    if terminal:
        ids = [*ids, encoder.end_of_turn]
        shared = {name: [*numbers, float(values[name][-1])] for name, numbers in shared.items()}
    return ids, shared


def carry_onto(
    ids: Sequence[int], terminal: bool, tokens: Sequence[str], values: Sequence[float], vocabulary: Vocabulary
) -> list[float]:
    """What the patient's tokens of a text have, on the tokens with which a doctor wrote it.

    Args:
        ids: the doctor's T tokens.
        terminal: whether the last token of both is the end of turn.
        tokens: the surface text of each of the patient's S tokens.
        values: S numbers.
        vocabulary: the doctor's.

    Returns:
        T numbers with the same sum.
    """
    texts = list(tokens[:-1] if terminal else tokens)
    own = list(ids[:-1] if terminal else ids)
    data = "".join(texts).encode()
    source = list(accumulate(len(piece.encode()) for piece in texts))
    shares = share_out(values[: len(texts)], source, _ends(own, data, vocabulary))
    return [*shares, float(values[-1])] if terminal else shares


def share_out(values: Sequence[float], source: Sequence[int], target: Sequence[float]) -> list[float]:
    """Split values of spans over other spans of the same stretch, in proportion to their overlap.

    Args:
        values: one for each of the S source spans.
        source: where each source span ends (the first begins at 0); an empty one counts to the next that is not, at the
            end to the last that is not.
        target: where each of the T target spans ends.

    Returns:
        T values with the same sum; [] where there is no target.

    Example: values [3, 1] of spans that end at [3, 4] over spans that end at [1, 4] are [1, 3]: the first span has one
    third of the 3, the second two thirds of it and the 1.
    """
    shares = [0.0] * len(target)
    if not target:
        return shares
    final = len(target) - 1
    place, opened = 0, 0.0
    for begin, end, value in _filled(values, source):
        if begin == end:
            shares[final] += value
            continue
        while True:
            closed = float(end) if place == final else min(float(end), target[place])
            shares[place] += value * max(0.0, closed - max(begin, opened)) / (end - begin)
            if place == final or target[place] > end:
                break
            opened, place = target[place], place + 1
    return shares


def _filled(values: Sequence[float], ends: Sequence[int]) -> list[tuple[int, int, float]]:
    """Spans (begin, end, value) that are not empty; a single empty one if all are."""
    spans: list[tuple[int, int, float]] = []
    begin, waiting = 0, 0.0
    for value, end in zip(values, ends, strict=True):
        waiting += value
        if end > begin:
            spans.append((begin, end, waiting))
            begin, waiting = end, 0.0
    if not spans:
        return [(0, 0, waiting)]
    first, last, value = spans[-1]
    return [*spans[:-1], (first, last, value + waiting)]


def _ends(ids: Sequence[int], data: bytes, vocabulary: Vocabulary) -> list[float]:
    """Where each token ends in the text, in bytes."""
    lead = len(vocabulary.lead)
    ends = [float(max(0, end - lead)) for end in accumulate(len(vocabulary.spelled[index] or b"") for index in ids)]
    if vocabulary.spell(ids) == vocabulary.lead + data or not ends or not ends[-1]:
        return ends
    # A tokenizer that normalises its text spells another one: its places are stretched to the text's length.
    return [end * len(data) / ends[-1] for end in ends]
