"""The fused decoder against transformers' own modules; adapters beside the model against adapters merged into it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import LORA, load, shaken
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llmdoctor.decoding.adapter import Adapter
from llmdoctor.decoding.cache import new_cache
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import Guide, LaneSpec, load_guide
from llmdoctor.decoding.lane import Lane
from llmdoctor.decoding.network import _Linear, network_of
from llmdoctor.decoding.request import Request, SamplingParams
from llmdoctor.models.doctor import ADAPTER_FOLDER, Doctor
from llmdoctor.models.loading import load_model
from llmdoctor.models.logps import LogitsHead

SIZES = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 700, "initializer_range": 0.2,
}  # fmt: skip
LONG_ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
             "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "llama with long rope": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LONG_ROPE)),
    "llama with biases": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "wide heads": (LlamaForCausalLM, LlamaConfig(**SIZES, head_dim=20)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=20)),
}


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    kind, config = FAMILIES[request.param]
    torch.manual_seed(0)
    made = kind(config).eval()
    for name, parameter in made.named_parameters():
        # Fresh biases and norms are zeros and ones, which would hide that they are left out.
        if name.endswith("bias") or "norm" in name:
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
    return made


def ragged(lengths: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Random ids and a mask [B, width], padded on the left."""
    ids = torch.randint(0, 300, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return ids, mask


def test_prompts_and_steps_are_the_models_own(model: Any) -> None:
    decoder = model.get_decoder()
    ids, mask = ragged([12, 7, 3], 12)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = decoder(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    network = network_of(decoder)
    assert network is not None
    cache = new_cache(model.config, 4)
    pieces = [(0, 8), (8, 9), (9, 12)]
    got = torch.cat([network(ids[:, a:b], mask[:, :b], positions[:, a:b], cache) for a, b in pieces], dim=1)
    assert torch.allclose(got[mask.bool()], expected[mask.bool()], atol=1e-4)


def test_a_text_longer_than_the_table_of_angles(model: Any) -> None:
    """The table starts at 512 positions and grows."""
    decoder, network = model.get_decoder(), network_of(model.get_decoder())
    ids, mask = ragged([640], 640)
    expected = decoder(input_ids=ids, use_cache=False).last_hidden_state
    assert network is not None
    cache = new_cache(model.config, 4)
    positions = mask.cumsum(-1) - 1
    network(ids[:, :100], mask[:, :100], positions[:, :100], cache)
    got = network(ids[:, 100:], mask, positions[:, 100:], cache)
    assert torch.allclose(got, expected[:, 100:], atol=1e-3)


def test_no_weight_in_float32_is_held_twice_and_the_model_stays_itself(model: Any, tmp_path: Path) -> None:
    decoder = model.get_decoder()
    ids = torch.arange(9)[None]
    before = decoder(input_ids=ids, use_cache=False).last_hidden_state
    network = network_of(decoder)
    assert network is not None
    after = decoder(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.allclose(after, before, atol=1e-5)
    storages = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}
    for block in network._blocks:
        assert all(linear.product.weight.untyped_storage().data_ptr() in storages for linear in block.linears)
    assert network_of(decoder) is network
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_moved_weights_are_noticed(model: Any) -> None:
    """A weight that was replaced, not changed in place, makes a new network."""
    decoder = model.get_decoder()
    first = network_of(decoder)
    up = decoder.layers[1].mlp.up_proj.weight
    up.data.mul_(2)
    assert network_of(decoder) is first
    down = decoder.layers[2].mlp.gate_proj.weight
    down.data = down.data * 3
    second = network_of(decoder)
    assert second is not None
    assert second is not first
    ids, mask = ragged([6], 6)
    expected = decoder(input_ids=ids, use_cache=False).last_hidden_state
    got = second(ids, mask, mask.cumsum(-1) - 1, new_cache(model.config, 1))
    assert torch.allclose(got, expected, atol=1e-4)
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        known = network_of(decoder)
        weight = getattr(decoder.layers[0].self_attn, part).weight
        weight.data = weight.data.clone()
        assert network_of(decoder) is not known, part


@torch.inference_mode(False)
def test_an_adapter_put_in_after_decoding_is_heard_and_can_be_trained(tiny_folder: Path) -> None:
    """Nothing moves when PEFT wraps the layers; the fast form of before would go on saying what the bare model says."""
    patient = load(tiny_folder)
    request = Request.from_text("Hi", sampling=SamplingParams(max_new_tokens=12, temperature=0))
    bare = GuidedDecoder(patient).generate([request])[0].token_ids
    shaken(Doctor.from_base(patient, lora=LORA, seed=1))
    with_adapter = GuidedDecoder(patient).generate([request])[0].token_ids
    prompt = GuidedDecoder(patient).encoder.prompt_ids(request.messages)
    ids = torch.tensor([prompt + with_adapter])
    logits = patient.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == with_adapter != bare
    logits.logsumexp(-1).sum().backward()
    gradients = [each.grad for each in patient.model.parameters() if each.requires_grad]
    assert gradients
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@torch.inference_mode(False)
@torch.no_grad()
def test_biases_are_copies_whose_changes_are_noticed() -> None:
    parts = [torch.nn.Linear(4, 6), torch.nn.Linear(4, 2, bias=False), torch.nn.Linear(4, 2)]
    fused = _Linear.fuse(parts, lay_out=True)
    assert not fused.stale
    x = torch.randn(3, 4)
    assert torch.allclose(fused(x), torch.cat([part(x) for part in parts], dim=-1), atol=1e-6)
    parts[2].bias.add_(1)
    assert fused.stale, "changed in place, as loading a state dict does"
    fused = _Linear.fuse(parts, lay_out=True)
    assert not fused.stale
    parts[0].bias.data = parts[0].bias.data + 1
    assert fused.stale, "replaced"


@torch.inference_mode(False)
@torch.no_grad()
@pytest.mark.parametrize("part", ["projection", "norm", "embedding"])
def test_a_part_that_is_replaced_is_noticed(tiny_folder: Path, part: str) -> None:
    patient = load(tiny_folder)
    request = Request.from_text("Hi", sampling=SamplingParams(max_new_tokens=8, temperature=0.0))
    before = GuidedDecoder(patient).generate([request])[0]
    layer = patient.model.model.layers[0]
    torch.manual_seed(0)
    if part == "projection":
        old = layer.self_attn.q_proj
        layer.self_attn.q_proj = torch.nn.Linear(old.in_features, old.out_features, bias=False)
    elif part == "norm":
        layer.input_layernorm.weight = torch.nn.Parameter(torch.randn(layer.input_layernorm.weight.shape))
    else:
        old = patient.model.get_input_embeddings()
        patient.model.set_input_embeddings(torch.nn.Embedding(old.num_embeddings, old.embedding_dim))
    patient.model.requires_grad_(False)
    decoder = GuidedDecoder(patient)
    done = decoder.generate([request])[0]
    ids = torch.tensor([decoder.encoder.prompt_ids(request.messages)])
    expected = patient.model(input_ids=ids, use_cache=False).logits[0, -1].log_softmax(-1)
    assert done.logps[0] == pytest.approx(float(expected.max()), abs=1e-4)
    assert done.logps != pytest.approx(before.logps, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_adapter_follows_its_base(folders: list[Path], tiny_folder: Path, dtype: torch.dtype) -> None:
    """To another dtype here; to another device by the same way."""
    patient = load(tiny_folder)
    guide = load_guide(folders[0], patient, name="it")
    request = Request.from_text("Hi", betas={"it": 1.0}, sampling=SamplingParams(max_new_tokens=3, temperature=0.0))
    with torch.inference_mode(False):
        before = GuidedDecoder(patient, [guide]).generate([request])[0]
        patient.model.to(dtype)
        after = GuidedDecoder(patient, [guide]).generate([request])[0]
    assert after.logps[0] == pytest.approx(before.logps[0], abs=0.1 if dtype == torch.bfloat16 else 1e-4)


def test_who_sees_whom_lies_as_kernels_want_it(tiny_folder: Path) -> None:
    """Rows that begin at multiples of eight, whatever the number of columns; numbers are those of the mask."""
    network = network_of(load(tiny_folder).model.get_decoder())
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    bias = network._bias(mask, 2, torch.float32)
    assert bias.shape == (2, 1, 2 * network.group, 5)
    assert all(stride % 8 == 0 for stride in bias.stride()[:-1])
    seen = torch.tensor([[[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]], [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]).bool()
    expected = seen[:, None].repeat_interleave(network.group, 2)
    assert torch.equal(bias == 0, expected)


def test_what_it_does_not_take() -> None:
    torch.manual_seed(0)
    windowed = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))
    capped = LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu"))
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
    stretched = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=dynamic))
    hooked = LlamaForCausalLM(LlamaConfig(**SIZES))
    hooked.model.layers[1].register_forward_hook(lambda *args: None)
    replaced = LlamaForCausalLM(LlamaConfig(**SIZES))
    replaced.model.norm.forward = lambda x: x
    for model in (windowed, capped, stretched, hooked, replaced):
        assert network_of(model.get_decoder()) is None


def test_one_that_was_asked_for_hidden_states_is_still_run() -> None:
    """transformers leaves hooks in it."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model(input_ids=torch.tensor([[5, 9]]), output_hidden_states=True, output_attentions=True)
    assert any(module._forward_hooks for module in model.modules())
    assert network_of(model.get_decoder()) is not None


# Adapters


@pytest.fixture
def folders(tiny_folder: Path, tmp_path: Path) -> list[Path]:
    """Doctors on all layers, on the upper one, and with every kind of product."""
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    loras = [LORA, {**LORA, "layers_to_transform": [1]}, {**LORA, "target_modules": every, "use_rslora": True}]
    found = []
    with torch.inference_mode(False):
        for number, lora in enumerate(loras):
            base = load_model(str(tiny_folder), dtype="float32", device="cpu")
            doctor = shaken(Doctor.from_base(base, lora=lora), seed=number)
            doctor.save_pretrained(tmp_path / str(number))
            found.append(tmp_path / str(number))
    return found


def merged(folder: Path, base: Path) -> Any:
    return Doctor.from_pretrained(folder, base=load(base)).merged().model


def whole(model: Any, ids: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


def test_voices_are_the_merged_models(folders: list[Path], tiny_folder: Path) -> None:
    """Through everything that a lane can do to its rows, against whole passes of the merged models."""
    patient = load(tiny_folder)
    adapters = [Adapter.load(folder / ADAPTER_FOLDER, patient.model) for folder in folders]
    assert all(adapters)
    models = [load(tiny_folder).model, *(merged(folder, tiny_folder) for folder in folders)]
    for voices in ([None, adapters[1]], [None, *adapters], [adapters[2]], [adapters[1], adapters[1]]):
        which = [models[0] if voice is None else models[1 + adapters.index(voice)] for voice in voices]
        spec = LaneSpec(patient.model, None, LogitsHead.for_model(patient.model), None, list(voices))
        rows = [[5, 9, 200], [7], [40, 41, 42, 43, 44], [5, 9, 200]]

        def check(lane: Lane, logits: Tensor, rows: list[list[int]], which: list[Any] = which) -> None:
            expected = torch.stack([whole(model, row) for model in which for row in rows])
            assert torch.allclose(logits, expected, atol=2e-4)

        # Voices share a beginning as they share all else.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("llmdoctor.decoding.lane._SHARE_ABOVE", 0)
            alike = [[1, 2, 3, *row] for row in rows]
            lane = Lane(spec, alike, 3)
            assert lane._begin == 3
            check(lane, lane.prefill(), alike)
            check(lane, lane.step(torch.full((4,), 11)), [[*row, 11] for row in alike])
        lane = Lane(spec, rows, 3)
        check(lane, lane.prefill(), rows)
        rows = [[*row, 11] for row in rows]
        check(lane, lane.step(torch.full((4,), 11)), rows)
        lane.keep([2, 0])
        rows = [rows[2], rows[0]]
        # Three tokens to one row and one to the other; the first then takes one of them back.
        states = lane.feed(torch.tensor([[20, 21, 22], [23, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]))
        check(lane, lane.outputs(states[:, 0]), [[*rows[0], 20], [*rows[1], 23]])
        lane.erase([0], [lane.mask.shape[1] - 1])
        rows = [[*rows[0], 20, 21, 12], [*rows[1], 23, 12]]
        check(lane, lane.step(torch.tensor([12, 12])), rows)
        guest = Lane(spec, [[8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8], [3]], 2)
        guest.prefill()
        lane.join(guest, 2)
        rows = [[*row, 13] for row in [*rows, [8] * 12, [3]]]
        check(lane, lane.step(torch.full((4,), 13)), rows)
        lane.pack()
        fork = lane.fork([1, 3], 4)
        fork.feed(torch.tensor([[30, 31], [32, 0]]), torch.tensor([[1, 1], [1, 0]]))
        lane.absorb(fork, [0, 1], [1, 3])
        rows = [[*rows[0], 14], [*rows[1], 30, 31, 14], [*rows[2], 14], [*rows[3], 32, 14]]
        check(lane, lane.step(torch.full((4,), 14)), rows)
        states = lane.peek(torch.tensor([[50, 51]] * 4))
        lane.accept(torch.tensor([0, 1, 0, 1]))
        rows = [[*row, 50 + place % 2] for place, row in enumerate(rows)]
        check(lane, lane.outputs(states.unflatten(0, (-1, 4))[:, range(4), [0, 1, 0, 1]].flatten(0, 1)), rows)
        check(lane, lane.step(torch.full((4,), 15)), [[*row, 15] for row in rows])


def test_tapped_layers_are_the_merged_models(deep_folder: Path, tmp_path: Path) -> None:
    """Below the first layer that an adapter changes, and above it, where each voice has its own."""
    with torch.inference_mode(False):
        doctor = shaken(Doctor.from_base(load(deep_folder), lora={**LORA, "layers_to_transform": [2, 3]}))
        doctor.save_pretrained(tmp_path / "doctor")
    patient = load(deep_folder)
    adapter = Adapter.load(tmp_path / "doctor" / ADAPTER_FOLDER, patient.model)
    spec = LaneSpec(patient.model, None, LogitsHead.for_model(patient.model), None, [None, adapter], tapped=(0, 3))
    rows = [[5, 9, 200], [7, 8, 9]]
    lane = Lane(spec, rows, 3)
    states = lane.prefill_states()
    rows = [[*row, 11] for row in rows]
    states = torch.cat([states, lane.step_states(torch.tensor([11, 11]))], dim=1)
    models = [patient.model, merged(tmp_path / "doctor", deep_folder)]
    expected = []
    for model in models:
        whole = model(input_ids=torch.tensor(rows), use_cache=False, output_hidden_states=True).hidden_states
        expected.append(torch.cat([whole[-1], whole[1], whole[4]], dim=-1))
    assert torch.allclose(states, torch.cat(expected), atol=2e-4)
    assert torch.allclose(lane.outputs(states), models[0].lm_head(states[..., :32]), atol=1e-5)


def test_tapped_layers_of_a_model_that_transformers_runs() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu")).eval()
    assert network_of(model.get_decoder()) is None
    lane = Lane(LaneSpec(model, None, LogitsHead.for_model(model), tapped=(0,)), [[5, 9, 7], [7, 8, 9]], 3)
    states = torch.cat([lane.prefill_states(), lane.step_states(torch.tensor([11, 11]))], dim=1)
    assert not any(layer._forward_hooks for layer in model.model.layers)
    whole = model(input_ids=torch.tensor([[5, 9, 7, 11], [7, 8, 9, 11]]), use_cache=False, output_hidden_states=True)
    assert torch.allclose(states, torch.cat([whole.hidden_states[-1], whole.hidden_states[1]], dim=-1), atol=1e-5)


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 3), (40, 3)])
def test_a_bfloat16_adapter_is_the_merged_model_in_float64(
    folders: list[Path], tiny_folder: Path, rows: int, length: int
) -> None:
    """One token, few and many take different ways; all stay within the rounding of bfloat16, as merging does.

    The difference that the adapter makes is far larger, so that leaving it out would be seen.
    """
    patient = load_model(str(tiny_folder), dtype="bfloat16", device="cpu")
    adapter = Adapter.load(folders[2] / ADAPTER_FOLDER, patient.model)
    spec = LaneSpec(patient.model, None, LogitsHead.for_model(patient.model), None, [None, adapter])
    prompts = [[5, 9, 7 + row][:length] for row in range(rows)]
    bare, ours = Lane(spec, prompts, 1).prefill().double().unflatten(0, (2, -1))
    truth = torch.stack([whole(merged(folders[2], tiny_folder).double(), prompt) for prompt in prompts])
    scale = float(truth.abs().max())
    assert float((ours - truth).abs().max()) < 0.03 * scale
    assert float((bare - truth).abs().max()) > 0.2 * scale


def test_layers_below_the_first_adapted_one_are_kept_once(folders: list[Path], tiny_folder: Path) -> None:
    patient = load(tiny_folder)
    adapter = Adapter.load(folders[1] / ADAPTER_FOLDER, patient.model)
    assert adapter is not None
    assert adapter.first_layer == 1
    lane = Lane(LaneSpec(patient.model, None, LogitsHead.for_model(patient.model), None, [None, adapter]), [[1, 2]], 1)
    lane.prefill()
    rows = [len(layer.keys) for layer in lane._cache.layers]
    assert rows == [1] + [2] * (len(rows) - 1)


@pytest.mark.parametrize("form", ["ratio", "product"])
def test_a_doctor_beside_the_patient_is_one_merged(folders: list[Path], tiny_folder: Path, form: str) -> None:
    """The same tokens and log-probs, two doctors at once, rows with and without them; and one copy of the weights."""
    patient = load(tiny_folder)
    together = [load_guide(folder, patient, name=folder.name, form=form) for folder in folders[:2]]
    assert all(guide.model is patient and guide.adapter for guide in together)
    apart = [
        Guide(
            folder.name,
            Doctor.from_pretrained(folder, base=load(tiny_folder)).merged(),
            "patient" if form == "ratio" else None,
        )
        for folder in folders[:2]
    ]
    requests = [
        Request.from_text(
            "Hello " * (1 + place), betas=betas, sampling=SamplingParams(max_new_tokens=3 + 2 * place, seed=place)
        )
        for place, betas in enumerate([{}, {"0": 1.0}, {"1": 2.0}, {"0": 0.5, "1": -0.5}])
    ]
    with torch.inference_mode(False):
        ours = GuidedDecoder(patient, together).generate(requests)
        theirs = GuidedDecoder(patient, apart).generate(requests)
    for one, other in zip(ours, theirs, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logps == pytest.approx(other.logps, abs=1e-3)
        assert one.guide_forwards == other.guide_forwards


def test_adapters_that_are_more_than_lora_are_merged(tiny_folder: Path, tmp_path: Path) -> None:
    """DoRA's difference depends on the weights: such a doctor gets weights of its own, and guides just as well."""
    with torch.inference_mode(False):
        doctor = shaken(Doctor.from_base(load(tiny_folder), lora={**LORA, "use_dora": True}))
        doctor.save_pretrained(tmp_path / "dora")
        patient = load(tiny_folder)
        guide = load_guide(tmp_path / "dora", patient, name="it", dtype="float32", device="cpu")
        assert guide.adapter is None
        assert guide.model is not patient
        expected = Guide("it", Doctor.from_pretrained(tmp_path / "dora", base=load(tiny_folder)).merged(), "patient")
        request = Request.from_text("Hi", betas={"it": 1.0}, sampling=SamplingParams(max_new_tokens=6))
        found = [GuidedDecoder(patient, [one]).generate([request])[0] for one in (guide, expected)]
    assert found[0].token_ids == found[1].token_ids
    assert found[0].logps == pytest.approx(found[1].logps, abs=1e-4)
