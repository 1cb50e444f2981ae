"""What a check looks at: a victim, a threat and a small sample of images; and how its finding is made."""

import functools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sparsetrail._shapes import Bool, Float, Int
from sparsetrail.attacks import Attack, attack, noise, pgd
from sparsetrail.attacks.run import on_grey_levels
from sparsetrail.core import Finding, Problem, Run, Streams, Threat, Victim, correct
from sparsetrail.core.precision import in_full
from sparsetrail.core.problem import enough
from sparsetrail.core.results import Level

T = TypeVar("T")
Loss = Callable[[Tensor, Tensor], Tensor]


class Skip(Exception):
    """This check does not apply to this case; the text says why."""


class Outcome(NamedTuple):
    """A finding without its name."""

    level: Level
    value: float | None
    limit: str
    evidence: str
    advice: str = ""


def check(id: str, name: str, *, masking: bool = False) -> Callable[[Callable[["Case"], Outcome]], "Check"]:
    """Name what a function looks for. Foreign code that raises fails a sanity check and makes others not apply."""

    def wrap(look: Callable[["Case"], Outcome]) -> "Check":
        @functools.wraps(look)
        def find(case: "Case") -> Finding:
            try:
                found = look(case)
            except Skip as reason:
                found = Outcome("not applicable", None, "", str(reason))
            except Exception as error:
                level: Level = "fail" if id.startswith("S") else "not applicable"
                what = f"the check could not run; {type(error).__name__}: {error}"
                found = Outcome(level, None, "runs", what, "make the victim answer any batch of images; look again")
            raised = found.level in ("warn", "fail")
            return Finding(
                id=id,
                name=name,
                level=found.level,
                value=found.value,
                limit=found.limit,
                evidence=found.evidence,
                advice=found.advice if raised else "",
                masking=masking,
            )

        return find

    return wrap


def graded(warn: bool, fail: bool) -> Level:
    """The worse of two levels."""
    return "fail" if fail else "warn" if warn else "pass"


def lead(z: Float[Tensor, "n k"], y: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """log-sum-exp of the wrong scores minus the true one: cross-entropy before the part of it that saturates."""
    true = z.gather(1, y[:, None]).squeeze(1)
    return z.scatter(1, y[:, None], -math.inf).logsumexp(1) - true


def climb(
    p: Problem, g: Streams, *, steps: int, step: float, loss: Loss = lead, best: list[Tensor] | None = None
) -> None:
    """PGD from the clean image itself, by any loss; notes the best margins after every step in `best`."""
    u = p.u0
    for _ in range(steps):
        u = p.project(u + step * p.steepest(p.grad(u, loss)))
        if best is not None:
            best.append(p.best_margin.clone())
    p.loss(u)


@dataclass(frozen=True, eq=False)
class Case:
    """A victim under a threat and the images `x` [n c h w], `y` [n] it is checked on.

    `seed` keys every draw, `eot` gradients are averaged where the victim draws noise, `batch` bounds a forward. Scores,
    gradients and runs are kept: checks share them. What a victim that can be reseeded draws for them, and after them,
    does not depend on which check asked first: a stopped audit goes on as if it had not been.
    """

    victim: Victim
    threat: Threat
    x: Tensor
    y: Tensor
    seed: int = 0
    eot: int = 1
    batch: int = 64

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y) or len(self.y) == 0:
            raise ValueError(f"expected images and as many labels, n > 0, got {len(self.x)} and {len(self.y)}")

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.y)

    @property
    def axis(self) -> int:
        """The axis of the attacked tensor that counts images."""
        return self.threat.axis

    @cached_property
    def grid(self) -> bool:
        """Whether points are rounded to 256 grey levels, as the images are."""
        return on_grey_levels(self.threat, self.x)

    @property
    def f(self) -> Callable[[Tensor], Tensor]:
        """From the attacked tensor to scores."""
        return self.victim.of(self.threat.space)

    @cached_property
    def _held(self) -> dict[Hashable, Any]:
        return {}

    def _once(self, name: str, make: Callable[[], T], key: Hashable = None) -> T:
        """What is made once and shared, by a name that draws are keyed by; `key` where that does not tell all."""
        key = name if key is None else key
        if key not in self._held:
            self.victim.draw_by(f"{self.seed} {name} made")
            self._held[key] = make()
        self.victim.draw_by(f"{self.seed} {name} known")
        return self._held[key]

    @property
    def u0(self) -> Tensor:
        """The clean attacked tensor."""

        def make() -> Tensor:
            with torch.no_grad():
                return self.victim.encode(self.x).detach().contiguous()

        return self.x if self.threat.space == "pixel" else self._once("code", make)

    @property
    def z(self) -> Float[Tensor, "n k"]:
        """Clean scores."""
        return self._once("scores", lambda: self.scores(self.u0))

    @property
    def right(self) -> Bool[Tensor, " n"]:
        """Which images are classified correctly."""
        return correct(enough(self.z, self.y), self.y)

    @property
    def start(self) -> Tensor:
        """The clean attacked tensor of the images classified correctly."""
        if not bool(self.right.any()):
            raise Skip(f"none of {self.n} images is classified correctly")
        return self.u0.index_select(self.axis, self.right.nonzero()[:, 0])

    @property
    def labels(self) -> Int[Tensor, " m"]:
        """The labels of those."""
        return self.y[self.right]

    def rows(self, u: Tensor) -> Float[Tensor, "n d"]:
        """One row per image of the attacked tensor."""
        return u.movedim(self.axis, 0).flatten(1)

    @in_full
    def scores(self, u: Tensor) -> Float[Tensor, "n k"]:
        """Scores of any number of images, without a gradient; of a random victim the mean of ten draws."""
        draws = 10 if self.victim.random else 1
        with torch.no_grad():
            parts = [
                torch.stack([self.f(part).detach().float() for _ in range(draws)]).mean(0)
                for part in u.split(self.batch, self.axis)
            ]
        return torch.cat(parts)

    @in_full
    def reach(self, u: Tensor, y: Tensor, loss: Loss = lead) -> Tensor | str:
        """Gradient of the loss per image at `u`, or in words why there is none; the mean of `eot` where noise is."""
        parts = []
        for part, labels in zip(u.split(self.batch, self.axis), y.split(self.batch), strict=True):
            draws = []
            for _ in range(self.eot if self.victim.random else 1):
                at = part.detach().clone().requires_grad_()
                with torch.enable_grad():
                    z = self.f(at)
                    if not z.requires_grad:
                        return "the scores carry no gradient at all"
                    (g,) = torch.autograd.grad(loss(enough(z, labels), labels).sum(), at, allow_unused=True)
                if g is None:
                    return "the scores claim a gradient that does not lead back to the attacked tensor"
                draws.append(g.detach())
            parts.append(draws[0] if len(draws) == 1 else torch.stack(draws).mean(0))
        return torch.cat(parts, self.axis)

    def grad(self, u: Tensor, y: Tensor, loss: Loss = lead) -> Tensor:
        """Gradient of the loss per image at `u`."""
        g = self.reach(u, y, loss)
        if isinstance(g, str):
            raise Skip(f"{g} (see G3)")
        return g

    @property
    def first(self) -> Tensor | str:
        """The gradient at the clean images classified correctly, or why there is none."""
        return self._once("gradient", lambda: self.reach(self.start, self.labels))

    @property
    def gradient(self) -> Tensor:
        """The gradient at the clean images classified correctly."""
        g = self.first
        if isinstance(g, str):
            raise Skip(f"{g} (see G3)")
        return g

    def draw(self, like: Tensor, index: int = 0, *, signs: bool = False) -> Tensor:
        """The same uniform draw in -1..1, or of signs, whenever it is asked for."""
        g = torch.Generator().manual_seed(1000 * self.seed + index)
        d = torch.rand(like.shape, generator=g).to(like) * 2 - 1
        return torch.where(d < 0, -1.0, 1.0).to(like) if signs else d

    def within(self, u: Tensor, u0: Tensor) -> Tensor:
        """`u` brought back into the threat around `u0`."""
        return self.threat.project(u, u0)

    def boxed(self, u: Tensor) -> Tensor:
        """`u` cut to the box alone."""
        return u.clamp(*self.threat.box)

    @property
    def scale(self) -> float:
        """A step of the threat per entry: the radius for L-infinity, what a spread-out L2 step leaves per entry."""
        if self.threat.norm == "l0":
            raise Skip("an L0 ball has no small steps")
        share = 1 if self.threat.norm == "linf" else math.sqrt(self.rows(self.u0).shape[1])
        return self.threat.eps / share

    @property
    def corner(self) -> float:
        """How far an entry moves to a corner of the ball."""
        return 1.0 if self.threat.norm == "l0" else self.scale

    @property
    def whole(self) -> Threat:
        """The threat without a bound: all of the box."""
        lo, hi = self.threat.box
        size = self.rows(self.u0).shape[1]
        radius = {"linf": hi - lo, "l2": (hi - lo) * math.sqrt(size), "l0": size}[self.threat.norm]
        return replace(self.threat, eps=radius)

    def run(self, fn: Attack, *, threat: Threat | None = None, drop: bool = True, eot: int = 0, **knobs: Any) -> Run:
        """An attack on the images of this case; the same call is made once."""
        given = sorted(knobs.items())
        key = fn, threat, drop, eot, tuple((k, id(v) if isinstance(v, list) else v) for k, v in given)
        told = [(k, getattr(v, "__name__", v)) for k, v in given if not isinstance(v, list)]
        return self._once(
            f"{getattr(fn, '__name__', fn)} {threat} {drop} {eot} {told}",
            lambda: attack(
                fn, self.victim, threat or self.threat, self.x, self.y,
                eot=eot or self.eot, batch=self.batch, seed=self.seed, drop=drop, keep=True, **knobs,
            ),
            key,
        )  # fmt: skip

    def pgd(self, steps: int = 20, *, threat: Threat | None = None, pace: float = 4, **knobs: Any) -> Run:
        """PGD with steps of a `pace`-th of the radius; Skip where no gradient leads to the attacked tensor."""
        self.needs_gradient()
        ball = threat or self.threat
        return self.run(pgd, threat=ball, steps=steps, step=ball.eps / pace, **knobs)

    def needs_gradient(self) -> None:
        """Skip where no gradient attack is possible."""
        if self.threat.norm == "l0":
            raise Skip("an L0 ball has no steepest direction")
        _ = self.gradient

    @property
    def follows(self) -> bool:
        """Is there a gradient to follow, and a direction in which it is steepest?"""
        return self.threat.norm != "l0" and not isinstance(self.first, str)

    @cached_property
    def usual(self) -> Run:
        """The attack whose points are looked at: PGD, or noise where no gradient leads to the attacked tensor."""
        return self.pgd() if self.follows else self.run(noise, draws=20)


Check = Callable[[Case], Finding]


def flags(values: tuple[bool, ...]) -> Bool[Tensor, " n"]:
    """Flags of a run as a tensor."""
    return torch.tensor(values, dtype=torch.bool)
