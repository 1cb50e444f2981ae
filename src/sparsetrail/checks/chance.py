"""What chance alone explains: exact tests of a share and of discordant images, rank correlation."""

import math

import torch
from torch import Tensor

from sparsetrail._shapes import Bool, Float

ALONE = 3  # one or two images are chance, whatever share of a small sample they are


def sign_test(more: int, less: int) -> float:
    """One-sided p that of `more` + `less` discordant images at least `more` fall on one side of a fair coin.

    McNemar 1947, Psychometrika 12:153, in its exact form.
    """
    return at_chance(more, more + less, 0.5)


def at_chance(k: int, n: int, share: float) -> float:
    """Probability that at least k of n images have what each has by chance with probability `share`."""
    if not 0 < share < 1:
        return float(k <= 0 or share >= 1)
    log = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(share)
        + (n - i) * math.log1p(-share)
        for i in range(k, n + 1)
    ]  # fmt: skip
    return min(1.0, math.fsum(map(math.exp, log)))


def discordant(a: Bool[Tensor, " n"], b: Bool[Tensor, " n"]) -> tuple[int, int]:
    """How many images only `a` holds, and only `b`."""
    return int((a & ~b).sum()), int((b & ~a).sum())


def surely_over(k: int, n: int, share: float) -> bool:
    """Whether k of n lie above `share` by more than chance: an exact one-sided test at 2.5 %.

    So is the interval of Clopper & Pearson 1934, Biometrika 26:404. That of Wilson accuses too often where n or the
    share is small: 1 of 17 would be surely over 1 %, which happens in one sample of six.
    """
    return at_chance(k, n, share) < 0.025


def surely_under(k: int, n: int, share: float) -> bool:
    """Whether k of n lie below `share` by more than chance: the same test of the others."""
    return surely_over(n - k, n, 1 - share)


def ranks(v: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
    """Ranks within each row, ties at their mean."""
    below = (v[:, None, :] < v[:, :, None]).sum(2)
    equal = (v[:, None, :] == v[:, :, None]).sum(2)
    return below + (equal - 1) / 2


def spearman(a: Float[Tensor, "n r"], b: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
    """Rank correlation of each row of `a` with that of `b`; 0 where a row is constant. Spearman 1904."""
    x, y = ranks(a).double(), ranks(b).double()
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    size = x.norm(dim=1) * y.norm(dim=1)
    return torch.where(size > 0, (x * y).sum(1) / size.clamp(min=1e-30), 0.0).to(a.dtype)
