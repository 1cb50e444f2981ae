"""Let an attack play, batch by batch, then judge what it found; its own word counts for nothing."""

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsetrail.core import Linf, Problem, Run, Streams, Victim, correct, image_axis, margin

Attack = Callable[..., None]


def attack(
    fn: Attack,
    victim: Victim,
    threat: Linf,
    x: Tensor,
    y: Tensor,
    *,
    batch: int = 64,
    seed: int = 0,
    drop: bool = True,
    keep: bool = False,
    data: str = "",
    say: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
    **knobs: Any,
) -> Run:
    """Run `fn(problem, streams, **knobs)` on images `x` [n c h w] in 0..1 with labels `y` [n], judge the best points.

    Only images classified correctly are attacked. `drop` leaves out images as soon as they are fooled; the result is
    the same, faster. `keep` stores the adversarial points, on the CPU. `say(done, n)` is called after every batch,
    `stop()` asked before it (KeyboardInterrupt follows). The result does not depend on `batch`, up to float rounding
    of the matrix products. Bad input is refused before anything runs.
    """
    _refuse(victim, threat, x, y, batch)
    knobs = settings(fn) | knobs
    try:
        inspect.signature(fn).bind(None, None, **knobs)
    except TypeError as error:
        raise ValueError(f"{_name(fn)}: {error}; expected settings {', '.join(settings(fn)) or 'none'}") from None
    drop = drop and not victim.random and victim.mode == "eval"  # exact only if one call decides, each image alone
    axis = image_axis(threat.space)
    f, judge = victim.of(threat.space), victim.judge(threat.space)
    started = time.perf_counter()
    clean, robust, points = [], [], []
    ties = forwards = backwards = dead = nonfinite = 0
    zero: list[Tensor] = []
    traces: list[Tensor] = []
    for i in range(0, len(y), batch):
        if stop is not None and stop():
            raise KeyboardInterrupt
        xs, ys = x[i : i + batch], y[i : i + batch]
        with torch.no_grad():
            u0 = xs if threat.space == "pixel" else victim.encode(xs).contiguous()
            right = correct(judge(u0).float(), ys)
        forwards += len(ys)
        rows = right.nonzero().squeeze(1)
        best, held = u0, right.clone()
        if len(rows):
            p = Problem(f, u0.index_select(axis, rows), ys[rows], threat, drop=drop)
            fn(p, Streams(seed, (rows + i).tolist()), **knobs)
            if bool(p.left):
                raise ValueError(f"{_name(fn)} left the perturbation set ({threat}); project before asking for a loss")
            with torch.no_grad():
                m = margin(judge(p.best).float(), ys[rows])
            held[rows] = ~(m > 0)
            best = u0.index_copy(axis, rows, p.best)
            ties += int((m == 0).sum())
            forwards += p.forwards + len(rows)
            backwards += p.backwards
            dead += int(p.dead.sum())
            nonfinite += int(p.nonfinite.sum())
            zero += p.zero_share
            if p.trace:
                traces.append(torch.stack(p.trace).float().cpu())
        clean.append(right.cpu())
        robust.append(held.cpu())
        if keep:
            points.append(best.cpu())
        if say is not None:
            say(min(i + batch, len(y)), len(y))
    return Run(
        attack=_name(fn),
        knobs=knobs,
        threat=threat,
        victim=victim.name,
        route=victim.path(threat.space),
        mode=victim.mode,
        data=data,
        seed=seed,
        clean=tuple(torch.cat(clean).tolist()),
        robust=tuple(torch.cat(robust).tolist()),
        ties=ties,
        forwards=forwards,
        backwards=backwards,
        zero_gradient=float(torch.stack(zero).mean()) if zero else None,
        dead_examples=dead,
        nonfinite=nonfinite,
        trace=_mean_trace(traces),
        seconds=time.perf_counter() - started,
        note="random encoder: clean and adversarial points judged on one fresh draw each, no averaging over draws"
        if victim.random
        else "",
        adversarial=torch.cat(points, axis) if keep else None,
    )


def settings(fn: Callable[..., Any]) -> dict[str, Any]:
    """The keyword settings of an attack with their defaults, as its signature names them."""
    found = inspect.signature(fn).parameters.values()
    return {p.name: p.default for p in found if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def _name(fn: Attack) -> str:
    return getattr(fn, "__name__", str(fn))


def _mean_trace(traces: list[Tensor]) -> tuple[float, ...]:
    """Mean margin per call over batches, as far as every batch got."""
    if not traces:
        return ()
    length = min(len(t) for t in traces)
    return tuple(torch.stack([t[:length] for t in traces]).mean(0).tolist())


def _refuse(victim: Victim, threat: Linf, x: Tensor, y: Tensor, batch: int) -> None:
    if victim.module is not None and victim.mode == "eval" and victim.module.training:
        raise ValueError(f"{victim.name}: expected a network in eval mode, found train mode; call net.eval() first")
    if x.ndim != 4 or len(x) == 0 or len(x) != len(y):
        raise ValueError(f"expected images [n c h w] and labels [n], n > 0, got {tuple(x.shape)} and {tuple(y.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"images: expected float32 pixels in 0..1, got {x.dtype}; divide uint8 images by 255")
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError("images: expected finite pixels in 0..1, found others; divide 8-bit images by 255")
    if int(y.min()) < 0 or int(y.max()) >= victim.classes:
        raise ValueError(f"labels: expected 0..{victim.classes - 1}, got {int(y.min())}..{int(y.max())}")
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
