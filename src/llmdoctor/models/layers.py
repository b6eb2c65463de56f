"""Some layers of a model as a model of its own."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmdoctor.errors import UserError


def decoder_layers(model: Any) -> nn.ModuleList:
    """The layers of a decoder-only transformer; UserError where they are not in `get_decoder().layers`."""
    layers = getattr(model.get_decoder(), "layers", None)
    config = model.config
    if not isinstance(layers, nn.ModuleList) or len(layers) != getattr(config, "num_hidden_layers", None):
        raise UserError(
            f"{type(model).__name__} cannot be shrunk: its layers are not one list in get_decoder().layers, counted by "
            "num_hidden_layers in its config"
        )
    return layers


@contextmanager
def tapped(decoder: Any, numbers: Sequence[int]) -> Iterator[list[Tensor]]:
    """While it lasts, what the layers of these numbers put out is appended to the list, in the order of the layers."""
    taken: list[Tensor] = []
    hooks = [
        decoder.layers[number].register_forward_hook(
            lambda layer, given, output: taken.append(output[0] if isinstance(output, tuple) else output)
        )
        for number in sorted(numbers)
    ]
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()


def choose_layers(total: int, count: int) -> list[int]:
    """`count` of `total` layers: the first ones and the last.

    The first layers turn tokens into states and the last one turns states into logits; between them a layer changes its
    input little, and distillation makes up for it soonest.
    """
    if not 1 <= count < total:
        raise UserError(f"layers must be at least 1 and fewer than the {total} there are, got {count}")
    return [*range(count - 1), total - 1]


def lower_layers(total: int, count: int) -> list[int]:
    """`count` of `total` layers below the last, at even distances; all of them where they are fewer."""
    count = min(count, total - 1)
    return [total * number // (count + 1) - 1 for number in range(1, count + 1)]


def parse_layers(text: str, total: int) -> list[int]:
    """Layers by number, such as `0,1,2,29`; UserError unless they are some of `total`, in order, and not all."""
    words = text.split(",")
    if not all(re.fullmatch(r"\s*\d+\s*", word) for word in words):
        raise UserError(f"keep must be layer numbers with commas between them, such as 0,1,2,29, got {text!r}")
    kept = [int(word) for word in words]
    if sorted(set(kept)) != kept or kept[-1] >= total or len(kept) >= total:
        raise UserError(f"keep must be ascending numbers from 0 to {total - 1}, not all of them, got {text!r}")
    return kept


def keep_layers(model: PreTrainedModel, kept: Sequence[int], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A new model with the layers `kept` of `model` and all that is not a layer, its weights copies in `dtype`.

    Raises:
        UserError: the layers are not in `get_decoder().layers`, or are of kinds that the smaller config does not give.
    """
    small = cast_weights(type(model)(small_config(model.config, kept)).to(model.device), dtype)
    copy_kept(model, small, kept)
    small.generation_config = copy.deepcopy(model.generation_config)
    return small


def copy_kept(model: Any, small: Any, kept: Sequence[int]) -> None:
    """Give `small`, of the class of `model`, the weights of the layers `kept` and of all that is not a layer.

    Raises:
        UserError: as `keep_layers`.
    """
    if getattr(model, "is_quantized", False):
        raise UserError(
            f"{type(model).__name__} is quantised, and layers are trained from weights that are not: load it in half "
            "precision for this"
        )
    layers = decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    places = {old: new for new, old in enumerate(kept)}
    weights = {}
    for name, tensor in model.state_dict().items():
        found = re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.(.*)", name)
        if found is None:
            weights[name] = tensor
        elif int(found[1]) in places:
            weights[f"{prefix}.{places[int(found[1])]}.{found[2]}"] = tensor
    try:
        small.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"{type(model).__name__} cannot be shrunk to the layers {', '.join(map(str, kept))}: its layers are of "
            "several kinds, and a smaller model would have other ones in their places"
        ) from error


def cast_weights(model: Any, dtype: torch.dtype) -> Any:
    """The model with its weights in `dtype`, in place; as loaded models have it, rotary frequencies keep float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def merge_adapter(model: Any) -> Any:
    """A PEFT model's base with the adapter folded into its weights, in float32 layer by layer, rounded once.

    All layers at once would take another two copies of the model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            weights = list(module.get_base_layer().parameters())
            dtypes = [weight.dtype for weight in weights]
            for weight in weights:
                weight.data = weight.data.float()
            module.merge()
            for weight, dtype in zip(weights, dtypes, strict=True):
                weight.data = weight.data.to(dtype)
    with warnings.catch_warnings():
        # That all is merged already.
        warnings.simplefilter("ignore")
        return model.merge_and_unload()


def small_config(config: Any, kept: Sequence[int]) -> Any:
    """`config` for the layers `kept` alone; what it lists layer by layer (`layer_types`, …) is cut to them."""
    total = config.num_hidden_layers
    small = copy.deepcopy(config)
    for name, value in vars(config).items():
        # A list of as many token ids would be a coincidence.
        if isinstance(value, list | tuple) and len(value) == total and "token" not in name and name != "architectures":
            setattr(small, name, [value[layer] for layer in kept])
    small.num_hidden_layers = len(kept)
    return small


def weights_read(model: Any) -> int:
    """Weights that one decoding step reads: all but an input embedding that is not the head, too."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    total = sum(parameter.numel() for parameter in model.parameters())
    return total if head is None or head.weight is embedding.weight else total - embedding.weight.numel()
