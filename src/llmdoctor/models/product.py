"""Products with weights that do not change: on a CPU, from a copy that is laid out once as its matrix units read it."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

_MOST_ROWS = 256
"""Of more rows at once, rearranging the weight is too little of the work to save."""

_SAMPLED = 16
"""Rows of a weight that are compared to find out whether it has changed."""

_ROOM = 2
"""So many times a copy's size must be free for it to be made."""

_CGROUP = Path("/sys/fs/cgroup")

_log = logging.getLogger(__name__)


class Product:
    """x ↦ x Wᵀ + b.

    torch's own product of bfloat16 matrices has oneDNN rearrange W in every call, which for a few rows costs more than
    multiplying. Where the processor has AVX-512 or AMX a rearranged copy is kept beside W. Numbers are the same either
    way; how much faster it is says `benchmarks/decoding.py`.

    Args:
        weight: W [out, in].
        bias: b [out].
        lay_out: whether to keep such a copy, where it helps.

    Attributes:
        weight: W.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, lay_out: bool = True) -> None:
        self.weight, self._bias = weight.detach(), None if bias is None else bias.detach()
        self._laid_out: Tensor | None = None
        if lay_out and can_lay_out(weight):
            self._laid_out = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            self._sample = self._rows().clone()

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self._laid_out is None or torch.is_grad_enabled() or not 0 < x.numel() <= _MOST_ROWS * x.shape[-1]:
            return F.linear(x, self.weight, self._bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._laid_out, self._bias, "none", [], "")
        return product

    @property
    def laid_out(self) -> bool:
        """Whether there is such a copy."""
        return self._laid_out is not None

    @property
    def outdated(self) -> bool:
        """Whether W was changed in place since its copy was made, as merging an adapter or a training step changes it.

        A few rows are compared: PEFT merges without torch's count of changes seeing it (`version`), but into all rows.
        """
        return self._laid_out is not None and not torch.equal(self._rows(), self._sample)

    def _rows(self) -> Tensor:
        return self.weight[:: max(1, len(self.weight) // _SAMPLED)]


def product_of(linear: nn.Linear) -> Product:
    """The product with a layer's weights as they are now; made once while they stay the same."""
    state = version(linear.weight), version(linear.bias)
    known = _PRODUCTS.get(linear)
    if known is None or known[0] != state or known[1].outdated:
        lay_out = can_lay_out(linear.weight) and has_room(linear.weight.nbytes)
        known = _PRODUCTS[linear] = state, Product(linear.weight, linear.bias, lay_out=lay_out)
    return known[1]


_PRODUCTS: weakref.WeakKeyDictionary[nn.Linear, tuple[object, Product]] = weakref.WeakKeyDictionary()


_CAPTURING = "transformers.utils.output_capturing"


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module does what its class says: no hooks, no method replaced on the instance.

    As accelerate does it to move weights, and tests do; it must be heard. What transformers leaves behind in a model
    that was once asked for `output_hidden_states` only listens while it is asked again.
    """
    hooks = [hook for hook in module._forward_hooks.values() if getattr(hook, "__module__", "") != _CAPTURING]
    return not (hooks or module._forward_pre_hooks or "forward" in vars(module))


def version(tensor: Tensor | None) -> tuple[int, int] | None:
    """What changes whenever a tensor is replaced or changed in place (but for changes to its `.data`)."""
    if tensor is None:
        return None
    try:
        return tensor.data_ptr(), tensor._version
    except RuntimeError:
        # Nobody counts what happens to tensors that were made in inference mode.
        return tensor.data_ptr(), 0


def can_lay_out(weight: Tensor) -> bool:
    """Whether a rearranged copy of such a weight makes its product faster here."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() in ("AVX512", "AMX")
    )


def has_room(size: int) -> bool:
    """Whether the machine, or the container, has so many bytes to spare and as many again; says so where not."""
    if free_memory() >= _ROOM * size:
        return True
    _log.info("Too little memory is free for a second copy of the weights: decoding takes up to a third longer.")
    return False


def free_memory() -> int:
    """Bytes that the machine, or the container, has free."""
    free = int(psutil.virtual_memory().available)
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return free
