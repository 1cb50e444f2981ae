"""The oracle that an attack asks everything of, and the random streams it draws from."""

import contextlib
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrail._shapes import Bool, Float, Int
from sparsetrail.core.precision import products
from sparsetrail.core.threat import Threat
from sparsetrail.core.victim import Memory, Victim

Loss = Callable[..., Tensor]  # scores [n k], labels [n], for a targeted loss classes [n] -> one number per example [n]


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


def enough(z: Float[Tensor, "n k"], y: Int[Tensor, " n"]) -> Float[Tensor, "n k"]:
    """The scores, which must hold one for every label; IndexError else: a GPU that is asked for another stops for good.

    Asks the device, so not in the steps of an attack.
    """
    most = int(y.max()) if len(y) else -1
    if most >= z.shape[1]:
        raise IndexError(f"expected a score for every label, of which the largest is {most}, found {z.shape[1]} scores")
    return z


def correct(z: Float[Tensor, "n k"], y: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Classified correctly: all scores finite, the true one strictly the best. A NaN or a tie is not correct."""
    return (margin(z, y) < 0) & z.isfinite().all(1)


def cross_entropy(z: Float[Tensor, "n k"], y: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Cross-entropy per example, its gradient divided by 1 - p_true per example.

    p - 1 rounds to exactly 0 in float32 once the true score leads by 17, and p of the others underflows from 104 on:
    the gradient is gone though its direction is not. Divided by that factor it is the gradient of
    logsumexp(wrong scores) - true score, the same direction at a size that no lead can shrink.
    """
    true = z.gather(1, y[:, None]).squeeze(1)
    lead = z.scatter(1, y[:, None], -math.inf).logsumexp(1) - true
    return F.softplus(lead.detach()) + (lead - lead.detach())


@dataclass(frozen=True)
class Guide:
    """Whose gradient an attack follows: `f` from the attacked tensor, `logits` from the encoded input, to scores.

    `own` says that its scores are the victim's to the bit (another backward only); otherwise the victim's are asked for
    beside. `encode` is the encoder where pixels are attacked through the code itself.
    """

    f: Callable[[Tensor], Tensor]
    own: bool = True
    logits: Callable[[Tensor], Tensor] | None = None
    encode: Callable[[Tensor], Tensor] | None = None
    memory: Memory | None = None

    @staticmethod
    def of(victim: Victim, threat: Threat, *, own: bool) -> "Guide":
        """The guide that a victim is, in the space of a threat."""
        return Guide(victim.of(threat.space), own, victim.logits, victim.encode, victim.memory)


class Problem:
    """One batch posed to an attack: everything an attack learns, it asks of this oracle.

    Attacks ask by `loss`, `losses`, `grad`, `value_and_grad`, `code_grad`, `ranked`, `lean` and `decides`, move by
    `project`, `steepest`, `sample`, `noise`, `fork` and `each`, start again by `restarts`, and read `u0`, `y`, `ball`,
    `axis`, `best`, `fooled`, `over` and `room`; nothing else. The ledger keeps itself: the point of largest margin per
    example, forwards and backwards, the mean margin of every call, the share of exactly zero gradient entries. Points
    outside the ball or not finite never count; `left` remembers that they were asked for where they may not. With
    `drop` examples already fooled are left out of further calls: exact, since every example is treated alone. The
    ledger stays in tensors; nothing is read back while the attack runs, unless `drop` or `grid` asks for it.

    `eot` evaluations stand behind every number (a victim that draws noise): gradients are their mean, a margin is
    their lower median, so it is positive where most of them are fooled; as many as fit share a batch. `grid` is for
    images of 256 grey levels: points are rounded to them inside the ball before the victim is shown one, so that what
    it says between them is of no use; of points that may lie outside, only a fooling one is rounded, and counts if it
    fools then. `guides` are whose gradients are followed, their mean if several; by default that of `f`. `codebook`
    [256 t] makes `code_grad` possible.
    """

    def __init__(
        self,
        f: Callable[[Tensor], Tensor],
        u0: Tensor,
        y: Int[Tensor, " n"],
        ball: Threat,
        *,
        drop: bool = False,
        eot: int = 1,
        grid: bool = False,
        guides: Sequence[Guide] = (),
        codebook: Tensor | None = None,
    ) -> None:
        self.f, self.u0, self.y, self.ball, self.drop = f, u0, y, ball, drop
        self.eot, self.grid, self.guides, self.codebook = eot, grid, tuple(guides) or (Guide(f),), codebook
        self.axis = ball.axis
        self.best, self.best_margin = u0.clone(), torch.full(y.shape, -math.inf, device=u0.device)
        self.last_margin = self.best_margin.clone()
        self.fooled = torch.zeros_like(y, dtype=torch.bool)
        self.left = torch.zeros((), dtype=torch.bool, device=u0.device)
        self.forwards = self.backwards = 0
        self.trace: list[tuple[Tensor, int]] = []  # of every call: mean margin, of how many examples
        self.zero_share: list[tuple[Tensor, int]] = []  # of every gradient: share of zeros, over how many examples
        self.dead = torch.zeros_like(self.fooled)
        self.nonfinite = torch.zeros_like(self.fooled)
        self.whose: Tensor | None = None  # of a problem of copies: the image behind each row
        self._forget()

    @contextlib.contextmanager
    def restarts(self, most: int) -> Iterator[tuple["Problem", int]]:
        """The problem of as many restarts at once, up to `most`, as the images still standing leave room for.

        Gives that problem, to be played once, and the number of restarts in it; what was found is taken over after it.
        With nothing dropped, or all standing, that is this very problem and one restart. Starting points are those of
        restarts one after the other; a copy of an image already fooled by another copy takes no further step. What a
        gradient route remembers begins anew.
        """
        self._forget()
        rows = self._alive()
        count = 1 if rows is None or len(rows) == 0 else min(most, len(self.y) // len(rows))
        if count < 2 or rows is None:
            yield self, 1
            return
        whose = rows.repeat(count)
        q = Problem(
            self.f, self.u0.index_select(self.axis, whose), self.y[whose], self.ball, drop=True, eot=self.eot,
            grid=self.grid, guides=self.guides, codebook=self.codebook,
        )  # fmt: skip
        q.whose = whose
        yield q, count
        self._forget()
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
        self.last_margin = self.last_margin.index_copy(0, rows, q.last_margin.view(count, -1).amax(0))
        self.fooled = self.best_margin > 0

    def loss(self, u: Tensor, of: Loss | None = None) -> Float[Tensor, " n"]:
        """Margin per example at `u`, or another loss `of` the scores; without a gradient. -inf for dropped examples,
        their best margin for a margin."""
        rows = self._alive()
        if rows is not None and len(rows) == 0:
            return self.best_margin.clone() if of is None else torch.full_like(self.best_margin, -math.inf)
        shown = self._shown(u)
        part, y = self._take(shown, rows), self._labels(rows)
        margins, values = [], []
        with torch.no_grad():
            for copies in self._passes(len(y)):
                z = self.f(self._repeat(part, copies)).float()
                margins.append(margin(z, y.repeat(copies)).view(copies, -1))
                if of is not None:
                    values.append(of(z, y.repeat(copies)).view(copies, -1))
            m = self._see(u, _vote(margins), rows, shown)
        if of is None:
            return m
        value = torch.cat(values).mean(0)
        return value if rows is None else torch.full_like(self.best_margin, -math.inf).index_copy(0, rows, value)

    @property
    def room(self) -> int:
        """Points per example that one pass of `losses` holds: 1, and more once examples are dropped."""
        rows = self._alive()
        return 1 if rows is None or len(rows) == 0 else len(self.y) // len(rows)

    @property
    def over(self) -> bool:
        """Is every example dropped? There is nothing left to ask then."""
        rows = self._alive()
        return rows is not None and len(rows) == 0

    def losses(self, points: Iterable[Tensor]) -> Float[Tensor, "m n"]:
        """Margins at several points per example, as many points in one pass as examples dropped leave room for.

        The same as `loss` at one after the other; `points` is drawn from only as far as a pass holds.
        """
        points, found = iter(points), []
        while some := list(itertools.islice(points, self.room)):
            rows = self._alive()
            if rows is not None and len(rows) == 0:
                found += [self.best_margin.clone() for _ in some]
                continue
            y, shown = self._labels(rows), [self._shown(u) for u in some]
            part = torch.cat([self._take(u, rows) for u in shown], self.axis)
            margins = self._margins(part, y.repeat(len(some))).view(len(some), -1)
            for u, v, m in zip(some, shown, margins, strict=True):
                if rows is not None:  # fooled by a point before it in this pass: not asked again one after the other
                    m = torch.where(self.fooled[rows], self.best_margin[rows], m)
                found.append(self._see(u, m, rows, v))
        return torch.stack(found)

    def ranked(self, u: Tensor, count: int) -> Int[Tensor, "n c"]:
        """The wrong classes by their score at `u`, best first, at most `count`; dropped examples too."""
        self.forwards += len(self.y) * self.eot
        with torch.no_grad():
            z = torch.stack([self.f(u).float() for _ in range(self.eot)]).mean(0)
        wrong = z.scatter(1, self.y[:, None], -math.inf).argsort(dim=1, descending=True, stable=True)
        return wrong[:, : min(count, z.shape[1] - 1)]

    def lean(self, u: Tensor) -> Bool[Tensor, " n"]:
        """Is the example fooled at `u` as well? Asked of fooled examples only, dropped ones too.

        Where it is, with fewer entries changed than at its best point, `u` takes the place of that point.
        """
        rows = self.fooled.nonzero().squeeze(1)
        m = torch.full_like(self.best_margin, -math.inf)
        if len(rows):
            part = u.index_select(self.axis, rows)
            self.forwards += len(rows) * self.eot
            m = m.index_copy(0, rows, self._margins(part, self.y[rows]))
        fools = (m > 0) & self.ball.contains(u, self.u0)
        changed = [(v != self.u0).movedim(self.axis, 0).flatten(1).sum(1) for v in (u, self.best)]
        fewer = fools & (changed[0] < changed[1])
        self.best = torch.where(self.each(fewer), u, self.best)
        self.best_margin = torch.where(fewer, m, self.best_margin)
        return fools

    def decides(self, u: Tensor, of: Bool[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Is the example misclassified at `u`? Asked of the examples `of`, the decision alone; false for all others.

        `u` may lie outside the ball, where it counts for nothing; a dropped example is told to be fooled.
        """
        u = self._fit(u)
        rows = self._alive()
        asked = (of if rows is None else of & torch.zeros_like(of).index_fill(0, rows, True)).nonzero().squeeze(1)
        m = torch.full_like(self.best_margin, -math.inf)
        if len(asked):
            seen = self._margins(u.index_select(self.axis, asked), self.y[asked])
            m = m.index_copy(0, asked, self._see(u, seen, asked)[asked])
        return of & ((m > 0) | (self.fooled if rows is not None else False))

    def grad(self, u: Tensor, loss: Loss | None = None, aim: Int[Tensor, " n"] | None = None) -> Tensor:
        """Gradient of the loss at `u`, per example; zero for dropped examples.

        `loss` maps scores [n k] and labels [n] to one number per example [n]; `cross_entropy` by default. A targeted
        loss is given the classes `aim` as well. The sum over examples is differentiated, so no factor 1/n shrinks
        small gradients.
        """
        return self._differentiate(u, loss, code=False, aim=aim)[1]

    def value_and_grad(
        self, u: Tensor, loss: Loss | None = None, aim: Int[Tensor, " n"] | None = None, *, outside: bool = False
    ) -> tuple[Float[Tensor, " n"], Tensor]:
        """The loss per example beside its gradient, from one pass; -inf and zero for dropped examples.

        `outside`: `u` may lie outside the ball, where it counts for nothing.
        """
        return self._differentiate(self._fit(u) if outside else u, loss, code=False, aim=aim, outside=outside)

    def code_grad(self, u: Tensor, loss: Loss | None = None) -> Float[Tensor, "t n c h w"]:
        """Gradient of the loss with respect to the code of the pixels `u`: what an exact step over `codebook` needs.

        ValueError where the victim's encoder has no codebook or the code itself is attacked.
        """
        if self.codebook is None or self.ball.space != "pixel":
            raise ValueError(
                "expected pixels behind an encoder with a codebook (phase, latency, bit plane), found none; use pgd or "
                "apgd, or give Victim(codebook=...)"
            )
        return self._differentiate(u, loss, code=True)[1]

    def _differentiate(
        self, u: Tensor, loss: Loss | None, *, code: bool, aim: Tensor | None = None, outside: bool = False
    ) -> tuple[Tensor, Tensor]:
        rows = self._alive()
        aims = () if aim is None else (aim if rows is None else aim[rows],)
        nothing = torch.full_like(self.best_margin, -math.inf)
        if rows is not None and len(rows) == 0:
            return nothing, torch.zeros_like(self.guides[0].encode(u) if code else u)  # type: ignore[misc]
        shown = None if outside else self._shown(u)
        part, y = self._take(u if shown is None else shown, rows).detach(), self._labels(rows)
        axis = 1 if code else self.axis
        total: Tensor | None = None
        worth: Tensor | None = None
        margins: list[Tensor] = []
        for guide in self.guides:
            for k, copies in enumerate(self._passes(len(y))):
                if guide.memory is not None:
                    guide.memory.see(rows, copies, keep=k == 0)
                z, value, g = self._backward(
                    guide, self._repeat(part, copies), y.repeat(copies), loss, code, *(a.repeat(copies) for a in aims)
                )
                g = g.unflatten(axis, (copies, len(y))).sum(axis)
                value = value.view(copies, -1).sum(0)
                total = g if total is None else total + g
                worth = value if worth is None else worth + value
                if guide is self.guides[0] and guide.own:
                    margins.append(margin(z.float(), y.repeat(copies)).view(copies, -1))
        if not margins:
            with torch.no_grad():
                for copies in self._passes(len(y)):
                    z = self.f(self._repeat(part, copies)).float()
                    margins.append(margin(z, y.repeat(copies)).view(copies, -1))
        assert total is not None and worth is not None
        count = self.eot * len(self.guides)
        g, value = (total, worth) if count == 1 else (total / count, worth / count)
        self._see(u, _vote(margins), rows, shown)
        self.backwards += len(y) * count
        flat = g.movedim(axis, 0).flatten(1)
        self.zero_share.append(((flat == 0).float().mean(), len(y)))
        self._mark(self.dead, (flat == 0).all(1), rows)
        self._mark(self.nonfinite, ~flat.isfinite().all(1), rows)
        if rows is None:
            return value, g
        whole = g.new_zeros(*g.shape[:axis], len(self.y), *g.shape[axis + 1 :])
        return nothing.index_copy(0, rows, value), whole.index_copy_(axis, rows, g)

    def _backward(self, guide: Guide, part: Tensor, y: Tensor, loss: Loss | None, code: bool, *aim: Tensor):
        """Scores, loss per example, and gradient at one batch."""
        if code:
            assert guide.encode is not None and guide.logits is not None
            part = guide.encode(part)
        part = (part.clone() if part.is_inference() else part).detach().requires_grad_()
        exact = products(tf32=False) if part.is_cuda else contextlib.nullcontext()
        with exact, torch.enable_grad():  # the backward too: it asks when it runs
            z = (guide.logits if code else guide.f)(part)  # type: ignore[misc]
            value = cross_entropy(z, y) if loss is None else loss(z, y, *aim)
            if value.shape != y.shape:
                raise ValueError(f"loss: expected one number per example {tuple(y.shape)}, got {tuple(value.shape)}")
            (g,) = torch.autograd.grad(value.sum(), part, allow_unused=True) if value.requires_grad else (None,)
        if g is None:
            raise ValueError(
                f"no gradient reaches the {self.ball.space} input; expected a differentiable path, found none: give "
                "the encoder a backward rule (identity, weighted, secant), or use a gradient-free attack"
            )
        return z.detach(), value.detach().float(), g

    def project(self, u: Tensor) -> Tensor:
        """The nearest allowed point."""
        return self.ball.project(u, self.u0)

    def _fit(self, u: Tensor) -> Tensor:
        """Points that the ball holds but for rounding, put inside: the allowance is none for an attack to use."""
        return torch.where(self.each(self.ball.contains(u, self.u0)), self.project(u), u)

    def steepest(self, g: Tensor) -> Tensor:
        """The direction of length one, in the norm of the ball, in which a loss of gradient `g` grows fastest."""
        return self.ball.steepest(g if self.ball.norm == "linf" else g.nan_to_num(0.0))  # the sign of NaN is 0 as well

    def noise(self, g: Streams, shape: Sequence[int] | None = None) -> Tensor:
        """Uniform in -1..1 from each image's own stream, shaped as the attacked tensor, or [n *shape]."""
        like = self.u0 if shape is None else self.u0.new_empty(len(self.y), *shape)
        axis = self.axis if shape is None else 0
        if self.whose is None:
            return g.uniform(like, axis)
        images = self.whose.unique().tolist()  # restart by restart
        return torch.cat([g.of(images).uniform(part, axis) for part in like.split(len(images), axis)], axis)

    def fork(self, g: Streams) -> Streams:
        """A stream per example, or per copy of one, drawn off each image's own: for draws at every step of a restart.

        Restarts at once then draw what restarts one after the other draw.
        """
        seeds = ((self.noise(g, (1,))[:, 0].double() + 1) * 2**30).long().tolist()
        return Streams(0, seeds)

    def sample(self, g: Streams, *, corners: bool = False) -> Tensor:
        """A random allowed point per example: uniform in the ball, or one of its corners (`corners`); cut to the box.

        An L2 ball has no corners: its surface stands in for them. In an L0 ball, `eps` random entries are flipped.
        """
        ball = self.ball
        if ball.norm == "l2":  # direction and length in one draw: restarts at once draw as those one after the other
            image = self.u0.movedim(self.axis, 0)
            draw = self.noise(g, (image[0].numel() + 1,))
            gauss = torch.erfinv(draw[:, 1:].clamp(-1 + 1e-6, 1 - 1e-6)).reshape(image.shape).movedim(0, self.axis)
            share = ((draw[:, 0] + 1) / 2).pow(1 / image[0].numel())
            reach = self.each(torch.ones_like(share) if corners else share)
            return self.project(self.u0 + ball.eps * reach * ball.steepest(gauss))
        noise = self.noise(g)
        if ball.norm == "linf":
            return self.project(self.u0 + ball.eps * (noise.sign() if corners else noise))
        lo, hi = ball.box
        return self.project(self.u0 + (noise.abs() + 1) * (hi - lo) * torch.where(self.u0 == lo, 1.0, -1.0))

    def each(self, values: Tensor) -> Tensor:
        """One value per example [n], shaped to multiply the attacked tensor."""
        shape = [1] * self.u0.ndim
        shape[self.axis] = -1
        return values.view(shape)

    def _forget(self) -> None:
        for guide in self.guides:
            if guide.memory is not None:
                guide.memory.begin(len(self.y))

    def _margins(self, part: Tensor, y: Tensor) -> Float[Tensor, " k"]:
        """Margins of one batch, by the vote of all draws."""
        with torch.no_grad():
            return _vote([margin(self.f(part).float(), y)[None] for _ in range(self.eot)])

    def _passes(self, count: int) -> list[int]:
        """How many copies of `count` examples each pass holds, so that no pass is larger than the whole problem."""
        most = max(1, len(self.y) // count)
        full, rest = divmod(self.eot, most)
        return [most] * full + ([rest] if rest else [])

    def _repeat(self, part: Tensor, copies: int) -> Tensor:
        return part if copies == 1 else torch.cat([part] * copies, self.axis)

    def _labels(self, rows: Tensor | None) -> Tensor:
        return self.y if rows is None else self.y[rows]

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

    def _shown(self, u: Tensor) -> Tensor:
        """What the victim is shown for `u`: with `grid` the image of 256 grey levels next to it, inside the ball."""
        return self.ball.snap(u.detach(), self.u0) if self.grid else u.detach()

    def _see(
        self, u: Tensor, m: Float[Tensor, " k"], rows: Tensor | None, shown: Tensor | None = None
    ) -> Float[Tensor, " n"]:
        """Take note of margins `m` at `u`, which were asked at `shown`; of the examples `rows`, or of all.

        Without `shown`, `u` may lie outside of the ball, where it counts for nothing.
        """
        u, strict = u.detach(), shown is not None
        self.forwards += len(m) * self.eot
        if strict:
            self.trace.append((m.mean(), len(m)))
        if rows is not None:
            m = self.best_margin.index_copy(0, rows, m)
        inside = self.ball.contains(u, self.u0)
        self.left |= strict & ~inside.all()
        found = torch.where(inside, m, -math.inf)
        if shown is not None:
            u = shown
        elif self.grid:
            u, found = self._rounded(u, found)
        better = found > self.best_margin
        self.best = torch.where(self.each(better), u, self.best)
        self.best_margin = torch.where(better, found, self.best_margin)
        self.last_margin = m if rows is None else self.last_margin.index_copy(0, rows, m[rows])
        self.fooled = self.best_margin > 0
        return m

    def _rounded(self, u: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Points and margins with those that would be kept as fooling rounded to grey levels and asked about again.

        An encoder that rounds by itself, to the same levels, has been asked already.
        """
        new = ((m > 0) & (m > self.best_margin)).nonzero().squeeze(1)
        if len(new) == 0:
            return u, m
        asked = u.index_select(self.axis, new)
        points = self.ball.snap(u, self.u0).index_select(self.axis, new)
        rounds = self.codebook is not None and self.ball.space == "pixel" and all(g.own for g in self.guides)
        if not (rounds and torch.equal((points * 255).round(), (asked * 255).round())):
            y, margins = self.y[new], []
            with torch.no_grad():
                for copies in self._passes(len(new)):
                    z = self.f(self._repeat(points, copies)).float()
                    margins.append(margin(z, y.repeat(copies)).view(copies, -1))
            self.forwards += len(new) * self.eot
            m = m.index_copy(0, new, _vote(margins))
        return u.index_copy(self.axis, new, points), m


def _vote(margins: list[Tensor]) -> Float[Tensor, " n"]:
    """One margin per example from those of all draws [draws n]: the lower median, positive where most are fooled."""
    whole = margins[0] if len(margins) == 1 else torch.cat(margins)
    return whole[0] if len(whole) == 1 else whole.median(0).values
