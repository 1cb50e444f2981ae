"""Sparse-gradient regularisation. Liu et al. 2024, arXiv:2405.20355."""

import math

import torch
from torch import Tensor, nn

from sparsetrail._shapes import Float, Int
from sparsetrail.defend.crafting import attacked, scored
from sparsetrail.defend.settings import check_count, check_positive, check_radius, check_reached, check_strength, paired
from sparsetrail.snn.encode import Encoder
from sparsetrail.training import Seams


def sr(*, weight: float = 0.004, h: float = 0.01, eps: float = 0.0, steps: int = 2, step: float = 1 / 255) -> Seams:
    """Sparse-gradient regularisation. Liu et al. 2024, arXiv:2405.20355.

    Adds weight * mean ((F(x + h v) - F(x)) / h)^2 with F the sigmoid of true minus strongest other score and v the sign
    of its gradient: a finite difference for the squared l1 norm of that gradient. x + h v is not cut to 0..1, as in the
    source. With `eps` x is adversarial (`steps` of `step`), the source's SR*. The weights of the published models are
    not known; `weight` is of the order 1e-3 there.
    """
    check_radius("eps", eps), check_radius("step", step), check_radius("h", h), check_strength(weight=weight)
    check_count(steps=steps), check_positive(h=h, step=step), check_reached(eps=eps, steps=steps, step=step)

    def penalty(net: nn.Module, encode: Encoder, x: Tensor, y: Tensor, z: Tensor, g: torch.Generator) -> Tensor:
        other = _runner_up(z, y)
        here = _lead(z, y, other)
        (slope,) = torch.autograd.grad(here.sum(), x, retain_graph=True)
        there = _lead(scored(net, encode, (x + h * slope.sign()).detach()), y, other)
        return weight * ((there - here) / h).square().mean()

    return Seams(
        inputs=attacked(eps=eps, steps=steps, step=step, start="none"),
        penalty=penalty if weight else None,
        check=paired,
        name="sr",
        knobs={"weight": weight, "h": h, "eps": eps, "steps": steps, "step": step},
    )


def _runner_up(z: Float[Tensor, "n k"], y: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    return z.detach().scatter(1, y[:, None], -math.inf).argmax(1)


def _lead(z: Float[Tensor, "n k"], y: Int[Tensor, " n"], other: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    pair = z.gather(1, torch.stack([y, other], 1))
    return torch.sigmoid(pair[:, 0] - pair[:, 1])
