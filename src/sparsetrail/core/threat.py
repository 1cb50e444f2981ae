"""What the adversary may do: a ball of a norm around the clean tensor, in a named space."""

import math
import numbers
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sparsetrail._shapes import Bool

Space = Literal["pixel", "encoded"]
Norm = Literal["linf", "l2", "l0"]


@dataclass(frozen=True)
class Threat:
    """A ball of radius `eps` of a norm around the clean tensor, cut to `box`; made by `Linf`, `L2` or `L0`.

    `eps` is in units of the attacked tensor (0..1, write 8/255), of L0 a number of entries that may be flipped between
    the two ends of the box; `space` names the attacked tensor and has no default.
    """

    eps: float
    space: Space = field(kw_only=True)
    box: tuple[float, float] = field(default=(0.0, 1.0), kw_only=True)
    norm: Norm = field(default="linf", kw_only=True)

    def __post_init__(self) -> None:
        lo, hi = self.box
        if isinstance(self.eps, bool) or not isinstance(self.eps, numbers.Real):
            raise ValueError(f"eps: expected a number such as 8/255, got {self.eps!r}")
        if self.space not in ("pixel", "encoded"):
            raise ValueError(f"space: expected 'pixel' or 'encoded', got {self.space!r}")
        if self.norm not in ("linf", "l2", "l0"):
            raise ValueError(f"norm: expected 'linf', 'l2' or 'l0', got {self.norm!r}")
        if not lo < hi:
            raise ValueError(f"box: expected (low, high) with low < high, got {self.box}")
        if self.norm == "linf" and not 0 <= self.eps <= hi - lo:  # also refuses nan
            hint = f"; did you mean {self.eps:g}/255?" if 1 < self.eps <= 255 else ""
            raise ValueError(f"eps: expected a radius in input units within 0..{hi - lo:g}, got {self.eps:g}{hint}")
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"eps: expected a finite radius of at least 0, got {self.eps:g}")
        if self.norm == "l0" and self.eps != int(self.eps):
            raise ValueError(f"eps: expected a whole number of entries for L0, got {self.eps:g}")

    def __str__(self) -> str:
        words = {"linf": "L-infinity", "l2": "L2", "l0": "L0"}[self.norm]
        size = f"{int(self.eps)} entries" if self.norm == "l0" else as_fraction(self.eps)
        return f"{self.space} space, {words} {size}"

    @property
    def axis(self) -> int:
        """The axis of the attacked tensor that counts images."""
        return image_axis(self.space)

    @property
    def span(self) -> float:
        """How far it is from one end of the box to the other: 1 for pixels."""
        return self.box[1] - self.box[0]

    @property
    def levels(self) -> int:
        """How many of 256 grey levels a radius holds, in whole ones: 7 of 0.031."""
        return math.floor(255 * self.eps + 1e-4)

    @property
    def between_levels(self) -> bool:
        """Whether an L-infinity radius ends between two grey levels."""
        return self.norm == "linf" and 255 * self.eps - self.levels > 1e-3

    def flipped(self, u0: Tensor) -> Tensor:
        """The other end of the box, entry by entry of a binary tensor."""
        lo, hi = (u0.new_full((), end) for end in self.box)
        return torch.where(u0 == lo, hi, lo)

    def project(self, u: Tensor, u0: Tensor) -> Tensor:
        """A point of the ball and the box near `u`: the nearest one for L-infinity.

        L2 scales to the ball, then cuts to the box, which only brings it nearer to `u0`; L0 keeps the largest changes,
        each moved to the other end of the box.
        """
        if self.norm == "linf":
            return torch.minimum(torch.maximum(u, u0 - self.eps), u0 + self.eps).clamp(*self.box)
        if self.norm == "l2":
            d = u - u0
            size = _per_image(_norms(d, self.axis), d, self.axis).clamp(1e-30, torch.finfo(d.dtype).max)
            return (u0 + d * (self.eps / size).clamp(max=1.0)).clamp(*self.box)
        d = (u - u0).movedim(self.axis, 0).flatten(1)
        keep = min(int(self.eps), d.shape[1])
        top = torch.zeros_like(d, dtype=torch.bool)
        if keep:
            top.scatter_(1, d.abs().topk(keep, 1).indices, True)
        moved = (top & (d.abs() > self.span / 2)).unflatten(1, u.movedim(self.axis, 0).shape[1:]).movedim(0, self.axis)
        return torch.where(moved, self.flipped(u0), u0)

    def steepest(self, g: Tensor) -> Tensor:
        """The direction of length one in which a loss of gradient `g` grows fastest; 0 where the gradient is."""
        if self.norm == "linf":
            return g.sign()
        if self.norm == "l2":
            g = g / _per_image(_norms(g, self.axis, largest=True), g, self.axis).clamp(min=1e-38)  # no overflow
            return g / _per_image(_norms(g, self.axis), g, self.axis).clamp(min=1e-38)
        raise ValueError("an L0 ball has no steepest direction; expected an attack that chooses entries, such as sda")

    def contains(self, u: Tensor, u0: Tensor, axis: int | None = None, tol: float = 1e-6) -> Bool[Tensor, " n"]:
        """Per example: finite, inside ball and box up to `tol` (float rounding; relative for L2 and above 1)."""
        lo, hi = self.box
        axis = self.axis if axis is None else axis
        flat = u.movedim(axis, 0).flatten(1)
        clean = u0.movedim(axis, 0).flatten(1)
        d, loose = flat - clean, tol * clean.abs().clamp(min=1.0)
        inside = flat.isfinite().all(1) & ((flat >= lo - loose) & (flat <= hi + loose)).all(1)
        if self.norm == "linf":
            return inside & (d.abs() <= self.eps + loose).all(1)
        if self.norm == "l2":
            return inside & (d.double().norm(dim=1) <= self.eps * (1 + tol) + loose.amax(1))
        return inside & ((d != 0).sum(1) <= self.eps) & ((flat == lo) | (flat == hi)).all(1)

    def snap(self, u: Tensor, u0: Tensor) -> Tensor:
        """The image of 256 grey levels next to `u` that is still inside the ball; `u0` must be one.

        L-infinity rounds to the nearest level within the radius; L2 rounds changes towards zero where rounding to the
        nearest leaves the ball. Levels are k/255 as float32 divides them, as an image file is read.
        """
        if self.norm == "l0":
            return u
        level0, level = (u0.double() * 255).round(), u.double() * 255
        if self.norm == "linf":
            reach = self.levels
            level = (u * 255).round().double().clamp(0, 255)  # a tie as the encoders round it, in u's own precision
            level = torch.minimum(torch.maximum(level, level0 - reach), level0 + reach)
        else:
            near = level.round().clamp(0, 255)
            fits = self.contains((near / 255).to(u.dtype), u0)
            level = torch.where(_per_image(fits, u, self.axis), near, level0 + (level - level0).trunc())
        return (level / 255).to(u.dtype)  # in float64: a GPU divides float32 by a number through its reciprocal


def Linf(eps: float, *, space: Space, box: tuple[float, float] = (0.0, 1.0)) -> Threat:
    """L-infinity ball of radius `eps` in units of the attacked tensor (0..1, write 8/255)."""
    return Threat(eps, space=space, box=box, norm="linf")


def L2(eps: float, *, space: Space, box: tuple[float, float] = (0.0, 1.0)) -> Threat:
    """L2 ball of radius `eps` in units of the attacked tensor, over all its entries (write 128/255)."""
    return Threat(eps, space=space, box=box, norm="l2")


def L0(eps: int, *, space: Space, box: tuple[float, float] = (0.0, 1.0)) -> Threat:
    """At most `eps` entries of a binary tensor flipped between the two ends of the box."""
    return Threat(eps, space=space, box=box, norm="l0")


def grey(x: Tensor) -> Bool[Tensor, " n"]:
    """Per image [n ...]: is every pixel one of 256 grey levels?"""
    level = x.double() * 255
    return ((level - level.round()).abs() < 1e-3).flatten(1).all(1)


def as_fraction(eps: float) -> str:
    """`eps` the way the field writes it: 0.0313725 -> '8/255'."""
    k = eps * 255
    return f"{round(k)}/255" if abs(k - round(k)) < 1e-6 and (round(k) or not k) and k < 256 else f"{eps:.4g}"


def image_axis(space: Space) -> int:
    """The axis that counts images: 0 of pixels [n c h w], 1 of the encoded input [t n c h w]."""
    return 1 if space == "encoded" else 0


def _norms(d: Tensor, axis: int, *, largest: bool = False) -> Tensor:
    flat = d.movedim(axis, 0).flatten(1)
    return flat.abs().amax(1) if largest else flat.norm(dim=1)


def _per_image(values: Tensor, like: Tensor, axis: int) -> Tensor:
    shape = [1] * like.ndim
    shape[axis] = -1
    return values.view(shape)
