"""Let an attack play, batch by batch, then judge what it found; its own word counts for nothing."""

import inspect
import math
import numbers
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from sparsetrail.core import Guide, Problem, Route, Run, Streams, Threat, Victim, correct, grey, margin
from sparsetrail.core.inputs import refuse_images, refuse_threat
from sparsetrail.core.precision import in_full
from sparsetrail.core.problem import enough
from sparsetrail.core.victim import normalised_by_batch, refuse_train_mode

Attack = Callable[..., None]
COUNTS = ("steps", "restarts", "draws", "queries", "targets", "samples", "first")
FROM_ZERO, SHARES = ("momentum", "q", "decay"), ("p_init", "share", "momentum", "q", "rho", "alpha_max")
EOT = 10  # gradients averaged at every step where a victim draws noise, unless told otherwise


@in_full
def attack(
    fn: Attack,
    victim: Victim,
    threat: Threat,
    x: Tensor,
    y: Tensor,
    *,
    route: Route | str | Sequence[Route | str] | None = None,
    guide: Victim | None = None,
    eot: int | None = None,
    votes: int = 10,
    batch: int = 64,
    seed: int = 0,
    drop: bool = True,
    keep: bool = False,
    indices: Sequence[int] | None = None,
    data: str = "",
    say: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
    **knobs: Any,
) -> Run:
    """Run `fn(problem, streams, **knobs)` on images `x` [n c h w] in 0..1 with labels `y` [n], judge the best points.

    Only images classified correctly are attacked. `route` differentiates the victim by another backward (a string names
    that of its neurons), several routes by the mean of their gradients; `guide` is another victim whose gradient is
    followed instead (a transfer attack, its points asked of this victim at every step). `eot` gradients are averaged at
    every step (expectation over transformation, Athalye et al. 2018, arXiv:1707.07397), by default EOT of a victim that
    draws noise and one of any other; points of a victim that draws noise are judged by the majority of `votes` fresh
    draws.

    `drop` leaves out images as soon as they are fooled: the same images fall, faster, and what is said of gradients is
    said of those that still stand. In pixel space, where `x` are images of 256 grey levels, the victim is shown none
    but such: points are rounded to them, and a radius holds whole levels. `keep` stores the adversarial points, on the
    CPU. `indices` are the places of the images in their data set: random streams are keyed by them, and what a victim
    that draws noise and can be reseeded draws is keyed by the first of a batch. `say(done, n)` is called at the start
    and after every batch, `stop()` asked before it (KeyboardInterrupt follows). Which images fall does not depend on
    `batch`, up to float rounding of the matrix products, unless the victim draws noise or normalises by the batch; what
    is counted of calls and gradients does. Autocast around the call is switched off: one that the victim needs belongs
    into its `logits`. Bad input is refused before anything runs, and the images given are never written to.
    """
    _refuse(fn, victim, threat, x, y)
    if indices is not None:
        indices = tuple(torch.as_tensor(indices).reshape(-1).tolist() if hasattr(indices, "tolist") else indices)
    knobs = _settled(fn, knobs, threat)
    eot = samples(victim) if eot is None else eot
    _refuse_counts(len(y), batch=batch, eot=eot, votes=votes, seed=seed, indices=indices)
    _refuse_guide(victim, threat, route, guide)
    guides, path = _guides(victim, threat, route, guide)
    grid = on_grey_levels(threat, x)
    votes = votes if victim.random else 1
    mixed = normalised_by_batch(victim.module)
    match = _Match(
        fn=fn,
        knobs=knobs,
        victim=victim,
        threat=threat,
        guides=guides,
        codebook=(guide or victim).codebook,  # of the code whose gradient is followed
        grid=grid,
        drop=drop and not victim.random and victim.mode == "eval" and not mixed,  # one call decides, each image alone
        eot=eot,
        votes=votes,
        seed=seed,
        f=victim.of(threat.space),
        judge=victim.judge(threat.space),
    )
    places, started, played = list(range(len(y)) if indices is None else indices), time.perf_counter(), []
    for i in range(0, len(y), batch):
        if say is not None:
            say(i, len(y))
        if stop is not None and stop():
            raise KeyboardInterrupt
        some = slice(i, i + batch)
        for who in (victim, *([] if guide is None else [guide])):  # whatever was asked of them before
            who.draw_by(f"{who.name} {_name(fn)} {path} {seed} {places[i]}")
        played.append(match.play(x[some].clone(), y[some].long(), places[some], keep=keep))
    if say is not None:
        say(len(y), len(y))
    starts = range(0, len(y), batch)
    notes = [
        f"random victim: mean of {eot} gradients a step, points judged by the majority of {votes} fresh draws"
        if victim.random
        else "",
        f"{mixed} keeps no running statistics, so that the images of a batch of {batch} decide of each other"
        if mixed
        else "",
        f"images of 256 grey levels: the radius holds {threat.levels}" if grid and threat.between_levels else "",
    ]
    zero = [part for p in played for part in p.zero]
    return Run(
        attack=_name(fn),
        knobs=knobs,
        threat=threat,
        victim=victim.name,
        route=path,
        mode=victim.mode,
        data=data,
        seed=seed,
        clean=tuple(flag for p in played for flag in p.right),
        robust=tuple(flag for p in played for flag in p.held),
        ties=sum(len(p.tied) for p in played),
        forwards=sum(p.forwards for p in played),
        backwards=sum(p.backwards for p in played),
        zero_gradient=_mean(zero) if zero else None,
        dead_examples=sum(p.dead for p in played),
        nonfinite=sum(p.nonfinite for p in played),
        trace=mean_trace([p.trace for p in played]),
        seconds=time.perf_counter() - started,
        note="; ".join(filter(None, notes)),
        indices=indices,
        silent=None if match.drop else sum(p.silent for p in played),
        eot=eot,
        votes=votes,
        tied=tuple(i + row for i, p in zip(starts, played, strict=True) for row in p.tied),
        adversarial=torch.cat([p.points for p in played if p.points is not None], threat.axis) if keep else None,
    )


@dataclass(frozen=True, kw_only=True)
class _Played:
    """What one batch came to: flags and numbers of its images, `tied` by their rows in it."""

    right: list[bool]
    held: list[bool]
    points: Tensor | None
    tied: list[int] = field(default_factory=list)
    silent: int = 0
    forwards: int = 0
    backwards: int = 0
    dead: int = 0
    nonfinite: int = 0
    zero: list[tuple[float, int]] = field(default_factory=list)
    trace: list[tuple[float, int]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Match:
    """An attack against a victim: all that stays the same from batch to batch."""

    fn: Attack
    knobs: Mapping[str, Any]
    victim: Victim
    threat: Threat
    guides: Sequence[Guide]
    codebook: Tensor | None
    grid: bool
    drop: bool
    eot: int
    votes: int
    seed: int
    f: Callable[[Tensor], Tensor]
    judge: Callable[[Tensor], Tensor]

    def play(self, x: Tensor, y: Tensor, places: Sequence[int], *, keep: bool) -> _Played:
        """Attack the images of one batch that are right, judge the best point of each."""
        u0, right = self._clean(x, y)
        rows, axis = right.nonzero().squeeze(1), self.threat.axis
        looked = len(y) * self.votes
        if len(rows) == 0:
            return _Played(
                right=right.tolist(), held=right.tolist(), points=u0.cpu() if keep else None, forwards=looked
            )
        p = Problem(
            self.f, u0.index_select(axis, rows), y[rows], self.threat,
            drop=self.drop, eot=self.eot, grid=self.grid, guides=self.guides, codebook=self.codebook,
        )  # fmt: skip
        self.fn(p, Streams(self.seed, [places[r] for r in rows.tolist()]), **self.knobs)
        if bool(p.left):
            raise ValueError(
                f"{_name(self.fn)} left the perturbation set ({self.threat}); project before asking for a loss"
            )
        point = self.threat.snap(p.best, p.u0) if self.grid else p.best
        with torch.no_grad():
            _, m = judged(self.judge, point, y[rows], self.votes)
        held = right.clone()
        held[rows] = ~(m > 0)
        return _Played(
            right=right.tolist(),
            held=held.tolist(),
            points=u0.index_copy(axis, rows, point).cpu() if keep else None,
            tied=rows[m == 0].tolist(),
            silent=int(((m > 0) & ~(p.last_margin > 0)).sum()),
            forwards=looked + p.forwards + len(rows) * self.votes,
            backwards=p.backwards,
            dead=int(p.dead.sum()),
            nonfinite=int(p.nonfinite.sum()),
            zero=_read(p.zero_share),
            trace=_read(p.trace),
        )

    def _clean(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The tensor that is attacked, and which of it is right; ValueError for a victim that writes into its input."""
        with torch.no_grad():
            as_given = x._version
            u0 = clean_point(self.victim, self.threat, x)
            fresh = u0._version
            right = judged(self.judge, u0, y, self.votes)[0]
        if x._version != as_given or u0._version != fresh:
            raise ValueError(
                f"{self.victim.name}: expected a victim that leaves its input as it is, found one that writes into it; "
                "let it work on a copy, e.g. x.clone(), or Normalize(inplace=False)"
            )
        return u0, right


def clean_point(victim: Victim, threat: Threat, x: Tensor) -> Tensor:
    """The clean tensor that is attacked: images or their code; ValueError where the threat holds no such tensor."""
    u0 = x if threat.space == "pixel" else victim.encode(x).contiguous()
    if u0.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{victim.name}: expected a code of float32 (or float64) to attack, got {u0.dtype}; let `encode` give "
            "float32 and `logits` cast it"
        )
    if not bool(threat.contains(u0, u0).all()):
        lo, hi = threat.box
        ends = f"of {lo:g} and {hi:g} alone, as an L0 ball flips them" if threat.norm == "l0" else f"in {lo:g}..{hi:g}"
        raise ValueError(
            f"{victim.name}: expected a clean {'image' if threat.space == 'pixel' else 'code'} {ends} (the box of the "
            f"threat), got values in {float(u0.min()):.3g}..{float(u0.max()):.3g}; give a box that holds them: "
            f"{threat.norm.capitalize()}(..., box=(lo, hi))"
        )
    return u0


def _settled(fn: Attack, given: Mapping[str, Any], threat: Threat) -> dict[str, Any]:
    """The settings of an attack, the defaults of those not given among them; ValueError for what it cannot take."""
    knobs = settings(fn) | {k: _number(v) for k, v in given.items()}
    try:
        inspect.signature(fn).bind(None, None, **knobs)
    except TypeError as error:
        raise ValueError(
            f"{_name(fn)}: {error}; expected an attack of a problem and its streams, with settings "
            f"{', '.join(settings(fn)) or 'none'}"
        ) from None
    if getattr(fn, "__module__", "").startswith("sparsetrail."):  # somebody's own attack knows its settings itself
        check_settings(_name(fn), knobs, still=threat.eps == 0)
    return knobs


def _refuse_counts(n: int, *, seed: int, indices: Sequence[int] | None, **counts: Any) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {count!r}")
    if indices is not None and len(indices) != n:
        raise ValueError(f"indices: expected one an image ({n}), got {len(indices)}")
    for name, keys in (("indices", indices or ()), ("seed", (seed,))):
        if wrong := [k for k in keys if isinstance(k, bool) or not isinstance(k, numbers.Integral)]:
            raise ValueError(f"{name}: expected whole numbers, by which random streams are keyed, got {wrong[0]!r}")


def _refuse_guide(victim: Victim, threat: Threat, route: Any, guide: Victim | None) -> None:
    if guide is None:
        return
    if route is not None:
        raise ValueError("expected a route or a guide, got both; rewire the guide itself: guide.by(route)")
    if guide.classes != victim.classes:
        raise ValueError(f"guide {guide.name}: expected {victim.classes} classes as the victim's, got {guide.classes}")
    if threat.space == "encoded" and guide.steps != victim.steps:
        raise ValueError(f"guide {guide.name}: expected {victim.steps} steps in encoded space, got {guide.steps}")


def _guides(
    victim: Victim, threat: Threat, route: Route | str | Sequence[Route | str] | None, guide: Victim | None
) -> tuple[list[Guide], str]:
    """Whose gradients are followed, and that in words."""
    if guide is not None:
        return [Guide.of(guide, threat, own=False)], f"transfer from {guide.name}: {guide.path(threat.space)}"
    asked = [route] if isinstance(route, Route | str) else list(route or (Route(),))
    routes = [Route(neuron=None if r == "own" else r) if isinstance(r, str) else r for r in asked]
    by = []
    for r in routes:
        if r.steps is not None and threat.space == "encoded":
            raise ValueError(f"route {r}: another number of steps is another encoded tensor; expected space='pixel'")
        by.append(victim.by(r))
    own = [v is victim or not (v.stand_in or victim.stand_in) for v in by]
    if not own[0] and any(own):  # scores come from the first guide where they are the victim's
        raise ValueError("routes: expected those of the victim's own forward first, and other steps and cba behind")
    path = " + ".join(v.path(threat.space) for v in by)
    return [Guide.of(v, threat, own=o) for v, o in zip(by, own, strict=True)], path


def check_settings(attack: str, knobs: Mapping[str, Any], *, still: bool = False) -> None:
    """ValueError for a number that leaves an attack of ours without work, and so every image standing.

    In a ball of radius 0 (`still`) a step may be 0 as well.
    """
    for name, value in knobs.items():
        if isinstance(value, Tensor):
            raise ValueError(f"{attack}: {name}: expected a plain number, got a tensor; give its .item()")
        if isinstance(value, bool) or not isinstance(value, int | float):  # a loss by its name, or as a function
            continue
        whole, zero = name in COUNTS, name in FROM_ZERO or (still and name == "step")
        fits = isinstance(value, int) or (not whole and math.isfinite(value))
        if not fits or value < 0 or (value == 0 and not zero) or (name in SHARES and value > 1):
            kind = "a positive whole number" if whole else "a number of 0 or more" if zero else "a positive number"
            most = ", at most 1" if name in SHARES else ""
            raise ValueError(f"{attack}: {name}: expected {kind}{most}, got {value!r}")


def judged(f: Callable[[Tensor], Tensor], u: Tensor, y: Tensor, votes: int) -> tuple[Tensor, Tensor]:
    """By most of `votes` calls: classified correctly, per example; and the lower median of the margins."""
    z = [_scores(f(u), len(y)).float() for _ in range(votes)]
    enough(z[0], y)
    right = torch.stack([correct(v, y) for v in z]).sum(0) * 2 > votes
    return right, torch.stack([margin(v, y) for v in z]).median(0).values


def _scores(z: Any, n: int) -> Tensor:
    if not isinstance(z, Tensor) or z.ndim != 2 or len(z) != n:
        found = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f"victim: expected a tensor of scores [n k], n = {n}, found {found}; return one row an image")
    return z


def samples(victim: Victim) -> int:
    """How many gradients are averaged at every step unless somebody says."""
    return EOT if victim.random else 1


def settings(fn: Callable[..., Any]) -> dict[str, Any]:
    """The keyword settings of an attack with their defaults, as its signature names them."""
    found = inspect.signature(fn).parameters.values()
    return {p.name: p.default for p in found if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def _number(value: Any) -> Any:
    """A number of another library as Python's own; all else as it is."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def on_grey_levels(threat: Threat, x: Tensor) -> bool:
    """Whether points are rounded to 256 grey levels, as all images `x` are; ValueError for a radius below one level."""
    if threat.space != "pixel" or threat.box != (0.0, 1.0) or not bool(grey(x).all()):
        return False
    if threat.norm != "l0" and threat.eps > 0 and threat.levels < 1:
        raise ValueError(
            f"eps: less than one grey level ({255 * threat.eps:.3g} of one) holds no other 8-bit image; expected at "
            "least 1/255"
        )
    return True


def _name(fn: Attack) -> str:
    return getattr(fn, "__name__", str(fn))


def _read(parts: Sequence[tuple[Tensor, int]]) -> list[tuple[float, int]]:
    """Means that lie on a device, and of how many examples each is, read at once."""
    means = torch.stack([mean for mean, _ in parts]).tolist() if parts else []
    return [(mean, count) for mean, (_, count) in zip(means, parts, strict=True)]


def mean_trace(traces: Sequence[Sequence[tuple[float, int]]]) -> tuple[float, ...]:
    """Call by call, the mean of all examples asked about from the means of parts and how many those are."""
    return tuple(_mean([part for part in call if part is not None]) for call in zip_longest(*traces))


def _mean(parts: Sequence[tuple[float, int]]) -> float:
    """Mean of all examples from the means of parts of them and how many those are."""
    return sum(mean * count for mean, count in parts) / sum(count for _, count in parts)


def _refuse(fn: Any, victim: Any, threat: Any, x: Any, y: Any) -> None:
    if not callable(fn):
        raise ValueError(f"expected an attack as a function, such as sparsetrail.pgd, got {fn!r}")
    refuse_images(victim, x, y)
    refuse_threat(threat)
    if victim.mode == "eval":
        refuse_train_mode(victim.module, victim.name, parts=not victim.random)  # dropout left on is a victim's noise
