"""Reward models: both stored forms, and rewards against whole forward passes of one row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import LORA
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    JambaConfig,
    JambaForSequenceClassification,
)

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.errors import UserError
from llmdoctor.models import reward_model
from llmdoctor.models.loading import LoadedModel, load_model
from llmdoctor.models.reward_model import (
    RewardModel,
    RewardModelConfig,
    base_classifier,
    load_reward_model,
    save_reward_model,
)

PROMPTS = ["Hi", "the cat sat on the mat and the dog ran", "zebra? é 7", "Hi"]
TEXTS = ["Hello, how are you", "no", "the house " * 9, ""]


def messages(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def load(folder: Path, **options: Any) -> RewardModel:
    return load_reward_model(folder, dtype="float32", device="cpu", **options)


def plain_folder(base: LoadedModel, folder: Path, seed: int = 0) -> Path:
    model = base_classifier(base, seed=seed)
    model.score.weight.mul_(10)
    model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def plain(tiny_model: LoadedModel, tmp_path: Path) -> Path:
    """A folder as `AutoModelForSequenceClassification` saves it."""
    return plain_folder(tiny_model, tmp_path / "plain")


def trained_model(base: LoadedModel, seed: int = 1) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    lora = LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], init_lora_weights=False, **LORA)
    return get_peft_model(base_classifier(base, seed=seed), lora)


@pytest.fixture
def trained(tiny_folder: Path, tmp_path: Path) -> Path:
    """A folder as training writes it."""
    base = load_model(str(tiny_folder), dtype="float32", device="cpu")
    config = RewardModelConfig(base.spec, dict(base.fingerprint), metrics={"accuracy": 0.5})
    save_reward_model(tmp_path / "trained", trained_model(base), config)
    return tmp_path / "trained"


@torch.no_grad()
def naive(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> float:
    """transformers' own forward: one row, no cache, no padding (and so no doubt about which token is the last)."""
    out = model(input_ids=torch.tensor([[*prompt, *completion]]), attention_mask=None, use_cache=False)
    return float(out.logits[0, 0])


@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
@pytest.mark.parametrize("complete", [False, True])
def test_rewards_are_the_models_own(
    plain: Path, monkeypatch: pytest.MonkeyPatch, batch_tokens: int, complete: bool
) -> None:
    """Of different lengths, one empty, two of one prompt, read at the last token: the end of turn if there is one."""
    monkeypatch.setattr(reward_model, "BATCH_TOKENS", batch_tokens)
    model = load(plain)
    reference = AutoModelForSequenceClassification.from_pretrained(plain, dtype=torch.float32)
    # Else transformers would take an end-of-turn token that is also the padding token for padding.
    reference.config.pad_token_id = None
    encoder = ChatEncoder(model.tokenizer)
    got = model.score([messages(prompt) for prompt in PROMPTS], TEXTS, complete=complete)
    for prompt, text, reward in zip(PROMPTS, TEXTS, got, strict=True):
        ids = encoder.text_ids(text) + ([encoder.end_of_turn] if complete else [])
        assert reward == pytest.approx(naive(reference, encoder.prompt_ids(messages(prompt)), ids), abs=1e-4)
    assert len({round(reward, 3) for reward in got}) == len(got)


def test_a_model_of_states_reads_prompt_and_answer_at_once(tiny_model: LoadedModel) -> None:
    """What its recurrent layers remember of a prompt cannot be copied for each of its answers."""
    torch.manual_seed(0)
    config = JambaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, num_experts=2,
        num_experts_per_tok=1, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False, num_labels=1, pad_token_id=1,
    )  # fmt: skip
    model = JambaForSequenceClassification(config).eval().requires_grad_(False)
    rewards = RewardModel(model, tiny_model.tokenizer, "jamba", {})
    prompts, answers = (
        [[5, 6, 7], list(range(20, 50)), list(range(20, 50)), [9] * 17],
        [[8, 9], [11] * 20, [], [12, 13]],
    )
    for prompt, ids, reward in zip(prompts, answers, rewards.score_ids(prompts, answers), strict=True):
        assert reward == pytest.approx(naive(model, prompt, ids), abs=1e-4)


def test_a_score_that_is_squashed_afterwards_is_refused(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(plain)
    forward = model.model.forward

    def squashed(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits.sigmoid()
        return out

    monkeypatch.setattr(model.model, "forward", squashed)
    with pytest.raises(UserError, match="its reward is not its score of the last hidden state"):
        RewardModel(model.model, model.tokenizer, "squashed", {})


def test_complete_may_differ_by_answer(plain: Path) -> None:
    model = load(plain)
    prompts = [messages("Hi")] * 2
    cut, whole = (model.score(prompts, ["the cat"] * 2, complete=end)[0] for end in (False, True))
    assert model.score(prompts, ["the cat"] * 2, complete=[True, False]) == pytest.approx([whole, cut], abs=1e-5)
    assert abs(cut - whole) > 1e-3


def test_an_adapter_is_read_back(trained: Path, tiny_folder: Path) -> None:
    """Merged into the base, it gives the rewards of the PEFT model that was saved."""
    base = load_model(str(tiny_folder), dtype="float32", device="cpu")
    saved = trained_model(base).eval()
    saved.get_base_model().config.pad_token_id = None
    model = load(trained)
    encoder = model.encoder
    got = model.score([messages(prompt) for prompt in PROMPTS], TEXTS)
    for prompt, text, reward in zip(PROMPTS, TEXTS, got, strict=True):
        assert reward == pytest.approx(
            naive(saved, encoder.prompt_ids(messages(prompt)), encoder.text_ids(text)), abs=1e-4
        )
    given = load(trained, base=load_model(str(tiny_folder), dtype="float32", device="cpu"))
    assert given.score([messages("Hi")], ["the"]) == model.score([messages("Hi")], ["the"])
    assert model.fingerprint["tokenizer"] == base.fingerprint["tokenizer"]
    assert model.fingerprint["model"] != base.fingerprint["model"]
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def test_the_folder_names_no_place_of_this_machine_but_the_base(trained: Path, tiny_folder: Path) -> None:
    assert sorted(path.name for path in trained.rglob("*") if path.is_file()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "reward_model.json",
    ]
    adapter = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tiny_folder)
    assert RewardModelConfig.load(trained).metrics == {"accuracy": 0.5}


def test_the_classifier_shares_the_weights(tiny_model: LoadedModel) -> None:
    model = base_classifier(tiny_model)
    assert model.model is tiny_model.model.model
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model.score.weight, base_classifier(tiny_model).score.weight)
    assert not torch.equal(model.score.weight, base_classifier(tiny_model, seed=1).score.weight)


def test_merging_leaves_the_rotary_frequencies_as_they_are(trained: Path, tiny_folder: Path) -> None:
    base = load_model(str(tiny_folder), dtype="bfloat16", device="cpu")
    before = {name: buffer.clone() for name, buffer in base.model.named_buffers()}
    model = load_reward_model(trained, base=base).model
    assert model.model.get_decoder().dtype == torch.bfloat16
    after = dict(model.named_buffers())
    assert before.keys() == after.keys()
    for name, buffer in before.items():
        torch.testing.assert_close(after[name], buffer, rtol=0, atol=0)


def test_bfloat16_keeps_rewards_apart(plain: Path) -> None:
    model = load_reward_model(plain, dtype="bfloat16", device="cpu")
    assert model.model.dtype == torch.bfloat16
    assert model.head.linear.weight.dtype == torch.float32
    exact = load(plain).score([messages("Hi")], ["the cat"])
    assert model.score([messages("Hi")], ["the cat"]) == pytest.approx(exact, abs=0.5)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_broken_weights_are_one_clear_line(plain: Path) -> None:
    weights = load_file(plain / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"].fill_(float("nan"))
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="computes numbers that are not finite; its weights are broken"):
        load(plain)


def test_two_heads_are_refused(tiny_model: LoadedModel, tmp_path: Path) -> None:
    model = base_classifier(tiny_model)
    model.config.num_labels = 2
    model.score = torch.nn.Linear(32, 2, bias=False)
    model.save_pretrained(tmp_path / "two")
    tiny_model.tokenizer.save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match="a reward model with 2 heads; expected one output"):
        load(tmp_path / "two")


def test_what_is_no_reward_model(tiny_folder: Path, tmp_path: Path, plain: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"is not a reward model: its config.json says LlamaForCausalLM"):
        load(tiny_folder)
    with pytest.raises(UserError, match="There is no folder"):
        load(tmp_path / "nowhere")
    bert = BertConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    BertForSequenceClassification(bert).save_pretrained(tmp_path / "bert")
    tiny_tokenizer.save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="has no linear score on a decoder"):
        load(tmp_path / "bert")
    edit(plain / "config.json", architectures=["LlamaForCausalLM"])
    with pytest.raises(UserError, match="is not a reward model"):
        load(plain)


def test_a_lost_head_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_folder, tmp_path / "bare")
    edit(tmp_path / "bare" / "config.json", architectures=["LlamaForSequenceClassification"], id2label={"0": "R"})
    with pytest.raises(UserError, match=r"lacks 1 of its weights .*score"):
        load(tmp_path / "bare")


def other_base(plain: Path, folder: Path) -> Path:
    """A causal model with the same tokenizer and other weights."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(plain, num_hidden_layers=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(plain).save_pretrained(folder)
    return folder


def test_broken_folders(trained: Path, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a trained reward model: it has no reward_model.json"):
        RewardModelConfig.load(plain)
    base = load_model(str(other_base(plain, tmp_path / "other")), dtype="float32", device="cpu")
    with pytest.raises(UserError, match="was made from other inputs"):
        load(trained, base=base)
    edit(trained / "reward_model.json", colour="red")
    with pytest.raises(UserError, match="unknown fields: colour"):
        load(trained)
    edit(trained / "reward_model.json", schema_version=9)
    with pytest.raises(UserError, match="has schema version 9, this version of llmdoctor reads 1"):
        load(trained)
    (trained / "reward_model.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load(trained)
    (trained / "reward_model.json").write_text(json.dumps({"schema_version": 1, "base": "x", "base_fingerprint": {}}))
    (trained / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"is not whole: it lacks adapter/adapter_model.safetensors"):
        load(trained)


def test_too_long_for_the_context(plain: Path) -> None:
    with pytest.raises(UserError, match="do not fit into the context of 512 of the reward model"):
        load(plain).score([messages("Hi")], ["zebra " * 300])


def test_nothing_to_score(plain: Path) -> None:
    assert load(plain).score([], []) == []
