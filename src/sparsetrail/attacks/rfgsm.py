"""FGSM behind a random step. Tramer et al. 2018, arXiv:1705.07204, sec. 4.1 (RAND+FGSM)."""

from sparsetrail.attacks.losses import loss_named
from sparsetrail.core import Problem, Streams


def rfgsm(p: Problem, g: Streams, *, share: float = 0.5, loss: str = "ce", restarts: int = 1) -> None:
    """A random step to a corner, of `share` of the radius, then one gradient step of the rest."""
    while restarts > 0:
        with p.restarts(restarts) as (q, played):
            first = share * q.ball.eps
            u = q.project(q.u0 + first * q.steepest(q.noise(g)))
            q.loss(q.project(u + (q.ball.eps - first) * q.steepest(q.grad(u, loss_named(loss)))))
        restarts -= played
