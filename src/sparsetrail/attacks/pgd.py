"""Projected gradient descent. Madry et al. 2017, arXiv:1706.06083, sec. 2.1; the paper's eq. 3."""

from sparsetrail.attacks.losses import loss_named
from sparsetrail.core import Problem, Streams, Threat

PACE = 0.01 / (8 / 255)


def own_step(ball: Threat, steps: int) -> float:
    """The length of a step where none is given: 0.01 of the box, or that share of the radius as of 8/255.

    The share where a step of the box would be longer than the radius, in L2, and in a box without ends.
    """
    by_box = ball.norm == "linf" and 0.01 * ball.span <= ball.eps
    return 0.01 * ball.span if by_box else PACE * ball.eps


def pgd(
    p: Problem, g: Streams, *, steps: int = 7, step: float | None = None, restarts: int = 1, loss: str = "ce"
) -> None:
    """`steps` steps of length `step` (input units) in the steepest direction, from `restarts` random starts.

    Defaults are the paper's: 7 steps of 0.01 of the box. In L2, where that is next to nothing, in a box without ends
    and in a ball smaller than such a step, it is the same share of the radius as 0.01 is of 8/255. The best point on
    the way counts, not the last.
    """
    length = own_step(p.ball, steps) if step is None else step
    while restarts > 0:
        with p.restarts(restarts) as (q, played):
            u = q.sample(g)
            for _ in range(steps):
                if q.over:
                    break
                u = q.project(u + length * q.steepest(q.grad(u, loss_named(loss))))
            q.loss(u)
        restarts -= played
