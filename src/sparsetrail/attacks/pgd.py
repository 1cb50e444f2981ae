"""Projected gradient descent. Madry et al. 2017, arXiv:1706.06083, sec. 2.1; the paper's eq. 3."""

from sparsetrail.attacks.losses import loss_named
from sparsetrail.core import Problem, Streams


def pgd(p: Problem, g: Streams, *, steps: int = 7, step: float = 0.01, restarts: int = 1, loss: str = "ce") -> None:
    """`steps` steps of length `step` (input units) in the steepest direction, from `restarts` random starts.

    Defaults are the paper's. The best point on the way counts, not the last.
    """
    while restarts > 0:
        with p.restarts(restarts) as (q, played):
            u = q.sample(g)
            for _ in range(steps):
                if q.over:
                    break
                u = q.project(u + step * q.steepest(q.grad(u, loss_named(loss))))
            q.loss(u)
        restarts -= played
