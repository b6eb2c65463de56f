"""A draft model: guesses a large model's next tokens from the states that the large model has just had.

A few transformer layers read, at every token, its embedding and the last hidden state that the large model drew it
from, and give an estimate of the large model's next last hidden state; further guesses read the estimate in the state's
place (EAGLE, arXiv 2401.15077). Beside that state they read what some of the large model's lower layers put out
(EAGLE-3, arXiv 2503.01840), as far as the large model has been there. Embeddings and head are the large model's. The
head is cut to the tokens that occur most often, because it is most of what a guess costs (FR-Spec, arXiv 2502.14856).

Shapes: B rows, T tokens, D hidden size, S lower layers, V vocabulary, W tokens that may be guessed.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmdoctor.errors import UserError
from llmdoctor.files import atomic_folder, write_json
from llmdoctor.models.layers import cast_weights, copy_kept, decoder_layers, small_config, weights_read
from llmdoctor.models.loading import LoadedModel
from llmdoctor.models.logps import LogitsHead
from llmdoctor.models.norm import rms_norm
from llmdoctor.models.product import Product, product_of

CONFIG_NAME = "draft.json"
WEIGHTS_NAME = "draft.safetensors"
SCHEMA_VERSION = 1

_EPS = 1e-6


class DraftModel(nn.Module):
    """See the module's text. `from_layers` makes one to be trained, `load_draft` reads one.

    Args:
        model: the large causal LM; its embeddings are shared, not copied.
        layers: which of its layers this one's begin as.
        vocabulary: [W] ids that may be guessed, ascending.
        lower: S of its layers, ascending, whose outputs are read beside its last states.
    """

    def __init__(self, model: Any, layers: Sequence[int], vocabulary: Tensor, lower: Sequence[int] = ()) -> None:
        super().__init__()
        decoder = model.get_decoder()
        self.config = small_config(model.config, layers)
        self.config._attn_implementation = "sdpa"
        self.layers_from = list(layers)
        self.lower = tuple(lower)
        # Embeddings of its own would be made only to be thrown away: gigabytes, for a large model.
        whole = self.config.vocab_size, self.config.pad_token_id
        self.config.vocab_size, self.config.pad_token_id = 1, None
        self.decoder = cast_weights(type(decoder)(self.config).to(model.device), model.dtype)
        self.config.vocab_size, self.config.pad_token_id = whole
        self.decoder.set_input_embeddings(model.get_input_embeddings())
        width = int(self.config.hidden_size)
        like = {"device": model.device, "dtype": model.dtype}
        self.token_norm = nn.Parameter(torch.ones(width, **like))
        self.state_norm = nn.Parameter(torch.ones(width, **like))
        self.fuse = nn.Linear(2 * width, width, bias=False, **like)
        self.fuse_lower = nn.Linear(len(self.lower) * width, width, bias=False, **like) if self.lower else None
        self.vocabulary = vocabulary.to(model.device)
        self._cuts: weakref.WeakKeyDictionary[nn.Linear, CutHead] = weakref.WeakKeyDictionary()
        self.head = CutHead(LogitsHead.for_model(model), self.vocabulary)

    @classmethod
    def from_layers(
        cls, model: Any, layers: Sequence[int], vocabulary: Tensor, lower: Sequence[int] = ()
    ) -> DraftModel:
        """One whose layers are copies of the model's and whose input is the sum of embedding and last state."""
        draft = cls(model, layers, vocabulary, lower)
        copy_kept(model.get_decoder(), draft.decoder, layers)
        with torch.no_grad():
            one = torch.eye(draft.fuse.out_features)
            draft.fuse.weight.copy_(torch.cat([one, one], dim=-1))
            if draft.fuse_lower is not None:
                draft.fuse_lower.weight.zero_()
        return draft

    def get_decoder(self) -> Any:
        """The transformer, which reads `embed`'s output."""
        return self.decoder

    def get_input_embeddings(self) -> Any:
        """The large model's."""
        return self.decoder.get_input_embeddings()

    def embed(self, tokens: Tensor, states: Tensor) -> Tensor:
        """What the layers read [B, T, D].

        Args:
            tokens: [B, T].
            states: [B, T, (1 + S) D] that they were drawn from, the lower layers' outputs behind the last states; or
                estimates [B, T, D] of the last ones, which nothing lower belongs to.
        """
        dtype, width = self.fuse.weight.dtype, self.fuse.out_features
        states = states.to(dtype)
        last, below = states[..., :width], states[..., width:]
        both = [rms_norm(self.get_input_embeddings()(tokens).to(dtype), self.token_norm, _EPS),
                rms_norm(last, self.state_norm, _EPS)]  # fmt: skip
        fused = _map(self.fuse, torch.cat(both, dim=-1))
        if below.shape[-1] and self.fuse_lower is not None:
            fused = fused + _map(self.fuse_lower, rms_norm(below.unflatten(-1, (-1, width)), None, _EPS).flatten(-2))
        return fused

    def cut(self, head: LogitsHead) -> CutHead:
        """Another model's head, of the same vocabulary, for the tokens that may be guessed; made once for each."""
        if head.linear not in self._cuts:
            self._cuts[head.linear] = CutHead(head, self.vocabulary)
        return self._cuts[head.linear]

    def own_weights(self) -> dict[str, Tensor]:
        """All that is not the large model's."""
        shared = {id(parameter) for parameter in self.get_input_embeddings().parameters()}
        return {name: tensor for name, tensor in self.named_parameters() if id(tensor) not in shared}

    def cast(self, dtype: torch.dtype) -> None:
        """Its own weights to `dtype`, in place: float32 to train them, the large model's to use them."""
        for parameter in self.own_weights().values():
            parameter.data = parameter.data.to(dtype)

    def weights_read(self) -> int:
        """Weights that one guess reads."""
        return sum(tensor.numel() for tensor in self.own_weights().values()) + self.head.weight.numel()


def _map(linear: nn.Linear, x: Tensor) -> Tensor:
    y: Tensor = linear(x) if torch.is_grad_enabled() else product_of(linear)(x)
    return y


class CutHead:
    """A head for some tokens only.

    Args:
        head: the whole one.
        vocabulary: [W] ids.
    """

    def __init__(self, head: LogitsHead, vocabulary: Tensor) -> None:
        self._finish = head.finish
        index = vocabulary.to(head.linear.weight.device)
        bias = None if head.linear.bias is None else head.linear.bias.detach()[index]
        self._product = Product(head.linear.weight.detach()[index], bias)

    @property
    def weight(self) -> Tensor:
        """[W, D]."""
        return self._product.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., W] float32."""
        # Flat: a slice of one row counts as contiguous whatever its stride, and torch then copies the whole weight.
        flat = hidden.to(self.weight).reshape(-1, hidden.shape[-1])
        raw = self._product(flat).float().view(*hidden.shape[:-1], -1)
        return raw if self._finish is None else self._finish(raw)


def save_draft(draft: DraftModel, patient: LoadedModel, record: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Write a folder, whole or not at all: weights in the patient's dtype, and `record` with what loading needs.

    Returns:
        What its `draft.json` says.
    """
    tensors = {
        name: tensor.detach().to(patient.model.dtype).contiguous() for name, tensor in draft.own_weights().items()
    }
    tensors["vocabulary"] = draft.vocabulary.to(torch.int32)
    whole = {
        "schema_version": SCHEMA_VERSION,
        "patient": patient.spec,
        "patient_fingerprint": dict(patient.fingerprint),
        "layers": draft.layers_from,
        "lower": list(draft.lower),
        "weights_read": {"patient": weights_read(patient.model), "draft": draft.weights_read()},
        **record,
    }
    with atomic_folder(path) as folder:
        save_file(tensors, str(folder / WEIGHTS_NAME))
        write_json(folder / CONFIG_NAME, whole)
    return whole


def read_record(path: str | Path) -> dict[str, Any]:
    """What the `draft.json` in a draft model's folder says; UserError where there is none, or one that is broken."""
    config_path = Path(path).expanduser() / CONFIG_NAME
    if not config_path.is_file():
        raise UserError(f"{path} is not a draft model: it has no {CONFIG_NAME} (make one with `llmdoctor draft`)")
    try:
        record: dict[str, Any] = json.loads(config_path.read_text(encoding="utf-8"))
        schema, _, _ = record["schema_version"], dict(record["patient_fingerprint"]), record["layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{config_path} is broken ({error!r}); make the draft model anew") from error
    if schema != SCHEMA_VERSION:
        raise UserError(f"{config_path} has schema version {schema}; this version of llmdoctor reads {SCHEMA_VERSION}")
    return record


def load_draft(path: str | Path, patient: LoadedModel) -> DraftModel:
    """A draft model's folder as a drafter for `patient`, on its device and in its dtype.

    Raises:
        UserError: no draft model there, or one of another patient.
    """
    folder = Path(path).expanduser()
    config = read_record(path)
    made_for, layers, lower = config["patient_fingerprint"], config["layers"], config.get("lower", [])
    for name in ("model", "tokenizer"):
        if made_for.get(name) != patient.fingerprint.get(name):
            raise UserError(
                f"{path} was made for {config.get('patient')}, whose {name} is another than {patient.spec}'s; "
                "a draft model serves only the model it was made from"
            )
    total = len(decoder_layers(patient.model))
    for name, numbers in (("layers", layers), ("lower", lower)):
        known = isinstance(numbers, list) and all(type(number) is int and 0 <= number < total for number in numbers)
        if not known or sorted(set(numbers)) != numbers or (name == "layers" and not numbers):
            raise UserError(f"{folder / CONFIG_NAME} is broken: {name} are {numbers!r}; make the draft model anew")
    try:
        tensors = load_file(folder / WEIGHTS_NAME)
        vocabulary = tensors.pop("vocabulary").long()
    except Exception as error:
        raise UserError(f"{folder / WEIGHTS_NAME} cannot be read ({error!r}); make the draft model anew") from error
    draft = DraftModel(patient.model, layers, vocabulary, lower)
    own = draft.own_weights()
    wrong = {name for name in own.keys() | tensors.keys()
             if name not in own or name not in tensors or own[name].shape != tensors[name].shape}  # fmt: skip
    if wrong:
        raise UserError(f"{folder / WEIGHTS_NAME} lacks or has in excess: {', '.join(sorted(wrong))}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    return draft.requires_grad_(False).eval()
