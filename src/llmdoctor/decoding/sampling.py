"""Drawing a token as a race that its key decides.

Every token of the vocabulary has an exponential waiting time of rate p; the first to arrive is drawn, and each is with
probability p (the Gumbel-max trick: Maddison et al. 2014, arXiv 1411.0030). The noise depends on the key and the token
alone, not on p. So two distributions that are drawn from with one key give the same token wherever they are close
(communication-free coupling, Daliri et al., arXiv 2408.07978), and what a draft guessed can be checked by drawing as if
there had been none.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from llmdoctor.decoding.device import sent

_BITS = 32
_ELEMENTS_AT_ONCE = 3 << 16
"""Noise made together on a CPU: a block of this size stays in its cache."""

_COLUMNS = 256
"""Side by side at most, of which the greatest value is found before its place is."""


def sample(scores: Tensor, keys: Sequence[int], greedy: Tensor) -> Tensor:
    """One token a row: the mode where `greedy` [B], else drawn from softmax(scores).

    A row's token depends on its own scores and key only. Over random keys the distribution is exact but for the
    noise's 31 bits: the probabilities of all tokens together are off by less than V · 2⁻³¹.

    Args:
        scores: [B, V], up to a constant per row; −inf excludes a token.
        keys: B numbers of 64 bits.
        greedy: [B] bool, best on the host: asking a device for it waits.

    Returns:
        [B] token ids.
    """
    if bool(greedy.all()):
        return argmax(scores)
    words = _all_words(*scores.shape[1:], scores.device)
    first = torch.cat([argmax(block) for block in _finish(scores, keys, greedy, words)])
    return torch.where(sent(greedy, scores.device), argmax(scores), first) if bool(greedy.any()) else first


def candidates(scores: Tensor, keys: Sequence[int], greedy: Tensor, count: int, tokens: Tensor) -> Tensor:
    """The tokens that `sample` would give, the first to be expected first, if these scores are not quite the true ones.

    Args:
        scores: [B, W] of some tokens.
        keys, greedy: as there.
        count: K, at most W.
        tokens: [W] ids of the columns.

    Returns:
        [B, K] token ids.
    """
    finish = _finish(scores, keys, greedy, _words(tokens))
    return tokens[torch.cat([block.topk(count, dim=-1).indices for block in finish])]


def argmax(x: Tensor) -> Tensor:
    """[B, V] -> [B] the first place of the greatest value, or of a NaN, as torch's own."""
    columns = math.gcd(x.shape[-1], _COLUMNS)
    if not x.is_cpu or columns == 1:
        return x.argmax(-1)
    # A CPU finds the greatest value many times as fast as its place (torch 2.13).
    blocks = x.unflatten(-1, (-1, columns))
    which = blocks.amax(-1).argmax(-1)
    return which * columns + blocks[torch.arange(len(x)), which].argmax(-1)


def _finish(scores: Tensor, keys: Sequence[int], greedy: Tensor, words: Tensor) -> Iterator[Tensor]:
    """[B, V] what is greater for tokens that arrive earlier: p over the waiting time, p itself where greedy.

    Some rows after the others: on a CPU no more than stay in its cache until they have been looked at.
    """
    rows = len(scores) if scores.device.type != "cpu" else max(1, _ELEMENTS_AT_ONCE // scores.shape[-1])
    for start in range(0, len(scores), rows):
        block = slice(start, start + rows)
        masses = (scores[block] - scores[block].amax(-1, keepdim=True)).exp_()
        times = waiting_times(keys[block], words)
        if bool(greedy[block].any()):
            times.masked_fill_(sent(greedy[block, None], times.device), 1.0)
        yield masses.div_(times)


def waiting_times(keys: Sequence[int], words: Tensor) -> Tensor:
    """[B, V] exponential waiting times of rate 1, each decided by its row's key and its token's word [V] int32.

    They are the same on any device, up to the rounding of the logarithm.

    −log(1 − u) for u = (|x| + ½) 2⁻³¹, x a hash of 32 bits: so near 0, where races are won, they are finest.
    """
    # Signed, because torch has no unsigned products; they wrap around as those would.
    signed = [[_signed((key << 1 | 1) & 0xFFFFFFFF), _signed(key >> 32)] for key in keys]
    factor, shift = sent(signed, words.device, torch.int32)[:, :, None].unbind(1)
    # On a CPU quicker than one `addcmul`.
    x = _mix((factor * words).add_(shift)).float().abs_()
    # u is below 1 by more than float32 rounds up.
    return x.add_(0.5).mul_(-(2.0**-31) * (1 - 2.0**-22)).log1p_().neg_()


def _words(tokens: Tensor) -> Tensor:
    """[V] ids -> [V] int32, a word of its own for each token: two with the same one would share their luck for ever."""
    return _mix(tokens.to(torch.int32) + 1)


@lru_cache(maxsize=8)
def _all_words(width: int, device: torch.device) -> Tensor:
    return _words(torch.arange(width, device=device))


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32 bits under which close inputs have unrelated outputs (lowbias32, C. Wellons 2018); in place."""
    y = torch.empty_like(x)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, None)):
        torch.bitwise_right_shift(x, shift, out=y)
        # The shift copies the sign; a logical one brings in zeros.
        x.bitwise_xor_(y.bitwise_and_((1 << (_BITS - shift)) - 1))
        if factor is not None:
            x.mul_(_signed(factor))
    return x


def _signed(word: int) -> int:
    return word - (1 << _BITS) if word >> (_BITS - 1) else word
