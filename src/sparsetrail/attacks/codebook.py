"""First-order attack through a discrete encoder: the encoder is taken exactly, only the network is linearised.

Ours; relatives are LS-PGA (Buckman et al. 2018, for thermometer codes) and HotFlip (Ebrahimi et al. 2018,
arXiv:1712.06751).
"""

import math

import torch
from torch import Tensor

from sparsetrail.attacks.losses import loss_named
from sparsetrail.attacks.moves import by_mean
from sparsetrail.core import Problem, Streams


def codebook(
    p: Problem,
    g: Streams,
    *,
    steps: int = 20,
    q: float = 0.1,
    momentum: float = 0.5,
    loss: str = "ce",
    restarts: int = 1,
) -> None:
    """Move the share `q` of pixels that gain most to the grey level whose code the gradient likes best; repeat.

    The first start is the clean image, the others are random images of grey levels. The gradient with respect to the
    code is scaled to mean magnitude 1 and carries `momentum` of those before it. Points are grey levels within the
    radius by construction: nothing is rounded, nothing is projected. An image that comes back to where it was goes on
    from its best point instead, half of its pixels anywhere within reach.
    """
    if p.ball.norm != "linf" or p.ball.space != "pixel":
        raise ValueError(f"codebook: expected an L-infinity ball in pixel space, got {p.ball}; use pgd, apgd or sda")
    of, clean = loss_named(loss), _levels(p.u0)
    table = torch.zeros(256, 1) if p.codebook is None else p.codebook  # without one, code_grad says so
    code, column = table.to(p.u0).unique(dim=1, return_inverse=True)  # steps that show the same are added up
    key = torch.randint(-(2**62), 2**62, clean.shape[1:], generator=torch.Generator().manual_seed(0)).to(clean.device)
    done = 0
    while done < restarts:
        with p.restarts(restarts - done) as (r, played):
            level0 = clean if r.whose is None else clean[r.whose]
            low, high = _reach(r, level0)
            own = r.fork(g)
            first = done + torch.arange(len(level0), device=clean.device) // (len(level0) // played) == 0
            level = torch.where(r.each(first), level0, _anywhere(own, low, high))
            held, seen = torch.zeros(()), (level * key).flatten(1).sum(1, keepdim=True)
            for _ in range(steps):
                if r.over:
                    break
                d = r.code_grad(_pixels(r, level, level0), of).to(code)
                d = by_mean(d.new_zeros(code.shape[1], *d.shape[1:]).index_add_(0, column, d), 1)
                held = momentum * held + d
                level = _moved(held, code, level, low, high, q)
                mark = (level * key).flatten(1).sum(1, keepdim=True)
                again = (seen == mark).any(1)
                rows = again.nonzero().squeeze(1)
                if len(rows):
                    some = own.of(rows.tolist())  # the others draw nothing: what is in the batch must not matter
                    keep = _anywhere(some, torch.zeros_like(low[rows]), torch.ones_like(low[rows])) == 1
                    away = _anywhere(some, low[rows], high[rows])
                    level = level.index_copy(0, rows, torch.where(keep, _levels(r.best[rows]), away))
                    held = torch.where(again.view(1, -1, 1, 1, 1), 0.0, held)
                    mark = (level * key).flatten(1).sum(1, keepdim=True)
                seen = torch.cat([seen, mark], 1)
            r.loss(_pixels(r, level, level0))
        done += played


def _anywhere(g: Streams, low: Tensor, high: Tensor) -> Tensor:
    """A random whole number from `low` to `high`, both included, per pixel."""
    share = (g.uniform(torch.empty(low.shape, device=low.device), 0) + 1) / 2
    return torch.minimum(low + (share * (high - low + 1)).long(), high)


def _levels(u: Tensor) -> Tensor:
    return (u.double() * 255).round().long()


def _reach(p: Problem, level0: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest grey level allowed, per pixel; the clean one always is."""
    (floor, ceiling), x = p.ball.box, p.u0.double()
    low = (255 * (x - p.ball.eps).clamp(min=floor) - 1e-4).ceil().long()
    high = (255 * (x + p.ball.eps).clamp(max=ceiling) + 1e-4).floor().long()
    return torch.minimum(low, level0), torch.maximum(high, level0)


def _pixels(p: Problem, level: Tensor, level0: Tensor) -> Tensor:
    return torch.where(level == level0, p.u0, (level.double() / 255).to(p.u0.dtype))


def _moved(d: Tensor, code: Tensor, level: Tensor, low: Tensor, high: Tensor, q: float) -> Tensor:
    """The levels after the share `q` of pixels with most to gain, per image, have taken their best level."""
    best, gain = torch.empty_like(level).flatten(), d.new_empty(level.numel())
    flat, now, least, most = d.flatten(1), level.flatten(), low.flatten(), high.flatten()
    wide = int((high - low).max()) + 1
    for i in range(0, len(now), 1 << 14):  # scores of a part of the pixels at a time: 16 MB
        part = slice(i, i + (1 << 14))
        score = flat[:, part].t() @ code.t()
        window = torch.minimum(least[part, None] + torch.arange(wide, device=now.device), most[part, None])
        top, at = score.gather(1, window).max(1)
        best[part] = window.gather(1, at[:, None]).squeeze(1)
        gain[part] = top - score.gather(1, now[part, None]).squeeze(1)
    gain, best = gain.view(len(level), -1), best.view(len(level), -1)
    count = min(max(1, math.ceil(q * gain.shape[1])), gain.shape[1])
    ahead = gain.topk(count, 1)
    chosen = torch.zeros_like(gain, dtype=torch.bool).scatter_(1, ahead.indices, ahead.values > 0)
    return torch.where(chosen.view(level.shape), best.view(level.shape), level)
