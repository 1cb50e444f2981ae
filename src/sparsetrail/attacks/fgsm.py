"""Fast gradient sign method. Goodfellow et al. 2014, arXiv:1412.6572; the paper's eq. 2."""

from sparsetrail.core import Problem, Streams


def fgsm(p: Problem, g: Streams) -> None:
    """One step of length eps along the sign of the gradient; no random start."""
    p.loss(p.project(p.u0 + p.ball.eps * p.grad(p.u0).sign()))
