"""The distillation losses against float64 references, and their gradients against autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmdoctor.models import logps
from llmdoctor.models.draft import CutHead
from llmdoctor.models.logps import LogitsFinish, LogitsHead
from llmdoctor.shrink.losses import distillation_loss, log_normalisers, loss_and_gradient, mean_overlap, overlap

WEIGHTS = (0.0, 0.3, 1.0)


def reference(logits: Tensor, teacher_logits: Tensor, tv_weight: float) -> Tensor:
    """[M] the loss as its definition has it, position by position, in float64."""
    losses = []
    for z, t in zip(logits.double(), teacher_logits.double(), strict=True):
        p, q = t.exp() / t.exp().sum(), z.exp() / z.exp().sum()
        kl = sum(p[v] * torch.log(p[v] / q[v]) for v in range(len(z)))
        tv = 0.5 * (p - q).abs().sum()
        losses.append((1 - tv_weight) * kl + tv_weight * tv)
    return torch.stack(losses)


def some_logits(rows: int = 7, vocabulary: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(rows, vocabulary, generator=generator)
    return z, 3 * torch.randn(rows, vocabulary, generator=generator)


@pytest.mark.parametrize("tv_weight", WEIGHTS)
def test_loss_and_gradient(tv_weight: float) -> None:
    z, t = some_logits()
    exact = z.double().requires_grad_()
    expected = reference(exact, t, tv_weight)
    expected.sum().backward()  # type: ignore[no-untyped-call]
    loss, gradient = loss_and_gradient(z, t, tv_weight)
    assert loss.dtype == gradient.dtype == torch.float32
    assert torch.allclose(loss.double(), expected, atol=1e-5)
    assert torch.allclose(gradient.double(), exact.grad, atol=1e-5)


def test_half_and_half_by_hand() -> None:
    """p = (¾, ¼), q = (½, ½): Σ min = ½ + ¼ = ¾, KL = ¾ log(3/2) + ¼ log(1/2) = ¾ log 3 − log 2."""
    p, q = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    accepted, kl, _ = overlap(q, p)
    assert accepted.item() == pytest.approx(0.75, abs=1e-6)
    assert kl.item() == pytest.approx(0.1308121, abs=1e-6)
    assert loss_and_gradient(q, p, 1.0)[0].item() == pytest.approx(0.25, abs=1e-6)


def test_equal_distributions_and_far_apart_ones() -> None:
    z, _ = some_logits()
    accepted, kl, _ = overlap(z, z + 5)
    assert torch.allclose(accepted, torch.ones(7))
    assert torch.allclose(kl, torch.zeros(7), atol=1e-5)
    far = torch.tensor([[0.0, 200.0]])
    for tv_weight in WEIGHTS:
        loss, gradient = loss_and_gradient(far, far.flip(-1), tv_weight)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("finish", [None, LogitsFinish(scale=0.5, cap=4.0)])
@pytest.mark.parametrize("tv_weight", WEIGHTS)
def test_chunked_equals_whole(tv_weight: float, finish: LogitsFinish | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three positions at a time, the last chunk a single one, against autograd through all logits at once."""
    generator = torch.Generator().manual_seed(1)
    linear = nn.Linear(6, 11, bias=False).requires_grad_(False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(11, 6, generator=generator))
    head = LogitsHead(linear, finish)
    hidden = torch.randn(7, 6, generator=generator).requires_grad_()
    teacher = torch.randn(7, 6, generator=generator)
    weights = torch.arange(1.0, 8.0)
    whole = reference(head.logits(hidden), head.logits(teacher), tv_weight)
    (whole * weights).sum().backward()
    expected, hidden.grad = hidden.grad, None
    monkeypatch.setattr(logps, "CPU_CHUNK_ELEMENTS", 3 * 11)
    loss = distillation_loss(hidden, teacher, head, tv_weight)
    (loss * weights).sum().backward()
    assert torch.allclose(loss.double(), whole, atol=1e-5)
    assert torch.allclose(hidden.grad, expected, atol=1e-5)
    z, t = head.logits(hidden.detach()), head.logits(teacher)
    accepted, kl, mass = mean_overlap(hidden.detach(), teacher, head)
    assert accepted == pytest.approx(7 - float(reference(z, t, 1.0).sum()), abs=1e-4)
    assert kl == pytest.approx(float(reference(z, t, 0.0).sum()), abs=1e-4)
    assert mass == pytest.approx(7, abs=1e-4)


def test_logits_live_no_longer_than_their_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of the head sees more positions than a chunk has."""
    linear = nn.Linear(4, 10, bias=False).requires_grad_(False)
    head, seen = LogitsHead(linear), []
    plain = head.logits
    monkeypatch.setattr(head, "logits", lambda hidden: seen.append(len(hidden)) or plain(hidden))
    monkeypatch.setattr(logps, "CPU_CHUNK_ELEMENTS", 2 * 10)
    loss = distillation_loss(torch.randn(5, 4).requires_grad_(), torch.randn(5, 4), head)
    assert (loss.shape, max(seen), sum(seen)) == ((5,), 2, 10)
    assert distillation_loss(torch.zeros(0, 4).requires_grad_(), torch.zeros(0, 4), head).shape == (0,)


# A cut vocabulary: the student has a head for some tokens only, and p is what the teacher gives them.

CUT = torch.tensor([1, 2, 5, 6, 10])


@pytest.mark.parametrize("tv_weight", WEIGHTS)
def test_loss_and_gradient_of_a_cut_vocabulary(tv_weight: float) -> None:
    """In float64 from the definition: q over the cut alone, p over all and then the cut's."""
    z, t = some_logits()
    exact = z[:, CUT].double().requires_grad_()
    p, q = t.double().softmax(-1)[:, CUT], exact.softmax(-1)
    tv = (p - q).clamp(min=0).sum(-1)
    expected = (1 - tv_weight) * (p * (p / q).log()).sum(-1) + tv_weight * tv
    expected.sum().backward()  # type: ignore[no-untyped-call]
    loss, gradient = loss_and_gradient(z[:, CUT], t[:, CUT], tv_weight, t.logsumexp(-1))
    assert torch.allclose(loss.double(), expected, atol=1e-5)
    assert torch.allclose(gradient.double(), exact.grad, atol=1e-5)
    accepted, nats, mass = overlap(z[:, CUT], t[:, CUT], t.logsumexp(-1))
    assert torch.allclose(mass.double(), p.sum(-1), atol=1e-6)
    assert torch.allclose(accepted.double(), p.sum(-1) - tv, atol=1e-6), "what is not accepted is cut, or TV"
    assert torch.allclose(nats.double(), (p * (p / q).log()).sum(-1), atol=1e-5)


@pytest.mark.parametrize("tv_weight", WEIGHTS)
def test_a_cut_that_leaves_nothing_out_is_none(tv_weight: float) -> None:
    z, t = some_logits()
    for cut, whole in zip(
        loss_and_gradient(z, t, tv_weight, t.logsumexp(-1)), loss_and_gradient(z, t, tv_weight), strict=True
    ):
        assert torch.allclose(cut, whole, atol=1e-6)


@pytest.mark.parametrize("finish", [None, LogitsFinish(scale=0.5, cap=4.0)])
def test_a_cut_head_in_chunks(finish: LogitsFinish | None, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    linear = nn.Linear(6, 11).requires_grad_(False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(11, 6, generator=generator))
    head = LogitsHead(linear, finish)
    cut = CutHead(head, CUT)
    hidden = torch.randn(7, 6, generator=generator).requires_grad_()
    teacher = torch.randn(7, 6, generator=generator)
    q, p = head.logits(hidden)[:, CUT].softmax(-1), head.logits(teacher).softmax(-1)[:, CUT]
    whole = 0.5 * (p * (p / q).log()).sum(-1) + 0.5 * (p - q).clamp(min=0).sum(-1)
    whole.sum().backward()
    expected, hidden.grad = hidden.grad, None
    monkeypatch.setattr(logps, "CPU_CHUNK_ELEMENTS", 3 * 5)
    normalisers = log_normalisers(teacher, head)
    assert torch.allclose(normalisers, head.logits(teacher).logsumexp(-1))
    loss = distillation_loss(hidden, teacher, cut, 0.5, normalisers)
    loss.sum().backward()
    assert torch.allclose(loss, whole, atol=1e-5)
    assert torch.allclose(hidden.grad, expected, atol=1e-5)
    accepted, _, mass = mean_overlap(hidden.detach(), teacher, cut, normalisers)
    assert accepted == pytest.approx(float(torch.minimum(p, q).detach().sum()), abs=1e-5)
    assert mass == pytest.approx(float(p.sum()), abs=1e-5)
    assert log_normalisers(teacher[:0], head).shape == (0,)
