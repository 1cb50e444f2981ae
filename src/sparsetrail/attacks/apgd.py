"""Auto-PGD. Croce & Hein 2020, arXiv:2003.01690, alg. 1; constants and order of operations of its published code."""

from collections.abc import Callable

import torch
from torch import Tensor

from sparsetrail.attacks.losses import LOSSES, TARGETED, loss_named
from sparsetrail.attacks.moves import checkpoints, restarted, surface
from sparsetrail.core import Problem, Streams

Ask = Callable[[Tensor], tuple[Tensor, Tensor]]


def apgd(
    p: Problem,
    g: Streams,
    *,
    steps: int = 100,
    loss: str = "ce",
    restarts: int = 1,
    rho: float = 0.75,
    momentum: float = 0.75,
    targets: int = 9,
) -> None:
    """PGD with momentum whose step halves, from the best point, where fewer than `rho` of a window's steps went up.

    `loss` is ce, margin, dlr, or targeted: then `restarts` for each of the `targets` best wrong classes of the clean
    image (APGD-T). Where we differ: the first window compares its first step with the start, the published code with
    an empty row; losses are safe for ties.
    """
    of = loss_named(loss, LOSSES | TARGETED)
    classes = p.ranked(p.u0, targets) if loss in TARGETED else None
    for q, aim, _ in restarted(p, restarts, classes):
        _climb(q, surface(q, g), steps, lambda u, q=q, aim=aim: q.value_and_grad(u, of, aim), rho, momentum)


def _climb(q: Problem, u: Tensor, steps: int, ask: Ask, rho: float, momentum: float) -> None:
    """One ascent from `u`; `ask` gives the loss per example and its gradient."""
    windows = checkpoints(steps)
    before, (value, grad) = u, ask(u)
    best, top, slope = u, value, grad
    top_then, halved = top, torch.ones_like(top, dtype=torch.bool)
    length, rises = torch.full_like(top, 2 * q.ball.eps), torch.zeros_like(top)
    for i in range(1, steps + 1):
        if q.over:
            break
        share = 1.0 if i == 1 else momentum
        toward = q.project(u + q.each(length) * q.steepest(grad))
        before, u = u, q.project(u + (toward - u) * share + (u - before) * (1 - share))
        if i == steps:
            q.loss(u)  # its gradient is of no use
            return
        last, (value, grad) = value, ask(u)
        rises = rises + (value > last)
        better = value > top
        top = torch.where(better, value, top)
        best, slope = (torch.where(q.each(better), new, old) for new, old in ((u, best), (grad, slope)))
        if i in windows:
            stuck = (rises <= rho * windows[i]) | (~halved & (top_then >= top))
            halved, top_then, rises = stuck, top, torch.zeros_like(rises)
            length = torch.where(stuck, length / 2, length)
            u, grad = (torch.where(q.each(stuck), old, new) for new, old in ((u, best), (grad, slope)))
