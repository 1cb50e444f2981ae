"""Losses per example that an attack climbs: scores [n k], labels [n] -> [n], larger is nearer to a wrong class."""

import torch
from torch import Tensor

from sparsetrail._shapes import Float, Int
from sparsetrail.core import cross_entropy, margin
from sparsetrail.core.problem import Loss


def dlr(z: Float[Tensor, "n k"], y: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Difference of logits ratio. Croce & Hein 2020, arXiv:2003.01690, eq. 6: the margin over z1 - z3.

    Where the three best scores tie, the range of all scores stands in for z1 - z3, and 1 where all tie: spike counts
    tie often, and a quotient by 1e-12 is no loss. With two classes there is no third score: the margin itself.
    """
    return margin(z, y) / _spread(z, z.sort(1, descending=True).values[:, 2:3])


def targeted(z: Float[Tensor, "n k"], y: Int[Tensor, " n"], aim: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Targeted DLR towards the classes `aim`. Croce & Hein 2020, arXiv:2003.01690, eq. 7: over z1 - (z3 + z4) / 2.

    Of three classes z3 alone is taken; ties and two classes as in `dlr`.
    """
    gap = z.gather(1, torch.stack([aim, y], 1))
    return (gap[:, 0] - gap[:, 1]) / _spread(z, z.sort(1, descending=True).values[:, 2:4])


def _spread(z: Tensor, third: Tensor) -> Tensor:
    """What a ratio divides by: best score minus the mean of `third`, never near 0 beside the range of the scores."""
    if third.shape[1] == 0:
        return z.new_ones(len(z))
    best, last = z.amax(1), z.amin(1)
    gap, reach = best - third.mean(1), best - last
    gap = torch.where(gap > 1e-4 * reach, gap, reach)
    return torch.where(gap > 0, gap, torch.ones_like(gap))


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
TARGETED: dict[str, Loss] = {"targeted": targeted}


def loss_named(name: str, table: dict[str, Loss] = LOSSES) -> Loss:
    """A loss by name, refused with the list of names."""
    if name not in table:
        raise ValueError(f"loss: expected one of {', '.join(table)}, got {name!r}")
    return table[name]
