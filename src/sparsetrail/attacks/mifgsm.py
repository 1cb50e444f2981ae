"""Momentum iterative FGSM. Dong et al. 2018, arXiv:1710.06081, alg. 1."""

import torch

from sparsetrail.attacks.bim import own_step
from sparsetrail.attacks.losses import loss_named
from sparsetrail.attacks.moves import by_mean
from sparsetrail.core import Problem, Streams


def mifgsm(
    p: Problem, g: Streams, *, steps: int = 10, step: float | None = None, decay: float = 1.0, loss: str = "ce"
) -> None:
    """`steps` steps along a running sum of gradients, each over its L1 norm; `step` in input units, or eps / steps.

    The gradient is rescaled by its largest entry before it is normalised, so that a tiny one still moves and a zero one
    adds nothing, where the published division gives NaN.
    """
    length = own_step(p.ball, steps) if step is None else step
    u, sum_of = p.u0, torch.zeros_like(p.u0)
    for _ in range(steps):
        sum_of = decay * sum_of + by_mean(p.grad(u, loss_named(loss)), p.axis)
        u = p.project(u + length * p.steepest(sum_of))
    p.loss(u)
