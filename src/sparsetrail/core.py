"""The nouns shared by both halves: what is attacked, what the adversary may do, and what was found.

`u` is whichever tensor the adversary writes to: pixels [n c h w] or the encoded input [t n c h w]. Input units are
those of the attacked tensor, 0..1 for pixels and for spikes alike; the two are different budgets, never compared.
"""

import contextlib
import hashlib
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrail._shapes import Bool, Float, Int

Space = Literal["pixel", "encoded"]
Mode = Literal["eval", "train"]


@dataclass(frozen=True, kw_only=True)
class Victim:
    """A classifier as two stateless functions: the same input gives the same scores, there is nothing to reset.

    `encode` maps pixels [n c h w] in 0..1 to the encoded input [t n c h w]; `logits` maps that to class scores [n k].
    `route` says in words how a gradient flows through the network, `encoding` how it flows through the encoder;
    `mode` is that of BatchNorm while crafting. `random` victims draw fresh noise in `encode`. `module` is the network
    behind `logits`, where there is one: the trail needs it, attacks never see it. `shortcut` gives the scores of pixels
    by fewer operations than `logits(encode(x))`; `exact` are the logits in float32 where `logits` computes in less: the
    final point of every attack is judged by them.
    """

    encode: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor]
    steps: int
    classes: int
    name: str = "victim"
    route: str = "own gradient"
    encoding: str = ""
    mode: Mode = "eval"
    random: bool = False
    module: nn.Module | None = None
    shortcut: Callable[[Tensor], Tensor] | None = None
    exact: Callable[[Tensor], Tensor] | None = None

    def scores(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Class scores of images."""
        return self.logits(self.encode(x)) if self.shortcut is None else self.shortcut(x)

    def of(self, space: Space) -> Callable[[Tensor], Tensor]:
        """The function from the attacked tensor to scores, as an attack sees it."""
        return self.scores if space == "pixel" else self.logits

    def judge(self, space: Space) -> Callable[[Tensor], Tensor]:
        """The same function as it is judged: in float32."""
        exact = self.exact
        if exact is None:
            return self.of(space)
        return (lambda x: exact(self.encode(x))) if space == "pixel" else exact

    def path(self, space: Space) -> str:
        """The gradient route from the scores back to the attacked tensor, in words."""
        return f"{self.route}; {self.encoding}" if space == "pixel" and self.encoding else self.route


@dataclass(frozen=True)
class Linf:
    """L-infinity ball of radius `eps` around the clean tensor, cut to `box`.

    `eps` is in units of the attacked tensor (0..1, write 8/255); `space` names that tensor and has no default.
    """

    eps: float
    space: Space = field(kw_only=True)
    box: tuple[float, float] = field(default=(0.0, 1.0), kw_only=True)
    norm: str = field(default="linf", kw_only=True)

    def __post_init__(self) -> None:
        lo, hi = self.box
        if self.space not in ("pixel", "encoded"):
            raise ValueError(f"space: expected 'pixel' or 'encoded', got {self.space!r}")
        if self.norm != "linf":
            raise ValueError(f"norm: expected 'linf', got {self.norm!r}")
        if not lo < hi:
            raise ValueError(f"box: expected (low, high) with low < high, got {self.box}")
        if not 0 <= self.eps <= hi - lo:  # also refuses nan
            hint = f"; did you mean {self.eps:g}/255?" if 1 < self.eps <= 255 else ""
            raise ValueError(f"eps: expected a radius in input units within 0..{hi - lo:g}, got {self.eps:g}{hint}")

    def __str__(self) -> str:
        return f"{self.space} space, L-infinity {as_fraction(self.eps)}"

    def project(self, u: Tensor, u0: Tensor) -> Tensor:
        """The nearest point of the ball and the box."""
        return torch.minimum(torch.maximum(u, u0 - self.eps), u0 + self.eps).clamp(*self.box)

    def contains(self, u: Tensor, u0: Tensor, axis: int, tol: float = 1e-6) -> Bool[Tensor, " n"]:
        """Per example along `axis`: finite, inside ball and box up to `tol` (float rounding)."""
        lo, hi = self.box
        inside = ((u - u0).abs() <= self.eps + tol) & (u >= lo - tol) & (u <= hi + tol)  # nan is inside nothing
        return inside.movedim(axis, 0).flatten(1).all(1)


def as_fraction(eps: float) -> str:
    """`eps` the way the field writes it: 0.0313725 -> '8/255'."""
    k = eps * 255
    return f"{round(k)}/255" if abs(k - round(k)) < 1e-6 and (round(k) or not k) else f"{eps:.4g}"


def image_axis(space: Space) -> int:
    """The axis that counts images: 0 of pixels [n c h w], 1 of the encoded input [t n c h w]."""
    return 1 if space == "encoded" else 0


class Streams:
    """One random stream per image, keyed by (seed, image index): draws do not depend on batch size, order or resume.

    Draws are made on the CPU so that a GPU run starts from the same points.
    """

    def __init__(self, seed: int, indices: Iterable[int]) -> None:
        self.generators = [torch.Generator().manual_seed(_mix(seed, int(i))) for i in indices]

    def of(self, rows: Iterable[int]) -> "Streams":
        """The streams of some of the images; a draw from them goes on where the last one stopped."""
        some = Streams(0, ())
        some.generators = [self.generators[i] for i in rows]
        return some

    def uniform(self, like: Tensor, axis: int) -> Tensor:
        """Uniform in -1..1, shaped as `like`, image i along `axis` drawn from stream i."""
        shape = like.movedim(axis, 0).shape
        if shape[0] != len(self.generators):
            raise ValueError(f"expected {len(self.generators)} images along axis {axis}, got shape {tuple(like.shape)}")
        draws = torch.stack([torch.rand(shape[1:], generator=g) for g in self.generators])
        return draws.mul_(2).sub_(1).movedim(0, axis).to(like)


def _mix(seed: int, index: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=7).digest(), "little")


def margin(z: Float[Tensor, "n k"], y: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Best wrong score minus true score: positive is misclassified, 0 is a tie, -inf where a score is not finite."""
    true = z.gather(1, y[:, None]).squeeze(1)
    wrong = z.scatter(1, y[:, None], -math.inf).amax(1)
    return torch.where(z.isfinite().all(1), wrong - true, -math.inf)


def correct(z: Float[Tensor, "n k"], y: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Classified correctly: all scores finite, the true one strictly the best. A NaN or a tie is not correct."""
    return (margin(z, y) < 0) & z.isfinite().all(1)


class Problem:
    """One batch posed to an attack: everything an attack learns, it asks of this oracle.

    Attacks call `loss`, `grad`, `project`, `sample` and nothing else. The ledger keeps itself: the point of largest
    margin per example, forwards and backwards, the mean margin of every call, the share of exactly zero gradient
    entries. Points outside the ball or not finite never count; `left` remembers that they were asked for. With `drop`
    examples already fooled are left out of further calls: exact, since every example is treated alone. The ledger
    stays in tensors; nothing is read back while the attack runs, unless `drop` asks for it.
    """

    def __init__(
        self, f: Callable[[Tensor], Tensor], u0: Tensor, y: Int[Tensor, " n"], ball: Linf, *, drop: bool = False
    ) -> None:
        self.f, self.u0, self.y, self.ball, self.drop = f, u0, y, ball, drop
        self.axis = image_axis(ball.space)
        self.best, self.best_margin = u0.clone(), torch.full(y.shape, -math.inf, device=u0.device)
        self.fooled = torch.zeros_like(y, dtype=torch.bool)
        self.left = torch.zeros((), dtype=torch.bool, device=u0.device)
        self.forwards = self.backwards = 0
        self.trace: list[Tensor] = []
        self.zero_share: list[Tensor] = []
        self.dead = torch.zeros_like(self.fooled)
        self.nonfinite = torch.zeros_like(self.fooled)
        self.whose: Tensor | None = None  # of a problem of copies: the image behind each row

    @contextlib.contextmanager
    def restarts(self, most: int) -> Iterator[tuple["Problem", int]]:
        """The problem of as many restarts at once, up to `most`, as the images still standing leave room for.

        Gives that problem, to be played once, and the number of restarts in it; what was found is taken over after it.
        With nothing dropped, or all standing, that is this very problem and one restart. Starting points are those of
        restarts one after the other; a copy of an image already fooled by another copy takes no further step.
        """
        rows = self._alive()
        count = 1 if rows is None or len(rows) == 0 else min(most, len(self.y) // len(rows))
        if count < 2 or rows is None:
            yield self, 1
            return
        whose = rows.repeat(count)
        q = Problem(self.f, self.u0.index_select(self.axis, whose), self.y[whose], self.ball, drop=True)
        q.whose = whose
        yield q, count
        self.forwards, self.backwards = self.forwards + q.forwards, self.backwards + q.backwards
        self.trace, self.zero_share = self.trace + q.trace, self.zero_share + q.zero_share
        self.left |= q.left
        self.dead[whose[q.dead]] = True
        self.nonfinite[whose[q.nonfinite]] = True
        margin, copy = q.best_margin.view(count, -1).max(0)
        point = q.best.index_select(self.axis, copy * len(rows) + torch.arange(len(rows), device=copy.device))
        better = margin > self.best_margin[rows]
        self.best = self.best.index_copy(self.axis, rows[better], point.index_select(self.axis, better.nonzero()[:, 0]))
        self.best_margin = self.best_margin.index_copy(0, rows[better], margin[better])
        self.fooled = self.best_margin > 0

    def loss(self, u: Tensor) -> Float[Tensor, " n"]:
        """Margin per example at `u`; without a gradient."""
        rows = self._alive()
        if rows is not None and len(rows) == 0:
            return self.best_margin.clone()
        with torch.no_grad():
            return self._see(u, self.f(self._take(u, rows)), rows)

    def grad(self, u: Tensor, loss: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Gradient of the loss at `u`, per example; zero for dropped examples.

        `loss` maps scores [n k] and labels [n] to one number per example [n]; cross-entropy by default. The sum over
        examples is differentiated, so no factor 1/n shrinks small gradients.
        """
        rows = self._alive()
        if rows is not None and len(rows) == 0:
            return torch.zeros_like(u)
        part = self._take(u, rows).detach().requires_grad_()
        y = self.y if rows is None else self.y[rows]
        with torch.enable_grad():
            z = self.f(part)
            value = F.cross_entropy(z, y, reduction="none") if loss is None else loss(z, y)
            if value.shape != y.shape:
                raise ValueError(f"loss: expected one number per example {tuple(y.shape)}, got {tuple(value.shape)}")
            (g,) = torch.autograd.grad(value.sum(), part, allow_unused=True) if value.requires_grad else (None,)
        if g is None:
            raise ValueError(
                f"no gradient reaches the {self.ball.space} input; expected a differentiable path, found none: give "
                "the encoder a backward rule (identity, weighted, secant), or use a gradient-free attack"
            )
        self._see(u, z.detach(), rows)
        self.backwards += len(y)
        flat = g.movedim(self.axis, 0).flatten(1)
        self.zero_share.append((flat == 0).float().mean())
        self._mark(self.dead, (flat == 0).all(1), rows)
        self._mark(self.nonfinite, ~flat.isfinite().all(1), rows)
        if rows is None:
            return g
        return torch.zeros_like(u).index_copy_(self.axis, rows, g)

    def project(self, u: Tensor) -> Tensor:
        """The nearest allowed point."""
        return self.ball.project(u, self.u0)

    def sample(self, g: Streams, *, corners: bool = False) -> Tensor:
        """A random allowed point per example: uniform in the ball, or one of its corners; cut to the box."""
        if self.whose is None:
            noise = g.uniform(self.u0, self.axis)
        else:  # restart by restart, each image from its own stream
            images = self.whose.unique()
            parts = self.u0.split(len(images), self.axis)
            noise = torch.cat([g.of(images.tolist()).uniform(part, self.axis) for part in parts], self.axis)
        return self.project(self.u0 + self.ball.eps * (noise.sign() if corners else noise))

    def _alive(self) -> Tensor | None:
        if not self.drop:
            return None
        fooled = self.fooled
        if self.whose is not None:  # one copy that is fooled is enough
            fooled = torch.isin(self.whose, self.whose[fooled])
        rows = (~fooled).nonzero().squeeze(1)
        return None if len(rows) == len(self.y) else rows

    def _take(self, u: Tensor, rows: Tensor | None) -> Tensor:
        return u if rows is None else u.index_select(self.axis, rows)

    def _mark(self, flags: Tensor, here: Tensor, rows: Tensor | None) -> None:
        if rows is None:
            flags |= here
        else:
            flags[rows] |= here

    def _see(self, u: Tensor, z: Tensor, rows: Tensor | None) -> Float[Tensor, " n"]:
        u = u.detach()
        y = self.y if rows is None else self.y[rows]
        m = margin(z.float(), y)
        self.forwards += len(y)
        self.trace.append(m.mean())
        if rows is not None:
            m = self.best_margin.index_copy(0, rows, m)
        inside = self.ball.contains(u, self.u0, self.axis)
        self.left |= ~inside.all()
        better = inside & (m > self.best_margin)
        shape = [1] * u.ndim
        shape[self.axis] = -1
        self.best = torch.where(better.view(shape), u, self.best)
        self.best_margin = torch.where(better, m, self.best_margin)
        self.fooled = self.best_margin > 0
        return m


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one attack left standing, judged by a fresh fp32 forward of its best points.

    `clean` and `robust` are flags per example; an example is robust if it was right before and no point found makes a
    wrong class strictly better than the true one (a tie is not a success; `ties` counts them). `zero_gradient` is the
    mean share of exactly zero entries in the gradients asked for, `dead_examples` counts examples whose gradient was
    once wholly zero, `nonfinite` those with a NaN or infinite gradient. `adversarial` is not written to JSON.
    """

    attack: str
    knobs: dict[str, Any]
    threat: Linf
    victim: str
    route: str
    mode: Mode
    data: str
    seed: int
    clean: tuple[bool, ...]
    robust: tuple[bool, ...]
    ties: int
    forwards: int
    backwards: int
    zero_gradient: float | None
    dead_examples: int
    nonfinite: int
    trace: tuple[float, ...]
    seconds: float
    note: str = ""
    adversarial: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def n(self) -> int:
        """Number of images attacked."""
        return len(self.clean)

    @property
    def clean_accuracy(self) -> "Rate":
        """Share of all images classified correctly before the attack."""
        return Rate(sum(self.clean), self.n)

    @property
    def accuracy(self) -> "Rate":
        """Share of all images classified correctly before and after the attack."""
        return Rate(sum(self.robust), self.n)


@dataclass(frozen=True)
class Rate:
    """`k` of `n`, with its Wilson interval (Wilson 1927, J. Am. Stat. Assoc. 22:209)."""

    k: int
    n: int

    def __post_init__(self) -> None:
        if not 0 <= self.k <= self.n or self.n == 0:
            raise ValueError(f"expected 0 <= k <= n and n > 0, got k={self.k}, n={self.n}")

    @property
    def value(self) -> float:
        """The share itself, 0..1."""
        return self.k / self.n

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Wilson score interval, 0..1."""
        z = statistics.NormalDist().inv_cdf(0.5 + level / 2)
        p, n = self.value, self.n
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        lo, hi = self.interval()
        return f"{100 * self.value:.1f} % [{100 * lo:.1f}, {100 * hi:.1f}], n={self.n}"


@dataclass(frozen=True, kw_only=True)
class TrailRow:
    """One operation of the trail: the gradient of the loss with respect to its input, averaged over images.

    `zero` is the share of exactly zero entries (0..1), `forced` the share of zeros that geometry alone forces,
    `norm` the L2 norm per image, `entries` the number of gradient entries per image (all time steps), `per_step`
    the zero share of each time step, on request.
    """

    op: str
    kind: str
    depth: int
    zero: float
    forced: float
    norm: float
    entries: int
    per_step: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Trail:
    """The sparsity trail of a network: one row per operation in the order of the forward pass."""

    victim: str
    mode: Mode
    data: str
    n: int
    steps: int
    clean_accuracy: float
    rows: tuple[TrailRow, ...]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published value with the threat its text states and the threat its code runs."""

    figure: str
    row: str
    dataset: str
    metric: str
    value: float
    unit: str
    source: str
    stated: str
    coded: str
    conditions: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a page shows: plain data, written whole to `result.json` and read back to draw it again."""

    title: str
    summary: tuple[str, ...]
    models: tuple[dict[str, Any], ...]
    runs: tuple[Run, ...]
    trails: tuple[Trail, ...]
    claims: tuple[Claim, ...]
    provenance: dict[str, Any]
    notes: tuple[str, ...] = ()
