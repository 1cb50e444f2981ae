"""Fast gradient sign method. Goodfellow et al. 2014, arXiv:1412.6572; the paper's eq. 2."""

from sparsetrail.attacks.losses import loss_named
from sparsetrail.core import Problem, Streams


def fgsm(p: Problem, g: Streams, *, loss: str = "ce") -> None:
    """One step of length eps in the steepest direction (the sign of the gradient in L-infinity); no random start."""
    p.loss(p.project(p.u0 + p.ball.eps * p.steepest(p.grad(p.u0, loss_named(loss)))))
