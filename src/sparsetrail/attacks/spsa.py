"""SPSA. Uesato et al. 2018, arXiv:1802.05666, alg. 1: a gradient from differences of scores, followed by Adam."""

import math

import torch

from sparsetrail.core import Problem, Streams


def spsa(
    p: Problem,
    g: Streams,
    *,
    steps: int = 100,
    samples: int = 128,
    delta: float | None = None,
    step: float | None = None,
    restarts: int = 1,
) -> None:
    """`steps` Adam steps of length about `step` on the margin, each from `samples` pairs of points at +-`delta`.

    Lengths in input units, by default 0.01 of the box, or a quarter of the radius in a box without ends. Where we
    differ: both points of a pair are projected first, so that no query leaves the ball, and their true difference is
    what the change of the margin multiplies: in the mean that never points downhill. Adam runs in float64 without its
    1e-8, which would hold small margins still.
    """
    if p.ball.norm == "l0":
        raise ValueError(f"spsa: expected an L-infinity or L2 ball, got {p.ball}; use sda or sparse_rs")
    length = 0.01 * p.ball.span if p.ball.span < math.inf else p.ball.eps / 4
    delta, step = length if delta is None else delta, length if step is None else step
    for _ in range(restarts):
        u, mean, square = p.sample(g), torch.zeros_like(p.u0).double(), torch.zeros_like(p.u0).double()
        for i in range(1, steps + 1):
            if p.over:
                return
            d, done = torch.zeros_like(mean), 0
            while done < samples:
                count = min(max(1, p.room // 2), samples - done)
                signs = [torch.where(p.noise(g) < 0, -1.0, 1.0) for _ in range(count)]
                pairs = [p.project(u + side * delta * v) for v in signs for side in (1, -1)]
                m = p.losses(pairs).double()
                rise = (m[::2] - m[1::2]).nan_to_num(0.0, 0.0, 0.0)  # a margin of -inf compares with nothing
                for k in range(count):
                    d += p.each(rise[k]) * (pairs[2 * k] - pairs[2 * k + 1])
                done += count
            mean, square = 0.9 * mean + 0.1 * d, 0.999 * square + 0.001 * d.square()
            root = (square / (1 - 0.999**i)).sqrt()
            move = mean / (1 - 0.9**i) / torch.where(root > 0, root, 1.0)
            u = p.project(u + (step * move).to(u.dtype))
        p.loss(u)
