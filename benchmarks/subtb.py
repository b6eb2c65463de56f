"""How fast and how exact is the loss over all sub-trajectories?

    python -m benchmarks.subtb [--quick] [--output benchmarks/results/subtb.json]

Forward and backward of `subtb_loss` at batch 8: growth from 1,024 to 32,768 states, relative error against a float64
double loop over all m < n, and the speed-up over that double loop written with Python indexing, as public code does it.
The peer runs in the same process, on the same numbers, and from ready-made potentials, so only the sum over
sub-trajectories is compared: `speedup_128` with the whole batch at once, which takes responses of one length;
`speedup_128_each` response by response, as lengths that differ make it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.record import record
from llmdoctor.tfpo.losses import subtb_loss

BATCH = 8
LAMBDAS = (1.0, 0.9)


def double_loop(potential: Tensor, subtb_lambda: float) -> Tensor:
    """[B, N] -> [B]: the definition, one sub-trajectory at a time."""
    total = torch.zeros((), dtype=potential.dtype)
    weights = 0.0
    for m in range(potential.shape[1]):
        for n in range(m + 1, potential.shape[1]):
            weight = subtb_lambda ** (n - m)
            total = total + weight * (potential[:, n] - potential[:, m]) ** 2
            weights += weight
    return total / weights


def random_walk(states: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, N] potentials that drift as an untrained doctor's do: a nat or so a token."""
    generator = torch.Generator().manual_seed(states)
    steps = 0.5 + torch.randn(BATCH, states, generator=generator, dtype=torch.float64)
    return steps.cumsum(-1).to(dtype).requires_grad_()


def closed_form(subtb_lambda: float) -> Callable[[Tensor], Tensor]:
    return lambda g: subtb_loss(g, torch.ones_like(g, dtype=torch.bool), subtb_lambda)


def seconds(loss: Callable[[Tensor], Tensor], potential: Tensor, budget: float) -> float:
    """Fastest forward and backward pass of as many as fit `budget` seconds, at least 3."""
    best, passes = float("inf"), 0
    end = time.perf_counter() + budget
    while passes < 3 or time.perf_counter() < end:
        passes += 1
        potential.grad = None
        start = time.perf_counter()
        loss(potential).sum().backward()
        best = min(best, time.perf_counter() - start)
    return best


def relative_error(states: int, subtb_lambda: float) -> float:
    """Worst relative error of value and gradient in float32, against the double loop in float64."""
    ours, truth = random_walk(states), random_walk(states, torch.float64)
    value, expected = closed_form(subtb_lambda)(ours), double_loop(truth, subtb_lambda)
    value.sum().backward()
    expected.sum().backward()
    assert ours.grad is not None
    assert truth.grad is not None
    gradient = (ours.grad - truth.grad).abs().max() / truth.grad.abs().max()
    return max(float(((value - expected) / expected).detach().abs().max()), float(gradient))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less time for each number; within a minute")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    budget = 0.5 if arguments.quick else 3.0
    lengths = (128, 1024, 4096, 32768)
    heads = " ".join(f"{f'L={length:,}':>11}" for length in lengths)
    rows = []
    print(f"{'λ':>4} {heads} {'32k/1k':>8} {'rel. error':>11}")
    for subtb_lambda in LAMBDAS:
        loss = closed_form(subtb_lambda)
        times = {length: seconds(loss, random_walk(length + 1), budget) for length in lengths}
        row = {
            "subtb_lambda": subtb_lambda,
            "seconds": times,
            "growth_1k_32k": times[32768] / times[1024],
            "relative_error": max(relative_error(states, subtb_lambda) for states in (2, 33, 129)),
        }
        rows.append(row)
        cells = " ".join(f"{1e3 * times[length]:>8.2f} ms" for length in lengths)
        print(f"{subtb_lambda:>4} {cells} {row['growth_1k_32k']:>7.1f}× {row['relative_error']:>11.1e}", flush=True)
    speedups = {}
    for name, how, loop in (
        ("speedup_128", "the batch at once", lambda g: double_loop(g, 1.0)),
        ("speedup_128_each", "response by response", lambda g: torch.cat([double_loop(r, 1.0) for r in g.split(1)])),
    ):
        taken = seconds(loop, random_walk(129), budget)
        speedups[name] = taken / rows[0]["seconds"][128]
        print(
            f"double loop with Python indexing at L=128, {how}: {taken:.2f} s, "
            f"{speedups[name]:,.0f} times the closed form's"
        )
    result = {
        "benchmark": "subtb",
        "quick": arguments.quick,
        "batch": BATCH,
        "growth_1k_32k": max(row["growth_1k_32k"] for row in rows),
        "relative_error": max(row["relative_error"] for row in rows),
        **speedups,
        "rows": rows,
    }
    record(result, arguments.output)


if __name__ == "__main__":
    main()
