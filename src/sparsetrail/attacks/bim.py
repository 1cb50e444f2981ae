"""Basic iterative method. Kurakin et al. 2016, arXiv:1607.02533, sec. 2.2."""

from sparsetrail.attacks.losses import loss_named
from sparsetrail.core import Problem, Streams, Threat


def own_step(ball: Threat, steps: int) -> float:
    """The length of a step where none is given: the radius in equal parts."""
    return ball.eps / steps


def bim(p: Problem, g: Streams, *, steps: int = 10, step: float | None = None, loss: str = "ce") -> None:
    """`steps` steps of length `step` (input units; eps / steps if not given) from the clean point."""
    length = own_step(p.ball, steps) if step is None else step
    u = p.u0
    for _ in range(steps):
        u = p.project(u + length * p.steepest(p.grad(u, loss_named(loss))))
    p.loss(u)
