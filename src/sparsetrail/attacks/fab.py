"""FAB. Croce & Hein 2020, arXiv:1907.02044, alg. 1; constants and order of operations of its published code."""

import torch
from torch import Tensor

from sparsetrail._shapes import Float, Int
from sparsetrail.attacks.moves import restarted, surface
from sparsetrail.core import Problem, Streams, Threat


def fab(
    p: Problem,
    g: Streams,
    *,
    steps: int = 100,
    targets: int = 9,
    restarts: int = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
) -> None:
    """Onto the linearised boundary, where it is nearest: FAB-T, towards the `targets` best wrong classes of each image.

    Every step mixes the way to the boundary from the iterate with that from the image (at most `alpha_max` of it), both
    `eta` times as long; an iterate that fools goes back to `beta` of its distance. Iterates leave the ball, only those
    in it count: an image close to a boundary is found without a step size, and whatever the scale of the scores. For
    L-infinity and L2 balls. Where we differ: an image is left at its first point in the ball instead of seeking the
    nearest; at the end the way of the last iterate is asked about as far as the ball goes, since of an image of 256
    levels the nearest point, rounded, seldom fools; later restarts begin half way to the surface of the ball, cut to
    the box before, not after.
    """
    if p.ball.norm == "l0":
        raise ValueError(f"fab: expected an L-infinity or L2 ball, got {p.ball}; use sda")
    for q, aim, restart in restarted(p, restarts, p.ranked(p.u0, targets)):
        u = q.u0
        if restarts > 1:
            u = torch.where(q.each(restart > 0), (u + surface(q, g)) / 2, u)
        _approach(q, u, aim, steps, alpha_max, eta, beta)


def _approach(
    q: Problem, u: Tensor, aim: Int[Tensor, " n"], steps: int, alpha_max: float, eta: float, beta: float
) -> None:
    axis, (lo, hi), everyone = q.axis, q.ball.box, torch.ones_like(q.fooled)
    image = q.u0.movedim(axis, 0)
    u0 = image.flatten(1)
    for _ in range(steps):
        if q.over:
            return
        lead, grad = (t.nan_to_num(0.0, 0.0, 0.0) for t in q.value_and_grad(u, _lead, aim, outside=True))
        at, w = u.movedim(axis, 0).flatten(1), grad.movedim(axis, 0).flatten(1)
        own = nearest(at, w, -lead, q.ball)
        back = nearest(u0, w, (w * (at - u0)).sum(1) - lead, q.ball)
        far, near = (_length(d, q.ball).clamp(min=1e-8) for d in (own, back))
        alpha = (far / (far + near)).clamp(max=alpha_max)[:, None]
        at = ((at + eta * own) * (1 - alpha) + (u0 + eta * back) * alpha).clamp(lo, hi)
        fooled = q.decides(at.view(image.shape).movedim(0, axis), everyone)
        u = torch.where(fooled[:, None], u0 + beta * (at - u0), at).view(image.shape).movedim(0, axis)
    way = u - q.u0
    size = _length(way.movedim(axis, 0).flatten(1), q.ball)
    q.loss(q.project(q.u0 + way * q.each(q.ball.eps / size.clamp(min=1e-30))))


def nearest(
    u: Float[Tensor, "n d"], w: Float[Tensor, "n d"], need: Float[Tensor, " n"], ball: Threat
) -> Float[Tensor, "n d"]:
    """The shortest move, in the norm of the ball, by which `w` gains `need` within the box; all the way if it cannot.

    Croce & Hein 2020, eq. 4. Every entry moves at its own pace (one in L-infinity, |w| in L2) until it meets the box.
    How long they move follows from those that met it; each round that finds more of them is a longer time, and the
    last round's is exact.
    """
    lo, hi = ball.box
    way, size = w.sign() * need.sign()[:, None], w.abs().amax(1)
    slope = w.abs() / torch.where(size > 0, size, 1.0)[:, None]
    need = torch.where(size > 0, need.abs() / size, 0.0).double()
    room = torch.where(way > 0, hi - u, u - lo)
    pace = slope if ball.norm == "l2" else (slope > 0).to(u)
    gain, most = slope * pace, slope * room  # of an entry per unit of time, and in all
    time = torch.zeros_like(need)
    while True:
        met = room <= time.to(u)[:, None] * pace
        rest = torch.where(met, 0.0, gain).sum(1, dtype=torch.float64)
        done = torch.where(met, most, 0.0).sum(1, dtype=torch.float64)
        longer = torch.where(rest > 0, (need - done) / rest, 1e30).clamp(max=1e30)
        if not bool((longer.to(u) > time.to(u)).any()):
            return way * torch.where(met, room, time.to(u)[:, None] * pace)
        time = torch.maximum(time, longer)


def _lead(z: Tensor, y: Tensor, aim: Tensor) -> Tensor:
    gap = z.gather(1, torch.stack([aim, y], 1))
    return gap[:, 0] - gap[:, 1]


def _length(d: Tensor, ball: Threat) -> Tensor:
    return d.norm(dim=1) if ball.norm == "l2" else d.abs().amax(1)
