"""G: does the gradient that attacks follow lead anywhere? A failure here is a sign of a masked gradient.

Unless said otherwise the loss is the lead of the wrong scores (log-sum-exp) over the true one, whose gradient cannot
saturate, at the clean images classified correctly.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrail._shapes import Float
from sparsetrail.checks.case import Case, Outcome, Skip, check, climb, flags, graded, lead
from sparsetrail.checks.chance import ALONE, discordant, sign_test, spearman, surely_over, surely_under
from sparsetrail.core import margin


@check("G1", "every image has a gradient", masking=True)
def zero_gradients(case: Case) -> Outcome:
    """Images whose gradient is exactly zero, or below 1e-30 throughout: any warns; fails where they are
    three or more and surely over 1 %. (AutoAttack's flag; Pintor et al. 2022, arXiv:2106.09947, indicator 1.)"""
    size = case.rows(case.gradient).abs().amax(1)
    n, zero = len(size), int((size == 0).sum())
    tiny = int(((size > 0) & (size < 1e-30)).sum())
    lost = zero + tiny
    return Outcome(
        graded(lost > 0, lost >= ALONE and surely_over(lost, n, 0.01)),
        lost / n,
        f"0; surely a share of 0.01 of at least {ALONE}",
        f"{zero} of {n} images have a gradient of exactly zero, {tiny} one below 1e-30",
        "attack with a wider surrogate, a smooth stand-in for the operation, or no gradient (square, spsa, rays)",
    )


@check("G2", "sparse gradients")
def sparse_gradients(case: Case) -> Outcome:
    """Median over images of the share of exactly zero gradient entries: over 0.9 warns. (The sparsity trail.)"""
    share = (case.rows(case.gradient) == 0).float().mean(1)
    median, most = float(share.median()), float(share.max())
    return Outcome(
        graded(median > 0.9, False),
        median,
        "0.9",
        f"{100 * median:.1f} % of the entries are zero in the median image, {100 * most:.1f} % in the worst, "
        f"n={len(share)}",
        "most entries never move under a sign step: add momentum, a wider surrogate or a search without gradients",
    )


@check("G3", "the gradient reaches the attacked tensor", masking=True)
def reaches(case: Case) -> Outcome:
    """Differentiating the scores leads back to the very tensor that is attacked; None fails, whatever it claims.

    Athalye et al. 2018, arXiv:1802.00420. A tensor made without a graph can still say requires_grad (BrainCog).
    """
    first = case.first
    reason = first if isinstance(first, str) else ""
    return Outcome(
        graded(False, bool(reason)),
        float(not reason),
        "1",
        f"{case.threat.space} space: {reason or 'the gradient arrives'}; declared route: "
        f"{case.victim.path(case.threat.space)}",
        "give what stops it a backward: of an encoder of grey levels st.from_codebook(table) in its place, or "
        "`code + (x - x.detach())`; an encoder of ours a rule (identity, weighted, secant); else attacks by scores",
    )


@check("G4", "cross-entropy does not saturate", masking=True)
def saturation(case: Case) -> Outcome:
    """The gradient of plain cross-entropy, as most libraries take it, against the same with the saturation taken out.

    Images with a zero plain gradient but not a zero real one: any warns, three or more and surely over 1 % fail; so
    does an attack of ten steps that is worse by plain cross-entropy than by the other (exact sign test, p < 0.05) by
    more than a point.
    (Carlini & Wagner 2017 on distillation; Croce & Hein 2020.)
    """
    case.needs_gradient()
    plain, real = (case.rows(case.grad(case.start, case.labels, f)).abs().amax(1) for f in (_plain, lead))
    n, gone = len(plain), int(((plain == 0) & (real > 0)).sum())
    flat = int((_plain(case.scores(case.start), case.labels) == 0).sum())
    stands = [
        flags(case.run(climb, steps=10, step=case.threat.eps / 4, loss=f).robust) for f in (_plain, lead)
    ]  # fmt: skip
    worse, better = discordant(*stands)
    weaker = (worse - better) / case.n > 0.01 and sign_test(worse, better) < 0.05
    return Outcome(
        graded(gone > 0, (gone >= ALONE and surely_over(gone, n, 0.01)) or weaker),
        gone / n,
        f"0; surely a share of 0.01 of at least {ALONE}; attack weaker by chance only",
        f"plain cross-entropy is exactly 0 for {flat} of {n} images, its gradient for {gone}; ten steps leave "
        f"{int(stands[0].sum())} of {case.n} by plain cross-entropy, {int(stands[1].sum())} without saturation",
        "attack by margin or dlr, or by this package's cross-entropy, which does not saturate; distrust figures "
        "taken with plain cross-entropy",
    )


@check("G5", "the gradient agrees with the loss", masking=True)
def agrees(case: Case) -> Outcome:
    """Directional derivatives against finite differences of 1, 2, 4 and 8/255: rank correlation over 32 random sign
    directions an image, and whether the loss rises along the gradient itself.

    Fails where the loss surely falls along the gradient, or every correlation is surely below 0, its mean and that of
    most images. Warns where neither the best mean correlation reaches 0.1 nor the loss surely rises for more images
    than not.
    """
    _ = case.gradient
    few = min(32, len(case.labels))
    u, y, g = case.start.narrow(case.axis, 0, few), case.labels[:few], case.gradient.narrow(case.axis, 0, few)
    rho = [spearman(*_differences(case, u, y, g, h / 255, 32)) for h in (1, 2, 4, 8)]
    mean = [float(r.mean()) for r in rho]
    high = [float(r.mean() + 2 * r.std(correction=0) / len(r) ** 0.5) for r in rho]
    rises, falls = _along(case, case.start, case.labels, case.gradient)
    against = max(high) < 0 and all(surely_under(int((r > 0).sum()), few, 0.5) for r in rho)  # one image is no proof
    backwards = against or surely_under(rises, rises + falls, 0.5)
    blind = max(mean) < 0.1 and not surely_over(rises, rises + falls, 0.5)
    return Outcome(
        graded(blind, backwards),
        max(mean),
        "0.1, or the loss rises along the gradient of most images; never surely below 0",
        "mean rank correlation " + ", ".join(f"{m:.2f}" for m in mean) + f" at 1, 2, 4, 8/255 over {few} images; the "
        f"loss rises along the gradient of {rises} images and falls for {falls}",
        "the gradient is not that of the scores: use another surrogate or an attack that asks for scores only",
    )


@check("G6", "the loss is locally linear")
def linearity(case: Case) -> Outcome:
    """|dL - g.d| / |dL| for a random and the steepest corner of the ball: a median above 1 in both warns.

    Qin et al. 2019, arXiv:1907.02610 (local linearity), as a ratio.
    """
    u, y, g = case.start, case.labels, case.gradient
    steepest = _sign_step(case, u, g)
    ratios = []
    for v in (case.within(u + case.scale * case.draw(u, 2, signs=True), u), steepest):
        change = (lead(case.scores(v), y) - lead(case.scores(u), y)).double()
        predicted = (case.rows(g) * case.rows(v - u)).sum(1).double()
        ratios.append(float(((change - predicted).abs() / change.abs().clamp(min=1e-12)).median()))
    return Outcome(
        graded(min(ratios) > 1, False),
        min(ratios),
        "1",
        f"median of |dL - g.d| / |dL|: {ratios[0]:.2f} along a random corner, {ratios[1]:.2f} along the steepest, "
        f"n={len(y)}",
        "the size of the gradient says little: prefer sign steps, best-of-path points and attacks by scores",
    )


@check("G7", "neighbouring gradients agree", masking=True)
def alignment(case: Case) -> Outcome:
    """Median cosine of the gradients at an image and at a random point of the ball: below 0.1 warns (shattered).

    Andriushchenko & Flammarion 2020, arXiv:2007.02617; Athalye et al. 2018 for the word.
    """
    u, y = case.start, case.labels
    near = _near(case, u)
    a, b = case.rows(case.gradient).double(), case.rows(case.grad(near, y)).double()
    cosine = F.cosine_similarity(a / _size(a), b / _size(b), dim=1)
    median = float(cosine.nan_to_num(0.0).median())  # a gradient of zero is aligned with nothing
    return Outcome(
        graded(median < 0.1, False),
        median,
        "0.1",
        f"median cosine {median:.2f} between gradients at the image and at a random point of the ball, n={len(y)}",
        "average gradients over noise around each point (smoothed gradient), or attack by scores",
    )


@check("G8", "stable scores")
def stability(case: Case) -> Outcome:
    """Mean relative change of the margin under 20 uniform draws of half the radius, capped at 1: from 0.5 on warns.

    Pintor et al. 2022, indicator 2, with the margin for the loss, which is near 0 where a net is sure.
    """
    u, y = case.start, case.labels
    m = margin(case.scores(u), y)
    moved = []
    for i in range(20):
        v = case.within(u + case.scale / 2 * case.draw(u, 10 + i), u)
        moved.append(((margin(case.scores(v), y) - m).abs() / m.abs().clamp(min=1e-12)).clamp(max=1))
    mean = float(torch.stack(moved).nan_to_num(1.0).mean())
    return Outcome(
        graded(mean >= 0.5, False),
        mean,
        "0.5",
        f"noise of half the radius changes the margin by {100 * mean:.0f} % on average, n={len(y)}",
        "a single gradient is noise here: average it over draws around the point",
    )


@check("G-nan", "finite gradients", masking=True)
def finite_gradients(case: Case) -> Outcome:
    """Gradients are finite at the image and at a random point of the ball. Any other fails."""
    u, y = case.start, case.labels
    near = _near(case, u)
    bad = [int((~case.rows(g).isfinite()).any(1).sum()) for g in (case.gradient, case.grad(near, y))]
    return Outcome(
        graded(False, sum(bad) > 0),
        sum(bad),
        "0",
        f"{bad[0]} of {len(y)} gradients are not finite at the image, {bad[1]} at a random point of the ball",
        "a NaN step moves nothing: find the 0/0 or the overflow in the backward (norms, logarithms, huge slopes)",
    )


@check("G-rand", "the same gradient twice", masking=True)
def same_gradient(case: Case) -> Outcome:
    """Two gradients at the same point, of length one, differ by no more than 1e-3 where the scores do not differ."""
    if case.victim.random:
        raise Skip("the victim draws noise: its gradients may differ")
    a, b = case.rows(case.gradient).double(), case.rows(case.grad(case.start, case.labels)).double()
    still = (case.scores(case.start) == case.scores(case.start)).all(1)
    gap = ((a / _size(a) - b / _size(b)).norm(dim=1).nan_to_num(0.0) * still).amax()
    return Outcome(
        graded(False, float(gap) > 1e-3),
        float(gap),
        "1e-3",
        f"gradients of length one differ by up to {float(gap):.2g} between two calls at the same {len(a)} points",
        "the backward draws noise: average many gradients (eot), or take the noise out",
    )


def _plain(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


def _size(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n 1"]:
    return rows.norm(dim=1, keepdim=True).clamp(min=1e-300)


def _sign_step(case: Case, u: Tensor, g: Tensor) -> Tensor:
    """The corner of the ball along the gradient."""
    return case.within(u + case.scale * g.sign().nan_to_num(0.0), u)


def _near(case: Case, u: Tensor) -> Tensor:
    """A random point of the ball; away from the ends of the box, where cutting would leave black pixels black."""
    d = case.scale * case.draw(u, 3)
    return case.within(u + torch.where(case.boxed(u + d) == u + d, d, -d), u)


def _differences(case: Case, u: Tensor, y: Tensor, g: Tensor, h: float, directions: int) -> tuple[Tensor, Tensor]:
    """What the loss does, and what the gradient foretells, along random sign directions [n directions]."""
    seen, foretold = [], []
    for i in range(directions):
        d = h * case.draw(u, 100 + i, signs=True)
        up, down = case.boxed(u + d), case.boxed(u - d)
        high, low = lead(case.scores(torch.cat([up, down], case.axis)), y.repeat(2)).chunk(2)
        seen.append(high - low)
        foretold.append((case.rows(g).double() * case.rows(up - down).double()).sum(1).float())
    return torch.stack(seen, 1), torch.stack(foretold, 1)


def _along(case: Case, u: Tensor, y: Tensor, g: Tensor) -> tuple[int, int]:
    """For how many images the loss rises, and falls, along the sign of the gradient: at both of two lengths, or at one
    while the other says nothing."""
    best = torch.zeros(len(y), device=u.device)
    for h in (2 / 255, min(8 / 255, max(case.scale, 1 / 255))):
        d = h * g.sign().nan_to_num(0.0)
        change = lead(case.scores(case.boxed(u + d)), y) - lead(case.scores(case.boxed(u - d)), y)
        best = best + change.sign().nan_to_num(0.0)
    return int((best > 0).sum()), int((best < 0).sum())
