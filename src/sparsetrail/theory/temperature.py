"""Sparsity and robustness from rounding alone: the same classifier, its logits multiplied by a number."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrail._shapes import Float, Int
from sparsetrail.attacks import attack, pgd
from sparsetrail.core import Problem, Rate, Streams, Threat, Victim


@dataclass(frozen=True, kw_only=True)
class Temperature:
    """One scale of the logits: `density` of the float32 gradient of the probability, images without any, and accuracy
    left by PGD with plain cross-entropy and with the margin. Decisions, so true robustness, are those of scale 1."""

    scale: float
    density: float
    all_zero: Rate
    clean: Rate
    plain: Rate
    margin: Rate


def temperature_probe(
    victim: Victim,
    threat: Threat,
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    *,
    scales: Sequence[float] = (0.1, 1.0, 10.0, 100.0, 1000.0),
    steps: int = 7,
    seed: int = 0,
    batch: int = 64,
) -> tuple[Temperature, ...]:
    """Multiply the logits of `victim` by each of `scales` and attack by PGD, steps of eps / 4, each loss in turn.

    Float32 gradients of a confident softmax are exactly zero from a lead of 17 on: plain cross-entropy then finds
    nothing and the accuracy left rises, while the margin, whose gradient cannot saturate, finds the same as before.
    """
    rows, step = [], threat.eps / 4
    for c in scales:
        v = replace(
            victim,
            logits=_times(victim.logits, c),
            exact=victim.exact and _times(victim.exact, c),
            shortcut=victim.shortcut and _times(victim.shortcut, c),
            rewire=None,
            memory=None,
        )
        plain = attack(_plain_pgd, v, threat, x, y, steps=steps, step=step, seed=seed, batch=batch)
        real = attack(pgd, v, threat, x, y, steps=steps, step=step, loss="margin", seed=seed, batch=batch)
        nonzero = entries = dead = 0
        for i in range(0, len(y), batch):
            u = x[i : i + batch] if threat.space == "pixel" else victim.encode(x[i : i + batch]).detach().contiguous()
            g = _float32_gradient(v, threat, u, y[i : i + batch]) != 0
            nonzero, entries = nonzero + int(g.sum()), entries + g.numel()
            dead += int((~g.movedim(threat.axis, 0).flatten(1).any(1)).sum())
        rows.append(
            Temperature(
                scale=c,
                density=nonzero / entries,
                all_zero=Rate(dead, len(y)),
                clean=real.clean_accuracy,
                plain=plain.accuracy,
                margin=real.accuracy,
            )
        )
    return tuple(rows)


def _times(f: Callable[[Tensor], Tensor], c: float) -> Callable[[Tensor], Tensor]:
    return lambda u: c * f(u)


def _float32_gradient(v: Victim, threat: Threat, u: Tensor, y: Tensor) -> Tensor:
    u = u.detach().requires_grad_()
    with torch.enable_grad():
        p = v.of(threat.space)(u).softmax(1).gather(1, y[:, None])
        return torch.autograd.grad(p.sum(), u)[0]


def _plain_pgd(p: Problem, g: Streams, *, steps: int, step: float) -> None:
    """PGD on cross-entropy as most libraries differentiate it: from a lead of 17 on its float32 gradient is zero."""
    u = p.sample(g)
    for _ in range(steps):
        u = p.project(u + step * p.steepest(p.grad(u, _plain)))
    p.loss(u)


def _plain(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")
