"""Stage 1: preference pairs to token rewards on disk, batched, sharded and resumable.

The patient's log-likelihoods under both faces are computed shard by shard; a shard is a file that appears whole or not
at all and remembers the pairs it was made of. Rewards are a cheap function of them, computed at the end, so another θ
costs seconds.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from llmdoctor.data.chat import ChatEncoder, Completion
from llmdoctor.data.preferences import PreferencePair
from llmdoctor.errors import FingerprintMismatch, Settings, UserError
from llmdoctor.files import atomic_path, digest, write_json
from llmdoctor.models.context import context_of
from llmdoctor.models.loading import LoadedModel
from llmdoctor.models.logps import LogitsHead
from llmdoctor.rewards.face_scorer import FaceScorer
from llmdoctor.rewards.faces import NO_FACES, FacePair
from llmdoctor.rewards.intake import checked, named
from llmdoctor.rewards.scoring import density_threshold, token_importance, token_rewards
from llmdoctor.rewards.store import (
    LOGPS_SCHEMA,
    MANIFEST_NAME,
    REWARDS_NAME,
    REWARDS_SCHEMA,
    SCHEMA_VERSION,
    SIDES,
    RewardStore,
    read_manifest,
    readable,
)

LOGPS_FOLDER = "logps"
TOO_LONG, REFUSED, SAME = "too long", "refused", "with equal responses"
"""Why a pair was left out."""

_ANEW = "Delete that file and give the same command again: its pairs are scored anew."

Progress = Callable[[int], None]
"""Called with the number of pairs that were just finished."""


@dataclass(frozen=True)
class ScoringOptions:
    """How pairs become log-likelihoods. A change of any of these needs the patient again.

    Attributes:
        max_prompt_length: longest prompt in tokens, under either face or as it stands; None is the patient's context.
        max_completion_length: longer responses are cut there and lose their terminal state; None cuts nothing.
        too_long: what to do with a prompt that does not fit: "error" or "skip" (counted).
        batch_tokens: padded completion and prompt tokens in one forward pass; bounds memory, and changes nothing else
            but rounding, so that a run may go on with less.
        shard_size: pairs a file; what a kill can cost at most.
    """

    max_prompt_length: int | None = None
    max_completion_length: int | None = 512
    too_long: str = "error"
    batch_tokens: int = 8192
    shard_size: int = 128

    def __post_init__(self) -> None:
        if self.too_long not in ("error", "skip"):
            raise UserError(f"too_long must be 'error' or 'skip', got {self.too_long!r}")
        for name in ("max_prompt_length", "max_completion_length", "batch_tokens", "shard_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class RewardOptions:
    """How log-likelihoods become rewards (docs/concepts.md). Cheap to change.

    Attributes:
        tau: squashing temperature τ.
        theta: sparsity threshold θ on the importance S_t; 0 keeps every token. Ignored where `density` is given.
        density: keep this share of the most important tokens instead, in (0, 1].
        density_over: "response" (its top share in each response) or "dataset" (one θ for all).
        signed: keep a token only where the face that likes it agrees with the label.
    """

    tau: float = 1.0
    theta: float = 0.5
    density: float | None = None
    density_over: str = "response"
    signed: bool = True

    def __post_init__(self) -> None:
        if self.tau <= 0:
            raise UserError(f"tau must be positive, got {self.tau}")
        if not 0 <= self.theta < 1:
            raise UserError(f"theta must lie in [0, 1), since importance does, got {self.theta}")
        if self.density is not None and not 0 < self.density <= 1:
            raise UserError(f"density must lie in (0, 1], got {self.density}")
        if self.density_over not in ("response", "dataset"):
            raise UserError(f"density_over must be 'response' or 'dataset', got {self.density_over!r}")


def acquire_rewards(
    patient: LoadedModel,
    pairs: Iterable[PreferencePair],
    output: str | Path,
    *,
    faces: FacePair | None,
    scoring: ScoringOptions | None = None,
    rewards: RewardOptions | None = None,
    rescore: bool = False,
    on_bad: str = "error",
    progress: Progress | None = None,
) -> RewardStore:
    """Compute token rewards of `pairs` into the folder `output`, going on where an earlier run stopped.

    Args:
        patient: the frozen model; its weights are only read.
        pairs: in a fixed order; iterated once, never held in memory as a whole.
        output: folder to write (see `store` for what it holds).
        faces: the two system prompts. None only makes tokens of the pairs, which reads nothing: all rewards are zero,
            and a doctor can learn the pairs' labels, and rounds of a read-out, as `train_doctor` does by default.
        scoring, rewards: options; their defaults if None.
        rescore: allow other reward options than a finished run in `output` had.
        on_bad: what to do with a pair that is no text to the patient, such as a conversation that the chat template
            refuses: "error" or "skip" (counted).
        progress: called with the number of pairs finished.

    Raises:
        FingerprintMismatch: `output` was made from another patient, data, faces or options.
        UserError: no pairs, pairs of several dimensions, or one that does not fit the patient's context or is refused.
    """
    if on_bad not in ("error", "skip"):
        raise UserError(f"on_bad must be 'error' or 'skip', got {on_bad!r}")
    faces = NO_FACES if faces is None else faces
    if not isinstance(faces, FacePair):
        raise UserError(f"faces must be one pair of faces, such as face_pairs('positive')[0], got {faces!r:.80}")
    folder, scoring, rewards = Path(output), scoring or ScoringOptions(), rewards or RewardOptions()
    encoder = ChatEncoder.for_model(patient.model, patient.tokenizer)
    manifest = _prepare_manifest(folder, patient, encoder, faces, scoring, rewards, rescore)
    writer = _ShardWriter(folder, patient, encoder, faces, scoring, on_bad)
    stored_data = manifest["fingerprint"].get("data")
    shards: list[str] = []
    for index, block in enumerate(_blocks(pairs, scoring.shard_size)):
        if stored_data and index >= manifest["shards"]:
            raise _other_data(folder, stored_data, "more pairs")
        shards.append(writer.ensure(index, block, progress or (lambda pairs: None)))
    if not shards:
        raise UserError("there are no preference pairs to score")
    data = digest(shards)
    if stored_data not in (None, data):
        raise _other_data(folder, stored_data, data)
    if not manifest["complete"]:
        # Not before the pairs are known to be those of the folder: a finished one stays what it is.
        write_json(folder / MANIFEST_NAME, manifest)
    statistics = _finish_rewards(folder, len(shards), rewards, writer.skipped)
    manifest["fingerprint"]["data"] = data
    manifest.update(statistics, shards=len(shards), complete=True, cut=writer.cut)
    manifest.update(skipped=writer.skipped.total(), skipped_for=dict(sorted(writer.skipped.items())))
    write_json(folder / MANIFEST_NAME, manifest)
    return RewardStore.open(folder)


_FIX = "Give another output folder, or delete this one to start anew."


def _other_data(folder: Path, stored: str, current: str) -> FingerprintMismatch:
    return FingerprintMismatch(str(folder), {"data": stored}, {"data": current}, _FIX)


def _prepare_manifest(
    folder: Path,
    patient: LoadedModel,
    encoder: ChatEncoder,
    faces: FacePair,
    scoring: ScoringOptions,
    rewards: RewardOptions,
    rescore: bool,
) -> dict[str, Any]:
    fingerprint = {**patient.fingerprint, "template": encoder.fingerprint(), **_fingerprint(faces, scoring)}
    stored = read_manifest(folder)
    # Where nothing was scored yet, nothing is lost: options that let nothing through may be mended.
    if stored is not None and not stored.get("complete") and not _any_scored(folder):
        shutil.rmtree(folder / LOGPS_FOLDER, ignore_errors=True)
        stored = None
    if stored is not None:
        _compare(folder, stored, fingerprint, faces, scoring, rewards, rescore)
        if stored["reward_options"] == asdict(rewards):
            return stored
        return {**stored, "reward_options": asdict(rewards), "complete": False}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "patient": patient.spec,
        "fingerprint": fingerprint,
        "faces": asdict(faces),
        "scoring_options": asdict(scoring),
        "reward_options": asdict(rewards),
        "versions": {name: version(name) for name in ("llmdoctor", "torch", "transformers")},
        "complete": False,
    }
    write_json(folder / MANIFEST_NAME, manifest)
    return manifest


def check_settings(
    folder: Path, faces: FacePair, scoring: ScoringOptions, rewards: RewardOptions, rescore: bool = False
) -> None:
    """FingerprintMismatch as `acquire_rewards`, by what is known before a patient is loaded."""
    stored = read_manifest(folder)
    if stored is not None and (stored.get("complete") or _any_scored(folder)):
        _compare(folder, stored, _fingerprint(faces, scoring), faces, scoring, rewards, rescore)


def _fingerprint(faces: FacePair, scoring: ScoringOptions) -> dict[str, str]:
    """Of all but the patient and the pairs."""
    return {
        "faces": faces.fingerprint(),
        # As by default, whatever it is: what was made by default is still what it was.
        "scoring": digest({**asdict(scoring), "batch_tokens": ScoringOptions.batch_tokens}),
    }


def _compare(
    folder: Path,
    stored: dict[str, Any],
    fingerprint: dict[str, str],
    faces: FacePair,
    scoring: ScoringOptions,
    rewards: RewardOptions,
    rescore: bool,
) -> None:
    """FingerprintMismatch where the manifest `stored` is of other inputs, as far as `fingerprint` goes."""
    before = {key: value for key, value in stored["fingerprint"].items() if key in fingerprint}
    if before != fingerprint:
        was = _settings(stored["faces"], stored["scoring_options"])
        now = _settings(asdict(faces), asdict(scoring))
        raise FingerprintMismatch(str(folder), before, fingerprint, _FIX, was, now)
    if stored["reward_options"] != asdict(rewards) and not rescore:
        raise FingerprintMismatch(
            str(folder),
            {key: str(value) for key, value in stored["reward_options"].items()},
            {key: str(value) for key, value in asdict(rewards).items()},
            "Ask for `rescore` (--rescore) to recompute the rewards from the stored log-likelihoods (seconds), "
            "or give another output folder.",
        )


def _settings(faces: dict[str, Any], scoring: dict[str, Any]) -> Settings:
    """What stands behind the fingerprints of faces and scoring; not their whole texts."""
    decisive = {name: value for name, value in scoring.items() if name != "batch_tokens"}
    return {"faces": {"faces": faces["name"]}, "scoring": decisive}


def _any_scored(folder: Path) -> bool:
    return any(_rows_in(path) for path in (folder / LOGPS_FOLDER).glob("*.parquet"))


def _rows_in(path: Path) -> int:
    with readable(path, _ANEW):
        return int(pq.read_metadata(path).num_rows)


def _read_shard(path: Path) -> pa.Table:
    with readable(path, _ANEW):
        return pq.read_table(path, schema=LOGPS_SCHEMA)


@dataclass
class _Encoded:
    """One pair as ids, under both faces."""

    index: int
    pair: PreferencePair
    prompts: tuple[list[int], list[int]]
    sides: tuple[Completion, Completion]
    cut: int

    @property
    def length(self) -> int:
        return max(map(len, self.prompts)) + 2 * max(len(side.ids) for side in self.sides)


class _ShardWriter:
    """Makes one shard's file, or finds that it stands and was made of the same pairs."""

    def __init__(
        self,
        folder: Path,
        patient: LoadedModel,
        encoder: ChatEncoder,
        faces: FacePair,
        options: ScoringOptions,
        on_bad: str,
    ) -> None:
        self.folder = folder / LOGPS_FOLDER
        self.encoder = encoder
        self.options = options
        self.on_bad = on_bad
        self.skipped: Counter[str] = Counter()
        self.cut = 0
        self.patient = patient
        self.faces = faces
        self._scorers: tuple[FaceScorer, FaceScorer] | None = None
        self.context = context_of(patient.model)

    def ensure(self, index: int, block: Sequence[tuple[int, PreferencePair]], progress: Progress) -> str:
        """Make sure that the shard of `block` is on disk; returns the fingerprint of its pairs."""
        path = self.folder / f"{index:05d}.parquet"
        made_of = digest([_identity(pair) for _, pair in block])
        if path.is_file():
            with readable(path, _ANEW):
                metadata = pq.read_schema(path).metadata or {}
            stored = metadata.get(b"made_of", b"").decode()
            if stored != made_of:
                others = f"Pairs {block[0][0] + 1} to {block[-1][0] + 1} are others (data, order, dimension or limit)"
                fix = f"{others}. {_FIX}"
                raise FingerprintMismatch(str(self.folder.parent), {"pairs": stored}, {"pairs": made_of}, fix)
            self._count_stored(block, metadata)
            progress(len(block))
            return made_of
        found = [self._encode(number, pair) for number, pair in block]
        encoded = [item for item in found if isinstance(item, _Encoded)]
        skipped = Counter(item for item in found if isinstance(item, str))
        if skipped:
            progress(skipped.total())
        rows = self._score(encoded, progress)
        cut = sum(item.cut for item in encoded)
        self.skipped += skipped
        self.cut += cut
        table = pa.Table.from_pylist(rows, schema=LOGPS_SCHEMA).replace_schema_metadata(
            {"made_of": made_of, "skipped": json.dumps(skipped), "cut": str(cut)}
        )
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary)
        return made_of

    def _count_stored(self, block: Sequence[tuple[int, PreferencePair]], metadata: dict[bytes, bytes]) -> None:
        """Count what the shard of `block`, which stands, has left out and cut."""
        skipped = json.loads(metadata.get(b"skipped", b"0"))
        # Earlier versions left out nothing but what was too long, and did not say what they cut.
        self.skipped.update(skipped if isinstance(skipped, dict) else {TOO_LONG: skipped} if skipped else {})
        self.cut += int(metadata[b"cut"]) if b"cut" in metadata else sum(self._sides(pair)[1] for _, pair in block)

    def _encode(self, number: int, pair: PreferencePair) -> _Encoded | str:
        """The pair as ids, or why it is left out."""
        messages = list(pair.prompt)
        try:
            # A doctor reads the prompt as it stands, whose own system turn a face replaces.
            prompts = [self.encoder.prompt_ids(messages, system) for system in (*self._texts, None)]
            sides, cut = self._sides(pair)
        except UserError as error:
            if self.on_bad == "skip":
                return REFUSED
            raise UserError(
                f"{named(number + 1, pair)}: {error}; mend it or take it out of the data, or set on_bad to 'skip' "
                "(--on-bad skip) to leave such pairs out"
            ) from error
        if too_long := self._too_long(prompts, sides):
            if self.options.too_long == "skip":
                return TOO_LONG
            raise UserError(
                f"{named(number + 1, pair)} has {too_long}; shorten it or take it out of the data, or set too_long "
                "to 'skip' to leave such pairs out"
            )
        if not all(side.ids for side in sides):
            raise UserError(f"pair {number + 1} has an empty response that is not complete; there is nothing to score")
        # It prefers nothing, and its tokens would be praised and blamed at once.
        if sides[0].ids == sides[1].ids:
            return SAME
        return _Encoded(number, pair, (prompts[0], prompts[1]), sides, cut)

    @property
    def _texts(self) -> tuple[str | None, str | None]:
        return self.faces.positive or None, self.faces.negative or None

    def _sides(self, pair: PreferencePair) -> tuple[tuple[Completion, Completion], int]:
        """Both responses, and how many of them were cut."""
        chosen = self.encoder.completion(pair.chosen, pair.chosen_complete)
        rejected = self.encoder.completion(pair.rejected, pair.rejected_complete)
        most = self.options.max_completion_length
        long = [most is not None and len(side.ids) > most for side in (chosen, rejected)]
        chosen, rejected = (
            Completion(side.ids[:most], terminal=False) if cut else side
            for side, cut in zip((chosen, rejected), long, strict=True)
        )
        return (chosen, rejected), sum(long)

    def _too_long(self, prompts: Sequence[list[int]], sides: tuple[Completion, Completion]) -> str:
        """What does not fit, "" if all does; `prompts` are those under both faces and the pair's own."""
        longest = max(map(len, prompts))
        limit = self.options.max_prompt_length or self.context
        total = longest + max(len(side.ids) for side in sides)
        own = ", with its own system prompt" if longest > max(map(len, prompts[:2])) else ""
        if longest > limit:
            return f"a prompt of {longest} tokens{own}, more than {limit}"
        if total > self.context:
            return f"prompt and response of {total} tokens{own}, more than the patient's context of {self.context}"
        return ""

    def _score(self, items: list[_Encoded], progress: Progress) -> list[dict[str, Any]]:
        if items and self._scorers is None and self.faces != NO_FACES:
            head = LogitsHead.for_model(self.patient.model)
            positive, negative = (FaceScorer(self.patient.model, self.encoder, head, text) for text in self._texts)
            self._scorers = (positive, negative)
        rows: dict[int, dict[str, Any]] = {}
        for batch in _length_batches(items, self.options.batch_tokens):
            completions = [(item.sides[0].ids, item.sides[1].ids) for item in batch]
            scored = [
                scorer.score([item.prompts[face] for item in batch], completions)
                for face, scorer in enumerate(self._scorers or ())
            ] or [[torch.zeros(len(ids)) for pair in completions for ids in pair]] * 2
            for place, item in enumerate(batch):
                row: dict[str, Any] = {
                    "index": item.index,
                    "prompt": json.dumps(list(item.pair.prompt), ensure_ascii=False),
                    "dimension": item.pair.dimension,
                }
                for number, side in enumerate(SIDES):
                    if not all(face[2 * place + number].isfinite().all() for face in scored):
                        raise UserError(
                            f"the patient's log-likelihoods of pair {item.index + 1} are not finite: it may overflow "
                            "in this dtype; try --dtype bfloat16 or float32"
                        )
                    completion = item.sides[number]
                    row[f"{side}_ids"] = completion.ids
                    row[f"{side}_tokens"] = self.encoder.token_texts(completion.ids)
                    row[f"{side}_pos_logps"] = scored[0][2 * place + number].numpy()
                    row[f"{side}_neg_logps"] = scored[1][2 * place + number].numpy()
                    row[f"{side}_terminal"] = completion.terminal
                rows[item.index] = row
            progress(len(batch))
        return [rows[item.index] for item in items]


def _finish_rewards(folder: Path, shards: int, options: RewardOptions, skipped: Mapping[str, int]) -> dict[str, Any]:
    """Importance and rewards of all shards into rewards.parquet, whole; returns counts for the manifest."""
    paths = [folder / LOGPS_FOLDER / f"{index:05d}.parquet" for index in range(shards)]
    if not any(map(_rows_in, paths)):
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise UserError(
            f"every pair was skipped ({reasons}), so there are no rewards; allow longer prompts or mend them"
        )
    theta: float = options.theta
    if options.density is not None and options.density_over == "dataset":
        theta = _dataset_threshold(paths, options)
    pairs = tokens = kept = 0
    with atomic_path(folder / REWARDS_NAME) as temporary, pq.ParquetWriter(temporary, REWARDS_SCHEMA) as writer:
        for path in paths:
            table = _read_shard(path).replace_schema_metadata(None)
            for sign, side in zip((1.0, -1.0), SIDES, strict=True):
                importance, rewards = _score_side(table, side, sign, options, theta)
                tokens += sum(len(row) for row in rewards)
                kept += sum(int(np.count_nonzero(row)) for row in rewards)
                for name, column in (("importance", importance), ("rewards", rewards)):
                    table = table.append_column(f"{side}_{name}", pa.array(column, type=pa.list_(pa.float32())))
            pairs += table.num_rows
            writer.write_table(table.select(REWARDS_SCHEMA.names))
    return {"pairs": pairs, "tokens": tokens, "kept_tokens": kept}


def _score_side(
    table: pa.Table, side: str, sign: float, options: RewardOptions, theta: float
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    importances, rewards = [], []
    for pos, neg in zip(table[f"{side}_pos_logps"].to_pylist(), table[f"{side}_neg_logps"].to_pylist(), strict=True):
        pos_logps, neg_logps = torch.tensor([pos]), torch.tensor([neg])
        mask = torch.ones_like(pos_logps, dtype=torch.bool)
        importance = token_importance(pos_logps, neg_logps, mask, options.tau)
        threshold: float | torch.Tensor = theta
        if options.density is not None and options.density_over == "response":
            threshold = density_threshold(importance, mask, options.density)
        direction = pos_logps - neg_logps if options.signed else None
        reward = token_rewards(importance, torch.tensor([sign]), mask, threshold, direction)
        importances.append(importance[0].numpy())
        rewards.append(reward[0].numpy())
    return importances, rewards


def _dataset_threshold(paths: Sequence[Path], options: RewardOptions) -> float:
    """The θ that keeps the top `density` share of all tokens of the data set (4 bytes a token in memory)."""
    values: list[np.ndarray] = []
    for path in paths:
        table = _read_shard(path)
        for sign, side in zip((1.0, -1.0), SIDES, strict=True):
            values.extend(_score_side(table, side, sign, RewardOptions(options.tau, theta=0.0), 0.0)[0])
    everything = torch.from_numpy(np.concatenate(values))[None]
    return float(density_threshold(everything, torch.ones_like(everything, dtype=torch.bool), options.density or 1.0))


def _blocks(pairs: Iterable[PreferencePair], size: int) -> Iterator[list[tuple[int, PreferencePair]]]:
    numbered = enumerate(checked(pairs))
    while block := list(itertools.islice(numbered, size)):
        yield block


def _length_batches(items: Sequence[_Encoded], batch_tokens: int) -> Iterator[list[_Encoded]]:
    """Longest first, so that running out of memory happens at once; each batch at most `batch_tokens` when padded."""
    batch: list[_Encoded] = []
    for item in sorted(items, key=lambda item: (-item.length, item.index)):
        if batch and (len(batch) + 1) * batch[0].length > batch_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _identity(pair: PreferencePair) -> list[Any]:
    return [
        [[message["role"], message["content"]] for message in pair.prompt],
        pair.chosen,
        pair.rejected,
        pair.chosen_complete,
        pair.rejected_complete,
        pair.dimension,
    ]
