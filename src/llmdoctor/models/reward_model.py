"""Reward models: a decoder with one number for a prompt and a response, or for the beginning of one.

Shapes: B rows, P prompt tokens (left-padded), L completion tokens (right-padded), D hidden size.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.errors import FingerprintMismatch, UserError, first_line
from llmdoctor.files import atomic_folder, digest, sha256_file, write_json
from llmdoctor.models import builtin
from llmdoctor.models.context import context_of
from llmdoctor.models.layers import cast_weights, merge_adapter
from llmdoctor.models.loading import (
    _LOAD_FAILURES,
    LoadedModel,
    _load_tokenizer,
    _locate,
    _prepare_tokenizer,
    _stored_weights_fingerprint,
    _unreadable_config,
    load_model,
    name_base,
    resolve_device,
    resolve_dtype,
    template_fingerprint,
    tokenizer_fingerprint,
)
from llmdoctor.models.logps import position_ids
from llmdoctor.models.lora import WEIGHTS
from llmdoctor.models.packing import keeps_keys

SCHEMA_VERSION = 1
CONFIG_NAME = "reward_model.json"
ADAPTER_FOLDER = "adapter"
BATCH_TOKENS = 8192
"""Tokens (padding included) of prompts and completions scored at once."""

Messages = Sequence[Mapping[str, Any]]


@dataclass
class RewardModelConfig:
    """What a reward model was made from; written beside its adapter as `reward_model.json`.

    Attributes:
        base: the spec its base model was loaded by (hub id, folder, GGUF file or `builtin:` name).
        base_fingerprint: fingerprints of the base model's weights, tokenizer and template.
        rewards_fingerprint: fingerprint of the pairs it was trained on.
        metrics: held-out figures at the end of training.
        training: the settings that matter for repeating it.
    """

    base: str
    base_fingerprint: dict[str, str]
    rewards_fingerprint: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(
        default_factory=lambda: {name: version(name) for name in ("llmdoctor", "torch", "transformers", "peft")}
    )
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def load(cls, folder: Path) -> RewardModelConfig:
        """Read `reward_model.json`; raises UserError when it is missing, broken or of another schema."""
        path = Path(folder) / CONFIG_NAME
        if not path.is_file():
            raise UserError(f"{folder} is not a trained reward model: it has no {CONFIG_NAME}")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not JSON: {error}") from error
        stored = raw.get("schema_version") if isinstance(raw, dict) else None
        if stored != SCHEMA_VERSION:
            raise UserError(f"{path} has schema version {stored}, this version of llmdoctor reads {SCHEMA_VERSION}")
        if unknown := set(raw) - {f.name for f in fields(cls)}:
            raise UserError(f"{path} has unknown fields: {', '.join(sorted(unknown))}")
        if missing := {"base", "base_fingerprint"} - set(raw):
            raise UserError(f"{path} lacks the fields: {', '.join(sorted(missing))}")
        return cls(**raw)


class RewardHead:
    """From hidden states to rewards, by the interface of `LogitsHead`."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., 1] float32."""
        scores: Tensor = self.linear(hidden.to(self.linear.weight.dtype))
        return scores.float()


class RewardModel:
    """One number for a conversation and an answer to it, read at the answer's last token.

    Args:
        model: a decoder-only `…ForSequenceClassification` with one output, frozen.
        tokenizer: its tokenizer.
        spec: what it was loaded by, for messages.
        fingerprint: of its weights, tokenizer, template and dtype.
        encoder: how it reads conversations; by its tokenizer's template if None.

    Raises:
        UserError: not one output, or outputs that are not a linear map of the last hidden state.
    """

    def __init__(
        self, model: Any, tokenizer: Any, spec: str, fingerprint: dict[str, str], encoder: ChatEncoder | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.spec = spec
        self.fingerprint = fingerprint
        self.encoder = encoder or ChatEncoder(tokenizer)
        _check_one_output(spec, model.config)
        self.head = _head_of(spec, model)
        self.context = context_of(model)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.model.get_input_embeddings().weight.device

    def score(
        self, prompts: Sequence[Messages], texts: Sequence[str], *, complete: bool | Sequence[bool] = False
    ) -> list[float]:
        """The reward of each answer.

        Args:
            prompts: conversations, each ending with a user turn.
            texts: an answer to each.
            complete: whether the answers end there (then the end-of-turn token is read as well), for all or for each.

        Raises:
            UserError: an answer that does not fit into the model's context.
        """
        rows = self.encoder.answered(prompts, texts, complete)
        return self.score_ids([prompt for prompt, _ in rows], [ids for _, ids in rows])

    def score_ids(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[float]:
        """The reward at the last token of each completion (of its prompt where it is empty), batched by length.

        A prompt with several completions is run once.

        Raises:
            UserError: a row that does not fit into the model's context.
        """
        pairs = [(tuple(prompt), tuple(ids)) for prompt, ids in zip(prompts, completions, strict=True)]
        longest = max((len(prompt) + len(ids) for prompt, ids in pairs), default=0)
        if longest > self.context:
            raise UserError(
                f"a prompt and answer of {longest} tokens do not fit into the context of {self.context} of the reward "
                f"model {self.spec}; shorten them"
            )
        order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]), pairs[i][0], len(pairs[i][1])))
        rewards = [0.0] * len(pairs)
        while order:
            count = _fitting([pairs[i] for i in order])
            batch, order = order[:count], order[count:]
            for i, reward in zip(batch, self._score_batch([pairs[i] for i in batch]), strict=True):
                rewards[i] = reward
        return rewards

    @torch.inference_mode()
    def _score_batch(self, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[float]:
        decoder = self.model.get_decoder()
        distinct = list(dict.fromkeys(prompt for prompt, _ in pairs))
        if not keeps_keys(self.model):
            # What recurrent layers remember of a prompt cannot be copied for each of its answers.
            ids, mask = _padded([(*prompt, *answer) for prompt, answer in pairs], self.device, left=True)
            out = decoder(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False)
            return self._rewards(out.last_hidden_state[:, -1])
        source = torch.tensor([distinct.index(prompt) for prompt, _ in pairs], device=self.device)
        ids, mask = _padded(distinct, self.device, left=True)
        out = decoder(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=True)
        # Of a model that is spread over several devices states need not lie where tokens go in.
        states = out.last_hidden_state[:, -1]
        last = states[source.to(states.device)]
        lengths = torch.tensor([len(ids) for _, ids in pairs], device=states.device)
        if bool((lengths > 0).any()):
            cache = out.past_key_values
            for layer in cache.layers:
                layer.batch_select_indices(source.to(layer.keys.device))
            answers, answer_mask = _padded([ids for _, ids in pairs], self.device, left=False)
            both = torch.cat([mask[source], answer_mask], dim=1)
            hidden = decoder(
                input_ids=answers,
                attention_mask=both,
                position_ids=position_ids(both)[:, mask.shape[1] :],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            ends = hidden[torch.arange(len(pairs), device=hidden.device), (lengths - 1).clamp(min=0)]
            last = torch.where(lengths[:, None] > 0, ends, last)
        return self._rewards(last)

    def _rewards(self, states: Tensor) -> list[float]:
        rewards: list[float] = self.head.logits(states.to(self.head.linear.weight.device))[:, 0].tolist()
        return rewards


def load_reward_model(
    spec: str | Path,
    *,
    base: LoadedModel | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> RewardModel:
    """Load a reward model and freeze it.

    Args:
        spec: a folder that training wrote (`reward_model.json` and an adapter), or a folder or hub id of any
            decoder-only `…ForSequenceClassification` with one output.
        base: of a trained one, its base model if already loaded, else the recorded one is loaded. It becomes part of
            the reward model and must not be used as a patient as well.
        dtype, device, trust_remote_code, revision: as `load_model`'s.

    Raises:
        UserError: no reward model there, one with several outputs, or a base that is not the recorded one.
    """
    folder = Path(spec).expanduser()
    if (folder / CONFIG_NAME).is_file():
        return _load_trained(folder, base, {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code})
    return _load_plain(str(spec), dtype, device, trust_remote_code, revision)


def base_classifier(base: LoadedModel, *, seed: int = 0) -> Any:
    """A `…ForSequenceClassification` with one fresh output on the very weights of `base`, which it shares.

    Args:
        base: a loaded model; what is done to the classifier (an adapter, training) is done to it.
        seed: of the output's initial weights.

    Raises:
        UserError: an architecture without such a class, or a `base` that carries an adapter.
    """
    if hasattr(base.model, "peft_config"):
        raise UserError(f"{base.spec} carries an adapter already; load the base again for a reward model")
    config = copy.deepcopy(base.model.config)
    config.num_labels = 1
    config.pad_token_id = base.tokenizer.pad_token_id
    try:
        # On no device: its weights are the base's, so none of its own are ever made.
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, dtype=base.model.dtype)
    except ValueError as error:
        raise UserError(f"{base.spec}: this architecture has no form with a score: {first_line(error)}") from error
    setattr(model, model.base_model_prefix, base.model.base_model)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(f"{base.spec}: {type(model).__name__} has no linear score, which a reward model needs")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(model.score.weight.shape, generator=generator) * getattr(config, "initializer_range", 0.02)
    device = base.model.get_output_embeddings().weight.device
    model.score = nn.Linear(weight.shape[1], 1, bias=False)
    model.score.weight = nn.Parameter(weight)
    model.score.to(device=device, dtype=base.model.dtype)
    return model.eval().requires_grad_(False)


def save_reward_model(folder: str | Path, model: Any, config: RewardModelConfig) -> None:
    """Write a trained reward model as a folder that appears whole or not at all.

    Args:
        folder: replaced if it exists.
        model: a PEFT model on `base_classifier(…)` with `task_type="SEQ_CLS"` and `modules_to_save=["score"]`.
        config: what it was made from.
    """
    with atomic_folder(Path(folder)) as staging:
        name_base(model.active_peft_config, config.base)
        model.save_pretrained(str(staging / ADAPTER_FOLDER), save_embedding_layers=False)
        (staging / ADAPTER_FOLDER / "README.md").unlink(missing_ok=True)
        write_json(staging / CONFIG_NAME, asdict(config))


def _load_trained(folder: Path, base: LoadedModel | None, options: dict[str, Any]) -> RewardModel:
    from peft import PeftModel

    config = RewardModelConfig.load(folder)
    weights = folder / ADAPTER_FOLDER / WEIGHTS
    if not weights.is_file():
        raise UserError(f"the reward model {folder} is not whole: it lacks {ADAPTER_FOLDER}/{weights.name}")
    base = base or load_model(config.base, **options)
    stored = {key: value for key, value in config.base_fingerprint.items() if key in ("model", "tokenizer")}
    current = {key: base.fingerprint.get(key, "") for key in stored}
    if stored != current:
        remedy = f"Give it the base it was trained on ({config.base})."
        raise FingerprintMismatch(f"the reward model {folder}", stored, current, remedy)
    dtype = base.model.dtype
    encoder = ChatEncoder.for_model(base.model, base.tokenizer)
    tuned = PeftModel.from_pretrained(base_classifier(base), str(folder / ADAPTER_FOLDER))
    model = cast_weights(merge_adapter(tuned), dtype)
    fingerprint = {**base.fingerprint, "model": digest([base.fingerprint.get("model"), sha256_file(weights)])}
    return RewardModel(_frozen(model), base.tokenizer, str(folder), fingerprint, encoder)


def _load_plain(spec: str, dtype: str, device: str, trust_remote_code: bool, revision: str | None) -> RewardModel:
    target = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, target)
    source = _locate(spec, revision)
    if source.is_gguf:
        raise UserError(f"{spec} is a GGUF file, which holds a language model; a reward model is a folder or a hub id")
    options = {"trust_remote_code": trust_remote_code}
    with builtin.quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(source.path, **options)
        except _LOAD_FAILURES as error:
            raise UserError(_unreadable_config(spec, error)) from error
        architectures = getattr(config, "architectures", None) or [config.model_type]
        if not any("SequenceClassification" in name for name in architectures):
            raise UserError(f"{spec} is not a reward model: its config.json says {', '.join(architectures)}")
        _check_one_output(spec, config)
        tokenizer = _load_tokenizer(spec, source.path, trust_remote_code)
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                source.path,
                config=config,
                dtype=torch_dtype,
                use_safetensors=True,
                output_loading_info=True,
                device_map="auto" if target == "balanced" else {"": target},
                **options,
            )
        except _LOAD_FAILURES as error:
            raise UserError(f"{spec} could not be loaded: {first_line(error)}") from error
        if missing := sorted(report["missing_keys"]):
            named = f"{', '.join(missing[:3])}{', …' if missing[3:] else ''}"
            raise UserError(f"{spec} lacks {len(missing)} of its weights ({named}), which would be random numbers")
    _prepare_tokenizer(spec, tokenizer, model)
    fingerprint = {
        "model": _stored_weights_fingerprint(source),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": template_fingerprint(tokenizer),
        "dtype": str(torch_dtype).removeprefix("torch."),
    }
    return RewardModel(_frozen(model), tokenizer, spec, fingerprint)


def _frozen(model: Any) -> Any:
    if isinstance(getattr(model, "score", None), nn.Linear):
        # In bfloat16 the rewards of two good answers are often the same number.
        model.score.float()
    return model.eval().requires_grad_(False)


def _check_one_output(spec: str, config: Any) -> None:
    if config.num_labels != 1:
        raise UserError(
            f"{spec} is a reward model with {config.num_labels} heads; expected one output. Use one that was trained "
            "with num_labels=1"
        )


def _head_of(spec: str, model: Any) -> RewardHead:
    """The model's score as a function of the last hidden state; a probe sees to it that it is one."""
    linear = getattr(model, "score", None)
    if not isinstance(linear, nn.Linear):
        raise UserError(f"{spec} ({type(model).__name__}) has no linear score on a decoder; only such are supported")
    head = RewardHead(linear)
    pad = model.config.get_text_config().pad_token_id
    probe = torch.tensor([[i for i in range(1, 6) if i != pad]], device=model.get_input_embeddings().weight.device)
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=probe, use_cache=False).last_hidden_state
        once = model.get_decoder()(input_ids=probe[:, :2], use_cache=False).last_hidden_state
        # The score may be kept in float32 above states in half precision.
        cast = linear.register_forward_pre_hook(lambda score, inputs: (inputs[0].to(score.weight.dtype),))
        try:
            expected = model(input_ids=probe, use_cache=False).logits.float()
        finally:
            cast.remove()
        got = head.logits(hidden[:, -1].to(linear.weight.device))
    if not (torch.isfinite(hidden).all() and torch.isfinite(got).all()):
        raise UserError(
            f"{spec} computes numbers that are not finite; its weights are broken, or too large for {hidden.dtype}"
        )
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 5e-2
    if not torch.allclose(hidden[:, 1], once[:, 1], rtol=tolerance, atol=tolerance * float(hidden.abs().max())):
        raise UserError(f"{spec} ({type(model).__name__}) reads text in both directions; only decoders are supported")
    # A score that a model squashes or shifts afterwards is not what is read here.
    if not torch.allclose(got, expected.to(got.device), rtol=tolerance, atol=tolerance):
        raise UserError(
            f"{spec} ({type(model).__name__}): its reward is not its score of the last hidden state; only such are "
            "supported"
        )
    return head


def _fitting(pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> int:
    """How many of the first pairs make one batch of at most `BATCH_TOKENS`; at least one."""
    prompt = answer = 0
    for count, (ids, completion) in enumerate(pairs):
        prompt, answer = max(prompt, len(ids)), max(answer, len(completion))
        if count and (count + 1) * (prompt + answer) > BATCH_TOKENS:
            return count
    return len(pairs)


def _padded(rows: Sequence[Sequence[int]], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place] = torch.tensor(row, dtype=torch.long)
        mask[index, place] = 1
    return ids.to(device), mask.to(device)
