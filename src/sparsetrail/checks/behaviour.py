"""C: do attacks behave as attacks on an unmasked victim do? Each check runs small attacks of its own.

Shares are judged by exact tests, of shares and of discordant images, so that a small sample accuses no one.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsetrail.attacks import codebook, fgsm, noise
from sparsetrail.checks.case import Case, Outcome, Skip, check, climb, flags, graded
from sparsetrail.checks.chance import ALONE, at_chance, discordant, sign_test, surely_over
from sparsetrail.core import Rate, Route, Run


@check("C1", "many steps beat one", masking=True)
def iterative(case: Case) -> Outcome:
    """PGD fools no fewer images than FGSM; fewer by more than chance (exact sign test, p < 0.05) fails.

    Athalye et al. 2018; Carlini et al. 2019, arXiv:1902.06705.
    """
    many, one = case.pgd(), case.run(fgsm)
    return _weaker(many, one, "PGD of 20 steps", "FGSM", "a loss that rises at once and then misleads is masked")


@check("C2", "a larger radius never helps the victim", masking=True)
def monotone(case: Case) -> Outcome:
    """Accuracy under PGD at 1/4, 1/2, 1, 2, 4 and 8 times the radius: a rise beyond chance over a smaller radius fails.

    Radii that hold no other image of 256 grey levels are left out. Exact sign test at 0.05 over the number of pairs.
    Carlini et al. 2019.
    """
    case.needs_gradient()
    top = case.whole.eps
    scaled = (replace(case.threat, eps=min(top, case.threat.eps * k)) for k in (0.25, 0.5, 1, 2, 4, 8))
    radii = sorted({t.eps for t in scaled if t.levels >= 1 or not case.grid})
    held = [flags(case.pgd(10, threat=replace(case.threat, eps=e)).robust) for e in radii]
    pairs = [(i, j) for j in range(len(radii)) for i in range(j)]
    p, i, j = min((sign_test(*discordant(held[j], held[i])), i, j) for i, j in pairs)
    rise = int(held[j].sum()) - int(held[i].sum())
    return Outcome(
        graded(False, p < 0.05 / len(pairs) and rise > 0),
        max(0, rise) / case.n,
        f"p {0.05 / len(pairs):.1g}",
        "standing at " + ", ".join(f"{255 * e:.3g}/255: {int(h.sum())}" for e, h in zip(radii, held, strict=True))
        + f" of {case.n}; largest rise p={p:.2g}",
        "the gradient misleads away from the image: start from several points, or attack by scores",
    )  # fmt: skip


@check("C3", "an unbounded attack wins", masking=True)
def unbounded(case: Case) -> Outcome:
    """60 steps from the clean image with all of the box allowed: any image left warns, surely more than chance fails.

    No random start: noise over the whole box fools by itself. Carlini et al. 2019; Pintor et al. 2022, indicator 6.
    """
    case.needs_gradient()
    run = case.run(climb, threat=case.whole, steps=60, step=case.whole.eps / 30)
    left, n = sum(run.robust), int(case.right.sum())
    return Outcome(
        graded(left > 0, at_chance(left, n, 1 / case.victim.classes) < 0.025),
        left / n,
        f"0; surely above chance, {1 / case.victim.classes:.2g}",
        f"{Rate(left, n)} of the images stand against an attack that may change anything",
        "the gradient leads nowhere: no radius can be trusted with it; attack by scores",
    )


@check("C4", "the attack has converged")
def converged(case: Case) -> Outcome:
    """Of 50 steps, how much of the gain of the margin falls in the last ten, median of survivors: above 0.05 warns.

    Pintor et al. 2022, indicator 4 (best margin so far, rescaled to 0..1).
    """
    case.needs_gradient()
    best: list[Tensor] = []
    run = case.run(climb, steps=50, step=case.threat.eps / 8, best=best, drop=False)
    steps = [torch.stack(best[i : i + 50]) for i in range(0, len(best), 50)]
    path = torch.cat(steps, 1).cpu()
    left = flags(run.robust)[flags(run.clean)]
    if not bool(left.any()):
        raise Skip("the attack left no image standing")
    path = path[:, left]
    gain = (path[-1] - path[0]).clamp(min=1e-30)
    late = float(((path[-1] - path[-11]) / gain).nan_to_num(0.0).median())
    return Outcome(
        graded(late > 0.05, False),
        late,
        "0.05",
        f"{100 * late:.1f} % of the gain of 50 steps falls in the last ten, median of {int(left.sum())} survivors",
        "take more steps",
    )


@check("C5", "twice the steps find no more")
def doubling(case: Case) -> Outcome:
    """PGD of 80 steps against 40 of the same path: newly fooled images surely over 0.5 % warn, surely over 5 % fail.

    Carlini et al. 2019. Failing, it says that 40 steps are too few, not that the victim is masked.
    """
    return _gain(case, case.pgd(40, pace=8), case.pgd(80, pace=8), "40 to 80 steps", "take more steps", 0.005)


@check("C6", "more is never weaker", masking=True)
def never_weaker(case: Case) -> Outcome:
    """PGD with twice the steps of half the length fools no fewer images than with the usual ones, but by chance."""
    usual, finer = case.pgd(), case.pgd(40, pace=8)
    return _weaker(finer, usual, "40 half steps", "20 steps", "steps that are too small to matter: a staircase loss")


@check("C7", "more starts find no more")
def restarts(case: Case) -> Outcome:
    """PGD from five random starts against one: newly fooled images surely over 1 % warn, surely over 5 % fail.

    Carlini et al. 2019; AutoAttack #54.
    """
    return _gain(case, case.pgd(), case.pgd(restarts=5), "1 to 5 starts", "take several restarts", 0.01)


@check("C8", "the last point is the best")
def silent(case: Case) -> Outcome:
    """Images fooled on the way of PGD but not at its end: surely over 5 % warns. Pintor et al. 2022, indicator 3.

    This package keeps the best point, so its figures do not suffer; those of a last-point attack would.
    """
    run = case.pgd(drop=False)
    assert run.silent is not None  # told where nobody leaves
    return Outcome(
        graded(surely_over(run.silent, run.n, 0.05), False),
        run.silent / run.n,
        "surely a share of 0.05",
        f"{run.silent} of {run.n} images were fooled on the way but not at the end of 20 steps",
        "keep the best point of the path; distrust figures of attacks that keep the last",
    )


@check("C13", "noise does not beat the gradient", masking=True)
def random_noise(case: Case) -> Outcome:
    """200 random points of the ball, half of them corners, on what PGD at like cost left standing (five starts, and 80
    half steps): surely more than 5 % of them fooled warns, surely more than 10 % fails. Carlini et al. 2019.

    Pixels behind a code are attacked by its codebook as well, since PGD knows nothing of the bits. Of a random victim,
    whose verdicts waver, noise must fool more images than PGD by more than chance as well.
    """
    runs = [case.pgd(restarts=5), case.pgd(80, pace=8)]
    if case.victim.codebook is not None and case.threat.space == "pixel" and case.threat.norm == "linf":
        runs.append(case.run(codebook, steps=40))
    standing = torch.stack([flags(r.robust) for r in runs]).all(0)
    n = int(standing.sum())
    if n == 0:
        raise Skip("PGD left no image standing")
    held = torch.stack([flags(case.run(noise, draws=100, corners=c).robust) for c in (False, True)]).all(0)
    fooled, lost = discordant(standing, held)
    chance = case.victim.random and sign_test(fooled, lost) >= 0.05
    warn, fail = (not chance and surely_over(fooled, n, share) for share in (0.05, 0.1))
    return Outcome(
        graded(warn, fail and fooled >= ALONE),
        fooled / n,
        f"surely a share of 0.05, 0.1 of at least {ALONE}",
        f"200 random points fool {fooled} of the {n} images that PGD left standing",
        "the gradient is worth less than chance: attack by scores, or by another gradient route",
    )


@check("C14", "enough noise samples a gradient")
def noise_samples(case: Case) -> Outcome:
    """For a random victim: PGD with four times the samples a gradient fools no more images, but by chance; more warns.

    Athalye et al. 2018. One sign test of discordant images, p < 0.05.
    """
    if not case.victim.random:
        raise Skip("the victim draws no noise")
    case.needs_gradient()
    a, b = case.pgd(10), case.pgd(10, eot=4 * case.eot)
    more, less = discordant(flags(a.robust), flags(b.robust))
    p = sign_test(more, less)
    return Outcome(
        graded(p < 0.05 and more > less, False),
        (more - less) / case.n,
        "p 0.05",
        f"{more} of {case.n} images fall only with {4 * case.eot} samples a gradient, {less} only with {case.eot}; "
        f"p={p:.2g}",
        f"take more than {4 * case.eot} samples (eot), doubling until nothing changes",
    )


@check("C16", "batch statistics while crafting")
def batch_statistics(case: Case) -> Outcome:
    """PGD with BatchNorm in train mode while crafting beside eval mode; reported, never raised.

    Running statistics and modes are put back. What counts is eval mode.
    """
    module = case.victim.module
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] if module else []
    if not norms or module is None or case.victim.mode != "eval" or module.training:
        raise Skip("no BatchNorm in eval mode to switch")
    case.needs_gradient()
    evaluated = case.pgd(10)
    kept = [{k: v.clone() for k, v in m.named_buffers(recurse=False)} for m in norms]
    crafted = replace(case, victim=replace(case.victim, mode="train"))
    try:
        for m in norms:
            m.train()
        run = crafted.pgd(10)
    finally:
        with torch.no_grad():
            for m, buffers in zip(norms, kept, strict=True):
                m.eval()
                for k, v in m.named_buffers(recurse=False):
                    v.copy_(buffers[k])
    gap = run.accuracy.value - evaluated.accuracy.value
    return Outcome(
        "pass",
        gap,
        "reported",
        f"PGD of 10 steps leaves {evaluated.accuracy} in eval mode, {run.accuracy} with batch statistics (clean "
        f"{run.clean_accuracy})",
    )


@check("C19", "another number of time steps finds no more")
def other_steps(case: Case) -> Outcome:
    """PGD by the gradient at half and twice the time steps: surely more fooled images than by its own warns.

    Bu et al. 2023 (RGA) vary T. Exact sign test, p < 0.05.
    """
    victim = case.victim
    if victim.rewire is None or case.threat.space != "pixel":
        raise Skip("needs a victim that can be rewired, attacked in pixels")
    own = flags(case.pgd(10).robust)
    words, worst = [], 1.0
    for steps in sorted({max(1, victim.steps // 2), 2 * victim.steps} - {victim.steps}):
        try:
            run = case.pgd(10, route=Route(steps=steps))
        except ValueError as error:
            raise Skip(f"T={steps}: {error}") from None
        more, less = discordant(own, flags(run.robust))
        worst = min(worst, sign_test(more, less) if more > less else 1.0)
        words.append(f"T={steps}: {more} of {case.n} more fooled, {less} fewer")
    return Outcome(
        graded(worst < 0.05, False), worst, "p 0.05", "; ".join(words), "add this route to the attacks of the claim"
    )  # fmt: skip


def _weaker(strong: Run, weak: Run, name: str, other: str, why: str) -> Outcome:
    """Fails where the attack that should be stronger fools fewer images than chance explains."""
    only_weak, only_strong = discordant(flags(strong.robust), flags(weak.robust))
    p = sign_test(only_weak, only_strong)
    return Outcome(
        graded(False, p < 0.05 and only_weak > only_strong),
        (only_weak - only_strong) / strong.n,
        "p 0.05",
        f"{name} leave {sum(strong.robust)} of {strong.n}, {other} {sum(weak.robust)}; only the weaker "
        f"fools {only_weak}, only the stronger {only_strong}, p={p:.2g}",
        f"{why}: use restarts, larger steps or an attack by scores",
    )


def _gain(case: Case, less: Run, more: Run, what: str, advice: str, warn: float) -> Outcome:
    """Raised where more of an attack surely fools more."""
    new, lost = discordant(flags(less.robust), flags(more.robust))  # lost: only where a random victim wavers
    chance = case.victim.random and sign_test(new, lost) >= 0.05
    raised, fail = (not chance and surely_over(max(0, new - lost), case.n, share) for share in (warn, 0.05))
    return Outcome(
        graded(raised, fail),
        new / case.n,
        f"surely a share of {warn:g}, 0.05",
        f"from {what}: {new} of {case.n} images more are fooled ({sum(less.robust)} to {sum(more.robust)})",
        advice,
    )
