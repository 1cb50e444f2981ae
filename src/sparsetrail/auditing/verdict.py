"""What an audit concludes: findings of the battery, and the verdict by the rules of docs/findings.md."""

from collections.abc import Collection, Sequence

from sparsetrail.auditing.battery import Budget, Kind, Stage
from sparsetrail.checks.chance import ALONE, at_chance, surely_over
from sparsetrail.core import Finding, Rate, Run
from sparsetrail.core.results import Verdict

NOT_RUN = "not run: nothing stood, nothing of the kind was given, or this victim does not allow it"
NO_GRADIENT = "no attack by a gradient came before it"
FOLLOW = ("S1", "S6", "S7")  # fail where scores change by themselves: what makes them do so is named first
BLIND = 0.2  # share of the images left by the gradient attacks; honest small SNNs were measured at 0.06 to 0.16
FELL = 5  # images that the battery took of those the default attack left; fewer say nothing of that attack
FEW = 100  # images below which nothing is concluded
NOT_ANEW = "no victim made anew was given"


def judge(
    findings: Sequence[Finding],
    default: Sequence[bool],
    worst: Sequence[bool],
    clean: Sequence[bool],
    claim: float | None,
    complete: bool,
    budget: Budget = "standard",
    tied: Collection[int] = (),
) -> tuple[Verdict, str]:
    """The verdict and its reason, by the rules of docs/findings.md; `tied` are the images brought to a tie."""
    n = len(worst)
    failed = [f for f in findings if f.level == "fail"]
    sanity = sorted((f for f in failed if f.id.startswith("S")), key=lambda f: f.id in FOLLOW)
    if sanity:
        return "inconclusive", f"the evaluation itself is not sound, it fails: {_names(sanity)}; mend that first"
    masking = [f for f in failed if f.masking]
    now, before = Rate(sum(worst), n), Rate(sum(default), n)
    fell = f"{100 * (before.value - now.value):.1f} points below the default attack's {100 * before.value:.1f} %"
    if masking:
        more = (
            f"the worst case, {now}, is {fell}" if now.k < before.k else f"no attack found more than the default: {now}"
        )
        return (
            "masked",
            "evidence that a gradient hides adversarials, so that figures got by following it may be too high; failed: "
            f"{_names(masking)}; {more}",
        )
    if claim is not None and claim > Rate(sum(clean), n).interval()[1]:
        return (
            "overstated",
            f"{100 * claim:.1f} % were claimed, more than are right without any attack; worst case {now}",
        )
    if claim is None:
        lost = sum(a and not b for a, b in zip(default, worst, strict=True))
        if lost / n > 0.01 and lost >= FELL:
            return "overstated", f"the default attack is too weak: the worst case, {now}, is {fell}"
    elif now.value < claim - 0.01 and at_chance(n - now.k, n, 1 - claim) < 0.05:
        return "overstated", f"{100 * claim:.1f} % were claimed, the worst case is {now}"
    if not any(clean):
        return "inconclusive", "no image is classified correctly: there is nothing to attack"
    if n < FEW:
        return "inconclusive", f"{n} images are too few to support a claim; expected at least {FEW}, better 1000"
    if budget == "quick":
        return (
            "inconclusive",
            f"a quick look found nothing worse than {now}{_by_ties(tied, worst)}; that supports nothing, run the whole "
            "battery",
        )
    if not complete:
        return "inconclusive", f"the battery did not finish; so far {now}"
    ties = [j for j in tied if worst[j]]
    if len(ties) >= ALONE and len(ties) / n > 0.01:
        strict = Rate(now.k - len(ties), n)
        return (
            "inconclusive",
            f"{len(ties)} images stand by a tie of the best scores; counted as lost they leave {strict}",
        )
    if any(f.id == "G5" and f.level == "warn" for f in findings):
        return (
            "inconclusive",
            f"the gradient says nothing about the loss (G5), so that the attacks had little to go by: {now}",
        )
    others = [f for f in failed if not f.masking]
    beside = f"; weaknesses of weaker attacks: {_names(others)}" if others else ""
    if any(f.id == "S3f" and f.evidence == NOT_ANEW for f in findings):
        beside += f"; whether it remembers what it was shown was not asked (S3f): {NOT_ANEW}"
    what = f"the default attack's {100 * before.value:.1f} %" if claim is None else f"the claimed {100 * claim:.1f} %"
    return "supported", f"nothing in the battery beats {what} by more than chance: {now}{beside}"


def _by_ties(tied: Collection[int], worst: Sequence[bool]) -> str:
    count = sum(worst[j] for j in tied)
    return f" ({count} of them by a tie of the best scores)" if count else ""


def _names(findings: Sequence[Finding]) -> str:
    return ", ".join(f"{f.name} ({f.id})" for f in findings)


def battery_findings(broken_by: Sequence[str | None], runs: Sequence[Run], stages: Sequence[Stage]) -> list[Finding]:
    """C9, C10, C11, C15: which kind of attack broke what the ones before it had left.

    `runs` are those made, one for every stage from the first, each on the images then standing.
    """
    n, kinds = len(broken_by), {s.label: s.kind for s in stages}
    made = [s.kind for s in stages[: len(runs)]]

    def finding(id: str, name: str, kind: Kind, warn: float, fail: float, advice: str, hides: bool) -> Finding:
        sizes = [r.n for r, s in zip(runs, stages, strict=False) if s.kind == kind]
        left = "" if stages and stages[0].kind == kind else " left by the attacks before it"
        fallen = sum(b is not None and kinds[b] == kind for b in broken_by)
        led = {"default", "gradient", "route", "code", "time"} - {kind}
        if not sizes or (kind != "route" and not led & set(made[: made.index(kind)])):
            why = NO_GRADIENT if sizes else NOT_RUN
            return Finding(id=id, name=name, level="not applicable", value=None, limit="", evidence=why)
        share = fallen / n
        blind = hides and fallen >= ALONE and surely_over(fallen, sizes[0], BLIND)
        level = "fail" if blind or (share > fail and fallen >= ALONE) else "warn" if share > warn else "pass"
        bound = f"; masking where it surely fools over {100 * BLIND:g} % of those left to it" if hides else ""
        return Finding(
            id=id, name=name, level=level, value=share,
            limit=f"warn above {100 * warn:g} %, fail above {100 * fail:g} % of all images{bound}",
            evidence=f"{fallen} of the {sizes[0]} images{left} fell ({n} in all)",
            advice="" if level == "pass" else advice, masking=blind,
        )  # fmt: skip

    return [
        finding("C9", "no other backward does better", "route", 0.01, 0.05,
                "report the worst case over surrogates, never one of them", False),
        finding("C15", "the code is attacked as well as it can be", "code", 0.002, 0.01,
                "attack a discrete encoder by its codebook, not by a straight-through gradient", False),
        finding("C10", "no transfer beats the own gradient", "transfer", 0.002, 0.01,
                "another model's gradient leads where the victim's does not; look at G1 to G7", True),
        finding("C11", "no black box beats the gradient", "black box", 0.002, 0.01,
                "scores alone lead where the gradient does not; look at G1 to G7", True),
    ]  # fmt: skip


def sample_size(n: int) -> Finding:
    """C21: how many images a share rests on."""
    half = 100 * max(hi - lo for lo, hi in [Rate(n // 2, n).interval()]) / 2
    return Finding(
        id="C21", name="sample size", level="pass" if n >= 1000 else "warn", value=float(n), limit="1000 or more",
        evidence=f"n={n}: at 50 % the interval is +-{half:.1f} points",
        advice="" if n >= 1000 else "take 1000 images or more for a claim",
    )  # fmt: skip
