"""Preferences read out of the patient's own states, linearly: a judge of answers that costs seconds to fit.

    R(x, y) = mean over the tokens of y of  Σ_k w_k · h_k(s_t)

h_k is what the frozen patient's k-th layer says after the token, w_k has one weight a dimension. Pairs fit each layer
by itself in the Bradley-Terry model, P(y⁺ above y⁻) = σ(R(x, y⁺) − R(x, y⁻)), with a ridge on standardised states, the
one with the lowest loss on pairs left out, all of a prompt at once. The layers err in different ways, so their
judgements, each divided by its spread over pairs left out, are added up, and the sum is scaled to be as sure as pairs
left out allow. So R is in nats of the Bradley-Terry model; a token's part of it is a dense token reward.

Sources: Bradley & Terry (1952); Alain & Bengio, "Understanding intermediate layers using linear classifier probes"
(arXiv 1610.01644). That the patient's states judge as well as a reward model trained on the same pairs is measured in
docs/research/2026-11-25-readout.md.
Shapes: N pairs, L completion tokens, D hidden size, K layers read (0 is the embeddings).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import softplus

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.data.preferences import PreferencePair
from llmdoctor.errors import FingerprintMismatch, UserError
from llmdoctor.files import atomic_folder, write_json
from llmdoctor.models.context import context_of
from llmdoctor.models.loading import LoadedModel
from llmdoctor.models.logps import position_ids
from llmdoctor.rewards.intake import checked, named

SCHEMA_VERSION = 2
CONFIG_NAME = "readout.json"
WEIGHTS_NAME = "readout.safetensors"
BATCH_TOKENS = 8192
"""Tokens (padding included) read at once."""

DEPTHS = (1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6)
"""Where layers are read: from where words have a meaning to where the next token is not yet all that counts."""

RIDGES = (10.0, 1.0, 0.1, 0.01, 0.001)
"""Tried from the strongest on; relative to the mean square of a standardised state, so the width does not matter."""

IdPair = tuple[list[int], list[int], list[int]]
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ReadoutFit:
    """How a read-out came about.

    Attributes:
        layers: those that are read.
        ridges: of each layer, the weight of |w_k|² in standardised coordinates.
        pairs: N.
        loss: Bradley-Terry loss in nats on pairs left out of the fit (log 2 knows nothing).
        accuracy: share of left-out pairs whose preferred answer scores higher.
    """

    layers: tuple[int, ...]
    ridges: tuple[float, ...]
    pairs: int
    loss: float
    accuracy: float


class Readout:
    """Scores answers, and each of their tokens, by the frozen patient's states.

    Args:
        patient: the model; it is only read.
        weights: [K, D] of each layer, float64.
        fit: what it was fitted with.
    """

    def __init__(self, patient: LoadedModel, weights: Tensor, fit: ReadoutFit) -> None:
        self.patient = patient
        self.weights = weights
        self.fit = fit
        self.encoder = ChatEncoder.for_model(patient.model, patient.tokenizer)

    def score(
        self, prompts: Sequence[Messages], texts: Sequence[str], *, complete: bool | Sequence[bool] = False
    ) -> list[float]:
        """R of each answer, up to a constant of its prompt.

        Args:
            prompts: conversations, each ending with a user turn.
            texts: an answer to each.
            complete: whether the answers end there (then the end-of-turn token is read as well), for all or for each.

        Raises:
            UserError: an answer that does not fit into the patient's context.
        """
        rows = self.encoder.answered(prompts, texts, complete)
        return [float((states * self.weights).sum()) for states in _pooled(self.patient, rows, self.fit.layers)]

    def token_rewards(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> list[Tensor]:
        """Each token's part of R: float64 tensors [L] that sum to the answer's score.

        Args:
            prompts: ids of each prompt.
            completions: ids of each answer, none empty.
        """
        rows = list(zip(prompts, completions, strict=True))
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        for places, states, mask in _read(self.patient, rows, self.fit.layers):
            rewards = torch.zeros(mask.shape, dtype=torch.float64)
            for layer, weights in zip(states, self.weights, strict=True):
                # Where the layer lies, in float64 if that can be.
                there = weights.to(layer.device, torch.float32 if layer.device.type == "mps" else torch.float64)
                rewards += (layer.to(there.dtype) @ there).cpu()
            rewards /= mask.sum(-1, keepdim=True).cpu()
            for place, row in zip(places, rewards, strict=True):
                found[place] = row[: len(rows[place][1])].clone()
        return found

    def save_pretrained(self, path: str | Path) -> None:
        """Write the read-out as a folder that appears whole or not at all; the patient is not part of it."""
        with atomic_folder(Path(path)) as folder:
            save_file({"weights": self.weights}, folder / WEIGHTS_NAME)
            record = {
                "schema_version": SCHEMA_VERSION,
                "patient": self.patient.spec,
                "patient_fingerprint": _relevant(self.patient.fingerprint),
                "fit": asdict(self.fit),
            }
            write_json(folder / CONFIG_NAME, record)

    @classmethod
    def from_pretrained(cls, path: str | Path, patient: LoadedModel) -> Readout:
        """Read what `save_pretrained` wrote.

        Raises:
            UserError: no read-out there, or one of another schema.
            FingerprintMismatch: it was fitted on another patient.
        """
        folder = Path(path)
        record = read_record(folder)
        stored, current = record["patient_fingerprint"], _relevant(patient.fingerprint)
        if stored != current:
            raise FingerprintMismatch(str(folder), stored, current, "Fit a read-out on this patient.")
        fit = ReadoutFit(**record["fit"])
        fit = replace(fit, layers=tuple(fit.layers), ridges=tuple(fit.ridges))
        try:
            weights = load_file(folder / WEIGHTS_NAME)["weights"]
        except (OSError, KeyError, SafetensorError) as error:
            raise UserError(f"{folder / WEIGHTS_NAME} cannot be read ({error}); fit the read-out anew") from error
        return cls(patient, weights, fit)


def read_record(folder: Path) -> dict[str, Any]:
    """What the `readout.json` in a read-out's folder says; UserError where there is none, or one that is broken."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{folder} is not a read-out: it has no {CONFIG_NAME} (fit one with `llmdoctor readout`)")
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    schema = record.get("schema_version") if isinstance(record, dict) else None
    if schema != SCHEMA_VERSION:
        raise UserError(f"{path} has schema version {schema}, this version of llmdoctor reads {SCHEMA_VERSION}")
    if missing := {"patient_fingerprint", "fit"} - set(record):
        raise UserError(f"{path} lacks the fields: {', '.join(sorted(missing))}; fit the read-out anew")
    return record


def fit_readout(
    patient: LoadedModel,
    pairs: Iterable[PreferencePair],
    *,
    layers: Sequence[int] | None = None,
    ridges: Sequence[float] = RIDGES,
    folds: int = 5,
    max_completion_length: int | None = 512,
    progress: Callable[[int], None] | None = None,
) -> Readout:
    """Fit a read-out to preference pairs.

    Args:
        patient: the frozen model.
        pairs: at least two a fold.
        layers: which are read, 0 … the number of layers; those at `DEPTHS` if None.
        ridges: candidates for each layer's ridge.
        folds: pairs are left out in so many parts, those of the i-th prompt in part i mod `folds` (of fewer prompts
            than parts, the i-th pair).
        max_completion_length: answers are read so far; None reads all.
        progress: called with the number of pairs read.

    Raises:
        UserError: too few pairs or several dimensions of them, a layer that the patient does not have, or a pair that
            does not fit its context or that its chat template refuses.
    """
    encoder = ChatEncoder.for_model(patient.model, patient.tokenizer)
    rows: list[IdPair] = []
    for number, pair in enumerate(checked(pairs), 1):
        sides = ((pair.chosen, pair.chosen_complete), (pair.rejected, pair.rejected_complete))
        try:
            chosen, rejected = (encoder.completion(text, whole, max_completion_length).ids for text, whole in sides)
            rows.append((encoder.prompt_ids(pair.prompt), chosen, rejected))
        except UserError as error:
            raise UserError(f"{named(number, pair)}: {error}; mend it or take it out of the data") from error
    return fit_readout_to_ids(patient, rows, layers=layers, ridges=ridges, folds=folds, progress=progress)


def fit_readout_to_ids(
    patient: LoadedModel,
    pairs: Sequence[IdPair],
    *,
    layers: Sequence[int] | None = None,
    ridges: Sequence[float] = RIDGES,
    folds: int = 5,
    progress: Callable[[int], None] | None = None,
) -> Readout:
    """`fit_readout` for pairs in the patient's ids: prompt, preferred answer, other answer."""
    for number, (prompt, *answers) in enumerate(pairs, 1):
        _need_room(patient, f"pair {number}", len(prompt) + max(map(len, answers)))
    rows = [(prompt, answer) for prompt, *answers in pairs for answer in answers]
    count = len(pairs)
    check_folds(folds, count)
    depth = int(patient.model.config.get_text_config().num_hidden_layers)
    tried = sorted(set(layers if layers is not None else (round(depth * share) for share in DEPTHS)))
    if not tried or not ridges or tried[0] < 0 or tried[-1] > depth:
        raise UserError(f"layers must lie in 0 … {depth} and ridges must not be empty, got {tried} and {list(ridges)}")
    pooled = _pooled(patient, rows, tried, progress)
    parts = parts_of([prompt for prompt, *_ in pairs], folds)
    found: list[Tensor] = []
    chosen: list[float] = []
    together = torch.zeros(count, dtype=torch.float64)
    for place in range(len(tried)):
        gaps = torch.stack([pooled[2 * i][place] - pooled[2 * i + 1][place] for i in range(count)])
        # Two layers with like states, or a dead dimension: no division by nothing.
        scale = gaps.square().mean(0).sqrt().clamp(min=1e-6 * float(gaps.abs().max().clamp(min=1e-30)))
        scale = scale * gaps.shape[1] ** 0.5
        margins = left_out_margins(gaps / scale, ridges, parts)
        best = min(range(len(ridges)), key=lambda index: float(softplus(-margins[index]).mean()))
        spread = float(margins[best].square().mean().sqrt()) or 1.0
        found.append(fit_bradley_terry(gaps / scale, [ridges[best]])[0] / scale / spread)
        chosen.append(float(ridges[best]))
        together += margins[best] / spread
    sure = calibration(together)
    margins_of_all = together * sure
    accuracy = float((margins_of_all > 0).double().mean() + 0.5 * (margins_of_all == 0).double().mean())
    loss = float(softplus(-margins_of_all).mean())
    fit = ReadoutFit(tuple(tried), tuple(chosen), count, loss, accuracy)
    return Readout(patient, torch.stack(found) * sure, fit)


def check_folds(folds: int, pairs: int) -> None:
    """UserError where so many pairs cannot be left out in so many parts."""
    if folds < 2 or pairs < 2 * folds:
        raise UserError(f"a read-out with {folds} folds needs at least 2 folds and 2 pairs in each, got {pairs} pairs")


def calibration(margins: Tensor) -> float:
    """a ≥ 0 with the lowest Σ_i log(1 + exp(−a · margin_i)).

    N pairs without a mistake would ask for a → ∞, but are no more than that: where the mistakes do not add up to one
    of mean size, what is missing counts as told wrongly. So a judge without any claims some log N nats.

    Args:
        margins: [N] float64.
    """
    size = float(margins.abs().mean())
    if size == 0:
        return 1.0
    missing = max(0.0, 1 + float(margins.clamp(max=0).sum()) / size)
    low, high = 0.0, 100 / size
    # The slope grows with a, so its zero is found by halving.
    for _ in range(60):
        middle = (low + high) / 2
        doubt = missing * size / (1 + math.exp(-middle * size))
        if float((margins * torch.sigmoid(-middle * margins)).sum()) > doubt:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def parts_of(prompts: Sequence[Sequence[int]], folds: int) -> Tensor:
    """In which of `folds` parts each pair is left out, [N]: with those that it shares its prompt with.

    Pairs of one prompt may share their answers, and would tell what they are asked about.
    """
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    if len(numbers) < folds:
        return torch.arange(len(prompts)) % folds
    return torch.tensor([numbers[tuple(prompt)] % folds for prompt in prompts])


def left_out_margins(gaps: Tensor, ridges: Sequence[float], parts: Tensor) -> list[Tensor]:
    """For each ridge, the margin [N] of every pair under weights that were fitted without its part."""
    found = [gaps.new_zeros(len(gaps)) for _ in ridges]
    for part in parts.unique():
        out = parts == part
        for margins, weights in zip(found, fit_bradley_terry(gaps[~out], ridges), strict=True):
            margins[out] = gaps[out] @ weights
    return found


def fit_bradley_terry(gaps: Tensor, ridges: Sequence[float]) -> list[Tensor]:
    """argmin_w Σ_i log(1 + exp(−w · gap_i)) + ridge/2 · |w|², for each ridge, by Newton's method.

    Of few pairs in the dual, with w = Σ_i a_i gap_i and ridge · a_i = σ(−w · gap_i): N unknowns however wide the states
    are. Of many for w itself: D unknowns however many the pairs are.

    Args:
        gaps: [N, D] float64, preferred minus other.
        ridges: positive.

    Returns:
        [D] weights for each ridge.
    """
    count, width = gaps.shape
    few = count <= width
    gram = gaps @ gaps.T if few else gaps
    eye = torch.eye(min(count, width), dtype=gaps.dtype)

    def condition(unknowns: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        odds = torch.sigmoid(-gram @ unknowns)
        return ridge * unknowns - (odds if few else gaps.T @ odds), odds

    unknowns = gaps.new_zeros(len(eye))
    found = []
    for ridge in ridges:
        for _ in range(100):
            residual, odds = condition(unknowns, ridge)
            if float(residual.abs().max()) < 1e-9:
                break
            curved = (odds * (1 - odds))[:, None] * gram
            step = torch.linalg.solve(ridge * eye + (curved if few else gaps.T @ curved), residual)
            # Far from the optimum a whole step may overshoot.
            size = 1.0
            while size > 1e-3 and float(condition(unknowns - size * step, ridge)[0].norm()) > float(residual.norm()):
                size /= 2
            unknowns = unknowns - size * step
        found.append(gaps.T @ unknowns if few else unknowns)
    return found


def _pooled(
    patient: LoadedModel,
    rows: Sequence[tuple[list[int], list[int]]],
    layers: Sequence[int],
    progress: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """For each prompt and answer the mean state over the answer's tokens, [K, D] float64."""
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    read = reported = 0
    for places, states, mask in _read(patient, rows, layers):
        weight = (mask / mask.sum(-1, keepdim=True))[:, :, None]
        # Layers need not all lie on one device.
        means = [(layer.float() * weight.to(layer.device)).sum(1).cpu().double() for layer in states]
        for place, row in zip(places, torch.stack(means, dim=1), strict=True):
            found[place] = row
        read += len(places)
        if progress and read // 2 > reported:
            progress(read // 2 - reported)
            reported = read // 2
    return found


def _read(patient: LoadedModel, rows: Sequence[tuple[list[int], list[int]]], layers: Sequence[int]) -> Iterator[Any]:
    """Yields places of rows, their states [B, L, D] at each layer, and the mask [B, L] of the answers' tokens.

    An answer without tokens is read at its prompt's last one.
    """
    for number, (prompt, answer) in enumerate(rows, 1):
        _need_room(patient, f"answer {number}", len(prompt) + len(answer))
    decoder, device = patient.model.get_decoder(), patient.model.get_input_embeddings().weight.device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    while order:
        places = [order.pop()]
        columns = len(rows[places[0]][0]) + len(rows[places[0]][1])
        while order and (len(places) + 1) * columns <= BATCH_TOKENS:
            places.append(order.pop())
        length = max(1, *(len(rows[place][1]) for place in places))
        # Padding stands behind all that is read: recurrent models take no notice of a mask.
        ids = torch.zeros(len(places), columns, dtype=torch.long)
        seen = torch.zeros(len(places), columns, dtype=torch.long)
        first = torch.zeros(len(places), dtype=torch.long)
        mask = torch.zeros(len(places), length)
        for row, place in enumerate(places):
            prompt, answer = rows[place]
            whole = [*prompt, *answer]
            ids[row, : len(whole)] = torch.tensor(whole)
            seen[row, : len(whole)] = 1
            # Where the answer has no tokens, its prompt's last one stands for it.
            first[row] = len(prompt) - (not answer)
            mask[row, : len(answer) or 1] = 1
        at = (first[:, None] + torch.arange(length)).clamp(max=columns - 1)
        ids, seen, mask = ids.to(device), seen.to(device), mask.to(device)
        with torch.inference_mode():
            inputs = {"input_ids": ids, "attention_mask": seen, "position_ids": position_ids(seen), "use_cache": False}
            states = _states(decoder, patient.model.config, inputs, layers)
            yield places, [layer[torch.arange(len(places))[:, None], at] for layer in states], mask


def _need_room(patient: LoadedModel, name: str, tokens: int) -> None:
    context = context_of(patient.model)
    if tokens > context:
        raise UserError(
            f"{name} has {tokens} tokens with its prompt, more than the context of {context} of {patient.spec}; "
            "shorten it or take it out of the data"
        )


class _Enough(Exception):
    """Raised inside a forward pass when all that is wanted of it is there."""


def _states(decoder: Any, config: Any, inputs: dict[str, Any], layers: Sequence[int]) -> list[Tensor]:
    """What layers 1 … k of the decoder make of the inputs, [B, T, D] for each k; no layer above the last runs."""
    depth = int(config.get_text_config().num_hidden_layers)
    blocks = next((m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == depth), None)
    if blocks is None:
        raise UserError(f"{type(decoder).__name__} has no list of {depth} layers, so its states cannot be read")
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[layer] = args[0] if args else kwargs["hidden_states"]
            if len(found) == len(set(layers)):
                raise _Enough

        return hook

    # What layer k made is what the next one reads. The topmost is read at the end, normed as the head sees it.
    hooks = [blocks[k].register_forward_pre_hook(keep(k), with_kwargs=True) for k in set(layers) if k < depth]
    try:
        found[depth] = decoder(**inputs).last_hidden_state
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return [found[layer] for layer in layers]


def _relevant(fingerprint: Mapping[str, str]) -> dict[str, str]:
    """What decides a patient's states, up to rounding."""
    return {name: fingerprint[name] for name in ("model", "tokenizer", "template") if name in fingerprint}
