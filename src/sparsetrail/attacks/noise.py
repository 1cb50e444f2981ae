"""Random noise in the ball: the control every gradient attack must beat."""

from sparsetrail.core import Problem, Streams


def noise(p: Problem, g: Streams, *, draws: int = 10, corners: bool = False) -> None:
    """The worst of `draws` random points, uniform in the ball or (`corners`) at its corners."""
    p.losses(p.sample(g, corners=corners) for _ in range(draws))
