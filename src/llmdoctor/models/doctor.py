"""The doctor: a causal LM with LoRA (or trained whole) and a value head on its last hidden state.

Shapes: B rows, P prompt tokens, L completion tokens, T = P + L, N = L + 1 states, D hidden size.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.errors import UserError
from llmdoctor.files import atomic_folder, digest, write_json, write_text
from llmdoctor.models.card import model_card
from llmdoctor.models.context import text_config
from llmdoctor.models.hub import hub_folder
from llmdoctor.models.layers import merge_adapter
from llmdoctor.models.loading import (
    LoadedModel,
    load_model,
    name_base,
    tensors_fingerprint,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from llmdoctor.models.logps import LogitsHead, completion_states, per_token_logps, position_ids
from llmdoctor.models.lora import WEIGHTS
from llmdoctor.models.packing import PackedPairs, can_pack

SCHEMA_VERSION = 1
CONFIG_NAME = "doctor.json"
VALUE_HEAD_NAME = "value_head.safetensors"
ADAPTER_FOLDER = "adapter"
MODEL_FOLDER = "model"

READOUT_FOLDER = "readout"
"""The judge of its rounds, in the folder of a doctor that was trained in them."""


@dataclass
class DoctorConfig:
    """What a doctor was made from; written beside its weights as `doctor.json`.

    Attributes:
        base: the spec its base model is loaded by (hub id with its revision, folder, GGUF file or `builtin:` name).
        base_fingerprint: fingerprints of the base model's weights, tokenizer and template.
        dimension: what it was trained for, e.g. "positive".
        lora: whether it is an adapter on the base (else all weights are its own).
        value_hidden: width of the value head's hidden layer; 0 is a linear head.
        rewards_fingerprint: fingerprint of the token rewards it was trained on, which holds the faces'.
        metrics: held-out figures at the end of training.
        training: the settings that matter for using or repeating it.
    """

    base: str
    base_fingerprint: dict[str, str]
    dimension: str = ""
    lora: bool = True
    value_hidden: int = 0
    rewards_fingerprint: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def load(cls, folder: Path) -> DoctorConfig:
        """Read `doctor.json`; raises UserError when it is missing, broken or of another schema."""
        path = Path(folder) / CONFIG_NAME
        if not path.is_file():
            remedy = "train one with `llmdoctor train`"
            if (Path(folder) / "checkpoints").is_dir():
                remedy = "its training has not finished: run the same command again"
            raise UserError(f"{folder} is not a doctor: it has no {CONFIG_NAME} ({remedy})")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not JSON: {error}") from error
        stored = raw.get("schema_version") if isinstance(raw, dict) else None
        if stored != SCHEMA_VERSION:
            raise UserError(f"{path} has schema version {stored}, this version of llmdoctor reads {SCHEMA_VERSION}")
        unknown = set(raw) - {f.name for f in fields(cls)}
        if unknown:
            raise UserError(f"{path} has unknown fields: {', '.join(sorted(unknown))}")
        missing = {"base", "base_fingerprint"} - set(raw)
        if missing:
            raise UserError(f"{path} lacks the fields: {', '.join(sorted(missing))}")
        return cls(**raw)

    def is_on(self, model: LoadedModel) -> bool:
        """Whether the doctor's base is this model, under whatever name."""
        return all(self.base_fingerprint.get(key) == model.fingerprint.get(key) for key in ("model", "tokenizer"))


class ValueHead(nn.Module):
    """log V_φ(s) as a scalar function of the last hidden state. Starts at exactly 0, i.e. V = 1 everywhere."""

    def __init__(self, hidden_size: int, width: int = 0) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size)
        self.inner = nn.Linear(hidden_size, width) if width else None
        self.out = nn.Linear(width or hidden_size, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [...] float32, also in autocast: squares of differences of flows are taken of it."""
        with torch.autocast(hidden.device.type, enabled=False):
            x = self.norm(hidden.float())
            if self.inner is not None:
                x = nn.functional.silu(self.inner(x))
            return self.out(x).squeeze(-1)


class Doctor(nn.Module):
    """A small LM trained to tilt a patient, with its tokenizer and what it was made from.

    Build one with `Doctor.from_base`, read one with `Doctor.from_pretrained`.

    Attributes:
        readout: folder of the judge of its rounds, which is copied to where the doctor is saved; None if it has none.
    """

    def __init__(self, lm: Any, tokenizer: Any, config: DoctorConfig) -> None:
        super().__init__()
        self.lm = lm
        self.tokenizer = tokenizer
        self.doctor_config = config
        causal = self.causal_lm
        hidden_size = text_config(causal).hidden_size
        device = causal.get_output_embeddings().weight.device
        self.value_head = ValueHead(hidden_size, config.value_hidden).to(device)
        self.logits_head = LogitsHead.for_model(causal)
        self.encoder = ChatEncoder.for_model(causal, tokenizer)
        self.detach_value = False
        self.readout: Path | None = None

    @classmethod
    def from_base(
        cls,
        base: LoadedModel,
        *,
        lora: dict[str, Any] | None,
        value_hidden: int = 0,
        dimension: str = "",
        seed: int = 0,
    ) -> Doctor:
        """A fresh doctor on `base`, whose policy is exactly the base's until it is trained.

        Args:
            base: a loaded model; it becomes part of the doctor and must not be used as a patient as well.
            lora: arguments of `peft.LoraConfig`, or None to train all weights.
            value_hidden: width of the value head's hidden layer; 0 is a linear head.
            dimension: a name for what it will be trained for.
            seed: of the adapter's initial weights.

        Raises:
            UserError: `base` is part of a doctor already.
        """
        if hasattr(base.model, "peft_config"):
            raise UserError(f"{base.spec} carries an adapter already; load the base again for another doctor")
        fork = [base.model.device] if base.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=fork):
            torch.manual_seed(seed)
            lm = base.model
            if lora is not None:
                from peft import LoraConfig, get_peft_model

                lm = get_peft_model(lm, LoraConfig(task_type="CAUSAL_LM", **lora))
                name_base(lm.active_peft_config, base.spec)
            else:
                # In bfloat16 a small learning rate's steps round to nothing.
                lm = lm.float().requires_grad_(True)
            config = DoctorConfig(
                base=base.spec,
                base_fingerprint=dict(base.fingerprint),
                dimension=dimension,
                lora=lora is not None,
                value_hidden=value_hidden,
                versions={name: version(name) for name in ("llmdoctor", "torch", "transformers", "peft")},
            )
            return cls(lm, base.tokenizer, config)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        base: LoadedModel | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        trust_remote_code: bool = False,
        trainable: bool = False,
    ) -> Doctor:
        """Read a doctor from a folder or a hub repository.

        Args:
            path: folder written by `save_pretrained`, or a hub id.
            base: its base model if already loaded; otherwise the recorded one is loaded.
            dtype, device, trust_remote_code: as `load_model`'s, for the base.
            trainable: keep the adapter's weights open to training.

        Raises:
            UserError: no such doctor, another schema, or a base that is not the recorded one.
        """
        folder = local_folder(path)
        config = DoctorConfig.load(folder)
        check_whole(folder, config)
        options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
        if config.lora:
            from peft import PeftModel

            base = base or load_base(folder, config.base, **options)
            check_doctor(folder, config, base)
            lm = PeftModel.from_pretrained(base.model, str(folder / ADAPTER_FOLDER), is_trainable=trainable)
            tokenizer = base.tokenizer
        else:
            own = load_model(str(folder / MODEL_FOLDER), **options)
            lm, tokenizer = own.model, own.tokenizer
            lm.requires_grad_(trainable)
        doctor = cls(lm, tokenizer, config)
        doctor.value_head.load_state_dict(load_file(folder / VALUE_HEAD_NAME))
        doctor.readout = folder / READOUT_FOLDER if (folder / READOUT_FOLDER).is_dir() else None
        return doctor.eval()

    @property
    def causal_lm(self) -> Any:
        """The transformers model inside, with adapters in place where there are any."""
        return self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.causal_lm.get_input_embeddings().weight.device

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, prompt_width: int | None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the completions and values of their states.

        Args:
            input_ids, attention_mask: [B, T] prompts padded on the left, completions on the right; or, packed,
                [B/2, T] rows of a prompt and its two completions, padded on the right (see `PackedPairs`).
            completion_mask: [B, L] true on real completion tokens.
            prompt_width: P, the column where completions begin; None for packed rows.

        Returns:
            per_token_logps [B, L] and log_v [B, N], both float32.
        """
        if prompt_width is None:
            pairs = PackedPairs(attention_mask, completion_mask)
            bias = pairs.attention_bias(self.causal_lm.dtype)
            states = pairs.take(self.hidden_states(input_ids, bias, pairs.positions))
            labels = pairs.take(input_ids)[:, 1:]
        else:
            states = completion_states(self.hidden_states(input_ids, attention_mask), prompt_width)
            labels = input_ids[:, prompt_width:]
        logps = per_token_logps(states, self.logits_head, labels, completion_mask)
        states = states.to(self.logits_head.weight.device)
        values = self.value_head(states.detach() if self.detach_value else states)
        return logps, values.to(logps.device)

    @property
    def packs_pairs(self) -> bool:
        """Whether `forward` may be given packed rows, as its model and attention stand now (see `can_pack`)."""
        return can_pack(self.causal_lm)

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor | None = None) -> Tensor:
        """[B, T] ids and mask -> [B, T, D] last hidden states (padding on either side).

        With `positions` [B, T] the mask may be a bias [B, 1, T, T] on the attention scores.
        """
        decoder = self.causal_lm.get_decoder()
        with self._adapters_in_base_precision():
            hidden: Tensor = decoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids(attention_mask) if positions is None else positions,
                use_cache=False,
            ).last_hidden_state
        return hidden

    @contextlib.contextmanager
    def _adapters_in_base_precision(self) -> Iterator[None]:
        """Inside, float32 adapters on a bfloat16 base multiply in bfloat16, and get float32 gradients.

        Left alone, peft casts every adapted layer's input and output to float32, which costs more than the adapter: a
        training step on a CPU took twice as long.
        """
        if not self.doctor_config.lora or self.causal_lm.dtype != torch.bfloat16:
            yield
            return
        from peft.helpers import disable_input_dtype_casting

        with disable_input_dtype_casting(self.lm), torch.autocast(self.device.type, dtype=torch.bfloat16):
            yield

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """As transformers' models have it; called by the trainer."""
        self.causal_lm.gradient_checkpointing_enable(**kwargs)
        # Called again it would leave the former hooks on.
        self.causal_lm.disable_input_require_grads()
        self.causal_lm.enable_input_require_grads()

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, the doctor is its base: adapters off. Only for LoRA doctors; a whole-model one keeps no base."""
        if not self.doctor_config.lora:
            raise RuntimeError("a fully trained doctor holds no reference; compute its log-probs before training")
        with self.lm.disable_adapter():
            yield

    def merged(self) -> LoadedModel:
        """A plain causal LM with the adapter folded into the weights (in float32), for decoding.

        Consumes this doctor: the base model's weights are changed in place. Its fingerprint is neither the base's nor
        any file's.
        """
        lm, fingerprint = self.lm, dict(self.doctor_config.base_fingerprint)
        if self.doctor_config.lora:
            tuned = {name: parameter for name, parameter in lm.named_parameters() if "lora_" in name}
            fingerprint["model"] = digest([fingerprint.get("model"), tensors_fingerprint(tuned)])
            lm = merge_adapter(lm)
        else:
            fingerprint["model"] = weights_fingerprint(lm)
        lm.requires_grad_(False)
        return LoadedModel(lm.eval(), self.tokenizer, f"doctor({self.doctor_config.base})", fingerprint)

    def save_into(self, folder: Path) -> None:
        """Write weights, config and card into an existing folder."""
        self.save_weights(folder)
        write_json(folder / CONFIG_NAME, asdict(self.doctor_config))
        write_text(folder / "README.md", model_card(asdict(self.doctor_config)))

    def save_weights(self, folder: Path) -> None:
        """Write adapter (or model) and value head into an existing folder."""
        if self.doctor_config.lora:
            # Left to find out whether the embeddings were trained, peft would look the base up on the hub.
            self.lm.save_pretrained(str(folder / ADAPTER_FOLDER), save_embedding_layers=False)
            # peft writes a card of its own that says nothing; ours stands one level up.
            (folder / ADAPTER_FOLDER / "README.md").unlink(missing_ok=True)
        else:
            self.lm.save_pretrained(str(folder / MODEL_FOLDER), safe_serialization=True)
            self.tokenizer.save_pretrained(str(folder / MODEL_FOLDER))
        head = {name: tensor.detach().cpu().contiguous() for name, tensor in self.value_head.state_dict().items()}
        save_file(head, str(folder / VALUE_HEAD_NAME))

    def load_weights(self, folder: Path) -> None:
        """Read back what `save_weights` wrote, in place."""
        folder = Path(folder)
        if self.doctor_config.lora:
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(self.lm, load_file(folder / ADAPTER_FOLDER / WEIGHTS))
        else:
            own = type(self.lm).from_pretrained(str(folder / MODEL_FOLDER), dtype=self.lm.dtype)
            self.lm.load_state_dict(own.state_dict())
        self.value_head.load_state_dict(load_file(folder / VALUE_HEAD_NAME))

    def save_pretrained(self, path: str | Path) -> None:
        """Write the doctor as a folder that appears whole or not at all.

        Raises:
            UserError: its read-out is no longer where it was.
        """
        if self.readout is not None and not self.readout.is_dir():
            raise UserError(
                f"the read-out {self.readout} of this doctor is gone: put it back, or set the doctor's readout to None"
            )
        with atomic_folder(Path(path)) as folder:
            self.save_into(folder)
            if self.readout is not None:
                shutil.copytree(self.readout, folder / READOUT_FOLDER)

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload the doctor's folder to the hub and return the commit's URL."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "doctor"
            self.save_pretrained(folder)
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload doctor"))


def local_folder(path: str | Path) -> Path:
    """A doctor's folder here, fetched from the hub if `path` is a hub id; raises UserError if it is neither."""
    folder = Path(path)
    if folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") != 1:
        return folder.expanduser()
    return hub_folder(str(path), "doctor")


def load_base(folder: Path, spec: str, **options: Any) -> LoadedModel:
    """The model that the doctor in `folder` was trained on; an error says whose base it is."""
    try:
        return load_model(spec, **options)
    except UserError as error:
        raise UserError(f"the base of the doctor {folder}, as it was trained: {error}") from error


def check_whole(folder: Path, config: DoctorConfig) -> None:
    """UserError where the doctor in `folder` lacks a file."""
    weights = f"{ADAPTER_FOLDER}/{WEIGHTS}" if config.lora else f"{MODEL_FOLDER}/config.json"
    absent = [name for name in (weights, VALUE_HEAD_NAME) if not (folder / name).is_file()]
    if absent:
        raise UserError(f"the doctor {folder} is not whole: it lacks {', '.join(absent)}")
    for name in (weights, VALUE_HEAD_NAME):
        if name.endswith(".safetensors"):
            try:
                with safe_open(folder / name, framework="pt") as stored:
                    stored.keys()
            except SafetensorError as error:
                raise UserError(
                    f"the doctor {folder} is not whole: {name} is cut or no weights at all ({error}); copy it again"
                ) from error


def check_doctor(folder: Path, config: DoctorConfig, base: LoadedModel) -> None:
    """UserError unless the doctor in `folder` is whole and `base` is what it was trained on."""
    check_whole(folder, config)
    stored = config.base_fingerprint.get("tokenizer")
    if stored and stored != tokenizer_fingerprint(base.tokenizer):
        raise UserError(
            f"the doctor {folder} was trained on {config.base} (tokenizer {stored}), but the base at hand is "
            f"{base.spec} (tokenizer {tokenizer_fingerprint(base.tokenizer)}); give it the base it was trained on"
        )
    weights = config.base_fingerprint.get("model")
    if weights and weights != base.fingerprint.get("model"):
        raise UserError(
            f"the doctor {folder} was trained on {config.base} (weights {weights}), but the base at hand is "
            f"{base.spec} (weights {base.fingerprint.get('model')}); give it the base it was trained on"
        )
